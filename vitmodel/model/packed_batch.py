"""Packs: images of any size as patches without air, and grouping of a stream of images by a token budget.

A pack holds the pixels of images, the indices of the patches that are kept, and the metadata of each image.
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

MAX_OPEN_GROUPS = 8
"""Groups that `best_fit_groups` keeps open. This wastes 1 % of a budget that holds 13 images and 3 % of one that holds
6; a single open group wastes 4 % and 8 %."""


@dataclass(frozen=True)
class ImageMetadata:
    """Per-image metadata passed to the network."""

    mm_per_pixel: float = math.nan
    """Side of a pixel in mm; NaN = unknown."""
    sources: tuple[int, ...] = ()
    """Where the image comes from: an index into each vocabulary of the network's sources. 0 = unknown, or too rare to
    have an adapter of its own. Empty = all unknown."""
    view: int = 0
    """Projection: an index into the network's vocabulary of views. 0 = unknown or rare."""
    breast: int = -1
    """Id shared by all images of a breast; -1 = the only image of its breast."""
    exam: int = -1
    """Id shared by all breasts of an exam; -1 = the only breast of its exam."""

    def with_unique_ids(self, place: int, places: int) -> ImageMetadata:
        """Return a copy with breast and exam ids that differ from those of every other `place`.

        Args:
            place: Index of this image's group, from 0.
            places: Number of groups.
        """

        def unique(identifier: int) -> int:
            return identifier if identifier < 0 else identifier * places + place

        return replace(self, breast=unique(self.breast), exam=unique(self.exam))


def group_indices(numbers: Iterable[int]) -> list[list[int]]:
    """Return the indices at which each number occurs, in order of first appearance.

    Each negative number forms a group of its own.
    """
    groups: dict[int, list[int]] = {}
    for index, number in enumerate(numbers):
        groups.setdefault(number if number >= 0 else -1 - index, []).append(index)
    return list(groups.values())


@dataclass(frozen=True)
class PackedBatch:
    """Images of any size and the patches to read of each."""

    names: tuple[str, ...]
    """Names of the images in messages."""
    images: tuple[Tensor, ...]
    """Pixels of each image, `(C, H, W)`; the sides are multiples of the patch size."""
    patch_indices: tuple[Tensor, ...]
    """Row-major indices of the patches that are kept, `(N,)` for each image."""
    patch: int
    """Side of a patch in pixels."""
    metadata: tuple[ImageMetadata, ...] = ()
    """Metadata of each image; empty = unknown for all images."""

    def __post_init__(self) -> None:
        if not self.metadata:
            object.__setattr__(self, "metadata", (ImageMetadata(),) * len(self.images))

    def __len__(self) -> int:
        return len(self.images)

    def __iter__(self) -> Iterator[PackedBatch]:
        """Yield each image as a pack of its own."""
        return (self.select([index]) for index in range(len(self)))

    def select(self, numbers: Iterable[int]) -> PackedBatch:
        """Return a pack of the images with these indices, in this order."""
        chosen = list(numbers)
        return PackedBatch(
            names=tuple(self.names[index] for index in chosen),
            images=tuple(self.images[index] for index in chosen),
            patch_indices=tuple(self.patch_indices[index] for index in chosen),
            patch=self.patch,
            metadata=tuple(self.metadata[index] for index in chosen),
        )

    @property
    def grids(self) -> list[tuple[int, int]]:
        """Return the rows and columns of patches of each image, including patches of air."""
        return [patch_grid((image.shape[-2], image.shape[-1]), self.patch) for image in self.images]

    def sequence_lengths(self, prefix: int) -> list[int]:
        """Return the number of tokens of each image: `prefix` tokens and its kept patches."""
        return [prefix + len(kept) for kept in self.patch_indices]

    def to(self, device: torch.device | str) -> PackedBatch:
        """Return the pack with its tensors on `device`."""
        return replace(
            self,
            images=tuple(image.to(device, non_blocking=True) for image in self.images),
            patch_indices=tuple(kept.to(device, non_blocking=True) for kept in self.patch_indices),
        )

    def scatter_to_grid(self, values: Iterable[Tensor]) -> list[Tensor]:
        """Place values of kept patches at their positions in the image.

        Args:
            values: For each image one value or vector per kept patch, `(N, ...)`.

        Returns:
            For each image a tensor `(h, w, ...)`, NaN where a patch was left out.
        """
        maps = []
        for (h, w), kept, value in zip(self.grids, self.patch_indices, values, strict=True):
            grid = value.new_full((h * w, *value.shape[1:]), torch.nan)
            grid[kept] = value
            maps.append(grid.unflatten(0, (h, w)))
        return maps


