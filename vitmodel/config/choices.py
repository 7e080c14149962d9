"""Registries of losses and explanation methods: one line per choice, no heavy imports.

Each entry maps the name that the user writes to `module:function`. The keys are the values that `--loss` and
`--explain` accept (in flags, YAML and Python); the function is imported when it is used. To add a choice, write its
function in a file of its own and add one line here.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any, Literal

from vitmodel.errors import UsageError

LOSSES: dict[str, str] = {
    "bce": "vitmodel.training.losses:bce",
    "focal": "vitmodel.training.losses:focal",
    "pf1": "vitmodel.training.losses:pf1",
}
"""A loss is built by `function(smoothing=...)`, which returns a `vitmodel.training.losses.Loss`."""

EXPLANATIONS: dict[str, str] = {
    "rollout": "vitmodel.model.explain:rollout",
    "gradient": "vitmodel.model.explain:gradient",
    "occlusion": "vitmodel.model.explain:occlusion",
    "integrated": "vitmodel.model.explain:integrated_gradients",
}
"""An explanation is a function decorated with `vitmodel.model.explain.explanation`, which states its map's unit and
colour scale."""

DicomKind = Literal["sr", "sc", "gsps", "seg", "pm", "cad"]
"""Kinds of DICOM results, in the order in which they are written."""

if TYPE_CHECKING:  # mypy accepts no computed Literal; at run time the check and the help text list the registered names
    LossName = str
    ExplanationName = str
else:
    LossName = Literal[tuple(LOSSES)]
    ExplanationName = Literal[tuple(EXPLANATIONS)]


def load_choice(registry: dict[str, str], field: str, name: str) -> Any:
    """Import and return what `registry` holds under `name`.

    Raises:
        UsageError: `name` is not registered; the message names `field` and lists the choices.
    """
    if name not in registry:
        raise UsageError(f"{field}: {name!r} is not a choice; choose from {', '.join(registry)}")
    module, _, attribute = registry[name].partition(":")
    return getattr(importlib.import_module(module), attribute)
