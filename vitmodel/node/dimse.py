"""Associations with a PACS that is reached by DIMSE."""

from __future__ import annotations

import ssl
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote, urlsplit

from pynetdicom import AE
from pynetdicom.association import Association

from vitmodel.config import NodeConfig
from vitmodel.errors import UnreachableError

TIMEOUT = 30.0
"""Seconds to wait for an answer."""


@dataclass(frozen=True, kw_only=True)
class DicomPeer:
    """A PACS, as seen from this node."""

    own_title: str
    """AE title of this node."""
    title: str
    host: str
    port: int
    context: ssl.SSLContext | None = None
    """TLS settings; None = no TLS."""

    def entity(self) -> AE:
        """Return an application entity, to which the caller adds what it proposes."""
        ae = AE(self.own_title)
        ae.acse_timeout = ae.dimse_timeout = ae.network_timeout = TIMEOUT
        ae.connection_timeout = 10
        return ae

    def associate(self, ae: AE, handlers: Iterable[Any] = ()) -> Association | None:
        """Return an association, or None if the PACS accepts none of the contexts.

        Raises:
            UnreachableError: The PACS does not answer or rejects us.
        """
        tls = (self.context, self.host) if self.context is not None else None
        association = ae.associate(self.host, self.port, ae_title=self.title, evt_handlers=list(handlers), tls_args=tls)
        if association.is_established:
            return association
        if association.rejected_contexts and not association.accepted_contexts:
            return None
        if association.is_rejected:
            raise UnreachableError("the PACS rejected the association; check the AE titles on both sides")
        raise UnreachableError("the PACS does not answer; check its address, and whether it runs")


def make_peer(config: NodeConfig, address: str) -> DicomPeer:
    """Return the PACS at an address `dicom://` or `dicoms://`, which the configuration has checked."""
    url = urlsplit(address)
    assert url.hostname
    assert url.port
    context = None
    if url.scheme == "dicoms":
        context = ssl.create_default_context(cafile=config.tls_ca)
        if config.tls_certificate is not None:
            context.load_cert_chain(config.tls_certificate, config.tls_key)
    return DicomPeer(
        own_title=config.ae_title,
        title=unquote(url.username or ""),
        host=url.hostname,
        port=url.port,
        context=context,
    )
