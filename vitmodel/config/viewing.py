"""Options of the verb that shows finished results in a browser."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from vitmodel.config.base import Config, require

LOOPBACK = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True, kw_only=True)
class ViewConfig(Config):
    """Show the results of `vitmodel predict` in a browser: a worklist, and exams with four views and heat maps.

    Nothing is written, and no request leaves this machine.
    """

    GROUPS: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "input and output": ("scores", "package"),
        "server": ("host", "port"),
    }

    scores: Path
    """Output folder of `vitmodel predict`. The images are read from where they were then."""
    package: tuple[Path, ...] = ()
    """Model packages that made the scores, for heat maps on demand and the threshold."""
    host: str = "127.0.0.1"
    """Address to listen on; only those of this machine: 127.0.0.1, ::1 or localhost."""
    port: int = 8001
    """Port to listen on. 0 = any free port."""

    def _check(self) -> None:
        super()._check()
        require(0 <= self.port <= 65535, "port", "must lie between 0 and 65535")
        require(
            self.host in LOOPBACK,
            "host",
            f"must be one of {', '.join(LOOPBACK)}: the pages show patients' images without a login",
        )
