"""The node behind nginx as in `deploy/`: signed-in users, programs with keys, and forged headers."""

from __future__ import annotations

import re
import shutil
import subprocess
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
from peers import free_port, wait_until
from sqlalchemy import select

from vitmodel import cli
from vitmodel.config import NodeConfig
from vitmodel.node.audit import Audit
from vitmodel.node.inbox import Inbox
from vitmodel.node.jobs import Queue
from vitmodel.node.models import AuditEntry
from vitmodel.node.pages import Site, create_app, needed_scope
from vitmodel.web.connections import ConnectionLimits
from vitmodel.web.keys import add_key
from vitmodel.web.security import AccessPolicy
from vitmodel.web.server import make_server, open_socket

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"
PROXY = "127.0.0.2"
"""Address from which nginx asks the node; the tests ask from 127.0.0.1."""
NAME = "node.example.org"


class _SignIn(BaseHTTPRequestHandler):
    """Stand-in for oauth2-proxy: the cookie `session=USER/GROUPS` is a session."""

    def do_GET(self) -> None:
        found = re.search("session=([^;/]*)/([^;]*)", self.headers.get("Cookie", ""))
        is_question = self.path == "/oauth2/auth"
        self.send_response(200 if not is_question else 202 if found else 401)
        if is_question and found:
            self.send_header("X-Auth-Request-Preferred-Username", found[1])
            self.send_header("X-Auth-Request-Groups", found[2])
        self.end_headers()
        if not is_question:
            self.wfile.write(b"sign in, please")

    def log_message(self, *words: Any) -> None:
        pass


@dataclass
class Desk:
    """The running servers."""

    node: int
    proxy: int
    reader_key: str
    queue: Queue

    def ask(self, path: str = "/worklist", *, direct: bool = False, user: str = "", **headers: str) -> httpx.Response:
        """Ask through nginx or directly; `user` is NAME/GROUPS of a session."""
        sent = {"host": NAME, **{name.replace("_", "-"): value for name, value in headers.items()}}
        cookies = {"cookie": f"session={user}"} if user else {}
        port = self.node if direct else self.proxy
        return httpx.get(f"http://127.0.0.1:{port}{path}", headers={**sent, **cookies})

    def who(self) -> set[str]:
        with self.queue.database.read() as session:
            return set(session.scalars(select(AuditEntry.who)))


def nginx_configuration(folder: Path, port: int, sign_in: int, node: int) -> str:
    """Return `deploy/nginx.conf` without TLS and with the ports of a test, in a complete configuration."""
    text = (DEPLOY / "nginx.conf").read_text()
    text = re.sub("  ssl_.*\n", "", text).replace("listen 443 ssl", f"listen 127.0.0.1:{port}")
    assert text.count("127.0.0.1:4180") == 2
    assert text.count("127.0.0.1:8042") == 2
    text = text.replace(":4180", f":{sign_in}").replace(":8042", f":{node}")
    temporary = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    paths = "".join(f"{name}_temp_path {folder}/{name};\n" for name in temporary)
    http = f"access_log off;\nproxy_bind {PROXY};\n{paths}{text}"
    return f"daemon off;\nmaster_process off;\npid {folder}/pid;\nevents {{}}\nhttp {{\n{http}}}\n"


@pytest.fixture
def desk(sqlite: Inbox, tmp_path: Path) -> Iterator[Desk]:
    program = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")
    if program is None:
        pytest.skip("nginx is not installed (Debian package nginx-light)")
    key = add_key(tmp_path / "keys", "reader", ("read",))
    flags = ["--trusted-proxy", PROXY, "--names", NAME, "--api-key-file", str(tmp_path / "keys")]
    config = cli.parse("node", ["run", *flags, "--user-scopes", "read,it=admin"])
    assert isinstance(config, NodeConfig)
    queue = Queue(sqlite.database)
    policy = AccessPolicy.of(config, needed_scope)
    app = create_app(Site(inbox=sqlite, queue=queue, audit=Audit(sqlite.database), policy=policy))
    listening = open_socket("127.0.0.1", 0)
    server = make_server(app, ConnectionLimits(50, 10, 10), 10, lambda: None)
    sign_in = ThreadingHTTPServer(("127.0.0.1", 0), _SignIn)
    threads = [
        threading.Thread(target=lambda: server.run(sockets=[listening])),
        threading.Thread(target=sign_in.serve_forever),
    ]
    for thread in threads:
        thread.start()
    node, proxy = listening.getsockname()[1], free_port()
    (tmp_path / "nginx.conf").write_text(nginx_configuration(tmp_path, proxy, sign_in.server_port, node))
    process = subprocess.Popen([program, "-e", tmp_path / "nginx.log", "-c", tmp_path / "nginx.conf", "-p", tmp_path])
    try:
        wait_until(lambda: process.poll() is not None or _listens(proxy), what="nginx")
        assert process.poll() is None, (tmp_path / "nginx.log").read_text()
        yield Desk(node, proxy, key, queue)
    finally:
        process.terminate()
        process.wait(10)
        server.should_exit = True
        sign_in.shutdown()
        sign_in.server_close()
        for thread in threads:
            thread.join()


def _listens(port: int) -> bool:
    try:
        return httpx.get(f"http://127.0.0.1:{port}/oauth2/").status_code == 200
    except httpx.HTTPError:
        return False


def test_users_come_through_the_proxy_alone_and_programs_with_keys(desk: Desk) -> None:
    bearer = f"Bearer {desk.reader_key}"
    assert "sign in, please" in desk.ask().text, "who has no session is sent to the page for signing in"
    page = desk.ask(user="anna/radiology")
    assert (page.status_code, desk.who()) == (200, {"user:anna"})
    assert "worklist" in page.text.lower()
    assert "sign in, please" in desk.ask(x_forwarded_user="anna").text, "a header of the client is no session"
    assert desk.ask(user="bob/", x_forwarded_user="anna", x_forwarded_groups="it").status_code == 200
    assert desk.who() == {"user:anna", "user:bob"}, "the proxy replaces the client's header"
    # directly: a forged header is refused, whatever else there is
    for headers in ({}, {"authorization": bearer}, {"x_forwarded_for": PROXY}, {"x_real_ip": PROXY}):
        assert desk.ask(direct=True, x_forwarded_user="anna", **headers).status_code == 403
    assert desk.ask(direct=True, authorization=bearer).status_code == 200
    assert desk.ask(direct=True, authorization="Bearer wrong").status_code == desk.ask(direct=True).status_code == 401
    assert desk.who() == {"user:anna", "user:bob", "key:reader"}
    # programs, through the proxy and without a session
    assert desk.ask("/metrics", authorization=bearer).status_code == 200
    assert desk.ask("/metrics", authorization="Bearer wrong").status_code == 401
    assert desk.ask("/metrics", x_forwarded_user="anna").status_code == 401, "the proxy removes the header"
    assert desk.ask("/healthz").json() == {"status": "ok"}


def test_groups_that_the_proxy_names_give_scopes(desk: Desk) -> None:
    def store(user: str) -> int:
        headers = {"host": NAME, "cookie": f"session={user}"}
        return httpx.post(f"http://127.0.0.1:{desk.proxy}/studies", headers=headers).status_code

    assert store("anna/radiology") == 403
    assert store("anna/radiology,it") == 404, "allowed, but there is no such address"
