"""Only where there is breast: patches of air are left out, and images of any size and shape share one sequence of tokens.

Half of a mammogram is air, 0 in a crop. After NaViT (Dehghani et al. 2023, arXiv 2307.06304) the patches with tissue of many images stand
one after another, each image behind its own prefix tokens and with the positions of its own grid. A token attends to its own image alone,
so that a packed image gives what it gives alone: block-diagonal attention, without a mask of the whole pack.

The way to attend is chosen by device. On two cores of an AMD EPYC, PyTorch 2.13, ViT-S in 32 bits, beside dense timm (`benchmarks/vit.py
packed-1024 packed-2048`; in brackets what fewer operations alone would give, the rest is `arithmetic.py`):

| CPU                                         | 2 crops of 1024x512: forward | training step | 1 of 2048x1024: forward | training step |
|---------------------------------------------|------------------------------|---------------|-------------------------|---------------|
| timm, dense                                 | 1.00x                        | 1.00x         | 1.00x                   | 1.00x         |
| dense                                       | 1.32x                        | 1.26x         | 1.04x                   | 1.07x         |
| packed, SDPA on each image's slice (chosen) | 2.86x (2.08x)                | 2.86x         | 3.69x (3.27x)           | 3.89x         |

- CPU, and CUDA in 32 bits: SDPA on each image's slice; no copy is made of queries, keys and values.
- CUDA from compute capability 8 on, in 16 bits: `torch.nn.attention.varlen`, one flash kernel for all images; it has no other home.

The convolutional stem sees neighbours: it runs over bands of rows, as wide as their tissue, whose tokens of air are dropped after it.
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

BAND_ROWS = 8  # rows of patches that a convolutional stem reads at once, with one more for what they see: an eighth of work twice


@functools.cache
def varlen_attention() -> Callable[..., Any] | None:
    """PyTorch's flash kernel for sequences of many lengths; None before 2.10. Imported when needed: it takes a third of a cold start."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    return varlen_attn


class PackedLayout(SequenceLayout):
    """Many images in one row of tokens: 1 T D, T = the sum of `lengths`."""

    def __init__(self, lengths: list[int], device: torch.device) -> None:
        self.lengths = lengths
        self.lengths_tensor = torch.tensor(lengths, device=device)
        self.cu_seqlens = F.pad(
            self.lengths_tensor.cumsum(0), (1, 0)
        ).int()  # where each image begins, and the last one's end

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if (
            q.is_cuda
            and q.element_size() == 2
            and torch.cuda.get_device_capability(q.device) >= (8, 0)
            and (flash := varlen_attention())
        ):
            flat = (x[0].transpose(0, 1) for x in (q, k, v))  # T A D/A
            longest = max(self.lengths)
            return flash(*flat, self.cu_seqlens, self.cu_seqlens, longest, longest).transpose(0, 1)[None]
        each = zip(*(x.split(self.lengths, dim=2) for x in (q, k, v)), strict=True)
        return torch.cat([F.scaled_dot_product_attention(*qkv) for qkv in each], dim=2)

    def sample_per_image(self, x: Tensor) -> Tensor:
        one_per_image = torch.rand(len(self.lengths), device=x.device)
        return one_per_image.repeat_interleave(self.lengths_tensor, output_size=sum(self.lengths))[
            None, :, None
        ]  # 1 T 1


@functools.cache
def exclude_lengths_from_compile() -> None:
    """Have `torch.compile` leave out what depends on a pack's lengths, or it would compile anew for every pack.

    Once, when it is wanted: decorators would import the compiler, a second of a cold start.
    """
    for kind in (PackedLayout, *PackedLayout.__subclasses__()):
        for name in {"attend", "sample_per_image"} & vars(kind).keys():
            setattr(kind, name, torch.compiler.disable(getattr(kind, name)))


def compile_blocks(model: nn.Module) -> None:
    """Have `torch.compile` compile all transformer blocks in `model`, for packs of any lengths."""
    exclude_lengths_from_compile()
    for module in model.modules():
        if isinstance(module, Block):
            module.compile(dynamic=True)


