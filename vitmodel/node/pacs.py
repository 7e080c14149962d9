"""The destination of results: a PACS that is reached by DIMSE or by DICOMweb."""

from __future__ import annotations

import json
import logging
import time
import uuid
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Protocol

import httpx
from pydicom import Dataset, dcmread
from pydicom.uid import UID, ExplicitVRLittleEndian, ImplicitVRLittleEndian, generate_uid
from pynetdicom import evt
from pynetdicom.association import Association
from pynetdicom.sop_class import (  # type: ignore[attr-defined]
    StorageCommitmentPushModel,
    StorageCommitmentPushModelInstance,
    StudyRootQueryRetrieveInformationModelFind,
)

from vitmodel.config import NodeConfig
from vitmodel.errors import UnreachableError
from vitmodel.node.dicomweb import WebQueries
from vitmodel.node.dimse import DicomPeer, make_peer
from vitmodel.node.identity import identity_of, query_keys

logger = logging.getLogger(__name__)

REPLY_SECONDS = 3.0
"""How long an association stays open for a commitment's reply; most PACSs open a new one."""
WARNINGS = (0xB000, 0xB006, 0xB007)
"""The object is stored, with some attributes coerced or without match (PS3.4, table B.2-1)."""
UNCOMPRESSED = [ExplicitVRLittleEndian, ImplicitVRLittleEndian]


@dataclass(frozen=True)
class SendStatus:
    """What the destination said to one result."""

    state: str
    """stored, pending (try again), refused (never try again) or unsupported (it takes no objects of this kind)."""
    code: str
    message: str = ""


def status_of(code: int) -> SendStatus:
    """Return what a status of C-STORE or of STOW-RS means (PS3.4, table B.2-1; PS3.7, annex C)."""
    text = f"0x{code:04X}"
    if code == 0 or code in WARNINGS:
        return SendStatus("stored", text, "" if code == 0 else "stored with a warning")
    if code & 0xFF00 == 0xA700 or code in (0x0110, 0x0213):  # out of resources, processing failure
        return SendStatus("pending", text, "the destination is out of resources")
    return SendStatus("refused", text, "the destination refused the object")


OnStatus = Callable[[str, SendStatus], object]
"""Called with the SOP Instance UID and the status of each result, as soon as it is known."""
OnReport = Callable[[Dataset], object]


@dataclass(frozen=True, kw_only=True)
class CommitmentRequest:
    """A request for storage commitment."""

    references: Sequence[tuple[str, str]]
    """SOP class and SOP instance of each result."""
    transaction: str
    on_report: OnReport
    """Called with the reply, if it comes on the same association."""
    is_answered: Callable[[], bool]
    """Whether the reply has come, on whichever association."""


class Destination(Protocol):
    """A PACS."""

    def identity(self, study_uid: str) -> dict[str, str] | None:
        """Return the identity of a study's patient; None = the PACS does not know the study."""

    def send(self, results: Sequence[Dataset], on_status: OnStatus) -> None:
        """Send results; `on_status` is called for each."""

    def request_commitment(self, request: CommitmentRequest) -> None:
        """Ask for storage commitment of results, and wait a moment for the reply."""


def make_destination(config: NodeConfig) -> Destination:
    """Return the destination that the configuration names."""
    if config.destination.startswith("http"):
        return WebDestination(config.destination)
    return DicomDestination(make_peer(config, config.destination))


class DicomDestination:
    """A PACS that is reached by DIMSE.

    Args:
        peer: The PACS.
    """

    def __init__(self, peer: DicomPeer) -> None:
        self.peer = peer

    def identity(self, study_uid: str) -> dict[str, str] | None:
        ae = self.peer.entity()
        ae.add_requested_context(StudyRootQueryRetrieveInformationModelFind)
        association = self.peer.associate(ae)
        if association is None:
            return None  # it answers no queries
        try:
            found = None
            model = StudyRootQueryRetrieveInformationModelFind
            for status, answer in association.send_c_find(query_keys(study_uid), model):
                if not status:
                    raise UnreachableError("the PACS did not answer the query for the study's patient")
                if status.Status in (0xFF00, 0xFF01) and answer is not None:
                    found = identity_of(answer)
            return found
        finally:
            association.release()

    def send(self, results: Sequence[Dataset], on_status: OnStatus) -> None:
        """Send results by C-STORE. Only the contexts of these results are proposed, each also uncompressed."""
        ae = self.peer.entity()
        for sop_class, syntax in sorted({(str(r.SOPClassUID), str(r.file_meta.TransferSyntaxUID)) for r in results}):
            if syntax not in UNCOMPRESSED:
                ae.add_requested_context(sop_class, syntax)
        for sop_class in sorted({str(result.SOPClassUID) for result in results}):
            ae.add_requested_context(sop_class, UNCOMPRESSED)
        association = self.peer.associate(ae)
        if association is None:
            for result in results:
                on_status(str(result.SOPInstanceUID), UNSUPPORTED)
            return
        try:
            for result in results:
                on_status(str(result.SOPInstanceUID), self._store(association, result))
        finally:
            if association.is_established:
                association.release()

    def request_commitment(self, request: CommitmentRequest) -> None:
        """Ask for storage commitment (PS3.4, annex J). The reply comes on this association or on a new one to us.

        Raises:
            UnreachableError: The PACS does not answer, or does not offer the service.
        """

        def on_event_report(event: evt.Event) -> tuple[int, None]:
            request.on_report(event.event_information)
            return 0x0000, None

        ae = self.peer.entity()
        ae.add_requested_context(StorageCommitmentPushModel)
        association = self.peer.associate(ae, [(evt.EVT_N_EVENT_REPORT, on_event_report)])
        if association is None:
            raise UnreachableError("the PACS offers no storage commitment; use --confirm qido with --pacs-web")
        action = Dataset()
        action.TransactionUID = request.transaction
        action.ReferencedSOPSequence = [_reference(*reference) for reference in request.references]
        try:
            status, _ = association.send_n_action(
                action, 1, StorageCommitmentPushModel, StorageCommitmentPushModelInstance
            )
            if not status or status.Status != 0:
                code = f"0x{status.Status:04X}" if status else "no answer"
                raise UnreachableError(f"the PACS did not take the request for storage commitment ({code})")
            end = time.monotonic() + REPLY_SECONDS
            while not request.is_answered() and time.monotonic() < end:
                time.sleep(0.1)
        finally:
            if association.is_established:
                association.release()

    def _store(self, association: Association, result: Dataset) -> SendStatus:
        """Send one result, uncompressed where the PACS does not take its transfer syntax."""
        accepted = {
            str(context.transfer_syntax[0])
            for context in association.accepted_contexts
            if context.abstract_syntax == result.SOPClassUID
        }
        if not accepted:
            return UNSUPPORTED
        if str(result.file_meta.TransferSyntaxUID) not in accepted:
            result = _uncompressed(result, accepted)
        status = association.send_c_store(result)
        if not status:
            raise UnreachableError("the destination ended the association in the middle of a transfer")
        return status_of(int(status.Status))


