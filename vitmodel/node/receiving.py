"""The DICOM server: C-ECHO, C-STORE of every class in every transfer syntax, and replies to storage commitment."""

from __future__ import annotations

import logging
import socket
import ssl
import threading
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydicom import Dataset
from pynetdicom import AE, _config, evt
from pynetdicom.sop_class import StorageCommitmentPushModel, Verification  # type: ignore[attr-defined]
from pynetdicom.transport import RequestHandler, ThreadedAssociationServer

from vitmodel.errors import DiskFullError, InvalidObjectError, UsageError, VitmodelError
from vitmodel.node.audit import Audit
from vitmodel.node.inbox import Inbox

logger = logging.getLogger(__name__)

SUCCESS, OUT_OF_RESOURCES, CANNOT_UNDERSTAND, PROCESSING_FAILURE = 0x0000, 0xA700, 0xC000, 0x0110
MAX_PDU = 1 << 17
"""Largest protocol data unit in bytes; pynetdicom's 16 kB cost a third of the throughput."""
SILENCE_SECONDS = 10
"""How long a connection may be silent before it asks for an association."""
MAX_SILENT = 200
"""Most connections that are silent at a time; further ones wait."""
OnReport = Callable[[Dataset], object]


@dataclass(frozen=True, kw_only=True)
class Listener:
    """Where the server listens, and who may use it."""

    ae_title: str = "VITMODEL"
    host: str = "127.0.0.1"
    port: int = 11112
    calling: tuple[str, ...] = ()
    """AE titles that may connect; empty = all."""
    check_called: bool = True
    """Whether a peer must call this node by its AE title."""
    tls_certificate: Path | None = None
    tls_key: Path | None = None
    tls_ca: Path | None = None
    """Certificates of the authorities whose clients may connect; None = no client certificate is asked for."""
    max_associations: int = 50


class _Handler(RequestHandler):
    """A connection that becomes an association once its peer has sent something.

    pynetdicom keeps two threads for half a minute for every connection, also for those of load balancers that hang up
    at once; they count as associations, so that real senders are rejected.
    """

    def handle(self) -> None:
        server: Any = self.server
        with server.waiting:
            has_spoken = self._wait_for_data()
        if has_spoken:
            super().handle()
        else:
            server.shutdown_request(self.request)

    def _wait_for_data(self) -> bool:
        self.request.settimeout(SILENCE_SECONDS)
        try:
            # of socket, because a TLS socket cannot peek: these are the bytes of its handshake
            return bool(socket.socket.recv(self.request, 1, socket.MSG_PEEK))
        except OSError:
            return False
        finally:
            self.request.settimeout(None)


class _Server(ThreadedAssociationServer):
    """A server whose silent connections are limited."""

    daemon_threads = True
    request_queue_size = 128  # 5 by default: a burst of connections would wait for seconds

    def __init__(self, *arguments: Any, **options: Any) -> None:
        self.waiting = threading.BoundedSemaphore(MAX_SILENT)
        super().__init__(*arguments, **(options | {"request_handler": _Handler}))


class _LazyContext(ssl.SSLContext):
    """A TLS context whose handshake waits for the first bytes.

    pynetdicom wraps a connection in the thread that accepts all of them: one silent client would block the others.
    """

    def wrap_socket(self, *arguments: Any, **options: Any) -> ssl.SSLSocket:
        return super().wrap_socket(*arguments, **(options | {"do_handshake_on_connect": False}))


def server_context(listener: Listener) -> ssl.SSLContext | None:
    """Return the TLS settings of the server, or None without a certificate (TLS 1.2 or later: PS3.15, B.9).

    Raises:
        UsageError: A file cannot be read as a certificate or key.
    """
    if listener.tls_certificate is None:
        return None
    context = _LazyContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        context.load_cert_chain(listener.tls_certificate, listener.tls_key)
        if listener.tls_ca is not None:
            context.load_verify_locations(listener.tls_ca)
            context.verify_mode = ssl.CERT_REQUIRED
    except OSError as error:
        raise UsageError(
            f"tls_certificate: the certificate, key or authority cannot be read ({error.strerror or error}); "
            "give three PEM files"
        ) from error
    return context


