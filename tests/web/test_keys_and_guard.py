"""Access to a server: keys, scopes, Host and Origin; what a stranger cannot do."""

from __future__ import annotations

import base64
import hashlib
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from vitmodel.cli import main
from vitmodel.errors import UsageError
from vitmodel.web.keys import ApiKeys, add_key, read_keys
from vitmodel.web.security import AccessPolicy, Guard, check_exposure, policy_for_page

for module in ("fastapi", "httpx"):
    pytest.importorskip(module, reason="needs the extra `serve` and an HTTP client")

from fastapi import FastAPI  # noqa: E402 (after the skips)
from fastapi.testclient import TestClient  # noqa: E402

Ask = Callable[..., int]


@pytest.fixture
def key_file(tmp_path: Path) -> Path:
    return tmp_path / "keys.txt"


def ask(keys: ApiKeys | None, scope: str = "score", host: str = "localhost:8000", **headers: str) -> int:
    """Return the status of a request to an application that accepts whatever the guard lets through."""
    app = FastAPI()
    app.get("/{path:path}")(lambda path: "content")
    policy = AccessPolicy.for_host("127.0.0.1", ["scores.example"], keys, scope_of=lambda method, path: scope)
    app.add_middleware(Guard, policy=policy)
    with TestClient(app, base_url=f"http://{host}") as client:
        answer = client.get("/x", headers={name.replace("_", "-"): value for name, value in headers.items()})
    assert answer.headers["X-Content-Type-Options"] == "nosniff"
    assert answer.headers["Referrer-Policy"] == "same-origin"
    assert "default-src 'none'" in answer.headers["Content-Security-Policy"]
    return answer.status_code


def test_the_verb_prints_a_key_once_and_stores_its_hash_for_the_owner_alone(
    key_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["keys", str(key_file), "ward-3", "--scopes", "score"]) == 0
    key = capsys.readouterr().out.strip()
    assert key_file.read_text() == f"ward-3 score {hashlib.sha256(key.encode()).hexdigest()}\n"
    assert stat.S_IMODE(key_file.stat().st_mode) == 0o600
    assert main(["keys", str(key_file), "ward-3"]) == 2, "a name is used once"
    assert main(["keys", str(key_file), "a b"]) == 2


def test_a_request_needs_a_key_with_the_scope(key_file: Path) -> None:
    reader, scorer, admin = (add_key(key_file, scope, (scope,)) for scope in ("read", "score", "admin"))
    keys = ApiKeys(key_file)
    assert ask(keys) == 401
    assert ask(keys, authorization="Bearer wrong") == 401
    assert ask(keys, authorization=f"Bearer {reader}") == 403
    assert ask(keys, authorization=f"Bearer {scorer}") == 200
    assert ask(keys, authorization=f"Bearer {admin}") == 200
    assert ask(keys, x_api_key=scorer) == 200
    basic = base64.b64encode(f"anything:{scorer}".encode()).decode()
    assert ask(keys, authorization=f"Basic {basic}") == 200
    assert ask(keys, authorization="Basic !") == 401
    assert ask(keys, scope="") == 200, "health needs no key"
    digest = read_keys(key_file)[1].digest
    assert ask(keys, authorization=f"Bearer {digest}") == 401, "the hash is no key"


def test_a_removed_key_loses_its_access_while_the_server_runs(key_file: Path) -> None:
    first, second = (add_key(key_file, name, ("score",)) for name in ("first", "second"))
    keys = ApiKeys(key_file)
    key_file.write_text("".join(line for line in key_file.open() if not line.startswith("first")))
    assert ask(keys, authorization=f"Bearer {first}") == 401
    assert ask(keys, authorization=f"Bearer {second}") == 200
    key_file.write_text("broken\n")
    assert ask(keys, authorization=f"Bearer {second}") == 401, "a file that is not valid lets nobody in"


@pytest.mark.parametrize("text", ["", "# none\n", "name score\n", "name write " + "0" * 64, "name score xyz"])
def test_a_key_file_that_is_not_valid_is_refused(text: str, key_file: Path) -> None:
    key_file.write_text(text)
    with pytest.raises(UsageError, match="api_key_file"):
        ApiKeys(key_file)


@pytest.mark.parametrize(
    ("host", "origin", "status"),
    [
        ("localhost:8000", "", 200),
        ("LOCALHOST", "", 200),
        ("[::1]:8000", "", 200),
        ("evil.example", "", 403),
        ("localhost.evil.example", "", 403),
        ("localhost:8000", "http://localhost:8000", 200),
        ("localhost:8000", "http://localhost:9000", 403),
        ("localhost:8000", "http://evil.example", 403),
        ("localhost:8000", "null", 403),
        ("scores.example", "https://scores.example", 200),
        ("scores.example", "https://localhost", 403),
        ("192.168.0.7:8000", "", 403),
    ],
)
def test_only_the_servers_own_names_and_pages_may_ask(host: str, origin: str, status: int) -> None:
    assert ask(None, host=host, **({"origin": origin} if origin else {})) == status


def test_an_open_server_is_asked_by_address_but_not_by_a_foreign_name() -> None:
    policy = AccessPolicy.for_host("0.0.0.0", [], None)
    assert policy.is_own("192.168.0.7:8000", None, "http")
    assert not policy.is_own("evil.example:8000", None, "http")


def test_a_server_that_others_can_reach_needs_keys_or_a_word() -> None:
    for host in ("0.0.0.0", "::", "192.168.0.7", "server.example"):
        with pytest.raises(
            UsageError, match=r"host: .* can be reached from other machines.*--api-key-file.*--insecure"
        ):
            check_exposure(host, None, insecure=False)
        check_exposure(host, "keys.txt", insecure=False)
        check_exposure(host, None, insecure=True)
    for host in ("127.0.0.1", "localhost", "::1", "127.0.0.9"):
        check_exposure(host, None, insecure=False)


def test_a_pages_own_scripts_run_and_no_others() -> None:
    policy = policy_for_page("<style>a</style><script>1</script>")
    digest = base64.b64encode(hashlib.sha256(b"1").digest()).decode()
    assert f"script-src 'sha256-{digest}';" in policy
    assert "unsafe" not in policy
    assert "script-src 'none'" in policy_for_page("<p onclick=x>")
