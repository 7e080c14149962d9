"""Which module may import which, what stays light, and what must never be imported."""

from __future__ import annotations

import ast
import importlib.metadata
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "vitmodel"
STAGES = {
    "commands", "image_ETL", "pretrain", "train", "tune", "versions", "evaluate", "compare", "leave_out", "predict", "export", "serve",
    "demo", "info",
}  # fmt: skip
GROUND = {"config", "errors", "utils"}
MAY_IMPORT = {  # of ours, beside its own folder and the ground floor
    "pixels": set(),
    "model": set(),
    "measure": set(),
    "data": {"pixels"},
    "exams": {"data", "model"},
    "batches": {"data", "model"},
    "learner": {"batches", "data", "model", "measure"},
    "monitoring": {"batches", "learner", "data", "measure"},
    "trainer": {"batches", "learner", "monitoring", "model"},
    "fitting": {"batches", "data", "exams", "learner", "model", "monitoring", "trainer"},
    "member": {"model", "measure"},
    "ensemble": {"member", "model", "measure"},
    "scoring_stream": {"data", "ensemble", "exams", "model"},
    "scores": {"data", "ensemble", "exams", "measure", "pixels"},
    "predictor": {"data", "ensemble", "model", "scores", "scoring_stream"},
    "explanation": {"data", "model", "predictor", "results", "scoring_stream"},
    "in_memory": set(),
    "options": set(),
    "prediction": {"results"},
    "artifacts": {"data", "measure"},
    "api": {
        "artifacts",
        "commands",
        "data",
        "evaluate",
        "explanation",
        "in_memory",
        "model",
        "options",
        "prediction",
        "predictor",
        "results",
    },
    "__init__": {"api", "artifacts", "explanation", "in_memory", "measure", "model", "prediction"},
    "results": {"pixels"},
    "steps": set(),
    "evaluation": {"data", "measure"},
    "config": set(),
    "errors": set(),
    "utils": set(),
    "cli": set(),
    "__main__": {"cli"},
}
MODULES = sorted(PACKAGE.rglob("*.py"))


def floor(path: Path) -> str:
    """The folder or root module that a file belongs to."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path) -> set[str]:
    """The full names of all modules that a file imports, at the top or inside functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
    return found


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_module_imports_only_from_the_floors_below(path: Path) -> None:
    ours = {name.split(".")[1] for name in imports(path) if name.startswith("vitmodel.")} - {"__version__", "__doc__"}
    here = floor(path)
    if here in STAGES:
        allowed = set(MAY_IMPORT) - {"cli"} | {"pixels", "data", "model", "measure"}
        ours -= {"cli"}  # the two lines that let a stage run as a file
        assert not ours & STAGES, "a stage never imports a stage"
    else:
        allowed = MAY_IMPORT.get(here, set()) | {here}
    assert ours <= allowed | GROUND


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_module_hides_another(path: Path) -> None:
    """Running a stage as a file puts its folder first on the import path for a moment."""
    known = set(sys.stdlib_module_names) | {"torch", "numpy", "lightning", "pydicom", "cv2", "joblib", "sklearn", "wandb", "pandas"}
    assert path.stem not in known
    assert not {name for name in imports(path) if name.split(".")[0] == "torchvision"}


def test_torchvision_is_not_installed() -> None:
    """Its wheel does not fit a CPU torch and breaks torchmetrics, lightning and transformers."""
    with pytest.raises(importlib.metadata.PackageNotFoundError):
        importlib.metadata.version("torchvision")


def test_the_command_line_stays_light() -> None:
    code = "import sys, vitmodel.cli as c; c.verb_help('train'); c.parser_for('train'); print(*sys.modules)"
    loaded = set(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split())
    assert not loaded & {"torch", "numpy", "pandas", "lightning", "cv2", "pydicom", "sklearn", "matplotlib"}


def test_no_dependency_is_gpl() -> None:
    """Of everything installed here, nothing may carry the GPL or AGPL (the LGPL of a shared library may)."""
    for distribution in importlib.metadata.distributions():
        metadata = distribution.metadata
        licence = " ".join([metadata.get("License-Expression") or "", *(metadata.get_all("Classifier") or [])])
        assert "GPL" not in licence.replace("LGPL", "").replace("Lesser General Public License", ""), metadata["Name"]
        assert "General Public License" not in licence.replace("Lesser General Public License", ""), metadata["Name"]