class Receiver:
    """The server, which runs in threads of its own from `start` to `stop`.

    Args:
        inbox: Where objects are stored.
        listener: Address, allow-lists and TLS.
        audit: Where associations are recorded.
        on_report: Called with the event information of each N-EVENT-REPORT of storage commitment.
    """

    def __init__(self, inbox: Inbox, listener: Listener, audit: Audit, on_report: OnReport) -> None:
        self.inbox = inbox
        self.listener = listener
        self.audit = audit
        self.on_report = on_report
        self._names: dict[int, str] = {}
        self._lock = threading.Lock()
        # Classes and syntaxes that pynetdicom does not know are stored, too: what is scored is decided later.
        _config.UNRESTRICTED_STORAGE_SERVICE = True
        _config.LOG_HANDLER_LEVEL = "none"  # its messages show header values
        self.ae = AE(listener.ae_title)
        self.ae.maximum_pdu_size = MAX_PDU
        self.ae.maximum_associations = listener.max_associations
        self.ae.require_called_aet = listener.check_called
        self.ae.require_calling_aet = list(listener.calling)
        self.ae.network_timeout = 60
        self.ae.acse_timeout = 30
        self.ae.dimse_timeout = 60
        self.ae.add_supported_context(Verification)
        self.ae.add_supported_context(StorageCommitmentPushModel, scu_role=False, scp_role=True)
        self.server: Any = None

    def start(self) -> int:
        """Listen, and return the port.

        Raises:
            VitmodelError: The port is in use.
        """
        handlers: list[Any] = [
            (evt.EVT_C_STORE, self._on_store),
            (evt.EVT_C_ECHO, self._on_echo),
            (evt.EVT_N_EVENT_REPORT, self._on_event_report),
            (evt.EVT_RELEASED, self._on_end),
            (evt.EVT_ABORTED, self._on_end),
            (evt.EVT_CONN_CLOSE, self._on_end),
        ]
        address = (self.listener.host, self.listener.port)
        try:
            self.server = self.ae.make_server(
                address, evt_handlers=handlers, ssl_context=server_context(self.listener), server_class=_Server
            )
        except OSError as error:
            raise VitmodelError(
                f"dicom_port: cannot listen on {address[0]}:{address[1]}: {error.strerror}; choose another port"
            ) from error
        self.ae._servers.append(self.server)  # as `AE.start_server` does, which takes no class of server
        threading.Thread(target=self.server.serve_forever, name="dicom", daemon=True).start()
        return int(self.server.server_address[1])

    def stop(self) -> None:
        """Stop listening and abort what is in transfer; the sender sees it and sends the object again."""
        if self.server is not None:
            self.server.shutdown()
            self.server = None
        self.ae.shutdown()

    def _on_echo(self, event: evt.Event) -> int:
        self._record(event, "C-ECHO")
        return SUCCESS

    def _on_store(self, event: evt.Event) -> int:
        """Store an object and return the status: success means that it is on the disk and in the database."""
        caller = str(event.assoc.requestor.ae_title).strip()
        status = SUCCESS
        subject = str(getattr(event.request, "AffectedSOPInstanceUID", ""))
        try:
            self.inbox.store(event.encoded_dataset(), caller, self._name_of(event.assoc))
        except DiskFullError as error:
            logger.error("an object was refused: %s", error)
            status = OUT_OF_RESOURCES
        except InvalidObjectError as error:
            logger.warning("an object was refused: %s", error)
            status = CANNOT_UNDERSTAND
        except Exception as error:  # noqa: BLE001 (the sender must learn that the object is not stored)
            logger.error("an object could not be stored: %s", type(error).__name__)
            status = PROCESSING_FAILURE
        if not self._record(event, "C-STORE", subject, f"0x{status:04X}"):
            return status or OUT_OF_RESOURCES  # it is recorded when the object is sent again
        return status

    def _on_event_report(self, event: evt.Event) -> tuple[int, Dataset | None]:
        self._record(event, "N-EVENT-REPORT")
        try:
            self.on_report(event.event_information)
        except Exception as error:  # noqa: BLE001 (the peer must learn that its report was not taken)
            logger.error("a storage commitment report could not be read: %s", type(error).__name__)
            return PROCESSING_FAILURE, None
        return SUCCESS, None

    def _record(self, event: evt.Event, action: str, subject: str = "", outcome: str = "") -> bool:
        """Record what a peer did; return False if that fails, for example because the disk is full."""
        caller = str(event.assoc.requestor.ae_title).strip()
        try:
            self.audit.record(f"ae:{caller}", action, subject, outcome)
        except Exception as error:  # noqa: BLE001 (the peer must get an answer)
            logger.error("%s could not be recorded: %s", action, type(error).__name__)
            return False
        return True

    def _on_end(self, event: evt.Event) -> None:
        """Note the end of an association; it is called once or twice per association."""
        with self._lock:
            name = self._names.pop(id(event.assoc), None)
        if name is not None:
            try:
                self.inbox.end_transfer(name)
            except Exception as error:  # noqa: BLE001 (the transfer becomes stale by itself)
                logger.error("the end of an association could not be recorded: %s", type(error).__name__)

    def _name_of(self, association: object) -> str:
        """Return the name of an association that has sent an object."""
        with self._lock:
            return self._names.setdefault(id(association), str(uuid.uuid4()))
