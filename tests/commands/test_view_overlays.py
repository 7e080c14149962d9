"""Overlays on demand explain the score that was given: its inputs, and the segments of a model of large images."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from fastapi.testclient import TestClient
from fixture_types import MakeOnce
from safetensors.torch import load_file, save_file

from vitmodel.cli import main
from vitmodel.commands.view import create_app
from vitmodel.config import PredictorConfig, Preprocessing, SegmentsConfig, Size, ViewConfig
from vitmodel.data.manifest import read_manifest, write_manifest
from vitmodel.errors import UsageError
from vitmodel.model.architecture import NetworkConfig, SourcesConfig, ViTConfig, Vocabulary
from vitmodel.model.network import Network
from vitmodel.model.package import TYPICALITY_FILE, save_package
from vitmodel.model.package_check import record_file
from vitmodel.releases.inputs import read_inputs
from vitmodel.scoring.explanation import explain_image
from vitmodel.scoring.predictor import Predictor
from vitmodel.scoring.segment_reading import read_segments
from vitmodel.viewer.exams import ImageEntry
from vitmodel.viewer.heat_maps import METHODS, scored_row
from vitmodel.viewer.scores_folder import read_scores_folder

VIT = ViTConfig(image_size=Size(64, 32), dim=24, depth=2, heads=3, patch=8)
AGES = ("30-39", "40-49", "50-59", "60-69", "70-79")
SEGMENTS = SegmentsConfig(segments=64, segment_overlap=16, segment_context=64, segment_budget=100)


def write_package(folder: Path, size: Size = VIT.image_size, seeds: tuple[int, ...] = (0,), **parts: Any) -> Path:
    """Write a package of networks with random weights."""
    models = []
    for seed in seeds:
        torch.manual_seed(seed)
        models.append(Network(NetworkConfig(vit=VIT, **parts)))
        for name, tensor in models[-1].state_dict().items():
            torch.nn.init.normal_(tensor, std=0.3 if name.startswith("sources") else 0.15)
    contents = {
        "label": "cancer",
        "preprocessing": Preprocessing(size=size).to_json(),
        "packed": True,
        "calibration": {"method": "platt", "prevalence": 0.5, "slope": 1.0, "intercept": 0.0, "level": "breast"},
        "decision": {"level": "breast", "aggregate": "mean_logit", "threshold": 0.3, "objective": "youden"},
        "data": {"sha256": "0", "splits": {}, "seen_images": ""},
        "history": {},
        "versions": {},
    }
    save_package(folder, models, contents, "# Card")
    return folder


@pytest.fixture(scope="module")
def with_sources(make_once: MakeOnce) -> Path:
    """Return a package whose scores depend on the age and the machine."""
    sources = SourcesConfig(columns=(Vocabulary("age", AGES), Vocabulary("machine_id", ("29", "21", "other"))), every=1)
    return make_once("with_sources", lambda folder: write_package(folder / "package", sources=sources)) / "package"


@pytest.fixture(scope="module")
def in_segments(make_once: MakeOnce) -> Path:
    """Return a package of two models that read images in segments."""
    size = Size(256, 128)
    make_once("in_segments", lambda folder: write_package(folder / "package", size, (0, 1), segments=SEGMENTS))
    return make_once("in_segments", lambda _: None) / "package"


def corrected(table: pd.DataFrame) -> pd.DataFrame:
    """Return a table that states other ages and machines than the headers."""
    return table.assign(age=[35.0 + 10 * (row % 5) for row in range(len(table))], machine_id="other")


def scored_images(folder: Path) -> list[ImageEntry]:
    images = [image for exam in read_scores_folder(folder) for image in exam.images if image.probability is not None]
    assert len(images) >= 4
    return images


def explained_probability(image: ImageEntry, predictor: Predictor) -> float:
    scored = explain_image(scored_row(image), predictor, "rollout").scored
    return float(predictor.ensemble.probability(scored.logits[:1])[0])


@pytest.fixture(scope="module")
def predicted(with_sources: Path, release: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("predicted")
    write_manifest(corrected(read_inputs([str(release)], "auto").iloc[:8]), folder / "table.csv")
    assert main(["predict", str(with_sources), str(folder / "table.csv"), str(folder / "scores")]) == 0
    return folder / "scores"


@pytest.fixture(scope="module")
def evaluated(with_sources: Path, crops: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("evaluated")
    write_manifest(corrected(read_manifest(crops / "manifest.csv")), folder / "manifest.csv")
    command = ["evaluate", str(with_sources), str(folder / "manifest.csv"), str(folder / "scores"), "--split", "all"]
    assert main([*command, "--no-audit", "--no-card", "--replicates", "100"]) == 0
    return folder / "scores"


@pytest.mark.parametrize("kind", ["predicted", "evaluated"])
def test_the_explained_score_is_the_stored_one(kind: str, with_sources: Path, request: pytest.FixtureRequest) -> None:
    predictor = Predictor(PredictorConfig(package=with_sources))
    for image in scored_images(request.getfixturevalue(kind))[:4]:
        assert explained_probability(image, predictor) == pytest.approx(image.probability, abs=1e-6)
        by_header = replace(image, inputs={}, machine="")
        assert abs(explained_probability(by_header, predictor) - (image.probability or 0)) > 1e-4, "no input matters"


def test_a_heat_map_states_the_score_that_it_explains(predicted: Path, with_sources: Path) -> None:
    app = create_app(ViewConfig(scores=predicted, package=(with_sources,)))
    with TestClient(app, base_url="http://localhost") as client:
        image = scored_images(predicted)[0]
        assert wait_for(client, image, "rollout")["probability"] == pytest.approx(image.probability, abs=1e-6)


def test_an_image_that_was_scored_although_it_is_atypical_is_explained(
    run: Path, release: Path, tmp_path: Path
) -> None:
    package = Path(shutil.copytree(run / "package", tmp_path / "package"))
    tensors = load_file(package / TYPICALITY_FILE)
    tensors["0.centre"] -= 5
    save_file(tensors, package / TYPICALITY_FILE)
    record_file(package, TYPICALITY_FILE)
    write_manifest(read_inputs([str(release)], "auto").iloc[:1], tmp_path / "table.csv")
    command = ["predict", str(package), str(tmp_path / "table.csv"), str(tmp_path / "scores")]
    assert main([*command, "--keep-atypical"]) == 0
    ((image,),) = [exam.images for exam in read_scores_folder(tmp_path / "scores")]
    assert image.reason == "kept_atypical"
    app = create_app(ViewConfig(scores=tmp_path / "scores", package=(package,)))
    with TestClient(app, base_url="http://localhost") as client:
        assert wait_for(client, image, "rollout")["probability"] == pytest.approx(image.probability, abs=1e-6)


def test_read_segments_are_those_of_the_network(in_segments: Path, release: Path) -> None:
    predictor = Predictor(PredictorConfig(package=in_segments))
    row = read_inputs([str(release)], "auto").iloc[[0]]
    reading = read_segments(row, predictor)
    ((_, scored),) = predictor.scores(predictor.attach(row))
    pack, geometry = scored.loaded.pack, scored.loaded.cropped.geometry
    assert pack
    assert geometry
    models = predictor.ensemble.packages[0].models
    expected = [model.encode_segments(pack) for model in models]
    boxes = expected[0].parts[0].boxes_in_patches[1:]
    assert len(reading.segments) == len(boxes) > 2
    total = sum(segment.attention for segment in reading.segments) + reading.overview_attention
    assert total == pytest.approx(1, abs=1e-5)
    ordered = [segment.attention for segment in reading.segments]
    assert ordered == sorted(ordered, reverse=True)
    by_corner = {tuple(segment.corners[0].round(3)): segment for segment in reading.segments}
    for number, (top, left, bottom, right) in enumerate(boxes.tolist()):
        crop = np.array([[8 * left - 0.5, 8 * top - 0.5, 1], [8 * right - 0.5, 8 * bottom - 0.5, 1]])
        first, opposite = crop @ geometry.to_source().T
        segment = by_corner[tuple(first.round(3))]
        np.testing.assert_allclose(segment.corners[2], opposite, atol=1e-6)
        attention = np.mean([float(output.attention[0][1 + number]) for output in expected])
        score = np.mean([float(output.logits[0][1 + number].sigmoid()) for output in expected])
        assert (segment.attention, segment.score) == pytest.approx((attention, score), abs=1e-5)


def test_segments_that_one_model_did_not_read_have_its_attention_of_zero(tmp_path: Path, release: Path) -> None:
    top = replace(SEGMENTS, segment_top=1)
    package = write_package(tmp_path / "package", Size(256, 128), (0, 1, 2, 3, 4), segments=top)
    reading = read_segments(read_inputs([str(release)], "auto").iloc[[0]], Predictor(PredictorConfig(package=package)))
    assert len(reading.segments) > 1, "the models read the same segments"
    total = sum(segment.attention for segment in reading.segments) + reading.overview_attention
    assert total == pytest.approx(1, abs=1e-5)


def test_a_package_that_reads_whole_images_has_no_segments(run: Path, release: Path) -> None:
    predictor = Predictor(PredictorConfig(package=run / "package"))
    with pytest.raises(UsageError, match=r"segments: .* reads whole images"):
        read_segments(read_inputs([str(release)], "auto").iloc[[0]], predictor)


@pytest.fixture(scope="module")
def in_segments_scores(in_segments: Path, release: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("in_segments")
    write_manifest(read_inputs([str(release)], "auto").iloc[:4], folder / "table.csv")
    assert main(["predict", str(in_segments), str(folder / "table.csv"), str(folder / "scores")]) == 0
    return folder / "scores"


@pytest.fixture
def client(in_segments: Path, in_segments_scores: Path) -> Iterator[TestClient]:
    app = create_app(ViewConfig(scores=in_segments_scores, package=(in_segments,)))
    with TestClient(app, base_url="http://localhost") as client:
        yield client


def wait_for(client: TestClient, image: ImageEntry, method: str) -> dict[str, Any]:
    answer = client.get(f"/api/images/{image.key}/heat-maps/{method}")
    while answer.status_code == 202:
        time.sleep(0.05)
        answer = client.get(f"/api/images/{image.key}/heat-maps/{method}")
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_segments_are_offered_for_models_that_read_them_only(
    client: TestClient, in_segments_scores: Path, predicted: Path, with_sources: Path
) -> None:
    exam = read_scores_folder(in_segments_scores)[0]
    assert [*client.get(f"/api/exams/{exam.key}").json()["methods"]] == [*METHODS, "segments"]
    image = exam.images[0]
    found = wait_for(client, image, "segments")
    assert found["probability"] == pytest.approx(image.probability, abs=1e-6)
    assert {len(segment["corners"]) for segment in found["segments"]} == {4}
    assert wait_for(client, image, "segments") == found
    assert wait_for(client, image, "gradient")["width"] > 1
    whole = create_app(ViewConfig(scores=predicted, package=(with_sources,)))
    with TestClient(whole, base_url="http://localhost") as other:
        exam = read_scores_folder(predicted)[0]
        assert "segments" not in other.get(f"/api/exams/{exam.key}").json()["methods"]
        assert other.get(f"/api/images/{exam.images[0].key}/heat-maps/segments").status_code == 404


@pytest.mark.browser
def test_the_borders_of_segments_are_drawn_where_the_network_read(
    open_page: Callable[..., Any], serve: Callable[[ViewConfig], str], in_segments: Path, in_segments_scores: Path
) -> None:
    exam = read_scores_folder(in_segments_scores)[0]
    page = open_page(1600, 1200)
    page.goto(f"{serve(ViewConfig(scores=in_segments_scores, package=(in_segments,)))}/exams/{exam.key}")
    page.wait_for_selector("figure[data-place]")
    page.select_option("#method", "segments")
    page.wait_for_load_state("networkidle")
    page.wait_for_timeout(500)
    assert page.locator("#lowest").is_disabled()
    row = scored_row(exam.images[0])
    reading = read_segments(row, Predictor(PredictorConfig(package=in_segments)))
    image = exam.images[0]
    figure = page.locator(f'figure[data-image="{image.key}"]')
    size = figure.bounding_box()
    seen = 0
    left, top, across, down = map(float, figure.get_attribute("data-place").split(","))
    script = """([key, x, y]) => { const canvas = document.querySelector(`figure[data-image="${key}"] canvas`);
        return [...canvas.getContext("2d").getImageData(x - 2, y - 2, 5, 5).data]; }"""
    for segment in reading.segments:
        corners = segment.corners + 0.5
        if image.is_mirrored:
            corners[:, 0] = (image.columns or 0) - corners[:, 0]
        for start, end in zip(corners, np.roll(corners, 1, axis=0), strict=True):
            x, y = 0.8 * start + 0.2 * end  # away from labels
            place = [image.key, round(left + x * across), round(top + y * down)]
            if not (3 < place[1] < size["width"] - 3 and 3 < place[2] < size["height"] - 3):
                continue  # the crop reaches beyond the image
            pixels = np.array(page.evaluate(script, place)).reshape(25, 4)[:, :3]
            assert np.ptp(pixels, axis=1).max() > 25, "no border is drawn here"
            seen += 1
    assert seen > 2 * len(reading.segments)
    page.locator("figure").first.focus()
    page.keyboard.press("h")
    page.wait_for_timeout(200)
    colour = """key => { const canvas = document.querySelector(`figure[data-image="${key}"] canvas`), pixels =
        canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data; let most = 0;
        for (let i = 0; i < pixels.length; i += 4) most = Math.max(most, Math.abs(pixels[i] - pixels[i + 2]));
        return most; }"""
    assert page.evaluate(colour, image.key) == 0, "flicker did not hide the segments"
