"""Distributions of the training images, and the drift of other images from them."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest

from vitmodel.data.appearance import measure_appearance
from vitmodel.data.drift import (
    TITLES,
    fit_reference,
    large_drift_messages,
    measure_drift,
    reference_from_json,
    reference_to_json,
)


def images(number: int = 600, seed: int = 0, **changes: object) -> pd.DataFrame:
    """Return a table of scored images, four per patient."""
    rng = np.random.default_rng(seed)
    table = pd.DataFrame(
        {
            "patient_id": [f"p{row // 4}" for row in range(number)],
            "typicality": rng.random(number),
            "grey_mean": rng.normal(0.3, 0.05, number),
            "grey_contrast": rng.normal(0.12, 0.02, number),
            "breast_height_mm": rng.normal(150, 20, number),
            "breast_share": rng.random(number),
            "view": np.tile(["CC", "MLO"], number // 2),
            "laterality": np.tile(["L", "L", "R", "R"], number // 4),
            "machine_id": rng.choice(["A", "B", "C"], number, p=[0.5, 0.495, 0.005]),
        }
    )
    return table.assign(**changes)  # type: ignore[arg-type]


def test_images_like_those_of_the_training_have_no_large_drift() -> None:
    drift = measure_drift(fit_reference(images()), images(seed=1))
    assert [column.column for column in drift] == list(TITLES)
    assert {column.stability.verdict for column in drift} <= {"small", "moderate"}
    assert not large_drift_messages(drift)


@pytest.mark.parametrize(
    ("column", "value", "named"),
    [
        ("grey_mean", 0.6, "mean grey value: 100% of the images are"),
        ("typicality", 0.001, "typicality: 100% of the images are below 0.01 instead of 1%"),
        ("view", "XCCL", "view: 100% of the images are other instead of 0%"),
        ("machine_id", "new", "machine: 100% of the images are other"),
        ("machine_id", "A", "machine: 100% of the images are A instead of 5"),
    ],
)
def test_a_changed_column_is_named_with_what_changed(column: str, value: object, named: str) -> None:
    drift = measure_drift(fit_reference(images()), images(seed=1, **{column: value}))
    (message,) = large_drift_messages(drift)
    assert named in message


def test_few_images_are_said_to_be_too_few() -> None:
    drift = measure_drift(fit_reference(images()), images(4, seed=1, grey_mean=0.6))
    (message,) = large_drift_messages(drift)
    assert message.startswith("drift cannot be judged with so few patients: ")


def test_the_stored_distributions_survive_json_and_hold_no_value_of_one_patient() -> None:
    table = images()
    table.loc[0, ["grey_mean", "machine_id"]] = [0.987654, "the machine of one patient"]
    reference = fit_reference(table)
    text = json.dumps(reference_to_json(reference))
    assert "0.98" not in text
    assert "one patient" not in text
    assert reference_from_json(json.loads(text)) == reference


def test_columns_of_which_nothing_is_known_are_left_out() -> None:
    unknown = {"breast_height_mm": np.nan, "machine_id": np.nan, "view": ""}
    reference = fit_reference(images(**unknown))
    assert not {*unknown} & {*reference}
    seen = measure_drift(fit_reference(images()), images(**unknown))
    assert not {*unknown} & {column.column for column in seen}


def test_images_without_a_crop_are_left_out() -> None:
    table = images()
    table.loc[:99, ["grey_mean", "typicality"]] = np.nan
    drift = measure_drift(fit_reference(images()), table)
    assert all(sum(column.observed) <= 500 for column in drift)


def test_the_appearance_of_an_image_is_measured_in_its_tissue_and_its_source() -> None:
    crop = np.zeros((4, 4), np.float32)
    crop[1:3, :2] = [[0.2, 0.4], [0.6, 0.8]]
    box = {"box_x0": 10, "box_y0": 20, "box_x1": 110, "box_y1": 220, "source_height": 400, "source_width": 200}
    found = measure_appearance(crop, box | {"spacing_row": 0.5})
    assert found.grey_mean == pytest.approx(0.5)
    assert found.grey_contrast == pytest.approx(np.std([0.2, 0.4, 0.6, 0.8]))
    assert found.breast_height_mm == 100
    assert found.breast_share == 0.25
    assert measure_appearance(crop, box | {"spacing_row": np.nan}).breast_height_mm is None
    assert measure_appearance(crop, {}).breast_share is None
