"""Model packages + images -> scores and heat maps: the only road from pixels to a score, for every stage. Knows no label."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from scipy.special import expit

from vitmodel.config import PredictorConfig
from vitmodel.data.cropping import Cropped, Record
from vitmodel.data.dataset import to_tensor
from vitmodel.data.manifest import breast_ids, repeated
from vitmodel.data.parallel import parallel_map
from vitmodel.data.rows import Row, load_crop, mm_per_pixel, rows_of
from vitmodel.exams import about_images, mixed_exams, unseen_sources
from vitmodel.measure.sample import aggregate, mean_logits
from vitmodel.member import Member
from vitmodel.model.arithmetic import device_of
from vitmodel.model.explain import explain
from vitmodel.model.network import Network
from vitmodel.model.package import CONFIG, TENSORS
from vitmodel.model.packs import About, Pack, chain, check_budget, grouped, pack
from vitmodel.pixels.verdict import WARNED
from vitmodel.scores import by_group, decide, doubt, is_duplicate
from vitmodel.utils import UsageError, give_back_freed_memory, sha256_file

IDS = ["image_id", "patient_id", "laterality", "view"]
COLUMNS = ["score", "probability", "breast_score", "breast_probability"]
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
    """L M: of the image and, with the fusion of exams, of its breast, by each package; NaN = refused, and for the breast of a copy."""


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


class Predictor:
    """A model package at work, or several whose scores are averaged: mean logit of an image and its flip, calibrated by each package, then
    the mean of their probabilities, against the mean of their thresholds.

    Raises VitmodelError naming the package that cannot be loaded, UsageError where they do not fit each other.
    """

    def __init__(self, config: PredictorConfig) -> None:
        self.config = config
        self.device = torch.device(device_of(config.device if config.runtime == "torch" else "cpu"))
        self.members = [Member(folder, config, self.device) for folder in (config.package, *config.ensemble)]
        first = self.members[0]
        for other in self.members[1:]:
            if differing := [name for name, value in first.views.items() if other.views[name] != value]:
                raise UsageError(f"ensemble: {other.folder} differs from {first.folder} in {', '.join(differing)}; train them alike")
        self.model: Network = first.models[0]
        self.package = first.package
        self.preprocessing, self.packed, self.flip = first.preprocessing, first.packed, first.flip
        self.calibrated, self.aggregation = first.calibrated, first.aggregation
        self.fused = self.model.exam is not None
        """Whether the network itself scores breasts, from all images of an exam."""
        self.pools = self.aggregation in ("mean_logit", "fusion")
        """Whether calibration comes after the logits of a breast's images are one; older packages aggregate the images' probabilities."""
        self.patient_aggregation = "noisy_or" if self.fused else "max"
        self.threshold = float(np.mean([member.threshold for member in self.members]))
        self.prevalence = float(np.mean([member.calibration.prevalence for member in self.members]))
        self.timings = Timings()

    def fingerprint(self) -> str:
        """What decides a score beside the image: the packages' files, the flip and the runtime."""
        paths = [path for member in self.members for path in (member.folder / TENSORS, member.folder / CONFIG, *member.onnx)]
        return " ".join([*(sha256_file(path)[:16] for path in paths), f"flip={self.flip}", self.config.runtime])

    def score_images(self, table: pd.DataFrame) -> pd.DataFrame:
        """`tabulate` for the rows of the manifest `table`."""
        return self.tabulate(table, *self.look_at(table))

    def look_at(self, table: pd.DataFrame) -> tuple[list[Record], np.ndarray]:
        """The verdict on each of the N rows and what each package says of it: N L M, as in `Scored`."""
        known = {place: (each.loaded.cropped.record, each.logits) for place, each in self.stream(table)}  # and no crop
        records, logits = [known[place][0] for place in range(len(table))], [known[place][1] for place in range(len(table))]
        return records, np.reshape(logits, (len(table), 1 + self.fused, len(self.members)))

    def stream(self, table: pd.DataFrame) -> Iterator[tuple[int, Scored]]:
        """Each row's place, verdict and logits, as soon as they are known; threads decode while the network runs. In order, but that the
        images of an exam that are fused come together.

        Memory is bounded: of some `TOGETHER` images, or the largest exam, at a time.
        """
        groups, seen = self.group(self.units(table)), 0
        while True:
            with self.timings.of("waiting"):
                group = next(groups, None)
            if group is None:
                return
            with self.timings.of("network"):
                found = iter(self.logits([each.pack for _, each in group if each.pack is not None]))
            for place, each in group:
                self.timings.decoding += each.seconds
                logits = np.full((1 + self.fused, len(self.members)), np.nan) if each.pack is None else next(found)
                yield place, Scored(each, logits)
            seen += len(group)
            if seen >= TOGETHER:
                give_back_freed_memory()
                seen = 0

    def units(self, table: pd.DataFrame) -> Iterator[list[tuple[int, Loaded]]]:
        """What goes through the network at once, with the rows' places: an image or, fused, all of an exam but copies, which stay alone."""
        rows, known = rows_of(table), about_images(table, self.model.config)
        units = grouped(about.exam for about in known)
        inputs = [(rows[place], known[place]) for unit in units for place in unit]
        loaded = parallel_map(lambda each: self.load(*each), inputs, "score", self.config.jobs)
        for unit in units:
            seen: set[tuple[int, object]] = set()
            images = [(place, next(loaded)) for place in unit]
            for number, (place, each) in enumerate(images):
                file = known[place].breast, each.cropped.record.get("source_sha256")
                if each.pack is not None and file in seen:
                    alone = tuple(replace(about, breast=-1, exam=-1) for about in each.pack.about)
                    images[number] = place, each._replace(pack=replace(each.pack, about=alone))
                elif each.pack is not None and self.fused and file[1]:
                    seen.add(file)
            yield images
        next(loaded, None)  # for the map to end, and its progress with it

    def load(self, row: Row, about: About = About()) -> Loaded:  # noqa: B008 (frozen)
        """A manifest row's crop, cut into patches. One that the network cannot look at is refused like any other: it never ends a run."""
        start = time.perf_counter()
        cropped = load_crop(row, self.preprocessing)
        if cropped.crop is None:
            return Loaded(cropped, None, time.perf_counter() - start)
        model, image = self.model.config.vit, to_tensor(cropped.crop)
        images = [image, image.flip(-2)] if self.flip else [image]
        try:
            known = replace(about, mm_per_pixel=mm_per_pixel(cropped.record.get("spacing_row"), cropped.geometry))
            each = [known.apart(number, len(images)) for number in range(len(images))]  # an exam upside down is another exam
            found = pack(images, model.patch, ["the crop"] * len(images), not self.packed, each)
            if not self.model.segments:
                check_budget("the crop", max(found.lengths(model.prefix)), self.config.tokens)
        except UsageError as error:
            refused = cropped.record | {"status": "refused", "reason": "unfit", "remark": str(error)}
            return Loaded(Cropped(refused), None, time.perf_counter() - start)
        return Loaded(cropped, found, time.perf_counter() - start)

    def group(self, units: Iterable[list[tuple[int, Loaded]]]) -> Iterator[list[tuple[int, Loaded]]]:
        """Consecutive images that go through the network together: `TOGETHER` of them and `tokens` tokens, at most, or one unit."""
        group: list[tuple[int, Loaded]] = []
        length = 0
        for unit in units:
            more = sum(sum(image.pack.lengths(self.model.config.vit.prefix)) for _, image in unit if image.pack)
            if group and (len(group) + len(unit) > TOGETHER or length + more > self.config.tokens):
                yield group
                group, length = [], 0
            group += unit
            length += more
        if group:
            yield group

    def logits(self, packs: Sequence[Pack]) -> np.ndarray:
        """What each package says of each image (or of it and its flip, averaged): I L M for I packs and M packages."""
        if not packs:
            return np.empty((0, 1 + self.fused, len(self.members)))
        together = chain(packs).to(self.device)
        with torch.inference_mode():
            found = np.stack([member.logits(together) for member in self.members], axis=-1)  # B L M
        logits = found.reshape(len(packs), -1, *found.shape[1:]).mean(axis=1, dtype=np.float64)
        if self.fused:
            logits[[each.about[0].breast < 0 for each in packs], 1] = np.nan
        return logits

    def tabulate(self, table: pd.DataFrame, records: Sequence[Record], logits: Sequence[np.ndarray] | np.ndarray) -> pd.DataFrame:
        """One row per row of `table`: ids, score (raw, 0 to 1), probability (calibrated), decision, status, reason, remark, source_sha256;
        before these, breast_score and breast_probability of the breast that all usable images of it make or, with fusion, of the exam's.

        A refused image has NaN for score, probability and decision: it is never scored. A file that stands twice in a breast is marked, and
        so is an image of a source that was not learned apart, those without laterality that one breast is made of, and mixed exams.
        """
        each = np.reshape(np.asarray(logits, dtype=float), (len(table), 1 + self.fused, len(self.members)))  # N L M
        scored = np.isfinite(each[:, 0]).all(axis=1)
        scores = table[IDS].copy()
        for column in COLUMNS:
            scores[column] = np.nan
        scores.loc[scored, COLUMNS[:2]] = self.calibrate(each[scored, 0])
        scores["decision"] = decide(scores["probability"], self.threshold)
        for column in ("status", "reason", "remark", "source_sha256"):
            scores[column] = pd.Series([record.get(column) for record in records], index=table.index, dtype=object)
        unseen = pd.Series(unseen_sources(table, self.model.config), index=table.index)
        doubt(scores, "unseen_source", unseen[(unseen != "") & (scores["status"] != "refused")])
        walls = pd.Series([record.get("chest_wall_side") for record in records], index=table.index, dtype=object)
        mixed = mixed_exams(table.assign(chest_wall_side=walls.fillna(table["chest_wall_side"])))
        doubt(scores, "mixed_exam", mixed[scores["status"] != "refused"])
        copies = repeated(scores)
        doubt(scores, "duplicate", pd.Series(WARNED["duplicate"], index=table.index)[copies])
        used = scored & ~copies.to_numpy()
        if used.any():
            scores.loc[used, COLUMNS[2:]] = self.of_breasts(
                scores.loc[used, COLUMNS[:2]].to_numpy(), each[used, -1], breast_ids(scores[used])
            )
        sideless = scores.loc[(scores["laterality"] == "") & (scores["status"] != "refused") & ~copies, "patient_id"]
        doubt(scores, "no_laterality", pd.Series(WARNED["no_laterality"], index=sideless.index[sideless.duplicated(keep=False)]))
        return scores

    def calibrate(self, logits: np.ndarray) -> np.ndarray:
        """Score and probability (N 2) of what each package says (N M): the means over packages of each one's own."""
        return np.stack([expit(logits).mean(axis=1), self.probability(logits)], axis=1)

    def of_breasts(self, images: np.ndarray, logits: np.ndarray, breasts: pd.Series) -> np.ndarray:
        """Score and probability of each image's breast (N 2), from those of the images (N 2) and what each package says of them, or with
        fusion of their breasts (N M): the breast's logit is the mean, and is then calibrated."""
        if self.pools:
            values = self.calibrate(mean_logits(logits, breasts))
        else:
            values = np.stack([aggregate(column, breasts, self.aggregation)[1] for column in images.T], axis=1)
        return values[np.unique(breasts, return_inverse=True)[1]]

    def probability(self, logits: np.ndarray) -> np.ndarray:
        """The mean over packages of what each one's calibration makes of its logits: N M -> N."""
        return np.mean([member.calibration.apply(each) for member, each in zip(self.members, logits.T, strict=True)], axis=0)

    def explain(self, loaded: Loaded, method: str) -> np.ndarray:
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
            breasts[column] = used.groupby("prediction_id")[f"breast_{column}"].first()
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
        """One row per patient from the rows of `score_breasts`: the worse breast or, with the fusion of exams, noisy-or, which is how the
        network itself says it of the patient. A breast without a score is counted, not taken for healthy."""
        groups = breasts.groupby("patient_id", sort=False)
        patients = groups.size().to_frame("n_breasts")
        scored = breasts[breasts["probability"].notna()]
        for place, column in enumerate(("score", "probability")):
            patients.insert(place, column, by_group(scored[column], scored["patient_id"], self.patient_aggregation))
        patients.insert(2, "decision", decide(patients["probability"], self.threshold))
        usable = groups["probability"].count()
        doubtful = (usable < patients["n_breasts"]) | (groups["reason"].count() > 0)
        patients["status"] = np.select([usable == 0, doubtful], ["refused", "warned"], "ok")
        return patients.reset_index()
