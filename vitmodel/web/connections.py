"""Limits on connections: how many there are, and how long each may take to send a request or to read an answer."""

from __future__ import annotations

import asyncio
import logging
import resource
import time
from dataclasses import dataclass, field
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

logger = logging.getLogger(__name__)

RESERVED_FILES = 256
"""Descriptors left for files, sockets and libraries in addition to the connections."""
MIN_RATE = 1000
"""Bytes per second that a body must have on average once `body` seconds have passed."""
LOG_SECONDS = 10
"""Shortest time between two lines of the log about the same kind of trouble."""
RETRY_SECONDS = 5
"""What a client that is turned away is asked to wait."""


@dataclass
class ConnectionLimits:
    """Limits of one server, and the connections that wait for a request.

    Attributes:
        connections: Largest number of connections.
        header: Seconds for the head of a request.
        body: Seconds without progress of a body or an answer.
        waiting: The connections without a complete head of a request, the oldest first.
        turned_away: Number of connections that got status 503.
        closed: Number of connections that were closed because they were too slow, or made room for others.
    """

    connections: int
    header: float
    body: float
    waiting: dict[GuardedProtocol, None] = field(default_factory=dict)
    turned_away: int = 0
    closed: int = 0


def raise_file_limit(connections: int) -> int:
    """Raise the limit of open files to the hard limit; return the number of connections, lowered to what it allows."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    if hard == resource.RLIM_INFINITY:
        return connections
    # An upload keeps a second descriptor for its file.
    return max(1, min(connections, (hard - RESERVED_FILES) // 2))


class GuardedProtocol(H11Protocol):
    """HTTP/1.1 of uvicorn with time limits, which uvicorn has only for idle connections.

    Args:
        limits: The limits, shared by all connections of the server.
        options: Those of the base class.
    """

    def __init__(self, *, limits: ConnectionLimits, **options: Any) -> None:
        super().__init__(**options)
        self.limits = limits
        self._timer: asyncio.TimerHandle | None = None
        self._phase = ""
        self._since = 0.0
        self._seen = 0.0
        self._received = 0
        self._rejected = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > self.limits.connections and not self._make_room():
            self._rejected = True
            self.limits.turned_away += 1
            self._reject(503, "the server has too many connections; try again later", f"Retry-After: {RETRY_SECONDS}")
            return
        self._enter("head")

    def _make_room(self) -> bool:
        """Close the connection that has waited longest without a complete request; return whether there was one."""
        oldest = next(iter(self.limits.waiting), None)
        if oldest is None:
            return False
        oldest.close_late("makes room")
        return True

    def data_received(self, data: bytes) -> None:
        if self._rejected:
            return
        self._seen = time.monotonic()
        self._received += len(data)
        super().data_received(data)
        self._follow()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._follow()

    def connection_lost(self, exc: Exception | None) -> None:
        self._leave()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._enter("answer")

    def resume_writing(self) -> None:
        super().resume_writing()
        self._leave()
        self._follow()

    def _follow(self) -> None:
        """Start or stop the timer as the state of the connection requires."""
        if self.transport.is_closing() or self._phase == "answer":
            return
        state = self.conn.their_state
        if state is h11.IDLE:
            # An idle connection that has sent nothing is closed by uvicorn's own timer, but may make room before.
            if self._phase != "head":
                self._enter("head")
        elif state is h11.SEND_BODY:
            if self._phase != "body":
                self._enter("body")
        else:
            self._leave()

    def _enter(self, phase: str) -> None:
        self._leave()
        self._phase = phase
        self._since = self._seen = time.monotonic()
        self._received = 0
        if phase == "head":
            self.limits.waiting[self] = None
        self._timer = self.loop.call_later(self.limits.header if phase == "head" else self.limits.body, self._look)

    def _leave(self) -> None:
        self._phase = ""
        self.limits.waiting.pop(self, None)
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _look(self) -> None:
        """Close the connection if it is too slow, or look again later."""
        if self._phase == "head":
            self.close_late("sent no complete head of a request")
            return
        if self._phase == "answer":
            self.limits.closed += 1
            self._leave()
            self.transport.abort()
            return
        now = time.monotonic()
        if self.flow.read_paused:  # the server itself is slow
            self._since, self._seen, self._received = now, now, 0
        silent = now - self._seen >= self.limits.body
        slow = now - self._since >= self.limits.body and self._received < MIN_RATE * (now - self._since)
        if silent or slow:
            self.close_late("sent its body too slowly")
            return
        self._timer = self.loop.call_later(max(0.05, self.limits.body - (now - self._seen)), self._look)

    def close_late(self, reason: str) -> None:
        """Close the connection with status 408, if no answer has begun."""
        self.limits.closed += 1
        can_answer = self._received > 0 if self._phase == "head" else not self.cycle.response_started
        self._leave()
        log_rarely("connections closed: %s", reason)
        if can_answer:
            self._reject(408, "the request was not sent in time", "")
        else:
            self.transport.close()
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.disconnected = True
            self.cycle.message_event.set()

    def _reject(self, status: int, sentence: str, header: str) -> None:
        """Write an answer without the parser, whose state may not allow one, and close the connection."""
        body = f'{{"error": "{sentence}"}}'
        lines = [f"HTTP/1.1 {status} {'Request Timeout' if status == 408 else 'Service Unavailable'}"]
        lines += ["Content-Type: application/json", f"Content-Length: {len(body)}", "Connection: close"]
        lines += [header] if header else []
        self.transport.write(("\r\n".join(lines) + "\r\n\r\n" + body).encode())
        self.transport.close()


_last_logged: dict[str, tuple[float, int]] = {}


def log_rarely(text: str, reason: str) -> None:
    """Log a warning, at most every `LOG_SECONDS` for each reason, with the number of times it happened since."""
    last, count = _last_logged.get(reason, (float("-inf"), 0))
    now = time.monotonic()
    if now - last < LOG_SECONDS:
        _last_logged[reason] = (last, count + 1)
        return
    _last_logged[reason] = (now, 0)
    logger.warning(text + (f" ({count} more since the last line)" if count else ""), reason)


def handle_loop_error(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """Log an error of the event loop briefly; asyncio writes a traceback for every connection it cannot accept."""
    error = context.get("exception")
    if isinstance(error, OSError):
        log_rarely("%s", f"{context.get('message', 'error')}: {error.strerror}")
    else:
        loop.default_exception_handler(context)
