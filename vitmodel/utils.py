"""Helpers that every layer uses: atomic files, hashes, seeds, memory and progress bars."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import functools
import hashlib
import importlib
import json
import math
import os
import sys
import traceback
from collections.abc import Iterable, Iterator, Sequence
from contextvars import ContextVar
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, TypeVar, cast

from vitmodel.errors import DiskFullError, UsageError, VitmodelError

if TYPE_CHECKING:
    from tqdm import tqdm

T = TypeVar("T")

M_TRIM_THRESHOLD = -1
"""Parameter of `mallopt`, from malloc.h."""
M_MMAP_THRESHOLD = -3
"""Parameter of `mallopt`, from malloc.h."""
SQLITE_FULL, SQLITE_IOERR = 13, 10
"""Codes of errors, from sqlite3.h."""
NOT_A_MEDICAL_DEVICE = "Research software, not a medical device. Do not use its scores for clinical decisions."


@contextlib.contextmanager
def atomic_path(path: Path | str) -> Iterator[Path]:
    """Yield a temporary path in the folder of `path`; at the end of the block it replaces `path`.

    If the block raises, the temporary file is deleted and `path` is left as it was.

    Raises:
        VitmodelError: The disk is full or the folder cannot be written; the message names `path`.
    """
    path = Path(path)
    # The name is the same each time, so that the next run overwrites what a killed run has left.
    temporary = path.with_name(f".{path.stem}.tmp{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())  # without it, a power cut may keep the new name and lose the bytes
        temporary.replace(path)
    except OSError as error:
        raise VitmodelError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_atomic(path: Path | str, content: str | bytes) -> None:
    """Write `content` to `path` completely, or leave the file as it was."""
    data = content.encode(errors="backslashreplace") if isinstance(content, str) else content
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)


def to_json(value: Any) -> str:
    """Return `value` as indented JSON; NaN and infinities, which JSON lacks, become null."""

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


def text_table(rows: Sequence[Sequence[str]]) -> str:
    """Return rows as lines with aligned columns, for the terminal."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def sha256_file(path: Path | str) -> str:
    """Return the SHA-256 of a file's bytes as 64 hex digits; the file is read in blocks."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@functools.cache
def retain_freed_memory(limit: int = 1 << 28) -> None:
    """Make glibc keep up to `limit` freed bytes for later arrays, for work that often allocates arrays of one size.

    By default, glibc returns each array of more than 32 MB to the system, and the next one pays for a page fault per
    page. The default limit exceeds the pixels of the largest mammogram. Other C libraries are left unchanged.
    """
    with contextlib.suppress(AttributeError):
        libc = ctypes.CDLL(None)
        if libc.mallopt(M_MMAP_THRESHOLD, limit):  # fails before glibc 2.35, which accepts at most 32 MB
            libc.mallopt(M_TRIM_THRESHOLD, limit)


def release_freed_memory() -> None:
    """Make glibc return freed memory to the system; the amount it keeps depends on the timing of threads."""
    with contextlib.suppress(AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def describe_failure(error: BaseException) -> str:
    """Return the type of an unexpected error and where it was raised, without its message.

    Messages of libraries quote what they could not read, which may be a patient's name in a damaged header.
    """
    frames = traceback.extract_tb(error.__traceback__)
    place = f" at {Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else ""
    return f"{type(error).__name__}{place}"


def is_full_disk(error: BaseException | None) -> bool:
    """Return whether a full disk caused an error, directly or through others."""
    while error is not None:
        if isinstance(error, DiskFullError):
            return True
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        # SQLite can also report a failed write as an input/output error; the low byte is the kind of error.
        if getattr(error, "sqlite_errorcode", 0) & 0xFF in (SQLITE_FULL, SQLITE_IOERR):
            return True
        error = error.__cause__ or error.__context__
    return False


def derive_seed(*parts: object) -> int:
    """Return a 63-bit seed that depends on `parts` alone.

    A sample's randomness is thereby independent of order, process and resumption.
    """
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


def progress_shown() -> bool:
    """Return whether progress bars are shown here; see `progress_bars`."""
    return _bars_shown.get()


def progress(
    items: Iterable[T] | None, what: str, total: int | None = None, unit: str = "image", initial: int = 0
) -> tqdm[T]:
    """Return `items` with a progress bar on standard error.

    A terminal shows a moving bar; a log file gets a line about every 10 seconds.

    Args:
        items: The items to iterate over; None = the caller advances the bar with `update`.
        what: Label of the bar.
        total: Number of items, if `len(items)` does not tell.
        unit: Name of one item.
        initial: Number of items that are done already.
    """
    from tqdm import tqdm

    interval = 0.5 if sys.stderr.isatty() else 10
    settings: dict[str, Any] = {"desc": what, "total": total, "unit": unit, "initial": initial, "dynamic_ncols": True}
    settings |= {"mininterval": interval, "disable": not _bars_shown.get()}
    return cast("tqdm[T]", tqdm(items, file=sys.stderr, **settings))
