"""Recipes are found by name, say what they reached, and give way to a file of the same name."""

from __future__ import annotations

from pathlib import Path

import pytest

from vitmodel.cli import main
from vitmodel.config.recipes import RECIPES, recipe_facts, recipe_names, recipe_path
from vitmodel.errors import UsageError

RESULTS = Path(__file__).resolve().parents[2] / "docs" / "results.md"


@pytest.mark.parametrize("name", recipe_names())
def test_each_recipe_states_what_it_reached_on_what_and_its_cost(name: str) -> None:
    facts = recipe_facts(name)
    assert all(facts)
    assert facts.command.startswith("vitmodel train ")
    assert facts.reached != "not measured" or "estimate" in facts.cost or "memory" in facts.on
    results = RESULTS.read_text()
    for part in facts.reached.split(", "):  # each figure is one of the results
        for interval in [text.partition(")")[0] for text in part.split("(")[1:]]:
            assert " ".join(interval.split()) in " ".join(results.split())


def test_the_list_has_every_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes"]) == 0
    shown = capsys.readouterr().out
    assert [line for line in shown.splitlines() if line and line[0] != " "] == recipe_names()
    assert "0.692 (0.657 to 0.725)" in " ".join(shown.split())


def test_a_file_takes_precedence_and_an_unknown_name_gives_the_nearest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert recipe_path("rsna") == RECIPES / "rsna.yaml"
    Path("rsna").write_text("epochs: 1\n")
    assert recipe_path("rsna") == Path("rsna")
    with pytest.raises(
        UsageError, match=r"lap_top does not exist; did you mean laptop\? `vitmodel recipes` lists gpu24"
    ):
        recipe_path("lap_top")