def embed_conv_stem(stem: ConvStem, image: Tensor, kept: Tensor, patch: int) -> Tensor:
    """The tokens of kept patches as a convolutional stem makes them of the image (C H W): N D.

    A band of `BAND_ROWS` rows of patches is read as wide as its tissue. What a token is depends on its own patch and its neighbours above and to
    the left alone (each layer's pixel 2i sees 2i - 1, 2i and 2i + 1 below it), so bands begin one patch earlier, and that is cut off.
    """
    h, w = patch_grid((image.shape[-2], image.shape[-1]), patch)
    rows, columns = kept // w, kept % w
    grid = image.new_zeros(h, w, stem.proj.out_channels)
    for top in range(0, h, BAND_ROWS):
        here = columns[(rows >= top) & (rows < top + BAND_ROWS)]
        if len(here):
            bottom, left, right = min(top + BAND_ROWS, h), int(here.min()), int(here.max()) + 1
            above, before = min(top, 1), min(left, 1)
            part = image[:, (top - above) * patch : bottom * patch, (left - before) * patch : right * patch]
            tokens = stem(part[None])[0].unflatten(
                0, (bottom - top + above, right - left + before)
            )  # h w D of the band
            grid[top:bottom, left:right] = tokens[above:, before:]
    return grid.flatten(0, 1)[kept]


def embed(model: ViT, pack: PackedBatch) -> Tensor:
    """Kept patches to tokens with positions, each image behind its prefix: 1 T D."""
    stem = model.patch_embed
    if isinstance(stem, LinearStem):
        patches = [
            patchify(image[None], pack.patch)[0, kept]
            for image, kept in zip(pack.images, pack.patch_indices, strict=True)
        ]
        tokens = stem.project(torch.cat(patches))  # N D, N patches of all images
    else:
        tokens = torch.cat(
            [
                embed_conv_stem(stem, image, kept, pack.patch)
                for image, kept in zip(pack.images, pack.patch_indices, strict=True)
            ]
        )
    grids = pack.grids
    positions = {grid: model.positions(grid)[0] for grid in set(grids)}
    tokens = tokens + torch.cat([positions[grid][kept] for grid, kept in zip(grids, pack.patch_indices, strict=True)])
    prefix = model.prefix_tokens()[0].to(tokens.dtype)
    return torch.cat([part for image in tokens.split(pack.sequence_lengths(0)) for part in (prefix, image)])[None]


def forward(model: ViT, pack: PackedBatch) -> Tensor:
    """Logits of each image, as if it were alone: I K for I images."""
    return model.head(features(model, pack))


def features(model: ViT, pack: PackedBatch, layout: PackedLayout | None = None) -> Tensor:
    """What the head reads of each image, as if it were alone: I D for I images. `layout` may change what the blocks are given."""
    return torch.cat([model.pool(image) for image in encode(model, pack, layout)])


def encode(model: ViT, pack: PackedBatch, layout: PackedLayout | None = None) -> Sequence[Tensor]:
    """Each image's tokens after all blocks, as if it were alone: 1 T D each, prefix tokens first, then kept patches."""
    lengths = pack.sequence_lengths(model.config.num_prefix_tokens)
    tokens = embed(model, pack)
    return model.encode(tokens, layout or PackedLayout(lengths, tokens.device)).split(lengths, dim=1)


def attention(model: ViT, pack: PackedBatch, block: int = -1) -> list[Tensor]:
    """What each token of each image attends to in one of the blocks: A T T, rows sum to 1; prefix tokens first, then kept patches."""
    lengths = pack.sequence_lengths(model.config.num_prefix_tokens)
    tokens = embed(model, pack)
    layout = PackedLayout(lengths, tokens.device)
    for previous in model.blocks[: block % len(model.blocks)]:
        tokens = previous(tokens, layout)
    looked_at: Any = model.blocks[block]
    return [looked_at.attn.attention_weights(image)[0] for image in looked_at.norm1(tokens).split(lengths, dim=1)]


def attention_maps(model: ViT, pack: PackedBatch, block: int = -1) -> list[Tensor]:
    """How much the tokens that the head reads (the class token, else all patches) attend to each patch: h w A, NaN = air."""
    prefix = model.config.num_prefix_tokens
    readers = slice(0, 1) if model.config.pool == "cls" else slice(prefix, None)
    return pack.scatter_to_grid(weights[:, readers, prefix:].mean(dim=1).T for weights in attention(model, pack, block))
