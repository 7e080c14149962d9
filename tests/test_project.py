"""The project: one-line extension points, an installable wheel, and project files that are consistent."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

from vitmodel.config import TrainConfig
from vitmodel.config.choices import EXPLANATIONS, LOSSES, load_choice
from vitmodel.config.recipes import RECIPES, recipe_names, recipe_path, with_recipe_paths
from vitmodel.errors import UsageError
from vitmodel.releases import registry

ROOT = Path(__file__).resolve().parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def run_python(code: str, cwd: Path, path: Path) -> str:
    """Return what `code` prints in a new process that finds `vitmodel` in `path`."""
    environment = os.environ | {"PYTHONPATH": str(path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-P", "-c", code], cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def add_line(path: Path, after: str, line: str) -> None:
    """Insert one line after the line that ends with `after`."""
    text = path.read_text()
    assert text.count(f"{after}\n") == 1
    path.write_text(text.replace(f"{after}\n", f"{after}\n{line}\n"))


# Extension points: CONTRIBUTING.md promises one file and one line for each.

LOSS = """
import torch
import torch.nn.functional as F

def hinge(smoothing=0.0):
    return lambda logits, labels: F.relu(1 - logits * (2 * labels - 1))
"""

EXPLANATION = """
from vitmodel.model.explain import explanation

@explanation(unit="grey levels", scale=(0, 1))
def brightness(model, image):
    return image.scatter_to_grid([image.images[0].mean() * (image.patch_indices[0] >= 0)])[0]
"""

ADAPTER = """
import pandas as pd
from vitmodel.data.manifest import as_manifest

EXPECTED_FILES = "a file dummy.txt"

def detect(source):
    return source.find_file("dummy.txt") is not None

def read(source):
    image = {"image_id": "1", "patient_id": "1", "laterality": "L", "view": "CC", "path": str(source.folder / "1.png")}
    return as_manifest(pd.DataFrame([image]).assign(dataset="dummy"), "dummy")
"""


@pytest.fixture(scope="module")
def extended(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a copy of the package with a new file and a new line each for a loss, an explanation and an adapter."""
    root = tmp_path_factory.mktemp("extended")
    package = shutil.copytree(ROOT / "vitmodel", root / "vitmodel", ignore=shutil.ignore_patterns("__pycache__"))
    (package / "model" / "hinge.py").write_text(LOSS)
    (package / "model" / "brightness.py").write_text(EXPLANATION)
    add_line(
        package / "config" / "choices.py",
        f'    "pf1": "{LOSSES["pf1"]}",',
        '    "hinge": "vitmodel.model.hinge:hinge",',
    )
    last = f'    "integrated": "{EXPLANATIONS["integrated"]}",'
    add_line(package / "config" / "choices.py", last, '    "brightness": "vitmodel.model.brightness:brightness",')
    registry_copy = root / Path(registry.__file__).relative_to(ROOT)
    (registry_copy.parent / "dummy.py").write_text(ADAPTER)
    add_line(registry_copy, '    "vindr": adapter("vindr"),', '    "dummy": adapter("dummy"),')
    return root


def test_a_loss_is_added_by_one_file_and_one_line(extended: Path, tmp_path: Path) -> None:
    code = """
import torch
from vitmodel.cli import main, parse
from vitmodel.training.losses import make_loss
print(parse("train", ["manifest.csv", "run", "--loss", "hinge"]).loss)
print(make_loss("hinge")(torch.tensor([0.5, 0.5]), torch.tensor([1.0, 0.0])).tolist())
try:
    main(["train", "--help"])
except SystemExit:
    pass
"""
    name, values, *help_text = run_python(code, tmp_path, extended).splitlines()
    assert name == "hinge"
    assert values == "[0.5, 1.5]"
    assert "hinge" in "".join(help_text), "the help lists the new choice"


