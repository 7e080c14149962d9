"""Stub of torchvision, which timm imports but its ViT does not use, for the tests and the benchmarks.

The real torchvision must not be installed, because its wheel is incompatible with a CPU build of torch.
"""

from __future__ import annotations

import contextlib
import importlib.abc
import importlib.machinery
import sys
import types
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def torchvision_stub() -> Iterator[None]:
    """Make `import torchvision` succeed inside the block.

    All attributes of its modules can be called and subclassed but do nothing.
    """

    class Anything(types.ModuleType):
        def __getattr__(self, name: str) -> Any:
            if name.startswith("__"):
                raise AttributeError(name)
            return Anything(name)

        def __call__(self, *_: Any, **__: Any) -> Any:
            return self

        def __mro_entries__(self, _: Any) -> tuple[type, ...]:
            return (object,)

    class Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
        def find_spec(self, name: str, *_: Any) -> importlib.machinery.ModuleSpec | None:
            if name.split(".")[0] != "torchvision":
                return None
            return importlib.machinery.ModuleSpec(name, self, is_package=True)

        def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
            return Anything(spec.name)

        def exec_module(self, _: types.ModuleType) -> None:
            pass

    finder = Finder()
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]
