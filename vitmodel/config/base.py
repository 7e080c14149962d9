"""Sizes, error helpers, and the base class that checks every configuration."""

from __future__ import annotations

import functools
import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, Field, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, TypeVar, cast, get_type_hints

from vitmodel.errors import UsageError

T = TypeVar("T")


class Size(NamedTuple):
    """Height and width in pixels, written as `1024x512`."""

    height: int
    width: int

    @classmethod
    def parse(cls, text: str | int | Iterable[int]) -> Size:
        """Return the size given as `HxW`, as `N` (a square) or as two integers.

        Raises:
            ValueError: `text` is none of these, or a side is not positive.
        """
        if isinstance(text, Size):
            return text
        if isinstance(text, Iterable) and not isinstance(text, str):
            sides = [str(side) for side in text]
        else:
            sides = str(text).lower().split("x")
        if len(sides) not in (1, 2) or not all(side.strip().isdecimal() and int(side) > 0 for side in sides):
            raise ValueError(f"{text!r} is not a size; write HEIGHTxWIDTH in pixels, such as 1024x512")
        return cls(int(sides[0]), int(sides[-1]))

    def __str__(self) -> str:
        return f"{self.height}x{self.width}"


class FreezeEpochs(int):
    """A number of epochs, or `backbone` for all epochs."""

    @classmethod
    def parse(cls, text: str | int) -> FreezeEpochs:
        """Return the number written as `3` or `backbone`.

        Raises:
            ValueError: `text` is neither.
        """
        if isinstance(text, FreezeEpochs):
            return text
        if text == "backbone":
            return cls(sys.maxsize)
        if isinstance(text, bool) or not re.fullmatch(r"-?\d{1,9}", str(text)):
            raise ValueError(f"must be a whole number or backbone, not {text!r}")
        return cls(int(text))

    @property
    def is_backbone(self) -> bool:
        """Whether it means all epochs."""
        return self == sys.maxsize

    def __str__(self) -> str:
        return "backbone" if self.is_backbone else int.__repr__(self)


def require(condition: bool, field: str, problem: str) -> None:
    """Raise UsageError naming `field` and its `problem` unless `condition` holds."""
    if not condition:
        raise UsageError(f"{field}: {problem}")


def require_apart(out: Path, sources: Iterable[Path | str]) -> None:
    """Raise UsageError if `out` is one of `sources`: files written there would be inputs of the next run."""
    inputs = [os.path.abspath(source) for source in sources]
    is_input = os.path.abspath(out) in inputs
    problem = f"{out} is also an input; --out must differ from the inputs: use for example {out / 'results'}"
    require(not is_input, "out", problem)


def listed(paths: Iterable[Path | str]) -> str:
    """Return `paths` separated by commas, for messages."""
    return ", ".join(str(path) for path in paths)


def flag_of(field: str) -> str:
    """Return the command-line flag of a field: `drop_path` -> `--drop-path`."""
    return "--" + field.replace("_", "-")


@dataclass(frozen=True)
class Needs:
    """What an option needs to have any effect."""

    text: str
    """The need in words, such as `--segments`."""
    holds: Callable[[Any], bool]
    """Whether the configuration fulfils the need."""


FORMER_NAMES = {"jobs": "workers"}
"""Options that were renamed: former name -> name. The former one is still accepted, and not listed by --help."""


def with_current_names(values: Mapping[str, Any], known: Iterable[str]) -> dict[str, Any]:
    """Return `values` with each former name that is not in `known` replaced by the name that it has now.

    Raises:
        UsageError: Both names of an option are given.
    """
    former = {old: new for old, new in FORMER_NAMES.items() if old in values and new in known and old not in known}
    for old, new in former.items():
        require(new not in values, old, f"is the former name of {new}, which is given too; remove {old}")
    return {former.get(name, name): value for name, value in values.items()}


class FormerNames(type):
    """Metaclass of configurations that accepts the former names of fields, also in `dataclasses.replace`."""

    if not TYPE_CHECKING:  # type checkers see the fields alone

        def __call__(cls, **values: Any) -> Any:
            return super().__call__(**with_current_names(values, cls.__dataclass_fields__))


@dataclass(frozen=True, kw_only=True)
class Config(metaclass=FormerNames):
    """Base class of all configurations: normalises and checks the values of a frozen dataclass.

    Values are checked against the annotations, whether they come from the command line, YAML or Python: see
    `vitmodel.config.values.coerce`.
    """

    PREFIX: ClassVar[str] = ""
    """Text before a field's name in messages, where the configuration is part of another one."""
    GROUPS: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    """Heading in --help -> the fields below it. Each class lists its own fields; `options` merges them."""
    NEEDS: ClassVar[Mapping[str, Needs]] = {}
    """Field -> what it needs to have any effect. Values equal to the default are always accepted."""
    DEFAULTS: ClassVar[Mapping[str, str]] = {}
    """Field -> its default in words, for defaults that depend on other options."""
    SWITCHES: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    """List field that is also a switch -> the items that `true`, or its flag without a value, selects."""

    def __post_init__(self) -> None:
        from vitmodel.config.values import coerce, switched  # imports this module

        switches = merged(type(self), "SWITCHES")
        for field, hint in _typed_fields(type(self)):
            value = getattr(self, field.name)
            if field.name in switches:
                value = switched(value, switches[field.name])
            value = coerce(hint, value, self.PREFIX + field.name)
            object.__setattr__(self, field.name, value)
        self._resolve()
        self._check()
        for option, need in merged(type(self), "NEEDS").items():
            unused = getattr(self, option) != self._default(option) and not need.holds(self)
            name = self.PREFIX + option
            require(not unused, name, f"has no effect here: it needs {need.text}; otherwise leave {flag_of(name)} out")

    def _resolve(self) -> None:
        """Replace values that mean "automatic"; subclasses extend it."""

    def _check(self) -> None:
        """Raise UsageError for an impossible value; subclasses extend it and call `super()._check()`."""

    def _default(self, name: str) -> Any:
        """Return the default of a field in this configuration."""
        return default_of(next(field for field in fields(self) if field.name == name))


def default_of(field: Field[Any]) -> Any:
    """Return the default of a dataclass field; MISSING where it has none."""
    return field.default if field.default_factory is MISSING else field.default_factory()


def merged(cls: type, name: str) -> dict[str, Any]:
    """Return the class attribute `name`, a mapping, merged with those of all base classes."""
    result: dict[str, Any] = {}
    for base in reversed(cls.__mro__):
        result |= vars(base).get(name, {})
    return result


def cached(function: Callable[[type], T]) -> Callable[[type], T]:
    """Return `function` with a cache per class.

    `functools.cache` alone fails the type check: mypy takes dataclasses for unhashable.
    """
    return cast(Callable[[type], T], functools.cache(function))


@cached
def _typed_fields(cls: type) -> list[tuple[Field[Any], Any]]:
    hints = get_type_hints(cls)
    return [(field, hints[field.name]) for field in fields(cls)]
