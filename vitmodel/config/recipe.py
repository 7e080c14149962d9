"""Write a configuration as a command line or as a YAML recipe."""

from __future__ import annotations

import shlex
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any

from vitmodel.config.base import Config, FreezeEpochs, Size, default_of, flag_of


def to_command(verb: str, config: Config) -> str:
    """Return the command line that gives `config`.

    Required values come first, by position, then every flag whose value differs from its default.
    """
    words = ["vitmodel", verb]
    for field in fields(config):
        if default_of(field) is MISSING:
            words += _texts(getattr(config, field.name))
    return shlex.join(words + _flags(config))


def _flags(config: Any, prefix: str = "") -> list[str]:
    """Return the flags of the values that differ from their defaults."""
    words: list[str] = []
    for field in fields(config):
        value = getattr(config, field.name)
        default = default_of(field)
        flag = flag_of(prefix + field.name)
        if default is MISSING or value == default:
            continue
        if is_dataclass(value):
            words += _flags(value, f"{prefix}{field.name}.")
        elif isinstance(value, bool):
            words.append(flag if value else flag.replace("--", "--no-", 1))
        else:
            words += [word for text in _texts(value) for word in (flag, text)]
    return words


def _texts(value: Any) -> list[str]:
    """Return a value, or each item of a list, as text."""
    items = value if isinstance(value, tuple) and not isinstance(value, Size) else (value,)
    return [str(item) for item in items]


def plain(value: Any) -> Any:
    """Return a configuration as dictionaries, lists, numbers and text, as YAML and loggers take them."""
    if is_dataclass(value):
        return {field.name: plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, FreezeEpochs):
        return str(value) if value.is_backbone else int(value)
    if isinstance(value, Path | Size):
        return str(value)
    return [plain(item) for item in value] if isinstance(value, list | tuple) else value


def to_yaml(verb: str, config: Config, path: Path) -> str:
    """Return `config` as a YAML recipe that `vitmodel VERB --config path` runs again."""
    import yaml

    return f"# vitmodel {verb} --config {path}\n" + yaml.safe_dump(plain(config), sort_keys=False)
