"""Short names of the published weights that the field starts from.

The licence is the one that the repository's card states, and the size is that of the file in megabytes.
"""

from __future__ import annotations

from typing import NamedTuple


class Alias(NamedTuple):
    """Published weights of a Vision Transformer."""

    repository: str
    preset: str
    """Value of `--model` that they fit."""
    megabytes: int
    licence: str
    paper: str
    """arXiv number."""


VIT, AUGREG, DINO, DINOV2, REGISTERS, MAE = (
    "2010.11929",
    "2106.10270",
    "2104.14294",
    "2304.07193",
    "2309.16588",
    "2111.06377",
)

ALIASES: dict[str, Alias] = {
    # jx_vit_base_patch16_224_in21k, from which the original recipe starts
    "in21k": Alias("timm/vit_base_patch16_224.orig_in21k", "vit_base", 343, "apache-2.0", VIT),
    "in21k-tiny": Alias("timm/vit_tiny_patch16_224.augreg_in21k", "vit_tiny", 39, "apache-2.0", AUGREG),
    "in21k-small": Alias("timm/vit_small_patch16_224.augreg_in21k", "vit_small", 120, "apache-2.0", AUGREG),
    "in21k-base": Alias("timm/vit_base_patch16_224.augreg_in21k", "vit_base", 410, "apache-2.0", AUGREG),
    "in21k-large": Alias("timm/vit_large_patch16_224.augreg_in21k", "vit_large", 1303, "apache-2.0", AUGREG),
    "imagenet": Alias("timm/vit_base_patch16_224.augreg2_in21k_ft_in1k", "vit_base", 346, "apache-2.0", AUGREG),
    "imagenet-tiny": Alias("timm/vit_tiny_patch16_224.augreg_in21k_ft_in1k", "vit_tiny", 23, "apache-2.0", AUGREG),
    "imagenet-small": Alias("timm/vit_small_patch16_224.augreg_in21k_ft_in1k", "vit_small", 88, "apache-2.0", AUGREG),
    "imagenet-large": Alias("timm/vit_large_patch16_224.augreg_in21k_ft_in1k", "vit_large", 1217, "apache-2.0", AUGREG),
    "dino-small": Alias("timm/vit_small_patch16_224.dino", "vit_small", 87, "apache-2.0", DINO),
    "dino-small8": Alias("timm/vit_small_patch8_224.dino", "vit_small8", 87, "apache-2.0", DINO),
    "dino-base": Alias("timm/vit_base_patch16_224.dino", "vit_base", 343, "apache-2.0", DINO),
    "dino-base8": Alias("timm/vit_base_patch8_224.dino", "vit_base8", 343, "apache-2.0", DINO),
    "dinov2-small": Alias("facebook/dinov2-small", "vit_small14", 88, "apache-2.0", DINOV2),
    "dinov2-base": Alias("facebook/dinov2-base", "vit_base14", 346, "apache-2.0", DINOV2),
    "dinov2-large": Alias("facebook/dinov2-large", "vit_large14", 1217, "apache-2.0", DINOV2),
    "dinov2-small-reg": Alias("facebook/dinov2-with-registers-small", "vit_small14_reg4", 88, "apache-2.0", REGISTERS),
    "dinov2-base-reg": Alias("facebook/dinov2-with-registers-base", "vit_base14_reg4", 346, "apache-2.0", REGISTERS),
    "dinov2-large-reg": Alias(
        "facebook/dinov2-with-registers-large", "vit_large14_reg4", 1217, "apache-2.0", REGISTERS
    ),
    "mae-base": Alias("timm/vit_base_patch16_224.mae", "vit_base", 343, "cc-by-nc-4.0", MAE),
    "mae-large": Alias("timm/vit_large_patch16_224.mae", "vit_large", 1213, "cc-by-nc-4.0", MAE),
}
"""Alias -> weights. `vitmodel weights` prints this table."""