def test_an_explanation_is_added_by_one_file_and_one_line(extended: Path, tmp_path: Path) -> None:
    code = """
import torch
from vitmodel.cli import parse
from vitmodel.model import explain
print(parse("predict", ["package", "source", "out", "--explain", "brightness"]).explain)
print("brightness" in explain.METHODS, explain.method_named("brightness").unit)
"""
    assert run_python(code, tmp_path, extended).splitlines() == ["brightness", "True grey levels"]


def test_a_release_adapter_is_added_by_one_file_and_one_line(extended: Path, tmp_path: Path) -> None:
    (tmp_path / "dummy.txt").touch()
    code = f"""
from vitmodel.releases.registry import read_release
print(*read_release({str(tmp_path)!r})["dataset"])
"""
    assert run_python(code, tmp_path, extended).split() == ["dummy"]


def test_every_adapter_implements_the_protocol() -> None:
    for name, adapter in registry.RELEASE_ADAPTERS.items():
        assert isinstance(adapter.EXPECTED_FILES, str), name
        assert callable(adapter.detect), name
        assert callable(adapter.read), name


@pytest.mark.parametrize(("registry", "field"), [(LOSSES, "loss"), (EXPLANATIONS, "explain")])
def test_every_registered_choice_loads_and_others_are_refused(registry: dict[str, str], field: str) -> None:
    for name in registry:
        assert callable(load_choice(registry, field, name))
    with pytest.raises(UsageError, match=rf"{field}.*mse.*{', '.join(registry)}"):
        load_choice(registry, field, "mse")


def test_the_registries_import_nothing_heavy(tmp_path: Path) -> None:
    loaded = run_python("import sys, vitmodel.config.choices; print(*sys.modules)", tmp_path, ROOT).split()
    assert not {"torch", "numpy", "pandas"} & set(loaded)


# Recipes


@pytest.mark.parametrize("name", recipe_names())
def test_every_packaged_recipe_is_a_valid_training(name: str) -> None:
    from vitmodel.cli import parse

    config = parse("train", ["manifest.csv", "run", "--config", name])
    assert isinstance(config, TrainConfig)
    assert config.model == yaml.safe_load(recipe_path(name).read_text())["model"]


def test_a_file_takes_precedence_over_a_packaged_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert recipe_path("rsna") == RECIPES / "rsna.yaml"
    (tmp_path / "rsna").write_text("model: vit_tiny\n")
    assert recipe_path("rsna") == Path("rsna")


def test_the_config_flag_is_resolved_in_both_spellings() -> None:
    path = str(RECIPES / "rsna.yaml")
    assert with_recipe_paths(["m", "--config", "rsna", "--lr", "1"]) == ["m", "--config", path, "--lr", "1"]
    assert with_recipe_paths(["--config=rsna"]) == [f"--config={path}"]


def test_an_unknown_recipe_is_refused_with_the_names_of_all() -> None:
    with pytest.raises(UsageError, match=r"config: nothing\.yaml does not exist.*rsna"):
        recipe_path("nothing.yaml")


# The wheel


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder into which the wheel of this checkout is installed, without its dependencies."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(ROOT / "vitmodel", source / "vitmodel", ignore=shutil.ignore_patterns("__pycache__"))
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder / "dist"), str(source)]
    done = subprocess.run(build, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = (folder / "dist").glob("*.whl")
    target = folder / "site"
    pip = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--no-index",
        "--target",
        str(target),
        str(wheel),
    ]
    subprocess.run(pip, check=True, capture_output=True)
    return target


@pytest.mark.slow
def test_the_wheel_holds_every_file_of_the_package(installed: Path) -> None:
    def files(folder: Path) -> set[str]:
        return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file() and path.suffix != ".pyc"}

    assert files(ROOT / "vitmodel") == files(installed / "vitmodel")


