"""Questions to a PACS by DICOMweb (PS3.18): QIDO-RS."""

from __future__ import annotations

import json
from typing import Any

import httpx
from pydicom import Dataset

from vitmodel.errors import UnreachableError
from vitmodel.node.dimse import TIMEOUT
from vitmodel.node.identity import identity_of


class WebQueries:
    """Queries by QIDO-RS.

    Args:
        root: The DICOMweb root.
    """

    def __init__(self, root: str) -> None:
        self.client = httpx.Client(base_url=root.rstrip("/") + "/", timeout=TIMEOUT, follow_redirects=False)

    def request(self, method: str, path: str, **options: Any) -> httpx.Response:
        """Return the answer to a request; raise UnreachableError without one, or if it asks for a login."""
        try:
            answer = self.client.request(method, path, **options)
        except httpx.HTTPError as error:
            raise UnreachableError(f"the PACS does not answer by DICOMweb ({type(error).__name__})") from error
        if answer.status_code in (401, 403):
            raise UnreachableError(f"the PACS refuses our login (HTTP {answer.status_code}); check user and password")
        return answer

    def identity(self, study_uid: str) -> dict[str, str] | None:
        """Return the identity of a study's patient; None = the PACS does not know the study."""
        fields = ("00080090", "00080050", "00100021", "00200010")
        found = self.search("studies", {"StudyInstanceUID": study_uid, "includefield": list(fields)})
        return identity_of(found[0]) if found else None

    def stored(self, study_uid: str, sop_uid: str) -> bool:
        """Return whether the PACS has an object."""
        return bool(self.search(f"studies/{study_uid}/instances", {"SOPInstanceUID": sop_uid}))

    def search(self, path: str, query: dict[str, Any], *, may_be_absent: bool = True) -> list[Dataset]:
        """Return the matches of a query.

        Args:
            path: Resource below the root.
            query: Matching keys and parameters.
            may_be_absent: Whether HTTP 404 means that nothing matches; otherwise it is an error of the address.

        Raises:
            UnreachableError: The PACS cannot answer.
        """
        answer = self.request("GET", path, params=query, headers={"Accept": "application/dicom+json"})
        if answer.status_code == 204 or (answer.status_code == 404 and may_be_absent):
            return []
        if answer.status_code != 200:
            raise UnreachableError(f"the PACS cannot answer a query (HTTP {answer.status_code})")
        try:
            return [Dataset.from_json(json.dumps(item)) for item in answer.json()]
        except Exception as error:  # pydicom's exceptions for wrong values have no common type
            raise UnreachableError("the PACS's answer to a query is no DICOM JSON; check the DICOMweb root") from error
