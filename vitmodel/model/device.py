"""On which device to compute and, on a CPU, by whose matrix products, as measured (dev/LOG.md). Knows no model."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from vitmodel.errors import UsageError


def resolve_device(wanted: Literal["auto", "cpu", "cuda"]) -> Literal["cpu", "cuda"]:
    """Where to compute: on a GPU, if there is one and nothing else is wanted. Raises UsageError where there is none but it is asked for."""
    if wanted not in ("auto", "cpu", "cuda"):
        raise UsageError(f"device: {wanted!r} is not a choice; choose from auto, cpu, cuda")
    if wanted == "cuda" and not torch.cuda.is_available():
        raise UsageError("device: no CUDA device is at hand; use --device cpu")
    return "cuda" if wanted != "cpu" and torch.cuda.is_available() else "cpu"


@functools.cache
def cpu_capabilities() -> Mapping[str, Any]:
    """What PyTorch says of this CPU; nothing before PyTorch knew."""
    return torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}


@functools.cache
def mkl_is_slow() -> bool:
    """Whether this is a processor by AMD with AVX-512, on which MKL's products of 32 bits take twice the time of oneDNN's."""
    return (
        "AMD" in cpu_capabilities().get("cpu_name", "")
        and cpu_capabilities().get("avx512_f", False)
        and torch.backends.mkldnn.is_available()
    )


def linear(x: Tensor, *layers: nn.Linear) -> Tensor:
    """Linear layers one after the other, with a GELU between: ... D -> ... D', by whoever multiplies fastest.

    PyTorch takes MKL for 32 bits on every CPU; where oneDNN is faster, it is taken instead. Compilers choose for themselves.
    """
    elsewhere = x.device.type != "cpu" or x.dtype != torch.float32 or torch.is_autocast_enabled("cpu")
    if torch.compiler.is_compiling() or elsewhere or not mkl_is_slow():
        for before, layer in enumerate(layers):
            x = layer(F.gelu(x) if before else x)
        return x
    product: Tensor = _OneDNN.apply(x, *(parameter for layer in layers for parameter in (layer.weight, layer.bias)))
    return product


class _OneDNN(torch.autograd.Function):
    """`linear` in oneDNN's keeping. Autograd by itself would keep both kinds of every tensor; this keeps what enters each layer, once."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *parameters: Tensor) -> Tensor:
        sums = [x.to_mkldnn()]  # what enters each layer, before the GELU, and what leaves the last
        for before, (weight, bias) in enumerate(zip(parameters[::2], parameters[1::2], strict=True)):
            sums.append(F.linear(F.gelu(sums[-1]) if before else sums[-1], weight, bias))
        ctx.save_for_backward(x, *parameters, *sums[1:-1])
        return sums[-1].to_dense()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, *saved = ctx.saved_tensors
        layers = (len(saved) + 1) // 3
        weights, sums = saved[: 2 * layers : 2], [x.to_mkldnn(), *saved[2 * layers :]]
        flowing = gradient.contiguous().to_mkldnn()
        gradients: list[Tensor | None] = []
        for before in reversed(range(layers)):
            given = F.gelu(sums[before]) if before else sums[before]
            mask = [before > 0 or ctx.needs_input_grad[0], *ctx.needs_input_grad[1 + 2 * before : 3 + 2 * before]]
            flowing, *own = torch.ops.aten.mkldnn_linear_backward(given, flowing, weights[before], mask)
            gradients[:0] = [part if wanted else None for part, wanted in zip(own, mask[1:], strict=True)]
            if before:
                flowing = torch.ops.aten.gelu_backward(flowing, sums[before])
        return flowing.to_dense() if ctx.needs_input_grad[0] else None, *gradients
