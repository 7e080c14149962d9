"""Label rules: every row gets the label of the first rule that is known for it, and a wrong rule is refused."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest

from vitmodel.config import EvaluateConfig, TrainConfig
from vitmodel.config.labels import LabelRule, target_name, target_title
from vitmodel.data.exams import check_sources
from vitmodel.data.labels import add_label, explain_missing, possible_rules, proven_lesions, without_label
from vitmodel.data.manifest import as_manifest
from vitmodel.data.splits import assign_folds, assign_splits
from vitmodel.errors import UsageError

NAN = math.nan


def manifest(**columns: object) -> pd.DataFrame:
    """Return a manifest of eight images of eight patients with the given columns."""
    names = [f"i{number}" for number in range(8)]
    table = pd.DataFrame({"image_id": names, "patient_id": names, "laterality": "L", "view": "CC", "path": names})
    return as_manifest(table.assign(**columns), "table")


TABLE = manifest(
    cancer=[1, 0, NAN, NAN, NAN, NAN, NAN, 0],
    birads=[0, 5, 0, 1, 2, 3, 4, NAN],
    density=["A", "B", "C", "D", None, "A", "C", "D"],
    age=[40, 50, 60, NAN, 40, 50, 60, 70],
    mass=["1", "true", "0", "", "False", "1.0", "0", None],
    reader_birads=["0", "4", "5", "1", "0", "0", "2", ""],
    note=["x", "y", "", "", "", "", "", ""],
)


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ("cancer", [1, 0, NAN, NAN, NAN, NAN, NAN, 0]),
        ("mass", [1, 1, 0, NAN, 0, 1, 0, NAN]),
        ("birads>=4", [NAN, 1, NAN, 0, 0, 0, 1, NAN]),
        ("birads<=2", [NAN, 0, NAN, 1, 1, 0, 0, NAN]),
        ("birads==0", [NAN, 0, NAN, 0, 0, 0, 0, NAN]),
        ("birads>=4:<=2", [NAN, 1, NAN, 0, 0, NAN, 1, NAN]),
        ("reader_birads>3", [NAN, 1, 1, 0, NAN, NAN, 0, NAN]),
        ("density>=C", [0, 0, 1, 1, NAN, 0, 1, 1]),
        ("density==D:<B", [0, NAN, NAN, 1, NAN, 0, NAN, 1]),
        ("age<60", [1, 1, 0, NAN, 1, 1, 0, 0]),
        ("cancer,birads>=4", [1, 0, NAN, 0, 0, 0, 1, 0]),
        ("birads>=4,cancer", [1, 1, NAN, 0, 0, 0, 1, 0]),
    ],
)
def test_each_row_gets_the_label_of_the_first_rule_that_is_known(rule: str, expected: list[float]) -> None:
    np.testing.assert_array_equal(add_label(TABLE, rule, "table")[rule], np.array(expected, float))


def test_a_rule_has_one_spelling() -> None:
    assert LabelRule.parse(" cancer , birads >= 4.0 : <=2,density> c").text == "cancer,birads>=4:<=2,density>C"
    config = TrainConfig(manifest=("m.csv",), run="run", label="birads >= 4")
    assert config.label == "birads>=4"
    assert EvaluateConfig(package="p", manifest="m.csv", out="o").label is None


@pytest.mark.parametrize(
    "rule",
    [
        *("", "cancer,", "birads>=", ">=4", "birads=4", "birads=>4", "birads!=4", "birads>=4:", "birads>=4:2"),
        *("birads>=4:<=2:<=1", "birads>=four", "birads>=nan", "birads>=4:<=5", "birads>3:==4", "birads>=4:<=C"),
    ],
)
def test_a_malformed_rule_is_refused_with_an_example(rule: str) -> None:
    with pytest.raises(UsageError, match=r"^label: .*birads>=4"):
        TrainConfig(manifest=("m.csv",), run="run", label=rule)


@pytest.mark.parametrize(
    ("rule", "named"),
    [
        ("cancr", "did you mean cancer"),
        ("qqq>=4", "--label 'birads>=4'"),
        ("split", "where it comes from"),
        ("fold>=1", "where it comes from"),
        ("patient_id", "where it comes from"),
        ("source_height>100", "where it comes from"),
        ("lesions", "is text"),
        ("note>1", "row 1: the value is not a number"),
        ("birads", "birads>=4"),
        ("reader_birads", "reader_birads>=4"),
        ("density", "density>=C"),
        ("density>=3", "density>=C"),
        ("birads>=C", "density>=C"),
    ],
)
def test_a_column_that_cannot_be_the_label_is_refused(rule: str, named: str) -> None:
    with pytest.raises(UsageError, match=r"^label: ") as refused:
        add_label(TABLE, rule, "table")
    assert named in str(refused.value)


def test_where_no_label_is_known_the_message_lists_rules_that_have_both_classes() -> None:
    assert possible_rules(TABLE) == ["cancer", "birads>=4", "density>=C", "mass"]
    without = TABLE.assign(cancer=NAN, density=np.nan)
    assert possible_rules(without) == ["birads>=4", "mass"]
    assert "--label 'birads>=4'" in explain_missing(without, "cancer")
    assert possible_rules(manifest()) == []
    assert "column of 0 and 1" in explain_missing(manifest(), "cancer")


def test_a_column_is_kept_and_a_computed_label_is_not_written() -> None:
    assert "birads>=4" not in without_label(add_label(TABLE, "birads>=4", "table"), "birads>=4")
    pd.testing.assert_frame_equal(without_label(add_label(TABLE, "cancer", "table"), "cancer"), TABLE)
    assert without_label(add_label(TABLE, "mass", "table"), "mass")["mass"].sum() == 3


@pytest.mark.parametrize("column", ["birads>=4", "mass", "mass_size", "cancer", "age"])
def test_columns_of_the_label_are_no_sources(column: str) -> None:
    rule = "birads>=4,mass,age>50"
    table = add_label(TABLE.assign(mass_size="2"), rule, "table").assign(**{"birads>=4": 1})
    columns = (*LabelRule.parse(rule).columns, "birads>=4", rule)
    with pytest.raises(UsageError, match=r"reveals the label"):
        check_sources(table, [column], "table", columns)
    check_sources(table, ["note"], "table", columns)


def test_lesions_are_used_only_where_the_label_is_that_cancer() -> None:
    table = manifest(
        cancer=[1, 1, 0, NAN, 1, 1, 1, 1],
        birads=[5, 1, 5, 5, 0, NAN, 4, 3],
        lesions=[f"0 0 {n + 1} 1" for n in range(8)],
    )

    def used(rule: str) -> list[int]:
        return np.flatnonzero(proven_lesions(add_label(table, rule, "table"), rule).notna()).tolist()

    assert used("cancer") == list(range(8))
    assert used("cancer,birads>=4") == [0, 1, 4, 5, 6, 7]
    assert used("birads>=4,cancer") == [0, 4, 5, 6]
    assert used("birads>=4") == []


def test_splits_and_folds_are_stratified_by_the_rule() -> None:
    count = 60
    names = [f"p{number:02}" for number in range(count)]
    birads = [5 if number % 5 == 0 else 1 for number in range(count)]
    table = as_manifest(
        pd.DataFrame(
            {"image_id": names, "patient_id": names, "laterality": "L", "view": "CC", "path": names, "birads": birads}
        ),
        "table",
    )
    labelled = add_label(table, "birads>=4", "table")
    halves = assign_splits(labelled, {"train": 0.5, "val": 0.5}, 0, "birads>=4")
    assert halves.groupby("split")["birads>=4"].sum().tolist() == [6, 6]
    folds = assign_folds(labelled, 4, 0, "birads>=4")
    assert folds.groupby("fold")["birads>=4"].sum().tolist() == [3, 3, 3, 3]
    with pytest.raises(UsageError, match="12 with birads>=4 and 48 without"):
        assign_folds(labelled, 13, 0, "birads>=4")


def test_only_pathology_is_called_cancer() -> None:
    assert [target_name(rule) for rule in ("cancer", "invasive")] == ["cancer", "invasive cancer"]
    assert target_title("invasive") == "Invasive cancer"
    for rule in ("birads>=4", "density>=C", "cancer,birads>=4"):
        assert target_name(rule) == target_title(rule) == rule
