"""Protection of pages on this machine: the Host header is checked, and pages may load only what the server sends."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any
from urllib.parse import urlsplit

HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "same-origin",  # `no-referrer` makes browsers send forms of our own pages with Origin: null
    "Cross-Origin-Resource-Policy": "same-origin",
}
"""Headers of every answer."""


class LocalOnly:
    """ASGI middleware that refuses requests under another name than those of this machine.

    A page of another site can make the browser ask this server, directly or by pointing its own name to 127.0.0.1 (DNS
    rebinding). The first has another Origin, the second another Host.

    Args:
        app: The application.
        names: Host names under which the server may be asked.
    """

    def __init__(self, app: Any, names: Collection[str]) -> None:
        self.app = app
        self.names = frozenset(names)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
        if not self._is_local(headers):
            body = b"this address is not served here; open http://localhost"
            start = {"type": "http.response.start", "status": 403, "headers": [(b"content-type", b"text/plain")]}
            await send(start)
            await send({"type": "http.response.body", "body": body})
            return

        async def send_with_headers(message: Any) -> None:
            if message["type"] == "http.response.start":
                added = [(name.lower().encode(), value.encode()) for name, value in HEADERS.items()]
                message = {**message, "headers": [*message["headers"], *added]}
            await send(message)

        await self.app(scope, receive, send_with_headers)

    def _is_local(self, headers: dict[bytes, str]) -> bool:
        """Return whether Host and, if there is one, Origin name this machine."""
        try:
            host = urlsplit("//" + headers.get(b"host", "")).hostname
            origin = headers.get(b"origin")
            return host in self.names and (origin is None or urlsplit(origin).hostname in self.names)
        except ValueError:
            return False
