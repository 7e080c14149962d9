"""The versions of the recipe share one split, v2 and v3 continue an earlier version, and the results are compared."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from hub_stand_in import StandInHub
from safetensors.torch import save

from vitmodel.cli import main
from vitmodel.commands.versions import write_whole_images
from vitmodel.config import Size, VersionsConfig
from vitmodel.config.recipes import RECIPES
from vitmodel.data.manifest import as_manifest, read_manifest
from vitmodel.hub.aliases import ALIASES
from vitmodel.model.architecture import PRESETS
from vitmodel.model.vit import ViT

NAMES = ("backbone", "v2", "v3", "ours")
SMALL = {"model": "vit_micro", "epochs": 1, "workers": 0, "wandb": "off", "batch_size": 16}


@pytest.mark.nightly
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


@pytest.mark.nightly
def test_versions_start_from_weights_by_name(
    hub: StandInHub, release: Path, tmp_path: Path, steps_in_process: None
) -> None:
    """The stand-in of the hub serves weights of the smaller model under the name of the original's."""
    torch.manual_seed(0)
    state = ViT(replace(PRESETS["vit_micro"], channels=3)).state_dict()
    positions = torch.cat([torch.zeros(1, 1, 128), state["pos_embed"].flatten(1, 2)], dim=1)
    hub.add(ALIASES["in21k"].repository, {"model.safetensors": save(dict(state) | {"pos_embed": positions})})
    commit = hub.repositories[ALIASES["in21k"].repository].revisions["main"]
    for name in ("backbone", "v2", "v3"):
        recipe = yaml.safe_load((RECIPES / "versions" / f"{name}.yaml").read_text())
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(recipe | SMALL))
    (tmp_path / "ours.yaml").write_text(yaml.safe_dump(SMALL))
    out = tmp_path / "out"
    arguments = [
        *("--recipes", str(tmp_path), "--ours", str(tmp_path / "ours.yaml"), "--weights", "in21k"),
        *("--size", "48x48", "--our-size", "64x32", "--jobs", "1"),
    ]
    assert main(["versions", str(release), str(out), *arguments]) == 0
    started = [json.loads((out / name / "package" / "config.json").read_text()).get("weights") for name in NAMES]
    assert started[0] == {
        "name": f"hf:{ALIASES['in21k'].repository}",
        "revision": commit,
        "sha256": started[0]["sha256"],
    }
    assert [Path(source["name"]).parts[-3] for source in started[1:3]] == ["backbone", "v2"]
    assert started[3] is None
    assert main(["versions", str(release), str(tmp_path / "none"), *arguments, "--weights", "in21kk"]) == 2
    assert not (tmp_path / "none").exists()


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
