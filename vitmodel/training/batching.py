"""Training batches: workers load the crops, which are packed in sampling order and divided among processes."""

from __future__ import annotations

import functools
import logging
import pickle
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

from vitmodel.config import TrainingConfig
from vitmodel.data.dataset import Example
from vitmodel.data.samplers import SampleRequest
from vitmodel.errors import UsageError, VitmodelError
from vitmodel.jobs.limits import raise_descriptor_limit
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

SHARED_MEMORY = Path("/dev/shm")
"""File system through which worker processes hand over their crops."""
LEAST_SHARED_MEMORY = 1_000_000
"""Bytes without which no worker processes are started, because their semaphores are in shared memory too."""
BASE_DESCRIPTORS = 96
"""Number of files that a training without worker processes has open at most, with some to spare."""
WORKER_DESCRIPTORS = 16
"""Number of files that each worker process of the loaders of training and validation needs."""
SHARING_DESCRIPTORS = 1024
"""Number of open files below which tensors are not shared, because each needs one."""


class Batch(NamedTuple):
    """Images and targets of one training step."""

    pack: PackedBatch
    label: Tensor
    """`(B,)`, 0 or 1; NaN if unknown or in a filler batch."""
    targets: Tensor
    """Auxiliary targets `(B, A)`; NaN if unknown."""
    row: Tensor
    """`(B,)`, row of each image in its table. Needed because packing changes the order."""
    lesions: tuple[Tensor, ...]
    """B tensors `(K, 4)` with boxes of known cancers in pixels; also a training target."""
    is_filler: bool = False
    """True for a repeated batch that only keeps this process synchronized with others that have one batch more. It has
    no effect on losses and metrics."""

    @property
    def indices_by_sample(self) -> list[list[int]]:
        """Indices into the pack of each sample's images: those of an exam, or a single one."""
        return group_indices(metadata.exam for metadata in self.pack.metadata)


class PackedSample(NamedTuple):
    """One sample before it is merged into a batch: I images, a single one or those of an exam."""

    pack: PackedBatch
    label: Tensor  # (I,)
    targets: Tensor  # (I, A)
    rows: tuple[int, ...]
    lesions: tuple[Tensor, ...]


LoadedSample = tuple[PackedSample | None, dict[int, str]]
"""The readable images of a sample (None if there are none), and for each unreadable row what is wrong with it."""


class ImageDataset(Protocol):
    """Dataset that returns an example, or those of an exam, for a sample request."""

    paths: list[str]
    """Path or name of each row, for messages."""

    def __len__(self) -> int: ...

    def __getitem__(self, request: SampleRequest) -> Example | list[Example]: ...


