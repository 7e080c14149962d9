"""The README: its commands and lines of Python run, and its links have targets."""

from __future__ import annotations

import contextlib
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from vitmodel import cli

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
PYTHON = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def commands(block: str) -> list[list[str]]:
    """Return the words of each line of a bash block."""
    return [shlex.split(line, comments=True) for line in block.strip().splitlines()]


def test_the_two_commands_are_targets_of_the_makefile() -> None:
    for command in commands(BLOCKS[0]):
        assert command[0] == "make"
        subprocess.run([*command, "--dry-run"], cwd=ROOT, check=True, capture_output=True)


@pytest.fixture(scope="module")
def printed_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run the README's verbs one after another and return their working folder."""
    folder = tmp_path_factory.mktemp("readme")
    verbs = commands(BLOCKS[1])
    assert [command[1] for command in verbs] == ["synth", "etl", "train", "evaluate", "predict"]
    with contextlib.chdir(folder):
        for program, *arguments in verbs:
            assert program == "vitmodel"
            assert cli.main(arguments) == 0, arguments
    return folder


@pytest.mark.slow
def test_the_commands_for_the_verbs_run_one_after_another(printed_run: Path) -> None:
    for result in ("report/report.html", "scores/breast_scores.csv", "run/package/MODEL_CARD.md"):
        assert (printed_run / result).is_file()


@pytest.mark.slow
def test_the_lines_of_python_run_as_printed(printed_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(printed_run)
    (block,) = PYTHON
    exec(compile(block, "README.md", "exec"), {})
    assert (printed_run / "report_again" / "report.html").is_file()


@pytest.mark.parametrize("command", commands(BLOCKS[1]), ids=lambda command: command[1])
def test_the_command_of_each_verb_parses(command: list[str]) -> None:
    program, verb, *arguments = command
    assert program == "vitmodel"
    cli.parse(verb, arguments)


@pytest.mark.parametrize("target", re.findall(r"\]\((?!http)([^)#]+)\)", README))
def test_every_relative_link_has_a_target(target: str) -> None:
    assert (ROOT / target).exists()
