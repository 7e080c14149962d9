"""Model packages + images -> scores and heat maps: the only road from pixels to a score, for every stage. Knows no label."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from scipy.special import expit

from vitmodel.config import PredictorConfig, Preprocessing
from vitmodel.data.cropping import Cropped, Record
from vitmodel.data.dataset import to_tensor
from vitmodel.data.manifest import breast_ids, repeated
from vitmodel.data.parallel import parallel_map
from vitmodel.data.rows import Row, load_crop, mm_per_pixel, rows_of
from vitmodel.measure import calibration
from vitmodel.measure.sample import aggregate
from vitmodel.model.explain import Method, explain
from vitmodel.model.network import Network
from vitmodel.model.package import CONFIG, TENSORS, load_members
from vitmodel.model.packing import About, Pack, check_budget, join, pack
from vitmodel.model.runtime import load_onnx
from vitmodel.model.tiles import Segmenter
from vitmodel.pixels.verdict import WARNED
from vitmodel.utils import UsageError, VitmodelError, sha256_file

IDS = ["image_id", "patient_id", "laterality", "view"]
TOGETHER = 16  # images per forward pass, at most: no later image delays an earlier one for long


class Loaded(NamedTuple):
    """One image on its way to its score: the verdict on it and, unless it was refused, its crop and that crop's patches."""

    cropped: Cropped
    pack: Pack | None = None
    """The image and, where it is averaged with that, the same upside down."""
    seconds: float = 0


class Scored(NamedTuple):
    """One image and what each package says of it."""

    loaded: Loaded
    logits: np.ndarray
    """M, one per package; NaN = refused."""


@dataclass
class Timings:
    """Seconds spent so far; the threads' add up, so that with several of them more may pass than by the clock."""

    decoding: float = 0
    """In all threads that read, decode and crop."""
    waiting: float = 0
    """For a crop, in the thread that runs the network."""
    network: float = 0
    explaining: float = 0
    writing: float = 0

    @contextmanager
    def of(self, name: str) -> Iterator[None]:
        """Add what the block takes to the field `name`."""
        start = time.perf_counter()
        yield
        setattr(self, name, getattr(self, name) + time.perf_counter() - start)

    def per_image(self, images: int) -> str:
        """Where the time went, in milliseconds per image."""
        return ", ".join(f"{field.name} {1e3 * getattr(self, field.name) / max(1, images):.0f} ms" for field in fields(self))


class Member:
    """One package of those that score together; it may itself hold the models of several folds, which share a calibration.

    Raises VitmodelError naming the package where it cannot be used, UsageError where it was only pretrained.
    """

    def __init__(self, folder: Path, config: PredictorConfig, device: torch.device) -> None:
        self.folder = folder
        self.models, self.package = load_members(folder)
        if "label" not in self.package:
            raise UsageError(f"{folder}: holds pretrained weights that give no score; train on labels with `--weights` first")
        for model in self.models:
            model.to(device)
            if isinstance(model.segments, Segmenter) and config.segment_budget:
                model.segments.limit(config.segment_budget)
        try:
            self.preprocessing = Preprocessing.from_json(self.package["preprocessing"])
            fitted = dict(self.package["calibration"])
            self.calibrated: str = fitted.pop("level", "image")  # a package without the word was calibrated image by image
            self.calibration = calibration.from_dict(fitted)
            self.threshold: float = self.package["decision"]["threshold"]
            self.aggregation: str = self.package["decision"]["aggregate"]
            self.label: str = self.package["label"]
        except KeyError as error:
            raise VitmodelError(f"{folder / CONFIG}: {error} is missing; use the vitmodel that wrote it, or train anew") from error
        except UsageError as error:
            raise VitmodelError(f"{folder / CONFIG}: {error}; a newer vitmodel wrote it, install that") from error
        self.packed: bool = self.package.get("packed", False)  # a package without the word was trained with all air
        self.networks: list[Callable[[Pack], torch.Tensor]] = [model.images for model in self.models]
        self.onnx = None if config.runtime == "torch" else folder / f"model.{config.precision}.onnx"
        if self.onnx:
            self.networks = [load_onnx(self.onnx, config.runtime, sha256_file(folder / TENSORS))]

    def logits(self, images: Pack) -> np.ndarray:
        """What the package says of each of the pack's B images, the mean over its folds: B."""
        return np.mean([network(images)[:, 0].float().cpu().numpy() for network in self.networks], axis=0)

    @property
    def views(self) -> dict[str, Any]:
        """What the members must share, because each image is decoded, cropped and cut into patches once."""
        return {
            "label": self.label,
            "preprocessing": self.preprocessing,
            "packed": self.packed,
            "patch": self.models[0].config.vit.patch,
            "registers": self.models[0].config.vit.registers,
            "aggregate": self.aggregation,
        }


