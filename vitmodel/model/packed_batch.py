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
from vitmodel.model.architecture import patch_grid

T = TypeVar("T", bound="HasPack")

MAX_OPEN_GROUPS = 8  # groups that `fill` keeps open: wastes 1 % of a budget that holds 13 images, 3 % of one that holds 6 (with one open: 4 % and 8 %)


@dataclass(frozen=True)
class ImageMetadata:
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

    def with_unique_ids(self, place: int, places: int) -> ImageMetadata:
        """The same, its breast and exam numbered so that they are none of another place's."""
        breast, exam = (number if number < 0 else number * places + place for number in (self.breast, self.exam))
        return replace(self, breast=breast, exam=exam)


def group_indices(numbers: Iterable[int]) -> list[list[int]]:
    """The places of each number, in order of first appearance; each -1 is a group by itself."""
    found: dict[int, list[int]] = {}
    for place, number in enumerate(numbers):
        found.setdefault(number if number >= 0 else -1 - place, []).append(place)
    return list(found.values())


@dataclass(frozen=True)
class PackedBatch:
    """Images of any sizes and, of each, the patches to look at."""

    names: tuple[str, ...]
    """What messages call the images."""
    images: tuple[Tensor, ...]
    """C H W each, sides multiples of the patch."""
    patch_indices: tuple[Tensor, ...]
    """Numbers of the patches that are kept, counted row by row; N of them each."""
    patch: int
    """Side of a patch in pixels."""
    metadata: tuple[ImageMetadata, ...] = ()
    """What is known of each image; none given = nothing known."""

    def __post_init__(self) -> None:
        if not self.metadata:
            object.__setattr__(self, "metadata", (ImageMetadata(),) * len(self.images))

    def __len__(self) -> int:
        return len(self.images)

    def __iter__(self) -> Iterator[PackedBatch]:
        """Each image as a pack of its own."""
        return (self.select([number]) for number in range(len(self)))

    def select(self, numbers: Iterable[int]) -> PackedBatch:
        """The images with these numbers, in their order."""
        chosen = [(self.names[n], self.images[n], self.patch_indices[n], self.metadata[n]) for n in numbers]
        names, images, kept, metadata = zip(*chosen, strict=True)
        return PackedBatch(names, images, kept, self.patch, metadata)

    @property
    def grids(self) -> list[tuple[int, int]]:
        """Rows and columns of patches in each image, air included."""
        return [patch_grid((image.shape[-2], image.shape[-1]), self.patch) for image in self.images]

    def sequence_lengths(self, prefix: int) -> list[int]:
        """Tokens of each image, with `prefix` tokens before its patches."""
        return [prefix + len(kept) for kept in self.patch_indices]

    def to(self, device: torch.device | str) -> PackedBatch:
        """The same pack in another memory."""
        images, kept = (
            tuple(tensor.to(device, non_blocking=True) for tensor in tensors)
            for tensors in (self.images, self.patch_indices)
        )
        return replace(self, images=images, patch_indices=kept)

    def scatter_to_grid(self, values: Iterable[Tensor]) -> list[Tensor]:
        """One value (or vector) per kept patch of each image back in its place: N ... -> h w ..., NaN where a patch was left out."""
        placed = []
        for (h, w), kept, value in zip(self.grids, self.patch_indices, values, strict=True):
            grid = value.new_full((h * w, *value.shape[1:]), torch.nan)
            grid[kept] = value
            placed.append(grid.unflatten(0, (h, w)))
        return placed


def pack_images(
    images: Sequence[Tensor],
    patch: int,
    names: Sequence[str] | None = None,
    air: bool = False,
    metadata: Sequence[ImageMetadata] = (),
) -> PackedBatch:
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
    return PackedBatch(tuple(names), tuple(padded), tuple(kept), patch, tuple(metadata))


def concat_packs(packs: Sequence[PackedBatch]) -> PackedBatch:
    """Several packs as one; equal numbers of breasts and exams mean the same ones."""
    each = zip(*((pack.names, pack.images, pack.patch_indices, pack.metadata) for pack in packs), strict=True)
    names, images, kept, metadata = (sum(parts, ()) for parts in each)
    return PackedBatch(names, images, kept, packs[0].patch, metadata)


def concat_separate_packs(packs: Sequence[PackedBatch]) -> PackedBatch:
    """Several packs as one; breasts and exams of different packs stay apart, whatever their numbers."""
    return concat_packs(
        [
            replace(each, metadata=tuple(known.with_unique_ids(place, len(packs)) for known in each.metadata))
            for place, each in enumerate(packs)
        ]
    )


def split_by_token_budget(pack: PackedBatch, tokens: int, prefix: int) -> Iterator[PackedBatch]:
    """Consecutive images of at most `tokens` tokens, `prefix` of them before each one's patches; a longer image is alone."""
    group: list[int] = []
    total = 0
    for number, length in enumerate(pack.sequence_lengths(prefix)):
        if group and total + length > tokens:
            yield pack.select(group)
            group, total = [], 0
        group.append(number)
        total += length
    yield pack.select(group)


class HasPack(Protocol):
    """Anything that goes with one image."""

    @property
    def pack(self) -> PackedBatch: ...


@dataclass(eq=False)
class TokenBin(Generic[T]):
    """Items that share a pack to be, and their tokens."""

    tokens: int = 0
    items: list[T] = field(default_factory=list)


def check_token_budget(name: str, length: int, tokens: int) -> None:
    """Raises UsageError naming an image whose own `length` tokens exceed the budget of `tokens`."""
    if length > tokens:
        raise UsageError(f"tokens: {name} has {length} tokens, more than --tokens {tokens} allows; raise it")


def best_fit_groups(items: Iterable[T], tokens: int, prefix: int, images: int | None = None) -> Iterator[list[T]]:
    """Group a stream into at most `tokens` tokens each, with `prefix` of them before each image's patches, and at most `images` images.

    Best fit among 8 open groups: an item goes where it leaves the least room; where it fits nowhere, the fullest group is done. So lengths
    need not be known in advance, little memory is held, and the groups depend on the order of the stream alone, never on workers.
    Raises UsageError naming an image that exceeds the budget by itself.
    """
    groups: list[TokenBin[T]] = []  # those still open
    for item in items:
        length = sum(item.pack.sequence_lengths(prefix))
        check_token_budget(item.pack.names[0], length, tokens)
        fitting = [group for group in groups if group.tokens + length <= tokens]
        if not fitting:
            if len(groups) == MAX_OPEN_GROUPS:
                groups.sort(key=attrgetter("tokens"))
                yield groups.pop().items
            groups.append(TokenBin())
        group = max(fitting, key=attrgetter("tokens"), default=groups[-1])
        group.tokens += length
        group.items.append(item)
        if len(group.items) == images:
            groups.remove(group)
            yield group.items
    yield from (group.items for group in groups)