@pytest.mark.slow
def test_the_wheel_works_outside_the_checkout(installed: Path, tmp_path: Path) -> None:
    """Templates are rendered (in the ETL report), and recipes are found by name."""
    environment = os.environ | {"PYTHONPATH": str(installed)}

    def vitmodel(*arguments: str) -> str:
        command = [sys.executable, "-P", "-m", "vitmodel.cli", *arguments]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    code = "import vitmodel; print(vitmodel.__file__)"
    assert run_python(code, tmp_path, installed).startswith(str(installed)), "the checkout is imported, not the wheel"
    assert "train" in vitmodel("--help")
    vitmodel("synth", "release", "--patients", "2", "--size", "256x208", "--jobs", "1")
    vitmodel("etl", "release", "crops", "--size", "64x32", "--jobs", "1")
    assert "<html" in (tmp_path / "crops" / "etl_report.html").read_text()
    code = "from vitmodel.cli import parse; print(parse('train', ['m', 'r', '--config', 'rsna']).model)"
    assert run_python(code, tmp_path, installed).split() == ["vit_small14"]


@pytest.mark.slow
def test_every_template_of_the_wheel_loads(installed: Path, tmp_path: Path) -> None:
    code = """
import pathlib, jinja2, vitmodel
folder = pathlib.Path(vitmodel.__file__).parent
count = 0
for templates in sorted(folder.glob("*/templates")):
    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(templates))
    for name in environment.list_templates(extensions=["j2"]):
        environment.get_template(name)
        count += 1
print(count)
"""
    assert int(run_python(code, tmp_path, installed)) == len(list((ROOT / "vitmodel").rglob("*.j2"))) > 0


# Project files


def test_the_citation_file_agrees_with_the_package() -> None:
    from vitmodel import __version__

    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "type", "authors"} <= set(citation)
    assert citation["cff-version"] == "1.2.0"
    assert citation["type"] == "software"
    assert citation["version"] == __version__
    assert citation["license"] == PYPROJECT["project"]["license"]
    assert citation["title"] == PYPROJECT["project"]["name"]
    assert [author["name"] for author in citation["authors"]] == [
        author["name"] for author in PYPROJECT["project"]["authors"]
    ]


@pytest.mark.parametrize(
    "path", sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml")), ids=lambda path: path.stem
)
def test_issue_forms_follow_the_schema(path: Path) -> None:
    """GitHub does not show a form that lacks these keys or repeats an id."""
    form = yaml.safe_load(path.read_text())
    if path.stem == "config":
        assert set(form) <= {"blank_issues_enabled", "contact_links"}
        return
    assert {"name", "description", "body"} <= set(form)
    fields = [field for field in form["body"] if field["type"] != "markdown"]
    assert {field["type"] for field in fields} <= {"input", "textarea", "dropdown", "checkboxes"}
    assert all(field["attributes"]["label"] for field in fields)
    ids = [field["id"] for field in fields]
    assert len(ids) == len(set(ids))


def make_targets() -> set[str]:
    """Return the names that `make` accepts."""
    (line,) = [line for line in (ROOT / "Makefile").read_text().splitlines() if line.startswith(".PHONY:")]
    return set(line.split()[1:])


def test_pre_commit_hooks_are_targets_of_the_makefile() -> None:
    (local,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert local["repo"] == "local", "hooks need no network"
    for hook in local["hooks"]:
        assert hook["language"] == "system"
        program, target = hook["entry"].split()
        assert program == "make"
        assert target in make_targets()


def test_the_workflow_runs_the_ci_script_on_every_supported_python() -> None:
    (job,) = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())["jobs"].values()
    versions = job["strategy"]["matrix"]["python"]
    prefix = "Programming Language :: Python :: 3."
    minors = [name.removeprefix(prefix) for name in PYPROJECT["project"]["classifiers"] if name.startswith(prefix)]
    assert versions == [f"3.{minor}" for minor in minors]
    assert PYPROJECT["project"]["requires-python"] == f">={versions[0]}"
    assert ".ci/run" in [step.get("run") for step in job["steps"]]
    assert job["env"]["PIP_EXTRA_INDEX_URL"].endswith("/cpu"), "PyPI's torch brings CUDA"


