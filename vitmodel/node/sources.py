"""PACSs in which the node looks for mammograms: by QIDO-RS and WADO-RS, or by C-FIND and C-MOVE."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import date
from typing import Any, Protocol
from urllib.parse import urlsplit

from pydicom import Dataset
from pynetdicom.association import Association
from pynetdicom.sop_class import (  # type: ignore[attr-defined]
    StudyRootQueryRetrieveInformationModelFind,
    StudyRootQueryRetrieveInformationModelMove,
)

from vitmodel.config import NodeConfig
from vitmodel.errors import InvalidObjectError, RequestRefusedError, UnreachableError
from vitmodel.node.audit import Audit
from vitmodel.node.dicomweb import WebQueries
from vitmodel.node.dimse import DicomPeer, make_peer
from vitmodel.node.facts import is_uid
from vitmodel.node.inbox import Inbox
from vitmodel.node.stow import read_parts

logger = logging.getLogger(__name__)

MODALITY = "MG"
MOVE_SECONDS = 300.0
"""Time for a PACS to answer a query or to send one object."""
PENDING = (0xFF00, 0xFF01)
MOVE_DESTINATION_UNKNOWN = 0xA801
ANY_SYNTAX = 'multipart/related; type="application/dicom"; transfer-syntax=*'
"""Accept header of WADO-RS for objects as they are stored; without it, PACSs decompress them (PS3.18, 8.7.3.5.2)."""


@dataclass(frozen=True)
class ListedStudy:
    """A study that a PACS has."""

    uid: str
    count: str
    """Number of its objects, as the PACS states it; '' = not stated."""


@dataclass(frozen=True, order=True)
class ListedObject:
    """A mammogram that a PACS has."""

    study_uid: str
    series_uid: str
    sop_uid: str


class Archive(Protocol):
    """A PACS while we are connected to it. All methods raise UnreachableError if it does not answer."""

    def studies(self, day: date) -> list[ListedStudy]:
        """Return the mammography studies of a day."""

    def objects(self, study_uid: str) -> list[ListedObject]:
        """Return the mammograms of a study."""

    def fetch(self, item: ListedObject, association: str) -> None:
        """Bring an object into the inbox, as part of a transfer of that name, if the PACS still has it."""


class Source(Protocol):
    """A PACS in which we look for studies."""

    name: str
    """Its address without user and password, which is the key of what we know of it."""

    def connected(self) -> AbstractContextManager[Archive]:
        """Provide the PACS during the block; raise UnreachableError if it does not answer."""


def make_source(config: NodeConfig, address: str, inbox: Inbox, audit: Audit) -> Source:
    """Return the PACS at an address, which the configuration has checked."""
    if address.startswith("http"):
        return WebSource(address, inbox, audit)
    return DicomSource(make_peer(config, address))


class WebSource:
    """A PACS that is asked by QIDO-RS and WADO-RS (PS3.18, sections 10.6 and 10.4).

    Args:
        root: Its DICOMweb root; it may hold a user and password, which are never shown.
        inbox: Where objects are stored.
        audit: Where fetched objects are recorded.
    """

    def __init__(self, root: str, inbox: Inbox, audit: Audit) -> None:
        url = urlsplit(root)
        self.name = f"{url.scheme}://{url.netloc.rpartition('@')[2]}{url.path.rstrip('/')}"
        self.web = WebQueries(root)
        self.inbox = inbox
        self.audit = audit

    @contextlib.contextmanager
    def connected(self) -> Iterator[Archive]:
        yield self

    def studies(self, day: date) -> list[ListedStudy]:
        query = {"StudyDate": f"{day:%Y%m%d}", "ModalitiesInStudy": MODALITY, "includefield": "00201208"}
        found = self._matches("studies", query, "StudyInstanceUID")
        return [ListedStudy(uid, _count(answer)) for uid, answer in found.items()]

    def objects(self, study_uid: str) -> list[ListedObject]:
        path = f"studies/{study_uid}/series"
        series = self._matches(path, {"Modality": MODALITY}, "SeriesInstanceUID")
        return [
            ListedObject(study_uid, series_uid, sop_uid)
            for series_uid, answer in series.items()
            if answer.get("Modality", MODALITY) == MODALITY  # a server may ignore the key
            for sop_uid in self._matches(f"{path}/{series_uid}/instances", {}, "SOPInstanceUID")
        ]

    def fetch(self, item: ListedObject, association: str) -> None:
        path = f"studies/{item.study_uid}/series/{item.series_uid}/instances/{item.sop_uid}"
        answer = self.web.request("GET", path, headers={"Accept": ANY_SYNTAX})
        outcome = f"HTTP {answer.status_code}"
        if answer.status_code == 200:
            try:
                for content in read_parts(answer.content, answer.headers.get("Content-Type", "")):
                    self.inbox.store(content, self.name, association)
            except (InvalidObjectError, RequestRefusedError) as error:
                logger.warning("an object of the PACS cannot be stored: %s", error)
                outcome = "unreadable"
        self.audit.record(f"find:{self.name}", "WADO-RS", item.sop_uid, outcome)

    def _matches(self, path: str, query: dict[str, Any], keyword: str) -> dict[str, Dataset]:
        """Return all matches of a query by their UID, whatever number of them the server puts on a page.

        No limit is asked for: with one and ModalitiesInStudy, an offset makes Orthanc 1.10 leave out matches.
        """
        found: dict[str, Dataset] = {}
        while True:
            answers = self.web.search(path, query | {"offset": len(found)}, may_be_absent="/" in path)
            new = {str(answer.get(keyword, "")): answer for answer in answers}
            new = {uid: answer for uid, answer in new.items() if is_uid(uid) and uid not in found}
            if not new:
                return found
            found |= new


class DicomSource:
    """A PACS that is asked by C-FIND and C-MOVE; it sends the objects to this node.

    Args:
        peer: The PACS.
    """

    def __init__(self, peer: DicomPeer) -> None:
        self.peer = peer
        self.name = f"dicom://{peer.title}@{peer.host}:{peer.port}"

    @contextlib.contextmanager
    def connected(self) -> Iterator[Archive]:
        ae = self.peer.entity()
        ae.dimse_timeout = ae.network_timeout = MOVE_SECONDS
        models = (StudyRootQueryRetrieveInformationModelFind, StudyRootQueryRetrieveInformationModelMove)
        for model in models:
            ae.add_requested_context(model)
        association = self.peer.associate(ae)
        if association is None or {context.abstract_syntax for context in association.accepted_contexts} < set(models):
            if association is not None:
                association.release()
            raise UnreachableError("the PACS offers no C-FIND and C-MOVE of the Study Root model to this node")
        try:
            yield DicomArchive(association, self.peer.own_title)
        finally:
            if association.is_established:
                association.release()


class DicomArchive:
    """A PACS during an association.

    Args:
        association: The association.
        move_to: AE title to which objects are sent: that of this node.
    """

    def __init__(self, association: Association, move_to: str) -> None:
        self.association = association
        self.move_to = move_to

    def studies(self, day: date) -> list[ListedStudy]:
        keys = {"StudyDate": f"{day:%Y%m%d}", "ModalitiesInStudy": MODALITY}
        found = self._matches("STUDY", keys, ("StudyInstanceUID", "NumberOfStudyRelatedInstances"))
        return [ListedStudy(uid, _count(answer)) for uid, answer in found.items()]

    def objects(self, study_uid: str) -> list[ListedObject]:
        keys = {"StudyInstanceUID": study_uid, "Modality": MODALITY}
        series = self._matches("SERIES", keys, ("SeriesInstanceUID",))
        return [
            ListedObject(study_uid, series_uid, sop_uid)
            for series_uid, answer in series.items()
            if answer.get("Modality", MODALITY) == MODALITY  # a PACS may ignore the key
            for sop_uid in self._matches(
                "IMAGE", {"StudyInstanceUID": study_uid, "SeriesInstanceUID": series_uid}, ("SOPInstanceUID",)
            )
        ]

    def fetch(self, item: ListedObject, association: str) -> None:
        keys = {
            "StudyInstanceUID": item.study_uid,
            "SeriesInstanceUID": item.series_uid,
            "SOPInstanceUID": item.sop_uid,
        }
        request = _request("IMAGE", keys)
        for status, _ in self.association.send_c_move(
            request, self.move_to, StudyRootQueryRetrieveInformationModelMove
        ):
            if not status:
                raise UnreachableError("the PACS did not answer C-MOVE")
            if status.Status == MOVE_DESTINATION_UNKNOWN:
                raise UnreachableError(
                    f"the PACS does not know {self.move_to} as a destination of C-MOVE (0xA801); add this node to it"
                )

    def _matches(self, level: str, keys: dict[str, str], returned: tuple[str, ...]) -> dict[str, Dataset]:
        """Return all matches of a query by the first of the attributes that are asked for."""
        found: dict[str, Dataset] = {}
        request = _request(level, keys | dict.fromkeys(returned, ""))
        for status, answer in self.association.send_c_find(request, StudyRootQueryRetrieveInformationModelFind):
            if not status:
                raise UnreachableError("the PACS did not answer C-FIND")
            if status.Status in PENDING:
                uid = str(answer.get(returned[0], "")) if answer is not None else ""
                if answer is not None and is_uid(uid):
                    found[uid] = answer
            elif status.Status != 0:
                raise UnreachableError(f"the PACS cannot answer C-FIND (0x{status.Status:04X})")
        return found


def _request(level: str, keys: dict[str, str]) -> Dataset:
    request = Dataset()
    request.QueryRetrieveLevel = level
    for keyword, value in keys.items():
        setattr(request, keyword, value)
    return request


def _count(answer: Dataset) -> str:
    """Return the number of a study's objects as the PACS states it, or '' if it does not."""
    value = answer.get("NumberOfStudyRelatedInstances")
    return "" if value is None else str(value)[:16]
