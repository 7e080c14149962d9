"""Samplers: which images an epoch shows, in which order and with which random seeds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

import numpy as np
from torch.utils.data import Sampler

from vitmodel.utils import derive_seed


class SampleRequest(NamedTuple):
    """A request for one image: its row, and the seed of its random changes."""

    row: int
    seed: int


class SequentialSampler(Sampler[SampleRequest]):
    """Every image once, in order, with seed 0.

    Args:
        count: Number of images.
    """

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[SampleRequest]:
        return (SampleRequest(index, 0) for index in range(self.count))


class EpochSampler(Sampler[SampleRequest]):
    """As many requests per epoch as there are images.

    The requests depend on seed and epoch only, so a run that resumes at `epoch` sees the batches of an uninterrupted
    run. Each iteration is the next epoch. It is counted when its first request is drawn, because a loader with workers
    creates two iterators and uses one. (Lightning's `set_epoch` comes too late for the first epoch after resuming.)

    Args:
        labels: Label of each image. Unknown labels (NaN) count as negatives.
        seed: Seed of the order and of the requests.
        mode: "natural" = each image once. "positive" = each image once, but in each run of `batch` requests without a
            positive image, one negative is replaced by a positive. "balanced" = equally many positives and negatives.
        batch: Images per batch, for the mode "positive".
        epoch: Epoch of the next iteration.
    """

    def __init__(
        self,
        labels: Sequence[float],
        seed: int,
        mode: Literal["natural", "positive", "balanced"],
        batch: int = 32,
        epoch: int = 0,
    ) -> None:
        self.labels = np.asarray(labels)
        self.seed = seed
        self.mode = mode
        self.batch = batch
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.labels)

    def __iter__(self) -> Iterator[SampleRequest]:
        epoch = self.epoch
        self.epoch += 1
        rng = np.random.default_rng(derive_seed("order", self.seed, epoch))
        draw_order = {"natural": self._natural, "positive": self._with_positives, "balanced": self._balanced}[self.mode]
        for position, row in enumerate(draw_order(rng)):
            yield SampleRequest(int(row), derive_seed("draw", self.seed, epoch, position))

    def _natural(self, rng: np.random.Generator) -> np.ndarray:
        """Return the rows in random order."""
        return rng.permutation(len(self))

    def _with_positives(self, rng: np.random.Generator) -> np.ndarray:
        """Return the rows in random order, with a positive in place of a negative in each batch without a positive."""
        order = rng.permutation(len(self))
        positive = self.labels == 1
        positive_rows = rng.permutation(np.flatnonzero(positive))
        if not len(positive_rows):
            return order
        starts = range(0, len(order), self.batch)
        without_positive = [start for start in starts if not positive[order[start : start + self.batch]].any()]
        for number, start in enumerate(without_positive):
            position = start + rng.integers(min(self.batch, len(order) - start))
            order[position] = positive_rows[number % len(positive_rows)]
        return order

    def _balanced(self, rng: np.random.Generator) -> np.ndarray:
        """Return half the rows from each class; within a class, counts of two images differ by at most one."""
        rows_by_class = []
        for label in (0, 1):
            rows = np.flatnonzero((self.labels == 1) == label)
            count = len(self) // 2 + label * (len(self) % 2)
            rounds = [rng.permutation(rows) for _ in range(-(-count // len(rows)))]
            rows_by_class.append(np.concatenate(rounds)[:count])
        return rng.permutation(np.concatenate(rows_by_class))
