"""The command `recipes`: list the packaged recipes."""

from __future__ import annotations

import textwrap

from vitmodel.config import RecipesConfig
from vitmodel.config.recipes import recipe_facts, recipe_names

WIDTH = 100
"""Width of the text in columns."""


def recipes(config: RecipesConfig) -> None:
    """Print each recipe with its command, what it reached, on what data, and what it cost."""
    print("\n\n".join(describe(name) for name in recipe_names()))


def describe(name: str) -> str:
    """Return the description of a recipe."""
    facts = recipe_facts(name)
    stated = [
        facts.about,
        f"reached: {facts.reached}",
        f"on: {facts.on}",
        f"cost: {facts.cost}",
        f"run: {facts.command}",
    ]
    indented = [
        textwrap.fill(text, WIDTH, initial_indent="  ", subsequent_indent="    ", break_on_hyphens=False)
        for text in stated
    ]
    return "\n".join([name, *indented])