class BatchLoader:
    """Iterable of batches in sampling order. Each iteration is one epoch.

    Crops that cannot be read are logged and left out, and so are exams of which no crop can be read.

    Args:
        images: The dataset.
        sampler: Yields the sample requests of one epoch.
        config: Settings of the training.
        metadata: Metadata of each row's image; empty if nothing is known.

    Raises:
        VitmodelError: More than `config.unreadable` crops cannot be read. The message names the first ones.
    """

    def __init__(
        self,
        images: ImageDataset,
        sampler: Sampler[SampleRequest],
        config: TrainingConfig,
        metadata: Sequence[ImageMetadata] = (),
    ) -> None:
        patch = PRESETS[config.model].patch
        collate = functools.partial(
            to_packed_sample, paths=images.paths, patch=patch, air=not config.packed, metadata=metadata
        )
        workers, through_pipes = hand_over(config, patch)
        self.sample_loader: DataLoader[LoadedSample | bytes] = DataLoader(
            images,  # type: ignore[arg-type]
            batch_size=None,
            sampler=RankSampler(sampler),
            collate_fn=functools.partial(to_bytes, collate=collate) if through_pipes else collate,
            num_workers=workers,
            persistent_workers=workers > 0,
        )
        self.config = config
        self.unreadable: dict[int, str] = {}
        """Reason for each unreadable row. A crop counts once, however often it is sampled."""

    def __iter__(self) -> Iterator[Batch]:
        config = self.config
        images_per_process = max(1, config.batch_size // world_size())
        prefix_tokens = PRESETS[config.model].num_prefix_tokens
        groups = best_fit_groups(self._readable(), config.most_tokens, prefix_tokens, images_per_process)
        for group, is_filler in synchronized_batches(groups):
            packs, labels, targets, rows, lesions = zip(*group, strict=True)
            label = torch.cat(labels) * (torch.nan if is_filler else 1)  # pF1 uses the labels of all processes
            yield Batch(
                concat_separate_packs(packs),
                label,
                torch.cat(targets),
                torch.tensor(sum(rows, ())),
                sum(lesions, ()),
                is_filler,
            )

    def _readable(self) -> Iterator[PackedSample]:
        """Yield the samples with at least one readable image; log and count unreadable crops."""
        for loaded in self.sample_loader:
            sample, problems = pickle.loads(loaded) if isinstance(loaded, bytes) else loaded
            for row, problem in problems.items():
                if row not in self.unreadable:
                    self.unreadable[row] = problem
                    logger.warning(
                        "unreadable crop %d of at most %d is left out: %s",
                        len(self.unreadable),
                        self.config.unreadable,
                        problem,
                    )
                if len(self.unreadable) > self.config.unreadable:
                    first = "; ".join(list(self.unreadable.values())[:3])
                    raise VitmodelError(
                        f"more than {self.config.unreadable} crops cannot be read, the first are: {first}; "
                        f"run `vitmodel etl` again or raise --unreadable"
                    )
            if sample is not None:
                yield sample
            elif len(problems) > 1:
                logger.warning("exam without a readable image is left out: %s", "; ".join(problems.values()))


def hand_over(config: TrainingConfig, patch: int) -> tuple[int, bool]:
    """Return how many worker processes can run, and whether they must hand over their crops through pipes.

    Shared memory is faster. It must hold the crops of two batches and those that are read ahead, and each tensor in it
    needs a file descriptor. Pipes need neither.
    """
    if not config.workers:
        return 0, False
    needed = (2 + 2 * config.workers) * config.most_tokens * patch**2 * 4  # bytes of float32 pixels
    free = shutil.disk_usage(SHARED_MEMORY).free if SHARED_MEMORY.is_dir() else 0
    descriptors = raise_descriptor_limit()
    least = BASE_DESCRIPTORS + WORKER_DESCRIPTORS * config.workers
    if free < LEAST_SHARED_MEMORY:
        problem = f"{SHARED_MEMORY} has {free / 1e6:.1f} MB free"
        remedy = f"at least {LEAST_SHARED_MEMORY / 1e6:.0f} MB (docker run --shm-size)"
    elif descriptors < least:
        problem = f"only {descriptors} files may be open at once"
        remedy = f"at least {least} (ulimit -n)"
    else:
        if free < needed:
            _warn_once(
                f"{SHARED_MEMORY} has {free / 1e6:.0f} MB free and --workers {config.workers} may need "
                f"{needed / 1e6:.0f} MB: crops pass through pipes, which is slower; enlarge it (docker run --shm-size)"
            )
        elif descriptors < SHARING_DESCRIPTORS:
            _warn_once(
                f"only {descriptors} files may be open at once: crops pass through pipes, which is slower; "
                f"raise the limit (ulimit -n {SHARING_DESCRIPTORS})"
            )
        return config.workers, free < needed or descriptors < SHARING_DESCRIPTORS
    _warn_once(f"{problem}: crops are loaded in the training process; to use --workers allow {remedy}")
    return 0, False


@functools.cache
def _warn_once(message: str) -> None:
    """Log a warning that the loaders of training and validation share."""
    logger.warning(message)


def to_bytes(sample: Example | list[Example], collate: Callable[[Example | list[Example]], LoadedSample]) -> bytes:
    """Return a loaded sample as bytes, which pass through a pipe; tensors would pass through shared memory."""
    return pickle.dumps(collate(sample))


def to_packed_sample(
    sample: Example | list[Example], paths: list[str], patch: int, air: bool, metadata: Sequence[ImageMetadata] = ()
) -> LoadedSample:
    """Cut the images of a sample into patches and pack them.

    Args:
        sample: An example, or those of an exam.
        paths: Path or name of each row.
        patch: Side of a patch in pixels.
        air: Whether patches of air are kept.
        metadata: Metadata of each row's image; empty if nothing is known.

    Returns:
        The readable images, and for each unreadable row what is wrong with it.
    """
    examples: list[Example] = []
    packs: list[PackedBatch] = []
    problems: dict[int, str] = {}
    for example in [sample] if isinstance(sample, Example) else sample:
        row_metadata = metadata[example.row] if metadata else ImageMetadata()
        image_metadata = replace(row_metadata, mm_per_pixel=example.mm_per_pixel)
        try:
            if example.problem:
                raise UsageError(example.problem)
            packs.append(pack_images([example.image], patch, [paths[example.row]], air, [image_metadata]))
            examples.append(example)
        except UsageError as error:
            problems[example.row] = str(error)
    if not examples:
        return None, problems
    packed_sample = PackedSample(
        concat_packs(packs),
        torch.stack([example.label for example in examples]),
        torch.stack([example.targets for example in examples]),
        tuple(example.row for example in examples),
        tuple(example.lesions for example in examples),
    )
    return packed_sample, problems


def world_size() -> int:
    """Return the number of processes that train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def gather_names(names: tuple[str, ...]) -> tuple[str, ...]:
    """Return the image names of all processes at this step."""
    if world_size() == 1:
        return names
    names_by_rank: list[Any] = [None] * world_size()
    dist.all_gather_object(names_by_rank, names)
    return sum(names_by_rank, ())


class RankSampler(Sampler[SampleRequest]):
    """Every n-th request of `sampler` for this one of n processes.

    The batches that all processes have at the same time are then one batch of a single process.
    """

    def __init__(self, sampler: Sampler[SampleRequest]) -> None:
        self.sampler = sampler

    def __len__(self) -> int:
        return -(-len(self.sampler) // world_size())  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[SampleRequest]:
        rank = dist.get_rank() if world_size() > 1 else 0
        return islice(self.sampler, rank, None, world_size())


def synchronized_batches(groups: Iterable[list[PackedSample]]) -> Iterator[tuple[list[PackedSample], bool]]:
    """Yield groups as long as any process has one. A process without one repeats its last group, marked True as filler.

    All processes must take the same number of steps, because a process with one step more would wait for the others
    forever.

    Raises:
        VitmodelError: A process failed, or there are fewer images than processes. It is raised in all processes.
    """
    if world_size() == 1:
        yield from ((group, False) for group in groups)
        return
    process_group = dist.new_group(backend="gloo")
    remaining = iter(groups)
    last = None
    while True:
        group = None
        problem = ""
        try:
            group = next(remaining, None)
        except VitmodelError as error:
            problem = str(error)
        states: list[Any] = [None] * world_size()
        dist.all_gather_object(states, (group is not None, problem), group=process_group)
        has_group, problems = zip(*states, strict=True)
        if any(problems):
            raise VitmodelError(next(filter(None, problems)))
        if not any(has_group):
            return
        if last is None and not all(has_group):
            raise VitmodelError(f"there are fewer images than the {world_size()} processes; use fewer --devices")
        last = group or last
        assert last is not None
        yield last, group is None
