"""Look for new mammograms in a PACS again and again, and fetch each once."""

from __future__ import annotations

import hashlib
import logging
import random
import threading
import uuid
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import date, timedelta

from sqlalchemy import delete, select

from vitmodel.errors import DiskFullError, UnreachableError
from vitmodel.node.inbox import Inbox
from vitmodel.node.models import FoundStudy, Instance, Result
from vitmodel.node.queueing import back_off
from vitmodel.node.sources import Archive, ListedObject, ListedStudy, Source

logger = logging.getLogger(__name__)

LOOK_AGAIN_SECONDS = 6 * 3600
"""Age from which the objects of a study are listed again although their number is the same: one may be replaced."""
FORGET_SECONDS = 7 * 86400
"""A study that the PACS has not listed for this time is forgotten."""
LONGEST_WAIT = 3600.0
"""Longest wait in seconds before an object that could not be fetched is asked for again."""


@dataclass(frozen=True, kw_only=True)
class PollingRules:
    """Which studies are looked for, and how often."""

    days: int = 7
    """Age of the oldest studies."""
    seconds: float = 30.0
    """Pause between two looks."""


class Poller:
    """Fetch the new mammograms of a PACS.

    A study is looked into when the PACS states another number of objects than before. Objects that we
    have, and our own results, are not fetched. What is known is in the database: a restart loses and repeats nothing.

    Args:
        source: The PACS.
        inbox: Where the objects arrive.
        rules: Which studies are looked for.
    """

    def __init__(self, source: Source, inbox: Inbox, rules: PollingRules) -> None:
        self.source = source
        self.inbox = inbox
        self.rules = rules
        self.rng = random.Random()

    def work(self, stop: threading.Event) -> None:
        """Look for new objects until `stop` is set; a PACS that is down is asked again later."""
        trouble = ""
        while not stop.is_set():
            try:
                self.turn(stop)
                new_trouble = ""
            except (UnreachableError, DiskFullError) as error:
                new_trouble = str(error)
            if new_trouble != trouble:  # not every time
                logger.error("finding in %s: %s", self.source.name, new_trouble or "works again")
                trouble = new_trouble
            stop.wait(self.rules.seconds)

    def turn(self, stop: threading.Event | None = None) -> int:
        """Look into the studies of the last days once, newest first; return the number of fetched objects.

        Raises:
            UnreachableError: The PACS does not answer.
            DiskFullError: There is no space for objects.
        """
        fetched = 0
        # of tomorrow, too: the PACS may be in another time zone
        tomorrow = date.fromtimestamp(self.inbox.clock()) + timedelta(days=1)
        with self.source.connected() as archive:
            for age in range(self.rules.days + 2):
                for study in archive.studies(tomorrow - timedelta(days=age)):
                    if stop is not None and stop.is_set():
                        return fetched
                    fetched += self._look_into(archive, study)
        with self.inbox.database.write() as session:
            old = FoundStudy.looked_at < self.inbox.clock() - FORGET_SECONDS
            session.execute(delete(FoundStudy).where(FoundStudy.source == self.source.name, old))
        return fetched

    def _look_into(self, archive: Archive, study: ListedStudy) -> int:
        """Fetch the new objects of a study; return their number."""
        with self.inbox.database.read() as session:
            known = session.get(FoundStudy, (self.source.name, study.uid))
        now = self.inbox.clock()
        if known is not None:
            is_same = study.count and known.count == study.count and now - known.looked_at < LOOK_AGAIN_SECONDS
            if now < known.not_before or (is_same and not known.failures):
                return 0
        failures = known.failures if known is not None else 0
        before = known.digest if known is not None else ""
        missing: list[ListedObject] = []
        try:
            objects = archive.objects(study.uid)
            digest = _digest(objects)
            # Without a change nothing is fetched: objects may be missing because their retention is over.
            if digest != before:
                before = ""
                missing = self._unknown(objects)
                self._fetch(archive, study.uid, missing)
        except UnreachableError:
            # It may be this study that makes the PACS fail: let the others come first.
            self._record(study, before, failures + 1)
            raise
        left = self._unknown(missing)
        if left:
            logger.warning("%d objects of a study could not be fetched from %s", len(left), self.source.name)
        self._record(study, "" if left else digest, failures + 1 if left else 0)
        return len(missing) - len(left)

    def _fetch(self, archive: Archive, study_uid: str, objects: Iterable[ListedObject]) -> None:
        """Bring objects of a study into the inbox; the study counts as in transfer meanwhile."""
        association = str(uuid.uuid4())
        try:
            for item in objects:
                self.inbox.check_space()
                self.inbox.hold(association, study_uid)
                archive.fetch(item, association)
        finally:
            self.inbox.end_transfer(association)

    def _unknown(self, objects: Iterable[ListedObject]) -> list[ListedObject]:
        """Return the objects that we have neither received nor made."""
        listed = {item.sop_uid: item for item in objects}
        with self.inbox.database.read() as session:
            for column in (Instance.sop_uid, Result.sop_uid):
                for sop_uid in session.scalars(select(column).where(column.in_(list(listed)))):
                    listed.pop(sop_uid, None)
        return list(listed.values())

    def _record(self, study: ListedStudy, digest: str, failures: int) -> None:
        """Store what we know of a study now."""
        now = self.inbox.clock()
        wait = back_off(failures, self.rules.seconds, LONGEST_WAIT, self.rng) if failures else 0.0
        with self.inbox.database.write() as session:
            session.merge(
                FoundStudy(
                    source=self.source.name,
                    study_uid=study.uid,
                    count=study.count,
                    digest=digest,
                    looked_at=now,
                    failures=failures,
                    not_before=now + wait,
                )
            )


def _digest(objects: Iterable[ListedObject]) -> str:
    """Return a digest of the set of objects."""
    return hashlib.sha256(" ".join(sorted(item.sop_uid for item in objects)).encode()).hexdigest()