UNSUPPORTED = SendStatus("unsupported", "", "the destination accepts no objects of this SOP class")


def _uncompressed(result: Dataset, accepted: Collection[str]) -> Dataset:
    """Return a result in the first uncompressed transfer syntax of those that the PACS accepts."""
    if UID(result.file_meta.TransferSyntaxUID).is_compressed:
        result.decompress(generate_instance_uid=False)
    syntax = next(syntax for syntax in UNCOMPRESSED if syntax in accepted)
    result.file_meta.TransferSyntaxUID = syntax
    buffer = BytesIO()
    result.save_as(buffer, implicit_vr=syntax.is_implicit_VR, little_endian=True, enforce_file_format=True)
    buffer.seek(0)
    return dcmread(buffer)


def _reference(sop_class: str, sop_uid: str) -> Dataset:
    item = Dataset()
    item.ReferencedSOPClassUID, item.ReferencedSOPInstanceUID = sop_class, sop_uid
    return item


class WebDestination:
    """A PACS that is reached by DICOMweb (PS3.18): STOW-RS and QIDO-RS.

    Args:
        root: Its DICOMweb root; it may hold a user and password, which are never shown.
    """

    def __init__(self, root: str) -> None:
        self.web = WebQueries(root)

    def identity(self, study_uid: str) -> dict[str, str] | None:
        return self.web.identity(study_uid)

    def send(self, results: Sequence[Dataset], on_status: OnStatus) -> None:
        """Send results by STOW-RS, one request each, so that each has a status of its own."""
        for result in results:
            on_status(str(result.SOPInstanceUID), self._store(result))

    def request_commitment(self, request: CommitmentRequest) -> None:
        raise UnreachableError("DICOMweb has no storage commitment; use --confirm qido")

    def _store(self, result: Dataset) -> SendStatus:
        buffer = BytesIO()
        result.save_as(buffer, enforce_file_format=True)
        boundary = uuid.uuid4().hex
        head = f"--{boundary}\r\nContent-Type: application/dicom\r\n\r\n".encode()
        body = head + buffer.getvalue() + f"\r\n--{boundary}--\r\n".encode()
        kind = f'multipart/related; type="application/dicom"; boundary={boundary}'
        answer = self.web.request(
            "POST", "studies", content=body, headers={"Content-Type": kind, "Accept": "application/dicom+json"}
        )
        return _stow_status(answer, str(result.SOPInstanceUID))


def _stow_status(answer: httpx.Response, sop_uid: str) -> SendStatus:
    """Return what a response to STOW-RS says of an object (PS3.18, section 10.5.3)."""
    if answer.status_code in (200, 202, 409):
        try:
            outcome = Dataset.from_json(json.dumps(answer.json()))
        except (ValueError, KeyError, TypeError):
            outcome = Dataset()
        for item in outcome.get("FailedSOPSequence") or []:
            if item.get("ReferencedSOPInstanceUID", sop_uid) == sop_uid:
                return status_of(int(item.get("FailureReason", 0xC000)))
        if answer.status_code != 409:
            return SendStatus("stored", f"HTTP {answer.status_code}")
    if answer.status_code in (408, 429) or answer.status_code >= 500:
        return SendStatus("pending", f"HTTP {answer.status_code}", "the destination is out of resources")
    if answer.status_code == 415:
        return SendStatus("unsupported", "HTTP 415", UNSUPPORTED.message)
    return SendStatus("refused", f"HTTP {answer.status_code}", "the destination refused the object")


def new_transaction() -> str:
    """Return a new Transaction UID."""
    return str(generate_uid())


def read_result(path: Path) -> Dataset:
    """Return a result as it is to be sent."""
    return dcmread(path)
