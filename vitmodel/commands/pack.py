"""The command `pack`: write a model package as one file."""

from __future__ import annotations

from vitmodel.config import PackConfig
from vitmodel.model.package_file import pack
from vitmodel.model.shared_package import find_package
from vitmodel.utils import sha256_file


def pack_package(config: PackConfig) -> None:
    """Write OUT and print its size and SHA-256.

    Raises:
        UsageError: PACKAGE is no package, or OUT exists.
        VitmodelError: A file cannot be read or written.
    """
    folder, _ = find_package(config.package)
    pack(folder, config.out)
    print(f"{config.out}: {config.out.stat().st_size / 1e6:.1f} MB, SHA-256 {sha256_file(config.out)}")
