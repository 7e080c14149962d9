"""Packs: images of any sizes as patches, those of air left out, and streams of them filled up to a budget of tokens. Knows no network.

A pack says what is looked at: pixels, the numbers of the patches that are kept, and what is known of each image beside its pixels.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from operator import attrgetter
from typing import Generic, Protocol, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from vitmodel.errors import UsageError
from vitmodel.model.architecture import grid_of

T = TypeVar("T", bound="HasPack")

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
