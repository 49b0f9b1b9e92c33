"""Which HTTP library carries a client's tensors fastest? One run, ratios within it.

    python load_tests/compare_http_clients.py [--preset tiny] [--json FILE]

A Starlette application under uvicorn, in a process of its own, answers tensor requests with their own tensor, so
that nearly all the time measured is HTTP. The libraries send a body made beforehand and leave the answer's
bytes as they are; pimoe's clients also encode and decode. Needs `pimoe[dev]`, and httpx (or httpx2) and
urllib3: a library that is not installed is left out.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, asynccontextmanager, contextmanager
from dataclasses import asdict, dataclass
from types import ModuleType
from typing import Any

import aiohttp
import msgpack
import numpy as np
import uvicorn
from numpy.typing import NDArray
from pimoe.clients import AsyncClient, Client
from report import machine, machine_line, parser, publish, table
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

MODEL = "echo"
PATH = f"/v2/models/{MODEL}/infer"
HEADERS = {"Content-Type": "application/msgpack"}
BASELINE = "httpx async"


@dataclass(frozen=True)
class Preset:
    """How much to measure.

    Attributes:
        rounds: each goes through all clients in turn, so that all meet the same disturbances.
        requests: how many of each payload, by its bytes.
    """

    rounds: int
    concurrency: int
    requests: dict[int, int]


ROW_BYTES = 1024
PRESETS = {
    "tiny": Preset(rounds=1, concurrency=4, requests={2**10: 20}),
    "default": Preset(rounds=5, concurrency=16, requests={2**10: 1000, 2**16: 500, 2**20: 100}),
}


@dataclass(frozen=True)
class Result:
    """`requests_per_s` is the median over rounds, `ratio` that to httpx's async client."""

    client: str
    payload_bytes: int
    requests_per_s: float
    ratio: float | None


Call = Callable[[], Awaitable[object]]
BlockingCall = Callable[[], object]


# The server ----------------------------------------------------------------------------------------------------


async def echo(request: Request) -> Response:
    """Answers a tensor request with its own tensor."""
    tensor = msgpack.unpackb(await request.body())["inputs"][0]
    answer = {"model_name": MODEL, "outputs": [{**tensor, "name": "output"}]}
    return Response(msgpack.packb(answer), media_type="application/msgpack")


class Announced(uvicorn.Server):
    """Prints the port it was given."""

    async def startup(self, sockets: Any = None) -> None:
        """See uvicorn."""
        await super().startup(sockets)
        print(self.servers[0].sockets[0].getsockname()[1], flush=True)


def serve() -> None:
    """The server process."""
    app = Starlette(routes=[Route(PATH, echo, methods=["POST"])])
    Announced(uvicorn.Config(app, port=0, access_log=False, log_level="error")).run()


