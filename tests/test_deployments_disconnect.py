"""A client that closes its connection stops costing steps within one iteration, wherever its request is.

The whole way, over real sockets: uvicorn and the gateway's application on a thread and loop of their own, links,
and the router's engine here, whose steps can be held and are counted. Then the same once through Ray Serve and
HAProxy.
"""

from __future__ import annotations

import asyncio
import json
import socket
import struct
import threading
import urllib.request
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import uvicorn
from engines import controlled, make_router
from fake_gateway import PATIENCE_S, FakeGateway, wait_until
from pimoe.deployments.api import create_app
from pimoe.deployments.cluster import LocalCluster
from pimoe.deployments.settings import EMBEDDED_MODEL_NAME, RouterSettings
from pimoe.runtime.caching import BypassReason, CachedBackend, CacheLimits, ResultCache
from pimoe.runtime.embedded import CHECKPOINT
from pimoe.runtime.links import Endpoint, LinkPool, LinkServer
from pimoe.runtime.links.addresses import new_unix_address
from pimoe.runtime.requests import GenerateAnswer, GenerateRequest, ModelInfo
from pimoe.runtime.router.client import RouterClient
from pimoe.runtime.router.router import Router
from pimoe.runtime.router.server import RouterHandler
from waiting import eventually, within_patience

SECRET, NODE = b"secret", "here"
PROMPT = [10, 20, 30]
MANY = 400  # tokens that nobody is going to read


@dataclass
class LinkedGateway(FakeGateway):
    """A gateway whose generations are computed by the router behind `pool`."""

    pool: LinkPool | None = None

    def __post_init__(self) -> None:
        assert self.pool is not None
        self.tokenizer = None  # prompts are token ids, and every chunk is sent
        self.backend = CachedBackend(RouterClient(self.pool), ResultCache(CacheLimits()))

    @property
    def model(self) -> ModelInfo:
        return replace(self.backend.model, name=EMBEDDED_MODEL_NAME)

    async def generate(self, request: GenerateRequest, bypass: BypassReason | None) -> GenerateAnswer:
        return await self.backend.generate(request, bypass)


@contextmanager
def gateway_at(endpoint: Endpoint) -> Iterator[int]:
    """A gateway on a thread of its own, linked to the router at `endpoint`; gives its port."""

    async def discover() -> Sequence[Endpoint]:
        return [endpoint]

    pool = LinkPool("router", discover, SECRET, NODE)
    app = create_app(LinkedGateway(pool=pool))
    config = uvicorn.Config(app, port=0, log_level="error", access_log=False, lifespan="off")
    server = uvicorn.Server(config)
    ports: list[int] = []

    async def serve() -> None:
        await pool.start()
        serving = asyncio.create_task(server.serve())
        await eventually(lambda: server.started)
        ports.append(server.servers[0].sockets[0].getsockname()[1])
        await serving
        await pool.close()

    thread = threading.Thread(target=asyncio.run, args=(serve(),))
    thread.start()
    try:
        wait_until(lambda: ports)
        yield ports[0]
    finally:
        server.should_exit = True
        thread.join(PATIENCE_S)


@dataclass
class Stack:
    """The router and its gateway. `steps` counts the rows of every step that was begun."""

    router: Router
    links: LinkServer
    port: int = 0
    steps: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        [self.group] = controlled(self.router)
        run = self.group.run

        async def counted(layer: int, rows: Any, deadline: float) -> Any:
            if layer == 0:
                self.steps.append(len(rows.hidden))
            return await run(layer, rows, deadline)

        self.group.run = counted

    @property
    def streams(self) -> int:
        """Generations that the gateway has open on its link."""
        return self.links.statistics().streams

    @property
    def running(self) -> int:
        assert self.router.engine is not None
        return self.router.engine.statistics().running

    @property
    def waiting(self) -> int:
        assert self.router.engine is not None
        return self.router.engine.statistics().queue.items

    async def hold(self) -> None:
        """Let the next step begin, and stop in its middle."""
        self.group.gate.clear()
        await eventually(lambda: self.group.waiting)

    def go_on(self) -> None:
        self.group.gate.set()


