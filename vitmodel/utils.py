"""Helpers that every layer uses: atomic files, hashes, seeds, memory and progress bars."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import importlib
import json
import math
import os
import sys
from collections.abc import Iterable, Iterator
from contextvars import ContextVar
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, TypeVar, cast

from vitmodel.errors import UsageError, VitmodelError

if TYPE_CHECKING:
    from tqdm import tqdm

T = TypeVar("T")

NOT_A_MEDICAL_DEVICE = "Research software, not a medical device: no score of it may decide about a patient."


@contextlib.contextmanager
def atomic_path(path: Path | str) -> Iterator[Path]:
    """A temporary path beside `path` that replaces it when the block ends well, and vanishes when it does not.

    Raises `VitmodelError` naming `path` where the disk is full or the place cannot be written.
    """
    path = Path(path)
    temporary = path.with_name(
        f".{path.stem}.tmp{path.suffix}"
    )  # the same name each time, so that a killed run's is written over
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(
                file.fileno()
            )  # a killed process loses nothing, but a power cut may keep the new name and lose the bytes
        temporary.replace(path)
    except OSError as error:
        raise VitmodelError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_atomic(path: Path | str, content: str | bytes) -> None:
    """Write the whole of `content` to `path`, or leave what was there."""
    data = content.encode() if isinstance(content, str) else content
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)


def to_json(value: Any) -> str:
    """`value` as indented JSON; NaN and infinities, which JSON lacks, become null."""

    def plain(item: Any) -> Any:
        if isinstance(item, dict):
            return {str(key): plain(element) for key, element in item.items()}
        if isinstance(item, list | tuple) and not hasattr(item, "_asdict"):
            return [plain(element) for element in item]
        if hasattr(item, "tolist"):  # numpy scalars and arrays
            return plain(item.tolist())
        if isinstance(item, float) and not math.isfinite(item):
            return None
        return item if isinstance(item, str | int | float | bool | None) else str(item)

    return json.dumps(plain(value), indent=2) + "\n"


def sha256_file(path: Path | str) -> str:
    """The SHA-256 of a file's bytes, read in blocks, as 64 hex digits."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@functools.cache
def retain_freed_memory(limit: int = 1 << 28) -> None:
    """Have glibc keep up to `limit` freed bytes for the next arrays, for work that needs the same ones again and again.

    As it is, it gives each array of more than 32 MB back to the system and then pays for every page of the next one. The default is
    more than the pixels of the largest mammogram. On another C library nothing changes.
    """
    mmap_threshold, trim_threshold = -3, -1  # M_MMAP_THRESHOLD and M_TRIM_THRESHOLD of malloc.h
    with contextlib.suppress(AttributeError):
        libc = ctypes.CDLL(None)
        if libc.mallopt(mmap_threshold, limit):  # glibc before 2.35 takes no more than 32 MB
            libc.mallopt(trim_threshold, limit)


def release_freed_memory() -> None:
    """Have glibc return what it holds of freed memory, which grows with the luck of threads and not with what is in use."""
    with contextlib.suppress(AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def derive_seed(*parts: object) -> int:
    """A 63-bit seed that depends on `parts` alone, so that a sample's randomness is independent of order, process and resumption."""
    digest = hashlib.sha256("\x1f".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def import_extra(module: str, extra: str, option: str) -> ModuleType:
    """Import a module that an optional extra of this package installs.

    Args:
        module: Dotted name of the module.
        extra: Name of the extra in pyproject.toml.
        option: The option or command that needs the module; starts the error message.

    Raises:
        UsageError: The module or one of its dependencies is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        missing = error.name or module
        raise UsageError(
            f"{option}: needs the extra `{extra}` ({missing} is not installed): pip install 'vitmodel[{extra}]'"
        ) from error


_bars_shown: ContextVar[bool] = ContextVar("bars_shown", default=True)


@contextlib.contextmanager
def progress_bars(shown: bool) -> Iterator[None]:
    """Show or hide the bars of `progress` within the block."""
    token = _bars_shown.set(shown)
    try:
        yield
    finally:
        _bars_shown.reset(token)


def progress(
    items: Iterable[T] | None, what: str, total: int | None = None, unit: str = "image", initial: int = 0
) -> tqdm[T]:
    """`items` behind a progress bar on standard error that shows what is done, what is left and how long it takes.

    Without `items` the bar is for `update` calls. A log file gets a line now and then, a terminal a moving bar.
    """
    from tqdm import tqdm

    interval = 0.5 if sys.stderr.isatty() else 10
    shown: dict[str, Any] = {"desc": what, "total": total, "unit": unit, "initial": initial, "dynamic_ncols": True}
    shown |= {"mininterval": interval, "disable": not _bars_shown.get()}
    return cast("tqdm[T]", tqdm(items, file=sys.stderr, **shown))
