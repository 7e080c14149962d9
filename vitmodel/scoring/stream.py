"""A stream from manifest rows to logits: threads load and pack crops while the network scores groups of them."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from typing import NamedTuple

import numpy as np
import pandas as pd
from torch import Tensor

from vitmodel.config import PredictorConfig
from vitmodel.data.appearance import measure_appearance
from vitmodel.data.cropping import CropResult, ProvenanceRecord
from vitmodel.data.dataset import to_tensor
from vitmodel.data.exams import image_metadata
from vitmodel.data.rows import ManifestRow, load_crop, mm_per_pixel, to_manifest_rows
from vitmodel.errors import UsageError, VitmodelError
from vitmodel.jobs.parallel import parallel_map
from vitmodel.model.architecture import NetworkConfig
from vitmodel.model.packed_batch import ImageMetadata, PackedBatch, check_token_budget, group_indices, pack_images
from vitmodel.scoring.ensemble import Ensemble
from vitmodel.utils import describe_failure, release_freed_memory

GROUP_IMAGES = 16
"""Largest number of images per forward pass, so that no image waits long for later ones."""


@dataclass(frozen=True)
class ScoringRows:
    """Manifest rows with their metadata, attached once per run."""

    table: pd.DataFrame
    rows: list[ManifestRow]
    """The values of each row that loading needs."""
    metadata: list[ImageMetadata]
    """The metadata of each image that the network needs."""

    @classmethod
    def attach(cls, table: pd.DataFrame, config: NetworkConfig) -> ScoringRows:
        """Return the rows of the manifest `table` with the metadata that a network of this configuration uses."""
        return cls(table, to_manifest_rows(table), image_metadata(table, config))

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, positions: Sequence[int]) -> ScoringRows:
        """Return the rows at these positions, in this order; exams and breasts keep their numbers."""
        rows = [self.rows[position] for position in positions]
        metadata = [self.metadata[position] for position in positions]
        return ScoringRows(self.table.iloc[list(positions)], rows, metadata)

    def exams(self) -> list[list[int]]:
        """Return the positions of the images that are fused together; without exam fusion, each image alone."""
        return group_indices(metadata.exam for metadata in self.metadata)


class LoadedImage(NamedTuple):
    """A loaded image that is not scored yet."""

    cropped: CropResult
    """The verdict and, unless the image was refused, its crop."""
    pack: PackedBatch | None = None
    """The crop's patches and, with flip averaging, those of its flip; None = refused."""
    seconds: float = 0
    """Time spent on loading."""


class ScoredImage(NamedTuple):
    """An image with its logits."""

    loaded: LoadedImage
    logits: np.ndarray
    """`(L + A, M)`: L levels (image and, with exam fusion, breast) and A auxiliary outputs by M packages.

    NaN if the image was refused; the breast's logits of a copy are NaN, too.
    """


Unit = list[tuple[int, LoadedImage]]
"""Images, with their positions, that must be in one forward pass."""


@dataclass
class Timings:
    """Time spent so far in seconds. The times of parallel threads add up and may exceed the elapsed time."""

    decoding: float = 0
    """Reading, decoding and cropping, in all threads."""
    waiting: float = 0
    """Waiting for a crop, in the network's thread."""
    network: float = 0
    """Forward passes."""
    explaining: float = 0
    writing: float = 0

    @contextmanager
    def record(self, name: str) -> Iterator[None]:
        """Add the duration of the block to the field `name`."""
        start = time.perf_counter()
        yield
        setattr(self, name, getattr(self, name) + time.perf_counter() - start)

    def per_image(self, images: int) -> str:
        """Return all timings as text, in milliseconds per image."""
        return ", ".join(
            f"{field.name} {1e3 * getattr(self, field.name) / max(1, images):.0f} ms" for field in fields(self)
        )


def _refuse(cropped: CropResult, code: str, message: str) -> CropResult:
    """Return the crop's record with the status refused, without the crop."""
    return CropResult(cropped.record | {"status": "refused", "reason": code, "remark": message})


def _warn(cropped: CropResult, code: str, message: str) -> CropResult:
    """Return the crop with a further warning in its record."""
    reasons = [cropped.record.get("reason"), code]
    remarks = [cropped.record.get("remark"), message]
    warned: ProvenanceRecord = {
        "status": "warned",
        "reason": ";".join(str(text) for text in reasons if text),
        "remark": "; ".join(str(text) for text in remarks if text),
    }
    return replace(cropped, record=cropped.record | warned)


