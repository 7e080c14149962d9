"""How fast which parameter learns: groups by layer and by decay, and the learning rate's course. Knows no data and no trainer."""

from __future__ import annotations

import math
import re
from typing import Any

from torch import nn

MIN_LR_FRACTION = 0.01  # of the peak learning rate: where it starts from and ends


def layer_index(name: str, depth: int) -> int:
    """The layer of a ViT's parameter: 0 for stem, tokens and positions, 1 to `depth` for the blocks, depth + 1 for the rest."""
    if block := re.match(r"blocks\.(\d+)\.", name):
        return int(block[1]) + 1
    return 0 if name.startswith(("patch_embed", "cls_token", "reg_token", "pos_embed")) else depth + 1


def decayed_parameter_names(model: nn.Module) -> set[str]:
    """The parameters that weight decay pulls at: matrices and kernels, not biases, norms, tokens or positions. By their modules, for
    the parameters themselves have lost their shapes where a model is sharded."""
    return {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)}


def parameter_groups(
    model: nn.Module, lr: float, weight_decay: float, layer_decay: float = 1.0
) -> list[dict[str, Any]]:
    """Groups for the optimiser, one per layer and kind of decay, with `name` for the curves.

    Layer-wise decay of the learning rate (Bao et al. 2022, arXiv 2106.08254, appendix): the layer k steps below the head learns with
    lr * layer_decay ** k. Parameters that are no part of a ViT's body (auxiliary heads, sources, fusion) learn as the head does.
    """
    matrices = decayed_parameter_names(model)
    learning = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    inner = {name: name.removeprefix("model.").removeprefix("trunk.") for name in learning}
    depth = max((layer_index(name, -1) for name in inner.values() if name.startswith("blocks.")), default=0)
    groups: dict[str, dict[str, Any]] = {}
    for name, parameter in learning.items():
        layer = layer_index(inner[name], depth) if layer_decay < 1 else depth + 1
        place = (
            "all" if layer_decay == 1 else "stem" if layer == 0 else "head" if layer > depth else f"block_{layer - 1}"
        )
        kind = "" if name in matrices else "_undecayed"
        empty = {
            "name": place + kind, "params": [], "lr": lr * layer_decay ** (depth + 1 - layer), "weight_decay": 0.0 if kind else weight_decay
        }  # fmt: skip
        groups.setdefault(place + kind, empty)["params"].append(parameter)
    return list(groups.values())


def warmup_cosine(done: float, warmup: float) -> float:
    """The share of the peak learning rate when the share `done` (0 to 1) of the training is over: it rises linearly over the share
    `warmup`, then falls as half a cosine; 1 % at both ends (Loshchilov and Hutter 2017, arXiv 1608.03983; Goyal et al. 2017)."""
    if done < warmup:
        return max(MIN_LR_FRACTION, done / warmup)
    fallen = (min(done, 1.0) - warmup) / (1 - warmup)
    return MIN_LR_FRACTION + (1 - MIN_LR_FRACTION) * 0.5 * (1 + math.cos(math.pi * fallen))
