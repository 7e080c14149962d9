"""What every configuration stands on: sizes, refusals, and a configuration as a command or a recipe. Knows no stage."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any, NamedTuple

from vitmodel.errors import UsageError


class Size(NamedTuple):
    """Height and width in pixels, written as in `1024x512`."""

    height: int
    width: int

    @classmethod
    def parse(cls, text: str | Size) -> Size:
        """`HxW` or `N` (a square) as a size. Raises ValueError."""
        if isinstance(text, Size):
            return text
        parts = str(text).lower().split("x")
        if len(parts) > 2 or not all(part.strip().isdecimal() and int(part) > 0 for part in parts):
            raise ValueError(f"a size is HEIGHTxWIDTH in pixels, such as 1024x512, not {text!r}")
        return cls(int(parts[0]), int(parts[-1]))

    def __str__(self) -> str:
        return f"{self.height}x{self.width}"


def require(condition: bool, field: str, problem: str) -> None:
    """Refuse an impossible value by the name of its field. Raises UsageError."""
    if not condition:
        raise UsageError(f"{field}: {problem}")


def require_apart(out: Path, sources: Iterable[Path | str]) -> None:
    """Refuse a source as OUT, whose images would be sources of the next run. Raises UsageError."""
    apart = os.path.abspath(out) not in map(os.path.abspath, sources)
    require(apart, "out", f"{out} is a source, too; choose another folder, such as {out / 'results'}")


def to_command(verb: str, config: Any) -> str:
    """The command line that gives `config`: what has no default by its place, and every flag that differs from its default."""
    import shlex

    words, flags = ["vitmodel", verb], []
    for each in fields(config):
        value, flag = getattr(config, each.name), "--" + each.name.replace("_", "-")
        values = [str(item) for item in value] if isinstance(value, list) else [str(value)]
        if each.default is MISSING and each.default_factory is MISSING:
            words += values
        elif isinstance(value, bool) and value != each.default:
            flags.append(flag if value else flag.replace("--", "--no-", 1))
        elif value != each.default:
            flags += [word for item in values for word in (flag, item)]
    return shlex.join(words + flags)


def plain(value: Any) -> Any:
    """A configuration as dictionaries, lists, numbers and text, which YAML and loggers take."""
    if is_dataclass(value):
        return {field.name: plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Path | Size):
        return str(value)
    return [plain(item) for item in value] if isinstance(value, list | tuple) else value


def to_yaml(verb: str, config: Any, path: Path) -> str:
    """`config` as a YAML recipe that `vitmodel VERB --config path` runs again."""
    import yaml

    return f"# vitmodel {verb} --config {path}\n" + yaml.safe_dump(plain(config), sort_keys=False)
