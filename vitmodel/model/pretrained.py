"""A Vision Transformer with published weights, whose sizes are read from the weight file."""

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
    """Return a ViT with the sizes and weights of a file; `ViT.from_pretrained` describes arguments and errors."""
    if unknown := sorted(set(overrides) - {field.name for field in fields(ViTConfig)}):
        names = ", ".join(field.name for field in fields(ViTConfig))
        raise UsageError(f"{unknown[0]}: not a field of ViTConfig; choose from {names}")
    weights = load_weights(path)
    model = ViT(ViTConfig(**described(weights) | overrides))
    logger.info("%s", fit_weights(model, weights))
    return model.eval()


def described(weights: PretrainedWeights) -> dict[str, Any]:
    """Return the fields of ViTConfig that a file of weights determines.

    The number of heads cannot be read from tensors; it is that of the first preset of the same width.

    Raises:
        UsageError: The file contains no Vision Transformer, or its position embeddings form no square grid.
    """
    tensors = weights.tensors
    shape = BackboneShape.from_tensors(tensors)
    if shape is None:
        raise UsageError(
            f"{weights.path}: contains no Vision Transformer; use a ViT of timm, Hugging Face, Google or vitmodel"
        )
    preset = next((preset for preset in PRESETS.values() if preset.dim == shape.dim), None)
    values = {} if preset is None else asdict(preset)
    values |= {"dim": shape.dim, "depth": shape.depth, "mlp_ratio": shape.hidden / shape.dim}
    values |= {"registers": tensors["reg_token"].shape[1] if "reg_token" in tensors else 0}
    values |= {"layer_scale": 1e-5 if "blocks.0.ls1.gamma" in tensors else None}
    halvings = sum(name.startswith("patch_embed.convs.") and name.endswith(".weight") for name in tensors)
    if halvings:
        values |= {"stem": "conv", "patch": 2**halvings}
    else:
        values["patch"] = shape.patch
    if weights.eps is not None:
        values["eps"] = weights.eps
    if "head.weight" in tensors and weights.head_is_usable:
        values["classes"] = tensors["head.weight"].shape[0]
    values["pool"] = _pool(weights)
    rows, columns = _grid(weights, values["registers"])
    values["image_size"] = (rows * values["patch"], columns * values["patch"])
    return values


def preset_of(weights: PretrainedWeights) -> str:
    """Return the name of the preset that a file of weights fits.

    Raises:
        UsageError: No preset has the sizes of the file; names the nearest one.
    """
    values = described(weights)
    shape = BackboneShape.from_tensors(weights.tensors)
    sizes = ("dim", "depth", "mlp_ratio", "patch", "registers")
    found = [
        name
        for name, preset in PRESETS.items()
        if all(getattr(preset, size) == values[size] for size in sizes)
        and (preset.layer_scale is not None or values["layer_scale"] is None)
    ]
    # Weights without LayerScale fit a preset with it, because a scale of 1 has no effect, but rather one without.
    found.sort(key=lambda name: (PRESETS[name].layer_scale is None) != (values["layer_scale"] is None))
    if not found:
        raise UsageError(f"{weights.path}: contains {shape}, which no preset of --model fits; use other weights")
    return found[0]


def _pool(weights: PretrainedWeights) -> str:
    """Return the pooling of the file's network: attention, the mean of the patches (`fc_norm`), or the class token."""
    if any(name.startswith("attn_pool.") for name in weights.tensors):
        return "attention"
    return "mean" if "fc_norm.weight" in weights.tensors or "cls_token" not in weights.tensors else "cls"


def _grid(weights: PretrainedWeights, registers: int) -> tuple[int, int]:
    """Return the rows and columns of the file's position embeddings.

    Published embeddings form a square grid after those of the prefix tokens.
    """
    positions = weights.tensors["pos_embed"]
    if weights.is_vitmodel:
        return positions.shape[1], positions.shape[2]
    length = positions.shape[1]
    for prefix in (0, 1, 1 + registers):
        side = math.isqrt(max(0, length - prefix))
        if side * side == length - prefix:
            return side, side
    raise UsageError(
        f"{weights.path}: pos_embed {tuple(positions.shape)} is not a square grid; use weights for square images"
    )
