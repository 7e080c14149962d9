"""The chain of versions runs on one split, each from the best before it, and is drawn as one table and one picture."""

from __future__ import annotations

from pathlib import Path

import cv2
import yaml

from vitmodel.cli import main
from vitmodel.data.manifest import read_manifest

ROOT = Path(__file__).resolve().parents[1]
SMALL = {"model": "vit_micro", "epochs": 1, "workers": 0, "wandb": "off", "batch_size": 16}


def test_the_chain_of_versions(release: Path, tmp_path: Path, capsys) -> None:
    """The shipped recipes, made small enough for a test."""
    for name in ("backbone", "v2", "v3"):
        recipe = yaml.safe_load((ROOT / "configs" / "versions" / f"{name}.yaml").read_text())
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(recipe | SMALL))
    (tmp_path / "ours.yaml").write_text(yaml.safe_dump(SMALL))
    arguments = ["--recipes", str(tmp_path), "--ours", str(tmp_path / "ours.yaml"), "--size", "48x48", "--our-size", "64x32", "--jobs", "1"]
    out = tmp_path / "out"
    main(["versions", str(release), str(out), *arguments])
    text = (out / "versions.md").read_text()
    assert [line.split("|")[1].strip() for line in text.splitlines() if line.startswith("| ")][1:] == ["backbone", "v2", "v3", "ours"]
    assert capsys.readouterr().out.count("--weights") == 2  # v2 and v3 go on; the backbone and ours start from scratch
    splits = [read_manifest(out / name / "manifest.csv").dropna(subset=["split"]) for name in ("backbone", "v3", "ours")]
    parts = [table.drop_duplicates("patient_id").set_index("patient_id")["split"].to_dict() for table in splits]
    assert parts[0] == parts[1] == parts[2]
    assert cv2.imread(str(out / "versions.png")) is not None
    whole = read_manifest(out / "whole" / "manifest.csv")
    assert cv2.imread(whole["path"].iloc[0], cv2.IMREAD_UNCHANGED).shape == (48, 48)
    main(["versions", str(release), str(out), *arguments])  # nothing is trained again
    assert "$ vitmodel train" not in capsys.readouterr().out
