"""Run an application with uvicorn: limits on connections, logs without addresses, and an end within a set time."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any

import uvicorn

from vitmodel.errors import UsageError
from vitmodel.web.connections import ConnectionLimits, GuardedProtocol, handle_loop_error

logger = logging.getLogger(__name__)

BACKLOG = 1024
"""Connections that the system holds until they are accepted."""
GRACE = 0.6
"""Part of the time for shutting down that open requests get; the rest is for what the application cleans up."""


def open_socket(host: str, port: int) -> socket.socket:
    """Return a socket that listens.

    Raises:
        UsageError: The address or the port cannot be used.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=BACKLOG)
    except OSError as error:
        raise UsageError(
            f"port: cannot listen on {host}:{port}: {error.strerror}; choose another port with --port"
        ) from error


def make_server(
    app: Any, limits: ConnectionLimits, shutdown_seconds: float, on_overtime: Callable[[], None]
) -> uvicorn.Server:
    """Return a server; `run(sockets=[...])` ends after SIGINT or SIGTERM or, in a thread, when `should_exit` is set.

    Args:
        app: The ASGI application.
        limits: Limits on connections.
        shutdown_seconds: Time from the signal to the end of the process.
        on_overtime: Called if that does not suffice, before the process ends with status 1.
    """
    config = uvicorn.Config(
        app,
        http=functools.partial(GuardedProtocol, limits=limits),  # type: ignore[arg-type] # it is called as a class
        ws="none",
        log_level="critical",
        access_log=False,
        server_header=False,
        proxy_headers=False,  # X-Forwarded-For would replace the address by which the trusted proxy is known
        backlog=BACKLOG,
        timeout_graceful_shutdown=shutdown_seconds * GRACE,  # type: ignore[arg-type] # asyncio takes fractions
    )
    return _Server(config, shutdown_seconds, on_overtime)


def run_server(
    app: Any,
    listening: socket.socket,
    limits: ConnectionLimits,
    shutdown_seconds: float,
    on_overtime: Callable[[], None],
) -> None:
    """Answer requests until SIGINT or SIGTERM.

    Args:
        app: The ASGI application.
        listening: The socket.
        limits: Limits on connections.
        shutdown_seconds: Time from the signal to the end of the process.
        on_overtime: Called if that does not suffice, before the process ends with status 1.
    """
    make_server(app, limits, shutdown_seconds, on_overtime).run(sockets=[listening])


class _Server(uvicorn.Server):
    """A server that ends in time, returns after a signal instead of raising it again, and logs errors of its loop."""

    def __init__(self, config: uvicorn.Config, seconds: float, on_overtime: Callable[[], None]) -> None:
        super().__init__(config)
        self.seconds = seconds
        self.on_overtime = on_overtime
        self.watch: threading.Timer | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        asyncio.get_running_loop().set_exception_handler(handle_loop_error)
        await super().startup(sockets)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        handlers = {number: signal.signal(number, self._stop) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            if self.watch is not None:
                self.watch.cancel()
            for number, handler in handlers.items():
                signal.signal(number, handler)

    def _stop(self, number: int, frame: object) -> None:
        """End gracefully at the first signal, at once at the second."""
        if self.should_exit:
            self.force_exit = True
            return
        self.should_exit = True
        self.watch = threading.Timer(self.seconds, self._end_now)
        self.watch.daemon = True
        self.watch.start()

    def _end_now(self) -> None:
        """End the process although threads still work on images; nothing that they write is needed."""
        logger.warning("the server did not end within %g s and is stopped", self.seconds)
        self.on_overtime()
        os._exit(1)
