"""Files with what their headers say of patient, exam and image, grouped by what they share."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from vitmodel.pixels.identity import ImageIdentity

logger = logging.getLogger(__name__)
Key = TypeVar("Key", bound=Hashable)

MAX_SHOWN = 5
"""Number of collisions of one kind that the log describes."""
PLACEHOLDER = re.compile(
    r"|[0x*?._-]+|(the )?(anon(ymous|ymized|ymised|ymisiert|ym|yme)?|unknown|none|null|nan|n/?a|removed"
    r"|redacted|deleted|de-?identified|no[ _-]?(id|name)|patient([ _-]?id)?|test|unbekannt|inconnu|desconocido)"
    r"[ _^-]*(patient|id)?",
    re.IGNORECASE,
)
"""Values that de-identification writes in place of a PatientID or AccessionNumber: they identify nobody."""
PLACEHOLDER_DATES = {"00010101", "11111111", "18000101", "19000101", "19010101", "19700101", "20000101"}


@dataclass(frozen=True)
class IdentifiedFile:
    """A file, what its header says, and the patient that its name or folder suggests."""

    path: str
    identity: ImageIdentity
    name: str

    @property
    def study(self) -> str:
        """The study, or the file itself where the study is unknown."""
        return self.identity.study_id or self.path

    @property
    def has_patient(self) -> bool:
        """Whether the PatientID identifies somebody."""
        return PLACEHOLDER.fullmatch(self.identity.patient_id) is None

    @property
    def exam_date(self) -> str:
        """The date of the exam, '' if it is unknown or a placeholder."""
        return "" if self.identity.exam_date in PLACEHOLDER_DATES else self.identity.exam_date

    @property
    def accession(self) -> str:
        """The AccessionNumber, '' if it is unknown or a placeholder."""
        return "" if PLACEHOLDER.fullmatch(self.identity.accession) else self.identity.accession


class Groups:
    """Groups of rows that grow together where rows share a key (union-find)."""

    def __init__(self, rows: Iterable[int]) -> None:
        self._parent = {row: row for row in rows}

    def join(self, key: Callable[[int], Hashable]) -> None:
        """Join the rows whose key is equal; None and '' join nothing."""
        first: dict[Hashable, int] = {}
        for row in self._parent:
            value = key(row)
            if value:
                self._parent[self._root(row)] = self._root(first.setdefault(value, row))

    def members(self) -> list[list[int]]:
        """Return the rows of each group, in order of first appearance."""
        return list(group_rows(self._parent, self._root).values())

    def _root(self, row: int) -> int:
        while self._parent[row] != row:
            row = self._parent[row]
        return row


def group_rows(rows: Iterable[int], key: Callable[[int], Key]) -> dict[Key, list[int]]:
    """Return the rows of each key, in order of first appearance."""
    groups: dict[Key, list[int]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return groups


def warn_of_collisions(what: str, notes: Sequence[str]) -> None:
    """Log a warning on the collisions of one kind, if there are any."""
    if notes:
        more = f"; and {len(notes) - MAX_SHOWN} more" if len(notes) > MAX_SHOWN else ""
        logger.warning("%s: %s%s", what, "; ".join(notes[:MAX_SHOWN]), more)