def pack_images(
    images: Sequence[Tensor],
    patch: int,
    names: Sequence[str] | None = None,
    air: bool = False,
    metadata: Sequence[ImageMetadata] = (),
) -> PackedBatch:
    """Pack images, padded with air to whole patches.

    Args:
        images: Pixels of each image, `(C, H, W)`; 0 is air.
        patch: Side of a patch in pixels.
        names: Names of the images in messages; None = "image 1", "image 2", ...
        air: Whether to keep patches that contain only air.
        metadata: Metadata of each image; empty = unknown.

    Raises:
        UsageError: An image is smaller than a patch, contains only air, or has NaN or infinite pixels; the message
            names the image.
    """
    names = names or [f"image {number}" for number in range(1, len(images) + 1)]
    padded = []
    kept = []
    for name, image in zip(names, images, strict=True):
        height, width = image.shape[-2:]
        if min(height, width) < patch:
            raise UsageError(
                f"{name}: {height}x{width} is smaller than a patch of {patch}x{patch} pixels; use a larger image"
            )
        if not image.isfinite().all():
            raise UsageError(f"{name}: has NaN or infinite pixels; correct or remove the image")
        image = F.pad(image, (0, -width % patch, 0, -height % patch))
        tissue = F.max_pool2d(image.amax(dim=0, keepdim=True), patch).flatten() > 0
        if not tissue.any():
            raise UsageError(f"{name}: contains only air (all pixels are 0); remove the image")
        padded.append(image)
        kept.append(torch.arange(len(tissue)) if air else tissue.nonzero().squeeze(1))
    return PackedBatch(tuple(names), tuple(padded), tuple(kept), patch, tuple(metadata))


def concat_packs(packs: Sequence[PackedBatch]) -> PackedBatch:
    """Return one pack of all images; equal ids in different packs mean the same breast or exam."""
    fields = zip(*((pack.names, pack.images, pack.patch_indices, pack.metadata) for pack in packs), strict=True)
    names, images, kept, metadata = (sum(parts, ()) for parts in fields)
    return PackedBatch(names, images, kept, packs[0].patch, metadata)


def concat_separate_packs(packs: Sequence[PackedBatch]) -> PackedBatch:
    """Return one pack of all images; breasts and exams of different packs stay separate, even with equal ids."""
    separate = []
    for place, pack in enumerate(packs):
        metadata = tuple(image.with_unique_ids(place, len(packs)) for image in pack.metadata)
        separate.append(replace(pack, metadata=metadata))
    return concat_packs(separate)


def split_by_token_budget(pack: PackedBatch, tokens: int, prefix: int) -> Iterator[PackedBatch]:
    """Yield packs of consecutive images with at most `tokens` tokens each.

    Args:
        pack: The images.
        tokens: Token budget of a pack. An image that exceeds it is a pack of its own.
        prefix: Number of tokens before the patches of each image.
    """
    group: list[int] = []
    total = 0
    for index, length in enumerate(pack.sequence_lengths(prefix)):
        if group and total + length > tokens:
            yield pack.select(group)
            group = []
            total = 0
        group.append(index)
        total += length
    yield pack.select(group)


class HasPack(Protocol):
    """Anything with a `pack` of one image."""

    @property
    def pack(self) -> PackedBatch: ...


@dataclass(eq=False)
class TokenBin(Generic[T]):
    """Items that will share a pack, and their number of tokens."""

    tokens: int = 0
    items: list[T] = field(default_factory=list)


def check_token_budget(name: str, length: int, tokens: int) -> None:
    """Raise UsageError if the `length` tokens of the image `name` exceed the budget of `tokens`."""
    if length > tokens:
        raise UsageError(f"tokens: {name} has {length} tokens, more than --tokens {tokens} allows; increase --tokens")


def best_fit_groups(items: Iterable[T], tokens: int, prefix: int, images: int | None = None) -> Iterator[list[T]]:
    """Group a stream of items by a token budget.

    Best fit among `MAX_OPEN_GROUPS` open groups: an item joins the group where it leaves the least room; if it fits
    into none, the fullest group is complete. Lengths need not be known in advance, few items are held in memory, and
    the groups depend only on the order of the stream, never on the number of workers.

    Args:
        items: Items with a pack of one image each.
        tokens: Largest number of tokens in a group.
        prefix: Number of tokens before the patches of each image.
        images: Largest number of items in a group; None = no limit.

    Yields:
        The items of a group.

    Raises:
        UsageError: An image exceeds the budget alone; the message names it.
    """
    open_groups: list[TokenBin[T]] = []
    for item in items:
        length = sum(item.pack.sequence_lengths(prefix))
        check_token_budget(item.pack.names[0], length, tokens)
        candidates = [group for group in open_groups if group.tokens + length <= tokens]
        if not candidates:
            if len(open_groups) == MAX_OPEN_GROUPS:
                open_groups.sort(key=attrgetter("tokens"))
                yield open_groups.pop().items
            open_groups.append(TokenBin())
        group = max(candidates, key=attrgetter("tokens"), default=open_groups[-1])
        group.tokens += length
        group.items.append(item)
        if len(group.items) == images:
            open_groups.remove(group)
            yield group.items
    yield from (group.items for group in open_groups)
