"""Exported models give the scores of the package in every runtime, int8 scores are close, and misuse is refused."""

from __future__ import annotations

import itertools
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import pytest
import torch

from vitmodel.cli import main
from vitmodel.config import PredictorConfig, SegmentsConfig, Size
from vitmodel.data.manifest import read_manifest, usable_rows
from vitmodel.model.architecture import ExamConfig, NetworkConfig, SourcesConfig, ViTConfig, Vocabulary
from vitmodel.model.network import Network
from vitmodel.model.onnx import ViTGraph, export_onnx, load_onnx
from vitmodel.model.package import load_package, save_package
from vitmodel.model.package_check import record_file
from vitmodel.model.packed_attention import forward
from vitmodel.model.packed_batch import pack_images
from vitmodel.model.vit import ViT
from vitmodel.scoring.predictor import Predictor

for module in ("onnx", "onnxscript", "onnxruntime", "openvino"):
    pytest.importorskip(module, reason="ONNX needs the extra `export`")

VARIANTS: list[dict[str, Any]] = [{"pool": "cls"}, {"pool": "attention", "registers": 2, "stem": "conv"}]


@torch.no_grad()
@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_an_exported_graph_gives_the_mean_logits_of_the_packed_models(options: dict[str, Any], tmp_path: Path) -> None:
    import onnxruntime

    torch.manual_seed(0)
    models = [ViT(ViTConfig(image_size=Size(64, 48), dim=32, depth=2, heads=2, **options)).eval() for _ in range(2)]
    for parameter in itertools.chain(*(model.parameters() for model in models)):
        parameter.add_(0.1 * torch.randn_like(parameter))
    images = torch.rand(3, 1, 64, 48)
    images[1:, :, 32:] = 0
    pack = pack_images(list(images), 16)
    export_onnx(ViTGraph(models), tmp_path / "vit.onnx", "weights")
    expected = torch.stack([forward(model, pack) for model in models]).mean(dim=0)
    for runtime in ("onnx", "openvino"):
        logits = load_onnx(tmp_path / "vit.onnx", runtime, "weights")(pack)
        assert (logits - expected).abs().max() <= 1e-4
    inputs = {"images": images.numpy(), "kept": np.arange(12)[None].repeat(3, axis=0)}
    (dense,) = onnxruntime.InferenceSession(tmp_path / "vit.onnx").run(None, inputs)
    expected_dense = torch.stack([model(images) for model in models]).mean(dim=0).numpy()
    assert np.abs(dense - expected_dense).max() <= 1e-4 < np.abs(dense[1:] - expected[1:].numpy()).max()


@pytest.mark.parametrize("runtime", ["onnx", "openvino"])
def test_every_runtime_gives_the_same_scores(runtime: Any, exported: Path, crops: Path) -> None:
    table = read_manifest(crops / "manifest.csv")
    config = PredictorConfig(package=exported, jobs=1)
    torch_scores = Predictor(config).score_images(table)
    fp32 = Predictor(replace(config, runtime=runtime, precision="fp32")).score_images(table)
    int8 = Predictor(replace(config, runtime=runtime, precision="int8")).score_images(table)
    np.testing.assert_allclose(fp32["score"], torch_scores["score"], atol=1e-5)
    np.testing.assert_allclose(int8["score"], torch_scores["score"], atol=0.03)
    assert not np.allclose(int8["score"].dropna(), torch_scores["score"].dropna(), atol=1e-6)
    columns = ["status", "reason", "remark"]
    pd.testing.assert_frame_equal(fp32[columns], torch_scores[columns])


SQUARE = ViTConfig(image_size=Size(32, 32), dim=32, depth=2, heads=2)
MACHINES = SourcesConfig(columns=(Vocabulary("machine_id", ("21", "49")), Vocabulary("view", ("CC", "MLO"))), every=1)
SEGMENTS = SegmentsConfig(segments=32, segment_overlap=16, segment_context=32, segment_budget=20)
NETWORKS = {
    "sources": NetworkConfig(vit=replace(SQUARE, image_size=Size(64, 32)), sources=MACHINES),
    "segments": NetworkConfig(vit=replace(SQUARE, stem="conv"), segments=SEGMENTS),
    "all": NetworkConfig(
        vit=SQUARE, sources=MACHINES, segments=SEGMENTS, exam=ExamConfig(views=Vocabulary("view", ("CC", "MLO")))
    ),
}