def dockerfile() -> list[tuple[str, str]]:
    """Return the instructions of the Dockerfile with their arguments."""
    lines = (ROOT / "Dockerfile").read_text().replace("\\\n", " ").splitlines()
    words = [line.split(maxsplit=1) for line in lines if line and not line.startswith("#")]
    return [(instruction, argument) for instruction, argument in words]


def test_the_dockerfile_installs_as_the_readme_does() -> None:
    """Every RUN line is a target of the Makefile or prepares the system, and the last one installs."""
    commands = [argument for instruction, argument in dockerfile() if instruction == "RUN"]
    assert commands[-2] == "make install"
    assert commands[-1].startswith('if [ -n "$EXTRAS" ]; then .venv/bin/pip install --constraint constraints.txt')
    assert "install" in make_targets()
    for command in commands[:-2]:
        assert re.match(r"apt-get update && apt-get install --yes --no-install-recommends |useradd ", command), command
        assert "pip" not in command


def test_the_container_does_not_run_as_root() -> None:
    instructions = dockerfile()
    names = [instruction for instruction, _ in instructions]
    assert [argument for instruction, argument in instructions if instruction == "USER"] == ["vitmodel"]
    assert names.index("USER") < names.index("COPY"), "the package is installed by the user who runs it"
    assert not any(
        argument.endswith(":latest") or ":" not in argument for name, argument in instructions if name == "FROM"
    )
    assert all(argument.startswith("[") for name, argument in instructions if name in ("ENTRYPOINT", "CMD")), (
        "commands run without a shell"
    )
    assert "ADD" not in names


def test_the_docker_context_contains_the_files_of_the_build() -> None:
    ignored = set((ROOT / ".dockerignore").read_text().split())
    assert not ignored & {"Makefile", "pyproject.toml", "constraints.txt", "README.md", "LICENSE", "vitmodel"}
    assert {".git", ".venv"} <= ignored


# The log


def slug(heading: str) -> str:
    """Return the anchor that GitHub gives to a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def test_the_index_of_the_log_links_to_every_entry() -> None:
    text = (ROOT / "dev" / "LOG.md").read_text()
    sections = re.findall(r"^## (\d{4}-\d{2}-\d{2} .*)$", text, re.MULTILINE)
    linked = set(re.findall(r"\]\(#([^)]+)\)", text))
    assert linked == {slug(section) for section in sections}


def test_the_pictures_of_the_log_exist() -> None:
    for name in re.findall(r"!\[[^]]*\]\(([^)]+)\)", (ROOT / "dev" / "LOG.md").read_text()):
        assert (ROOT / "dev" / name).is_file(), name


def test_the_changelog_has_an_unreleased_section_with_known_kinds() -> None:
    text = (ROOT / "CHANGELOG.md").read_text()
    assert re.findall(r"^## (.*)$", text, re.MULTILINE)[0] == "[Unreleased]"
    kinds = {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}
    assert set(re.findall(r"^### (.*)$", text, re.MULTILINE)) <= kinds


@pytest.mark.parametrize("name", ["CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md"])
def test_links_and_paths_of_project_files_exist(name: str) -> None:
    text = (ROOT / name).read_text()
    targets = re.findall(r"\]\((?!http|#)([^)#]+)\)", text) + re.findall(
        r"`((?:vitmodel|tests|benchmarks|docs|dev)/[\w/.-]+)`", text
    )
    for target in targets:
        assert (ROOT / target).exists(), target


@pytest.mark.parametrize("target", re.findall(r"`make ([\w-]+)`", (ROOT / "CONTRIBUTING.md").read_text()))
def test_contributing_names_targets_of_the_makefile(target: str) -> None:
    assert target in make_targets()
