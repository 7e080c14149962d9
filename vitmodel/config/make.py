"""Make a configuration from named values, and name the option that was meant when a name is unknown."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import fields, is_dataclass
from typing import Any, TypeVar, get_type_hints

from vitmodel.config.base import Config, with_current_names
from vitmodel.errors import UsageError

AnyConfig = TypeVar("AnyConfig", bound=Config)


def make_config(cls: type[AnyConfig], options: Mapping[str, Any], **settings: Any) -> AnyConfig:
    """Return a configuration from the options of a user and the settings of the caller.

    The command line and the Python API make their configurations here. The configuration itself converts and checks the
    values.

    Args:
        cls: The configuration class.
        options: Field -> value. A mapping is taken for the fields of a nested configuration.
        settings: Further fields and values, which the user cannot set.

    Raises:
        UsageError: An option is unknown or is one of the settings, or a value is impossible.
    """
    allowed = [field.name for field in fields(cls) if field.name not in settings]
    options = with_current_names(options, allowed)
    for name in options:
        if name not in allowed:
            advice = did_you_mean(name, allowed) or f"the options are {', '.join(sorted(allowed))}"
            raise UsageError(f"{cls.PREFIX}{name}: unknown option; {advice}")
    hints = get_type_hints(cls)
    values = dict(settings)
    for name, value in options.items():
        is_nested = is_dataclass(hints[name]) and isinstance(value, Mapping)
        values[name] = make_config(hints[name], value) if is_nested else value
    return cls(**values)


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """Return "did you mean X?" with the most similar of `names`; empty if none is similar."""
    matches = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    return f"did you mean {matches[0]}?" if matches else ""
