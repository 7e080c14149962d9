"""A bare Vision Transformer with published weights, its sizes read from the file."""

from __future__ import annotations

import logging
import math
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from vitmodel.errors import UsageError
from vitmodel.model.architecture import PRESETS, ViTConfig
from vitmodel.model.vit import ViT
from vitmodel.model.weights import BackboneShape, PretrainedWeights, fit_weights, load_weights

logger = logging.getLogger(__name__)


def vit_from_weights(path: Path | str, **overrides: Any) -> ViT:
    """Return a ViT of the file's sizes with the file's weights; see `ViT.from_pretrained`."""
    if unknown := sorted(set(overrides) - {field.name for field in fields(ViTConfig)}):
        names = ", ".join(field.name for field in fields(ViTConfig))
        raise UsageError(f"{unknown[0]}: is no field of ViTConfig; there are {names}")
    weights = load_weights(path)
    model = ViT(ViTConfig(**described(weights) | overrides))
    logger.info("%s", fit_weights(model, weights))
    return model.eval()


def described(weights: PretrainedWeights) -> dict[str, Any]:
    """Return the fields of ViTConfig that the tensors of a file determine, heads by the preset of the same width."""
    tensors = weights.tensors
    outline = BackboneShape.from_tensors(tensors)
    if outline is None:
        raise UsageError(
            f"{weights.path}: holds no Vision Transformer; take a ViT of timm, Hugging Face, Google or vitmodel"
        )
    preset = next((preset for preset in PRESETS.values() if preset.dim == outline.dim), None)
    values = {} if preset is None else asdict(preset)
    values |= {"dim": outline.dim, "depth": outline.depth, "mlp_ratio": outline.hidden / outline.dim}
    values |= {"registers": tensors["reg_token"].shape[1] if "reg_token" in tensors else 0}
    values |= {"layer_scale": 1e-5 if "blocks.0.ls1.gamma" in tensors else None}
    halvings = sum(name.startswith("patch_embed.convs.") and name.endswith(".weight") for name in tensors)
    if halvings:
        values |= {"stem": "conv", "patch": 2**halvings}
    else:
        values["patch"] = outline.patch
    if weights.eps is not None:
        values["eps"] = weights.eps
    if "head.weight" in tensors and weights.head_is_usable:
        values["classes"] = tensors["head.weight"].shape[0]
    values["pool"] = _pool(weights)
    rows, columns = _grid(weights, values["registers"])
    values["image_size"] = (rows * values["patch"], columns * values["patch"])
    return values


def _pool(weights: PretrainedWeights) -> str:
    """Return how the file's network reads its tokens: by attention, by their mean (`fc_norm`), or by the class token."""
    if any(name.startswith("attn_pool.") for name in weights.tensors):
        return "attention"
    return "mean" if "fc_norm.weight" in weights.tensors or "cls_token" not in weights.tensors else "cls"


def _grid(weights: PretrainedWeights, registers: int) -> tuple[int, int]:
    """Return the grid of the file's position embeddings; published ones are square, after those of the prefix tokens."""
    positions = weights.tensors["pos_embed"]
    if weights.is_vitmodel:
        return positions.shape[1], positions.shape[2]
    length = positions.shape[1]
    for prefix in (0, 1, 1 + registers):
        side = math.isqrt(max(0, length - prefix))
        if side * side == length - prefix:
            return side, side
    raise UsageError(
        f"{weights.path}: pos_embed {tuple(positions.shape)} is no square grid; take weights of a square image size"
    )
