"""API keys: a text file with one line per key, `NAME SCOPES SHA-256`; the keys themselves are stored nowhere."""

from __future__ import annotations

import hashlib
import hmac
import logging
import os
import re
import secrets
from dataclasses import dataclass
from pathlib import Path

from vitmodel.config.access import SCOPES
from vitmodel.errors import UsageError
from vitmodel.utils import write_atomic

logger = logging.getLogger(__name__)

PRIVATE = 0o600


@dataclass(frozen=True)
class ApiKey:
    """A line of the key file."""

    name: str
    scopes: frozenset[str]
    digest: str
    """SHA-256 of the key as 64 hex digits. A key has 256 random bits, so a slow hash would add nothing."""


def hash_key(key: str) -> str:
    """Return the SHA-256 of a key."""
    return hashlib.sha256(key.encode()).hexdigest()


def read_keys(path: Path) -> tuple[ApiKey, ...]:
    """Return the keys of a file. Empty lines and lines that start with # are skipped.

    Raises:
        UsageError: The file cannot be read, or a line is not valid.
    """
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(
            f"api_key_file: {path} cannot be read ({error}); make one with `vitmodel keys FILE NAME`"
        ) from None
    return tuple(_parse(line, f"{path}:{number}") for number, line in enumerate(lines, 1) if _holds_key(line))


def _holds_key(line: str) -> bool:
    return bool(line.strip()) and not line.lstrip().startswith("#")


def _parse(line: str, place: str) -> ApiKey:
    """Return the key of a line; the message of an invalid one does not quote it, because it may hold a key."""
    words = line.split()
    scopes = frozenset(words[1].split(",")) if len(words) == 3 else frozenset()
    if not scopes or not scopes <= set(SCOPES) or not re.fullmatch("[0-9a-f]{64}", words[2]):
        raise UsageError(
            f"api_key_file: {place} is not `NAME SCOPES SHA-256` with scopes of {', '.join(SCOPES)}; "
            "make the line with `vitmodel keys`"
        )
    return ApiKey(words[0], scopes, words[2])


def add_key(path: Path, name: str, scopes: tuple[str, ...]) -> str:
    """Make a key, append its hash to the file, which only the owner can read, and return the key.

    Raises:
        UsageError: The file has a key of this name, or is not valid.
    """
    text = ""
    if path.exists():
        if any(key.name == name for key in read_keys(path)):
            raise UsageError(f"name: {path} has a key named {name}; choose another name, or remove its line first")
        text = path.read_text()
    key = secrets.token_urlsafe(32)
    separator = "" if not text or text.endswith("\n") else "\n"
    write_atomic(path, f"{text}{separator}{name} {','.join(scopes)} {hash_key(key)}\n")
    path.chmod(PRIVATE)
    return key


class ApiKeys:
    """The keys of a file, read again when the file changes, so that a removed key loses its access at once.

    Args:
        path: The file.

    Raises:
        UsageError: The file cannot be read, holds no key, or is not valid.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._state = self._file_state()
        self._keys = read_keys(path)
        if not self._keys:
            raise UsageError(f"api_key_file: {path} holds no key; make one with `vitmodel keys {path} NAME`")

    def find(self, key: str) -> ApiKey | None:
        """Return the key's line, or None if the file has none. Every line is compared, in constant time."""
        state = self._file_state()
        if state != self._state:
            self._state, self._keys = state, self._read_again()
        digest = hash_key(key)
        found = [entry for entry in self._keys if hmac.compare_digest(entry.digest, digest)]
        return found[0] if found else None

    def _read_again(self) -> tuple[ApiKey, ...]:
        """Return the keys of the changed file; none if it is not valid, because a removed key must not stay valid."""
        try:
            return read_keys(self.path)
        except UsageError as error:
            logger.error("%s; no key is accepted until it is corrected", error)
            return ()

    def _file_state(self) -> tuple[int, int, int] | None:
        try:
            status = os.stat(self.path)
        except OSError:
            return None
        return status.st_ino, status.st_size, status.st_mtime_ns
