"""The folder of `vitmodel evaluate` in the reading room: images, labels, metrics at any threshold, and errors."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from fastapi.testclient import TestClient
from sklearn.metrics import average_precision_score, precision_recall_curve

from vitmodel.cli import main
from vitmodel.commands.view import create_app
from vitmodel.config import ViewConfig
from vitmodel.metrics.metrics import compute_decisions, compute_metrics
from vitmodel.metrics.scored_units import ScoredUnits
from vitmodel.viewer.evaluated import SHOWN, EvaluatedScores, read_evaluation
from vitmodel.viewer.exams import Exam
from vitmodel.viewer.figures import LANE, MOST_POINTS, Figures
from vitmodel.viewer.scores_folder import read_scores_folder


@pytest.fixture(scope="module")
def folder(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("evaluated")
    shutil.copytree(run / "package", out / "package")
    command = ["evaluate", str(out / "package"), "manifest.csv", str(out / "scores"), "--split", "all"]
    with contextlib.chdir(run):  # the pages find the manifest from any other folder
        assert main([*command, "--no-audit", "--no-card"]) == 0
    return out / "scores"


@pytest.fixture(scope="module")
def evaluated(folder: Path) -> EvaluatedScores:
    return read_evaluation(folder, read_scores_folder(folder))


def open_room(folder: Path, **options: object) -> TestClient:
    return TestClient(create_app(ViewConfig(scores=folder, **options)), base_url="http://localhost")  # type: ignore[arg-type]


def test_the_metrics_at_the_threshold_of_the_model_are_those_of_the_report(
    folder: Path, evaluated: EvaluatedScores
) -> None:
    report = json.loads((folder / "metrics.json").read_text())["breast"]
    confusion, metrics = evaluated.at(evaluated.threshold)
    assert vars(confusion) == report["confusion"]
    for name in SHOWN:
        expected = [np.nan if value is None else value for value in report["intervals"][name].values()]
        found = metrics[name]
        np.testing.assert_allclose([found.value, found.low, found.high], expected)


@pytest.mark.parametrize("threshold", [0.0, 0.31, 0.5, 0.9, 1.0])
def test_decisions_at_a_threshold_are_those_of_all_metrics(threshold: float) -> None:
    rng = np.random.default_rng(1)
    labels = rng.choice([0, 1, np.nan], 200, p=[0.6, 0.3, 0.1])
    units = ScoredUnits(labels, rng.random(200).round(2), rng.integers(60, size=200))
    confusion, found = compute_decisions(units, threshold, replicates=200, seed=3)
    expected = compute_metrics(units, threshold, replicates=200, seed=3)
    assert confusion == expected.confusion
    for name, interval in found.items():
        for part in ("value", "low", "high"):
            np.testing.assert_allclose(getattr(interval, part), getattr(expected.intervals[name], part))


def test_every_error_at_a_threshold_is_listed_with_its_exam(folder: Path, evaluated: EvaluatedScores) -> None:
    client = open_room(folder)
    threshold = float(np.median(evaluated.units.scores))
    errors = evaluated.errors(threshold)
    confusion, _ = evaluated.at(threshold)
    assert (sum(error.is_missed for error in errors), sum(not error.is_missed for error in errors)) == (
        confusion.fn,
        confusion.fp,
    )
    gaps = [abs(error.probability - threshold) for error in errors]
    assert gaps == sorted(gaps, reverse=True)
    for error in errors:
        assert evaluated.truth[error.exam.key][error.side] == error.is_missed
    page = client.get("/evaluation", params={"threshold": threshold}).text
    assert re.findall(r'href="/exams/(\w+)"', page.split('id="errors"')[1]) == [error.exam.key for error in errors]
    assert all(title in page for title in SHOWN.values())
    assert "Research software" in page


def test_the_images_of_the_manifest_are_shown_with_the_label(folder: Path, evaluated: EvaluatedScores) -> None:
    client = open_room(folder)
    assert 'href="/evaluation"' in client.get("/").text
    exam = next(exam for exam in read_scores_folder(folder) if exam.status == "ok")
    described = client.get(f"/api/exams/{exam.key}").json()
    assert described["truth"] == evaluated.truth[exam.key]
    for image in described["images"]:
        assert client.get(f"/api/images/{image['key']}/tiles/0/0/0").status_code == 200


@pytest.mark.parametrize("threshold", ["-0.1", "1.1", "nan", "x"])
def test_a_threshold_that_is_no_probability_is_refused(folder: Path, threshold: str) -> None:
    assert open_room(folder).get("/evaluation", params={"threshold": threshold}).status_code == 422


def test_labels_and_the_evaluation_are_hidden_in_a_blinded_reading(folder: Path) -> None:
    client = open_room(folder, blind=True, reader="Ann")
    assert client.get("/evaluation").status_code == 403
    assert "/evaluation" not in client.get("/").text
    for exam in read_scores_folder(folder):
        assert client.get(f"/api/exams/{exam.key}").json()["truth"] == {}


def test_without_its_manifest_an_evaluation_shows_the_scores_and_says_why(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "scores"))
    facts = json.loads((copy / "metrics.json").read_text())
    (copy / "metrics.json").write_text(json.dumps(facts | {"manifest": str(tmp_path / "gone.csv")}))
    client = open_room(copy)
    assert "gone.csv" in capsys.readouterr().err
    assert client.get("/evaluation").status_code == 404
    exam = next(exam for exam in read_scores_folder(copy) if exam.status == "ok")
    described = client.get(f"/api/exams/{exam.key}").json()
    assert described["breasts"][0]["probability"] is not None
    assert "do not name the file" in described["images"][0]["problem"]


def test_the_figures_are_those_of_independent_references(folder: Path, evaluated: EvaluatedScores) -> None:
    figures = evaluated.figures
    labels, scores = evaluated.units.labels, evaluated.units.scores
    assert figures.average_precision == pytest.approx(average_precision_score(labels, scores))
    precision, recall, thresholds = precision_recall_curve(labels, scores)
    known = dict(zip(thresholds.tolist(), zip(recall.tolist(), precision.tolist(), strict=False), strict=False))
    for threshold, *point in figures.points:
        assert point == pytest.approx(known[threshold])
    drawn = {tuple(map(float, corner.split(","))) for corner in figures.precision_recall.split()}
    gains = [index for index in range(len(thresholds)) if recall[index] > recall[index + 1]]
    for index in gains:
        expected = 300 * recall[index], 300 * (1 - precision[index])
        assert min(abs(x - expected[0]) + abs(y - expected[1]) for x, y in drawn) < 0.5
    assert sum(bin.units for bin in figures.bins) == len(labels)
    assert sum(bin.units * bin.observed for bin in figures.bins) == pytest.approx(labels.sum())
    assert sum(bin.units * bin.score for bin in figures.bins) == pytest.approx(scores.sum())


def test_every_breast_is_a_point_in_the_lane_of_its_label(folder: Path, evaluated: EvaluatedScores) -> None:
    found = sorted((point.key, point.x, point.is_positive) for point in evaluated.figures.strip)
    units = zip(evaluated.breasts, evaluated.units.scores, evaluated.units.labels, strict=True)
    assert found == sorted((exam.key, round(640 * score, 1), label == 1) for (exam, _), score, label in units)
    assert all((point.y < LANE) == point.is_positive for point in evaluated.figures.strip)
    assert len({(point.x, point.y) for point in evaluated.figures.strip}) == len(found), "a point covers another"
    page = open_room(folder).get("/evaluation").text.split('id="errors"')[0]
    assert re.findall(r'href="/exams/(\w+)"', page) == [point.key for point in evaluated.figures.strip]


def test_of_many_breasts_a_sample_of_each_class_is_shown() -> None:
    rng = np.random.default_rng(0)
    labels = (np.arange(3000) < 40).astype(float)
    units = ScoredUnits(labels, rng.random(3000), np.arange(3000))
    figures = Figures.of(units, [(Exam(str(number), "", (), ()), "L") for number in range(3000)], None)
    assert figures.shown == (40, MOST_POINTS)
    assert len(figures.strip) == 40 + MOST_POINTS
    assert all(0 < point.y < 2 * LANE for point in figures.strip)


def test_breasts_of_one_class_have_points_and_no_curve(evaluated: EvaluatedScores) -> None:
    negatives = np.flatnonzero(evaluated.units.labels == 0)
    units = ScoredUnits(*(getattr(evaluated.units, name)[negatives] for name in ("labels", "scores", "patients")))
    scores = replace(evaluated, units=units, breasts=[evaluated.breasts[row] for row in negatives])
    assert scores.figures.points == ()
    assert {point.is_positive for point in scores.figures.strip} == {False}
