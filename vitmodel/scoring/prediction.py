"""The result of scoring: tables per image, breast and patient."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from vitmodel.results.score_files import write_score_files
from vitmodel.utils import NOT_A_MEDICAL_DEVICE


@dataclass(frozen=True, eq=False)
class Prediction:
    """Scores per image, breast and patient. Research software, not a medical device.

    The tables have the columns of scores.csv, breast_scores.csv and patient_scores.csv, which `vitmodel predict`
    writes. `vitmodel.Model.predict` returns it. The tables of images and breasts end with the columns of the package's
    auxiliary outputs, such as `density_A` and `density`.

    Attributes:
        images: One row per input image, also for refused ones: image_id, patient_id, laterality, view, score (raw, 0 to
            1), probability (calibrated, 0 to 1; NaN = refused), breast_score, breast_probability, decision (1 = at or
            above the threshold), status, reason, remark, source_sha256, typicality (share of validation images that
            are less like the training images; NaN = unknown), grey_mean, grey_contrast, breast_height_mm, breast_share,
            machine_id.
        breasts: One row per breast: prediction_id, patient_id, laterality, score, probability, decision, n_images,
            views, status, reason and, if the package stores how uncertain its calibration is, probability_low and
            probability_high (95 % over the patients that the calibration was fitted to).
        patients: One row per patient: patient_id, score, probability, decision, n_breasts, status.
        threshold: Smallest probability for which a decision is 1.

    Examples:
        >>> model = vitmodel.load("run/package", progress=False)
        >>> result = model.predict("exam/")
        >>> result.breasts[["prediction_id", "probability"]].columns.tolist()
        ['prediction_id', 'probability']
        >>> len(result.refused)
        0
    """

    images: pd.DataFrame
    breasts: pd.DataFrame
    patients: pd.DataFrame
    threshold: float

    @property
    def refused(self) -> pd.DataFrame:
        """The images that were not scored: image_id, patient_id, reason (a code) and remark (what happened)."""
        columns = ["image_id", "patient_id", "reason", "remark"]
        return self.images.loc[self.images["status"] == "refused", columns].reset_index(drop=True)

    def save(self, folder: str | Path, *, parquet: bool = False, jsonl: bool = False) -> Path:
        """Write the tables as `vitmodel predict` does, for example scores.csv and breast_scores.csv.

        Args:
            folder: Folder to write to; it is created if needed.
            parquet: Also write each table as Parquet (needs the extra `parquet`).
            jsonl: Also write each table as JSON lines.

        Returns:
            The folder.

        Raises:
            VitmodelError: The folder cannot be written.
            UsageError: `parquet` is set and pyarrow is not installed.

        Examples:
            >>> model = vitmodel.load("run/package", progress=False)
            >>> folder = model.predict("exam/").save("scores")
            >>> sorted(path.name for path in folder.iterdir())
            ['breast_scores.csv', 'patient_scores.csv', 'scores.csv', 'submission.csv']
        """
        write_score_files(self.images, self.breasts, self.patients, Path(folder), parquet, jsonl)
        return Path(folder)

    def summary(self) -> str:
        """Return the numbers of images, refusals, breasts and positive decisions as one line.

        Returns:
            A line of text.

        Examples:
            >>> model = vitmodel.load("run/package", progress=False)
            >>> print(model.predict("exam/").summary())  # doctest: +ELLIPSIS
            1 image, 0 refused; 1 breast, ...
        """
        positive = int((self.breasts["decision"] == 1).sum())
        images = _count(len(self.images), "image")
        breasts = _count(len(self.breasts), "breast")
        refused = len(self.refused)
        return f"{images}, {refused} refused; {breasts}, {positive} at or above the threshold {self.threshold:.4f}"

    def __repr__(self) -> str:
        exam = ["exam_id"] if "exam_id" in self.breasts else []
        columns = ["prediction_id", *exam, "probability", "decision", "status"]
        return f"Prediction: {self.summary()}\n{self.breasts[columns].to_string(max_rows=10)}\n{NOT_A_MEDICAL_DEVICE}"

    def _repr_html_(self) -> str:
        table = self.breasts.to_html(max_rows=20, index=False)
        return f"<p>{self.summary()}</p>{table}<p><strong>{NOT_A_MEDICAL_DEVICE}</strong></p>"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
