"""Convert and check single values against the type annotation of their field."""

from __future__ import annotations

import numbers
import os
from collections.abc import Iterable
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from vitmodel.config.base import FreezeEpochs, Size, require
from vitmodel.errors import UsageError

NUMBERS: dict[Any, tuple[type, str]] = {
    bool: (bool, "true or false"),
    int: (numbers.Integral, "a whole number"),
    float: (numbers.Real, "a number"),
}
"""Annotation -> the type that a value must have, and its name in messages. bool is no number here."""

PARSED = (Size, FreezeEpochs)
"""Annotations of values that are read from text by their `parse`, and written by `str`."""


def coerce(hint: Any, value: Any, name: str) -> Any:
    """Return `value` converted to the annotation `hint`.

    A `Path` field takes a `str`, a `Size` field a text such as `1024x512` or a pair, a `float` field any real number,
    and a tuple field any sequence, a single value, or a text with commas. A `Literal` field takes only its choices.

    Raises:
        UsageError: The value does not fit; the message names the field `name`.
    """
    origin = get_origin(hint)
    if origin in (Union, UnionType):
        return None if value is None else coerce(inner(hint), value, name)
    if origin is Literal:
        choices = get_args(hint)
        require(
            value in choices,
            name,
            f"{value!r} is not a choice; choose from {', '.join(str(choice) for choice in choices)}",
        )
        return value
    if origin is tuple:
        return tuple(coerce(get_args(hint)[0], item, name) for item in _items(value, name))
    if hint is Path:
        require(isinstance(value, str | os.PathLike), name, f"must be a path, not {value!r}")
        return Path(value)
    if hint is str:
        require(isinstance(value, str | os.PathLike), name, f"must be text, not {value!r}")
        return os.fspath(value)
    if hint in PARSED:
        return _parse(hint, value, name)
    if hint in NUMBERS:
        kind, words = NUMBERS[hint]
        fits = isinstance(value, kind) and (hint is bool or not isinstance(value, bool))
        require(fits, name, f"must be {words}, not {value!r}")
        return hint(value)
    require(isinstance(value, hint), name, f"must be of type {getattr(hint, '__name__', hint)}, not {value!r}")
    return value


def inner(hint: Any) -> Any:
    """Return the annotation without `None`: `Path | None` -> `Path`."""
    if get_origin(hint) not in (Union, UnionType):
        return hint
    return next(part for part in get_args(hint) if part is not NoneType)


def split_list(text: str) -> list[str]:
    """Return the items of the text `a,b` or `[a,b]`; a text that names an existing file is one item."""
    if os.path.exists(text):
        return [text]
    if text.startswith("[") and text.endswith("]"):
        text = text[1:-1]
    items = [item.strip().strip("\"'") for item in text.split(",")]
    return [item for item in items if item]


def switched(value: Any, items: tuple[str, ...]) -> Any:
    """Return the value of a list field that is also a switch: `true` selects `items`, `false` removes all before it."""
    if not isinstance(value, bool | str | list | tuple):
        return value
    result: list[Any] = []
    for item in [value] if isinstance(value, bool | str) else value:
        word = str(item).lower()
        if word == "false":
            result.clear()
        else:
            result += items if word == "true" else [item]
    return result


def _items(value: Any, name: str) -> list[Any]:
    """Return the items of a list field: a sequence, one value, or a text with commas. None is an empty list."""
    if value is None:
        return []
    if isinstance(value, str | Path):
        value = [value]
    require(isinstance(value, Iterable), name, f"must be a list, not {value!r}")
    result: list[Any] = []
    for item in value:
        result.extend(split_list(str(item)) if isinstance(item, str | Path) else [item])
    return result


def _parse(hint: type[Size] | type[FreezeEpochs], value: Any, name: str) -> Any:
    try:
        return hint.parse(value)
    except ValueError as error:
        raise UsageError(f"{name}: {error}") from error
