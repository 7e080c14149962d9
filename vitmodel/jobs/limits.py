"""Limits that the shell or the container sets for this process: address space and open files."""

from __future__ import annotations

import contextlib
import resource

from vitmodel.errors import VitmodelError

MAX_DESCRIPTORS = 65536
"""Number of open files to which the limit is raised at most."""


def check_address_space(needed: int) -> None:
    """Check that the limit on the address space, which `ulimit -v` sets, leaves `needed` bytes.

    It is checked before heavy imports, because OpenBLAS ends a process that has too little by itself.

    Raises:
        VitmodelError: The limit is lower.
    """
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if 0 <= limit < needed:
        raise VitmodelError(
            f"this process may use {limit / 1e9:.1f} GB of address space and needs {needed / 1e9:.1f} GB or more; "
            "raise the limit (ulimit -v unlimited)"
        )


def raise_descriptor_limit() -> int:
    """Raise the soft limit on open files as far as the hard one and `MAX_DESCRIPTORS` allow, and return it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    soft = MAX_DESCRIPTORS if soft < 0 else soft
    wanted = MAX_DESCRIPTORS if hard < 0 else min(hard, MAX_DESCRIPTORS)
    if wanted > soft:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
            return wanted
    return soft
