"""The inbox: every way into the node stores objects here, as they were sent, before it says that it has them."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterable
from pathlib import Path

from sqlalchemy import delete, select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from vitmodel.errors import DiskFullError, InvalidObjectError
from vitmodel.node.database import Database
from vitmodel.node.facts import ObjectFacts, read_facts
from vitmodel.node.models import Instance, Result, Study, Transfer

logger = logging.getLogger(__name__)

ABANDONED_SECONDS = 3600
"""Age from which a file that was never completed is removed at the next start."""
STALE_TRANSFER_SECONDS = 300
"""Time without an object after which an association is taken for dead: its receiver may have been killed."""


class Inbox:
    """The folder and the table of received objects.

    Args:
        database: The node's database.
        folder: The node's folder; objects are stored in FOLDER/inbox/STUDY/OBJECT.dcm.
        min_free_bytes: Objects are refused while less space than this is free.
        clock: Function that returns the time in seconds.
    """

    def __init__(
        self, database: Database, folder: Path, min_free_bytes: int, clock: Callable[[], float] = time.time
    ) -> None:
        self.database = database
        self.folder = folder
        self.min_free_bytes = min_free_bytes
        self.clock = clock
        (folder / "inbox").mkdir(parents=True, exist_ok=True)

    def check_space(self, incoming: int = 0) -> None:
        """Raise DiskFullError unless the watermark is kept after `incoming` more bytes."""
        if shutil.disk_usage(self.folder / "inbox").free - incoming < self.min_free_bytes:
            raise DiskFullError("disk: less space is left than the watermark asks for; free some, or lower it")

    def store(self, content: bytes, source: str, association: str = "") -> ObjectFacts:
        """Store an object: on the disk first, then in the database. It may be acknowledged when this returns.

        An object that was stored before is left as it is: a SOP Instance UID names one object for ever.

        Args:
            content: A DICOM file, with preamble and file meta information.
            source: Who sent it.
            association: The open association by which it came; '' = none.

        Raises:
            InvalidObjectError: It cannot be stored; sending it again is of no use.
            DiskFullError: There is no space; it can be sent again later.
        """
        facts = read_facts(content)
        self.check_space(len(content))
        path = self.path_of(facts)
        digest = hashlib.sha256(content).hexdigest()
        if not path.exists():
            self._write(path, content)
        self._commit(facts, path, len(content), digest, source, association)
        return facts

    def _commit(
        self, facts: ObjectFacts, path: Path, size: int, digest: str, source: str, association: str = ""
    ) -> None:
        """Add a stored object to the database, in one transaction."""
        for is_last in (False, False, True):
            try:
                with self.database.write() as session:
                    self._register(session, facts, path, size, digest, source)
                    if association:
                        self._touch(session, association, facts.study_uid)
                return
            except IntegrityError:  # PostgreSQL: another association added the same study or object meanwhile
                if is_last:
                    raise

    def path_of(self, facts: ObjectFacts) -> Path:
        """Return the file of an object. Both parts of its name were checked to be UIDs."""
        return self.folder / "inbox" / facts.study_uid / f"{facts.sop_uid}.dcm"

    def hold(self, association: str, study_uid: str) -> None:
        """Note that objects of a study are about to arrive, so that it does not count as complete."""
        with self.database.write() as session:
            self._touch(session, association, study_uid)

    def end_transfer(self, association: str) -> None:
        """Note that an association has ended."""
        with self.database.write() as session:
            session.execute(delete(Transfer).where(Transfer.association == association))

    def adopt(self) -> int:
        """Register files that a killed receiver stored and did not register; return their number.

        Files that were never completed are removed: their sender has no confirmation that they were stored.
        """
        adopted = 0
        now = self.clock()
        with self.database.read() as session:
            known = set(session.scalars(select(Instance.path)))
        for path in (self.folder / "inbox").glob("*/*"):
            if path.suffix == ".part":
                with contextlib.suppress(OSError):
                    if now - path.stat().st_mtime > ABANDONED_SECONDS:
                        path.unlink()
            elif path.suffix == ".dcm" and str(path.relative_to(self.folder)) not in known:
                content = path.read_bytes()
                try:
                    facts = read_facts(content)
                except InvalidObjectError as error:
                    logger.warning("a file in the inbox is left alone: %s", error)
                    continue
                self._commit(facts, path, len(content), hashlib.sha256(content).hexdigest(), "adopted")
                adopted += 1
        return adopted

    def _write(self, path: Path, content: bytes) -> None:
        """Write a file so that it is complete, or absent, after a power cut."""
        part = path.with_name(f".{path.stem}.{uuid.uuid4().hex[:8]}.part")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with part.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            part.replace(path)
            folder = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
        except OSError as error:
            with contextlib.suppress(OSError):
                part.unlink(missing_ok=True)
            raise DiskFullError(f"disk: cannot write ({error.strerror}); free some space") from error

    def _register(self, session: Session, facts: ObjectFacts, path: Path, size: int, digest: str, source: str) -> None:
        now = self.clock()
        known = session.get(Instance, facts.sop_uid)
        if known is not None:
            known.repeats += 1
            if known.sha256 != digest:
                logger.warning("an object was sent again with other content; the first one is kept")
            return
        is_result = session.scalars(select(Result.job_id).where(Result.sop_uid == facts.sop_uid)).first() is not None
        ignored = facts.ignored or ("own result" if is_result else "")
        study = session.get(Study, facts.study_uid, with_for_update=True)
        if study is None:
            study = Study(study_uid=facts.study_uid, first_arrival=now, last_arrival=now, pending=True)
            session.add(study)
            session.flush()
        if not study.pending:
            study.pending, study.first_arrival = True, now
        study.last_arrival = now
        if not ignored:
            study.patient_id, study.issuer = facts.patient_id, facts.issuer
            study.study_date, study.accession = facts.study_date, facts.accession
        session.add(
            Instance(
                sop_uid=facts.sop_uid,
                study_uid=facts.study_uid,
                series_uid=facts.series_uid,
                sop_class=facts.sop_class,
                syntax=facts.syntax,
                path=str(path.relative_to(self.folder)),
                size=size,
                sha256=digest,
                patient_id=facts.patient_id,
                laterality=facts.laterality,
                view=facts.view,
                ignored=ignored,
                source=source[:64],
                received_at=now,
            )
        )

    def _touch(self, session: Session, association: str, study_uid: str) -> None:
        transfer = session.get(Transfer, (association, study_uid))
        if transfer is None:
            session.add(Transfer(association=association, study_uid=study_uid, seen_at=self.clock()))
        else:
            transfer.seen_at = self.clock()


def open_transfers(session: Session, study_uids: Iterable[str], now: float) -> dict[str, int]:
    """Return for each study the number of open associations that have sent objects of it."""
    rows = session.scalars(
        select(Transfer.study_uid).where(
            Transfer.study_uid.in_(list(study_uids)), Transfer.seen_at > now - STALE_TRANSFER_SECONDS
        )
    )
    result: dict[str, int] = {}
    for study_uid in rows:
        result[study_uid] = result.get(study_uid, 0) + 1
    return result
