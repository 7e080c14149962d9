"""The command `unpack`: write the model package in a file to a folder."""

from __future__ import annotations

from vitmodel.config import UnpackConfig
from vitmodel.model.package_file import unpack


def unpack_package(config: UnpackConfig) -> None:
    """Write OUT.

    Raises:
        UsageError: FILE is no file of a package, or OUT exists.
        VitmodelError: The file is damaged, or holds something that does not belong into a package.
    """
    unpack(config.file, config.out)
    print(f"package: {config.out}")
