"""Options that say who may ask a web server: API keys, single sign-on by a reverse proxy, and names."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal, get_args

from vitmodel.config.base import Config, Needs, require
from vitmodel.config.viewing import LOOPBACK

Scope = Literal["read", "score", "admin"]
SCOPES: tuple[Scope, ...] = get_args(Scope)
"""read = pages, tables and metrics; score = send images; admin = everything."""


@dataclass(frozen=True, kw_only=True)
class AccessConfig(Config):
    """Who may ask a web server; the class that adds these options has the field `host`."""

    GROUPS: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "server": (
            *("api_key_file", "trusted_proxy", "user_header", "group_header", "user_scopes", "insecure", "names"),
        )
    }
    NEEDS: ClassVar[Mapping[str, Needs]] = {
        "user_header": Needs("--trusted-proxy", lambda config: bool(config.trusted_proxy)),
        "user_scopes": Needs("--trusted-proxy", lambda config: bool(config.trusted_proxy)),
        "group_header": Needs(
            "--trusted-proxy and a GROUP=SCOPE in --user-scopes",
            lambda config: bool(config.trusted_proxy) and any("=" in entry for entry in config.user_scopes),
        ),
        "insecure": Needs(
            "a --host that other machines can reach, and neither --api-key-file nor --trusted-proxy",
            lambda config: config.host not in LOOPBACK and not (config.api_key_file or config.trusted_proxy),
        ),
    }

    api_key_file: Path | None = None
    """File of API keys made by `vitmodel keys`; requests need a key. A --host that other machines can reach needs it or
    TRUSTED_PROXY. none = no key is asked for."""
    trusted_proxy: tuple[str, ...] = ()
    """Addresses or networks of the reverse proxy that signs users in, such as 10.0.0.5 or 10.1.0.0/24. Its requests are
    those of the user whom USER_HEADER names; others with this header are refused. none = the header has no meaning."""
    user_header: str = "X-Forwarded-User"
    """Header with the name of the user, which TRUSTED_PROXY must set or remove in every request."""
    group_header: str = "X-Forwarded-Groups"
    """Header with the groups of the user, separated by commas, which TRUSTED_PROXY must set or remove, too."""
    user_scopes: tuple[str, ...] = ("read",)
    """What users of TRUSTED_PROXY may do: SCOPE = all of them, GROUP=SCOPE = the members of a group. Scopes as in
    `vitmodel keys`: read, score, admin."""
    insecure: bool = False
    """Listen on a --host that other machines can reach without API keys and without TRUSTED_PROXY."""
    names: tuple[str, ...] = ()
    """Further host names under which the server is reached, such as that of a reverse proxy. Requests under other
    names than these and this machine's are refused."""

    def _check(self) -> None:
        super()._check()
        for address in self.trusted_proxy:
            _check_network(address)
        for name in ("user_header", "group_header"):
            is_header = re.fullmatch(r"[A-Za-z0-9-]+", getattr(self, name))
            require(bool(is_header), name, "is no name of a header; write letters, digits and hyphens")
        is_same = self.user_header.lower() == self.group_header.lower()
        require(not is_same, "group_header", "is also USER_HEADER; name another one")
        for entry in self.user_scopes:
            require(
                entry.rpartition("=")[2] in SCOPES and not entry.startswith("="),
                "user_scopes",
                f"{entry!r} is neither SCOPE nor GROUP=SCOPE; scopes are {', '.join(SCOPES)}",
            )


def _check_network(address: str) -> None:
    try:
        network = ipaddress.ip_network(address)
    except ValueError as error:
        require(False, "trusted_proxy", f"{error}; write an address such as 10.0.0.5 or a network such as 10.1.0.0/24")
        return
    require(network.prefixlen > 0, "trusted_proxy", f"{address} trusts everybody; name the proxy's own addresses")
