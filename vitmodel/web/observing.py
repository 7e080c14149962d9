"""What a server reports of its requests: a JSON line per request, and metrics. Neither holds names or paths."""

from __future__ import annotations

import json
import sys
import time
import uuid
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from vitmodel.utils import import_extra

if TYPE_CHECKING:
    from fastapi import APIRouter
    from prometheus_client import CollectorRegistry

SECONDS = (0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)
"""Bounds of the histogram of response times."""
METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")


class RequestMetrics:
    """Metrics of the requests of one application, in a registry of its own.

    Args:
        registry: The registry; None = a new one.

    Raises:
        UsageError: prometheus-client is not installed.
    """

    def __init__(self, registry: CollectorRegistry | None = None) -> None:
        prometheus = import_extra("prometheus_client", "serve", "serve")
        self.registry = registry or prometheus.CollectorRegistry()
        labels = ("route", "method", "status")
        self.requests = prometheus.Counter("vitmodel_requests", "Answered requests.", labels, registry=self.registry)
        self.seconds = prometheus.Histogram(
            "vitmodel_request_seconds", "Time from request to answer.", ("route",), buckets=SECONDS,
            registry=self.registry,
        )  # fmt: skip
        self.open = prometheus.Gauge("vitmodel_open_requests", "Requests in progress.", registry=self.registry)
        self._prometheus = prometheus

    def counter(self, name: str, text: str, *labels: str) -> Any:
        """Return a new counter `vitmodel_NAME`."""
        return self._prometheus.Counter(f"vitmodel_{name}", text, labels, registry=self.registry)

    def gauge(self, name: str, text: str, value: Callable[[], float]) -> None:
        """Add a gauge `vitmodel_NAME` whose value is asked for."""
        self._prometheus.Gauge(f"vitmodel_{name}", text, registry=self.registry).set_function(value)

    def text(self) -> bytes:
        """Return the metrics in the text format of Prometheus."""
        content: bytes = self._prometheus.generate_latest(self.registry)
        return content


def write_line(entry: dict[str, Any]) -> None:
    """Write an entry to standard error as a line of JSON."""
    print(json.dumps(entry), file=sys.stderr, flush=True)


class RequestLog:
    """ASGI middleware that writes a line and counts the metrics of each request.

    A line holds no path, because ids may be in it, but the route's pattern. Handlers add facts with `note`.

    Args:
        app: The application.
        metrics: The metrics of the application.
        write: Function that writes an entry.
    """

    def __init__(self, app: Any, metrics: RequestMetrics, write: Callable[[dict[str, Any]], None] = write_line) -> None:
        self.app = app
        self.metrics = metrics
        self.write = write

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        start = time.perf_counter()
        status = 499  # the client hung up before an answer (nginx's number)
        sent = received = 0

        async def receive_counted() -> Any:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            return message

        async def send_counted(message: Any) -> None:
            nonlocal status, sent
            if message["type"] == "http.response.start":
                status = message["status"]
                message = {**message, "headers": [*message["headers"], (b"x-request-id", number.encode())]}
            sent += len(message.get("body", b""))
            await send(message)

        number = uuid.uuid4().hex
        scope.setdefault("state", {})["notes"] = {}
        self.metrics.open.inc()
        try:
            await self.app(scope, receive_counted, send_counted)
        except BaseException:
            status = 500 if status == 499 else status
            raise
        finally:
            self.metrics.open.dec()
            seconds = time.perf_counter() - start
            route = getattr(scope.get("route"), "path", "other")
            method = scope["method"] if scope["method"] in METHODS else "other"
            self.metrics.requests.labels(route, method, str(status)).inc()
            self.metrics.seconds.labels(route).observe(seconds)
            entry = {
                "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
                "request": number,
                "client": (scope.get("client") or ("",))[0],
                "who": scope["state"].get("who", ""),
                "method": method,
                "route": route,
                "status": status,
                "seconds": round(seconds, 3),
                "received": received,
                "sent": sent,
            }
            self.write(entry | scope["state"]["notes"])


def note(request: Any, **facts: int | float | str) -> None:
    """Add facts, such as numbers of images, to the log line of a request. They must not identify a patient."""
    request.scope["state"]["notes"].update(facts)


def make_router(metrics: RequestMetrics, checks: Mapping[str, Callable[[], bool]]) -> APIRouter:
    """Return the routes /healthz (the process answers), /readyz (all checks hold) and /metrics.

    Args:
        metrics: The metrics of the application.
        checks: Whether each part is ready for work, by its name.
    """
    from fastapi import APIRouter, Response
    from fastapi.responses import JSONResponse

    router = APIRouter()

    @router.get("/healthz")
    async def show_health() -> dict[str, str]:
        return {"status": "ok"}

    @router.get("/readyz", response_model=None)
    async def show_readiness() -> JSONResponse:
        states = {name: check() for name, check in checks.items()}
        return JSONResponse(states, 200 if all(states.values()) else 503)

    @router.get("/metrics", response_model=None)
    async def show_metrics() -> Response:
        return Response(metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    return router
