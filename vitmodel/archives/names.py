"""Write file names that are not UTF-8 as text, which every table and report can hold, and find the files again."""

from __future__ import annotations

import os
import re
from pathlib import Path

ESCAPED_BYTE = re.compile(rb"\\x([89a-f][0-9a-f])")


def path_to_text(path: Path | str) -> str:
    r"""Return a path in which every byte that is not UTF-8 is written as `\xNN`; other paths are unchanged.

    Names from old Windows shares and zips may be in Latin-1. Python represents their bytes as lone surrogates, which
    can be written to no UTF-8 file.
    """
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def path_on_disk(path: Path | str) -> str:
    """Return the path by which the operating system knows a path that `path_to_text` may have written."""
    text = os.fspath(path)
    if "\\x" not in text or os.path.lexists(text):
        return text
    return os.fsdecode(ESCAPED_BYTE.sub(lambda match: bytes.fromhex(match[1].decode()), os.fsencode(text)))
