"""Options of the verb that shows finished results in a browser."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from vitmodel.config.base import Config, Needs, require

LOOPBACK = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True, kw_only=True)
class ViewConfig(Config):
    """Show the results of `vitmodel predict` or `evaluate` in a browser: a worklist, and exams with four views.

    No request leaves this machine. Only what readers enter is written, to one file.
    """

    GROUPS: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "input and output": ("scores", "package", "compare"),
        "readings": ("readings", "reader", "blind", "export", "export_study"),
        "server": ("host", "port"),
    }
    NEEDS: ClassVar[Mapping[str, Needs]] = {
        "blind": Needs("a run without --export and --export-study", lambda config: not config.exports),
        "package": Needs("a run without --export and --export-study", lambda config: not config.exports),
        "compare": Needs("a run without --export and --export-study", lambda config: not config.exports),
    }

    scores: Path
    """Output folder of `vitmodel predict` or `evaluate`. The images are read from where they were then."""
    package: tuple[Path, ...] = ()
    """Model packages that made the scores, for heat maps on demand, the threshold and the model card."""
    compare: Path | None = None
    """Another output folder with scores of the same exams, shown next to the first."""
    readings: Path | None = None
    """File of what readers enter, one JSON object per line. none = readings.jsonl in SCORES."""
    reader: str = ""
    """Name of the only reader. Empty = each reader types the name once."""
    blind: bool = False
    """Hide scores and heat maps until the reading of an exam is stored; exams come in a random order per reader."""
    export: Path | None = None
    """Write the readings as a table of labels for `vitmodel etl` to this CSV file, and end."""
    export_study: Path | None = None
    """Write the readings with one row per reader, exam and breast to this CSV file, and end."""
    host: str = "127.0.0.1"
    """Address to listen on; only those of this machine: 127.0.0.1, ::1 or localhost."""
    port: int = 8001
    """Port to listen on. 0 = any free port."""

    @property
    def exports(self) -> bool:
        """Whether to write readings instead of showing pages."""
        return self.export is not None or self.export_study is not None

    def _check(self) -> None:
        super()._check()
        require(0 <= self.port <= 65535, "port", "must lie between 0 and 65535")
        require(
            self.host in LOOPBACK,
            "host",
            f"must be one of {', '.join(LOOPBACK)}: the pages show patients' images without a login",
        )
