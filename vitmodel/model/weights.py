"""Published weights into our ViT: positions resized, colour and input normalisation folded, old heads dropped, all of it reported.

Knows nothing of training; `formats.py` reads the files, `package.py` keeps whole models.
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
from vitmodel.model.vit import ViT, resize_positions
from vitmodel.model.weight_files import FOLDER_FILES, read_tensors, to_timm

StateDict = dict[str, Tensor]
ACTIONS = ("loaded", "resized", "folded", "dropped", "fresh")


class Normalisation(NamedTuple):
    """What weights expect of their input in [0, 1]: (x - mean) / std for red, green and blue."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


HALF_NORMALISATION = Normalisation((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
IMAGENET_NORMALISATION = Normalisation((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


@dataclass(frozen=True)
class PretrainedWeights:
    """A file's tensors under timm's names, before they are fitted to a model."""

    path: Path
    tensors: StateDict
    unused_names: list[str]
    """Names of tensors in the file that are no part of the ViT."""
    normalisation: Normalisation
    normalisation_origin: str
    """Where the normalisation comes from."""
    eps: float | None = None
    """What their layer norms add to the variance, where a config beside them says so."""
    head_is_usable: bool = True
    """Whether the head may be gone on with; that of `vitmodel pretrain` learned another task, at another prevalence."""

    @property
    def is_vitmodel(self) -> bool:
        """Whether we wrote them: positions kept as the grid that they are, and an input of [0, 1]."""
        return "pos_embed" in self.tensors and self.tensors["pos_embed"].ndim == 4


class WeightAction(NamedTuple):
    """What became of one tensor."""

    action: str
    """One of `ACTIONS`."""
    tensor: str
    note: str = ""


@dataclass(frozen=True)
class WeightReport:
    """What `fit_weights` did; as text, a table."""

    path: Path
    actions: tuple[WeightAction, ...]

    def tensors_by_action(self, action: str) -> list[str]:
        """The tensors that `action` befell."""
        return [fate.tensor for fate in self.actions if fate.action == action]

    def __str__(self) -> str:
        groups = Counter(
            fate._replace(tensor=re.sub(r"^(blocks|sources|exam|segments)\..*", r"\1", fate.tensor))
            for fate in self.actions
        )
        rows = [
            (fate.action, fate.tensor + (f" ({count} tensors)" if count > 1 else ""), fate.note)
            for fate, count in groups.items()
        ]
        width = max(len(tensor) for _, tensor, _ in rows)
        lines = [f"  {action:8} {tensor:{width}}  {note}".rstrip() for action, tensor, note in rows]
        return "\n".join([f"weights from {self.path}", *lines])


def load_weights(path: Path | str, normalisation: Normalisation | None = None) -> PretrainedWeights:
    """Read weights of timm, Hugging Face, Google (.npz), DINO, DINOv2, MAE or of ours: a file, or a folder as on a hub or of a package.

    `normalisation` defaults to what the folder's config states, else to ImageNet's for DINO, DINOv2, MAE and DeiT (told by names or
    tensors) and to 0.5 for the rest. Raises UsageError or VitmodelError naming the file; never runs code that a file holds.
    """
    path = Path(path)
    if path.is_dir():
        path = next((path / name for name in FOLDER_FILES if (path / name).is_file()), path / FOLDER_FILES[0])
    config = _read_sibling_json(path, "config.json")
    if "members" in config:
        raise UsageError(
            f"{path.parent}: holds {config['members']} models, of folds; take one, such as RUN/fold_0/checkpoints/last.ckpt"
        )
    if config.get("hidden_act", "gelu") != "gelu":
        raise UsageError(f"{path}: its MLPs use {config['hidden_act']} (config.json), ours GELU; take other weights")
    tensors, outside = to_timm(read_tensors(path))
    found = (normalisation, "as asked") if normalisation else _normalisation(path, tensors, config)
    own = config.get("architecture")  # of our packages; timm has a name there
    eps, scores = (own["eps"], "calibration" in config) if isinstance(own, dict) else (None, True)
    return PretrainedWeights(path, tensors, outside, *found, config.get("layer_norm_eps", eps), scores)


def _read_sibling_json(path: Path, name: str) -> dict[str, Any]:
    """What the file `name` says of weights that lie in a folder as on a hub or of a package; nothing where it is absent."""
    config = path.with_name(name)
    if path.name not in FOLDER_FILES or not config.is_file():
        return {}
    try:
        values: dict[str, Any] = json.loads(config.read_text())
    except ValueError as error:
        raise VitmodelError(
            f"{config}: broken ({error}); fetch it again, or remove it and state the normalisation"
        ) from error
    return values


def _normalisation(path: Path, tensors: StateDict, config: dict[str, Any]) -> tuple[Normalisation, str]:
    """The input normalisation that weights were trained with, and how that is known."""
    preprocessor, config = _read_sibling_json(path, "preprocessor_config.json"), config.get("pretrained_cfg", config)
    for name, values, mean, std in (
        ("preprocessor_config.json", preprocessor, "image_mean", "image_std"),
        ("config.json", config, "mean", "std"),
    ):
        if len(values.get(mean) or ()) == len(values.get(std) or ()) == 3:
            return Normalisation(tuple(values[mean]), tuple(values[std])), f"stated in {name}"
    called = (
        f"{path.parent.name if path.name in FOLDER_FILES else ''} {path.name} {config.get('model_type', '')}".lower()
    )
    if {"mask_token", "reg_token", "blocks.0.ls1.gamma"} & set(tensors) or re.search(r"dino|mae|deit", called):
        return IMAGENET_NORMALISATION, "assumed, as for DINO, MAE and DeiT"
    return HALF_NORMALISATION, "assumed, as for Google's and augreg"


class BackboneShape(NamedTuple):
    """The sizes that weights and model must share."""

    dim: int
    depth: int
    hidden: int
    patch: int
    """Side of the patch in pixels; 1 with a convolutional stem, whose last kernel it is."""

    @classmethod
    def from_config(cls, config: ViTConfig) -> BackboneShape:
        """What a config asks for."""
        return cls(config.dim, config.depth, config.hidden, config.patch if config.stem == "linear" else 1)

    @classmethod
    def from_tensors(cls, tensors: StateDict) -> BackboneShape | None:
        """What a file offers; None where it holds no ViT."""
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
        """Whether blocks of these sizes go into the model; stems may differ, patch sizes not."""
        return self[:3] == model[:3] and (self.patch == model.patch or 1 in (self.patch, model.patch))

    def __str__(self) -> str:

        def distance(preset: ViTConfig) -> tuple[float, int, bool]:
            return (
                abs(math.log(preset.dim / self.dim)),
                abs(preset.depth - self.depth),
                self.patch not in (1, preset.patch),
            )

        name, preset = min(PRESETS.items(), key=lambda item: distance(item[1]))
        nearness = "nearest preset " if any(distance(preset)) else ""
        return f"a ViT of dim {self.dim}, depth {self.depth}, MLP {self.hidden}, patch {self.patch} ({nearness}{name})"


# Parts that change what a ViT computes and that ours does not have.
UNSUPPORTED_PARTS = {
    r"norm_pre\.|ln_pre\.|pre_layrnorm\.": "a norm before the blocks (norm_pre, CLIP-style)",
    r"dist_token|distillation_token": "a distillation token (DeiT)",
    r"\.[qk]_norm\.": "norms of queries and keys",
    r"\.mlp\.(w12|weights_in|fc1_g)\.": "gated MLPs (SwiGLU)",
    r"relative_position": "relative positions (BEiT)",
    r"rope": "rotary positions (DINOv3, EVA)",
}
DROPPABLE = re.compile(
    r"(head|head_dist|fc_norm|norm|attn_pool|pre_logits|pooler|decoder\w*|mask_token|sources|exam|segments)(\..*)?"
)
MAY_BE_INITIALISED = re.compile(r"(head|attn_pool)\..*|reg_token|cls_token")
INITIALISED_NOTES = dict.fromkeys(
    ("cls_token", "reg_token"), "the file has none; others attend to it, so the features are not quite the file's"
)


def fit_weights(model: ViT, weights: PretrainedWeights) -> WeightReport:
    """Copy `weights` into `model`, changed as its image size, channels, pooling and classes ask. Loads all of the body or nothing.

    Raises UsageError naming the offending tensors and the nearest preset where the body does not fit.
    """
    own = model.state_dict()
    _check_compatible(model, weights)
    state = {name: tensor.float() for name, tensor in weights.tensors.items()}
    actions = [WeightAction("dropped", name, "no part of the ViT") for name in weights.unused_names]
    actions += (
        _fit_positions(state, own, weights)
        + _fit_patches(state, own, weights)
        + _fit_norm_and_head(state, own, weights)
    )
    for name in list(state):
        if name not in own and DROPPABLE.fullmatch(name):
            actions.append(WeightAction("dropped", f"{name} {tuple(state.pop(name).shape)}"))
        elif name not in own:
            raise UsageError(
                f"{weights.path}: {_name_with_shape(name, state)} has no place in the model; {_advice(name, state)}"
            )
        elif state[name].shape != own[name].shape:
            raise UsageError(
                f"{weights.path}: {_name_with_shape(name, state)} does not fit {_name_with_shape(name, own)} here; {_advice(name, state)}"
            )
    if missing := [name for name in own if name not in state and not MAY_BE_INITIALISED.fullmatch(name)]:
        raise UsageError(
            f"{weights.path}: lacks {', '.join(_name_with_shape(name, own) for name in missing[:3])}, which the model needs"
        )
    model.load_state_dict(state, strict=False)
    told = {fate.tensor for fate in actions}
    actions += [
        WeightAction("loaded", name) if name in state else WeightAction("fresh", name, INITIALISED_NOTES.get(name, ""))
        for name in own
        if name not in told
    ]
    return WeightReport(weights.path, tuple(sorted(actions, key=lambda fate: ACTIONS.index(fate.action))))


def _check_compatible(model: ViT, weights: PretrainedWeights) -> None:
    """Refuse what is no ViT, has parts that ours lacks, or has other sizes. Raises UsageError."""
    path, tensors = weights.path, weights.tensors
    for pattern, part in UNSUPPORTED_PARTS.items():
        if found := next((name for name in tensors if re.search(pattern, name)), None):
            raise UsageError(
                f"{path}: {_name_with_shape(found, tensors)} belongs to {part}, which our ViT lacks; take other weights"
            )
    wanted, offered = BackboneShape.from_config(model.config), BackboneShape.from_tensors(tensors)
    if offered is None:
        first = ", ".join(_name_with_shape(name, tensors) for name in list(tensors)[:3]) or "no tensor"
        raise UsageError(f"{path}: holds no Vision Transformer (it begins with {first}); the model is {wanted}")
    if not offered.is_compatible_with(wanted):
        shapes = ", ".join(
            _name_with_shape(name, tensors) for name in ("patch_embed.proj.weight", "blocks.0.mlp.fc1.weight")
        )
        raise UsageError(
            f"{path}: {offered}, with {shapes}; the model is {wanted}: take the preset that matches the file"
        )
    if weights.eps is not None and weights.eps != model.config.eps:
        raise UsageError(
            f"{path}: its layer norms add {weights.eps:g} to the variance, the model's {model.config.eps:g}; build it with that"
        )
    # no file tells its number of heads, and a wrong one would fit and compute something else
    heads = {preset.heads for preset in PRESETS.values() if preset.dim == model.config.dim} - {model.config.heads}
    if not weights.is_vitmodel and heads:
        raise UsageError(
            f"{path}: published ViTs of dim {model.config.dim} have {heads.pop()} heads, not {model.config.heads}"
        )


def _fit_positions(state: StateDict, own: StateDict, weights: PretrainedWeights) -> list[WeightAction]:
    """Positions on the model's grid; those of the prefix tokens are added to the tokens themselves. Changes `state`."""
    positions = state["pos_embed"]
    if not weights.is_vitmodel:
        registers = state["reg_token"].shape[1] if "reg_token" in state else 0
        length = positions.shape[1]
        if "cls_token" not in state:
            likely: tuple[int, ...] = (0,)
        else:
            likely = (0, 1, 1 + registers) if registers else (1, 0)  # files with registers seldom give them positions
        prefix = next(
            (count for count in likely if length > count and math.isqrt(length - count) ** 2 == length - count), None
        )
        if prefix is None:
            raise UsageError(
                f"{weights.path}: {_name_with_shape('pos_embed', state)} is no square grid; take weights of a square image size"
            )
        if prefix:
            state["cls_token"] = state["cls_token"] + positions[:, :1]
        if prefix > 1:
            state["reg_token"] = state["reg_token"] + positions[:, 1:prefix]
        positions = positions[:, prefix:].unflatten(1, (math.isqrt(length - prefix), -1))
    (h, w), (rows, columns) = positions.shape[1:3], own["pos_embed"].shape[1:3]
    state["pos_embed"] = resize_positions(positions, (rows, columns))
    return (
        [WeightAction("resized", "pos_embed", f"{h}x{w} -> {rows}x{columns} patches")]
        if (h, w) != (rows, columns)
        else []
    )


def _fit_patches(state: StateDict, own: StateDict, weights: PretrainedWeights) -> list[WeightAction]:
    """The patch embedding for an input in [0, 1] of the model's channels, or none where the stems differ. Changes `state`.

    A grey image g gives sum_c w_c * (g - mean_c) / std_c + bias = (sum_c w_c / std_c) * g + (bias - sum w_c mean_c / std_c).
    """
    weight = state["patch_embed.proj.weight"].double()  # D C P P
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
    grey = own["patch_embed.proj.weight"].shape[1] == 1
    state["patch_embed.proj.weight"] = (weight.sum(dim=1, keepdim=True) if grey else weight).float()
    means, stds = ("/".join(f"{value:g}" for value in dict.fromkeys(values)) for values in weights.normalisation)
    note = f"{'3 channels -> 1, ' if grey else ''}input normalisation by mean {means}, std {stds} ({weights.normalisation_origin})"
    return [WeightAction("folded", f"patch_embed.proj.{part}", note) for part in ("weight", "bias")]


def _fit_norm_and_head(state: StateDict, own: StateDict, weights: PretrainedWeights) -> list[WeightAction]:
    """The last norm under the model's name for it, the head only where it means the same, and scales of 1 where the file has none."""
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
            actions.append(WeightAction("fresh", name, "1, as the file has no LayerScale"))
    return actions


def _name_with_shape(name: str, tensors: StateDict) -> str:
    return f"{name} {tuple(tensors[name].shape)}"


def _advice(name: str, state: StateDict) -> str:
    """What to change so that tensor `name` of the file fits the model."""
    if name == "reg_token":
        return f"set registers to {state[name].shape[1]}, as a preset of DINOv2 with registers has them"
    if name.endswith(".gamma"):
        return "set layer_scale to a number, as DINOv2's presets do"
    return "its architecture is another one"
