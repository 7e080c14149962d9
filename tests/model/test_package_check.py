"""Model packages: what was damaged, changed or invented is refused by name, within little time and memory."""

from __future__ import annotations

import hashlib
import json
import logging
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import vitmodel
from vitmodel.cli import main
from vitmodel.config import Preprocessing, Size
from vitmodel.errors import VitmodelError
from vitmodel.model.architecture import NetworkConfig, ViTConfig
from vitmodel.model.network import Network
from vitmodel.model.package import load_models, save_package, verify_package
from vitmodel.model.package_check import CARD_FILE, CONFIG_FILE, TENSORS_FILE, content_digest, record_file, seal

VIT = ViTConfig(image_size=Size(64, 32), dim=24, depth=2, heads=3)
CONTENTS: dict[str, Any] = {
    "label": "cancer",
    "preprocessing": Preprocessing(size=Size(64, 32)).to_json(),
    "packed": True,
    "flip": False,
    "calibration": {"method": "platt", "prevalence": 0.5, "slope": 1.0, "intercept": 0.0, "level": "breast"},
    "calibration_band": {"logits": [-1.0, 2.0], "low": [0.1, 0.7], "high": [0.4, 0.9], "patients": 9, "positives": 3},
    "decision": {"level": "breast", "aggregate": "mean_logit", "threshold": 0.3, "sensitivity": 0.9},
    "history": {"train/loss": [[0, 0.7], [1, None]]},
}


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """Return a package of an untrained network."""
    torch.manual_seed(0)
    network = Network(NetworkConfig(vit=VIT))
    for tensor in network.state_dict().values():
        torch.nn.init.normal_(tensor, std=0.1)
    save_package(tmp_path / "package", network, CONTENTS, "# Card")
    return tmp_path / "package"


def change(package: Path, path: str, value: object, sealed: bool = True) -> None:
    """Set the value at a dotted path of config.json; unless `sealed`, the digests stay as they were."""
    document = json.loads((package / CONFIG_FILE).read_text())
    *parents, last = path.split(".")
    place = document
    for name in parents:
        place = place[name]
    place[last] = value
    if sealed:
        names = document.pop("integrity")["files"]
        document["integrity"] = {"files": names}
        text = json.dumps(document, sort_keys=True, separators=(",", ":"))
        document["integrity"]["digest"] = hashlib.sha256(text.encode()).hexdigest()
    (package / CONFIG_FILE).write_text(json.dumps(document))


def without_digests(package: Path) -> None:
    """Make the package one of a version without digests."""
    document = json.loads((package / CONFIG_FILE).read_text())
    del document["integrity"]
    (package / CONFIG_FILE).write_text(json.dumps(document))


def test_the_digest_is_that_of_the_documented_canonical_json(package: Path) -> None:
    document = json.loads((package / CONFIG_FILE).read_text())
    stated = document["integrity"].pop("digest")
    text = json.dumps(document, sort_keys=True, separators=(",", ":"))
    assert stated == hashlib.sha256(text.encode()).hexdigest() == vitmodel.verify(package).digest
    for name in (TENSORS_FILE, CARD_FILE):
        assert document["integrity"]["files"][name] == hashlib.sha256((package / name).read_bytes()).hexdigest()