class Predictor:
    """A model package at work, or several whose scores are averaged: mean logit of an image and its flip, calibrated by each package, then
    the mean of their probabilities, against the mean of their thresholds.

    Raises VitmodelError naming the package that cannot be loaded, UsageError where they do not fit each other.
    """

    def __init__(self, config: PredictorConfig) -> None:
        self.config = config
        on_cuda = config.device == "cuda" or (config.device == "auto" and config.runtime == "torch" and torch.cuda.is_available())
        self.device = torch.device("cuda" if on_cuda else "cpu")
        self.members = [Member(folder, config, self.device) for folder in (config.package, *config.ensemble)]
        first = self.members[0]
        for other in self.members[1:]:
            if differing := [name for name, value in first.views.items() if other.views[name] != value]:
                raise UsageError(f"ensemble: {other.folder} differs from {first.folder} in {', '.join(differing)}; train them alike")
        self.model: Network = first.models[0]
        self.package = first.package
        self.preprocessing, self.packed = first.preprocessing, first.packed
        self.calibrated, self.aggregation = first.calibrated, first.aggregation
        self.threshold = float(np.mean([member.threshold for member in self.members]))
        self.timings = Timings()

    def fingerprint(self) -> str:
        """What decides a score beside the image: the packages' files, the flip and the runtime."""
        paths = [path for member in self.members for path in (member.folder / TENSORS, member.folder / CONFIG, member.onnx) if path]
        return " ".join([*(sha256_file(path)[:16] for path in paths), f"flip={self.config.flip}", self.config.runtime])

    def score_images(self, table: pd.DataFrame) -> pd.DataFrame:
        """`tabulate` for the rows of the manifest `table`."""
        known = [(each.loaded.cropped.record, each.logits) for each in self.stream(rows_of(table))]  # and no crop
        return self.tabulate(table, [record for record, _ in known], [logits for _, logits in known])

    def stream(self, rows: Sequence[Row]) -> Iterator[Scored]:
        """Each row's verdict and logits, in order, as soon as they are known; threads decode while the network runs.

        Memory is bounded: of some `TOGETHER` images at a time.
        """
        groups = self.group(parallel_map(self.load, rows, "score", self.config.jobs))
        while True:
            with self.timings.of("waiting"):
                group = next(groups, None)
            if group is None:
                return
            with self.timings.of("network"):
                found = iter(self.logits([each.pack for each in group if each.pack is not None]))
            for each in group:
                self.timings.decoding += each.seconds
                yield Scored(each, np.full(len(self.members), np.nan) if each.pack is None else next(found))

    def load(self, row: Row) -> Loaded:
        """A manifest row's crop, cut into patches. One that the network cannot look at is refused like any other: it never ends a run."""
        start = time.perf_counter()
        cropped = load_crop(row, self.preprocessing)
        if cropped.crop is None:
            return Loaded(cropped, None, time.perf_counter() - start)
        model, image = self.model.config.vit, to_tensor(cropped.crop)
        images = [image, image.flip(-2)] if self.config.flip else [image]
        try:
            about = About(mm_per_pixel=mm_per_pixel(cropped.record.get("spacing_row"), cropped.geometry))
            found = pack(images, model.patch, ["the crop"] * len(images), not self.packed, [about] * len(images))
            if not self.model.segments:
                check_budget("the crop", max(found.lengths(model.prefix)), self.config.tokens)
        except UsageError as error:
            refused = cropped.record | {"status": "refused", "reason": "unfit", "remark": str(error)}
            return Loaded(Cropped(refused), None, time.perf_counter() - start)
        return Loaded(cropped, found, time.perf_counter() - start)

    def group(self, images: Iterable[Loaded]) -> Iterator[list[Loaded]]:
        """Consecutive images that go through the network together: `TOGETHER` of them and `tokens` tokens, at most."""
        group: list[Loaded] = []
        length = 0
        for image in images:
            more = sum(image.pack.lengths(self.model.config.vit.prefix)) if image.pack else 0
            if group and (len(group) == TOGETHER or length + more > self.config.tokens):
                yield group
                group, length = [], 0
            group.append(image)
            length += more
        if group:
            yield group

    def logits(self, packs: Sequence[Pack]) -> np.ndarray:
        """What each package says of each image (or of it and its flip, averaged): I M for I packs and M packages."""
        if not packs:
            return np.empty((0, len(self.members)))
        together = join(packs).to(self.device)
        with torch.inference_mode():
            found = [member.logits(together) for member in self.members]
        return np.stack(found, axis=1).reshape(len(packs), -1, len(self.members)).mean(axis=1, dtype=np.float64)

    def tabulate(self, table: pd.DataFrame, records: Sequence[Record], logits: Sequence[np.ndarray]) -> pd.DataFrame:
        """One row per row of `table`: ids, score (raw, 0 to 1), probability (calibrated), decision, status, reason, remark, source_sha256.

        A refused image has NaN for score, probability and decision: it is never scored. A file that stands twice in a breast is marked.
        """
        each = np.reshape(np.asarray(logits, dtype=float), (len(table), len(self.members)))  # N M
        scored = np.isfinite(each).all(axis=1)
        scores = table[IDS].assign(score=np.nan, probability=np.nan)
        scores.loc[scored, "score"] = expit(each[scored]).mean(axis=1)
        scores.loc[scored, "probability"] = self.probability(each[scored])
        scores["decision"] = decide(scores["probability"], self.threshold)
        for column in ("status", "reason", "remark", "source_sha256"):
            scores[column] = pd.Series([record.get(column) for record in records], index=table.index, dtype=object)
        return mark_duplicates(scores)

    def probability(self, logits: np.ndarray) -> np.ndarray:
        """The mean over packages of what each one's calibration makes of its logits: N M -> N."""
        return np.mean([member.calibration.apply(each) for member, each in zip(self.members, logits.T, strict=True)], axis=0)

    def explain(self, loaded: Loaded, method: Method) -> np.ndarray:
        """How much each patch of the crop speaks for the score, the mean over all models: h w, NaN = air; units as in `model.explain`."""
        assert loaded.pack is not None
        image = next(iter(loaded.pack)).to(self.device)
        with self.timings.of("explaining"):
            models = [model for member in self.members for model in member.models]
            return np.mean([explain(model, image, method).float().cpu().numpy() for model in models], axis=0)

    def score_breasts(self, images: pd.DataFrame) -> pd.DataFrame:
        """One row per breast from the rows of `score_images`, in order of first appearance; refused images are counted, not averaged in.

        So are copies of an image. A breast that was seen from one side only is marked.
        """
        images = images.assign(prediction_id=breast_ids(images))
        groups = images.groupby("prediction_id", sort=False)
        breasts = groups[["patient_id", "laterality"]].first()
        used = images[images["probability"].notna() & ~is_duplicate(images)]
        for column in ("score", "probability"):
            ids, values = aggregate(used[column], used["prediction_id"], self.aggregation) if len(used) else ([], [])
            breasts[column] = pd.Series(values, index=ids, dtype=float)
        breasts["decision"] = decide(breasts["probability"], self.threshold)
        breasts["n_images"] = groups.size()
        views = used.groupby("prediction_id")["view"]
        breasts["views"] = views.agg(lambda names: ";".join(sorted(set(names) - {""})))
        alone = (views.size() == 1) | ((views.nunique() == 1) & (views.first() != ""))  # of images without a view, two may be two views
        one_view = alone.reindex(breasts.index, fill_value=False)
        codes = groups["reason"].agg(lambda reasons: ";".join(reasons.dropna()))
        codes = (codes + ";" + one_view.map({True: "one_view", False: ""})).str.strip(";")
        usable = groups["probability"].count()
        doubtful = (usable < breasts["n_images"]) | (codes != "")
        breasts["status"] = np.select([usable == 0, doubtful], ["refused", "warned"], "ok")
        breasts["reason"] = codes.map(lambda text: ";".join(dict.fromkeys(text.split(";"))) or None)
        return breasts.reset_index()

    def score_patients(self, breasts: pd.DataFrame) -> pd.DataFrame:
        """One row per patient from the rows of `score_breasts`: the worse breast; one without a score is counted, not taken for healthy."""
        groups = breasts.groupby("patient_id", sort=False)
        patients = groups[["score", "probability"]].max()
        patients["decision"] = decide(patients["probability"], self.threshold)
        patients["n_breasts"] = groups.size()
        usable = groups["probability"].count()
        doubtful = (usable < patients["n_breasts"]) | (groups["reason"].count() > 0)
        patients["status"] = np.select([usable == 0, doubtful], ["refused", "warned"], "ok")
        return patients.reset_index()


def decide(probability: pd.Series, threshold: float) -> pd.Series:
    """1 at or above the threshold, 0 below, NaN where there is no probability."""
    return (probability >= threshold).astype(float).where(probability.notna())


def is_duplicate(images: pd.DataFrame) -> pd.Series:
    """Which rows of `tabulate` are copies of an earlier image of the same breast."""
    return images["reason"].fillna("").str.split(";").map(lambda codes: "duplicate" in codes)


def mark_duplicates(images: pd.DataFrame) -> pd.DataFrame:
    """Doubt every image whose file repeats an earlier one of the same breast."""
    copies = images.index[repeated(images)]
    for column, text, between in (("reason", "duplicate", ";"), ("remark", WARNED["duplicate"], "; ")):
        images.loc[copies, column] = [f"{old}{between}{text}" if isinstance(old, str) else text for old in images.loc[copies, column]]
    images.loc[copies, "status"] = "warned"
    return images