@pytest.fixture
async def stack(request: pytest.FixtureRequest) -> AsyncIterator[Stack]:
    """With `max_sequences` as the test's parameter says, or 8."""
    engine = {"max_sequences": getattr(request, "param", 8), "drain_s": 0.0}
    router = make_router(CHECKPOINT, limits=RouterSettings.model_validate({"engine": engine}).to_limits())
    router.start()
    server = LinkServer(RouterHandler(router), SECRET)
    address = await server.listen_unix(new_unix_address())
    stack = Stack(router, server)
    gateway = gateway_at(Endpoint("router", NODE, (address,), {"model": router.model.to_wire()}))
    stack.port = await asyncio.to_thread(gateway.__enter__)
    yield stack
    stack.go_on()
    await asyncio.to_thread(gateway.__exit__, None, None, None)
    await server.close()
    await within_patience(router.close())


class Connection:
    """One client: a request on a socket of its own, and what has come of its answer."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer
        self.received = b""

    @classmethod
    async def ask(cls, port: int, max_tokens: int = MANY, *, stream: bool = True, **more: Any) -> Connection:
        body = {"model": EMBEDDED_MODEL_NAME, "prompt": PROMPT, "max_tokens": max_tokens, "stream": stream}
        content = json.dumps({**body, "temperature": 0, "ignore_eos": True, **more}).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nhost: test\r\ncontent-length: {len(content)}\r\n"
        connection = cls(*await asyncio.open_connection("127.0.0.1", port))
        connection._writer.write(f"{head}content-type: application/json\r\n\r\n".encode() + content)
        return connection

    @property
    def tokens(self) -> int:
        """Chunks that came."""
        return self.received.count(b'"token_ids":[')

    async def read(self, until: Callable[[], object]) -> None:
        async with asyncio.timeout(PATIENCE_S):
            while not until():
                piece = await self._reader.read(65536)
                assert piece, self.received[-1000:]
                self.received += piece

    async def read_tokens(self, count: int) -> None:
        await self.read(lambda: self.tokens >= count)

    async def read_all(self) -> None:
        await self.read(lambda: b"[DONE]" in self.received)

    def close(self) -> None:
        self._writer.close()

    def reset(self) -> None:
        """As a process that is killed with unread data: no orderly end, but RST."""
        self._writer.get_extra_info("socket").setsockopt(
            socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0)
        )
        self._writer.transport.abort()


async def rows_of_another_request(stack: Stack) -> list[int]:
    """The steps that are begun from now on, until a request of three tokens has its last one."""
    begun = len(stack.steps)
    stack.go_on()
    other = await Connection.ask(stack.port, 3, prompt=[5, 6])
    await other.read_all()
    other.close()
    return stack.steps[begun:]


OTHERS_STEPS = [2, 1, 1]  # its prompt, and two tokens more


@pytest.mark.parametrize("leave", [Connection.close, Connection.reset])
async def test_a_stream_that_is_closed_costs_no_further_step(
    stack: Stack, leave: Callable[[Connection], None]
) -> None:
    client = await Connection.ask(stack.port)
    await client.read_tokens(5)
    await stack.hold()
    leave(client)
    # Nobody is left whom the step that was begun is for: not even that one is finished.
    await eventually(lambda: not stack.group.waiting)
    assert await rows_of_another_request(stack) == OTHERS_STEPS
    assert not stack.streams
    assert len(stack.steps) < MANY


@pytest.mark.parametrize("stream", [True, False])
async def test_a_prompt_whose_client_leaves_is_not_finished(stack: Stack, stream: bool) -> None:
    stack.group.gate.clear()
    client = await Connection.ask(stack.port, stream=stream)
    await eventually(lambda: stack.group.waiting)
    client.close()
    await eventually(lambda: not stack.group.waiting)
    assert stack.steps == [len(PROMPT)]
    assert await rows_of_another_request(stack) == OTHERS_STEPS


async def test_an_answer_in_one_piece_ends_with_its_client(stack: Stack) -> None:
    client = await Connection.ask(stack.port, stream=False)
    await eventually(lambda: len(stack.steps) > 5)
    await stack.hold()
    client.close()
    await eventually(lambda: not stack.group.waiting)
    assert await rows_of_another_request(stack) == OTHERS_STEPS


async def test_the_step_after_a_client_left_is_without_it_and_the_others_go_on(stack: Stack) -> None:
    stays, leaves = await Connection.ask(stack.port, 60), await Connection.ask(stack.port, prompt=[7])
    await asyncio.gather(stays.read_tokens(3), leaves.read_tokens(3))
    await stack.hold()
    assert stack.steps[-1] == 2
    begun = len(stack.steps)
    leaves.close()
    await eventually(lambda: stack.streams == 1)
    stack.go_on()
    await stays.read_all()
    assert set(stack.steps[begun:]) == {1}
    assert stays.tokens == 60


@pytest.mark.parametrize("stack", [1], indirect=True)
async def test_a_request_that_waits_is_never_begun_when_its_client_leaves(stack: Stack) -> None:
    runs = await Connection.ask(stack.port, 30)
    await runs.read_tokens(2)
    await stack.hold()
    waits = await Connection.ask(stack.port, prompt=[7])
    await eventually(lambda: stack.waiting == 1)
    waits.close()
    await eventually(lambda: stack.waiting == 0)
    stack.go_on()
    await runs.read_all()
    assert await rows_of_another_request(stack) == OTHERS_STEPS
    assert len(stack.steps) == 30 + 3


async def test_equal_requests_go_on_while_one_of_their_clients_stays(stack: Stack) -> None:
    """They share one computation: it ends with its last reader, and not with the one who began it."""
    first, second = await Connection.ask(stack.port, 40), await Connection.ask(stack.port, 40)
    await asyncio.gather(first.read_tokens(3), second.read_tokens(3))
    assert set(stack.steps[1:]) == {1}
    first.close()
    await second.read_all()
    assert second.tokens == 40
    assert len(stack.steps) == 40


async def test_all_choices_of_a_request_end_with_its_client(stack: Stack) -> None:
    client = await Connection.ask(stack.port, n=3, temperature=1.0, seed=1)
    await client.read_tokens(6)
    await stack.hold()
    client.close()
    await eventually(lambda: not stack.group.waiting)
    assert await rows_of_another_request(stack) == OTHERS_STEPS


# The same through Ray Serve and HAProxy -------------------------------------------------------------------------


def engine_statistics(url: str) -> dict[str, Any]:
    with urllib.request.urlopen(f"{url}/admin/status") as response:
        [router] = json.load(response)["routers"]
    found: dict[str, Any] = router["statistics"]["engine"]
    return found


async def until_served_engine(url: str, idle: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
    async with asyncio.timeout(PATIENCE_S):
        while not idle(found := await asyncio.to_thread(engine_statistics, url)):
            pass
    return found


async def test_the_served_engine_stops_with_its_client(application: LocalCluster) -> None:
    before = await asyncio.to_thread(engine_statistics, application.url)
    client = await Connection.ask(application.port, cache=False, return_token_ids=True)
    await client.read_tokens(10)
    client.close()
    after = await until_served_engine(application.url, lambda engine: engine["running"] == 0)
    steps = after["steps"] - before["steps"]
    assert client.tokens <= steps
    # Usually one more than came. On a busy machine the processes between may take the time of some steps to pass
    # it on, but of nothing like the 400 that were asked for.
    assert steps < MANY / 2
