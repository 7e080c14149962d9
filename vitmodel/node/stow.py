"""STOW-RS: store the objects of a request in the inbox (DICOM PS3.18, section 10.5)."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from vitmodel.errors import DiskFullError, InvalidObjectError, RequestRefusedError
from vitmodel.node.facts import ObjectFacts
from vitmodel.node.inbox import Inbox
from vitmodel.node.receiving import CANNOT_UNDERSTAND, OUT_OF_RESOURCES


def read_parts(body: bytes, content_type: str) -> Iterator[bytes]:
    """Yield the DICOM files in the body of a STOW-RS request.

    Raises:
        RequestRefusedError: The body is not multipart/related with parts of the type application/dicom.
    """
    kind, _, parameters = content_type.partition(";")
    boundary = re.search(r'boundary="?([^";,]+)"?', parameters)
    if kind.strip().lower() != "multipart/related" or boundary is None:
        raise RequestRefusedError(415, 'send multipart/related; type="application/dicom"; boundary=...')
    delimiter = b"--" + boundary[1].encode("latin-1")
    for part in (b"\r\n" + body).split(b"\r\n" + delimiter)[1:]:
        if part.startswith(b"--"):  # the closing delimiter
            return
        head, separator, content = part.partition(b"\r\n\r\n")
        if not separator:
            raise RequestRefusedError(400, "a part of the request has no head; end its head with an empty line")
        if b"application/dicom" not in head.lower().replace(b"application/dicom+", b""):
            raise RequestRefusedError(415, "a part of the request is not of the type application/dicom")
        yield content
    raise RequestRefusedError(400, "the request ends before its closing boundary; send it again")


def store_parts(inbox: Inbox, parts: Iterator[bytes], source: str) -> tuple[int, dict[str, Any], list[ObjectFacts]]:
    """Store the parts of a request.

    Returns:
        The HTTP status, the response in the DICOM JSON model (PS3.18, section 10.5.3), and what was stored.
    """
    stored: list[ObjectFacts] = []
    failures: list[int] = []
    for content in parts:
        try:
            stored.append(inbox.store(content, source))
        except DiskFullError:
            failures.append(OUT_OF_RESOURCES)
        except InvalidObjectError:
            failures.append(CANNOT_UNDERSTAND)
    answer: dict[str, Any] = {}
    if stored:
        items = [
            {"00081150": _value("UI", facts.sop_class), "00081155": _value("UI", facts.sop_uid)} for facts in stored
        ]
        answer["00081199"] = {"vr": "SQ", "Value": items}
    if failures:
        # (0008,119A) Other Failures Sequence: their UIDs are not known
        answer["0008119A"] = {"vr": "SQ", "Value": [{"00081197": _value("US", code)} for code in failures]}
    if not failures:
        return 200, answer, stored
    if stored:
        return 202, answer, stored
    return 503 if OUT_OF_RESOURCES in failures else 409, answer, stored


def _value(vr: str, value: str | int) -> dict[str, Any]:
    return {"vr": vr, "Value": [value]}
