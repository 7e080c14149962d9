"""Read weight files of various sources as a flat dictionary of tensors under timm's names."""

from __future__ import annotations

import json
import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from vitmodel.errors import UsageError, VitmodelError

PICKLED = (".pth", ".pt", ".bin", ".ckpt", ".tar")
SHARD_INDEX = "model.safetensors.index.json"
FOLDER_FILES = ("model.safetensors", SHARD_INDEX, "pytorch_model.bin", "model.onnx")
ONNX_SUFFIX = ".onnx"

FOREIGN_STARTS = {
    b"version https://git-lfs": "is a pointer of Git LFS instead of the weights; fetch them with `git lfs pull`",
    b"<!doctype html": "is a web page instead of the weights; download the file itself",
    b"<html": "is a web page instead of the weights; download the file itself",
}
"""First bytes, in lower case, of files that were downloaded instead of the weights."""

# Keys under which checkpoints store the weights, next to optimizer states and counters. DINO publishes a teacher.
WRAPPERS = ("state_dict", "model_state_dict", "model", "teacher")

# The prefix of these names (`model.`, `vit.`, `backbone.`, ...) is that of the ViT. Tensors without it belong to other
# modules.
PATCH_EMBED_KEY = re.compile(r"(.*?)(?:embeddings\.patch_embeddings\.projection|patch_embed\.proj)\.weight")

# Hugging Face (both key styles), DINOv2 and DeiT-3 -> timm; applied in this order.
RENAMES = [
    (r"^embeddings\.(cls_token|mask_token|register_tokens)$", r"\1"),
    (r"^embeddings\.position_embeddings$", "pos_embed"),
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^register_tokens$", "reg_token"),
    (r"^(?:encoder\.layer|encoder\.layers|layers)\.(\d+)\.", r"blocks.\1."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"\.attention\.(?:attention\.)?(q|k|v)(?:uery|ey|alue|_proj)\.", r".attn.\1."),
    (r"\.attention\.(?:output\.dense|o_proj)\.", ".attn.proj."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"\.output\.dense\.", ".mlp.fc2."),
    (r"\.layer_scale([12])\.lambda1$", r".ls\1.gamma"),
    (r"\.gamma_([12])$", r".ls\1.gamma"),
    (r"^layernorm\.", "norm."),
]

