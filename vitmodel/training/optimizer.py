"""Parameter groups for layer-wise learning rates and weight decay, and the learning rate schedule."""

from __future__ import annotations

import math
import re
from typing import Any

from torch import nn

MIN_LR_FRACTION = 0.01  # learning rate at the start and at the end, as a fraction of its peak


def layer_index(name: str, depth: int) -> int:
    """Return the layer of a ViT's parameter.

    It is 0 for stem, tokens and positions, 1 to `depth` for the blocks, and depth + 1 for all other parameters.
    """
    if block := re.match(r"blocks\.(\d+)\.", name):
        return int(block[1]) + 1
    return 0 if name.startswith(("patch_embed", "cls_token", "reg_token", "pos_embed")) else depth + 1


def decayed_parameter_names(model: nn.Module) -> set[str]:
    """Return the names of the parameters with weight decay: matrices and kernels, not biases, norms, tokens, positions.

    They are identified by their modules, because the parameters of a sharded model have lost their shapes.
    """
    return {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)}


def parameter_groups(
    model: nn.Module, lr: float, weight_decay: float, layer_decay: float = 1.0
) -> list[dict[str, Any]]:
    """Return parameter groups for the optimizer, one per layer and kind of decay, each with a `name` for the logs.

    The learning rate decays by layer (Bao et al. 2022, arXiv 2106.08254, appendix): the layer k steps below the head
    gets lr * layer_decay ** k. Parameters outside the ViT's backbone (auxiliary heads, sources, fusion) get the head's
    rate.

    Args:
        model: A ViT, or a module that holds one as `model` or `model.trunk`.
        lr: Learning rate of the head.
        weight_decay: Weight decay of matrices and kernels; all other parameters have none.
        layer_decay: Factor per layer in (0, 1]. 1 puts all layers into one group.
    """
    decayed = decayed_parameter_names(model)
    trainable = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    vit_names = {name: name.removeprefix("model.").removeprefix("trunk.") for name in trainable}
    depth = max((layer_index(name, -1) for name in vit_names.values() if name.startswith("blocks.")), default=0)
    groups: dict[str, dict[str, Any]] = {}
    for name, parameter in trainable.items():
        layer = layer_index(vit_names[name], depth) if layer_decay < 1 else depth + 1
        group_name = "all" if layer_decay == 1 else _layer_name(layer, depth)
        if name not in decayed:
            group_name += "_undecayed"
        empty_group = {
            "name": group_name,
            "params": [],
            "lr": lr * layer_decay ** (depth + 1 - layer),
            "weight_decay": weight_decay if name in decayed else 0.0,
        }
        groups.setdefault(group_name, empty_group)["params"].append(parameter)
    return list(groups.values())


def _layer_name(layer: int, depth: int) -> str:
    """Return the name of a layer index in the logs."""
    if layer == 0:
        return "stem"
    return "head" if layer > depth else f"block_{layer - 1}"


def warmup_cosine(done: float, warmup: float) -> float:
    """Return the learning rate as a fraction of its peak.

    It rises linearly during warm-up, then falls as half a cosine, and is 1 % of the peak at both ends (Loshchilov and
    Hutter 2017, arXiv 1608.03983; Goyal et al. 2017).

    Args:
        done: Fraction of the training that is done, 0 to 1.
        warmup: Fraction of the training that is warm-up.
    """
    if done < warmup:
        return max(MIN_LR_FRACTION, done / warmup)
    decay_progress = (min(done, 1.0) - warmup) / (1 - warmup)
    return MIN_LR_FRACTION + (1 - MIN_LR_FRACTION) * 0.5 * (1 + math.cos(math.pi * decay_progress))
