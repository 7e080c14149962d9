"""The fingerprint of the package and of the options that influence a score; it needs no PyTorch."""

from __future__ import annotations

import hashlib

from vitmodel.config import NodeConfig
from vitmodel.errors import VitmodelError
from vitmodel.utils import sha256_file

PACKAGE_FILES = ("model.safetensors", "config.json")
"""The files of a package that determine its scores, as `vitmodel.model.package_check` names them."""


def package_fingerprint(config: NodeConfig) -> str:
    """Return a hash of everything in the node's configuration that influences a score or a result.

    Raises:
        VitmodelError: A package does not exist.
    """
    parts: list[str] = []
    for folder in (config.package, *config.ensemble):
        for name in PACKAGE_FILES:
            try:
                parts.append(sha256_file(folder / name))
            except OSError as error:
                raise VitmodelError(
                    f"package: {folder / name} cannot be read ({error.strerror}); give the folder of a model package"
                ) from error
    settings = (config.flip, config.runtime, config.precision, config.implausible, config.explain, config.dicom)
    return hashlib.sha256(repr((parts, settings)).encode()).hexdigest()