@pytest.mark.parametrize("name", [TENSORS_FILE, CONFIG_FILE])
def test_any_flipped_bit_of_tensors_or_values_is_refused(name: str, package: Path) -> None:
    original = (package / name).read_bytes()
    for position in range(8, len(original), max(1, len(original) // 40)):
        damaged = bytearray(original)
        damaged[position] ^= 1 << (position % 7)
        (package / name).write_bytes(damaged)
        if name == CONFIG_FILE and same_json(original, bytes(damaged)):
            continue  # such as 1E-06 for 1e-06
        with pytest.raises(VitmodelError, match=r"model\.safetensors|config\.json"):
            load_models(package)


def same_json(one: bytes, other: bytes) -> bool:
    try:
        return bool(json.loads(one) == json.loads(other))
    except ValueError:
        return False


def test_tensors_of_another_training_are_refused(package: Path, tmp_path: Path) -> None:
    save_package(tmp_path / "other", Network(NetworkConfig(vit=VIT)), CONTENTS, "# Card")
    (package / TENSORS_FILE).write_bytes((tmp_path / "other" / TENSORS_FILE).read_bytes())
    with pytest.raises(VitmodelError, match=r"model\.safetensors: was changed or damaged.*copy the package again"):
        load_models(package)


def test_a_changed_card_is_a_warning_on_loading_and_refused_by_verify(
    package: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (package / CARD_FILE).write_text("# Another card")
    with caplog.at_level(logging.WARNING):
        load_models(package)
    assert "MODEL_CARD.md: was changed" in caplog.text
    with pytest.raises(VitmodelError, match=r"MODEL_CARD\.md: was changed"):
        verify_package(package)
    before = content_digest(package)
    record_file(package, CARD_FILE)
    verify_package(package)
    assert content_digest(package) == before  # the identity of results does not depend on the card


def test_a_package_without_digests_loads_with_a_warning(package: Path, caplog: pytest.LogCaptureFixture) -> None:
    without_digests(package)
    with caplog.at_level(logging.WARNING):
        load_models(package)
    assert "cannot be checked for damage" in caplog.text
    assert vitmodel.verify(package).digest == ""


IMPOSSIBLE = [
    ("decision.threshold", float("nan")),
    ("decision.threshold", -5),
    ("decision.threshold", "0.3"),
    ("decision.threshold", None),
    ("decision.aggregate", "median"),
    ("calibration.slope", float("inf")),
    ("calibration.slope", -1.0),
    ("calibration.slope", 0),
    ("calibration.prevalence", True),
    ("calibration.method", ["platt"]),
    ("calibration", None),
    ("calibration_band", []),
    ("calibration_band.logits", [2.0, -1.0]),
    ("calibration_band.low", [0.1]),
    ("calibration_band.low", [0.5, 0.7]),
    ("calibration_band.high", [0.4, 1.5]),
    ("calibration_band.high", None),
    ("calibration_band.patients", 0),
    ("architecture.heads", 5),
    ("architecture.heads", "3"),
    ("architecture.depth", 100_000),
    ("architecture.dim", 10**30),
    ("architecture.image_size", "128x64"),
    ("architecture.image_size", "100000x100000"),
    ("architecture.mlp_ratio", 1e300),
    ("architecture", []),
    ("flip", "yes"),
    ("packed", 1),
    ("members", 0),
    ("members", "2"),
    ("members", 100_000),
    ("label", 3),
    ("preprocessing", "64x32"),
    ("preprocessing", '{"size": "0x0"}'),
    ("preprocessing", '{"size": "32x64"}'),
    ("preprocessing", '{"size": "100000x100000"}'),
    ("preprocessing", "[" * 5000),
    ("history", {"train/loss": 3}),
    ("integrity.files", {"../x": "0"}),
    ("format_version", True),
]


@pytest.mark.parametrize(("path", "value"), IMPOSSIBLE, ids=lambda value: repr(value)[:30])
def test_an_impossible_value_is_refused_by_its_name(path: str, value: object, package: Path) -> None:
    change(package, path, value, sealed=path != "integrity.files")
    with pytest.raises(VitmodelError) as refused:
        load_models(package)
    message = str(refused.value)
    assert path.split(".")[-1] in message or path.split(".")[0] in message
    assert "\n" not in message
    assert len(message) < 500


@pytest.mark.parametrize("text", ["[]", "[" * 100_000, "{", "3", '{"a": ' * 5000, "\xff"])
def test_a_config_that_is_no_mapping_is_one_sentence(text: str, package: Path) -> None:
    (package / CONFIG_FILE).write_bytes(text.encode("latin-1"))
    with pytest.raises(VitmodelError, match=r"config\.json"):
        load_models(package)


@pytest.mark.parametrize("heads", [2, 4, 6])
def test_heads_that_divide_the_width_but_were_not_trained_are_found_by_the_digest(heads: int, package: Path) -> None:
    change(package, "architecture.heads", heads, sealed=False)
    with pytest.raises(VitmodelError, match=r"integrity\.digest: does not fit"):
        load_models(package)


def test_huge_sizes_are_refused_within_one_gigabyte(package: Path) -> None:
    """Each in its own process, whose address space is limited beyond what importing PyTorch takes."""
    code = (
        "import resource, sys, vitmodel.model.package as p\n"
        "used = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()\n"
        "resource.setrlimit(resource.RLIMIT_AS, (used + 2**30,) * 2)\n"
        "resource.setrlimit(resource.RLIMIT_CPU, (30, 30))\n"
        "try: p.load_models(sys.argv[1])\n"
        "except p.VitmodelError as error: print(error)\n"
    )
    assert resource.getpagesize()
    change(package, "architecture.depth", 100_000)
    done = subprocess.run([sys.executable, "-c", code, str(package)], capture_output=True, text=True, check=True)
    assert "architecture.depth: 100000 is impossible" in done.stdout


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_tensors_that_are_not_finite_are_refused_by_name(value: float, package: Path) -> None:
    tensors = load_file(package / TENSORS_FILE)
    tensors["blocks.1.norm1.weight"][3] = value
    save_file(tensors, package / TENSORS_FILE)
    record_file(package, TENSORS_FILE)
    with pytest.raises(VitmodelError, match=r"blocks\.1\.norm1\.weight holds NaN or infinite"):
        load_models(package)


def test_a_network_that_overflows_on_its_check_image_is_refused(package: Path) -> None:
    tensors = load_file(package / TENSORS_FILE)
    for tensor in tensors.values():
        tensor.fill_(3e38)
    save_file(tensors, package / TENSORS_FILE)
    record_file(package, TENSORS_FILE)
    with pytest.raises(VitmodelError, match="not finite on its check image"):
        load_models(package)


def write_link(path: Path) -> None:
    target = path.parent.parent / "outside"
    target.write_text("secret")
    path.symlink_to(target)


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("weights.pkl", lambda path: path.write_bytes(b"text")),
        ("notes.txt", lambda path: path.write_bytes(b"\x80\x04\x95pickle")),
        ("helper.py", lambda path: path.write_text("print()")),
        ("run", lambda path: path.write_text("#!/bin/sh\n")),
        ("library", lambda path: path.write_bytes(b"\x7fELF\x02")),
        ("card.md", write_link),
    ],
)
def test_pickles_programs_and_links_out_of_the_folder_are_refused(
    name: str, write: Callable[[Path], object], package: Path
) -> None:
    write(package / name)
    with pytest.raises(VitmodelError, match=name):
        load_models(package)


def test_verify_prints_what_it_checked_and_what_it_did_not(package: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (package / "config.json.minisig").write_text("untrusted comment: signature")
    assert main(["verify", str(package)]) == 0
    printed = capsys.readouterr().out
    assert vitmodel.verify(package).digest in printed
    assert "config.json.minisig: is not listed" in printed
    (package / TENSORS_FILE).write_bytes(b"torn")
    assert main(["verify", str(package)]) == 1
    assert capsys.readouterr().err.startswith("vitmodel verify: ")


def test_a_sealed_document_has_no_numbers_that_json_lacks(package: Path) -> None:
    document = json.loads((package / CONFIG_FILE).read_text())
    seal(package, document | {"auroc": float("nan")})
    assert json.loads((package / CONFIG_FILE).read_text())["auroc"] is None
    verify_package(package)