@contextmanager
def server() -> Iterator[str]:
    """The address of a fresh server process."""
    process = subprocess.Popen([sys.executable, __file__, "--serve"], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield f"http://127.0.0.1:{int(process.stdout.readline())}"
    finally:
        process.terminate()
        process.wait()


# The clients ---------------------------------------------------------------------------------------------------


def installed(*names: str) -> ModuleType | None:
    """The first of these modules that is installed."""
    for name in names:
        try:
            return importlib.import_module(name)
        except ImportError:
            continue
    return None


@asynccontextmanager
async def aiohttp_default(url: str, body: bytes, array: NDArray[Any]) -> AsyncIterator[Call]:
    """aiohttp as it comes."""
    async with aiohttp.ClientSession() as session:

        async def call() -> None:
            async with session.post(url + PATH, data=body, headers=HEADERS) as response:
                await response.read()

        yield call


@asynccontextmanager
async def httpx_async(url: str, body: bytes, array: NDArray[Any]) -> AsyncIterator[Call]:
    """httpx's async client, with a pool as large as that of the others."""
    httpx = installed("httpx", "httpx2")
    assert httpx is not None
    async with httpx.AsyncClient(limits=httpx.Limits(max_connections=100), timeout=60) as client:
        yield lambda: client.post(url + PATH, content=body, headers=HEADERS)


@asynccontextmanager
async def pimoe_async(url: str, body: bytes, array: NDArray[Any]) -> AsyncIterator[Call]:
    """pimoe's own, encoding and decoding included."""
    async with AsyncClient(url, model=MODEL) as client:
        yield lambda: client.infer(array)


@contextmanager
def httpx_sync(url: str, body: bytes, array: NDArray[Any]) -> Iterator[BlockingCall]:
    """httpx's blocking client."""
    httpx = installed("httpx", "httpx2")
    assert httpx is not None
    with httpx.Client(limits=httpx.Limits(max_connections=100), timeout=60) as client:
        yield lambda: client.post(url + PATH, content=body, headers=HEADERS)


@contextmanager
def urllib3_sync(url: str, body: bytes, array: NDArray[Any]) -> Iterator[BlockingCall]:
    """urllib3, which requests uses."""
    urllib3 = installed("urllib3")
    assert urllib3 is not None
    with urllib3.PoolManager(maxsize=100) as pool:
        yield lambda: pool.request("POST", url + PATH, body=body, headers=HEADERS).data


@contextmanager
def pimoe_sync(url: str, body: bytes, array: NDArray[Any]) -> Iterator[BlockingCall]:
    """pimoe's own, from threads."""
    with Client(url, model=MODEL) as client:
        yield lambda: client.infer(array)


def clients() -> dict[str, Callable[..., Any]]:
    """Every client that can be measured here, by name."""
    found: dict[str, Callable[..., Any]] = {"aiohttp": aiohttp_default, "pimoe async": pimoe_async}
    if installed("httpx", "httpx2"):
        found |= {BASELINE: httpx_async, "httpx threads": httpx_sync}
    if installed("urllib3"):
        found["urllib3 threads"] = urllib3_sync
    return {**found, "pimoe threads": pimoe_sync}


# The measurement -----------------------------------------------------------------------------------------------


async def rate(call: Call, requests: int, concurrency: int) -> float:
    """Requests per second of `concurrency` tasks that share `requests`; each task warms up with one first."""
    await asyncio.gather(*(call() for _ in range(concurrency)))
    left = iter(range(requests))

    async def work() -> None:
        for _ in left:
            await call()

    start = time.perf_counter()
    await asyncio.gather(*(work() for _ in range(concurrency)))
    return requests / (time.perf_counter() - start)


def blocking_rate(call: BlockingCall, requests: int, concurrency: int) -> float:
    """As `rate`, from threads."""
    with ThreadPoolExecutor(concurrency) as threads:
        list(threads.map(lambda _: call(), range(concurrency)))
        start = time.perf_counter()
        list(threads.map(lambda _: call(), range(requests)))
        return requests / (time.perf_counter() - start)


def measure(make: Callable[..., Any], requests: int, concurrency: int, url: str, array: NDArray[Any]) -> float:
    """One round of one client."""
    tensor = {"name": "hidden_states", "shape": array.shape, "datatype": "FP32", "data": array.tobytes()}
    body = msgpack.packb({"inputs": [tensor], "parameters": {"timeout": 60.0}})
    opened = make(url, body, array)
    if isinstance(opened, AbstractContextManager):
        with opened as call:
            return blocking_rate(call, requests, concurrency)

    async def run() -> float:
        async with opened as call:
            return await rate(call, requests, concurrency)

    return asyncio.run(run())


def compare(preset: Preset) -> list[Result]:
    """All clients with all payloads."""
    results = []
    with server() as url:
        for payload_bytes, requests in preset.requests.items():
            array = np.ones((payload_bytes // ROW_BYTES, ROW_BYTES // 4), np.float32)
            rates: dict[str, list[float]] = {name: [] for name in clients()}
            for _ in range(preset.rounds):
                for name, make in clients().items():
                    rates[name].append(measure(make, requests, preset.concurrency, url, array))
            medians = {name: statistics.median(values) for name, values in rates.items()}
            base = medians.get(BASELINE)
            results += [
                Result(name, payload_bytes, median, median / base if base else None)
                for name, median in medians.items()
            ]
    return results


def result_table(results: list[Result], preset: Preset) -> str:
    """For people."""
    return table(
        f"HTTP libraries, {preset.concurrency} requests at a time (medians of rounds)",
        ("bytes", "client", "requests/s", f"to {BASELINE}"),
        [
            (
                f"{result.payload_bytes:,}",
                result.client,
                f"{result.requests_per_s:,.0f}",
                "" if result.ratio is None else f"{result.ratio:.2f}x",
            )
            for result in sorted(results, key=lambda r: (r.payload_bytes, -r.requests_per_s))
        ],
    )


def main() -> None:
    """The command line."""
    command_line = parser("Compare HTTP clients against one local server.", PRESETS)
    command_line.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    options = command_line.parse_args()
    if options.serve:
        return serve()
    httpx = installed("httpx", "httpx2")
    here = machine([name for name in ("urllib3", *([httpx.__name__] if httpx else [])) if installed(name)])
    preset = PRESETS[options.preset]
    results = compare(preset)
    facts = {"machine": here, "preset": options.preset, "results": [asdict(result) for result in results]}
    return publish(facts, f"{machine_line(here)}\n\n{result_table(results, preset)}", options.json)


if __name__ == "__main__":
    main()
