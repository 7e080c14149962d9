"""Crops on their way to the network: loaded by the workers, packed in the order of the draws, shared out among processes.

Knows how images are loaded and packed, but not what is learned from them.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

from vitmodel.config import TrainingConfig
from vitmodel.data.dataset import Example
from vitmodel.data.samplers import Draw
from vitmodel.model.architecture import PRESETS
from vitmodel.model.packing import About, Pack, fill, join, pack
from vitmodel.utils import UsageError, VitmodelError

logger = logging.getLogger(__name__)


class Batch(NamedTuple):
    """What one step sees."""

    pack: Pack
    label: Tensor  # B, 0 or 1
    targets: Tensor  # B A, auxiliary targets; NaN = unknown
    row: Tensor  # B, the images' places in their table, for a pack has an order of its own
    lesions: tuple[Tensor, ...]  # B, boxes of known cancers in pixels, K 4 each; a target, too
    spare: bool = False
    """A repetition that only keeps this process in step with others that have one batch more: it counts for nothing."""


class Single(NamedTuple):
    """One image on its way into a pack."""

    pack: Pack
    label: Tensor
    targets: Tensor
    row: int
    lesions: Tensor


class Images(Protocol):
    """Examples by draw, with a path or name for each row."""

    paths: list[str]

    def __len__(self) -> int: ...

    def __getitem__(self, draw: Draw) -> Example: ...


class Batches:
    """Packs of images in the order of the draws. Each iteration is an epoch.

    A crop that cannot be read is named in the log and left out. Raises VitmodelError naming them when there are more than
    `config.unreadable`.
    """

    def __init__(self, images: Images, sampler: Sampler[Draw], config: TrainingConfig) -> None:
        patch = PRESETS[config.model].patch
        cut = functools.partial(to_single, paths=images.paths, patch=patch, air=not config.packed)
        self.singles: DataLoader[Example] = DataLoader(
            images,  # type: ignore[arg-type]
            batch_size=None,
            sampler=Share(sampler),
            collate_fn=cut,
            num_workers=config.workers,
            persistent_workers=config.workers > 0,
        )
        self.config = config
        self.unreadable: dict[int, str] = {}
        """Why, by row; the same crop counts once however often it is drawn."""

    def __iter__(self) -> Iterator[Batch]:
        config = self.config
        images = max(1, config.batch_size // processes())
        for group, spare in in_step(fill(self._readable(), config.most_tokens, PRESETS[config.model].prefix, images)):
            packs, labels, targets, rows, lesions = zip(*group, strict=True)
            yield Batch(join(packs), torch.stack(labels), torch.stack(targets), torch.tensor(rows), lesions, spare)

    def _readable(self) -> Iterator[Single]:
        for single in self.singles:
            if isinstance(single, Single):
                yield single
                continue
            row, problem = single
            if row not in self.unreadable:
                self.unreadable[row] = problem
                logger.warning("left out, %d of at most %d: %s", len(self.unreadable), self.config.unreadable, problem)
            if len(self.unreadable) > self.config.unreadable:
                first = "; ".join(list(self.unreadable.values())[:3])
                raise VitmodelError(f"more than {self.config.unreadable} crops cannot be read (--unreadable). The first: {first}")


def to_single(example: Example, paths: list[str], patch: int, air: bool) -> Single | tuple[int, str]:
    """The image cut into patches, those of air left out unless `air`; its row and what is wrong with it where that cannot be."""
    if example.problem:
        return example.row, example.problem
    try:
        image = pack([example.image], patch, [paths[example.row]], air, [About(mm_per_pixel=example.mm_per_pixel)])
        return Single(image, example.label, example.targets, example.row, example.lesions)
    except UsageError as error:
        return example.row, str(error)


def processes() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


class Share(Sampler[Draw]):
    """Every n-th draw for this of n processes, so that the batches that they see at one time are one batch of a single process."""

    def __init__(self, sampler: Sampler[Draw]) -> None:
        self.sampler = sampler

    def __len__(self) -> int:
        return -(-len(self.sampler) // processes())  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[Draw]:
        rank = dist.get_rank() if processes() > 1 else 0
        return islice(self.sampler, rank, None, processes())


def in_step(groups: Iterable[list[Single]]) -> Iterator[tuple[list[Single], bool]]:
    """The groups for as long as any process has one; a process that has none left repeats its last, marked True as spare.

    A process that took one step more or less than the others would wait for them for ever. Raises VitmodelError where there are fewer
    images than processes.
    """
    if processes() == 1:
        yield from ((group, False) for group in groups)
        return
    talk = dist.new_group(backend="gloo")
    each, last = iter(groups), None
    while True:
        group = next(each, None)
        going_on = torch.tensor(group is not None, dtype=torch.int)
        dist.all_reduce(going_on, dist.ReduceOp.MAX, group=talk)
        if not going_on:
            return
        last = group or last
        if last is None:
            raise VitmodelError(f"fewer images than the {processes()} processes that share them; use fewer --devices")
        yield last, group is None
