"""Score manifest rows: the ensemble, its stream and its tables combined, for every verb that scores.

A breast's score is computed in `Predictor.tables` -> `tables.image_table` -> `Ensemble.breast_scores`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import pandas as pd

from vitmodel.config import PredictorConfig
from vitmodel.data.cropping import ProvenanceRecord
from vitmodel.data.drift import ColumnDrift, measure_drift, reference_from_json
from vitmodel.data.grey_range import add_shared_ranges
from vitmodel.scoring.ensemble import Ensemble
from vitmodel.scoring.stream import LoadedImage, ScoredImage, ScoringRows, ScoringStream, Timings
from vitmodel.scoring.tables import (
    ScoreTables,
    add_auxiliary,
    add_intervals,
    breast_table,
    image_table,
    patient_table,
)


class Predictor:
    """Score manifest rows with one model package or an ensemble of them.

    Args:
        config: The packages and how they run.

    Raises:
        VitmodelError: A package cannot be loaded.
        UsageError: The packages cannot be combined.
    """

    def __init__(self, config: PredictorConfig) -> None:
        self.config = config
        self.ensemble = Ensemble(config)
        self.timings = Timings()
        self.stream = ScoringStream(self.ensemble, config, self.timings)

    def attach(self, table: pd.DataFrame) -> ScoringRows:
        """Return the rows of the manifest `table` with the metadata that the network uses."""
        with_ranges = add_shared_ranges(table, self.ensemble.preprocessing, self.config.workers)
        return ScoringRows.attach(with_ranges, self.ensemble.model.config)

    def scores(self, rows: ScoringRows) -> Iterator[tuple[int, ScoredImage]]:
        """Yield the position, verdict and logits of each row as soon as they are known."""
        return self.stream.scores(rows)

    def predict_logits(self, rows: ScoringRows) -> tuple[list[ProvenanceRecord], np.ndarray]:
        """Return the verdict on each of the N rows and its logits `(N, L + A, M)`; no crop is kept."""
        results = {position: (scored.loaded.cropped.record, scored.logits) for position, scored in self.scores(rows)}
        records = [results[position][0] for position in range(len(rows))]
        logits = [results[position][1] for position in range(len(rows))]
        shape = (len(rows), self.ensemble.outputs, len(self.ensemble.packages))
        return records, np.reshape(np.asarray(logits, dtype=float), shape)

    def tables(
        self, table: pd.DataFrame, records: Sequence[ProvenanceRecord], logits: Sequence[np.ndarray] | np.ndarray
    ) -> ScoreTables:
        """Return the scores per image, breast and patient from the results of `predict_logits` on `table`."""
        images = image_table(table, records, logits, self.ensemble)
        breasts = add_intervals(self.score_breasts(images), images, logits, self.ensemble)
        breasts = add_auxiliary(breasts, images, logits, self.ensemble)
        return ScoreTables(images, breasts, self.score_patients(breasts))

    def score(self, table: pd.DataFrame) -> ScoreTables:
        """Return the scores of the manifest `table` per image, breast and patient."""
        return self.tables(table, *self.predict_logits(self.attach(table)))

    def score_images(self, table: pd.DataFrame) -> pd.DataFrame:
        """Return one row of scores per row of the manifest `table`; see `tables.image_table`."""
        return image_table(table, *self.predict_logits(self.attach(table)), self.ensemble)

    def score_breasts(self, images: pd.DataFrame) -> pd.DataFrame:
        """Return one row per breast of a table of images; see `tables.breast_table`."""
        return breast_table(images, self.ensemble.threshold)

    def score_patients(self, breasts: pd.DataFrame) -> pd.DataFrame:
        """Return one row per patient of a table of breasts; see `tables.patient_table`."""
        return patient_table(breasts, self.ensemble.threshold, self.ensemble.patient_aggregation)

    def drift(self, images: pd.DataFrame) -> list[ColumnDrift]:
        """Return the drift of scored images against the training set of the first package; [] if it stores none."""
        return measure_drift(reference_from_json(self.ensemble.package.get("reference", {})), images)

    def explain_missing_looks(self) -> list[str]:
        """Return messages on typicality and distributions that the packages or the runtime lack."""
        messages = [self.ensemble.explain_missing_typicality()]
        if not self.ensemble.package.get("reference"):
            folder = self.ensemble.packages[0].folder
            messages.append(f"drift is not measured: {folder} stores no distributions of its training images")
        return [message for message in messages if message]

    def explain(self, image: LoadedImage, method: str) -> np.ndarray:
        """Return the contribution of each patch `(h, w)` to the image's score; see `Ensemble.explain`."""
        assert image.pack is not None
        with self.timings.record("explaining"):
            return self.ensemble.explain(image.pack, method)
