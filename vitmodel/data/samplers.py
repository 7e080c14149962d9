"""Which images an epoch shows, and in what order. Knows labels and seeds, no pixels and no model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

import numpy as np
from torch.utils.data import Sampler

from vitmodel.utils import derive_seed


class SampleRequest(NamedTuple):
    """One image to load, and the seed of everything random about it."""

    row: int
    seed: int


class SequentialSampler(Sampler[SampleRequest]):
    """Every image once, in order."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[SampleRequest]:
        return (SampleRequest(index, 0) for index in range(self.count))


class EpochSampler(Sampler[SampleRequest]):
    """As many draws an epoch as there are images, in one of three ways.

    natural   each image once
    positive  each image once, but where `batch` draws in a row would hold no positive, one takes a negative's place
    balanced  cancers and negatives equally often

    Unknown labels (NaN) count as negatives. The draws depend on seed and epoch alone, so a run that resumes at `epoch` sees the batches
    of one that was never interrupted. Each iteration is the next epoch, from its first draw on: a loader with workers makes two iterators
    and uses one. (Lightning's `set_epoch` comes too late for the first epoch after a resumption.)
    """

    def __init__(
        self,
        labels: Sequence[float],
        seed: int,
        mode: Literal["natural", "positive", "balanced"],
        batch: int = 32,
        epoch: int = 0,
    ) -> None:
        """`epoch` comes next."""
        self.labels = np.asarray(labels)
        self.seed = seed
        self.mode = mode
        self.batch = batch
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.labels)

    def __iter__(self) -> Iterator[SampleRequest]:
        epoch, self.epoch = self.epoch, self.epoch + 1
        rng = np.random.default_rng(derive_seed("order", self.seed, epoch))
        draw = {"natural": self._natural, "positive": self._with_positives, "balanced": self._balanced}[self.mode]
        for position, row in enumerate(draw(rng)):
            yield SampleRequest(int(row), derive_seed("draw", self.seed, epoch, position))

    def _natural(self, rng: np.random.Generator) -> np.ndarray:
        return rng.permutation(len(self))

    def _with_positives(self, rng: np.random.Generator) -> np.ndarray:
        """A random order in which each batch that came out without a positive has one in the place of one of its negatives."""
        order = rng.permutation(len(self))
        positive = self.labels == 1
        spare = rng.permutation(np.flatnonzero(positive))
        lacking = [
            start for start in range(0, len(order), self.batch) if not positive[order[start : start + self.batch]].any()
        ]
        if len(spare):
            for number, start in enumerate(lacking):
                place = start + rng.integers(min(self.batch, len(order) - start))
                order[place] = spare[number % len(spare)]
        return order

    def _balanced(self, rng: np.random.Generator) -> np.ndarray:
        """Half the draws from each class; within a class every image comes as often as any other, give or take one."""
        draws = []
        for label in (0, 1):
            members = np.flatnonzero((self.labels == 1) == label)
            wanted = len(self) // 2 + label * (len(self) % 2)
            rounds = [rng.permutation(members) for _ in range(-(-wanted // len(members)))]
            draws.append(np.concatenate(rounds)[:wanted])
        return rng.permutation(np.concatenate(draws))
