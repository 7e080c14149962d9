"""Packages are shared by name or as one file; each is verified before anything in it is used."""

from __future__ import annotations

import json
import os
import shutil
import stat
import zipfile
from pathlib import Path

import pandas as pd
import pytest
import yaml
from hub_stand_in import StandInHub

import vitmodel
from vitmodel.cli import main
from vitmodel.commands.push import push
from vitmodel.config import PushConfig
from vitmodel.errors import UsageError, VitmodelError
from vitmodel.model import shared_package
from vitmodel.model.package import load_package
from vitmodel.model.package_check import seal
from vitmodel.model.package_file import pack, unpack
from vitmodel.model.shared_package import check_shared_folder, find_package
from vitmodel.reports.hub_card import card_metrics, hub_card

NAME = "hf:clinic/model"


@pytest.fixture
def package(run: Path, tmp_path: Path) -> Path:
    """Return a copy of a trained package, which a test may change."""
    return Path(shutil.copytree(run / "package", tmp_path / "package"))


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_pushed_package_is_private_and_scores_by_name_as_the_folder_does(
    hub: StandInHub, package: Path, run: Path, release: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    assert main(["push", str(package), NAME]) == 0
    repository = hub.repositories["clinic/model"]
    assert repository.private
    pushed = repository.commits[repository.revisions["main"]]
    assert {name: content for name, content in pushed.items() if name != "README.md"} == files_of(package)
    images = sorted((release / "train_images").rglob("*.dcm"))[:3]
    by_path, by_name = (
        vitmodel.load(source, progress=False, device="cpu").predict(images).images for source in (package, NAME)
    )
    pd.testing.assert_frame_equal(by_path, by_name)
    out = tmp_path / "scores"
    main(["predict", NAME, *map(str, images), str(out), "--ensemble", str(package), "--device", "cpu"])
    scored = pd.read_csv(out / "scores.csv")
    assert scored["score"].to_numpy() == pytest.approx(by_path["score"].to_numpy(), abs=1e-6, nan_ok=True)
    hub.fault = "down"  # afterwards, the cache serves
    assert main(["predict", NAME, str(images[0]), str(tmp_path / "again"), "--device", "cpu"]) in (0, 1)


def test_evaluate_compare_and_info_take_names(
    hub: StandInHub, package: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.add("clinic/model", files_of(package))
    commit = hub.repositories["clinic/model"].revisions["main"]
    manifest = str(run / "manifest.csv")
    few = ["--split", "all", "--replicates", "100", "--no-audit", "--device", "cpu"]
    assert main(["evaluate", NAME, manifest, str(tmp_path / "report"), *few]) == 0
    assert "no model card is written" in capsys.readouterr().out
    facts = json.loads((tmp_path / "report" / "metrics.json").read_text())
    assert f"{NAME}@{commit}" in json.dumps(facts)
    assert main(["compare", NAME, str(package), manifest, "--split", "all", "--replicates", "100"]) == 0
    assert f"{NAME}@{commit}" in capsys.readouterr().out
    assert main(["info", NAME]) == 0
    assert "M parameters" in capsys.readouterr().out


def test_the_card_has_the_metadata_of_the_hub_with_the_metrics_of_the_evaluation(
    hub: StandInHub, package: Path, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    few = ["--split", "all", "--replicates", "100", "--no-audit", "--device", "cpu"]
    report = tmp_path / "report"
    main(["evaluate", str(package), str(run / "manifest.csv"), str(report), *few])
    main(["push", str(package), NAME, "--public", "--licence", "cc-by-4.0"])
    repository = hub.repositories["clinic/model"]
    assert not repository.private
    text = repository.commits[repository.revisions["main"]]["README.md"].decode()
    _, front, body = text.split("---\n", 2)
    metadata = yaml.safe_load(front)
    assert (metadata["license"], metadata["pipeline_tag"]) == ("cc-by-4.0", "image-classification")
    assert metadata["datasets"] == ["rsna"]
    (result,) = metadata["model-index"][0]["results"]
    shown = {metric["name"]: metric["value"] for metric in result["metrics"]}
    (auroc,) = [metric for metric in card_metrics(text) if metric[:2] == ("AUROC", "per breast")]
    measured = json.loads((report / "metrics.json").read_text())["breast"]["intervals"]["auroc"]
    assert auroc[2:] == pytest.approx(tuple(measured[key] for key in ("value", "low", "high")), abs=5e-4)
    assert shown[f"AUROC per breast (95 % interval {auroc.low:g} to {auroc.high:g})"] == auroc.value
    assert "Research software, not a medical device" in body
    library = pytest.importorskip("huggingface_hub")
    parsed = library.ModelCard(text).data
    assert parsed.eval_results[0].metric_value == result["metrics"][0]["value"]


def test_a_card_without_evaluation_has_no_metrics() -> None:
    metadata = yaml.safe_load(hub_card("a/b", "# Card\n", {}, "unknown").split("---\n")[1])
    assert not {"metrics", "model-index", "datasets", "base_model"} & metadata.keys()
    started = {"weights": {"name": "hf:facebook/dinov2-small"}}
    assert "base_model: facebook/dinov2-small" in hub_card("a/b", "# Card\n", started, "unknown")


def test_an_upload_replaces_the_head_and_spares_public_repositories(
    hub: StandInHub, package: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    repository = hub.add("clinic/model", {"model.fp32.onnx": b"old", ".gitattributes": b"x"})
    assert main(["push", str(package), NAME]) == 2
    assert "the repository is public" in capsys.readouterr().err
    assert main(["push", str(package), NAME, "--public", "--message", "Second"]) == 0
    assert set(repository.commits[repository.revisions["main"]]) == {*files_of(package), "README.md", ".gitattributes"}
    assert hub.terms == ["Second"]
    hub.fault = "denied"
    assert main(["push", str(package), NAME, "--public"]) == 2
    assert "access is denied; run `hf auth login`" in capsys.readouterr().err
    hub.fault = "down"
    assert main(["push", str(package), NAME, "--public"]) == 1
    assert "cannot be reached" in (error := capsys.readouterr().err)
    assert "nothing was changed there; repeat the command with a network, or give the package away" in error


def test_a_licence_for_commercial_use_is_refused_after_weights_without_it(
    hub: StandInHub, package: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = json.loads((package / "config.json").read_text())
    config["weights"] = {"name": "hf:timm/vit_base_patch16_224.mae", "revision": None, "sha256": ""}
    seal(package, config)
    assert main(["push", str(package), NAME, "--licence", "mit"]) == 2
    assert "has cc-by-nc-4.0" in capsys.readouterr().err
    assert hub.requests == []


@pytest.mark.parametrize("name", ["clinic/model", "hf:model", "hf:clinic/model@v1", "run"])
def test_a_push_needs_the_name_of_a_repository(name: str) -> None:
    with pytest.raises(UsageError, match="write hf:organisation/name"):
        push(PushConfig(package=Path("p"), name=name))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"extra.pkl": b"x"}, "holds extra.pkl, which could run code"),
        ({"code/model.py": b"x"}, "which could run code"),
        ({"sub/model.json": b"{}"}, "is no file of a package"),
        ({"notes.txt": b"x"}, "'notes.txt' is no file of a package"),
        ({"model.safetensors": None}, "model.safetensors is missing"),
        ({"config.json": b'{"format_version": 9, "architecture": {}}'}, "format_version 9"),
        ({"MODEL_CARD.md": bytes((1 << 20) + 1)}, "more than the 1 MB"),
    ],
)
def test_a_repository_that_is_no_safe_package_is_refused(
    changes: dict[str, bytes | None], message: str, hub: StandInHub, package: Path
) -> None:
    files = {**files_of(package), **changes}
    hub.add("clinic/model", {name: content for name, content in files.items() if content is not None})
    with pytest.raises(VitmodelError, match=message):
        find_package(NAME)
    if "format" not in message:
        assert hub.count("resolve") == 0  # refused by its list of files


def test_a_path_takes_precedence_and_names_need_the_prefix(hub: StandInHub, package: Path) -> None:
    assert find_package(package) == (package, None)
    assert find_package("clinic/model") == (Path("clinic/model"), None)
    with pytest.raises(UsageError, match="no repository of this name"):
        find_package(NAME)


def test_a_package_that_links_outside_is_refused(package: Path, tmp_path: Path) -> None:
    check_shared_folder(package)
    secret = tmp_path / "secret.json"
    secret.write_text("{}")
    (package / "extra.json").symlink_to(secret)
    with pytest.raises(VitmodelError, match=r"'extra.json' is a link"):
        check_shared_folder(package)
    with pytest.raises(VitmodelError, match=r"'extra.json' is a link"):
        check_shared_folder(package, within=package)
    check_shared_folder(package, within=tmp_path)


def test_a_packed_package_has_the_same_bytes_each_time_and_unpacks_to_the_same_files(
    package: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["pack", str(package), str(tmp_path / "a.zip")]) == 0
    again = Path(shutil.copytree(package, tmp_path / "elsewhere"))
    for path in again.iterdir():
        os.utime(path, (1e9, 1e9))
        path.chmod(0o600)
    pack(again, tmp_path / "b.zip")
    assert (tmp_path / "a.zip").read_bytes() == (tmp_path / "b.zip").read_bytes()
    assert main(["unpack", str(tmp_path / "a.zip"), str(tmp_path / "new" / "package")]) == 0
    assert files_of(tmp_path / "new" / "package") == files_of(package)
    load_package(tmp_path / "new" / "package")
    for verb, out in (("pack", "a.zip"), ("unpack", "package")):
        source = package if verb == "pack" else tmp_path / "a.zip"
        assert main([verb, str(source), str(tmp_path / out)]) == 2
        assert "exists; delete it or choose another" in capsys.readouterr().err


def write_zip(path: Path, members: dict[str, bytes], **attributes: int) -> Path:
    """Write a zip whose members have these attributes."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            info = zipfile.ZipInfo(name)
            for attribute, value in attributes.items():
                setattr(info, attribute, value)
            archive.writestr(info, content)
    return path


def test_hostile_files_are_refused_and_write_nothing(
    package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = files_of(package)
    cases = {
        "is no file of a package": {"../outside.json": b"{}"},
        "is no file": {"/tmp/absolute.json": b"{}"},
        "could run code": {"model.pkl": b""},
        "is missing": {},
    }
    out = tmp_path / "out"
    for message, extra in cases.items():
        members = {**good, **extra} if extra else {"config.json": b"{}"}
        with pytest.raises(VitmodelError, match=message):
            unpack(write_zip(tmp_path / "hostile.zip", members), out)
    for message, attributes in {
        "is a link or a folder": {"external_attr": (stat.S_IFLNK | 0o777) << 16},
        "is compressed or encrypted": {"compress_type": zipfile.ZIP_DEFLATED},
    }.items():
        with pytest.raises(VitmodelError, match=message):
            unpack(write_zip(tmp_path / "hostile.zip", good, **attributes), out)
    with zipfile.ZipFile(tmp_path / "twice.zip", "w") as archive:
        archive.writestr("config.json", b"{}")
        archive.writestr("CONFIG.json", b"{}")
    with pytest.raises(VitmodelError, match="two files of one name"):
        unpack(tmp_path / "twice.zip", out)
    pack(package, tmp_path / "good.zip")
    content = (tmp_path / "good.zip").read_bytes()
    middle = len(content) // 2
    flipped = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
    for damaged in (content[:-200], b"no zip", flipped):
        (tmp_path / "damaged.zip").write_bytes(damaged)
        with pytest.raises(VitmodelError, match="is damaged"):
            unpack(tmp_path / "damaged.zip", out)
    with pytest.raises(UsageError, match="does not exist"):
        unpack(tmp_path / "absent.zip", out)
    monkeypatch.setitem(shared_package.LARGEST, ".safetensors", 1000)
    with pytest.raises(VitmodelError, match=r"model\.safetensors has"):
        unpack(tmp_path / "good.zip", out)
    assert not out.exists()
    assert not (tmp_path / "outside.json").exists()
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".out")]


def test_a_member_longer_than_its_header_says_is_refused(package: Path, tmp_path: Path) -> None:
    """The size that was checked bounds what is written."""
    pack(package, tmp_path / "good.zip")
    content = bytearray((tmp_path / "good.zip").read_bytes())
    entry = content.rindex(b"PK\x01\x02", 0, content.rindex(b"MODEL_CARD.md"))  # of the central directory
    size = slice(entry + 24, entry + 28)
    assert int.from_bytes(content[size], "little") == (package / "MODEL_CARD.md").stat().st_size
    content[size] = (10).to_bytes(4, "little")
    (tmp_path / "lying.zip").write_bytes(content)
    with pytest.raises(VitmodelError, match="is damaged"):
        unpack(tmp_path / "lying.zip", tmp_path / "out")
    assert not (tmp_path / "out").exists()
