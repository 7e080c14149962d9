"""Model package + images -> scores: the only road from pixels to a score. Knows no label; evaluate, predict and serve all call it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import pandas as pd
import torch
from scipy.special import expit

from vitmodel.config import PredictorConfig, Preprocessing
from vitmodel.data.cropping import Cropped, Record, Source, crop_source
from vitmodel.data.dataset import read_crop, to_tensor
from vitmodel.data.manifest import breast_ids
from vitmodel.data.parallel import parallel_map
from vitmodel.measure import calibration
from vitmodel.measure.sample import aggregate
from vitmodel.model.package import load_members
from vitmodel.model.packing import Pack, check_budget, fill, forward, join, pack
from vitmodel.utils import UsageError, atomic_path

IDS = ["image_id", "patient_id", "laterality", "view"]


class Row(NamedTuple):
    """What the manifest says of an image, as far as scoring needs it."""

    path: str
    source_path: str | None
    laterality: str
    status: str | None
    reason: str | None
    remark: str | None
    preprocessing: str | None


class Loaded(NamedTuple):
    """One image on its way to its score: the verdict on it and, unless it was refused, its crop and that crop's patches."""

    cropped: Cropped
    pack: Pack | None = None


class Single(NamedTuple):
    """One image on its way into a pack with others, and its place among all."""

    position: int
    pack: Pack


class Predictor:
    """A model package at work.

    Raises VitmodelError naming the package where it cannot be loaded.
    """

    def __init__(self, config: PredictorConfig) -> None:
        self.config = config
        self.models, self.package = load_members(config.package)
        self.model = self.models[0]  # of an ensemble, the one whose shape stands for all
        if "calibration" not in self.package:
            raise UsageError(f"{config.package}: holds pretrained weights that give no score; train on labels with `--weights` first")
        self.preprocessing = Preprocessing.from_json(self.package["preprocessing"])
        self.calibration = calibration.from_dict(self.package["calibration"])
        self.threshold: float = self.package["decision"]["threshold"]
        self.packed: bool = self.package.get("packed", False)  # a package without the word was trained with all air
        self.aggregation: str = self.package["decision"]["aggregate"]
        self.device = torch.device("cuda" if config.device == "cuda" or (config.device == "auto" and torch.cuda.is_available()) else "cpu")
        for model in self.models:
            model.to(self.device)

    def score_images(self, table: pd.DataFrame) -> pd.DataFrame:
        """One row per row of the manifest `table`: ids, score (raw, 0 to 1), probability (calibrated), decision, status, reason, remark.

        A refused image has NaN for score, probability and decision: it is never scored. Memory is bounded: crops live for a pack.
        """
        rows = [Row(*values) for values in table[list(Row._fields)].astype(object).where(table.notna(), None).itertuples(index=False)]
        records: list[Record] = []

        def packs() -> Iterator[Pack | None]:
            for loaded in parallel_map(self.load, rows, "score", self.config.jobs):
                records.append(loaded.cropped.record)
                yield loaded.pack

        logits = self.logits(packs(), len(rows))
        scores = table[IDS].assign(score=expit(logits), probability=np.nan, decision=np.nan)
        scored = np.isfinite(logits)
        scores.loc[scored, "probability"] = self.calibration.apply(logits[scored])
        scores["decision"] = decide(scores["probability"], self.threshold)
        for column in ("status", "reason", "remark"):
            scores[column] = [record[column] for record in records]
        return scores

    def load(self, row: Row) -> Loaded:
        """A manifest row's crop, cut into patches. One that the network cannot look at is refused like any other: it never ends a run."""
        cropped = load_crop(row, self.preprocessing)
        if cropped.crop is None:
            return Loaded(cropped)
        model = self.model.config
        try:
            single = pack([to_tensor(cropped.crop)], model.patch, ["the crop"], air=not self.packed)
            check_budget("the crop", single.lengths(model.prefix)[0], self.config.tokens)
        except UsageError as error:
            return Loaded(Cropped({"status": "refused", "reason": "unfit", "remark": str(error)}))
        return Loaded(cropped, single)

    def logits(self, packs: Iterable[Pack | None], count: int) -> np.ndarray:
        """The network's output (of an ensemble, the mean) for `count` packs of one image each, in their order; NaN for None."""
        found = np.full(count, np.nan)
        singles = (Single(position, single) for position, single in enumerate(packs) if single is not None)
        for group in fill(singles, self.config.tokens, self.model.config.prefix):
            with torch.inference_mode():
                packed = join([single.pack for single in group]).to(self.device)
                logits = torch.stack([forward(model, packed).squeeze(-1).float() for model in self.models]).mean(dim=0)
            found[[single.position for single in group]] = logits.cpu().numpy()
        return found

    def score_breasts(self, images: pd.DataFrame) -> pd.DataFrame:
        """One row per breast from the rows of `score_images`, in order of first appearance; refused images are counted, not averaged in."""
        images = images.assign(prediction_id=breast_ids(images))
        groups = images.groupby("prediction_id", sort=False)
        breasts = groups[["patient_id", "laterality"]].first()
        scored = images[images["probability"].notna()]
        for column in ("score", "probability"):
            ids, values = aggregate(scored[column], scored["prediction_id"], self.aggregation) if len(scored) else ([], [])
            breasts[column] = pd.Series(values, index=ids, dtype=float)
        breasts["decision"] = decide(breasts["probability"], self.threshold)
        breasts["n_images"] = groups.size()
        usable = groups["probability"].count()
        doubtful = (usable < breasts["n_images"]) | (groups["reason"].count() > 0)
        breasts["status"] = np.select([usable == 0, doubtful], ["refused", "warned"], "ok")
        breasts["reason"] = groups["reason"].agg(lambda codes: ";".join(dict.fromkeys(";".join(codes.dropna()).split(";"))) or None)
        return breasts.reset_index()


def decide(probability: pd.Series, threshold: float) -> pd.Series:
    """1 at or above the threshold, 0 below, NaN where there is no probability."""
    return (probability >= threshold).astype(float).where(probability.notna())


def load_crop(row: Row, preprocessing: Preprocessing) -> Cropped:
    """The crop of a manifest row: the one that ETL made in just this way, or a new one from the source."""
    cv2.setNumThreads(1)
    if row.preprocessing == preprocessing.to_json() and row.status == "refused":
        return Cropped({"status": "refused", "reason": row.reason, "remark": row.remark})
    if row.preprocessing == preprocessing.to_json():
        return Cropped({"status": row.status, "reason": row.reason, "remark": row.remark}, read_crop(row.path))
    return crop_source(Source(Path(row.source_path or row.path), row.laterality), preprocessing)


def write_scores(images: pd.DataFrame, breasts: pd.DataFrame, out: Path) -> None:
    """The three tables. submission.csv is Kaggle's: breasts in the order of the source; a refused breast has an empty cell there."""
    submission = breasts[["prediction_id", "probability"]].rename(columns={"probability": "cancer"})
    for name, table in (("scores.csv", images), ("breast_scores.csv", breasts), ("submission.csv", submission)):
        with atomic_path(out / name) as temporary:
            table.to_csv(temporary, index=False)
