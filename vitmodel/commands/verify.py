"""The command `verify`: check a model package and print what was checked."""

from __future__ import annotations

from vitmodel.config import VerifyConfig
from vitmodel.model.package import verify_package


def verify(config: VerifyConfig) -> None:
    """Print what was checked of PACKAGE.

    Raises:
        UsageError: PACKAGE is not a model package.
        VitmodelError: A file or a value is wrong; the message names it.
    """
    print(verify_package(config.package))
