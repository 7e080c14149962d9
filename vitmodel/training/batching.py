"""Crops on their way to the network: loaded by the workers, packed in the order of the draws, shared out among processes.

Knows how images are loaded and packed, but not what is learned from them.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

from vitmodel.config import TrainingConfig
from vitmodel.data.dataset import Example
from vitmodel.data.samplers import SampleRequest
from vitmodel.errors import UsageError, VitmodelError
from vitmodel.model.architecture import PRESETS
from vitmodel.model.packed_batch import (
    ImageMetadata,
    PackedBatch,
    best_fit_groups,
    concat_packs,
    concat_separate_packs,
    group_indices,
    pack_images,
)

logger = logging.getLogger(__name__)


class Batch(NamedTuple):
    """What one step sees."""

    pack: PackedBatch
    label: Tensor  # B, 0 or 1; NaN in a spare batch
    targets: Tensor  # B A, auxiliary targets; NaN = unknown
    row: Tensor  # B, the images' places in their table, for a pack has an order of its own
    lesions: tuple[Tensor, ...]  # B, boxes of known cancers in pixels, K 4 each; a target, too
    is_filler: bool = False
    """A repetition that only keeps this process in step with others that have one batch more: it counts for nothing."""

    @property
    def indices_by_sample(self) -> list[list[int]]:
        """The places in the pack of each draw's images: those of an exam, or one."""
        return group_indices(known.exam for known in self.pack.metadata)


class PackedSample(NamedTuple):
    """One draw on its way into a pack: an image, or those of an exam, I of them."""

    pack: PackedBatch
    label: Tensor  # I
    targets: Tensor  # I A
    rows: tuple[int, ...]
    lesions: tuple[Tensor, ...]


LoadedSample = tuple[PackedSample | None, dict[int, str]]
"""What can be used of a draw, and by row what is wrong with the rest."""


class ImageDataset(Protocol):
    """An example, or those of an exam, by draw; with a path or name for each row."""

    paths: list[str]

    def __len__(self) -> int: ...

    def __getitem__(self, draw: SampleRequest) -> Example | list[Example]: ...


class BatchLoader:
    """Packs of images in the order of the draws. Each iteration is an epoch.

    A crop that cannot be read is named in the log and left out, and so is an exam that loses all of its own. Raises VitmodelError naming
    the crops when there are more than `config.unreadable`.
    """

    def __init__(
        self,
        images: ImageDataset,
        sampler: Sampler[SampleRequest],
        config: TrainingConfig,
        metadata: Sequence[ImageMetadata] = (),
    ) -> None:
        """`about` says what is known of each row's image; none given = nothing known."""
        patch = PRESETS[config.model].patch
        cut = functools.partial(
            to_packed_sample, paths=images.paths, patch=patch, air=not config.packed, metadata=metadata
        )
        self.sample_loader: DataLoader[LoadedSample] = DataLoader(
            images,  # type: ignore[arg-type]
            batch_size=None,
            sampler=RankSampler(sampler),
            collate_fn=cut,
            num_workers=config.workers,
            persistent_workers=config.workers > 0,
        )
        self.config = config
        self.unreadable: dict[int, str] = {}
        """Why, by row; the same crop counts once however often it is drawn."""

    def __iter__(self) -> Iterator[Batch]:
        config = self.config
        images = max(1, config.batch_size // world_size())
        for group, is_filler in synchronized_batches(
            best_fit_groups(self._readable(), config.most_tokens, PRESETS[config.model].num_prefix_tokens, images)
        ):
            packs, labels, targets, rows, lesions = zip(*group, strict=True)
            label = torch.cat(labels) * (torch.nan if is_filler else 1)  # pF1 is of all processes' labels
            yield Batch(
                concat_separate_packs(packs),
                label,
                torch.cat(targets),
                torch.tensor(sum(rows, ())),
                sum(lesions, ()),
                is_filler,
            )

    def _readable(self) -> Iterator[PackedSample]:
        for sample, problems in self.sample_loader:
            for row, problem in problems.items():
                if row not in self.unreadable:
                    self.unreadable[row] = problem
                    logger.warning(
                        "left out, %d of at most %d: %s", len(self.unreadable), self.config.unreadable, problem
                    )
                if len(self.unreadable) > self.config.unreadable:
                    first = "; ".join(list(self.unreadable.values())[:3])
                    raise VitmodelError(
                        f"more than {self.config.unreadable} crops cannot be read (--unreadable). The first: {first}"
                    )
            if sample is not None:
                yield sample
            elif len(problems) > 1:
                logger.warning("left out, an exam of which no image can be read: %s", "; ".join(problems.values()))


def to_packed_sample(
    drawn: Example | list[Example], paths: list[str], patch: int, air: bool, metadata: Sequence[ImageMetadata] = ()
) -> LoadedSample:
    """The drawn images cut into patches, those of air left out unless `air`."""
    found: list[tuple[Example, PackedBatch]] = []
    problems: dict[int, str] = {}
    for example in [drawn] if isinstance(drawn, Example) else drawn:
        known = replace(metadata[example.row] if metadata else ImageMetadata(), mm_per_pixel=example.mm_per_pixel)
        try:
            if example.problem:
                raise UsageError(example.problem)
            found.append((example, pack_images([example.image], patch, [paths[example.row]], air, [known])))
        except UsageError as error:
            problems[example.row] = str(error)
    if not found:
        return None, problems
    examples, packs = zip(*found, strict=True)
    label, targets = torch.stack([each.label for each in examples]), torch.stack([each.targets for each in examples])
    rows, lesions = tuple(each.row for each in examples), tuple(each.lesions for each in examples)
    return PackedSample(concat_packs(packs), label, targets, rows, lesions), problems


def world_size() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def gather_names(names: tuple[str, ...]) -> tuple[str, ...]:
    """The names that all processes have at this step."""
    if world_size() == 1:
        return names
    found: list[Any] = [None] * world_size()
    dist.all_gather_object(found, names)
    return sum(found, ())


class RankSampler(Sampler[SampleRequest]):
    """Every n-th draw for this of n processes, so that the batches that they see at one time are one batch of a single process."""

    def __init__(self, sampler: Sampler[SampleRequest]) -> None:
        self.sampler = sampler

    def __len__(self) -> int:
        return -(-len(self.sampler) // world_size())  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[SampleRequest]:
        rank = dist.get_rank() if world_size() > 1 else 0
        return islice(self.sampler, rank, None, world_size())


def synchronized_batches(groups: Iterable[list[PackedSample]]) -> Iterator[tuple[list[PackedSample], bool]]:
    """The groups for as long as any process has one; a process that has none left repeats its last, marked True as spare.

    A process that took one step more or less than the others would wait for them for ever. Raises VitmodelError, in all of them, where
    one of them cannot go on or there are fewer images than processes.
    """
    if world_size() == 1:
        yield from ((group, False) for group in groups)
        return
    talk = dist.new_group(backend="gloo")
    each, last = iter(groups), None
    while True:
        group, problem = None, ""
        try:
            group = next(each, None)
        except VitmodelError as error:
            problem = str(error)
        said: list[Any] = [None] * world_size()
        dist.all_gather_object(said, (group is not None, problem), group=talk)
        going_on, problems = zip(*said, strict=True)
        if any(problems):
            raise VitmodelError(next(filter(None, problems)))
        if not any(going_on):
            return
        if last is None and not all(going_on):
            raise VitmodelError(f"fewer images than the {world_size()} processes that share them; use fewer --devices")
        last = group or last
        assert last is not None
        yield last, group is None
