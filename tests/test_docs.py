"""The documentation: tutorials run as printed, commands parse, the reference is complete, the site builds offline."""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType

import pytest

from vitmodel import cli

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
TUTORIALS = sorted(path.name for path in (DOCS / "tutorials").glob("*.md") if "```bash" in path.read_text())
PARSERS = functools.cache(cli.parser_for)  # most of the time is spent on building parsers
PAGES = [ROOT / "README.md", *sorted(DOCS.glob("**/*.md"))]


def blocks_of(page: Path, *languages: str) -> list[tuple[str, str]]:
    """Return the language and text of each fenced block in one of `languages`."""
    blocks = re.findall(r"^```(\w+)\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)
    return [(language, text) for language, text in blocks if language in languages]


def write_program(folder: Path) -> Path:
    """Write a `vitmodel` program that runs this checkout, and return the folder to put on the path."""
    folder.mkdir()
    program = folder / "vitmodel"
    program.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m vitmodel.cli "$@"\n')
    program.chmod(0o755)
    return folder


def run_line(line: str, environment: dict[str, str]) -> None:
    """Run one line of a bash block: a plain `vitmodel` command in this process, which is faster; others in a shell.

    `synth` runs in a shell: joblib's worker processes outlive a test and would write relative to its folder.
    """
    words = shlex.split(line, comments=True)
    if not words:
        return
    if words[0] == "vitmodel" and words[1] != "synth" and not set("|&;<>") & set(line):
        assert cli.main(words[1:]) == 0, line
        return
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"


@pytest.mark.slow
@pytest.mark.parametrize("name", TUTORIALS)
def test_each_tutorial_runs_as_printed(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    programs = write_program(tmp_path / "bin")
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    environment = os.environ | {"PATH": f"{programs}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    namespace: dict[str, object] = {}
    for language, text in blocks_of(DOCS / "tutorials" / name, "bash", "python"):
        if language == "python":
            exec(compile(text, name, "exec"), namespace)
            continue
        for line in text.splitlines():
            run_line(line, environment)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_each_printed_command_has_flags_that_exist(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "parser_for", PARSERS)
    monkeypatch.chdir(ROOT)  # some examples name files of the checkout
    lines = [line for _, text in blocks_of(page, "bash", "text") for line in text.replace("\\\n", " ").splitlines()]
    for line in lines:
        if "VERB" in line or "[--" in line or "..." in line:
            continue  # a pattern, not a command
        words = shlex.split(line.partition("||")[0], comments=True)
        if words[:1] == ["vitmodel"] and words[1:2] and not words[1].startswith("-"):
            cli.parse(words[1], words[2:])


def test_each_verb_has_a_how_to_page_and_is_in_the_readme() -> None:
    readme = (ROOT / "README.md").read_text()
    for name, verb in cli.VERBS.items():
        page = verb.guide or name
        assert (DOCS / "how-to" / f"{page}.md").is_file()
        assert f"how-to/{page}.md" in readme


def hook(name: str) -> ModuleType:
    """Import a hook of the site; hooks are not part of the package."""
    specification = importlib.util.spec_from_file_location(f"docs_{name}", DOCS / "hooks" / f"{name}.py")
    assert specification
    assert specification.loader
    module = importlib.util.module_from_spec(specification)
    sys.modules[specification.name] = module
    specification.loader.exec_module(module)
    return module


def test_the_command_line_reference_has_every_flag_with_its_description() -> None:
    reference = hook("reference")
    page = reference.command_line_page()
    for name, verb in cli.VERBS.items():
        assert f"\n## {name}\n" in page
        for flag in reference.flags_of(getattr(cli.config, verb.config)):
            assert f"`--{flag.name.replace('_', '-')}`" in page
            assert flag.description, f"{name}: {flag.name} has no docstring"


def test_the_tables_of_the_reference_list_every_column_and_code() -> None:
    reference = hook("reference")
    manifest = importlib.import_module(reference.MANIFEST)
    verdict = importlib.import_module(reference.VERDICT)
    assert all(f"| `{column.name}` |" in reference.manifest_page() for column in manifest.COLUMNS)
    assert all(
        f"| `{code}` |" in reference.reason_codes_page()
        for code in {**verdict.REFUSAL_REASONS, **verdict.WARNING_REASONS}
    )


def test_the_page_of_formats_lists_every_format_and_transfer_syntax() -> None:
    reference = hook("reference")
    header = importlib.import_module(reference.PICTURE_HEADER)
    decoding = importlib.import_module(reference.DECODING)
    page = reference.formats_page()
    assert all(f"| {name} | first bytes | read |" in page for name in header.STARTS)
    assert all(f"| {name} | first bytes | refused" in page for name in header.UNSUPPORTED_STARTS.values())
    assert all(f"| `{syntax}` | read" in page for syntax in decoding.DECODERS)


def test_the_page_of_the_model_package_explains_every_key(run: Path) -> None:
    page = (DOCS / "reference" / "package.md").read_text()
    package = json.loads((run / "package" / "config.json").read_text())
    assert [key for key in package if f"`{key}`" not in page] == []


class ResourceParser(HTMLParser):
    """Collects the addresses that a browser loads with a page: scripts, styles, pictures and fonts."""

    def __init__(self) -> None:
        super().__init__()
        self.addresses: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        if tag in ("script", "img", "iframe", "source"):
            self.addresses.append(values.get("src") or "")
        if tag == "link" and values.get("rel") != "canonical":
            self.addresses.append(values.get("href") or "")


@pytest.mark.slow
def test_the_site_builds_strictly_and_loads_nothing_from_other_hosts(tmp_path: Path) -> None:
    pytest.importorskip("material")
    pytest.importorskip("mkdocstrings")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr
    pages = list((tmp_path / "site").glob("**/*.html"))
    assert len(pages) > 40
    for page in pages:
        parser = ResourceParser()
        parser.feed(page.read_text())
        assert not [address for address in parser.addresses if address.startswith(("http:", "https:", "//"))], page
    styles = "".join(path.read_text() for path in (tmp_path / "site").glob("**/*.css"))
    assert not re.search(r"url\(['\"]?(https?:)?//", styles)


@pytest.mark.slow
def test_the_notebook_runs(tmp_path: Path) -> None:
    nbformat = pytest.importorskip("nbformat")
    nbclient = pytest.importorskip("nbclient")
    notebook = nbformat.read(ROOT / "examples" / "quickstart.ipynb", as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells), "commit the notebook without outputs"
    client = nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}})
    client.execute(env=os.environ | {"PYTHONPATH": str(ROOT), "WANDB_MODE": "disabled"})
