"""The evaluation report is one file without external resources, shows every number and escapes any text."""

from __future__ import annotations

import base64
import json
import re
from dataclasses import asdict, replace
from pathlib import Path
from xml.etree import ElementTree

import cv2
import numpy as np
import pytest
from matplotlib.figure import Figure
from page_parser import ADDRESSES, PageParser
from scipy.special import expit

from vitmodel.errors import VitmodelError
from vitmodel.metrics.compare import compare
from vitmodel.metrics.curve_data import Curves
from vitmodel.metrics.metrics import METRICS, RankedUnits, compute_metrics
from vitmodel.metrics.scored_units import ScoredUnits
from vitmodel.reports.evaluation import Audit, Baseline, CrossFitted, ErrorCase, EvaluationReport, Level, write_report
from vitmodel.reports.figures import history
from vitmodel.utils import NOT_A_MEDICAL_DEVICE, to_json


class Page(PageParser):
    """The visible text, the images and all addresses of a page."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.images: list[bytes] = []
        self.addresses: list[str | None] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        if tag not in ("meta", "img"):
            self.open.append(tag)
        values = dict(attributes)
        self.addresses += [value for name, value in attributes if name in ADDRESSES]
        if tag == "img":
            assert values["alt"]
            encoded = values["src"].removeprefix("data:image/svg+xml;base64,")
            self.images.append(base64.b64decode(encoded, validate=True))


def parse(path: Path) -> Page:
    """Return the parsed page."""
    return Page(path.read_text(encoding="utf-8"))


def random_report(both_classes: bool = True) -> EvaluationReport:
    """Return a report on random scores of 60 patients with four images each."""
    rng = np.random.default_rng(0)
    labels = np.repeat(rng.random(60) < 0.3, 4).astype(float) if both_classes else np.zeros(240)
    labels[-8:] = np.nan
    scores = 1 / (1 + np.exp(-rng.normal(1.5 * np.nan_to_num(labels) - 1)))
    images = ScoredUnits(labels, scores, np.repeat(np.arange(60), 4))
    breasts = images.aggregate(np.repeat(np.arange(120), 2), "mean")
    levels = [
        Level(name, sample, compute_metrics(sample, threshold=0.4321, replicates=50), refused)
        for name, sample, refused in (("image", images, 7), ("breast", breasts, 1))
    ]
    return EvaluationReport(
        title="Evaluation",
        command="vitmodel evaluate package manifest.csv out",
        created="2025-01-01 12:00 UTC",
        levels=levels,
        headline=levels[1],
        label="cancer",
        method={"Threshold": "best F1 on the validation split"},
        model={"SHA-256": "9f86d081"},
        data={"SHA-256": "60303ae2"},
        refusals={"no_breast": 4, "unreadable": 3},
        history={"Loss": {"train": [(0, 0.7), (1, 0.5)], "val": [(0, 0.8), (1, 0.6)]}},
    )


@pytest.fixture(scope="module")
def report() -> EvaluationReport:
    return random_report()


@pytest.fixture(scope="module")
def page(report: EvaluationReport, tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("report") / "report.html"
    write_report(path, report)
    return path.read_text(encoding="utf-8")


def test_the_page_loads_no_external_resource(page: str) -> None:
    assert all(address.startswith("data:") for address in Page(page).addresses)
    assert not re.search(r"<script|<link|<iframe|@import|url\(", page)


def test_every_figure_is_a_self_contained_svg(page: str) -> None:
    pictures = Page(page).images
    assert len(pictures) == 7
    assert all(ElementTree.fromstring(picture).tag.endswith("svg") for picture in pictures)
    assert not any(re.search(rb'(href|src)="(?!#)', picture) for picture in pictures)


def test_the_drawn_points_equal_those_in_the_json(
    report: EvaluationReport, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn_axes = []

    def record_axes(figure: Figure) -> str:
        drawn_axes.append(figure.axes[0])
        return "data:,"

    report = replace(report, errors=[ErrorCase("7", 0.1, 1, "L CC, age 71", np.ones((2, 2), np.uint8))])
    monkeypatch.setattr("vitmodel.reports.evaluation._svg_url", record_axes)
    write_report(tmp_path / "report.html", report)
    document = json.loads(to_json(report.to_dict()))
    curves = document["drawn"]["curves"]
    bars = document["drawn"]["histogram"]
    roc, precision_recall, reliability, decision_curve, histogram = drawn_axes[:5]
    lines = (
        (roc, 1, "roc", ("fpr", "tpr")),
        (precision_recall, 1, "precision_recall", ("recall", "precision")),
        (reliability, 1, "reliability", ("score", "observed")),
        (decision_curve, 1, "decision_curve", ("threshold", "everyone")),
        (decision_curve, 2, "decision_curve", ("threshold", "model")),
    )
    for axes, line, name, coordinates in lines:
        drawn = [list(values) for values in axes.get_lines()[line].get_data()]
        assert drawn == [curves[name][coordinate] for coordinate in coordinates]
    for axes, name in ((roc, "roc"), (precision_recall, "precision_recall")):
        band = curves[name]["band"]
        corners = {tuple(corner) for corner in axes.collections[0].get_paths()[0].vertices}
        assert corners >= {*zip(band["x"], band["low"], strict=True), *zip(band["x"], band["high"], strict=True)}
    whiskers = [segment[:, 1].tolist() for segment in reliability.collections[0].get_segments()]
    np.testing.assert_allclose(np.transpose(whiskers), [curves["reliability"][name] for name in ("low", "high")])
    units = report.headline.metrics.units
    assert sum(curves["reliability"]["units"]) == sum(bars["negatives"] + bars["positives"]) == units
    for stairs, name in ((histogram.patches[0], "negatives"), (histogram.patches[2], "positives")):
        np.testing.assert_allclose(stairs.get_data().values, np.array(bars[name]) / sum(bars[name]))
        assert stairs.get_data().edges.tolist() == bars["edges"]
    assert document["errors"] == [{"image_id": "7", "score": 0.1, "label": 1}]


def test_a_curve_of_many_scores_is_thinned_without_visible_change(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vitmodel.metrics.curve_data.BAND_REPLICATES", 20)
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 54706).astype(float)
    sample = ScoredUnits(labels, expit(rng.normal(labels)), np.arange(len(labels)))
    exact = RankedUnits(sample, 1.0).curve()
    thinned = Curves.from_units(sample)
    roc = thinned.roc
    assert len(exact.fpr) > 20000
    assert max(len(roc.fpr), len(thinned.precision_recall.recall)) <= 3000
    interpolated = np.interp(exact.fpr + exact.tpr, roc.fpr + roc.tpr, roc.tpr)
    assert np.abs(interpolated - exact.tpr).max() < 0.001
    assert (roc.fpr[[0, -1]] == roc.tpr[[0, -1]]).all()
    assert len(to_json(asdict(thinned))) < 500e3


def test_the_page_shows_every_metric_with_its_interval_and_every_count(page: str, report: EvaluationReport) -> None:
    text = Page(page).words.replace("−", "-")
    for level in report.levels:
        metrics = level.metrics
        assert set(metrics.intervals) == {name for group in METRICS.values() for name in group}
        for interval in metrics.intervals.values():
            assert str(interval) in text
        confusion = metrics.confusion
        counts = (metrics.units, metrics.positives, metrics.unknown, metrics.patients, level.refused)
        for count in (*counts, confusion.tp, confusion.fp, confusion.fn, confusion.tn):
            assert re.search(rf"\b{count}\b", text), count
    others = (
        "0.432",
        "4 refused as no_breast",
        "3 refused as unreadable",
        "9f86d081",
        "60303ae2",
        "best F1",
        report.command,
        *report.limits,
    )
    for expected in others:
        assert expected in text


def test_the_warning_precedes_the_scores_and_follows_the_figures(page: str) -> None:
    text = Page(page).text
    assert text.index(NOT_A_MEDICAL_DEVICE) < text.index("AUROC")
    assert text.count(NOT_A_MEDICAL_DEVICE) == 2


@pytest.mark.parametrize("kind", [np.uint8, np.uint16])
def test_the_pictures_of_errors_are_reduced_to_8_bits_and_512_rows(
    kind: type[np.integer], report: EvaluationReport, tmp_path: Path
) -> None:
    crop = np.full((2048, 1000), np.iinfo(kind).max, dtype=kind)
    orange = np.full((256, 128, 3), (255, 128, 0), dtype=np.uint8)
    write_report(tmp_path / "report.html", replace(report, errors=[ErrorCase("7", 0.1, 1, "L CC", crop, orange)]))
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    pictures = []
    for encoded in re.findall(r'src="data:image/png;base64,([^"]+)"', html):
        file = np.frombuffer(base64.b64decode(encoded), np.uint8)
        pictures.append(cv2.imdecode(file, cv2.IMREAD_UNCHANGED))
    assert [picture.shape for picture in pictures] == [(512, 250), (256, 128, 3)]
    assert pictures[0].dtype == np.uint8
    assert (pictures[0] == 255).all()
    assert (pictures[1] == (0, 128, 255)).all()  # OpenCV reads blue, green, red


def test_the_folds_of_a_split_share_one_colour_and_one_legend_entry() -> None:
    points = [(0, 0.7), (1, 0.5)]
    figure = history("loss", {f"{split} fold_{fold}": points for fold in range(5) for split in ("train", "val")})
    colours = [line.get_color() for line in figure.axes[0].get_lines()]
    assert len(colours) == 10
    assert len(set(colours)) == 2
    assert colours == colours[:2] * 5
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["train", "val"]


def test_text_is_escaped(report: EvaluationReport, tmp_path: Path) -> None:
    hostile = '$<script>alert("x")</script><img src=http://x.example>'
    curves = {hostile: {"train": [(0, 1.0)]}}
    hostile_report = replace(
        report, title=hostile, command=hostile, model={hostile: hostile}, refusals={hostile: 1}, history=curves
    )
    write_report(tmp_path / "report.html", hostile_report)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "<script" not in page
    assert "<img src=http" not in page
    assert Page(page).text.count(hostile) >= 4


def test_a_report_on_one_class_has_no_curves_and_gives_the_reason(tmp_path: Path) -> None:
    write_report(tmp_path / "report.html", replace(random_report(both_classes=False), history={}))
    page = parse(tmp_path / "report.html")
    assert len(page.images) == 2
    assert "all 232 units have the label 0" in page.text
    assert "nan" not in re.findall(r"\w+", page.text)


def test_the_captions_of_cross_fitting_state_the_number_of_folds(report: EvaluationReport, tmp_path: Path) -> None:
    metrics = report.headline.metrics
    thresholds = [CrossFitted("Largest F1", (0.1, 0.2), metrics)]
    write_report(
        tmp_path / "report.html", replace(report, folds=3, thresholds=thresholds, recalibrated={"platt": metrics})
    )
    words = parse(tmp_path / "report.html").words
    for expected in ("divided into 3 folds", "range of the 3 thresholds", "each of 3 folds"):
        assert expected in words


def test_a_baseline_without_pixels_that_ranks_better_gives_a_warning(report: EvaluationReport, tmp_path: Path) -> None:
    model = report.headline.sample.labelled()
    oracle = ScoredUnits(model.labels, 0.1 + 0.8 * model.labels, model.patients)
    message = "Metadata alone rank these units better than the model does, mainly by machine_id"
    for name, scores, warnings in (("oracle", oracle, 3), ("model", model, 2)):
        comparison = compare(scores, model, (0.5, 0.5), replicates=50)
        baseline = Baseline("Metadata alone", compute_metrics(scores, 0.5, 50), comparison, "machine_id")
        audit = Audit(links={"patients": 0}, examples=[], baselines=[baseline])
        write_report(tmp_path / name, replace(report, audit=audit))
        page = (tmp_path / name).read_text(encoding="utf-8")
        assert page.count('class="warning"') == warnings
        assert (message in page) == (name == "oracle")


def test_the_same_report_gives_the_same_bytes(report: EvaluationReport, page: str, tmp_path: Path) -> None:
    write_report(tmp_path / "again.html", report)
    assert (tmp_path / "again.html").read_text(encoding="utf-8") == page


def test_a_path_that_cannot_be_written_is_named(report: EvaluationReport, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(VitmodelError, match=r"cannot write .*file/report\.html"):
        write_report(tmp_path / "file" / "report.html", report)
