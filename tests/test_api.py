"""The Python API: all kinds of sources, the results of the command line, helpful errors, and runnable examples."""

from __future__ import annotations

import ast
import doctest
import functools
import importlib
import inspect
import json
import os
import shutil
import subprocess
import sys
import tempfile
import types
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pandas as pd
import pydicom
import pytest
import torch
from pydicom.fileset import FileSet
from pydicom.uid import generate_uid
from safetensors.torch import save_file

import vitmodel
from vitmodel.cli import main
from vitmodel.model.architecture import ViTConfig
from vitmodel.model.package_check import seal
from vitmodel.model.vit import ViT
from vitmodel.model.weights import fit_weights, load_weights
from vitmodel.utils import NOT_A_MEDICAL_DEVICE

TABLE_NAMES = ("scores.csv", "breast_scores.csv", "patient_scores.csv", "submission.csv")
HEAVY = {"torch", "numpy", "pandas", "lightning", "cv2", "pydicom", "sklearn", "matplotlib", "scipy", "jsonargparse"}


@pytest.fixture(scope="module")
def model(run: Path) -> vitmodel.Model:
    return vitmodel.load(run / "package", jobs=1, progress=False)


@pytest.fixture(scope="module")
def files(release: Path) -> list[Path]:
    """Return four DICOM files without faults."""
    faulty = set(pd.read_csv(release / "faults.csv", dtype=str)["image_id"])
    return [path for path in sorted((release / "train_images").rglob("*.dcm")) if path.stem not in faulty][:4]


@pytest.fixture
def folder(files: list[Path], tmp_path: Path) -> Path:
    """Return a folder with one image, `files[0]`."""
    (tmp_path / "exam").mkdir()
    shutil.copy(files[0], tmp_path / "exam" / "rcc.dcm")
    return tmp_path / "exam"


def loaded_after(code: str) -> set[str]:
    """Return the modules that a new interpreter has loaded after running `code`."""
    done = subprocess.run(
        [sys.executable, "-c", f"import sys\n{code}\nprint(*sys.modules)"], capture_output=True, text=True, check=True
    )
    return set(done.stdout.split())


def array_of(path: Path) -> np.ndarray:
    """Return the pixels of a DICOM file as a 16-bit picture in which denser tissue is brighter."""
    dataset = pydicom.dcmread(path)
    pixels = dataset.pixel_array.astype(float)
    pixels = (pixels - pixels.min()) / np.ptp(pixels)
    if dataset.PhotometricInterpretation == "MONOCHROME1":
        pixels = 1 - pixels
    return np.rint(65535 * pixels).astype(np.uint16)


def test_importing_the_package_loads_no_heavy_module() -> None:
    assert not loaded_after("import vitmodel; dir(vitmodel)") & HEAVY
    assert not loaded_after("import vitmodel; vitmodel.UsageError; vitmodel.train; vitmodel.Manifest") & HEAVY


def test_all_public_names_are_listed_typed_and_found() -> None:
    assert sorted(vitmodel.__all__) == sorted({*vitmodel._HOME, "__version__"})
    assert set(vitmodel.__all__) <= set(dir(vitmodel))
    for name in vitmodel.__all__:
        assert getattr(vitmodel, name) is not None
    tree = ast.parse(Path(vitmodel.__file__).read_text())
    typed = {
        alias.asname: node.module
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
        if alias.asname
    }
    assert typed == vitmodel._HOME
    with pytest.raises(AttributeError, match="no attribute 'lode'"):
        _ = vitmodel.lode  # type: ignore[attr-defined]


def test_the_package_is_marked_as_typed() -> None:
    assert (Path(vitmodel.__file__).parent / "py.typed").is_file()


