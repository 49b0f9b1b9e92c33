"""Gateway and router over real links: the same answers, the same errors, and generations that outlive a router."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import make_checkpoint
from engines import Answer, alone, at_rest, controlled, make_router, prompt_of, read, request
from pimoe.runtime.errors import (
    ContextLengthError,
    DeadlineExceededError,
    InvalidRequestError,
    InvalidTensorError,
    LinkProtocolError,
    OverloadedError,
    PimoeError,
    RequestCancelledError,
    UnavailableError,
)
from pimoe.runtime.generation.limits import EngineLimits
from pimoe.runtime.links import Call, Endpoint, LinkPool, LinkServer, Packed, Reply
from pimoe.runtime.links.addresses import new_unix_address
from pimoe.runtime.requests import GenerateRequest, InferRequest, ModelInfo, TokenChunk
from pimoe.runtime.router.client import RouterClient
from pimoe.runtime.router.limits import RouterLimits
from pimoe.runtime.router.router import Router
from pimoe.runtime.router.server import RouterHandler
from pimoe.runtime.tensors import from_wire, to_wire
from waiting import eventually, nothing_left_behind, within_patience  # noqa: F401

pytestmark = pytest.mark.usefixtures("nothing_left_behind")

SECRET, NODE = b"secret", "here"
PROMPT = prompt_of(9)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint("olmoe", tmp_path_factory.mktemp("olmoe"), num_hidden_layers=2)


class Served:
    """Routers behind links, and a client to them. `discovered` are those that discovery names."""

    def __init__(self) -> None:
        self.routers: list[Router] = []
        self.servers: list[LinkServer] = []
        self.discovered: list[Endpoint] = []
        self.pool = LinkPool("router", self._discover, SECRET, NODE, refresh_s=0.01)
        self.client = RouterClient(self.pool)

    async def _discover(self) -> Sequence[Endpoint]:
        return list(self.discovered)

    async def add(self, router: Router) -> Router:
        """Serves a router on a link of its own."""
        router.start()
        self.routers.append(router)
        await self.add_handler(RouterHandler(router), router.model)
        return router

    async def add_handler(self, handler: Callable[[Call], Any], model: ModelInfo) -> LinkServer:
        server = LinkServer(handler, SECRET)
        address = await server.listen_unix(new_unix_address())
        self.servers.append(server)
        info = {"model": model.to_wire()}
        self.discovered.append(Endpoint(f"router-{len(self.servers)}", NODE, (address,), info))
        return server

    def kill(self, index: int) -> Awaitable[None]:
        """The links break as when the process is gone."""
        self.discovered[index] = replace(self.discovered[index], addresses=())
        for peer in list(self.servers[index]._peers):
            peer.connection.abort()
        return self.servers[index].close()

    def streaming(self) -> list[int]:
        """Which servers have a stream open."""
        return [n for n, server in enumerate(self.servers) if server.statistics().streams]

    async def close(self) -> None:
        await self.pool.close()
        for server in self.servers:
            await server.close()
        for router in self.routers:
            await within_patience(router.close())


@pytest.fixture
async def served() -> AsyncIterator[Served]:
    served = Served()
    yield served
    await served.close()


async def serve_two(served: Served, folder: Path) -> None:
    for _ in range(2):
        await served.add(make_router(folder))
    await served.pool.start()
    await eventually(lambda: len(served.pool.links) == 2)


# The same as without links.


async def test_generations_are_those_of_the_router(served: Served, folder: Path) -> None:
    await served.add(make_router(folder))
    await served.pool.start()
    for sampling in ({}, {"temperature": 1.0, "seed": 4, "logprobs": 3, "stop_token_ids": (3,)}):
        asked = request(PROMPT, 12, **sampling)
        answer = await read(served.client.generate(asked))
        own = await alone(folder, asked)
        assert (answer.tokens, answer.reason) == (own.tokens, own.reason)
        assert answer.chunks == own.chunks, "log-probabilities survive the wire too"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
async def test_tensors_are_those_of_the_router(served: Served, folder: Path, dtype: torch.dtype) -> None:
    router = await served.add(make_router(folder, groups=2))
    await served.pool.start()
    rows = torch.randn(5, 48).to(dtype)
    asked = InferRequest("r", to_wire(rows), layer=1)
    over_link = from_wire((await served.client.infer(asked)).output)
    assert over_link.dtype is dtype
    assert torch.equal(over_link, from_wire((await router.infer(asked)).output))


async def test_the_model_is_what_discovery_tells(served: Served, folder: Path) -> None:
    with pytest.raises(UnavailableError, match="no router is ready yet"):
        _ = served.client.model
    router = await served.add(make_router(folder))
    await served.pool.start()
    assert served.client.model == router.model
    assert served.client.model is served.client.model
    served.discovered.clear()
    await eventually(lambda: not served.pool.endpoints)
    assert served.client.model == router.model, "the last one seen is remembered"


async def test_a_model_has_the_context_that_every_router_has_memory_for(served: Served, folder: Path) -> None:
    small = RouterLimits(engine=EngineLimits(kv_blocks=5, block_tokens=4, drain_s=0.0))
    for limits in (None, small):
        await served.add(make_router(folder, limits=limits))
    await served.pool.start()
    await eventually(lambda: len(served.pool.endpoints) == 2)
    assert served.client.model.max_context_tokens == 20
    assert served.client.model is served.client.model
    del served.discovered[1]
    await eventually(lambda: len(served.pool.endpoints) == 1)
    assert served.client.model.max_context_tokens == 256


# Errors keep their class.


@pytest.mark.parametrize(
    ("asked", "error", "param"),
    [
        (request(PROMPT, 500), ContextLengthError, "max_tokens"),
        (request((96,), 5), InvalidRequestError, "prompt"),
        (request((), 5), InvalidRequestError, None),
    ],
)
async def test_errors_of_a_generation_come_back_as_themselves(
    served: Served, folder: Path, asked: GenerateRequest, error: type[PimoeError], param: str | None
) -> None:
    await served.add(make_router(folder))
    await served.pool.start()
    answer = await read(served.client.generate(asked))
    assert type(answer.error) is error
    assert answer.error is not None
    assert answer.error.param == param


async def test_errors_of_a_tensor_come_back_as_themselves(served: Served, folder: Path) -> None:
    router = await served.add(make_router(folder))
    await served.pool.start()
    with pytest.raises(InvalidTensorError, match=r"it must be \[tokens, 48\]"):
        await served.client.infer(InferRequest("r", to_wire(torch.ones(2, 47))))
    controlled(router)[0].failures = [OverloadedError("too much", retry_after_s=3.0)]
    with pytest.raises(OverloadedError) as caught:
        await served.client.infer(InferRequest("r", to_wire(torch.ones(2, 48))))
    assert caught.value.retry_after_s == 3.0


@pytest.mark.parametrize(
    "error", [UnavailableError("no live replica", retry_after_s=2.0), LinkProtocolError("a group talks nonsense")]
)
async def test_an_error_from_behind_a_router_is_no_reason_to_ask_another(
    served: Served, folder: Path, error: PimoeError
) -> None:
    await serve_two(served, folder)
    for router in served.routers:
        controlled(router)[0].failures = [error]
    answer = await read(served.client.generate(request(PROMPT, 5)))
    assert type(answer.error) is type(error)
    assert sum(len(controlled(router)[0].failures) for router in served.routers) == 1


async def test_other_calls_are_refused(served: Served, folder: Path) -> None:
    await served.add(make_router(folder))
    await served.pool.start()
    for method, tensors in (("experts", []), ("infer", []), ("infer", [to_wire(torch.ones(1, 48))] * 2)):
        with pytest.raises(InvalidRequestError, match="a router does not answer"):
            await served.pool.call(method, {}, tensors, asyncio.get_running_loop().time() + 60)
    for method in ("experts", "generate"):
        with pytest.raises(InvalidRequestError, match=r"a router does not answer .* packed"):
            await served.pool.call_packed(method, Packed(b"", ()), asyncio.get_running_loop().time() + 60)


# Leaving.


async def test_leaving_reaches_the_engine(served: Served, folder: Path) -> None:
    router = await served.add(make_router(folder))
    await served.pool.start()
    assert router.engine is not None
    async with contextlib.aclosing(served.client.generate(request(PROMPT, 200))) as chunks:
        await anext(chunks)
        assert router.engine.statistics().running == 1
    await eventually(lambda: router.engine is not None and at_rest(router.engine))
    assert router.engine.statistics().decode_tokens < 200
    assert served.pool.statistics().in_flight == 0


async def test_leaving_a_tensor_reaches_the_queue(served: Served, folder: Path) -> None:
    router = await served.add(make_router(folder))
    await served.pool.start()
    (group,) = controlled(router)
    group.gate.clear()
    asked = InferRequest("r", to_wire(torch.ones(2, 48)))
    running = asyncio.ensure_future(served.client.infer(asked))
    await eventually(lambda: group.waiting)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    await eventually(lambda: not served.servers[0].statistics().streams)
    assert served.pool.statistics().in_flight == 0


async def test_the_remaining_time_travels(served: Served, folder: Path) -> None:
    router = await served.add(make_router(folder))
    await served.pool.start()
    controlled(router)[0].gate.clear()
    late = await read(served.client.generate(request(PROMPT, 5, timeout_s=0.02)))
    assert isinstance(late.error, DeadlineExceededError)
    assert router.engine is not None
    await eventually(lambda: router.engine is not None and at_rest(router.engine))
    with pytest.raises(DeadlineExceededError):
        await served.client.infer(InferRequest("r", to_wire(torch.ones(2, 48)), timeout_s=0.02))


# Routers that go.


async def read_until(
    client: RouterClient, asked: GenerateRequest, tokens: int, then: Callable[[], Awaitable[None]]
) -> Answer:
    """Reads to the end; `then` happens as soon as `tokens` have come."""
    answer = Answer()

    async def happen() -> None:
        await eventually(lambda: len(answer.tokens) >= tokens)
        await then()

    await asyncio.gather(read(client.generate(asked), answer), happen())
    return answer


@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.1, "seed": 9, "top_p": 0.9}], ids=["greedy", "drawn"])
@pytest.mark.parametrize("tokens", [0, 1, 7])
async def test_a_generation_goes_on_at_another_router_when_its_own_dies(
    served: Served, folder: Path, sampling: dict[str, Any], tokens: int
) -> None:
    await serve_two(served, folder)
    died: list[int] = []

    async def die() -> None:
        await eventually(served.streaming)
        died.extend(served.streaming())
        await served.kill(died[0])

    asked = request(PROMPT, 60, **sampling)
    answer = await read_until(served.client, asked, tokens, die)
    assert len(died) == 1
    assert answer.error is None
    own = await alone(folder, asked)
    assert (answer.tokens, answer.reason) == (own.tokens, own.reason)
    assert served.pool.statistics().resent == 1


async def test_a_generation_moves_on_from_a_router_that_shuts_down(served: Served, folder: Path) -> None:
    await serve_two(served, folder)
    left: list[int] = []

    async def shut_down() -> None:
        (index,) = served.streaming()
        left.append(index)
        served.servers[index].drain()
        await served.routers[index].close()

    asked = request(PROMPT, 60)
    answer = await read_until(served.client, asked, 3, shut_down)
    assert len(left) == 1
    assert answer.error is None
    assert answer.tokens == (await alone(folder, asked)).tokens


async def test_a_tensor_moves_on_from_a_router_that_dies(served: Served, folder: Path) -> None:
    await serve_two(served, folder)
    for router in served.routers:
        controlled(router)[0].gate.clear()
    rows = torch.randn(3, 48)
    running = asyncio.ensure_future(served.client.infer(InferRequest("r", to_wire(rows))))
    await eventually(served.streaming)
    (index,) = served.streaming()
    await served.kill(index)
    survivor = served.routers[1 - index]
    controlled(survivor)[0].gate.set()
    output = from_wire((await running).output)
    assert torch.equal(output, from_wire((await survivor.infer(InferRequest("r", to_wire(rows)))).output))


async def test_with_no_router_left_a_request_fails_at_its_deadline_as_unavailable(
    served: Served, folder: Path
) -> None:
    await served.add(make_router(folder))
    await served.pool.start()
    # Long enough for the router to be gone before the time is up, however busy the machine.
    asked = request(PROMPT, 200, timeout_s=3.0)
    answer = await read_until(served.client, asked, 1, lambda: served.kill(0))
    assert isinstance(answer.error, UnavailableError)
    assert answer.error.retry_after_s
    assert answer.tokens
    assert served.pool.statistics().in_flight == 0


async def test_requests_wait_for_the_first_router(served: Served, folder: Path) -> None:
    await served.pool.start()
    reading = asyncio.ensure_future(read(served.client.generate(request(PROMPT, 5))))
    await served.add(make_router(folder))
    assert (await reading).reason == "length"


async def test_a_router_that_ends_a_stream_without_a_reason_is_given_up(served: Served, folder: Path) -> None:
    own = await alone(folder, request(PROMPT, 10))
    router = make_router(folder)
    asked_for: list[int] = []

    async def cut_short(call: Call) -> AsyncIterator[Reply]:
        emitted = len(call.meta["emitted"])
        asked_for.append(emitted)
        for token in own.tokens[emitted : emitted + 2]:
            yield Reply(TokenChunk((token,)).to_wire())
        if len(asked_for) == 2:
            await served.add(router)

    await served.add_handler(cut_short, router.model)
    await served.pool.start()
    answer = await read(served.client.generate(request(PROMPT, 10)))
    assert (answer.tokens, answer.reason) == (own.tokens, "length")
    assert asked_for[:2] == [0, 2]


async def test_only_the_first_chunk_of_all_tells_of_the_prompt(served: Served, folder: Path) -> None:
    """What a second router computes of the prompt again is nobody's business."""
    asked = request(PROMPT, 10, prompt_logprobs=0)
    own = await alone(folder, asked)
    router = make_router(folder)

    async def cut_short(call: Call) -> AsyncIterator[Reply]:
        if not call.meta["emitted"]:
            yield Reply(replace(own.chunks[0], cached_tokens=4).to_wire())
        elif not served.routers:
            await served.add(router)

    await served.add_handler(cut_short, router.model)
    await served.pool.start()
    answer = await read(served.client.generate(asked))
    assert answer.tokens == own.tokens
    assert own.chunks[0].prompt_logprobs is not None
    assert [chunk.prompt_logprobs for chunk in answer.chunks] == [own.chunks[0].prompt_logprobs, *[None] * 9]
    assert [chunk.cached_tokens for chunk in answer.chunks] == [4, *[0] * 9]


async def test_a_router_that_answers_a_tensor_with_nothing_is_an_error(served: Served, folder: Path) -> None:
    await served.add_handler(lambda _: Reply(), make_router(folder).model)
    await served.pool.start()
    with pytest.raises(LinkProtocolError, match="another kind than the call"):
        await served.client.infer(InferRequest("r", to_wire(torch.ones(1, 48))))


async def test_a_cancellation_that_nobody_asked_for_surfaces(served: Served, folder: Path) -> None:
    def cancelled(call: Call) -> Reply:
        raise RequestCancelledError("for no reason")

    await served.add_handler(cancelled, make_router(folder).model)
    await served.pool.start()
    answer = await read(served.client.generate(request(PROMPT, 5)))
    assert isinstance(answer.error, RequestCancelledError)
