"""The README's commands and links work."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from vitmodel import cli

ROOT = Path(__file__).resolve().parents[1]
BLOCKS = re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)


def commands(block: str) -> list[list[str]]:
    return [shlex.split(line, comments=True) for line in block.strip().splitlines()]


def test_the_two_commands_are_targets_of_the_makefile() -> None:
    for command in commands(BLOCKS[0]):
        assert command[0] == "make"
        subprocess.run([*command, "--dry-run"], cwd=ROOT, check=True, capture_output=True)


@pytest.mark.slow
def test_the_commands_for_the_verbs_run_one_after_another(tmp_path: Path) -> None:
    verbs = commands(BLOCKS[1])
    assert [command[1] for command in verbs] == ["synth", "etl", "train", "evaluate", "predict"]
    for program, *arguments in verbs:
        assert program == "vitmodel"
        done = subprocess.run([sys.executable, "-m", "vitmodel.cli", *arguments], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, f"{arguments}: {done.stderr}"
    for result in ("report/report.html", "scores/breast_scores.csv", "run/package/MODEL_CARD.md"):
        assert (tmp_path / result).is_file()


@pytest.mark.parametrize("command", commands(BLOCKS[1]), ids=lambda command: command[1])
def test_the_command_of_each_verb_parses(command: list[str]) -> None:
    program, verb, *arguments = command
    assert program == "vitmodel"
    cli.parse(verb, arguments)


@pytest.mark.parametrize("target", re.findall(r"\]\((?!http)([^)#]+)\)", (ROOT / "README.md").read_text()))
def test_every_relative_link_has_a_target(target: str) -> None:
    assert (ROOT / target).exists()
