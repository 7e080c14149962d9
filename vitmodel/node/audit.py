"""The audit log: who did what to which object, without names."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable

from vitmodel.node.database import Database
from vitmodel.node.models import AuditEntry


def hash_uid(uid: str) -> str:
    """Return the SHA-256 of a UID; '' for none. Whoever has the UID can find its entries, but nobody can read it."""
    return hashlib.sha256(uid.encode()).hexdigest() if uid else ""


class Audit:
    """The writer of the audit log.

    Args:
        database: The node's database.
        clock: Function that returns the time in seconds.
    """

    def __init__(self, database: Database, clock: Callable[[], float] = time.time) -> None:
        self.database = database
        self.clock = clock

    def record(self, who: str, action: str, uid: str = "", outcome: str = "") -> None:
        """Add an entry.

        Args:
            who: `ae:TITLE`, `key:NAME` or `user:NAME`.
            action: What was done, such as C-STORE or GET /studies.
            uid: The object or study concerned; its hash is stored.
            outcome: Status code.
        """
        entry = AuditEntry(
            at=self.clock(), who=who[:128], action=action[:64], subject=hash_uid(uid), outcome=outcome[:64]
        )
        with self.database.write() as session:
            session.add(entry)
