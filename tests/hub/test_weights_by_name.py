"""Weights are found by name on the hub, in its cache or as a path, and each failure says what to do."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hub_stand_in import StandInHub, sha256
from safetensors.torch import save
from torch import Tensor

from vitmodel.cli import main
from vitmodel.commands.etl import describe_patches
from vitmodel.config import PredictorConfig, Size
from vitmodel.errors import UsageError, VitmodelError
from vitmodel.hub import aliases
from vitmodel.hub.aliases import ALIASES
from vitmodel.hub.names import HubName, weights_name
from vitmodel.model.architecture import PRESETS
from vitmodel.model.pretrained import preset_of
from vitmodel.model.vit import ViT
from vitmodel.model.weight_source import find_weights, weights_source
from vitmodel.model.weights import HALF_NORMALISATION, PretrainedWeights, load_weights
from vitmodel.scoring.loaded_package import LoadedPackage
from vitmodel.scoring.report_facts import describe_package

CONFIG = json.dumps({"architecture": "vit", "pretrained_cfg": {"mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25]}})
NAME = "timm/vit_micro"


def timm_tensors(preset: str = "vit_micro") -> dict[str, Tensor]:
    """Return random weights with timm's names and shapes."""
    torch.manual_seed(0)
    with torch.no_grad():
        state = dict(ViT(replace(PRESETS[preset], channels=3, classes=21)).state_dict())
    return state | {
        "pos_embed": torch.cat([torch.zeros(1, 1, PRESETS[preset].dim), state["pos_embed"].flatten(1, 2)], 1)
    }


@pytest.fixture(scope="module")
def content() -> bytes:
    """Return the bytes of a file of weights."""
    return save(timm_tensors())


@pytest.fixture
def published(hub: StandInHub, content: bytes) -> StandInHub:
    """Return a hub with one repository of weights."""
    hub.add(NAME, {"model.safetensors": content, "config.json": CONFIG.encode(), "pytorch_model.bin": b"never read"})
    return hub


def test_weights_are_downloaded_once_with_their_config_and_recorded(published: StandInHub, content: bytes) -> None:
    commit = published.repositories[NAME].revisions["main"]
    weights = load_weights(NAME)
    assert weights.tensors["cls_token"].equal(timm_tensors()["cls_token"])
    assert weights.normalisation.std == (0.25, 0.25, 0.25)  # of the downloaded config.json
    source = weights_source(*find_weights(f"hf:{NAME}"))
    assert (source.name, source.revision, source.sha256) == (f"hf:{NAME}", commit, sha256(content))
    assert published.count("GET /cdn/") == 1
    assert published.count("pytorch_model") == 0


def test_a_revision_is_a_tag_a_branch_or_a_commit(published: StandInHub, content: bytes) -> None:
    repository = published.repositories[NAME]
    first = repository.revisions["main"]
    repository.commit({"model.safetensors": save({"other": torch.zeros(400)})}, "refs/pr/1")
    assert find_weights(f"{NAME}@{first}")[1] == HubName(NAME, first)
    assert find_weights(f"hf:{NAME}@refs/pr/1")[1] == HubName(NAME, repository.revisions["refs/pr/1"])
    with pytest.raises(UsageError, match=r"no revision v9.*leave @ out"):
        find_weights(f"{NAME}@v9")