def _fail(image: LoadedImage, error: Exception) -> LoadedImage:
    """Return an image that the network failed on; one that was refused before keeps its reason."""
    if image.pack is None:
        return image
    return LoadedImage(_refuse(image.cropped, "failed", describe_failure(error)), None, image.seconds)


class ScoringStream:
    """Score images one group after another while threads load the next ones.

    Memory is bounded: about `GROUP_IMAGES` images, or the largest exam, are held at a time.

    Args:
        ensemble: The packages that score.
        config: Token budget and number of threads.
        timings: The time spent is added to it.
    """

    def __init__(self, ensemble: Ensemble, config: PredictorConfig, timings: Timings) -> None:
        self.ensemble = ensemble
        self.tokens = config.tokens
        self.workers = config.workers
        self.atypical = config.atypical
        self.keep_atypical = config.keep_atypical
        self.timings = timings

    def scores(self, rows: ScoringRows) -> Iterator[tuple[int, ScoredImage]]:
        """Yield the position, verdict and logits of each row as soon as they are known.

        The order is that of the rows, except that the images of a fused exam are consecutive.
        """
        groups = self.groups(self.units(rows))
        since_cleanup = 0
        while True:
            with self.timings.record("waiting"):
                group = next(groups, None)
            if group is None:
                return
            with self.timings.record("network"):
                scored = self.score_group(group)
            for position, image in scored:
                self.timings.decoding += image.loaded.seconds
                yield position, image
            since_cleanup += len(group)
            if since_cleanup >= GROUP_IMAGES:
                release_freed_memory()
                since_cleanup = 0

    def score_group(self, group: Unit) -> list[tuple[int, ScoredImage]]:
        """Return the images of a group with their logits.

        If the network fails, each unit of the group is scored alone, and the images of those that fail are refused.
        """
        try:
            group, judged = self._judge(group)
        except VitmodelError:
            raise
        except Exception as error:  # noqa: BLE001 (a failure on one unit must not cost the others their scores)
            units = group_indices(-1 if image.pack is None else image.pack.metadata[0].exam for _, image in group)
            if len(units) > 1:
                return [scored for unit in units for scored in self.score_group([group[index] for index in unit])]
            return [(position, ScoredImage(_fail(image, error), self._refused())) for position, image in group]
        logits = iter(judged)
        return [(position, self._checked(image, logits)) for position, image in group]

    def _checked(self, image: LoadedImage, computed: Iterator[np.ndarray]) -> ScoredImage:
        """Return an image with the next of the computed logits, unless it was refused or they are not finite."""
        if image.pack is None:
            return ScoredImage(image, self._refused())
        logits = next(computed)
        if self.ensemble.is_finite(logits, has_breast=image.pack.metadata[0].breast >= 0):
            return ScoredImage(image, logits)
        message = "the network's output is NaN or infinite; run `vitmodel verify` on the package and report the image"
        refused = LoadedImage(_refuse(image.cropped, "not_finite", message), None, image.seconds)
        return ScoredImage(refused, self._refused())

    def _judge(self, group: Unit) -> tuple[Unit, np.ndarray]:
        """Return the images of a group with their typicality, and the outputs of those that are not refused for it."""
        logits, typicality = self.ensemble.judge([image.pack for _, image in group if image.pack is not None])
        values = iter(typicality)
        judged = [
            (position, image if image.pack is None else self._check_typical(image, float(next(values))))
            for position, image in group
        ]
        kept = [
            after.pack is not None
            for (_, before), (_, after) in zip(group, judged, strict=True)
            if before.pack is not None
        ]
        if self.ensemble.fused and not all(kept):  # a refused image must not contribute to its breast's score
            return judged, self.ensemble.logits([image.pack for _, image in judged if image.pack is not None])
        return judged, logits[kept]

    def _check_typical(self, image: LoadedImage, typicality: float) -> LoadedImage:
        """Return the image with its typicality; refused, or warned of, if it is atypical."""
        if np.isnan(typicality):
            return image
        cropped = replace(image.cropped, record=image.cropped.record | {"typicality": typicality})
        if typicality >= self.atypical:
            return image._replace(cropped=cropped)
        finding = f"typicality {typicality:.2g} is below --atypical {self.atypical:g}"
        if self.keep_atypical:
            return image._replace(cropped=_warn(cropped, "kept_atypical", finding))
        message = f"{finding}: the image is unlike those of the training"
        return image._replace(cropped=_refuse(cropped, "atypical", message), pack=None)

    def _refused(self) -> np.ndarray:
        """Return the logits `(L + A, M)` of a refused image."""
        return np.full((self.ensemble.outputs, len(self.ensemble.packages)), np.nan)

    def units(self, rows: ScoringRows) -> Iterator[Unit]:
        """Yield the units of scoring: each an image or, with exam fusion, the images of an exam.

        Copies of an image are scored alone, outside their exam.
        """
        units = rows.exams()
        inputs = [(rows.rows[position], rows.metadata[position]) for unit in units for position in unit]
        loaded = parallel_map(lambda image: self.load(*image), inputs, "score", self.workers)
        for unit in units:
            images = [(position, next(loaded)) for position in unit]
            yield self.complete_unit(images, rows.metadata)
        next(loaded, None)  # ends the map and its progress bar

    def complete_unit(self, images: Unit, metadata: Sequence[ImageMetadata]) -> Unit:
        """Return the loaded images of a unit; with exam fusion, a later copy of a file in a breast becomes an exam."""
        if not self.ensemble.fused:
            return images
        seen: set[tuple[int, object]] = set()
        result: Unit = []
        for position, image in images:
            digest = image.cropped.record.get("source_sha256")
            file = metadata[position].breast, digest
            if image.pack is not None and file in seen:
                alone = tuple(replace(view, breast=-1, exam=-1) for view in image.pack.metadata)
                image = image._replace(pack=replace(image.pack, metadata=alone))
            elif image.pack is not None and digest:
                seen.add(file)
            result.append((position, image))
        return result

    def load(self, row: ManifestRow, metadata: ImageMetadata = ImageMetadata()) -> LoadedImage:  # noqa: B008 (frozen)
        """Return the crop of a manifest row and its patches; an image that the network cannot read is refused."""
        start = time.perf_counter()
        cropped = CropResult({"source_path": row.source_path, "source_sha256": row.source_sha256})
        patches = None
        try:
            cropped = load_crop(row, self.ensemble.preprocessing)
            if cropped.crop is not None:
                image = to_tensor(cropped.crop)
                patches = self._pack(cropped, image, metadata)
                appearance = measure_appearance(image[0].numpy(), cropped.record)
                cropped = replace(cropped, record=cropped.record | appearance.to_record())
        except UsageError as error:
            cropped = _refuse(cropped, "unfit", str(error))
        except VitmodelError:
            raise
        except Exception as error:  # noqa: BLE001 (an unexpected error in one image must not end the run)
            cropped = _refuse(cropped, "failed", describe_failure(error))
        return LoadedImage(cropped, patches, time.perf_counter() - start)

    def _pack(self, cropped: CropResult, image: Tensor, metadata: ImageMetadata) -> PackedBatch:
        """Return the patches of a crop, given with its pixels `(1, H, W)`, and with flip averaging those of its flip.

        Raises UsageError if they do not fit the model or the token budget.
        """
        ensemble = self.ensemble
        vit = ensemble.model.config.vit
        images = [image, image.flip(-2)] if ensemble.flip else [image]
        scaled = replace(metadata, mm_per_pixel=mm_per_pixel(cropped.record.get("spacing_row"), cropped.geometry))
        # A flipped exam is another exam: its images are not fused with the unflipped ones.
        views = [scaled.with_unique_ids(number, len(images)) for number in range(len(images))]
        patches = pack_images(images, vit.patch, ["the crop"] * len(images), not ensemble.packed, views)
        if not ensemble.model.segments:
            check_token_budget("the crop", max(patches.sequence_lengths(vit.num_prefix_tokens)), self.tokens)
        return patches

    def groups(self, units: Iterable[Unit]) -> Iterator[Unit]:
        """Yield consecutive units, joined up to `GROUP_IMAGES` images and the token budget; a larger unit is alone."""
        group: Unit = []
        length = 0
        for unit in units:
            added = self.unit_tokens(unit)
            if group and (len(group) + len(unit) > GROUP_IMAGES or length + added > self.tokens):
                yield group
                group = []
                length = 0
            group += unit
            length += added
        if group:
            yield group

    def unit_tokens(self, unit: Unit) -> int:
        """Return the number of tokens of a unit's images."""
        prefix = self.ensemble.model.config.vit.num_prefix_tokens
        return sum(sum(image.pack.sequence_lengths(prefix)) for _, image in unit if image.pack)
