"""Load published weights into the ViT of this package.

Position embeddings are resized, colour channels and input normalisation are folded into the patch embedding, and heads
of other tasks are dropped. A `WeightReport` lists what was done with each tensor. `weight_files.py` reads the files,
`package.py` stores whole models.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vitmodel.errors import UsageError, VitmodelError
from vitmodel.model.architecture import PRESETS, ViTConfig
from vitmodel.model.onnx_weights import OnnxWeights, read_onnx
from vitmodel.model.vit import ViT, resize_positions
from vitmodel.model.weight_files import (
    FOLDER_FILES,
    ONNX_SUFFIX,
    check_exists,
    check_finite,
    read_tensors,
    to_timm,
)
from vitmodel.model.weight_source import find_weights

StateDict = dict[str, Tensor]
ACTIONS = ("loaded", "resized", "folded", "dropped", "fresh")


class Normalisation(NamedTuple):
    """Normalisation that weights expect of an input in [0, 1]: (x - mean) / std for red, green and blue."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


HALF_NORMALISATION = Normalisation((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
IMAGENET_NORMALISATION = Normalisation((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


@dataclass(frozen=True)
class PretrainedWeights:
    """Tensors of a weight file under timm's names, before they are fitted to a model."""

    path: Path
    tensors: StateDict
    unused_names: list[str]
    """Names of tensors in the file that do not belong to the ViT."""
    normalisation: Normalisation
    normalisation_origin: str
    """How the normalisation was determined; shown in the report."""
    eps: float | None = None
    """Constant that the layer norms add to the variance, if a config in the same folder states it."""
    head_is_usable: bool = True
    """Whether the head may be kept. That of `vitmodel pretrain` was trained on another task, at another prevalence."""
    antialias: bool = True
    """Whether position embeddings are resized with antialiasing, as where the weights come from."""

    @property
    def is_vitmodel(self) -> bool:
        """Whether vitmodel wrote the weights: positions are stored as a grid, and the input is in [0, 1]."""
        return "pos_embed" in self.tensors and self.tensors["pos_embed"].ndim == 4


class WeightAction(NamedTuple):
    """What was done with one tensor."""

    action: str
    """One of `ACTIONS`."""
    tensor: str
    note: str = ""


@dataclass(frozen=True)
class WeightReport:
    """What `fit_weights` did with each tensor; `str()` gives a table."""

    path: Path
    actions: tuple[WeightAction, ...]

    def tensors_by_action(self, action: str) -> list[str]:
        """Return the names of the tensors with this action."""
        return [entry.tensor for entry in self.actions if entry.action == action]

    def rows(self) -> list[WeightAction]:
        """Return the rows of the table, in which the tensors of one part are counted and not named."""
        groups = Counter(
            entry._replace(tensor=re.sub(r"^(blocks|sources|exam|segments|auxiliary)\..*", r"\1", entry.tensor))
            for entry in self.actions
        )
        return [
            entry._replace(tensor=entry.tensor + (f" ({count} tensors)" if count > 1 else ""))
            for entry, count in groups.items()
        ]

    def to_dict(self) -> dict[str, Any]:
        """Return the number of tensors by action and the rows of the table, for config.json."""
        counts = Counter(entry.action for entry in self.actions)
        return {"tensors": {action: counts[action] for action in ACTIONS}, "table": [list(row) for row in self.rows()]}

    def __str__(self) -> str:
        rows = self.rows()
        width = max(len(tensor) for _, tensor, _ in rows)
        lines = [f"  {action:8} {tensor:{width}}  {note}".rstrip() for action, tensor, note in rows]
        return "\n".join([f"weights from {self.path}", *lines])


def load_weights(path: Path | str, normalisation: Normalisation | None = None) -> PretrainedWeights:
    """Read weights of timm, Hugging Face, Google (.npz), DINO, DINOv2, MAE, ONNX or vitmodel. Their code never runs.

    Args:
        path: A weight file, a folder laid out as on a model hub or as a model package, or a name that
            `vitmodel.model.weight_source.find_weights` accepts.
        normalisation: Input normalisation of the weights. Default: the one that the folder's config states, else
            ImageNet's for DINO, DINOv2, MAE and DeiT (recognised by file name or tensors) and 0.5 for all others.

    Raises:
        UsageError: The file is missing, of an unknown kind, holds several models or uses an unsupported activation.
        VitmodelError: The file is damaged or can only be read by running code. Both messages name the file.
    """
    path, name = find_weights(path)
    config = _read_sibling_json(path, "config.json")
    if "members" in config:
        raise UsageError(
            f"{path.parent}: the package holds {config['members']} models, one per fold; "
            f"name the checkpoint of one fold, such as RUN/fold_0/checkpoints/last.ckpt"
        )
    if config.get("hidden_act", "gelu") != "gelu":
        raise UsageError(
            f"{path}: its MLPs use {config['hidden_act']} (config.json), but vitmodel supports only GELU; "
            f"use other weights"
        )
    source = _read_source(path)
    tensors, unused_names = to_timm(source.tensors)
    if normalisation is None:
        normalisation, origin = _infer_normalisation(path, tensors, config, name.repository if name else "")
    else:
        origin = "as requested"
    architecture = config.get("architecture")  # a dictionary in our packages, a name in timm's configs
    eps = source.eps
    head_is_usable = True
    if isinstance(architecture, dict):
        eps = architecture["eps"]
        head_is_usable = "calibration" in config
    return PretrainedWeights(
        path,
        tensors,
        [*unused_names, *source.unused_names],
        normalisation,
        origin,
        config.get("layer_norm_eps", eps),
        head_is_usable,
        _resizes_with_antialias(source.tensors) if source.antialias is None else source.antialias,
    )


def _read_source(path: Path) -> OnnxWeights:
    """Return the tensors of a weight file, and what a graph states in addition."""
    if path.suffix != ONNX_SUFFIX:
        return OnnxWeights(read_tensors(path), [], eps=None, antialias=None)
    check_exists(path)
    source = read_onnx(path)
    check_finite(path, source.tensors)
    return source


def _resizes_with_antialias(raw: StateDict) -> bool:
    """Return whether the library that names its tensors in this way resizes position embeddings with antialiasing.

    timm does. Hugging Face's ViT, ViT-MAE and DINOv2 and the authors' own code of DINO, DINOv2 and MAE do not, except
    for DINOv2 with registers.
    """
    names = set(raw)
    if any(name.endswith("register_tokens") for name in names):
        return True
    hugging_face = any(name.endswith("embeddings.position_embeddings") for name in names)
    authors = any(name.split(".")[-1] == "mask_token" for name in names)
    return not (hugging_face or authors)


def _read_sibling_json(path: Path, name: str) -> dict[str, Any]:
    """Return the content of the JSON file `name` in the folder of the weights; empty if absent or not a hub folder."""
    config = (path.parent if path.parent.name == "onnx" else path).with_name(name)
    if path.name not in FOLDER_FILES or not config.is_file():
        return {}
    try:
        values: dict[str, Any] = json.loads(config.read_text())
    except ValueError as error:
        raise VitmodelError(
            f"{config}: broken JSON ({error}); download it again, or delete it and set the normalisation yourself"
        ) from error
    return values


def _infer_normalisation(
    path: Path, tensors: StateDict, config: dict[str, Any], repository: str
) -> tuple[Normalisation, str]:
    """Return the input normalisation that weights were trained with, and how it was determined."""
    preprocessor = _read_sibling_json(path, "preprocessor_config.json")
    for name, values, mean, std in (
        ("preprocessor_config.json", preprocessor, "image_mean", "image_std"),
        ("config.json", config.get("pretrained_cfg", config), "mean", "std"),
    ):
        if len(values.get(mean) or ()) == len(values.get(std) or ()) == 3:
            return Normalisation(tuple(values[mean]), tuple(values[std])), f"stated in {name}"
    folder_name = path.parent.name if path.name in FOLDER_FILES else ""
    model_type = config.get("pretrained_cfg", config).get("model_type", "")
    names = f"{repository} {folder_name} {path.name} {model_type}".lower()
    if {"mask_token", "reg_token", "blocks.0.ls1.gamma"} & set(tensors) or re.search(r"dino|mae|deit", names):
        return IMAGENET_NORMALISATION, "assumed, as for DINO, MAE and DeiT"
    return HALF_NORMALISATION, "assumed, as for Google's and augreg"


class BackboneShape(NamedTuple):
    """Sizes in which weights and model must agree."""

    dim: int
    depth: int
    hidden: int
    patch: int
    """Side of a patch in pixels. 1 with a convolutional stem, whose last kernel has this size."""

    @classmethod
    def from_config(cls, config: ViTConfig) -> BackboneShape:
        """Return the shape that a configuration describes."""
        return cls(config.dim, config.depth, config.hidden, config.patch if config.stem == "linear" else 1)

    @classmethod
    def from_tensors(cls, tensors: StateDict) -> BackboneShape | None:
        """Return the shape of a file's tensors, or None if they are not those of a ViT."""
        depth = sum(name.startswith("blocks.") and name.endswith(".attn.qkv.weight") for name in tensors)
        if depth == 0 or not {
            "patch_embed.proj.weight",
            "patch_embed.proj.bias",
            "pos_embed",
            "blocks.0.mlp.fc1.weight",
        } <= set(tensors):
            return None
        hidden, dim = tensors["blocks.0.mlp.fc1.weight"].shape
        return cls(dim, depth, hidden, tensors["patch_embed.proj.weight"].shape[-1])

    def is_compatible_with(self, model: BackboneShape) -> bool:
        """Return whether blocks of this shape fit `model`. Stems may differ, patch sizes may not."""
        return self[:3] == model[:3] and (self.patch == model.patch or 1 in (self.patch, model.patch))

    def __str__(self) -> str:

        def distance(preset: ViTConfig) -> tuple[float, int, bool]:
            return (
                abs(math.log(preset.dim / self.dim)),
                abs(preset.depth - self.depth),
                self.patch not in (1, preset.patch),
            )

        name, preset = min(PRESETS.items(), key=lambda item: distance(item[1]))
        prefix = "nearest preset " if any(distance(preset)) else ""
        return f"a ViT of dim {self.dim}, depth {self.depth}, MLP {self.hidden}, patch {self.patch} ({prefix}{name})"


# Parts that change the output of a ViT and that this one does not have.
UNSUPPORTED_PARTS = {
    r"norm_pre\.|ln_pre\.|pre_layrnorm\.": "a norm before the blocks (norm_pre, CLIP-style)",
    r"dist_token|distillation_token": "a distillation token (DeiT)",
    r"\.[qk]_norm\.": "norms of queries and keys",
    r"\.mlp\.(w12|weights_in|fc1_g)\.": "gated MLPs (SwiGLU)",
    r"relative_position": "relative positions (BEiT)",
    r"rope": "rotary positions (DINOv3, EVA)",
}
DROPPABLE = re.compile(
    r"(head|head_dist|fc_norm|norm|attn_pool|pre_logits|pooler|decoder\w*|mask_token"
    r"|sources|exam|segments|auxiliary)(\..*)?"
)
MAY_BE_INITIALISED = re.compile(r"(head|attn_pool)\..*|reg_token|cls_token")
INITIALISED_NOTES = dict.fromkeys(
    ("cls_token", "reg_token"),
    "missing in the file; other tokens attend to it, so the features differ slightly from the file's",
)


def fit_weights(model: ViT, weights: PretrainedWeights) -> WeightReport:
    """Copy `weights` into `model`, adapted to its image size, channels, pooling and classes.

    Either the whole backbone is loaded, or `model` stays as it is.

    Args:
        model: The network; changed in place.
        weights: The tensors, as returned by `load_weights`.

    Returns:
        What was done with each tensor.

    Raises:
        UsageError: The backbone does not fit. The message names the tensors and the nearest preset.
    """
    own = model.state_dict()
    _check_compatible(model, weights)
    state = {name: tensor.float() for name, tensor in weights.tensors.items()}
    actions = [WeightAction("dropped", name, "not part of the ViT") for name in weights.unused_names]
    actions += _fit_positions(state, own, weights)
    actions += _fit_patches(state, own, weights)
    actions += _fit_norm_and_head(state, own, weights)
    for name in list(state):
        if name not in own and DROPPABLE.fullmatch(name):
            actions.append(WeightAction("dropped", f"{name} {tuple(state.pop(name).shape)}"))
        elif name not in own:
            raise UsageError(
                f"{weights.path}: {_name_with_shape(name, state)} has no place in the model; {_advice(name, state)}"
            )
        elif state[name].shape != own[name].shape:
            raise UsageError(
                f"{weights.path}: {_name_with_shape(name, state)} does not fit the model's "
                f"{_name_with_shape(name, own)}; {_advice(name, state)}"
            )
    if missing := [name for name in own if name not in state and not MAY_BE_INITIALISED.fullmatch(name)]:
        names = ", ".join(_name_with_shape(name, own) for name in missing[:3])
        raise UsageError(f"{weights.path}: lacks {names}, which the model needs; use complete weights")
    model.load_state_dict(state, strict=False)
    reported = {entry.tensor for entry in actions}
    actions += [
        WeightAction("loaded", name) if name in state else WeightAction("fresh", name, INITIALISED_NOTES.get(name, ""))
        for name in own
        if name not in reported
    ]
    return WeightReport(weights.path, tuple(sorted(actions, key=lambda entry: ACTIONS.index(entry.action))))


def _check_compatible(model: ViT, weights: PretrainedWeights) -> None:
    """Raise UsageError if the weights are not those of a ViT, have unsupported parts, or have other sizes."""
    path = weights.path
    tensors = weights.tensors
    for pattern, part in UNSUPPORTED_PARTS.items():
        if name := next((name for name in tensors if re.search(pattern, name)), None):
            raise UsageError(
                f"{path}: {_name_with_shape(name, tensors)} belongs to {part}, which vitmodel's ViT does not have; "
                f"use other weights"
            )
    wanted = BackboneShape.from_config(model.config)
    offered = BackboneShape.from_tensors(tensors)
    if offered is None:
        first = ", ".join(_name_with_shape(name, tensors) for name in list(tensors)[:3]) or "no tensor"
        raise UsageError(
            f"{path}: contains no Vision Transformer (its first tensors: {first}); "
            f"the model is {wanted}: use weights of such a model"
        )
    if not offered.is_compatible_with(wanted):
        names = ("patch_embed.proj.weight", "blocks.0.mlp.fc1.weight")
        shapes = ", ".join(_name_with_shape(name, tensors) for name in names)
        raise UsageError(
            f"{path}: contains {offered}, with {shapes}; the model is {wanted}: use the preset that matches the file"
        )
    if weights.eps is not None and weights.eps != model.config.eps:
        raise UsageError(
            f"{path}: its layer norms add {weights.eps:g} to the variance, the model's add {model.config.eps:g}; "
            f"build the model with eps={weights.eps:g}"
        )
    # No file states its number of heads, and a wrong number would load and compute something else.
    heads = {preset.heads for preset in PRESETS.values() if preset.dim == model.config.dim} - {model.config.heads}
    if not weights.is_vitmodel and heads:
        published = heads.pop()
        raise UsageError(
            f"{path}: published ViTs of dim {model.config.dim} have {published} heads, not {model.config.heads}; "
            f"set heads to {published}"
        )


def _fit_positions(state: StateDict, own: StateDict, weights: PretrainedWeights) -> list[WeightAction]:
    """Resize the position embeddings in `state` to the model's grid.

    Positions of the prefix tokens (class token, registers) are added to these tokens.
    """
    positions = state["pos_embed"]
    if not weights.is_vitmodel:
        length = positions.shape[1]
        prefix = _count_prefix_positions(state)
        if prefix is None:
            raise UsageError(
                f"{weights.path}: {_name_with_shape('pos_embed', state)} is not a square grid; "
                f"use weights of a square image size"
            )
        if prefix:
            state["cls_token"] = state["cls_token"] + positions[:, :1]
        if prefix > 1:
            state["reg_token"] = state["reg_token"] + positions[:, 1:prefix]
        positions = positions[:, prefix:].unflatten(1, (math.isqrt(length - prefix), -1))
    old_rows, old_columns = positions.shape[1:3]
    rows, columns = own["pos_embed"].shape[1:3]
    state["pos_embed"] = resize_positions(positions, (rows, columns), weights.antialias)
    if (old_rows, old_columns) == (rows, columns):
        return []
    how = "" if weights.antialias else ", without antialiasing, as where the weights come from"
    return [WeightAction("resized", "pos_embed", f"{old_rows}x{old_columns} -> {rows}x{columns} patches{how}")]


def _count_prefix_positions(state: StateDict) -> int | None:
    """Return how many position embeddings belong to prefix tokens; None if no count leaves a square grid."""
    length = state["pos_embed"].shape[1]
    registers = state["reg_token"].shape[1] if "reg_token" in state else 0
    candidates: tuple[int, ...] = (0,)
    if "cls_token" in state:
        # Files with registers rarely give them positions.
        candidates = (0, 1, 1 + registers) if registers else (1, 0)
    for count in candidates:
        if length > count and math.isqrt(length - count) ** 2 == length - count:
            return count
    return None


def _fit_patches(state: StateDict, own: StateDict, weights: PretrainedWeights) -> list[WeightAction]:
    """Adapt the patch embedding in `state` to an input in [0, 1] with the model's channels.

    If the stems differ, the model keeps its own. For a grey image g, the sum over channels c is
    sum_c w_c * (g - mean_c) / std_c + bias = (sum_c w_c / std_c) * g + (bias - sum_c w_c mean_c / std_c).
    """
    weight = state["patch_embed.proj.weight"].double()  # (D, C, P, P)
    if weight.shape[2:] != own["patch_embed.proj.weight"].shape[2:]:
        old = [name for name in state if name.startswith("patch_embed.")]
        new = [name for name in own if name.startswith("patch_embed.")]
        actions = [WeightAction("dropped", f"{name} {tuple(state.pop(name).shape)}", "another stem") for name in old]
        state |= {name: own[name] for name in new}
        return actions + [WeightAction("fresh", name, "another stem") for name in new]
    if weights.is_vitmodel or weight.shape[1] != 3:
        return []
    mean, std = (torch.tensor(values, dtype=torch.float64).view(1, 3, 1, 1) for values in weights.normalisation)
    weight = weight / std
    state["patch_embed.proj.bias"] = (state["patch_embed.proj.bias"] - (weight * mean).sum(dim=(1, 2, 3))).float()
    is_grey = own["patch_embed.proj.weight"].shape[1] == 1
    state["patch_embed.proj.weight"] = (weight.sum(dim=1, keepdim=True) if is_grey else weight).float()
    means, stds = ("/".join(f"{value:g}" for value in dict.fromkeys(values)) for values in weights.normalisation)
    channels = "3 channels -> 1, " if is_grey else ""
    note = f"{channels}input normalisation by mean {means}, std {stds} ({weights.normalisation_origin})"
    return [WeightAction("folded", f"patch_embed.proj.{part}", note) for part in ("weight", "bias")]


def _fit_norm_and_head(state: StateDict, own: StateDict, weights: PretrainedWeights) -> list[WeightAction]:
    """Rename the last norm to the model's name, drop a head of other classes, and set missing LayerScales to 1."""
    actions = []
    wanted, other = ("fc_norm", "norm") if "fc_norm.weight" in own else ("norm", "fc_norm")
    if f"{wanted}.weight" not in state and f"{other}.weight" in state:
        state |= {f"{wanted}.{part}": state.pop(f"{other}.{part}") for part in ("weight", "bias")}
        actions += [
            WeightAction("loaded", f"{wanted}.{part}", f"named {other} in the file") for part in ("weight", "bias")
        ]
    same_classes = "head.weight" in state and state["head.weight"].shape == own["head.weight"].shape
    if not (same_classes and weights.head_is_usable) or any(name.startswith("pre_logits") for name in state):
        actions += [
            WeightAction("dropped", f"{name} {tuple(state.pop(name).shape)}")
            for name in ("head.weight", "head.bias")
            if name in state
        ]
    for name in own:
        if name.endswith(".gamma") and name not in state:
            state[name] = torch.ones_like(own[name])
            actions.append(WeightAction("fresh", name, "1, because the file has no LayerScale"))
    return actions


def _name_with_shape(name: str, tensors: StateDict) -> str:
    return f"{name} {tuple(tensors[name].shape)}"


def _advice(name: str, state: StateDict) -> str:
    """Return what to change so that tensor `name` of the file fits the model."""
    if name == "reg_token":
        return f"set registers to {state[name].shape[1]}, as the presets of DINOv2 with registers do"
    if name.endswith(".gamma"):
        return "set layer_scale to a number, as the presets of DINOv2 do"
    return "the architectures differ, use other weights"