@torch.no_grad()
@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=pytest.mark.nightly) for kind in ("sources", "segments", "all")]
)
def test_networks_with_adapters_segments_and_fusion_run_their_blocks_in_onnx(
    kind: str, run: Path, crops: Path, tmp_path: Path
) -> None:
    """Two models with a graph each give the same image and breast scores as PyTorch, and similar ones in int8."""
    torch.manual_seed(0)
    models = [Network(NETWORKS[kind]).eval() for _ in range(2)]
    for parameter in itertools.chain(*(model.parameters() for model in models)):
        parameter.add_(0.1 * torch.randn_like(parameter))
    contents = load_package(run / "package")[1]
    contents["decision"]["aggregate"] = "fusion" if NETWORKS[kind].exam else "mean_logit"
    package = tmp_path / "package"
    save_package(package, models, contents, "card")
    assert main(["export", str(package), str(package / "model.fp32.onnx")]) == 0
    int8_flags = ["--precision", "int8", "--calibration", str(run / "manifest.csv"), "--images", "8"]
    assert main(["export", str(package), str(package / "model.int8.onnx"), *int8_flags]) == 0
    config = PredictorConfig(package=package, jobs=1)
    table = read_manifest(crops / "manifest.csv")
    expected = Predictor(config).score_images(table)
    runtimes: tuple[Literal["onnx", "openvino"], ...] = ("onnx", "openvino")
    for runtime in runtimes:
        fp32 = Predictor(replace(config, runtime=runtime, precision="fp32")).score_images(table)
        int8 = Predictor(replace(config, runtime=runtime, precision="int8")).score_images(table)
        for column in ("score", "breast_score"):
            np.testing.assert_allclose(fp32[column], expected[column], atol=1e-5)
            np.testing.assert_allclose(int8[column], expected[column], atol=0.1)
            assert not np.allclose(int8[column].dropna(), expected[column].dropna(), atol=1e-5)
    assert expected["score"].std() > 0.01, "scores must vary, otherwise the comparison shows nothing"


def test_int8_calibration_uses_no_test_patients(run: Path, exported: Path) -> None:
    (count,) = re.findall(r"on (\d+) images", (exported.parent / "said.txt").read_text())
    assert int(count) == (usable_rows(read_manifest(run / "manifest.csv"))["split"] != "test").sum()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--runtime", "openvino", "--precision", "int8"], "model.int8.onnx: is missing; `vitmodel export"),
        (["--precision", "int8"], "--runtime onnx or --runtime openvino"),
        (["--runtime", "onnx", "--device", "cuda"], "cuda needs --runtime torch"),
    ],
)
def test_an_impossible_runtime_is_refused(
    options: list[str], message: str, run: Path, crops: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["predict", str(run / "package"), str(crops / "manifest.csv"), str(tmp_path / "out"), *options]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("spoil", "status", "message"),
    [
        (lambda package: (package / "model.fp32.onnx").write_bytes(b"torn"), 1, "cannot load it"),
        (
            lambda package: (package / "model.safetensors").write_bytes((package / "other").read_bytes()),
            2,
            "other weights",
        ),
    ],
)
def test_a_damaged_or_foreign_onnx_file_is_refused(
    spoil: Any,
    status: int,
    message: str,
    exported: Path,
    crops: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from safetensors.torch import load_file, save_file

    copy = tmp_path / "package"
    shutil.copytree(exported, copy)
    tensors = load_file(copy / "model.safetensors")
    save_file(tensors | {"head.bias": tensors["head.bias"] + 1}, copy / "other")
    spoil(copy)
    for name in ("model.fp32.onnx", "model.safetensors"):
        record_file(copy, name)  # the digests are right, so that the content itself is judged
    command = ["predict", str(copy), str(crops / "manifest.csv"), str(tmp_path / "out"), "--runtime", "onnx"]
    assert main(command) == status
    assert message in capsys.readouterr().err


def test_int8_needs_crops_for_calibration(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", str(run / "package"), str(tmp_path / "vit.onnx"), "--precision", "int8"]) == 2
    assert "calibration:" in capsys.readouterr().err