def test_a_revision_that_moved_is_said_and_the_earlier_one_stays_available(
    published: StandInHub, content: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    first = published.repositories[NAME].revisions["main"]
    find_weights(NAME)
    assert "moved" not in caplog.text
    second = published.repositories[NAME].commit({"model.safetensors": content + b""})
    assert find_weights(NAME)[1] == HubName(NAME, second)
    assert f"has moved from {first[:12]} to {second[:12]}; name hf:{NAME}@{first}" in caplog.text
    published.fault = "down"
    assert find_weights(f"hf:{NAME}@{first}")[1] == HubName(NAME, first)


@pytest.mark.parametrize("fault", ["down", "rate", "offline", "unplugged"])
def test_without_the_hub_the_cache_is_used_and_else_the_message_says_what_to_copy(
    fault: str, published: StandInHub, content: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, name = find_weights(NAME)
    constants = pytest.importorskip("huggingface_hub.constants")
    if fault == "offline":
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    elif fault == "unplugged":
        monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    else:
        published.fault = fault
    assert find_weights(NAME) == (path, name)
    message = "limits the rate" if fault == "rate" else "cannot be reached.*hf download timm/absent --local-dir absent"
    with pytest.raises(VitmodelError, match=message):
        find_weights("hf:timm/absent")


def test_a_dropped_connection_is_resumed(
    published: StandInHub, content: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pytest.importorskip("huggingface_hub.constants"), "DOWNLOAD_CHUNK_SIZE", 1 << 16)
    published.fault = "cut"
    path, _ = find_weights(NAME)
    assert path.read_bytes() == content
    assert published.count("/cdn/.* from [1-9]") == 1


def test_a_truncated_download_is_refused_and_the_next_attempt_succeeds(published: StandInHub, content: bytes) -> None:
    published.fault = "short"
    with pytest.raises(VitmodelError, match="cut short; run the same command again"):
        find_weights(NAME)
    published.fault = ""
    assert find_weights(NAME)[0].read_bytes() == content


def test_a_file_damaged_in_the_cache_is_refused_with_the_file_to_delete(published: StandInHub) -> None:
    path, _ = find_weights(NAME)
    path.resolve().write_bytes(path.read_bytes()[:-10])
    with pytest.raises(VitmodelError, match=r"damaged in the cache; delete .*run the same command again") as refusal:
        find_weights(NAME)
    assert str(path.resolve()) in str(refusal.value)


def test_a_full_disk_names_the_cache_and_how_to_move_it(published: StandInHub, monkeypatch: pytest.MonkeyPatch) -> None:
    library = pytest.importorskip("huggingface_hub")

    def full(*_: object, **__: object) -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(library.file_download, "http_get", full)
    with pytest.raises(VitmodelError, match=r"the disk of the cache .* is full.*set HF_HOME"):
        find_weights(NAME)


def test_missing_private_and_gated_repositories_say_how_to_get_access(published: StandInHub) -> None:
    with pytest.raises(UsageError, match=r"no repository.*did you mean timm/vit_base_patch16_224.mae\?.*hf auth login"):
        find_weights("timm/vit_base_patch16_22.mae")
    published.repositories[NAME].private = True
    with pytest.raises(UsageError, match="or it is private"):
        find_weights(NAME)
    published.repositories[NAME].private = False
    published.repositories[NAME].gated = True
    with pytest.raises(UsageError, match=f"access is not granted; accept the terms at .*/{NAME}.*hf auth login"):
        find_weights(NAME)


def test_weights_are_chosen_without_code_or_the_repository_is_refused(hub: StandInHub) -> None:
    tensors = timm_tensors()
    torch.save(tensors, buffer := io.BytesIO())
    hub.add("a/bin", {"pytorch_model.bin": buffer.getvalue(), "README.md": b""})
    assert load_weights("a/bin").tensors["cls_token"].equal(tensors["cls_token"])
    hub.add("a/pickles", {"model.pkl": b"x", "train.py": b"x"})
    with pytest.raises(UsageError, match=r"no weights that can be read without running code.*model.pkl, train.py"):
        load_weights("a/pickles")
    hub.add("a/code", {"pytorch_model.bin": b"\x80\x02cos\nsystem\n(X\x04\x00\x00\x00trueL1tR." + bytes(2000)})
    with pytest.raises(VitmodelError, match=r"pytorch_model\.bin"):
        load_weights("a/code")
    hub.add("a/two", {"one.pth": b"x", "two.pth": b"x"})
    with pytest.raises(UsageError, match=r"several files of weights, one.pth, two.pth; download one"):
        load_weights("a/two")
    names = sorted(tensors)
    parts = {f"model-0000{part}-of-00002.safetensors": names[part - 1 :: 2] for part in (1, 2)}
    index = {"weight_map": {name: part for part, held in parts.items() for name in held}}
    shards = {part: save({name: tensors[name] for name in held}) for part, held in parts.items()}
    hub.add("a/shards", {"model.safetensors.index.json": json.dumps(index).encode()} | shards)
    assert load_weights("a/shards").tensors.keys() == tensors.keys()
    first = weights_source(*find_weights("a/shards")).sha256
    hub.repositories["a/shards"].commit({"model.safetensors.index.json": json.dumps(index).encode(), "x": b""} | shards)
    assert weights_source(*find_weights("a/shards")).sha256 == first


def test_a_path_takes_precedence_over_a_name(
    published: StandInHub, content: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert weights_name("in21k") == HubName(ALIASES["in21k"].repository)
    assert weights_name("dinov2-small@v1") == HubName("facebook/dinov2-small", "v1")
    for text in ("in21k", NAME):
        Path(text).parent.mkdir(exist_ok=True)
        Path(text).write_bytes(content)
        assert find_weights(text) == (Path(text), None)
    for text in ("timm/absent", "a/b/c", "weights/vit.pth", "none"):  # the folder timm exists now
        assert weights_name(text) is None
    with pytest.raises(UsageError, match=r"timm/absent does not exist.*or hf:timm/absent for a repository"):
        find_weights("timm/absent")
    assert published.requests == []


@pytest.mark.parametrize("name", ["hf:", "hf:name", "hf:a/b/c", "hf:../b", "hf:a/b@", "hf:a/b c"])
def test_a_malformed_name_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match="write hf:organisation/name"):
        find_weights(name)


def test_an_unknown_alias_names_the_nearest_ones() -> None:
    with pytest.raises(UsageError, match="did you mean dinov2-small"):
        find_weights("dinov2-smal")


def test_every_alias_names_a_repository_and_a_preset_of_its_size() -> None:
    for name, alias in ALIASES.items():
        assert HubName.parse(alias.repository).repository == alias.repository
        classes = 21_843 if name.startswith("in21k-") else 1_000 if name.startswith("imagenet") else 1
        with torch.device("meta"):
            peer = ViT(replace(PRESETS[alias.preset], channels=3, classes=classes))
        assert alias.megabytes == pytest.approx(4e-6 * sum(tensor.numel() for tensor in peer.parameters()), rel=0.02)


@pytest.mark.parametrize("preset", ["vit_tiny", "vit_small8", "vit_small14", "vit_small14_reg4", "vit_base"])
def test_weights_of_each_kind_fit_one_preset(preset: str) -> None:
    with torch.device("meta"):
        state = dict(ViT(PRESETS[preset]).state_dict())
    weights = PretrainedWeights(Path("w"), state, [], HALF_NORMALISATION, "test")
    assert preset_of(weights) == preset
    deeper = {name.replace("blocks.0.", "blocks.12."): tensor for name, tensor in state.items() if "blocks.0." in name}
    with pytest.raises(UsageError, match=r"depth 13.*no preset of --model fits"):
        preset_of(replace(weights, tensors=state | deeper))


def test_the_list_of_names_says_which_are_cached(
    published: StandInHub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(ALIASES, "micro", aliases.Alias(NAME, "vit_micro", 3, "apache-2.0", "1"))

    def state() -> str:
        assert main(["weights"]) == 0
        return next(line for line in capsys.readouterr().out.splitlines() if line.startswith("micro ")).split()[-1]

    assert state() == "no"
    assert main(["weights", "--download", "micro"]) == 0
    assert "--model vit_micro" in capsys.readouterr().out
    assert state() == published.repositories[NAME].revisions["main"][:12]


def test_a_training_by_name_takes_the_size_from_the_weights_and_packages_their_revision(
    published: StandInHub,
    content: bytes,
    crops: Path,
    flags: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    out = tmp_path / "run"
    short = [*flags[2:], "--epochs", "1", "--freeze", "0"]
    assert main(["train", str(crops / "manifest.csv"), str(out), "--weights", NAME, *short]) == 0
    commit = published.repositories[NAME].revisions["main"]
    package = json.loads((out / "package" / "config.json").read_text())
    source = {"name": f"hf:{NAME}", "revision": commit, "sha256": sha256(content)}
    assert source.items() <= package["weights"].items()
    assert package["architecture"]["dim"] == PRESETS["vit_micro"].dim
    card = (out / "package" / "MODEL_CARD.md").read_text()
    assert f"Initial weights: hf:{NAME}, revision {commit}, SHA-256 {sha256(content)}." in card
    recipe = (out / "train.yaml").read_text()
    assert f"weights: hf:{NAME}@{commit}" in recipe
    assert "model: vit_micro" in recipe
    loaded = LoadedPackage(out / "package", PredictorConfig(package=out / "package"), torch.device("cpu"))
    assert describe_package(loaded)["Initial weights"] == f"hf:{NAME}, revision {commit}, SHA-256 {sha256(content)}"

    # The branch moves; the run goes on with the weights that it started from, and with no others.
    moved = published.repositories[NAME].commit({"model.safetensors": content, "config.json": b"{}"})
    again = ["train", str(crops / "manifest.csv"), str(out), *short, "--resume"]
    assert main([*again, "--weights", NAME]) == 0
    assert main([*again, "--weights", f"{NAME}@main"]) == 2
    assert f"started with other settings than weights: hf:{NAME}@{moved}" in capsys.readouterr().err
    assert f"name hf:{NAME}@{commit} to keep the earlier one" in caplog.text


def test_the_settings_of_the_hub_are_read_from_the_environment(published: StandInHub, tmp_path: Path) -> None:
    """A mirror in HF_ENDPOINT and a cache in HF_HOME, as the user sets them; then offline."""
    environment = os.environ | {"HF_ENDPOINT": published.endpoint, "HF_HOME": str(tmp_path / "home")}
    command = [sys.executable, "-m", "vitmodel", "weights", "--download", NAME]

    def run(**more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(command, env=environment | more, capture_output=True, text=True)

    first = run()
    assert first.returncode == 0, first.stderr
    assert "downloading hf:timm/vit_micro (4 MB) into" in first.stderr
    assert list((tmp_path / "home" / "hub").glob("models--timm--vit_micro/snapshots/*/model.safetensors"))
    published.requests.clear()
    assert run(HF_HUB_OFFLINE="1").stdout == first.stdout
    assert published.requests == []


def test_crops_that_patches_do_not_fill_are_refused_before_the_download(
    hub: StandInHub, crops: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", str(crops / "manifest.csv"), str(tmp_path / "run"), "--weights", "dinov2-small"]) == 2
    assert "crops of 64x32 are not whole patches of 14x14 pixels" in (error := capsys.readouterr().err)
    assert "vitmodel etl --size 70x28" in error
    assert hub.requests == []
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("size", "said"),
    [
        (Size(1024, 512), "whole patches of 8 and 16 pixels; for patches of 14 use --size 1022x518"),
        (Size(112, 112), "whole patches of 8 and 14 and 16 pixels"),
        (Size(100, 50), "no patches fit; for patches of 8 use --size 96x48, of 14 use --size 98x56, of 16 use"),
    ],
)
def test_etl_says_which_patches_the_crops_suit(size: Size, said: str) -> None:
    assert said in describe_patches(size)
