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
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from operator import attrgetter
from typing import Any, Generic, Protocol, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitmodel.model.architecture import grid_of
from vitmodel.model.vit import Block, ConvStem, Layout, LinearStem, ViT, patchify
from vitmodel.utils import UsageError

T = TypeVar("T", bound="HasPack")

BAND = 8  # rows of patches that a convolutional stem reads at once, with one more for what they see: an eighth of work twice
OPEN = 8  # groups that `fill` keeps open: wastes 1 % of a budget that holds 13 images, 3 % of one that holds 6 (with one open: 4 % and 8 %)


@dataclass(frozen=True)
class About:
    """What is known of an image beside its pixels."""

    mm_per_pixel: float = math.nan
    """Side of a pixel in mm; NaN = unknown."""
    sources: tuple[int, ...] = ()
    """What it comes from: an index into each vocabulary of the network's sources; 0 = unknown, or too seldom to be learned apart."""
    view: int = 0
    """Projection: an index into the network's views; 0 = unknown or seldom."""
    breast: int = -1
    """The same number for all images of a breast; -1 = a breast of its own."""
    exam: int = -1
    """The same number for all breasts of an exam; -1 = an exam of its own."""

    def apart(self, place: int, places: int) -> About:
        """The same, its breast and exam numbered so that they are none of another place's."""
        breast, exam = (number if number < 0 else number * places + place for number in (self.breast, self.exam))
        return replace(self, breast=breast, exam=exam)


def grouped(numbers: Iterable[int]) -> list[list[int]]:
    """The places of each number, in order of first appearance; each -1 is a group by itself."""
    found: dict[int, list[int]] = {}
    for place, number in enumerate(numbers):
        found.setdefault(number if number >= 0 else -1 - place, []).append(place)
    return list(found.values())


@dataclass(frozen=True)
class Pack:
    """Images of any sizes and, of each, the patches to look at."""

    names: tuple[str, ...]
    """What messages call the images."""
    images: tuple[Tensor, ...]
    """C H W each, sides multiples of the patch."""
    kept: tuple[Tensor, ...]
    """Numbers of the patches that are kept, counted row by row; N of them each."""
    patch: int
    """Side of a patch in pixels."""
    about: tuple[About, ...] = ()
    """What is known of each image; none given = nothing known."""

    def __post_init__(self) -> None:
        if not self.about:
            object.__setattr__(self, "about", (About(),) * len(self.images))

    def __len__(self) -> int:
        return len(self.images)

    def __iter__(self) -> Iterator[Pack]:
        """Each image as a pack of its own."""
        return (self.take([number]) for number in range(len(self)))

    def take(self, numbers: Iterable[int]) -> Pack:
        """The images with these numbers, in their order."""
        chosen = [(self.names[n], self.images[n], self.kept[n], self.about[n]) for n in numbers]
        names, images, kept, about = zip(*chosen, strict=True)
        return Pack(names, images, kept, self.patch, about)

    @property
    def grids(self) -> list[tuple[int, int]]:
        """Rows and columns of patches in each image, air included."""
        return [grid_of((image.shape[-2], image.shape[-1]), self.patch) for image in self.images]

    def lengths(self, prefix: int) -> list[int]:
        """Tokens of each image, with `prefix` tokens before its patches."""
        return [prefix + len(kept) for kept in self.kept]

    def to(self, device: torch.device | str) -> Pack:
        """The same pack in another memory."""
        images, kept = (tuple(tensor.to(device, non_blocking=True) for tensor in tensors) for tensors in (self.images, self.kept))
        return replace(self, images=images, kept=kept)

    def on_grid(self, values: Iterable[Tensor]) -> list[Tensor]:
        """One value (or vector) per kept patch of each image back in its place: N ... -> h w ..., NaN where a patch was left out."""
        placed = []
        for (h, w), kept, value in zip(self.grids, self.kept, values, strict=True):
            grid = value.new_full((h * w, *value.shape[1:]), torch.nan)
            grid[kept] = value
            placed.append(grid.unflatten(0, (h, w)))
        return placed


def pack(images: Sequence[Tensor], patch: int, names: Sequence[str] | None = None, air: bool = False, about: Sequence[About] = ()) -> Pack:
    """Pack images (C H W each, 0 = air), padded with air to whole patches; patches of air alone are left out unless `air`.

    Raises UsageError, with the image's name, for one that is smaller than a patch, shows air alone, or has NaN or infinite pixels.
    """
    names = names or [f"image {number}" for number in range(1, len(images) + 1)]
    padded, kept = [], []
    for name, image in zip(names, images, strict=True):
        height, width = image.shape[-2:]
        if min(height, width) < patch:
            raise UsageError(f"{name}: {height}x{width} is smaller than a patch of {patch}x{patch} pixels")
        if not image.isfinite().all():
            raise UsageError(f"{name}: has NaN or infinite pixels")
        image = F.pad(image, (0, -width % patch, 0, -height % patch))
        tissue = F.max_pool2d(image.amax(dim=0, keepdim=True), patch).flatten() > 0
        if not tissue.any():
            raise UsageError(f"{name}: shows air alone, all pixels are 0; leave it out")
        padded.append(image)
        kept.append(torch.arange(len(tissue)) if air else tissue.nonzero().squeeze(1))
    return Pack(tuple(names), tuple(padded), tuple(kept), patch, tuple(about))


