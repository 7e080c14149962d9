"""Describe the options of a verb, read from its dataclass; --help and the reference documentation are made from it."""

from __future__ import annotations

import ast
import inspect
import textwrap
from dataclasses import MISSING, dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from vitmodel.config.base import FreezeEpochs, Size, cached, default_of, flag_of, merged
from vitmodel.config.values import inner

GROUPS = (
    "input and output", "data", "model", "optimisation", "loss and validation", "augmentation", "exams and sources",
    "segments", "decision", "report", "readings", "receiving", "finding", "gathering", "queue", "sending", "server",
    "hardware", "logging",
)  # fmt: skip
"""The headings of --help, in their order."""
PLACEHOLDERS = {int: "N", float: "X", str: "TEXT", Path: "PATH", Size: "HxW", FreezeEpochs: "N|backbone"}
KINDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    Path: "a path",
    Size: "HEIGHTxWIDTH in pixels, such as 1024x512",
    FreezeEpochs: "a whole number or backbone",
}
LONGEST_CHOICES = 60
"""Length in characters up to which choices are shown in the flag's line; longer lists are in the help text."""


@dataclass(frozen=True, kw_only=True)
class Option:
    """One option: a flag, a YAML key and a field of the dataclass."""

    name: str
    """The field's name; those of a nested dataclass have its name and a dot before it."""
    hint: Any
    """Type annotation of a value, without None; of a list, the annotation of its items."""
    default: Any
    """Default value; MISSING where the option is required."""
    group: str
    """Heading in --help."""
    description: str
    """The field's docstring."""
    default_text: str
    """The default in words; empty where the option is required."""
    is_list: bool
    optional: bool
    """Whether None is a value."""
    is_switch: bool = False
    """Whether a list is also a switch: its flag needs no value."""

    @property
    def flag(self) -> str:
        return flag_of(self.name)

    @property
    def required(self) -> bool:
        return self.default is MISSING

    @property
    def choices(self) -> tuple[Any, ...]:
        """The values that a `Literal` allows; empty for other types."""
        return get_args(self.hint) if get_origin(self.hint) is Literal else ()

    @property
    def kind(self) -> str:
        """The type of a value in words."""
        words = "one of " + ", ".join(str(choice) for choice in self.choices) if self.choices else KINDS[self.hint]
        return f"a list of values, each {words}" if self.is_list else words

    @property
    def placeholder(self) -> str:
        """The placeholder of the value in --help, such as N or {cls,mean}."""
        if self.required:
            return self.name.upper() + " ..." * self.is_list
        choices = "{" + ",".join(str(choice) for choice in self.choices) + "}"
        if self.choices:
            return choices if len(choices) <= LONGEST_CHOICES else "NAME"
        return "" if self.hint is bool else PLACEHOLDERS[self.hint]

    @property
    def invocation(self) -> str:
        """The option as it is written on the command line."""
        if self.required:
            return self.placeholder
        if self.hint is bool:
            return f"{self.flag}, {self.flag.replace('--', '--no-', 1)}"
        if self.is_switch:
            return f"{self.flag} [{self.placeholder}], {self.flag.replace('--', '--no-', 1)}"
        return f"{self.flag} {self.placeholder}"

    @property
    def help(self) -> str:
        """Description, long lists of choices, and default."""
        parts = [self.description]
        if self.choices and self.placeholder == "NAME":
            parts.append(f"One of {', '.join(str(choice) for choice in self.choices)}.")
        if self.is_list and not self.required:
            parts.append("Repeat the flag for several values.")
        if not self.required:
            parts.append(f"(default: {self.default_text})")
        return " ".join(parts)


@cached
def options(cls: type) -> tuple[Option, ...]:
    """Return all options of a configuration class in the order of the fields, including those of nested dataclasses."""
    hints = get_type_hints(cls)
    descriptions = docstrings(cls)
    default_texts = merged(cls, "DEFAULTS")
    switches = merged(cls, "SWITCHES")
    groups = {name: group for group, names in groups_of(cls).items() for name in names}
    result: list[Option] = []
    for field in fields(cls):
        hint = inner(hints[field.name])
        default = default_of(field)
        if is_dataclass(hint):
            result += [_nested(option, field.name) for option in options(hint)]  # type: ignore[arg-type]
            continue
        is_list = get_origin(hint) is tuple
        result.append(
            Option(
                name=field.name,
                hint=get_args(hint)[0] if is_list else hint,
                default=default,
                group=groups[field.name],
                description=descriptions[field.name],
                default_text="" if default is MISSING else default_texts.get(field.name, _words(default)),
                is_list=is_list,
                optional=hint != hints[field.name],
                is_switch=field.name in switches,
            )
        )
    return tuple(result)


def groups_of(cls: type) -> dict[str, list[str]]:
    """Return the fields below each heading, including those of base classes."""
    result: dict[str, list[str]] = {}
    for base in cls.__mro__:
        for group, names in vars(base).get("GROUPS", {}).items():
            result.setdefault(group, []).extend(names)
    return result


@cached
def docstrings(cls: type) -> dict[str, str]:
    """Return the docstring below each field of a dataclass, as one line."""
    result: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if not is_dataclass(base):
            continue
        (definition,) = ast.parse(textwrap.dedent(inspect.getsource(base))).body
        assert isinstance(definition, ast.ClassDef)
        for field, text in zip(definition.body, definition.body[1:], strict=False):
            is_docstring = isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant)
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and is_docstring:
                result[field.target.id] = " ".join(ast.literal_eval(text.value).split())  # type: ignore[attr-defined]
    return result


def _nested(option: Option, outer: str) -> Option:
    """Return an option of a nested dataclass under its full name; `outer` is the field that holds the dataclass."""
    return replace(option, name=f"{outer}.{option.name}")


def _words(default: Any) -> str:
    """Return a default value as it is written on the command line."""
    if isinstance(default, bool):
        return "on" if default else "off"
    if default is None or default == "" or default == ():
        return "none"
    return f"{default:g}" if isinstance(default, float) else str(default)
