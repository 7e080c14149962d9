"""YAML recipes that are installed with the package, and `--config` values that name them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from vitmodel.config.make import did_you_mean
from vitmodel.errors import UsageError

RECIPES = Path(__file__).resolve().parents[1] / "recipes"
"""Folder of the packaged recipes."""


def recipe_names() -> list[str]:
    """Return the names of the packaged recipes, such as "rsna" or "versions/v2", in alphabetical order."""
    return sorted(path.relative_to(RECIPES).with_suffix("").as_posix() for path in RECIPES.rglob("*.yaml"))


def recipe_path(recipe: str | Path, option: str = "config") -> Path:
    """Return the file of a recipe, given as a path or as the name of a packaged recipe.

    An existing file takes precedence over a packaged recipe of the same name.

    Args:
        recipe: A path or a name.
        option: The option that names the recipe, for the error message.

    Raises:
        UsageError: There is neither a file nor a packaged recipe of that name.
    """
    if Path(recipe).is_file():
        return Path(recipe)
    if str(recipe) in recipe_names():
        return RECIPES / f"{recipe}.yaml"
    meant = did_you_mean(str(recipe), recipe_names())
    raise UsageError(
        f"{option}: {recipe} does not exist; {meant or 'give the path of a YAML file, or a packaged recipe;'} "
        f"`vitmodel recipes` lists {', '.join(recipe_names())}"
    )


class RecipeFacts(NamedTuple):
    """What the first lines of a packaged recipe state."""

    command: str
    """The command that runs it."""
    about: str
    reached: str
    on: str
    """The data on which it reached this."""
    cost: str


def recipe_facts(name: str) -> RecipeFacts:
    """Return what a packaged recipe states of itself: its comments `# reached:`, `# on:` and `# cost:`, and the others.

    Raises:
        UsageError: There is no packaged recipe of this name.
    """
    lines = recipe_path(name).read_text().splitlines()
    comments = [line.removeprefix("# ") for line in itertools.takewhile(lambda line: line.startswith("#"), lines)]
    stated = {key: value for key, _, value in (line.partition(": ") for line in comments[1:4])}
    return RecipeFacts(comments[0], " ".join(comments[4:]), **stated)


def with_recipe_paths(arguments: Sequence[str]) -> list[str]:
    """Return the command line `arguments` with the value of each `--config` resolved by `recipe_path`."""
    resolved: list[str] = []
    for argument in arguments:
        if resolved and resolved[-1] == "--config":
            resolved.append(str(_checked(recipe_path(argument))))
        elif argument.startswith("--config="):
            resolved.append(f"--config={_checked(recipe_path(argument.removeprefix('--config=')))}")
        else:
            resolved.append(argument)
    return resolved


def _checked(path: Path) -> Path:
    """Return `path`. Raise UsageError unless it is a file of text."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        text = "\0"
    if "\0" in text:
        raise UsageError(f"config: {path} cannot be read as text; give the path of a YAML file")
    return path