def chain(packs: Sequence[Pack]) -> Pack:
    """Several packs as one; equal numbers of breasts and exams mean the same ones."""
    each = zip(*((pack.names, pack.images, pack.kept, pack.about) for pack in packs), strict=True)
    names, images, kept, about = (sum(parts, ()) for parts in each)
    return Pack(names, images, kept, packs[0].patch, about)


def join(packs: Sequence[Pack]) -> Pack:
    """Several packs as one; breasts and exams of different packs stay apart, whatever their numbers."""
    return chain([replace(each, about=tuple(known.apart(place, len(packs)) for known in each.about)) for place, each in enumerate(packs)])


def portions(pack: Pack, tokens: int, prefix: int) -> Iterator[Pack]:
    """Consecutive images of at most `tokens` tokens, `prefix` of them before each one's patches; a longer image is alone."""
    group: list[int] = []
    total = 0
    for number, length in enumerate(pack.lengths(prefix)):
        if group and total + length > tokens:
            yield pack.take(group)
            group, total = [], 0
        group.append(number)
        total += length
    yield pack.take(group)


@functools.cache
def varlen_attention() -> Callable[..., Any] | None:
    """PyTorch's flash kernel for sequences of many lengths; None before 2.10. Imported when needed: it takes a third of a cold start."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    return varlen_attn


class Segments(Layout):
    """Many images in one row of tokens: 1 T D, T = the sum of `lengths`."""

    def __init__(self, lengths: list[int], device: torch.device) -> None:
        self.lengths = lengths
        self.counts = torch.tensor(lengths, device=device)
        self.bounds = F.pad(self.counts.cumsum(0), (1, 0)).int()  # where each image begins, and the last one's end

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if q.is_cuda and q.element_size() == 2 and torch.cuda.get_device_capability(q.device) >= (8, 0) and (flash := varlen_attention()):
            flat = (x[0].transpose(0, 1) for x in (q, k, v))  # T A D/A
            longest = max(self.lengths)
            return flash(*flat, self.bounds, self.bounds, longest, longest).transpose(0, 1)[None]
        each = zip(*(x.split(self.lengths, dim=2) for x in (q, k, v)), strict=True)
        return torch.cat([F.scaled_dot_product_attention(*qkv) for qkv in each], dim=2)

    def draw(self, x: Tensor) -> Tensor:
        one_per_image = torch.rand(len(self.lengths), device=x.device)
        return one_per_image.repeat_interleave(self.counts, output_size=sum(self.lengths))[None, :, None]  # 1 T 1


def compile_blocks(model: nn.Module) -> None:
    """Have `torch.compile` compile all transformer blocks in `model`, but for what depends on a pack's lengths, or it would do so anew for
    every pack. The marks are set here and not by decorators, which would import the compiler: a second of a cold start."""
    for kind in (Segments, *Segments.__subclasses__()):
        for name in {"attend", "draw"} & vars(kind).keys():
            setattr(kind, name, torch.compiler.disable(getattr(kind, name)))
    for module in model.modules():
        if isinstance(module, Block):
            module.compile(dynamic=True)


def convolved(stem: ConvStem, image: Tensor, kept: Tensor, patch: int) -> Tensor:
    """The tokens of kept patches as a convolutional stem makes them of the image (C H W): N D.

    A band of `BAND` rows of patches is read as wide as its tissue. What a token is depends on its own patch and its neighbours above and to
    the left alone (each layer's pixel 2i sees 2i - 1, 2i and 2i + 1 below it), so bands begin one patch earlier, and that is cut off.
    """
    h, w = grid_of((image.shape[-2], image.shape[-1]), patch)
    rows, columns = kept // w, kept % w
    grid = image.new_zeros(h, w, stem.proj.out_channels)
    for top in range(0, h, BAND):
        here = columns[(rows >= top) & (rows < top + BAND)]
        if len(here):
            bottom, left, right = min(top + BAND, h), int(here.min()), int(here.max()) + 1
            above, before = min(top, 1), min(left, 1)
            part = image[:, (top - above) * patch : bottom * patch, (left - before) * patch : right * patch]
            tokens = stem(part[None])[0].unflatten(0, (bottom - top + above, right - left + before))  # h w D of the band
            grid[top:bottom, left:right] = tokens[above:, before:]
    return grid.flatten(0, 1)[kept]


def embed(model: ViT, pack: Pack) -> Tensor:
    """Kept patches to tokens with positions, each image behind its prefix: 1 T D."""
    stem = model.patch_embed
    if isinstance(stem, LinearStem):
        patches = [patchify(image[None], pack.patch)[0, kept] for image, kept in zip(pack.images, pack.kept, strict=True)]
        tokens = stem.project(torch.cat(patches))  # N D, N patches of all images
    else:
        tokens = torch.cat([convolved(stem, image, kept, pack.patch) for image, kept in zip(pack.images, pack.kept, strict=True)])
    grids = pack.grids
    positions = {grid: model.positions(grid)[0] for grid in set(grids)}
    tokens = tokens + torch.cat([positions[grid][kept] for grid, kept in zip(grids, pack.kept, strict=True)])
    prefix = model.prefix()[0].to(tokens.dtype)
    return torch.cat([part for image in tokens.split(pack.lengths(0)) for part in (prefix, image)])[None]


def forward(model: ViT, pack: Pack) -> Tensor:
    """Logits of each image, as if it were alone: I K for I images."""
    return model.head(features(model, pack))


def features(model: ViT, pack: Pack, layout: Segments | None = None) -> Tensor:
    """What the head reads of each image, as if it were alone: I D for I images. `layout` may change what the blocks are given."""
    return torch.cat([model.pool(image) for image in encode(model, pack, layout)])


def encode(model: ViT, pack: Pack, layout: Segments | None = None) -> Sequence[Tensor]:
    """Each image's tokens after all blocks, as if it were alone: 1 T D each, prefix tokens first, then kept patches."""
    lengths = pack.lengths(model.config.prefix)
    tokens = embed(model, pack)
    return model.encode(tokens, layout or Segments(lengths, tokens.device)).split(lengths, dim=1)


def attention(model: ViT, pack: Pack, block: int = -1) -> list[Tensor]:
    """What each token of each image attends to in one of the blocks: A T T, rows sum to 1; prefix tokens first, then kept patches."""
    lengths = pack.lengths(model.config.prefix)
    tokens = embed(model, pack)
    layout = Segments(lengths, tokens.device)
    for before in model.blocks[: block % len(model.blocks)]:
        tokens = before(tokens, layout)
    looked_at: Any = model.blocks[block]
    return [looked_at.attn.weights(image)[0] for image in looked_at.norm1(tokens).split(lengths, dim=1)]


def attention_maps(model: ViT, pack: Pack, block: int = -1) -> list[Tensor]:
    """How much the tokens that the head reads (the class token, else all patches) attend to each patch: h w A, NaN = air."""
    prefix = model.config.prefix
    readers = slice(0, 1) if model.config.pool == "cls" else slice(prefix, None)
    return pack.on_grid(weights[:, readers, prefix:].mean(dim=1).T for weights in attention(model, pack, block))


class HasPack(Protocol):
    """Anything that goes with one image."""

    @property
    def pack(self) -> Pack: ...


@dataclass(eq=False)
class Group(Generic[T]):
    """Items that share a pack to be, and their tokens."""

    tokens: int = 0
    items: list[T] = field(default_factory=list)


def check_budget(name: str, length: int, tokens: int) -> None:
    """Raises UsageError naming an image whose own `length` tokens exceed the budget of `tokens`."""
    if length > tokens:
        raise UsageError(f"tokens: {name} has {length} tokens, more than --tokens {tokens} allows; raise it")


def fill(items: Iterable[T], tokens: int, prefix: int, images: int | None = None) -> Iterator[list[T]]:
    """Group a stream into at most `tokens` tokens each, with `prefix` of them before each image's patches, and at most `images` images.

    Best fit among 8 open groups: an item goes where it leaves the least room; where it fits nowhere, the fullest group is done. So lengths
    need not be known in advance, little memory is held, and the groups depend on the order of the stream alone, never on workers.
    Raises UsageError naming an image that exceeds the budget by itself.
    """
    groups: list[Group[T]] = []  # those still open
    for item in items:
        length = sum(item.pack.lengths(prefix))
        check_budget(item.pack.names[0], length, tokens)
        fitting = [group for group in groups if group.tokens + length <= tokens]
        if not fitting:
            if len(groups) == OPEN:
                groups.sort(key=attrgetter("tokens"))
                yield groups.pop().items
            groups.append(Group())
        group = max(fitting, key=attrgetter("tokens"), default=groups[-1])
        group.tokens += length
        group.items.append(item)
        if len(group.items) == images:
            groups.remove(group)
            yield group.items
    yield from (group.items for group in groups)
