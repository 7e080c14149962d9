"""The versions of the recipe share one split, v2 and v3 continue an earlier version, and the results are compared."""

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


@pytest.mark.slow
def test_versions_share_one_split_and_v2_and_v3_continue_the_version_before(
    release: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], steps_in_process: None
) -> None:
    """The recipes are those of the package with a smaller model and one epoch."""
    for name in ("backbone", "v2", "v3"):
        recipe = yaml.safe_load((RECIPES / "versions" / f"{name}.yaml").read_text())
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(recipe | SMALL))
    (tmp_path / "ours.yaml").write_text(yaml.safe_dump(SMALL))
    arguments = [
        *("--recipes", str(tmp_path), "--ours", str(tmp_path / "ours.yaml")),
        *("--size", "48x48", "--our-size", "64x32", "--jobs", "1"),
    ]
    out = tmp_path / "out"
    main(["versions", str(release), str(out), *arguments])
    text = (out / "versions.md").read_text()
    table = [line.split("|") for line in text.splitlines() if line.startswith("| ")]
    assert [cells[1].strip() for cells in table[1:]] == ["backbone", "v2", "v3", "ours"]
    assert capsys.readouterr().out.count("--weights") == 2  # v2 and v3; the backbone and ours start from scratch
    splits = []
    for name in ("backbone", "v3", "ours"):
        rows = read_manifest(out / name / "manifest.csv").dropna(subset=["split"])
        splits.append(rows.drop_duplicates("patient_id").set_index("patient_id")["split"].to_dict())
    assert splits[0] == splits[1] == splits[2]
    assert cv2.imread(str(out / "versions.png")) is not None
    whole = read_manifest(out / "whole" / "manifest.csv")
    assert cv2.imread(whole["path"].iloc[0], cv2.IMREAD_UNCHANGED).shape == (48, 48)
    main(["versions", str(release), str(out), *arguments])  # nothing is trained again
    assert "$ vitmodel train" not in capsys.readouterr().out


def test_whole_images_with_inverted_polarity_are_inverted_back(tmp_path: Path) -> None:
    """An image and its negative, which has the reason code `inverted`, give the same result up to rounding."""
    normal = np.random.default_rng(0).integers(0, 255, (96, 96), np.uint8)
    paths = [str(tmp_path / "normal.png"), str(tmp_path / "negative.png")]
    cv2.imwrite(paths[0], normal)
    cv2.imwrite(paths[1], 255 - normal)
    ids = ["1", "2"]
    rows = {"image_id": ids, "patient_id": ids, "laterality": "L", "view": "CC", "path": paths, "source_path": paths}
    table = as_manifest(pd.DataFrame(rows | {"reason": [None, "inverted"]}), "two")
    write_whole_images(table, VersionsConfig(source=tmp_path, out=tmp_path, size=Size(48, 48), jobs=1))
    written = read_manifest(tmp_path / "whole" / "manifest.csv")["path"]
    whole = [cv2.imread(path, cv2.IMREAD_UNCHANGED) for path in written]
    assert np.abs(whole[0].astype(int) - whole[1]).max() <= 1