def test_no_module_hides_a_public_function() -> None:
    """The script vitmodel/train.py has the name of a function."""
    code = """
import vitmodel, vitmodel.cli
vitmodel.cli.main(["train", "nosuch.csv", "nosuch_run"])
import vitmodel.train, vitmodel.predict, vitmodel.scoring.evaluation
import inspect
assert inspect.isfunction(vitmodel.train), vitmodel.train
assert inspect.isfunction(vitmodel.evaluate), vitmodel.evaluate
from vitmodel import train
assert train is vitmodel.train
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_every_kind_of_source_has_the_score_of_its_file(
    model: vitmodel.Model, files: list[Path], folder: Path, tmp_path: Path
) -> None:
    expected = model.predict(files[0]).images.iloc[0]
    with zipfile.ZipFile(tmp_path / "exam.zip", "w") as archive:
        archive.write(files[0], "inside.dcm")
    dated = pydicom.dcmread(files[0])
    dated.StudyDate = "20200101"  # required by a DICOMDIR
    dated.StudyTime = "120000"
    disc = FileSet()
    disc.add(dated)
    disc.write(tmp_path / "disc")
    bare = pydicom.Dataset(dict(pydicom.dcmread(files[0]).items()))  # without file meta information
    sources = [
        str(files[0]),
        folder,
        tmp_path / "exam.zip",
        tmp_path / "disc" / "DICOMDIR",
        pydicom.dcmread(files[0]),
        [files[0]],
        (dated,),
    ]
    if not pydicom.dcmread(files[0]).file_meta.TransferSyntaxUID.is_compressed:
        sources.append(bare)
    for source in sources:
        result = model.predict(source)
        assert len(result.images) == len(result.breasts) == len(result.patients) == 1
        row = result.images.iloc[0]
        assert (row["image_id"], row["patient_id"]) == (expected["image_id"], expected["patient_id"])
        assert row["probability"] == expected["probability"]
        assert result.refused.empty


def test_a_manifest_object_is_a_source(model: vitmodel.Model, crops: Path) -> None:
    manifest = vitmodel.Manifest(crops / "manifest.csv")
    result = model.predict(manifest)
    assert result.images["image_id"].tolist() == manifest.table["image_id"].tolist()
    assert result.refused["image_id"].tolist() == manifest.refused["image_id"].tolist()
    assert len(result.refused) > 0


def test_an_array_is_scored_as_its_picture_in_a_table(model: vitmodel.Model, files: list[Path], tmp_path: Path) -> None:
    rows = []
    arrays = []
    for number, path in enumerate(files[:2]):
        pixels = array_of(path)
        cv2.imwrite(str(tmp_path / f"picture{number}.png"), pixels)
        metadata = {"patient_id": "p", "laterality": "L", "view": ("CC", "MLO")[number]}
        rows.append({"image_id": f"picture{number}", "path": f"picture{number}.png"} | metadata)
        arrays.append(vitmodel.Mammogram(pixels=pixels, image_id=f"picture{number}", **metadata))
    pd.DataFrame(rows).to_csv(tmp_path / "table.csv", index=False)
    expected = model.predict(tmp_path / "table.csv")
    result = model.predict(arrays)
    pd.testing.assert_frame_equal(result.breasts, expected.breasts)
    scores = ["image_id", "patient_id", "laterality", "view", "score", "probability"]
    pd.testing.assert_frame_equal(result.images[scores], expected.images[scores])
    as_float = vitmodel.Mammogram(pixels=arrays[0].pixels / 65535, patient_id="p", laterality="L", view="CC")
    assert model.predict(as_float).images["score"].iloc[0] == expected.images["score"].iloc[0]


def test_mixed_sources_have_one_row_each(
    model: vitmodel.Model, files: list[Path], folder: Path, tmp_path: Path
) -> None:
    dataset = pydicom.dcmread(files[1])
    array = vitmodel.Mammogram(pixels=array_of(files[2]), patient_id="another", laterality="R", view="CC")
    result = model.predict([folder, dataset, array, files[3], tmp_path / "nosuch.dcm"])
    assert len(result.images) == 5
    assert set(result.images["image_id"]) >= {"array_3", str(dataset.SOPInstanceUID)}
    assert result.images["probability"].notna().sum() == 4
    assert result.refused["reason"].tolist() == ["missing_file"]


def test_an_image_given_twice_gets_distinct_ids(model: vitmodel.Model, files: list[Path]) -> None:
    result = model.predict([pydicom.dcmread(files[0]), pydicom.dcmread(files[0])])
    assert result.images["image_id"].tolist() == ["dataset_1-dataset_1.dcm", "dataset_2-dataset_2.dcm"]


def test_data_sets_without_a_patient_id_are_told_apart_by_their_studies(
    model: vitmodel.Model, files: list[Path]
) -> None:
    datasets = [pydicom.dcmread(path) for path in files[:2]]
    for dataset in datasets:
        dataset.PatientID = ""
    assert model.predict(datasets).patients["patient_id"].nunique() == 1, "both are of one study"
    datasets[1].StudyInstanceUID = generate_uid()
    assert model.predict(datasets).patients["patient_id"].nunique() == 2
    assert all(dataset.PatientID == "" for dataset in datasets)


def test_an_input_that_cannot_be_scored_is_refused_with_a_reason(
    model: vitmodel.Model, files: list[Path], tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    without_pixels = pydicom.dcmread(files[0], stop_before_pixels=True)
    black = vitmodel.Mammogram(pixels=np.zeros((256, 208), np.uint16), patient_id="p")
    for source in (tmp_path / "empty", tmp_path / "nosuch.dcm", without_pixels, black):
        result = model.predict(source)
        assert len(result.refused) == 1
        assert result.refused["remark"].iloc[0]
        assert "vitmodel-" not in result.refused["remark"].iloc[0]  # the name of the scratch folder
        assert result.images["probability"].isna().all()
        assert result.breasts["probability"].isna().all()


def test_predict_and_explain_print_nothing_and_leave_no_file(
    model: vitmodel.Model,
    files: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    model.predict([pydicom.dcmread(files[0]), vitmodel.Mammogram(pixels=array_of(files[1]), patient_id="p")])
    model.explain(pydicom.dcmread(files[0]))
    assert list(tmp_path.iterdir()) == []
    printed = capsys.readouterr()
    assert (printed.out, printed.err) == ("", "")


def test_several_packages_are_an_ensemble(run: Path, model: vitmodel.Model, files: list[Path], tmp_path: Path) -> None:
    shutil.copytree(run / "package", tmp_path / "other")
    document = json.loads((tmp_path / "other" / "config.json").read_text())
    document["calibration"]["intercept"] = document["calibration"].get("intercept", 0.0) + 1
    seal(tmp_path / "other", document)
    folders = [run / "package", tmp_path / "other"]
    both = vitmodel.load(*folders, progress=False)
    listed = vitmodel.load(folders, progress=False)
    assert both.packages == listed.packages == folders
    alone = vitmodel.load(folders[1], progress=False).predict(files).breasts["probability"]
    mean = (alone + model.predict(files).breasts["probability"]) / 2
    for ensemble in (both, listed):
        np.testing.assert_allclose(ensemble.predict(files).breasts["probability"], mean)


def test_an_explanation_is_the_picture_of_the_command_line(
    run: Path, model: vitmodel.Model, files: list[Path], tmp_path: Path
) -> None:
    heat = model.explain(files[0], method="gradient")
    heat.save(tmp_path / "rcc.png")
    arguments = [
        "predict",
        str(run / "package"),
        str(files[0]),
        str(tmp_path / "out"),
        "--explain",
        "gradient",
        "--jobs",
        "1",
    ]
    assert main(arguments) == 0
    (drawn,) = (tmp_path / "out" / "overlays").glob("*.png")
    assert (tmp_path / "rcc.png").read_bytes() == drawn.read_bytes()
    assert heat.values.shape == (4, 2)
    dataset = pydicom.dcmread(files[0])
    assert heat.to_source_image().shape == (dataset.Rows, dataset.Columns)
    x, y = heat.peak
    assert np.isfinite(heat.to_source_image()[round(y), round(x)])
    assert heat.region.shape[1] == 2
    assert heat.probability == model.predict(files[0]).images["probability"].iloc[0]
    np.testing.assert_array_equal(model.explain(dataset).values, heat.values)


def test_an_explanation_that_cannot_be_made_says_why(
    model: vitmodel.Model, files: list[Path], folder: Path, tmp_path: Path
) -> None:
    shutil.copy(files[1], folder)
    for source, message in (
        (folder, "source: holds 2 images"),
        (tmp_path / "nosuch.dcm", r"refused \(missing_file\)"),
        (np.zeros((8, 8)), "wrap it"),
    ):
        with pytest.raises(vitmodel.UsageError, match=message):
            model.explain(source)
    with pytest.raises(vitmodel.UsageError, match="gradcam"):
        model.explain(files[0], method="gradcam")  # type: ignore[arg-type]
    with pytest.raises(vitmodel.UsageError, match=r"\.png"):
        model.explain(files[0]).save(tmp_path / "heat.tiff")


def test_predict_writes_the_tables_of_the_command_line(
    run: Path, model: vitmodel.Model, release: Path, tmp_path: Path
) -> None:
    source = release / "train.csv"
    status = main(["predict", str(run / "package"), str(source), str(tmp_path / "cli"), "--jobs", "1"])
    assert status == 1  # some images are refused
    result = model.predict(source, out=tmp_path / "api")
    result.save(tmp_path / "saved")
    for name in TABLE_NAMES:
        expected = (tmp_path / "cli" / name).read_bytes()
        assert (tmp_path / "api" / name).read_bytes() == expected
        assert (tmp_path / "saved" / name).read_bytes() == expected


def test_etl_writes_the_crops_of_the_command_line(release: Path, crops: Path, tmp_path: Path) -> None:
    manifest = vitmodel.etl(release, tmp_path / "crops", size=(64, 32), progress=False)
    assert os.fspath(manifest) == str(tmp_path / "crops" / "manifest.csv")
    expected = (crops / "manifest.csv").read_text().replace(str(crops), str(tmp_path / "crops"))
    assert manifest.path.read_text() == expected
    pictures = sorted(path.relative_to(crops) for path in crops.rglob("*.png"))
    assert pictures == sorted(path.relative_to(manifest.folder) for path in manifest.folder.rglob("*.png"))
    assert all((crops / name).read_bytes() == (manifest.folder / name).read_bytes() for name in pictures)
    assert manifest.report.is_file()


def test_train_gives_the_package_of_the_command_line(run: Path, crops: Path, tmp_path: Path) -> None:
    """The fixture `run` was made by the command line with the same options."""
    options: dict[str, Any] = {
        "model": "vit_micro",
        "epochs": 3,
        "tokens": 96,
        "val": 0.25,
        "test": 0.25,
        "workers": 0,
        "drop_path": 0.2,
    }
    trained = vitmodel.train(
        vitmodel.Manifest(crops / "manifest.csv"), tmp_path / "run", wandb="off", progress=False, **options
    )
    assert (trained.package / "model.safetensors").read_bytes() == (run / "package" / "model.safetensors").read_bytes()
    assert trained.history.index.name == "epoch"
    assert trained.history["val/auroc"].notna().sum() == 3
    assert trained.recipe.is_file()
    assert trained.manifest.table["split"].isin(["train", "val", "test"]).any()
    with pytest.raises(vitmodel.UsageError, match="already holds a run"):
        vitmodel.train(crops / "manifest.csv", tmp_path / "run", wandb="off", progress=False, **options)


def test_evaluate_gives_the_metrics_of_the_command_line(run: Path, crops: Path, tmp_path: Path) -> None:
    manifest = str(crops / "manifest.csv")
    flags = ["--split", "all", "--replicates", "100", "--no-card", "--no-audit"]
    assert main(["evaluate", str(run / "package"), manifest, str(tmp_path / "cli"), *flags]) == 0
    options: dict[str, Any] = {"split": "all", "replicates": 100, "card": False, "audit": False, "progress": False}
    report = vitmodel.evaluate(run / "package", manifest, tmp_path / "api", **options)
    metrics = [json.loads((folder / "metrics.json").read_text()) for folder in (tmp_path / "cli", report.folder)]
    for values in metrics:
        del values["command"], values["created"]
    assert metrics[0] == metrics[1]
    auroc = report.metrics["breast"]["auroc"]
    assert vars(auroc) == metrics[0]["breast"]["intervals"]["auroc"]
    assert auroc.low <= auroc.value <= auroc.high
    assert set(report.metrics) == {"image", "breast", "patient"}
    assert report.path.is_file()
    for name in TABLE_NAMES:
        assert (tmp_path / "cli" / name).read_bytes() == (report.folder / name).read_bytes()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda package: vitmodel.load(package, devise="cpu"), "devise: .*did you mean device"),
        (lambda package: vitmodel.load(package, device="gpu"), "device: 'gpu'.*auto, cpu, cuda"),
        (lambda package: vitmodel.load(package, jobs="two"), "workers: must be a whole number, not 'two'"),
        (lambda package: vitmodel.load(package, jobs=True), "workers: must be a whole number, not True"),
        (lambda package: vitmodel.load(package, source=["x"]), "source: unknown option"),
        (lambda package: vitmodel.load(), "packages: none is given"),
        (lambda package: vitmodel.load(3), "packages: must be paths"),
        (lambda package: vitmodel.load(package / "nosuch"), "nosuch"),
        (lambda package: vitmodel.etl("in", "out", size=(64, 32, 16)), "size"),
        (lambda package: vitmodel.etl("in", "out", size=64.5), "size: 64.5 is not a size; write HEIGHTxWIDTH"),
        (lambda package: vitmodel.etl("in", "out", size="large"), "size: 'large' is not a size; write HEIGHTxWIDTH"),
        (lambda package: vitmodel.etl("nosuch", "out"), "nosuch does not exist"),
        (lambda package: vitmodel.train("m.csv", "run", epoch=3), "epoch: .*did you mean epochs"),
        (lambda package: vitmodel.train("m.csv", "run", augment={"flips": 1.0}), "flips: .*did you mean flip"),
        (lambda package: vitmodel.train(3, "run"), "manifest: must be a path"),
        (lambda package: vitmodel.evaluate([], "m.csv", "out"), "packages: none is given"),
        (
            lambda package: vitmodel.evaluate(package, "m.csv", "out", replicate=100),
            "replicate: .*did you mean replicates",
        ),
        (lambda package: vitmodel.ViT.from_pretrained(package, width=3), "width: not a field of ViTConfig"),
    ],
)
def test_a_wrong_call_is_refused_with_a_message_that_helps(
    call: Any, message: str, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(vitmodel.VitmodelError, match=message):
        call(run / "package")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("sources", "options", "message"),
    [
        ([], {}, "sources: names nothing to score"),
        (3, {}, "sources: int cannot be scored"),
        ([None], {}, "sources: NoneType cannot be scored"),
        (np.zeros((8, 8)), {}, r"wrap it: vitmodel\.Mammogram"),
        ("-", {}, "standard input"),
        ("x.dcm", {"explain": "gradient"}, "explain: has no effect without out=FOLDER"),
        ("x.dcm", {"resume": True}, "resume: has no effect without out=FOLDER"),
        ("x.dcm", {"dicoms": True}, "dicoms: .*did you mean dicom"),
        ("x.dcm", {"device": "cpu"}, "device: unknown option"),
    ],
)
def test_a_wrong_source_or_option_of_predict_is_refused_with_a_message_that_helps(
    model: vitmodel.Model, sources: Any, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(vitmodel.UsageError, match=message):
        model.predict(sources, **options)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pixels": np.zeros((8, 8, 3), np.uint8)}, "height x width grey values"),
        ({"pixels": [[0, 1]]}, "height x width grey values"),
        ({"pixels": np.zeros((8, 8), np.int32)}, "uint8, uint16 or float, not int32"),
        ({"pixels": np.full((8, 8), 200.0)}, "between 0 and 1"),
        ({"pixels": np.full((8, 8), np.nan)}, "between 0 and 1"),
        ({"patient_id": ""}, "patient_id: is empty"),
        ({"laterality": "left"}, "laterality: must be 'L', 'R'"),
    ],
)
def test_an_invalid_mammogram_is_refused(change: dict[str, Any], message: str) -> None:
    valid: dict[str, Any] = {"pixels": np.zeros((8, 8), np.uint16), "patient_id": "p"}
    with pytest.raises(vitmodel.UsageError, match=message):
        vitmodel.Mammogram(**valid | change)


def test_results_state_that_this_is_no_medical_device(model: vitmodel.Model, files: list[Path]) -> None:
    result = model.predict(files)
    assert NOT_A_MEDICAL_DEVICE in repr(result)
    assert NOT_A_MEDICAL_DEVICE in result._repr_html_()
    assert NOT_A_MEDICAL_DEVICE in repr(model)
    assert NOT_A_MEDICAL_DEVICE in repr(model.explain(files[0]))
    assert all(name in repr(result) for name in result.breasts["prediction_id"])


def test_the_network_of_a_package_gives_the_logits_of_the_package(run: Path, model: vitmodel.Model) -> None:
    vit = vitmodel.ViT.from_pretrained(run / "package")
    images = torch.rand(2, 1, 64, 32)
    with torch.no_grad():
        torch.testing.assert_close(vit(images), model.network.trunk(images), rtol=0, atol=1e-6)
    assert not vit.training
    assert vitmodel.ViT.from_pretrained(run / "package", image_size=(128, 64)).config.grid == (8, 4)


def published(path: Path) -> Path:
    """Write random weights as timm stores those of vit_tiny, for 32x32 pixels and 5 classes."""
    config = ViTConfig(
        image_size=(32, 32),  # type: ignore[arg-type]
        channels=3,
        dim=192,
        depth=2,
        heads=3,
        classes=5,
        pool="cls",
    )
    torch.manual_seed(0)
    tensors = {name: tensor.clone() for name, tensor in ViT(config).state_dict().items()}
    tensors["pos_embed"] = torch.cat([torch.zeros(1, 1, 192), tensors["pos_embed"].flatten(1, 2)], dim=1)
    save_file(tensors, path)
    return path


def test_the_sizes_of_published_weights_are_read_from_the_file(tmp_path: Path) -> None:
    path = published(tmp_path / "weights.safetensors")
    vit = vitmodel.ViT.from_pretrained(path)
    config = vit.config
    assert (config.dim, config.depth, config.heads, config.patch, config.classes, config.pool) == (
        192,
        2,
        3,
        16,
        5,
        "cls",
    )
    assert (tuple(config.image_size), config.channels) == ((32, 32), 1)
    expected = ViT(config).eval()
    fit_weights(expected, load_weights(path))
    image = torch.rand(1, 1, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(vit(image), expected(image), rtol=0, atol=0)
        colour = vitmodel.ViT.from_pretrained(path, channels=3)
        torch.testing.assert_close(colour(image.expand(-1, 3, -1, -1)), vit(image), rtol=1e-4, atol=1e-5)
    assert vitmodel.ViT.from_pretrained(path, classes=1, image_size=(64, 32))(torch.zeros(1, 1, 64, 32)).shape == (1, 1)


def public_objects() -> Iterator[tuple[str, Any]]:
    """Yield every public function and class, and the public methods of the classes."""
    for name in vitmodel.__all__:
        value = getattr(vitmodel, name)
        if inspect.isfunction(value):
            yield name, value
        elif inspect.isclass(value):
            yield name, value
            inherited = importlib.import_module(value.__module__).__name__
            for method, function in vars(value).items():
                function = getattr(function, "__func__", function)
                if (
                    inspect.isfunction(function)
                    and not method.startswith("_")
                    and inherited.split(".")[1] not in ("model", "metrics")
                ):
                    yield f"{name}.{method}", function


@pytest.mark.parametrize(("name", "value"), list(public_objects()), ids=[name for name, _ in public_objects()])
def test_every_public_object_is_documented_with_an_example(name: str, value: Any) -> None:
    text = inspect.getdoc(value) or ""
    assert ">>> " in text
    if inspect.isfunction(value):
        parameters = [parameter for parameter in inspect.signature(value).parameters if parameter != "self"]
        assert not parameters or "Args:" in text
        assert all(f"{parameter}:" in text for parameter in parameters)
        returns_nothing = inspect.signature(value).return_annotation in ("None", None)
        assert returns_nothing or "Returns:" in text


@pytest.fixture(scope="module")
def workspace(
    run: Path, crops: Path, release: Path, files: list[Path], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Return a folder with the files of the examples: run/package, crops/manifest.csv, release/ and exam/rcc.dcm."""
    folder = tmp_path_factory.mktemp("workspace")
    for name, target in (("run", run), ("crops", crops), ("release", release)):
        (folder / name).symlink_to(target)
    (folder / "exam").mkdir()
    shutil.copy(files[0], folder / "exam" / "rcc.dcm")
    return folder


