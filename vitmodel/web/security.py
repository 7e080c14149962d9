"""Who may ask a server: Host, Origin, user and API key of each request are checked; answers restrict their pages."""

from __future__ import annotations

import base64
import binascii
import hashlib
import ipaddress
import json
import re
import socket
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from vitmodel.config.access import AccessConfig
from vitmodel.config.viewing import LOOPBACK
from vitmodel.errors import RequestRefusedError, UsageError
from vitmodel.web.keys import ApiKeys
from vitmodel.web.sign_on import Account, SignOn

PORTS = {"http": 80, "https": 443}
POLICY = (
    "default-src 'none'; script-src {script}; style-src {style}; img-src 'self' data:; "
    "connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "Content-Security-Policy": POLICY.format(script="'self'", style="'self'"),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "same-origin",  # `no-referrer` makes browsers send forms of our own pages with Origin: null
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
}
"""Headers of every answer that does not set them itself."""
CHALLENGE = ("WWW-Authenticate", 'Basic realm="vitmodel: key name and API key", charset="UTF-8"')
"""Makes a browser ask for a user name and a password; programs send `Authorization: Bearer KEY`."""


def is_loopback(host: str) -> bool:
    """Return whether an address to listen on is reached from this machine alone."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def check_exposure(host: str, login: object, insecure: bool) -> None:
    """Check that a server which other machines can reach has a login, or that doing without one is wanted.

    Args:
        host: Address to listen on.
        login: The key file or the trusted proxy; empty = everybody may ask.
        insecure: Whether everybody shall be able to ask.

    Raises:
        UsageError: It has none.
    """
    if not is_loopback(host) and not login and not insecure:
        raise UsageError(
            f"host: {host} can be reached from other machines; give --api-key-file FILE (made by `vitmodel keys`), "
            "--trusted-proxy for single sign-on, or --insecure if everyone who reaches the port may send images"
        )


def policy_for_page(page: str) -> str:
    """Return a Content-Security-Policy under which the inline scripts and styles of this HTML page run, and no others.

    A script that was inserted into the page has another hash.
    """

    def hashes(tag: str) -> str:
        blocks = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        digests = [base64.b64encode(hashlib.sha256(block.encode()).digest()).decode() for block in blocks]
        return " ".join(f"'sha256-{digest}'" for digest in digests) or "'none'"

    return POLICY.format(script=hashes("script"), style=hashes("style"))


@dataclass(frozen=True)
class AccessPolicy:
    """What a request must show.

    Attributes:
        names: Host names under which the server may be asked, in addition to addresses and the name of this machine.
        keys: The API keys; None = there are none.
        sign_on: The reverse proxy that signs users in; None = there is none. Without keys and proxy, everybody may ask.
        scope_of: Function of method and path that returns the scope that a request needs; "" = none.
        addresses: Whether the server may be asked by any IP address. A page of another site can point its own name to
            this machine (DNS rebinding), but cannot be reached by an address.
    """

    names: Collection[str] = LOOPBACK
    keys: ApiKeys | None = None
    sign_on: SignOn | None = None
    scope_of: Callable[[str, str], str] = lambda method, path: "admin"
    addresses: bool = False

    @classmethod
    def for_host(cls, host: str, names: Collection[str], keys: ApiKeys | None, **options: Any) -> AccessPolicy:
        """Return the policy of a server that listens on `host`, which other machines may reach under `names`."""
        known = {*LOOPBACK, host, socket.gethostname(), *names}
        return cls(frozenset(name.lower() for name in known), keys, addresses=not is_loopback(host), **options)

    @classmethod
    def of(cls, config: Any, scope_of: Callable[[str, str], str]) -> AccessPolicy:
        """Return the policy that the options of a server ask for.

        Args:
            config: An `AccessConfig` with the field `host`.
            scope_of: Function of method and path that returns the scope that a request needs; "" = none.

        Raises:
            UsageError: The key file is not valid.
        """
        access: AccessConfig = config
        keys = ApiKeys(access.api_key_file) if access.api_key_file else None
        sign_on = SignOn(access) if access.trusted_proxy else None
        return cls.for_host(config.host, access.names, keys, sign_on=sign_on, scope_of=scope_of)

    def is_own(self, host: str, origin: str | None, scheme: str) -> bool:
        """Return whether the headers Host and, if there is one, Origin name this server."""
        try:
            asked = urlsplit(f"{scheme}://{host}")
            if not self._is_own_name(asked.hostname or ""):
                return False
            if origin is None:
                return True
            page = urlsplit(origin)
            # A proxy that ends TLS passes the Host of https://NAME to a server that sees http.
            return page.hostname == asked.hostname and _port(page.port, page.scheme) == _port(asked.port, page.scheme)
        except ValueError:
            return False

    def _is_own_name(self, name: str) -> bool:
        if name in self.names:
            return True
        try:
            return self.addresses and bool(ipaddress.ip_address(name))
        except ValueError:
            return False


def _port(port: int | None, scheme: str) -> int | None:
    return port or PORTS.get(scheme)


def presented_key(authorization: str, header: str) -> str:
    """Return the API key of a request: that of `Bearer KEY`, the password of `Basic`, or the header X-API-Key."""
    kind, _, value = authorization.partition(" ")
    if kind.lower() == "bearer":
        return value.strip()
    if kind.lower() == "basic":
        try:
            return base64.b64decode(value, validate=True).decode().partition(":")[2]
        except (binascii.Error, UnicodeDecodeError):
            return ""
    return header


class Guard:
    """ASGI middleware that refuses requests which the policy does not allow, and adds the headers of security.

    An accepted request has its account in `scope["state"]["who"]`: `user:NAME` or `key:NAME`, or `anyone` if the server
    needs none.

    Args:
        app: The application.
        policy: What a request must show.
    """

    def __init__(self, app: Any, policy: AccessPolicy) -> None:
        self.app = app
        self.policy = policy

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return

        async def send_with_headers(message: Any) -> None:
            if message["type"] == "http.response.start":
                present = {name.lower() for name, _ in message["headers"]}
                added = [(name.lower().encode(), value.encode()) for name, value in HEADERS.items()]
                headers = [*message["headers"], *((name, value) for name, value in added if name not in present)]
                message = {**message, "headers": headers}
            await send(message)

        refusal = self._refusal(scope)
        if refusal is None:
            await self.app(scope, receive, send_with_headers)
        else:
            await refuse(send_with_headers, *refusal)

    def _refusal(self, scope: Any) -> tuple[int, str, tuple[tuple[str, str], ...]] | None:
        """Return status, sentence and headers of the answer to a request that is not allowed; None if it is."""
        headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
        if not self.policy.is_own(headers.get(b"host", ""), headers.get(b"origin"), scope.get("scheme", "http")):
            return 403, "this address is not served here; open the server by its own name, see --names", ()
        state = scope.setdefault("state", {})
        state["who"] = "anyone"
        try:
            account = self._account(scope, headers)
        except RequestRefusedError as error:
            return error.http_status, error.message, ()
        needed = self.policy.scope_of(scope.get("method", "GET"), scope["path"])
        if account is not None:
            state["who"] = account.who
        if not needed or (self.policy.keys is None and self.policy.sign_on is None):
            return None
        if account is None and self.policy.keys is None:
            return 401, "the request names no user; open the server through the reverse proxy that signs users in", ()
        if account is None:
            return 401, "the request has no valid API key; send the header `Authorization: Bearer KEY`", (CHALLENGE,)
        if not account.allows(needed):
            return 403, f"{account.who} has not the scope `{needed}`; use another key, or see --user-scopes", ()
        return None

    def _account(self, scope: Any, headers: Mapping[bytes, str]) -> Account | None:
        """Return the user or the owner of the key of a request; None if it has neither.

        Raises:
            RequestRefusedError: It forges the header of the reverse proxy.
        """
        if self.policy.sign_on is not None:
            user = self.policy.sign_on.account((scope.get("client") or ("",))[0], scope["headers"])
            if user is not None:
                return user
        text = presented_key(headers.get(b"authorization", ""), headers.get(b"x-api-key", ""))
        key = self.policy.keys.find(text) if self.policy.keys is not None and text else None
        return None if key is None else Account(f"key:{key.name}", key.scopes)


async def refuse(send: Any, status: int, sentence: str, headers: Collection[tuple[str, str]] = ()) -> None:
    """Send an answer with a sentence as JSON, and close the connection, because the request's body is not read."""
    body = json.dumps({"error": sentence}).encode()
    fields = [("Content-Type", "application/json"), ("Content-Length", str(len(body))), ("Connection", "close")]
    raw = [(name.lower().encode(), value.encode()) for name, value in [*fields, *headers]]
    await send({"type": "http.response.start", "status": status, "headers": raw})
    await send({"type": "http.response.body", "body": body})
