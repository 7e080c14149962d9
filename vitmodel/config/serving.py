"""Options of the verbs for a server that other programs ask: serve and keys."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from vitmodel.config.access import AccessConfig, Scope
from vitmodel.config.base import Config, require
from vitmodel.config.scoring import PredictorConfig


@dataclass(frozen=True, kw_only=True)
class ServeConfig(PredictorConfig, AccessConfig):
    """Score mammograms over HTTP: POST images to /scores, or drop them on the page at /.

    Uploads are deleted once they are scored, unless KEEP_MINUTES is set. A server that other machines can reach needs
    API keys or single sign-on.
    """

    GROUPS: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "server": (
            "host", "port", "upload_limit", "requests", "connections", "header_timeout", "body_timeout",
            "request_timeout", "shutdown_timeout", "keep_minutes",
        )
    }  # fmt: skip

    host: str = "127.0.0.1"
    """Address to listen on. 127.0.0.1 = this machine only, 0.0.0.0 = all networks of this machine."""
    port: int = 8000
    """Port to listen on. 0 = any free port."""
    upload_limit: int = 2000
    """Largest size of a request, and of the unpacked content of an archive, in megabytes."""
    requests: int = 400
    """Largest number of uploads that are received, waiting or scored at a time. Others get status 503."""
    connections: int = 2000
    """Largest number of open connections; it is lowered to what the limit of open files allows. A new one replaces
    the oldest that has sent no complete request; if there is none, it gets status 503."""
    header_timeout: float = 10
    """Seconds within which a connection must send the head of a request."""
    body_timeout: float = 30
    """Seconds after which a connection is closed that sends no more of a body, or reads no more of an answer."""
    request_timeout: float = 900
    """Seconds after which an upload that is not scored yet gets status 503."""
    shutdown_timeout: float = 10
    """Seconds within which the server ends after SIGTERM; requests that are not answered by then get status 503."""
    keep_minutes: float = 0
    """Keep uploads from the page for this many minutes, so that their images can be looked at in the reading room: four
    views, heat maps and readings. 0 = delete uploads once they are scored."""

    def _check(self) -> None:
        super()._check()
        require(0 <= self.port <= 65535, "port", "must lie between 0 and 65535")
        require(0 <= self.keep_minutes < float("inf"), "keep_minutes", "must not be negative")
        for name in ("upload_limit", "requests", "connections"):
            require(getattr(self, name) >= 1, name, "must be at least 1")
        for name in ("header_timeout", "body_timeout", "request_timeout", "shutdown_timeout"):
            require(0 < getattr(self, name) < float("inf"), name, "must be a number of seconds above 0")


@dataclass(frozen=True, kw_only=True)
class KeysConfig(Config):
    """Make an API key for `vitmodel serve`: print it once, and append its hash to a file.

    Remove the key's line from the file to withdraw it; a running server notices.
    """

    GROUPS: ClassVar[Mapping[str, tuple[str, ...]]] = {"input and output": ("file", "name", "scopes")}

    file: Path
    """Key file for --api-key-file, made if it does not exist."""
    name: str
    """Name of the key, which the server's log shows: who or what uses it."""
    scopes: tuple[Scope, ...] = ("read", "score")
    """What the key allows: read = the page, facts about the model and metrics; score = sending images; admin =
    everything."""

    def _check(self) -> None:
        super()._check()
        is_name = re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", self.name)
        require(bool(is_name), "name", "must be 1 to 64 letters, digits, dots, hyphens or underscores")
        require(bool(self.scopes), "scopes", "is empty; choose from read, score, admin")
