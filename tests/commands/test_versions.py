"""The versions of the recipe share one split, each starts from the one before, and a table and a figure compare them."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest
import yaml

from vitmodel.cli import main
from vitmodel.commands.versions import write_whole_images
from vitmodel.config import Size, VersionsConfig
from vitmodel.config.recipes import RECIPES
from vitmodel.data.manifest import as_manifest, read_manifest

SMALL = {"model": "vit_micro", "epochs": 1, "workers": 0, "wandb": "off", "batch_size": 16}


def test_versions_share_one_split_and_each_starts_from_the_one_before(
    release: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], steps_in_process: None
) -> None:
    """With the shipped recipes, made small enough for a test."""
    for name in ("backbone", "v2", "v3"):
        recipe = yaml.safe_load((RECIPES / "versions" / f"{name}.yaml").read_text())
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(recipe | SMALL))
    (tmp_path / "ours.yaml").write_text(yaml.safe_dump(SMALL))
    arguments = [
        "--recipes",
        str(tmp_path),
        "--ours",
        str(tmp_path / "ours.yaml"),
        "--size",
        "48x48",
        "--our-size",
        "64x32",
        "--jobs",
        "1",
    ]
    out = tmp_path / "out"
    main(["versions", str(release), str(out), *arguments])
    text = (out / "versions.md").read_text()
    assert [line.split("|")[1].strip() for line in text.splitlines() if line.startswith("| ")][1:] == [
        "backbone",
        "v2",
        "v3",
        "ours",
    ]
    assert capsys.readouterr().out.count("--weights") == 2  # v2 and v3 go on; the backbone and ours start from scratch
    splits = [
        read_manifest(out / name / "manifest.csv").dropna(subset=["split"]) for name in ("backbone", "v3", "ours")
    ]
    parts = [table.drop_duplicates("patient_id").set_index("patient_id")["split"].to_dict() for table in splits]
    assert parts[0] == parts[1] == parts[2]
    assert cv2.imread(str(out / "versions.png")) is not None
    whole = read_manifest(out / "whole" / "manifest.csv")
    assert cv2.imread(whole["path"].iloc[0], cv2.IMREAD_UNCHANGED).shape == (48, 48)
    main(["versions", str(release), str(out), *arguments])  # nothing is trained again
    assert "$ vitmodel train" not in capsys.readouterr().out


def test_whole_images_with_inverted_polarity_are_inverted_back(tmp_path: Path) -> None:
    """A picture whose polarity ETL found to be wrong is shown to the original recipe as its negative, which is right."""
    right = np.random.default_rng(0).integers(0, 255, (96, 96), np.uint8)
    for name, picture in (("right", right), ("wrong", 255 - right)):
        cv2.imwrite(str(tmp_path / f"{name}.png"), picture)
    paths = [str(tmp_path / f"{name}.png") for name in ("right", "wrong")]
    ids = ["1", "2"]
    known = {"image_id": ids, "patient_id": ids, "laterality": "L", "view": "CC", "path": paths, "source_path": paths}
    table = as_manifest(pd.DataFrame(known | {"reason": [None, "inverted"]}), "two")
    write_whole_images(table, VersionsConfig(source=tmp_path, out=tmp_path, size=Size(48, 48), jobs=1))
    whole = [
        cv2.imread(path, cv2.IMREAD_UNCHANGED) for path in read_manifest(tmp_path / "whole" / "manifest.csv")["path"]
    ]
    assert np.abs(whole[0].astype(int) - whole[1]).max() <= 1, "but for rounding"
