"""Compare the servers of two checkouts in turns: latency, throughput, fairness and slow clients.

    python benchmarks/serve.py PACKAGE IMAGES --old ../old --new . --rounds 2

IMAGES is a folder of images that PACKAGE scores. Each round starts the server of each checkout, asks it, and stops it.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

BOUNDARY = "vitmodel-benchmark"


def encode_request(name: str, content: bytes) -> bytes:
    """Return an HTTP request that uploads one file."""
    body = (
        f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="files"; filename="{name}"\r\n'
        "Content-Type: application/octet-stream\r\n\r\n"
    ).encode()
    body += content + f"\r\n--{BOUNDARY}--\r\n".encode()
    head = (
        f"POST /scores HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Length: {len(body)}\r\n"
        f"Content-Type: multipart/form-data; boundary={BOUNDARY}\r\n\r\n"
    )
    return head.encode() + body


async def ask(port: int, request: bytes, timeout: float = 300) -> tuple[float, int]:
    """Return the seconds until the answer to a request is complete, and its status; 0 = none."""
    start = time.perf_counter()
    try:
        async with asyncio.timeout(timeout):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(request)
            await writer.drain()
            answer = await reader.read()
            writer.close()
    except (OSError, TimeoutError):
        return time.perf_counter() - start, 0
    return time.perf_counter() - start, int(answer[9:12] or b"0")


async def ask_in_parallel(port: int, requests: list[bytes], parallel: int) -> tuple[list[float], float]:
    """Send requests, `parallel` at a time, and return the times of the answers and the time of all."""
    free = asyncio.Semaphore(parallel)

    async def one(request: bytes) -> float:
        async with free:
            seconds, status = await ask(port, request)
            assert status == 200, status
            return seconds

    start = time.perf_counter()
    times = await asyncio.gather(*(one(request) for request in requests))
    return list(times), time.perf_counter() - start


async def ask_beside(port: int, large: bytes, small: bytes) -> tuple[list[float], float]:
    """Return the times of single requests sent while a large one is scored, and the time of the large one."""
    task = asyncio.create_task(ask(port, large))
    await asyncio.sleep(2)
    times: list[float] = []
    while not task.done():
        times.append((await ask(port, small))[0])
    return times, (await task)[0]


async def ask_beside_idle(port: int, small: bytes, sockets: int) -> float:
    """Return the seconds of a request while `sockets` connections have sent half a request."""
    held = []
    for _ in range(sockets):
        try:
            async with asyncio.timeout(2):
                held.append(await asyncio.open_connection("127.0.0.1", port))
        except (OSError, TimeoutError):
            break
        held[-1][1].write(b"POST /scores HTTP/1.1\r\nHost: local")
    seconds, status = await ask(port, small, timeout=10)
    for _, writer in held:
        writer.close()
    return seconds if status == 200 else float("nan")


@contextmanager
def running_server(checkout: Path, package: Path, options: list[str]) -> Iterator[tuple[int, int]]:
    """Run the server of a checkout and yield its port and process id."""
    command = [sys.executable, "-P", "-m", "vitmodel.cli", "serve", str(package.resolve()), "--port", "0", *options]
    environment = os.environ | {"PYTHONPATH": str(checkout.resolve())}
    with (
        tempfile.TemporaryFile() as log,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, env=environment) as process,
    ):
        assert process.stdout
        address = re.search(r":(\d+);", process.stdout.readline())
        assert address
        try:
            yield int(address[1]), process.pid
        finally:
            process.kill()


def peak_memory(pid: int) -> int:
    """Return the largest memory of a process so far in MB."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) // 1024


async def measure(port: int, pid: int, files: list[Path], options: argparse.Namespace) -> dict[str, float]:
    """Return the figures of one server in one round."""
    requests = [encode_request(path.name, path.read_bytes()) for path in files]
    await ask_in_parallel(port, requests[:5], 1)
    alone, _ = await ask_in_parallel(port, [requests[number % len(requests)] for number in range(30)], 1)
    many = [requests[number % len(requests)] for number in range(options.requests)]
    parallel, seconds = await ask_in_parallel(port, many, options.parallel)
    with zipfile.ZipFile(content := io.BytesIO(), "w") as archive:
        for number in range(options.large):
            archive.write(files[number % len(files)], f"{number}.dcm")
    beside, large = await ask_beside(port, encode_request("large.zip", content.getvalue()), requests[0])
    memory = peak_memory(pid)
    idle = await ask_beside_idle(port, requests[0], options.idle)
    return {
        "alone p50 s": float(np.median(alone)),
        "alone p95 s": float(np.quantile(alone, 0.95)),
        "parallel p50 s": float(np.median(parallel)),
        "parallel p95 s": float(np.quantile(parallel, 0.95)),
        "parallel requests/s": len(many) / seconds,
        "with large request p95 s": float(np.quantile(beside, 0.95)),
        "with large / alone p95": float(np.quantile(beside, 0.95) / np.quantile(alone, 0.95)),
        "large s": large,
        "peak MB": memory,
        "with idle sockets s": idle,
    }


def main() -> None:
    """Print the figures of each server, the median over rounds, and their ratios."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("package", type=Path)
    parser.add_argument("images", type=Path)
    parser.add_argument("--old", type=Path, required=True)
    parser.add_argument("--new", type=Path, default=Path())
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--parallel", type=int, default=100)
    parser.add_argument("--large", type=int, default=300, help="images of the large request")
    parser.add_argument("--idle", type=int, default=1200, help="connections with half a request")
    options = parser.parse_args()
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(1024, hard), hard))  # the usual limit, which the servers inherit
    files = sorted(path for path in options.images.rglob("*") if path.is_file())[:60]
    figures: dict[str, list[dict[str, float]]] = {"old": [], "new": []}
    for number in range(options.rounds):
        for name in ("old", "new") if number % 2 == 0 else ("new", "old"):
            with running_server(getattr(options, name), options.package, []) as (port, pid):
                resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
                figures[name].append(asyncio.run(measure(port, pid, files, options)))
                resource.setrlimit(resource.RLIMIT_NOFILE, (min(1024, hard), hard))
    print(f"{'':26}{'old':>10}{'new':>10}{'new/old':>10}")
    for key in figures["old"][0]:
        old, new = (float(np.median([row[key] for row in figures[name]])) for name in ("old", "new"))
        print(f"{key:26}{old:10.3f}{new:10.3f}{new / old:10.2f}")


if __name__ == "__main__":
    main()
