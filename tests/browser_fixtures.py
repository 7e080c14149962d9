"""Fixtures of the tests in a real browser: Chromium, and servers of the reading room."""

from __future__ import annotations

import shutil
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from vitmodel.commands.view import create_app
from vitmodel.config import ViewConfig

FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
Page = Any
OpenPage = Callable[..., Page]
"""Takes the width and height of the screen, and returns a page."""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Return Chromium; the test is skipped if it or playwright is not installed."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright: make test-browser installs it")
    chromium = shutil.which("chromium")
    if not chromium:
        pytest.skip("Chromium is not installed: make test-browser installs it")
    with sync_api.sync_playwright() as playwright:
        yield playwright.chromium.launch(executable_path=chromium, args=FLAGS)


@pytest.fixture
def open_page(browser: Any) -> Iterator[OpenPage]:
    """Return a function that opens a page in a new context, which has its own cookies.

    The test fails at its end if a page logged an error or asked another host.
    """
    contexts, problems = [], []

    def check(request: Any) -> None:
        if not request.url.startswith(("http://localhost:", "data:")):
            problems.append(request.url)

    def open_page(width: int = 1280, height: int = 800) -> Page:
        contexts.append(browser.new_context(viewport={"width": width, "height": height}))
        page = contexts[-1].new_page()
        page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("request", check)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert not [problem for problem in problems if "ERR_FAILED" not in problem]


@pytest.fixture(scope="module")
def serve(serve_app: Callable[[Any], str]) -> Callable[[ViewConfig], str]:
    """Return a function that serves the pages of a configuration until the end of the module, and their address."""
    return lambda config: serve_app(create_app(config))


@pytest.fixture(scope="module")
def serve_app() -> Iterator[Callable[[Any], str]]:
    """Return a function that serves an ASGI application until the end of the module, and its address."""
    uvicorn = pytest.importorskip("uvicorn")
    running = []

    def start(app: Any) -> str:
        listening = socket.create_server(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        running.append((server, thread))
        return f"http://localhost:{listening.getsockname()[1]}"

    yield start
    for server, thread in running:
        server.should_exit = True
        thread.join()
