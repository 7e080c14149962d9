"""Attention over packed images: patches of air are left out, and images of any size and shape share one token sequence.

Half of a mammogram is air, which is 0 in a crop. After NaViT (Dehghani et al. 2023, arXiv 2307.06304), the patches with
tissue of many images form one sequence; each image has its own prefix tokens and the positions of its own grid. A token
attends only to the tokens of its own image, so an image gives the same result in a pack as alone: the attention matrix
is block-diagonal, but no mask of the whole pack is built.

The attention implementation depends on the device. Speed on two cores of an AMD EPYC, PyTorch 2.13, ViT-S in float32,
relative to dense timm (`benchmarks/vit.py packed-1024 packed-2048`). The values in brackets are what fewer operations
alone would give; the rest comes from the matrix products that `device.linear` chooses:

| CPU                                      | 2 crops of 1024x512 |               | 1 crop of 2048x1024 |               |
|------------------------------------------|---------------------|---------------|---------------------|---------------|
|                                          | forward             | training step | forward             | training step |
| timm, dense                              | 1.00x               | 1.00x         | 1.00x               | 1.00x         |
| dense                                    | 1.32x               | 1.26x         | 1.04x               | 1.07x         |
| packed, SDPA on slices per image (used)  | 2.86x (2.08x)       | 2.86x         | 3.69x (3.27x)       | 3.89x         |

- CPU, and CUDA in float32: scaled dot-product attention (SDPA) on each image's slice of the queries, keys and values,
  which are not copied.
- CUDA from compute capability 8.0, in 16 bits: `torch.nn.attention.varlen`, one flash kernel for all images. The kernel
  supports no other device or precision.

The convolutional stem reads neighbouring patches: it runs over bands of rows, each as wide as its tissue, and the
tokens of air are removed afterwards.

Symbols in shapes: `I` images, `T` tokens of all images (or of one), `N` kept patches, `D` width of a token, `A` heads,
`K` classes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitmodel.model.architecture import patch_grid
from vitmodel.model.packed_batch import PackedBatch
from vitmodel.model.vit import Block, ConvStem, LinearStem, SequenceLayout, ViT, patchify

BAND_ROWS = 8
"""Rows of patches that a convolutional stem reads at once. One more row above provides context, so an eighth of the
work is done twice."""


@functools.cache
def varlen_attention() -> Callable[..., Any] | None:
    """Return PyTorch's flash kernel for sequences of different lengths, or None before PyTorch 2.10.

    It is imported on first use because the import takes a third of the start-up time.
    """
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    return varlen_attn


class PackedLayout(SequenceLayout):
    """Many images in one row of tokens `(1, T, D)`, where T is the sum of `lengths`.

    Args:
        lengths: Number of tokens of each image.
        device: Device of the tokens.
    """

    def __init__(self, lengths: list[int], device: torch.device) -> None:
        self.lengths = lengths
        self.lengths_tensor = torch.tensor(lengths, device=device)
        # index of each image's first token, then the end of the last image: (I + 1,)
        self.cu_seqlens = F.pad(self.lengths_tensor.cumsum(0), (1, 0)).int()

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Return the softmax attention of each token to the tokens of its own image, `(1, A, T, D / A)`."""
        if (
            q.is_cuda
            and q.element_size() == 2
            and torch.cuda.get_device_capability(q.device) >= (8, 0)
            and (flash := varlen_attention())
        ):
            flat = (x[0].transpose(0, 1) for x in (q, k, v))  # (T, A, D / A) each
            longest = max(self.lengths)
            return flash(*flat, self.cu_seqlens, self.cu_seqlens, longest, longest).transpose(0, 1)[None]
        slices = zip(*(x.split(self.lengths, dim=2) for x in (q, k, v)), strict=True)
        return torch.cat([F.scaled_dot_product_attention(*qkv) for qkv in slices], dim=2)

    def sample_per_image(self, x: Tensor) -> Tensor:
        """Return one uniform random number in [0, 1) per image, repeated for each of its tokens: `(1, T, 1)`."""
        per_image = torch.rand(len(self.lengths), device=x.device)
        per_token = per_image.repeat_interleave(self.lengths_tensor, output_size=sum(self.lengths))
        return per_token[None, :, None]


@functools.cache
def exclude_lengths_from_compile() -> None:
    """Exclude methods that depend on a pack's lengths from `torch.compile`, which would recompile for every pack.

    Decorators would do the same but import the compiler, which adds a second to every start.
    """
    for kind in (PackedLayout, *PackedLayout.__subclasses__()):
        for name in {"attend", "sample_per_image"} & vars(kind).keys():
            setattr(kind, name, torch.compiler.disable(getattr(kind, name)))


def compile_blocks(model: nn.Module) -> None:
    """Compile all transformer blocks in `model` with `torch.compile`, for packs of any lengths."""
    exclude_lengths_from_compile()
    for module in model.modules():
        if isinstance(module, Block):
            module.compile(dynamic=True)