# Google's vision_transformer and big_vision -> timm. The numbers after module names differ between the two.
GOOGLE_RENAMES = [
    (r"^(?:opt/target|params)/", ""),
    (r"^Transformer/", ""),
    (r"^cls$", "cls_token"),
    (r"^(?:posembed_input/)?pos_embedding$", "pos_embed"),
    (r"^embedding/", "patch_embed/proj/"),
    (r"^encoder_norm/", "norm/"),
    (r"^encoderblock_(\d+)/", r"blocks/\1/"),
    (r"/LayerNorm_0/", "/norm1/"),
    (r"/LayerNorm_[12]/", "/norm2/"),
    (r"/MlpBlock_\d/Dense_0/", "/mlp/fc1/"),
    (r"/MlpBlock_\d/Dense_1/", "/mlp/fc2/"),
    (r"/MultiHeadDotProductAttention_\d/(q|k|v)(?:uery|ey|alue)/", r"/attn/\1/"),
    (r"/MultiHeadDotProductAttention_\d/out/", "/attn/proj/"),
    (r"/(?:scale|kernel)$", "/weight"),
    (r"/", "."),
]


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a weight file under the names in the file. Code in the file is never run.

    Args:
        path: A .safetensors, .npz or PyTorch file (`PICKLED`), or the index of several .safetensors files. A
            safetensors file is recognised by its content, whatever its suffix.

    Raises:
        UsageError: The file does not exist or is of an unknown kind.
        VitmodelError: The file is damaged, contains objects that only a loader that runs code could read, or has values
            that are not finite.
    """
    tensors = _read_shards(path) if path.name == SHARD_INDEX else _read_file(path)
    check_finite(path, tensors)
    return tensors


def check_finite(path: Path, tensors: dict[str, Tensor]) -> None:
    """Raise VitmodelError if a tensor of the file `path` has values that are not finite."""
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise VitmodelError(f"{path}: tensor {name} has values that are not finite; use weights of another epoch")


def _read_shards(index: Path) -> dict[str, Tensor]:
    """Return the tensors of all files that the index of a sharded checkpoint lists."""
    try:
        names = set(json.loads(index.read_text())["weight_map"].values())
    except (OSError, ValueError, LookupError, AttributeError, TypeError) as error:
        raise VitmodelError(f"{index}: is not an index of shards ({error}); download it again") from error
    outside = [name for name in names if not isinstance(name, str) or Path(name).name != name]
    if outside:
        raise VitmodelError(f"{index}: shard {outside[0]!r} is not a file next to the index; download it again")
    return {name: tensor for shard in sorted(names) for name, tensor in _read_file(index.with_name(shard)).items()}


def _is_safetensors(path: Path) -> bool:
    """Return whether a file starts like safetensors: the length of its header, which is JSON."""
    with path.open("rb") as file:
        start = file.read(9)
    return start[8:] == b"{" and 0 < int.from_bytes(start[:8], "little") < path.stat().st_size


def check_exists(path: Path) -> None:
    """Raise an error if a weight file does not exist, or is what was downloaded instead of one."""
    if not path.is_file():
        raise UsageError(f"{path}: the weight file does not exist; check the path")
    with path.open("rb") as file:
        start = file.read(32).lower()
    for foreign, problem in FOREIGN_STARTS.items():
        if start.startswith(foreign):
            raise VitmodelError(f"{path}: {problem}")


def _read_file(path: Path) -> dict[str, Tensor]:
    """Return the tensors of one file; see `read_tensors`."""
    check_exists(path)
    try:
        if path.suffix == ".safetensors" or _is_safetensors(path):
            return load_file(path)
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as arrays:
                return {name: torch.from_numpy(arrays[name]) for name in arrays.files}
        if path.suffix in PICKLED:
            return _unwrap(torch.load(path, map_location="cpu", weights_only=True))
    except pickle.UnpicklingError as error:
        raise VitmodelError(
            f"{path}: contains Python objects other than tensors, and loading them could run code; "
            f"save only its state_dict, preferably as .safetensors"
        ) from error
    except Exception as error:  # the readers raise anything on damaged bytes
        first_line = str(error).partition("\n")[0]
        raise VitmodelError(
            f"{path}: damaged or not a weight file ({first_line}); download or write it again"
        ) from error
    raise UsageError(f"{path}: unknown file type; use .safetensors, .npz, .onnx or {', '.join(PICKLED)}")


def _unwrap(payload: Any) -> dict[str, Tensor]:
    """Return the innermost dictionary of tensors of a PyTorch checkpoint.

    Without tensors and known keys, it is the only dictionary that holds tensors. Raise TypeError if there is none.
    """
    if not isinstance(payload, dict):
        raise TypeError(f"a {type(payload).__name__} instead of a dictionary of tensors")
    for wrapper in WRAPPERS:
        if isinstance(payload.get(wrapper), dict):
            return _unwrap(payload[wrapper])
    if not _holds_tensors(payload):
        inner = [name for name, value in payload.items() if isinstance(value, dict) and _holds_tensors(value)]
        if len(inner) == 1:
            return _unwrap(payload[inner[0]])
        if inner:
            raise TypeError(f"several models under the keys {', '.join(map(str, inner))}; save one of them")
    return {str(name): tensor for name, tensor in payload.items() if isinstance(tensor, Tensor)}


def _holds_tensors(values: dict[Any, Any]) -> bool:
    return any(isinstance(value, Tensor) for value in values.values())


def to_timm(raw: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Return the tensors under timm's names, and the names of tensors outside the ViT.

    The tensors of a file without a ViT keep their names.

    Args:
        raw: Tensors under the names in the file.
    """
    if any("MultiHeadDotProductAttention" in name for name in raw):
        renamed = {_rename(name, GOOGLE_RENAMES): _from_google(name, tensor) for name, tensor in raw.items()}
        return _merge_qkv(renamed), []
    prefix = next((match[1] for name in raw if (match := PATCH_EMBED_KEY.fullmatch(name))), "")
    tensors = {}
    outside = []
    for name, tensor in raw.items():
        if name.startswith("classifier."):  # Hugging Face stores the head outside the ViT
            tensors[name.replace("classifier.", "head.")] = tensor
        elif name.startswith(prefix):
            tensors[_rename(name.removeprefix(prefix), RENAMES)] = tensor
        else:
            outside.append(name)
    return _merge_qkv(tensors), outside


def _rename(name: str, rules: list[tuple[str, str]]) -> str:
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name


def _from_google(name: str, tensor: Tensor) -> Tensor:
    """Return a Flax array in PyTorch's layout: output dimension first, heads concatenated."""
    if name.endswith("embedding/kernel"):
        return tensor.permute(3, 2, 0, 1)  # (P, P, C, D) -> (D, C, P, P)
    if re.search(r"/(query|key|value)/", name):
        tensor = tensor.flatten(-2)  # (..., heads, D / heads) -> (..., D)
    elif name.endswith("/out/kernel"):
        tensor = tensor.flatten(0, 1)
    return tensor.T if name.endswith("/kernel") else tensor


def _merge_qkv(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return `tensors` with separate query, key and value tensors concatenated into timm's `qkv`."""
    merged = dict(tensors)
    for name in tensors:
        parts = [name.replace(".attn.q.", f".attn.{part}.") for part in "qkv"]
        if ".attn.q." in name and all(part in tensors for part in parts):
            merged[name.replace(".attn.q.", ".attn.qkv.")] = torch.cat([merged.pop(part) for part in parts])
    return merged
