"""Single sign-on: the header of the reverse proxy is believed, that of anybody else is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from vitmodel import cli
from vitmodel.config import NodeConfig, ServeConfig
from vitmodel.errors import RequestRefusedError, UsageError
from vitmodel.web.keys import add_key
from vitmodel.web.security import AccessPolicy, Guard
from vitmodel.web.sign_on import Account, SignOn

fastapi = pytest.importorskip("fastapi", reason="needs the extra `serve`")
testclient = pytest.importorskip("fastapi.testclient", reason="needs an HTTP client")

PROXY = "10.0.0.5"


def make_config(**options: object) -> ServeConfig:
    return ServeConfig(package=Path("p"), trusted_proxy=(PROXY, "10.1.0.0/24", "fd00::/64"), **options)  # type: ignore[arg-type]


def account(*headers: tuple[str, str], peer: str = PROXY, **options: object) -> Account | None:
    sent = [(name.lower().encode(), value.encode()) for name, value in headers]
    return SignOn(make_config(**options)).account(peer, sent)


@pytest.mark.parametrize(
    ("peer", "believed"),
    [
        (PROXY, True),
        ("10.1.0.255", True),
        ("fd00::7", True),
        ("::ffff:10.0.0.5", True),
        ("10.0.0.6", False),
        ("127.0.0.1", False),
        ("::1", False),
        ("", False),
        ("testclient", False),
    ],
)
def test_only_the_proxys_addresses_may_name_a_user(peer: str, believed: bool) -> None:
    if believed:
        assert account(("X-Forwarded-User", "anna"), peer=peer) == Account("user:anna", frozenset({"read"}))
        return
    for header in ("X-Forwarded-User", "X-Forwarded-Groups"):
        with pytest.raises(RequestRefusedError, match="only the reverse proxy"):
            account((header, "anna"), peer=peer)
    assert account(("X-Other", "anna"), peer=peer) is None


def test_groups_give_scopes() -> None:
    scopes = ("read", "it=admin", "cn=pacs=score")

    def scopes_of(*groups: str) -> set[str]:
        headers = [("X-Forwarded-User", "anna"), *(("X-Forwarded-Groups", text) for text in groups)]
        found = account(*headers, user_scopes=scopes)
        assert found
        return set(found.scopes)

    assert scopes_of() == scopes_of("") == scopes_of("other, its") == {"read"}
    assert scopes_of("a, it") == {"read", "admin"}
    assert scopes_of("cn=pacs,it") == {"read", "score", "admin"}
    only_members = account(("X-Forwarded-User", "anna"), user_scopes=("it=admin",))
    assert only_members is not None
    assert not only_members.scopes


@pytest.mark.parametrize(
    "headers",
    [
        [("X-Forwarded-User", "anna"), ("X-Forwarded-User", "admin")],
        [("X-Forwarded-User", "anna"), ("X-Forwarded-Groups", "a"), ("X-Forwarded-Groups", "it")],
        [("X-Forwarded-User", "a\x07")],
        [("X-Forwarded-User", "a" * 65)],
    ],
    ids=["two users", "two lists of groups", "not printable", "too long"],
)
def test_an_ambiguous_or_unusable_name_is_refused(headers: list[tuple[str, str]]) -> None:
    with pytest.raises(RequestRefusedError):
        account(*headers)


def test_an_empty_name_is_nobody_and_names_may_have_any_letters() -> None:
    assert account(("X-Forwarded-User", " ")) is None
    assert account(("X-Forwarded-Groups", "it")) is None
    found = account(("Remote-User", "Jürgen Ørsted"), user_header="Remote-User")
    assert found is not None
    assert found.who == "user:Jürgen Ørsted"


def ask(config: ServeConfig, needed: str, peer: str = PROXY, **headers: str) -> tuple[int, str]:
    """Return the status of a request, and for whom the application takes its sender."""
    app = fastapi.FastAPI()

    def answer(request: object) -> str:
        return str(request.scope["state"]["who"])  # type: ignore[attr-defined]

    answer.__annotations__["request"] = fastapi.Request
    app.get("/")(answer)
    app.add_middleware(Guard, policy=AccessPolicy.of(config, lambda method, path: needed))
    with testclient.TestClient(app, base_url="http://localhost", client=(peer, 1)) as client:
        reply = client.get("/", headers={name.replace("_", "-"): value for name, value in headers.items()})
    return reply.status_code, reply.json() if reply.status_code == 200 else ""


def test_a_request_needs_a_user_or_a_key_with_the_scope(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    key = {"authorization": "Bearer " + add_key(file, "ward", ("score",))}
    user = {"x_forwarded_user": "anna"}
    both = make_config(api_key_file=file, user_scopes=("read", "it=admin"))
    assert ask(both, "read", **user) == (200, "user:anna")
    assert ask(both, "score", **user)[0] == 403
    assert ask(both, "score", **user, x_forwarded_groups="it") == (200, "user:anna")
    assert ask(both, "score", **key) == ask(both, "score", peer="10.9.9.9", **key) == (200, "key:ward")
    assert ask(both, "read", **key)[0] == 403
    assert ask(both, "read")[0] == ask(both, "read", authorization="Bearer wrong")[0] == 401
    for needed in ("read", "score", ""):
        assert ask(both, needed, peer="10.9.9.9", **user, **key)[0] == 403, "a forged header, even with a valid key"
    assert ask(both, "score", **user, **key)[0] == 403, "the user counts, not the key"
    without_keys = make_config()
    assert ask(without_keys, "read", **user) == (200, "user:anna")
    assert ask(without_keys, "read")[0] == ask(without_keys, "read", peer="127.0.0.1")[0] == 401
    assert ask(without_keys, "") == (200, "anyone")


def test_without_a_trusted_proxy_the_header_has_no_meaning() -> None:
    assert ask(ServeConfig(package=Path("p")), "read", x_forwarded_user="anna") == (200, "anyone")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--trusted-proxy", "proxy"], "trusted_proxy: .*10.0.0.5"),
        (["--trusted-proxy", "10.0.0.5/8"], "trusted_proxy: .*host bits"),
        (["--trusted-proxy", "0.0.0.0/0"], "trusted_proxy: .*everybody"),
        (["--trusted-proxy", PROXY, "--user-header", "X User"], "user_header: is no name"),
        (["--trusted-proxy", PROXY, "--user-scopes", "write"], "user_scopes: 'write' is neither"),
        (["--trusted-proxy", PROXY, "--user-scopes", "=admin"], "user_scopes: '=admin' is neither"),
        (
            ["--trusted-proxy", PROXY, "--user-scopes", "a=read", "--group-header", "x-forwarded-user"],
            "group_header: is also",
        ),
    ],
)
def test_options_that_cannot_work_are_refused(flags: list[str], message: str) -> None:
    for verb, word in (("serve", "p"), ("node", "run")):
        with pytest.raises(UsageError, match=message):
            cli.parse(verb, [word, *flags])


def test_a_server_for_others_may_have_single_sign_on_alone() -> None:
    config = cli.parse("node", ["run", "--host", "0.0.0.0", "--trusted-proxy", PROXY])
    assert isinstance(config, NodeConfig)
    assert config.trusted_proxy == (PROXY,)
