"""A failure of any stage on one of three inputs costs that input alone: the run and the other two are not affected."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from pydicom import dcmread

from vitmodel.cli import main
from vitmodel.commands import etl as etl_command
from vitmodel.data import cropping, grey_range
from vitmodel.pixels import identity
from vitmodel.releases import listing
from vitmodel.reports import contact_sheet
from vitmodel.results import image_results, structured_report
from vitmodel.scoring.ensemble import Ensemble
from vitmodel.scoring.predictor import Predictor
from vitmodel.scoring.stream import LoadedImage, ScoringStream

VICTIM = "b.dcm"
"""Name of the input on which a stage fails."""


@pytest.fixture
def inputs(release: Path, tmp_path: Path) -> Path:
    """Return a folder with one image of each of three patients, two of them not victims, under short names."""
    faulty = set(pd.read_csv(release / "faults.csv", dtype=str)["image_id"])
    images = sorted(path for path in (release / "train_images").rglob("*.dcm") if path.stem not in faulty)
    by_patient = {path.parent.name: path for path in images}
    folder = tmp_path / "in"
    folder.mkdir()
    for name, path in zip(("a.dcm", VICTIM, "c.dcm"), by_patient.values(), strict=False):
        shutil.copy(path, folder / name)
    return folder


Concerns = Callable[..., bool]
"""Whether a call with these arguments works on the victim."""


def names_victim(*arguments: Any, **_: Any) -> bool:
    return any(Path(str(argument)).name == VICTIM for argument in arguments if isinstance(argument, str | Path))


def crops_victim(*arguments: Any, **_: Any) -> bool:
    images = (argument.cropped if isinstance(argument, LoadedImage) else argument for argument in arguments)
    return any(names_victim(getattr(image, "record", {}).get("source_path")) for image in images)


def inject(
    monkeypatch: pytest.MonkeyPatch, module: object, function: str, concerns: Concerns = names_victim
) -> list[str]:
    """Make a function raise an error that nobody expects when it works on the victim; return its calls that did."""
    original = getattr(module, function)
    failed: list[str] = []

    def failing(*arguments: Any, **options: Any) -> Any:
        if concerns(*arguments, **options):
            failed.append(function)
            raise ArithmeticError("injected")
        return original(*arguments, **options)

    monkeypatch.setattr(module, function, failing)
    return failed


def rows_by_file(table: Path) -> pd.DataFrame:
    """Return the rows of a manifest by the names of their sources."""
    rows = pd.read_csv(table, dtype=str)
    return rows.set_index(rows["source_path"].map(lambda path: Path(path).name))


@pytest.mark.parametrize(
    ("module", "function", "suffix", "refused"),
    [
        (listing, "open_source", ".dc3", None),  # an image of unknown suffix is opened by the scan
        (identity, "read_dataset", ".dcm", False),
        (cropping, "preprocess", ".dcm", True),
        (cropping, "sha256_source", ".dcm", True),
        (etl_command, "transcode", ".dcm", False),
        (contact_sheet, "source_thumbnail", ".dcm", False),
    ],
)
def test_etl_contains_a_failure_of_each_stage(
    module: object,
    function: str,
    suffix: str,
    refused: bool | None,
    inputs: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """`refused` is None if the scan cannot tell that the file is an image, so that it has no row."""
    victim = (inputs / VICTIM).rename(inputs / VICTIM.replace(".dcm", suffix))
    monkeypatch.setattr(f"{__name__}.VICTIM", victim.name)
    failed = inject(monkeypatch, module, function)
    out = tmp_path / "out"
    assert main(["etl", str(inputs), str(out), "--size", "64x32", "--jobs", "1", "--transcode", "htj2k"]) == 0
    rows = rows_by_file(out / "manifest.csv")
    assert failed
    assert set(rows.index) == {"a.dcm", "c.dcm"} | ({victim.name} if refused is not None else set())
    assert (rows.loc[["a.dcm", "c.dcm"], "status"] != "refused").all()
    if refused:
        assert rows.loc[victim.name, "reason"] == "failed"
        assert rows.loc[victim.name, "remark"].startswith("ArithmeticError at ")  # no message, which may quote a header
    assert (out / "etl_report.html").exists()


def test_the_range_of_pictures_is_found_without_one_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grey_range, "RasterFile", lambda path, _: 1 / 0)
    assert grey_range.measure_all_bits([tmp_path / "a.png"], [None], jobs=1) == [0]


STAGES: dict[str, tuple[object, str, Concerns, bool]] = {
    "header": (identity, "read_dataset", names_victim, False),
    "crop": (cropping, "preprocess", names_victim, True),
    "pack": (ScoringStream, "_pack", crops_victim, True),
    "explain": (Predictor, "explain", crops_victim, False),
    "overlay": (image_results, "read_display_image", names_victim, False),
    "DICOM header": (image_results, "read_source_header", names_victim, False),
}
"""Stage of predict -> its function, whether a call works on the victim, and whether a failure refuses the image."""


@pytest.mark.parametrize("stage", STAGES)
def test_predict_contains_a_failure_of_each_stage(
    stage: str, run: Path, inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, function, concerns, refused = STAGES[stage]
    failed = inject(monkeypatch, module, function, concerns)
    images = predict(run, [inputs], tmp_path / "out")
    assert failed
    assert len(images) == 3
    assert (images["status"] == "refused").sum() == refused
    assert images["probability"].notna().sum() == 3 - refused
    unexplained = stage in ("explain", "overlay") or refused
    assert len(list((tmp_path / "out" / "overlays").iterdir())) == 3 - unexplained


def predict(run: Path, sources: list[Path], out: Path) -> pd.DataFrame:
    """Run predict with heat maps and DICOM results and return scores.csv."""
    flags = ["--explain", "rollout", "--dicom", "--jobs", "1"]
    main(["predict", str(run / "package"), *map(str, sources), str(out), *flags])
    return pd.read_csv(out / "scores.csv", dtype=str)


def count_reports(out: Path) -> int:
    """Return the number of studies with a report."""
    results = [dcmread(path) for path in (out / "dicom").iterdir()]
    return len({result.StudyInstanceUID for result in results if result.Modality == "SR"})


def test_the_network_scores_the_other_images_of_a_group_in_which_it_fails(
    run: Path, inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = predict(run, [inputs], tmp_path / "expected").set_index("image_id")
    of_victim = []
    load = ScoringStream.load

    def remember(self: ScoringStream, row: Any, *metadata: Any) -> LoadedImage:
        loaded = load(self, row, *metadata)
        if names_victim(row.path):
            of_victim.append(id(loaded.pack))
        return loaded

    monkeypatch.setattr(ScoringStream, "load", remember)
    inject(monkeypatch, Ensemble, "judge", lambda _, packs: any(id(pack) in of_victim for pack in packs))
    images = predict(run, [inputs], tmp_path / "out").set_index("image_id")
    refused = images[images["status"] == "refused"]
    assert refused["reason"].tolist() == ["failed"]
    others = images.index.difference(refused.index)
    assert images.loc[others, "score"].astype(float).tolist() == pytest.approx(
        expected.loc[others, "score"].astype(float).tolist()
    )
    assert count_reports(tmp_path / "out") == 2


def test_a_report_that_fails_costs_no_other_study_its_report(
    run: Path, inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    instance = str(dcmread(inputs / VICTIM).SOPInstanceUID)

    def reports_victim(breast: Any, _: Any) -> bool:
        return any(image.source.SOPInstanceUID == instance for image in breast.images)

    inject(monkeypatch, structured_report, "structured_reports", reports_victim)
    images = predict(run, [inputs], tmp_path / "out")
    assert images["probability"].notna().all()
    assert count_reports(tmp_path / "out") == 2
    assert "1 scored images are in none" in capsys.readouterr().out


def test_a_table_that_is_not_valid_costs_no_other_input_its_score(run: Path, inputs: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.csv").write_text("colour\nred\n")
    images = predict(run, [inputs / "a.dcm", tmp_path / "bad.csv", inputs / "c.dcm"], tmp_path / "out")
    refused = images[images["status"] == "refused"]
    assert refused["remark"].str.contains("bad.csv").tolist() == [True]
    assert images["probability"].notna().sum() == 2


@pytest.mark.skipif(os.name == "nt", reason="names are bytes on POSIX only")
def test_a_name_that_is_not_utf8_is_read_and_written_as_text(run: Path, inputs: Path, tmp_path: Path) -> None:
    odd = os.path.join(os.fsencode(inputs), b"M\xfcller.dcm")
    os.rename(inputs / VICTIM, odd)
    assert main(["etl", str(inputs), str(tmp_path / "crops"), "--size", "64x32", "--jobs", "1"]) == 0
    rows = rows_by_file(tmp_path / "crops" / "manifest.csv")
    assert rows.loc[r"M\xfcller.dcm", "status"] != "refused"
    assert predict(run, [inputs], tmp_path / "folder")["probability"].notna().all()
    assert predict(run, [Path(os.fsdecode(odd))], tmp_path / "file")["probability"].notna().all()
    again = pd.read_csv(tmp_path / "crops" / "manifest.csv", dtype=str)[["patient_id", "source_path"]]
    again.rename(columns={"source_path": "path"}).to_csv(tmp_path / "again.csv", index=False)
    assert predict(run, [tmp_path / "again.csv"], tmp_path / "again")["probability"].notna().all()
