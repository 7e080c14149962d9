"""The build backend: setuptools, after the viewer's files were taken from npm."""

from __future__ import annotations

import shutil
from typing import Any

import unpack
from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403 (the other hooks of a backend)


def build_wheel(*arguments: Any, **options: Any) -> str:
    """Unpack the viewer, and build the wheel from nothing else."""
    shutil.rmtree("build", ignore_errors=True)
    unpack.unpack_viewer()
    return str(build_meta.build_wheel(*arguments, **options))
