"""The command `predict`: score images, breasts and patients, and write tables, heat maps and DICOM results."""

from __future__ import annotations

import sys
import time

import pandas as pd

from vitmodel.config import PredictConfig
from vitmodel.pixels.verdict import REFUSAL_REASONS
from vitmodel.scoring.predictor import Predictor
from vitmodel.scoring.sources import score_sources
from vitmodel.utils import NOT_A_MEDICAL_DEVICE

MAX_REFUSALS_SHOWN = 20
"""Number of refused images that are named on the screen."""


def predict(config: PredictConfig) -> int:
    """Score every source and print a summary; return 1 if an image was refused or lacks its heat map."""
    start = time.perf_counter()
    predictor = Predictor(config)
    run = score_sources(predictor, config)
    seconds = time.perf_counter() - start
    milliseconds = 1e3 * seconds / max(1, run.scored)
    print(f"{seconds:.1f} s, {milliseconds:.0f} ms per image, of which {predictor.timings.per_image(run.scored)}")
    for name, message in list(run.unexplained.items())[:MAX_REFUSALS_SHOWN]:
        print(f"image {name} has no heat map: {message}", file=sys.stderr)
    return summarise(run.tables.images, run.tables.breasts, config) or int(bool(run.unexplained))


def summarise(images: pd.DataFrame, breasts: pd.DataFrame, config: PredictConfig) -> int:
    """Print what was refused, warned about or left empty, and return the exit status: 1 if an image was refused."""
    refused = images[images["status"] == "refused"]
    for row in refused.head(MAX_REFUSALS_SHOWN).itertuples():
        print(f"refused: image {row.image_id}: {row.reason}: {row.remark}", file=sys.stderr)
    if len(refused) > MAX_REFUSALS_SHOWN:
        print(f"refused: {len(refused) - MAX_REFUSALS_SHOWN} more images, see scores.csv", file=sys.stderr)
    for code, count in refused["reason"].value_counts().items():
        sentence = REFUSAL_REASONS.get(str(code), str(code))
        print(f"{count} refused as {code}: {sentence}; see the rows with this reason in scores.csv", file=sys.stderr)
    warnings = breasts.loc[breasts["status"] == "warned", "reason"].str.split(";").explode().value_counts()
    if len(warnings):
        counts = ", ".join(f"{code} {count}" for code, count in warnings.items())
        print(f"breasts with a warning, by reason: {counts}; see breast_scores.csv")
    empty = int(breasts["probability"].isna().sum())
    if empty:
        print(
            f"{empty} breasts have no usable image and an empty cell in submission.csv, which Kaggle does not accept; "
            "fill it in before you submit",
            file=sys.stderr,
        )
    scores_file = config.out / "breast_scores.csv"
    print(f"{len(images)} images, {len(refused)} refused, {len(breasts) - empty} breasts scored in {scores_file}")
    if len(refused) == len(images):
        print("no input could be scored; see the column reason of scores.csv", file=sys.stderr)
    print(NOT_A_MEDICAL_DEVICE)
    return 1 if len(refused) else 0
