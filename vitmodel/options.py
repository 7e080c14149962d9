"""Keyword arguments of the Python API to the configuration dataclasses of the command line."""

from __future__ import annotations

import difflib
import os
import types
import typing
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from vitmodel.config import Size
from vitmodel.errors import UsageError

Config = TypeVar("Config")


def make_config(cls: type[Config], options: Mapping[str, Any], **given: Any) -> Config:
    """Return the configuration `cls` from the options of a user and the values `given` by the caller.

    Options have the names and types of the fields. Text and os.PathLike are taken for paths, "1024x512" and pairs for
    sizes, and mappings for nested configurations.

    Raises:
        UsageError: An option is unknown, is set by the function itself, or has a value of the wrong type.
    """
    names = [field.name for field in fields(cls) if field.init]  # type: ignore[arg-type]
    check_names(options, [name for name in names if name not in given])
    hints = typing.get_type_hints(cls)
    return cls(**{name: convert(value, hints[name], name) for name, value in (dict(options) | given).items()})


def check_names(options: Mapping[str, Any], allowed: list[str]) -> None:
    """Raise UsageError for an option that is none of `allowed`, with the closest names."""
    for name in options:
        if name not in allowed:
            close = difflib.get_close_matches(name, allowed, n=3, cutoff=0.5)
            advice = f"did you mean {' or '.join(close)}?" if close else f"the options are {', '.join(sorted(allowed))}"
            raise UsageError(f"{name}: there is no such option here; {advice}")


def convert(value: Any, hint: Any, name: str) -> Any:
    """Return `value` as the type `hint`. Raises UsageError if it is of another type."""
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        return _convert_union(value, hint, name)
    if origin is Literal:
        if value in typing.get_args(hint):
            return value
        raise UsageError(
            f"{name}: {value!r} is not possible; choose one of {', '.join(map(str, typing.get_args(hint)))}"
        )
    if origin in (list, tuple):
        if isinstance(value, list | tuple):
            return origin(convert(item, typing.get_args(hint)[0], name) for item in value)
        raise _wrong(value, "a list", name)
    if hint is Size:
        return _convert_size(value, name)
    if hint is Path:
        if isinstance(value, str | os.PathLike):
            return Path(value)
        raise _wrong(value, "a path", name)
    if is_dataclass(hint) and isinstance(value, Mapping):
        return make_config(hint, value)  # type: ignore[arg-type]
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(value, hint) and (hint is bool or not isinstance(value, bool)):
        return value
    raise _wrong(value, hint.__name__, name)


def _convert_union(value: Any, hint: Any, name: str) -> Any:
    choices = [choice for choice in typing.get_args(hint) if choice is not types.NoneType]
    if value is None and len(choices) < len(typing.get_args(hint)):
        return None
    for choice in choices[:-1]:
        try:
            return convert(value, choice, name)
        except UsageError:
            continue
    return convert(value, choices[-1], name)


def _convert_size(value: Any, name: str) -> Size:
    if isinstance(value, tuple | list) and len(value) == 2:
        value = f"{value[0]}x{value[1]}"
    try:
        return Size.parse(value)
    except ValueError as error:
        raise UsageError(f"{name}: {error}") from None


def _wrong(value: Any, wanted: str, name: str) -> UsageError:
    return UsageError(f"{name}: must be {wanted}, not {type(value).__name__} {value!r}")
