"""Single sign-on: a reverse proxy signs users in and names them in a header, which nobody else may send."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable
from dataclasses import dataclass

from vitmodel.config.access import AccessConfig
from vitmodel.errors import RequestRefusedError

MAX_USER = 64
"""Most characters of a user's name."""
Header = tuple[bytes, bytes]


@dataclass(frozen=True)
class Account:
    """Who asks, and what for: the owner of an API key, or a user."""

    who: str
    """`key:NAME` or `user:NAME`, for logs and readings."""
    scopes: frozenset[str]

    def allows(self, scope: str) -> bool:
        """Return whether a request that needs `scope` may be made."""
        return scope in self.scopes or "admin" in self.scopes


class SignOn:
    """The reverse proxy that is believed, and what its users may do.

    Args:
        config: The options; `trusted_proxy` is not empty.
    """

    def __init__(self, config: AccessConfig) -> None:
        self.networks = [ipaddress.ip_network(address) for address in config.trusted_proxy]
        self.user_header = config.user_header.lower().encode()
        self.group_header = config.group_header.lower().encode()
        entries = [entry.rpartition("=") for entry in config.user_scopes]
        self.scopes = [(group, scope) for group, _, scope in entries]

    def account(self, peer: str, headers: Iterable[Header]) -> Account | None:
        """Return the user whom the proxy names; None if a request names none.

        Args:
            peer: Address of whoever sends the request.
            headers: Names in lower case, and values.

        Raises:
            RequestRefusedError: Somebody else sends the proxy's headers, or they are ambiguous.
        """
        users, groups = [], []
        for name, value in headers:
            if name == self.user_header:
                users.append(value)
            elif name == self.group_header:
                groups.append(value)
        if not users and not groups:
            return None
        if not self._is_trusted(peer):
            raise RequestRefusedError(403, "only the reverse proxy may name a user; see --trusted-proxy")
        if len(users) > 1 or len(groups) > 1:  # the proxy has added its header to one of the client
            raise RequestRefusedError(403, "the user is named twice; let the proxy replace the header of its clients")
        user = _decode(users[0]) if users else ""
        if not user:
            return None
        if len(user) > MAX_USER or not user.isprintable():
            raise RequestRefusedError(403, f"the user's name is not printable or longer than {MAX_USER} characters")
        member_of = {"", *(part.strip() for part in _decode(groups[0]).split(","))} if groups else {""}
        return Account(f"user:{user}", frozenset(scope for group, scope in self.scopes if group in member_of))

    def _is_trusted(self, peer: str) -> bool:
        try:
            address = ipaddress.ip_address(peer)
        except ValueError:
            return False
        mapped = getattr(address, "ipv4_mapped", None) or address
        return any(mapped in network for network in self.networks)


def _decode(value: bytes) -> str:
    """Return the text of a header: UTF-8, as proxies send the names of directories, or Latin-1."""
    try:
        return value.decode().strip()
    except UnicodeDecodeError:
        return value.decode("latin-1").strip()
