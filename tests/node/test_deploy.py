"""The files for systemd, Docker and Kubernetes are valid and use options that exist."""

from __future__ import annotations

import shlex
import shutil
import subprocess
import tomllib
from ipaddress import ip_address, ip_network
from pathlib import Path
from typing import Any

import pytest
import yaml

from vitmodel import cli
from vitmodel.config import NodeConfig

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"


def test_the_recipe_is_valid() -> None:
    config = cli.parse("node", ["run", "--config", str(DEPLOY / "node.yaml")])
    assert isinstance(config, NodeConfig)
    assert config.calling == ("MODALITY", "PACS")


def test_the_unit_starts_the_node_with_the_recipe() -> None:
    (line,) = [line for line in (DEPLOY / "vitmodel-node.service").read_text().splitlines() if "ExecStart" in line]
    program, *words = shlex.split(line.partition("=")[2])
    assert program.endswith("/vitmodel")
    assert words == ["node", "run", "--config", "/etc/vitmodel/node.yaml"]


def test_systemd_accepts_the_unit(tmp_path: Path) -> None:
    program = shutil.which("systemd-analyze")
    if program is None:
        pytest.skip("systemd is not installed")
    unit = tmp_path / "vitmodel-node.service"
    text = (DEPLOY / unit.name).read_text()
    unit.write_text(text.replace("/opt/vitmodel/.venv/bin/vitmodel", "/bin/true"))
    done = subprocess.run([program, "verify", unit], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_compose_file_starts_a_node_that_is_confined() -> None:
    services = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]
    node = services["node"]
    config = cli.parse("node", node["command"][1:])
    assert config.destination == "dicom://ORTHANC@orthanc:4242"
    assert config.api_key_file is not None
    assert node["read_only"]
    assert node["cap_drop"] == ["ALL"]
    assert f"node:{config.port}" in services["proxy"]["command"]


def test_the_compose_file_for_single_sign_on_believes_the_proxys_own_address() -> None:
    file = yaml.safe_load((DEPLOY / "compose.sso.yaml").read_text())
    node, proxy = file["services"]["node"], file["services"]["oauth2-proxy"]
    config = cli.parse("node", node["command"][1:])
    (address,) = config.trusted_proxy
    assert address == proxy["networks"]["pages"]["ipv4_address"]
    (network,) = file["networks"]["pages"]["ipam"]["config"]
    assert ip_address(address) in ip_network(network["subnet"])
    assert set(node["networks"]) & set(proxy["networks"]) == {"pages"}, "another network would give another address"
    assert f"--upstream=http://node:{config.port}" in proxy["command"]
    settings = tomllib.loads((DEPLOY / "oauth2-proxy.cfg").read_text())
    assert settings["set_xauthrequest"], "nginx reads these headers"


def kubernetes_objects() -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text()))


def test_the_pods_start_roles_that_complete_each_other(tmp_path: Path) -> None:
    objects = kubernetes_objects()
    recipe = tmp_path / "node.yaml"
    recipe.write_text(next(item["data"]["node.yaml"] for item in objects if item["kind"] == "ConfigMap"))
    roles: set[str] = set()
    for item in objects:
        if item["kind"] == "Deployment":
            pod = item["spec"]["template"]["spec"]
            (container,) = pod["containers"]
            words = [word.replace("/config/node.yaml", str(recipe)) for word in container["args"][1:]]
            words = [word.replace("$(DATABASE)", "postgresql://u@h/n") for word in words]
            config = cli.parse("node", words)
            roles |= set(config.roles)
            assert {mount["name"] for mount in container["volumeMounts"]} == {part["name"] for part in pod["volumes"]}
            assert container["securityContext"]["readOnlyRootFilesystem"]
    assert roles == {"receive", "gather", "score", "send"}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--destination", "pacs:104"], "no known scheme"),
        (["--destination", "dicom://pacs.example.org:104"], "lacks the AE title"),
        (["--destination", "dicom://PACS@host:x"], "port is no number"),
        (["--destination", "dicom://PACS@host:104", "--confirm", "qido"], "--pacs-web"),
        (["--destination", "http://host/dicom-web", "--confirm", "commitment"], "use qido"),
        (["--confirm", "qido"], "needs --destination"),
        (["--explain", "null", "--dicom", "pm"], "heat maps"),
        (["--job", "1"], "the action retry"),
        (["--max-seconds", "1"], "QUIET_SECONDS"),
        (["--ae-title", "A" * 17], "1 to 16"),
        (["--orthanc", "host:8042"], "is no address"),
        (["--find", "dicom://host:104"], "lacks the AE title"),
        (["--find", "ftp://host"], "no known scheme"),
        (["--find", "http://"], "lacks the host"),
        (["--find", "http://a", "--find", "http://a"], "names a PACS twice"),
        (["--find", "http://a", "--find-days", "-1"], "between 0 and 3650"),
        (["--find", "http://a", "--find-seconds", "0"], "between 1 and 86400"),
        (["--find-days", "3"], "needs --find"),
        (["--find-seconds", "3"], "needs --find"),
    ],
)
def test_options_that_cannot_work_are_refused_with_the_remedy(
    flags: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["node", "run", *flags]) == 2
    assert message in capsys.readouterr().err
