"""Score mammograms for breast cancer with a hand-written Vision Transformer."""

from __future__ import annotations

import importlib
import sys
import types
from typing import TYPE_CHECKING

from vitmodel.errors import UsageError, VitmodelError

if TYPE_CHECKING:
    from vitmodel.api import Model as Model
    from vitmodel.api import drift as drift
    from vitmodel.api import etl as etl
    from vitmodel.api import evaluate as evaluate
    from vitmodel.api import load as load
    from vitmodel.api import train as train
    from vitmodel.api import verify as verify
    from vitmodel.artifacts import EvaluationResult as EvaluationResult
    from vitmodel.artifacts import Manifest as Manifest
    from vitmodel.artifacts import Run as Run
    from vitmodel.errors import UsageError as UsageError
    from vitmodel.errors import VitmodelError as VitmodelError
    from vitmodel.metrics.bootstrap import Interval as Interval
    from vitmodel.model.architecture import ViTConfig as ViTConfig
    from vitmodel.model.package_check import PackageCheck as PackageCheck
    from vitmodel.model.vit import ViT as ViT
    from vitmodel.releases.in_memory import Mammogram as Mammogram
    from vitmodel.scoring.explanation import Explanation as Explanation
    from vitmodel.scoring.prediction import Prediction as Prediction

__version__ = "0.1.0"

_HOME = {
    "load": "vitmodel.api",
    "Model": "vitmodel.api",
    "Prediction": "vitmodel.scoring.prediction",
    "Mammogram": "vitmodel.releases.in_memory",
    "Explanation": "vitmodel.scoring.explanation",
    "etl": "vitmodel.api",
    "Manifest": "vitmodel.artifacts",
    "train": "vitmodel.api",
    "Run": "vitmodel.artifacts",
    "evaluate": "vitmodel.api",
    "EvaluationResult": "vitmodel.artifacts",
    "verify": "vitmodel.api",
    "PackageCheck": "vitmodel.model.package_check",
    "drift": "vitmodel.api",
    "Interval": "vitmodel.metrics.bootstrap",
    "ViT": "vitmodel.model.vit",
    "ViTConfig": "vitmodel.model.architecture",
    "VitmodelError": "vitmodel.errors",
    "UsageError": "vitmodel.errors",
}
"""Public names and the modules that define them; a module is imported when one of its names is first used."""

__all__ = [  # noqa: RUF022 (in the order of use)
    "load",
    "Model",
    "Prediction",
    "Mammogram",
    "Explanation",
    "etl",
    "Manifest",
    "train",
    "Run",
    "evaluate",
    "EvaluationResult",
    "verify",
    "PackageCheck",
    "drift",
    "Interval",
    "ViT",
    "ViTConfig",
    "VitmodelError",
    "UsageError",
    "__version__",
]


def __getattr__(name: str) -> object:
    """Return a public name, importing its module on first use (PEP 562)."""
    if name not in _HOME:
        raise AttributeError(f"module 'vitmodel' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """Return the public names and the modules imported so far."""
    return sorted({*globals(), *__all__})


class _Package(types.ModuleType):
    """The package, whose public names no submodule can replace.

    Importing the script vitmodel/train.py as a module would otherwise set the attribute `train` to that module and hide
    the function.
    """

    def __setattr__(self, name: str, value: object) -> None:
        if name in _HOME and isinstance(value, types.ModuleType):
            return
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
