"""Layers: modules import only from layers below, light modules stay light, and forbidden libraries are absent."""

from __future__ import annotations

import ast
import importlib.metadata
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "vitmodel"
LAYERS = [
    {"archives", "config", "console", "errors", "utils"},
    {"hub", "jobs", "web"},
    {"pixels", "model", "metrics"},
    {"data"},
    {"reports", "results", "releases", "phantoms"},
    {"training", "scoring"},
    {"viewer"},
    {"node"},
    {"commands"},
    {"api", "artifacts", "cli"},
    {"__init__", "__main__", "image_ETL", "train", "predict"},
]
"""Packages and root modules from the lowest layer to the highest; see docs/design.md."""
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
LEVEL |= {"errors": -2, "utils": -1}
"""`errors` is below all modules, and `utils` below all packages."""
MODULES = sorted(PACKAGE.rglob("*.py"))


def part_of(path: Path) -> str:
    """Return the package or root module that a file belongs to."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path) -> set[str]:
    """Return the full names of all modules that a file imports, at the top or inside functions."""
    result = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            result.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            result.add(node.module)
            result.update(f"{node.module}.{alias.name}" for alias in node.names)
    return result


def test_every_package_and_root_module_has_a_layer() -> None:
    assert {part_of(path) for path in MODULES} == set(LEVEL)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_module_imports_only_from_layers_below(path: Path) -> None:
    here = part_of(path)
    parts = {name.split(".")[1] for name in imports(path) if name.startswith("vitmodel.")} & set(LEVEL)
    wrong = {name for name in parts - {here, "__init__"} if LEVEL[name] >= LEVEL[here]}
    if here in LAYERS[-2]:  # the root modules may import each other
        wrong -= LAYERS[-2]
    assert not wrong


def test_a_command_never_imports_another_command() -> None:
    for path in (PACKAGE / "commands").glob("*.py"):
        others = {name.split(".")[2] for name in imports(path) if name.startswith("vitmodel.commands.")}
        assert others <= {path.stem}, path


def test_no_module_imports_the_script_shims() -> None:
    shims = {f"vitmodel.{name}" for name in ("image_ETL", "train", "predict")}
    for path in MODULES:
        modules = {node.module for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom)}
        assert not modules & shims, path


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_module_is_named_like_a_library(path: Path) -> None:
    """A script shim has its folder first on the import path until it removes it."""
    libraries = set(sys.stdlib_module_names) | {
        "torch",
        "numpy",
        "lightning",
        "pydicom",
        "cv2",
        "joblib",
        "sklearn",
        "wandb",
        "pandas",
    }
    assert path.stem not in libraries
    assert not {name for name in imports(path) if name.split(".")[0] == "torchvision"}


def test_torchvision_is_not_installed() -> None:
    """Its wheel is incompatible with a CPU build of torch and breaks torchmetrics, lightning and transformers."""
    with pytest.raises(importlib.metadata.PackageNotFoundError):
        importlib.metadata.version("torchvision")


def test_the_command_line_stays_light() -> None:
    code = "import sys, vitmodel.cli as c; c.verb_help('train'); c.parser_for('train'); print(*sys.modules)"
    loaded = set(
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    )
    assert not loaded & {"torch", "numpy", "pandas", "lightning", "cv2", "pydicom", "sklearn", "matplotlib"}


def test_no_dependency_has_a_copyleft_licence() -> None:
    """No installed distribution has the GPL, LGPL or AGPL as licence."""
    for distribution in importlib.metadata.distributions():
        metadata = distribution.metadata
        licence = " ".join([metadata.get("License-Expression") or "", *(metadata.get_all("Classifier") or [])])
        assert "GPL" not in licence, metadata["Name"]
        assert "General Public License" not in licence, metadata["Name"]