class OptionalOutputChecker(doctest.OutputChecker):
    """Accepts any output of an example that states no expected output."""

    def check_output(self, want: str, got: str, optionflags: int) -> bool:
        return not want or super().check_output(want, got, optionflags)


ONCE = {"load": functools.cache(vitmodel.load), "evaluate": functools.cache(vitmodel.evaluate)}
"""Slow functions that many examples call with the same arguments; each call runs once."""
EXAMPLES = [*public_objects(), ("ViT.from_pretrained", ViT.from_pretrained.__func__)]  # type: ignore[attr-defined]


@pytest.mark.parametrize(("name", "value"), EXAMPLES, ids=[name for name, _ in EXAMPLES])
def test_the_examples_run(name: str, value: Any, workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(workspace)
    public = types.SimpleNamespace(**{name: getattr(vitmodel, name) for name in vitmodel.__all__} | ONCE)
    names = {"vitmodel": public, "np": np, "pydicom": pydicom}
    example = doctest.DocTestParser().get_doctest(inspect.getdoc(value) or "", names, name, None, None)
    assert example.examples
    output: list[str] = []
    runner = doctest.DocTestRunner(OptionalOutputChecker(), optionflags=doctest.NORMALIZE_WHITESPACE)
    assert not runner.run(example, out=output.append).failed, "".join(output)
