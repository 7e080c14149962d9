"""Connections of slow and of many clients: they cost the server nothing that others need, and it ends in time."""

from __future__ import annotations

import contextlib
import re
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

for module in ("uvicorn", "h11"):
    pytest.importorskip(module, reason="needs the extra `serve`")

PROGRAM = """
import asyncio, sys
from vitmodel.web.connections import ConnectionLimits, raise_file_limit
from vitmodel.web.server import open_socket, run_server

async def app(scope, receive, send):
    if scope["type"] != "http":
        return
    size = 0
    while True:
        message = await receive()
        size += len(message.get("body", b""))
        if not message.get("more_body"):
            break
    if scope["path"] == "/slow":
        await asyncio.sleep(60)
    content = bytes(30_000_000) if scope["path"] == "/large" else str(size).encode()
    length = str(len(content)).encode()
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", length)]})
    await send({"type": "http.response.body", "body": content})

connections, header, body, shutdown = map(float, sys.argv[1:])
limits = ConnectionLimits(raise_file_limit(int(connections)), header, body)
listening = open_socket("127.0.0.1", 0)
print(listening.getsockname()[1], flush=True)
run_server(app, listening, limits, shutdown, lambda: print("overtime", flush=True))
print("ended", flush=True)
"""
HALF = b"POST / HTTP/1.1\r\nHost: localhost\r\n"


@contextmanager
def running(
    connections: int = 50, header: float = 60, body: float = 60, shutdown: float = 5
) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """Run a server with these limits; yield its process and port."""
    command = [sys.executable, "-c", PROGRAM, *map(str, (connections, header, body, shutdown))]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **pipes) as process:
        assert process.stdout
        try:
            yield process, int(process.stdout.readline())
        finally:
            process.kill()


def connect(port: int, data: bytes = b"") -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", port), timeout=10)
    connection.sendall(data)
    return connection


def answer_of(connection: socket.socket) -> str:
    """Return what a server sends until it closes the connection."""
    parts = []
    while part := connection.recv(65536):
        parts.append(part)
    return b"".join(parts).decode()


def ask(port: int) -> tuple[str, float]:
    """Return the answer to a complete request and the seconds until it came."""
    start = time.perf_counter()
    with connect(port, HALF + b"Connection: close\r\nContent-Length: 3\r\n\r\nabc") as connection:
        return answer_of(connection), time.perf_counter() - start


def flood(port: int, number: int) -> list[socket.socket]:
    """Open connections of which half send half a request and half nothing."""
    return [connect(port, HALF if count % 2 else b"") for count in range(number)]


def test_a_request_is_answered_although_hundreds_of_idle_connections_are_open() -> None:
    with running(connections=50) as (process, port):
        held = flood(port, 400)
        answer, seconds = ask(port)
        assert answer.startswith("HTTP/1.1 200")
        assert seconds < 2
        readable = select.select(held, [], [], 0)[0]
        assert len(readable) >= 350, "the oldest made room"
        process.terminate()
        assert process.stderr
        log = process.stderr.read()
        assert "Traceback" not in log
        assert len(log.splitlines()) < 5
        for connection in held:
            connection.close()


@pytest.mark.nightly
def test_a_request_is_answered_although_5000_idle_connections_are_open() -> None:
    import resource

    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    if hard < 6000:
        pytest.skip("this machine allows too few open files")
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    try:
        for connections in (2000, 6000):  # with and without room for all
            with running(connections=connections) as (_, port):
                held = flood(port, 5000)
                answer, seconds = ask(port)
                assert answer.startswith("HTTP/1.1 200")
                assert seconds < 2
                for connection in held:
                    connection.close()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_connection_beyond_the_limit_is_told_to_come_back_if_all_others_have_requests() -> None:
    with running(connections=3) as (_, port):
        held = [connect(port, b"GET /slow HTTP/1.1\r\nHost: localhost\r\n\r\n") for _ in range(3)]
        time.sleep(0.3)
        answer = answer_of(connect(port))
        assert answer.startswith("HTTP/1.1 503")
        assert re.search(r"Retry-After: \d+\r\n", answer)
        held.pop().close()
        time.sleep(0.3)
        assert ask(port)[0].startswith("HTTP/1.1 200")


def test_a_head_or_body_that_comes_too_slowly_ends_the_connection() -> None:
    with running(header=0.6, body=0.6) as (_, port):
        start = time.perf_counter()
        for sent in (HALF, HALF + b"Content-Length: 100\r\n\r\nabc"):
            assert answer_of(connect(port, sent)).startswith("HTTP/1.1 408")
        trickle = connect(port, HALF + b"Content-Length: 1000\r\n\r\n")
        for _ in range(20):  # a byte now and then is progress, but too slow
            if select.select([trickle], [], [], 0.1)[0]:
                break
            trickle.sendall(b"x")
        assert answer_of(trickle).startswith("HTTP/1.1 408")
        assert time.perf_counter() - start < 6
        assert ask(port)[0].startswith("HTTP/1.1 200")


def test_a_client_that_does_not_read_its_answer_is_cut_off() -> None:
    with running(body=0.5) as (_, port):
        connection = connect(port, b"GET /large HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        time.sleep(1.5)
        with contextlib.suppress(ConnectionResetError):
            assert len(answer_of(connection)) < 30_000_000


def test_a_slow_but_steady_body_and_a_long_answer_are_accepted() -> None:
    with running(header=0.5, body=1) as (_, port):
        connection = connect(port, HALF + b"Connection: close\r\nContent-Length: 8000\r\n\r\n")
        for _ in range(8):
            time.sleep(0.25)
            connection.sendall(bytes(1000))
        assert answer_of(connection).endswith("8000")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_server_in_time_with_open_uploads_and_requests(number: int) -> None:
    with running(shutdown=2) as (process, port):
        held = [connect(port, HALF + b"Content-Length: 1000\r\n\r\nabc"), connect(port, HALF), connect(port)]
        held.append(connect(port, b"GET /slow HTTP/1.1\r\nHost: localhost\r\n\r\n"))
        time.sleep(0.3)
        start = time.perf_counter()
        process.send_signal(number)
        assert process.wait(10) == 0
        assert time.perf_counter() - start < 3
        assert process.stdout
        assert process.stdout.read() == "ended\n"
        for connection in held:
            connection.close()
