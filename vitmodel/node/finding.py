"""Find new objects in an Orthanc that does not send them: its list of changes, read from where we stopped."""

from __future__ import annotations

import logging
import threading
from typing import Any

import httpx
from sqlalchemy import select

from vitmodel.errors import DiskFullError, InvalidObjectError
from vitmodel.node.audit import Audit
from vitmodel.node.inbox import Inbox
from vitmodel.node.models import Cursor, Instance, Result

logger = logging.getLogger(__name__)

CHANGES = 100
"""Changes per request."""
POLL_SECONDS = 2.0
TIMEOUT = 60.0


class OrthancFinder:
    """Fetch the new objects of an Orthanc. The cursor moves with each object, so that none is lost or fetched twice.

    Args:
        root: Address of Orthanc's REST interface; it may hold a user and password, which are never shown.
        inbox: Where the objects are stored.
        audit: Where fetched objects are recorded.
    """

    def __init__(self, root: str, inbox: Inbox, audit: Audit) -> None:
        self.client = httpx.Client(base_url=root.rstrip("/") + "/", timeout=TIMEOUT)
        self.inbox = inbox
        self.audit = audit
        host = f"{self.client.base_url.host}:{self.client.base_url.port or ''}"
        self.name = f"orthanc {host}{self.client.base_url.path}"

    def work(self, stop: threading.Event) -> None:
        """Fetch new objects until `stop` is set."""
        while not stop.is_set():
            try:
                fetched = self.turn(stop)
            except (httpx.HTTPError, DiskFullError) as error:
                logger.error("new objects cannot be fetched from Orthanc: %s", type(error).__name__)
                fetched = 0
            if not fetched:
                stop.wait(POLL_SECONDS)

    def turn(self, stop: threading.Event | None = None) -> int:
        """Read one page of changes and fetch its new objects; return the number of changes.

        Raises:
            httpx.HTTPError: Orthanc does not answer.
            DiskFullError: There is no space; the same object is fetched again at the next turn.
        """
        answer = self._get("changes", params={"since": self._cursor(), "limit": CHANGES}).json()
        for change in answer["Changes"]:
            if stop is not None and stop.is_set():
                break
            if change["ChangeType"] == "NewInstance":
                self._fetch(change["ID"])
            self._move(int(change["Seq"]))
        return len(answer["Changes"])

    def _fetch(self, identifier: str) -> None:
        """Store an object, unless we have it or made it, or it has been deleted meanwhile."""
        facts = self._get(f"instances/{identifier}", missing=True)
        if facts is None:
            return
        sop_uid = facts.json()["MainDicomTags"].get("SOPInstanceUID", "")
        with self.inbox.database.read() as session:
            is_known = session.get(Instance, sop_uid) is not None
            if is_known or session.scalars(select(Result.job_id).where(Result.sop_uid == sop_uid)).first() is not None:
                return
        content = self._get(f"instances/{identifier}/file", missing=True)
        if content is None:
            return
        try:
            self.inbox.store(content.content, "orthanc")
            self.audit.record(f"find:{self.name}", "GET file", sop_uid, "HTTP 200")
        except InvalidObjectError as error:
            logger.warning("an object of Orthanc is left out: %s", error)

    def _get(self, path: str, missing: bool = False, **options: Any) -> Any:
        """Return Orthanc's answer; None for an object that it does not have, where that may be."""
        answer = self.client.get(path, **options)
        if missing and answer.status_code == 404:
            return None
        return answer.raise_for_status()

    def _cursor(self) -> int:
        with self.inbox.database.read() as session:
            cursor = session.get(Cursor, self.name)
            return int(cursor.value) if cursor else 0

    def _move(self, number: int) -> None:
        with self.inbox.database.write() as session:
            session.merge(Cursor(name=self.name, value=str(number)))