def embed_conv_stem(stem: ConvStem, image: Tensor, kept: Tensor, patch: int) -> Tensor:
    """Return the tokens of kept patches, computed by a convolutional stem.

    The stem reads a band of `BAND_ROWS` rows of patches at a time, as wide as its tissue. A token depends only on its
    own patch and on the neighbours above and to the left (pixel 2i of each layer sees 2i - 1, 2i and 2i + 1 of the
    layer before), so each band starts one patch earlier, and the tokens of that margin are removed.

    Args:
        stem: The convolutional stem.
        image: Pixels `(C, H, W)`.
        kept: Row-major indices of the patches that are kept, `(N,)`.
        patch: Side of a patch in pixels.

    Returns:
        The tokens without positions `(N, D)`.
    """
    h, w = patch_grid((image.shape[-2], image.shape[-1]), patch)
    rows = kept // w
    columns = kept % w
    grid = image.new_zeros(h, w, stem.proj.out_channels)
    for top in range(0, h, BAND_ROWS):
        band_columns = columns[(rows >= top) & (rows < top + BAND_ROWS)]
        if not len(band_columns):
            continue
        bottom = min(top + BAND_ROWS, h)
        left = int(band_columns.min())
        right = int(band_columns.max()) + 1
        margin_top = min(top, 1)
        margin_left = min(left, 1)
        band = image[:, (top - margin_top) * patch : bottom * patch, (left - margin_left) * patch : right * patch]
        band_grid = (bottom - top + margin_top, right - left + margin_left)
        tokens = stem(band[None])[0].unflatten(0, band_grid)  # (rows, columns, D) of the band
        grid[top:bottom, left:right] = tokens[margin_top:, margin_left:]
    return grid.flatten(0, 1)[kept]


def embed(model: ViT, pack: PackedBatch) -> Tensor:
    """Return the tokens of all images with positions, `(1, T, D)`: for each image its prefix, then its kept patches."""
    stem = model.patch_embed
    images = zip(pack.images, pack.patch_indices, strict=True)
    if isinstance(stem, LinearStem):
        patches = [patchify(image[None], pack.patch)[0, kept] for image, kept in images]
        tokens = stem.project(torch.cat(patches))  # (N, D), patches of all images
    else:
        tokens = torch.cat([embed_conv_stem(stem, image, kept, pack.patch) for image, kept in images])
    grids = pack.grids
    positions = {grid: model.positions(grid)[0] for grid in set(grids)}
    tokens = tokens + torch.cat([positions[grid][kept] for grid, kept in zip(grids, pack.patch_indices, strict=True)])
    prefix = model.prefix_tokens()[0].to(tokens.dtype)
    sequence = []
    for image_tokens in tokens.split(pack.sequence_lengths(0)):
        sequence += [prefix, image_tokens]
    return torch.cat(sequence)[None]


def forward(model: ViT, pack: PackedBatch) -> Tensor:
    """Return the logits of each image `(I, K)`, equal to those of the image alone."""
    return model.head(features(model, pack))


def features(model: ViT, pack: PackedBatch, layout: PackedLayout | None = None) -> Tensor:
    """Return the input of the head for each image `(I, D)`, equal to that of the image alone.

    Args:
        model: The ViT.
        pack: The images.
        layout: The layout of the tokens, which may change the input of each block; None = a `PackedLayout`.
    """
    return torch.cat([model.pool(image) for image in encode(model, pack, layout)])


def encode(model: ViT, pack: PackedBatch, layout: PackedLayout | None = None) -> Sequence[Tensor]:
    """Return the tokens of each image after all blocks, equal to those of the image alone.

    Args:
        model: The ViT.
        pack: The images.
        layout: The layout of the tokens, which may change the input of each block; None = a `PackedLayout`.

    Returns:
        For each image a tensor `(1, T, D)`: prefix tokens, then kept patches.
    """
    lengths = pack.sequence_lengths(model.config.num_prefix_tokens)
    tokens = embed(model, pack)
    return model.encode(tokens, layout or PackedLayout(lengths, tokens.device)).split(lengths, dim=1)


def attention(model: ViT, pack: PackedBatch, block: int = -1) -> list[Tensor]:
    """Return the attention weights of each image in one block.

    Args:
        model: The ViT.
        pack: The images.
        block: Index of the block; negative indices count from the last one.

    Returns:
        For each image a tensor `(A, T, T)` whose rows sum to 1: prefix tokens, then kept patches.
    """
    lengths = pack.sequence_lengths(model.config.num_prefix_tokens)
    tokens = embed(model, pack)
    layout = PackedLayout(lengths, tokens.device)
    for previous in model.blocks[: block % len(model.blocks)]:
        tokens = previous(tokens, layout)
    target: Any = model.blocks[block]
    return [target.attn.attention_weights(image)[0] for image in target.norm1(tokens).split(lengths, dim=1)]


def attention_maps(model: ViT, pack: PackedBatch, block: int = -1) -> list[Tensor]:
    """Return how much the tokens that the head reads attend to each patch.

    These tokens are the class token with `pool="cls"` and all patches otherwise.

    Args:
        model: The ViT.
        pack: The images.
        block: Index of the block; negative indices count from the last one.

    Returns:
        For each image a map `(h, w, A)`, NaN for air.
    """
    prefix = model.config.num_prefix_tokens
    readers = slice(0, 1) if model.config.pool == "cls" else slice(prefix, None)
    per_patch = (weights[:, readers, prefix:].mean(dim=1).T for weights in attention(model, pack, block))
    return pack.scatter_to_grid(per_patch)
