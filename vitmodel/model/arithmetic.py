"""The arithmetic that a processor is fast at, as measured (docs/LOG.md): whose matrix products, and in how many bits. Knows no model."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor


@functools.cache
def processor() -> Mapping[str, Any]:
    """What PyTorch says of this CPU; nothing before PyTorch knew."""
    return torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}


@functools.cache
def mkl_is_slow() -> bool:
    """Whether this is a processor by AMD with AVX-512, on which MKL's products of 32 bits take twice the time of oneDNN's."""
    return "AMD" in processor().get("cpu_name", "") and processor().get("avx512_f", False) and torch.backends.mkldnn.is_available()


def bf16_is_fast(device: Literal["cpu", "cuda"]) -> bool:
    """Whether a device multiplies 16 bits of bfloat16 itself, and so faster than 32 bits; emulated, they are slower."""
    if device == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return any(processor().get(name, False) for name in ("avx512_bf16", "amx_bf16"))


def opaque(x: Tensor) -> Tensor:
    """The same numbers, in oneDNN's keeping where its products are faster than MKL's, which PyTorch takes for 32 bits on every CPU.

    Linear layers and GELU take such a tensor as any other and give one back; the rest needs `dense`. Compilers choose for themselves.
    A training step needs up to half as much memory again for it, since autograd keeps both kinds.
    """
    if torch.compiler.is_compiling() or x.device.type != "cpu" or x.dtype != torch.float32 or torch.is_autocast_enabled("cpu"):
        return x
    return x.to_mkldnn() if mkl_is_slow() else x


def dense(x: Tensor) -> Tensor:
    """An ordinary tensor again."""
    return x.to_dense() if x.is_mkldnn else x
