"""Deadlines and disconnects: work behind the gateway ends when its caller's time or its caller is gone."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from typing import Any

import msgpack
import numpy as np
import orjson
import pytest
from fake_gateway import HIDDEN, PATIENCE_S, FakeGateway, Reply, ask
from pimoe.deployments.api import ApiSettings, assembly, create_app, lifetime
from pimoe.deployments.api.assembly import TextRules
from pimoe.deployments.api.generation import Plan, started
from pimoe.deployments.api.lifetime import Lifetime
from pimoe.runtime.errors import DeadlineExceededError, OverloadedError, RequestCancelledError
from pimoe.runtime.requests import GenerateAnswer, GenerateRequest, TokenChunk

QUICK = ApiSettings(deadline_grace_s=0.01)
TENSOR = {
    "name": "hidden_states",
    "shape": [1, HIDDEN],
    "datatype": "FP32",
    "data": np.zeros(HIDDEN, np.float32).tobytes(),
}
MSGPACK = {"content-type": "application/msgpack"}

Leave = asyncio.Event | None

CALLS: dict[str, tuple[str, bytes, dict[str, str]]] = {
    "completion": ("/v1/completions", orjson.dumps({"model": "echo", "prompt": "abc"}), {}),
    "choices": ("/v1/completions", orjson.dumps({"model": "echo", "prompt": ["abc", "d"], "n": 2}), {}),
    "stream": ("/v1/completions", orjson.dumps({"model": "echo", "prompt": "abc", "stream": True}), {}),
    "infer": ("/v2/models/echo/infer", msgpack.packb({"inputs": [TENSOR]}), MSGPACK),
    "infer_many": (
        "/v2/models/echo/infer_many",
        msgpack.packb({"requests": [{"inputs": [TENSOR]}] * 3}),
        MSGPACK,
    ),
}


async def call(gateway: FakeGateway, name: str, leave: Leave = None, time_s: str = "60") -> Reply:
    path, body, headers = CALLS[name]
    return await ask(gateway, "POST", path, body, headers | {"x-pimoe-timeout": time_s}, leave)


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not condition():  # noqa: ASYNC110 (the condition is plain state of the fake)
            await asyncio.sleep(0.001)


@pytest.mark.parametrize("name", ["completion", "choices", "stream", "infer"])
async def test_a_hanging_backend_is_cut_off_at_the_deadline(name: str) -> None:
    gateway = FakeGateway(settings=QUICK, hang=True)
    reply = await call(gateway, name, time_s="0.03")
    assert reply.status == 504
    assert b"deadline_exceeded" in reply.body
    assert gateway.cancelled == (4 if name == "choices" else 1)
    assert gateway.open_streams == 0


async def test_each_operation_of_infer_many_has_its_own_deadline() -> None:
    gateway = FakeGateway(settings=QUICK, hang=True)
    reply = await call(gateway, "infer_many", time_s="0.03")
    assert reply.status == 200
    answers = msgpack.unpackb(reply.body)["responses"]
    assert [answer["error"]["code"] for answer in answers] == ["deadline_exceeded"] * 3
    assert gateway.cancelled == 3


@pytest.mark.parametrize("name", ["completion", "choices", "stream", "infer", "infer_many"])
async def test_a_client_that_leaves_cancels_the_work(name: str) -> None:
    gateway = FakeGateway(hang=True)
    leave = asyncio.Event()
    begun = gateway.inferred if name.startswith("infer") else gateway.generated
    task = asyncio.create_task(call(gateway, name, leave))
    await until(lambda: begun)
    leave.set()
    reply = await task
    assert reply.status == 499
    assert gateway.cancelled == len(begun)


@pytest.mark.parametrize("name", ["completion", "choices", "stream"])
async def test_a_client_that_leaves_in_the_middle_cancels_the_work(name: str) -> None:
    gateway = FakeGateway(fail_after=2, hang=True)
    leave = asyncio.Event()
    task = asyncio.create_task(call(gateway, name, leave))
    await until(lambda: gateway.open_streams)
    await asyncio.sleep(0.01)
    leave.set()
    reply = await task
    assert gateway.open_streams == 0
    assert gateway.cancelled > 0
    assert b"[DONE]" not in reply.body


async def test_a_client_that_leaves_while_sending() -> None:
    sent: list[Any] = []

    async def receive() -> dict[str, Any]:
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": []}
    await create_app(FakeGateway())(scope, receive, send)
    assert sent[0]["status"] == 499


async def test_a_deadline_in_the_middle_of_a_stream() -> None:
    gateway = FakeGateway(settings=QUICK, fail_after=2, hang=True)
    # Long enough for the first chunks on any machine.
    reply = await call(gateway, "stream", time_s="1")
    assert reply.status == 200
    assert reply.complete
    events = reply.body.split(b"\n\n")
    assert [b'"text":"a"' in events[0], b'"text":"b"' in events[1]] == [True, True]
    assert orjson.loads(events[2].removeprefix(b"data: "))["error"]["code"] == "deadline_exceeded"
    assert events[3] == b""
    assert gateway.open_streams == 0


async def test_a_stream_without_an_end_is_an_error() -> None:
    class Cut(FakeGateway):
        async def generate(self, request: GenerateRequest, use_cache: bool) -> GenerateAnswer:
            async def chunks() -> Any:
                yield TokenChunk((97,))

            return GenerateAnswer("miss", "id", 0, chunks())

    assert (await call(Cut(), "completion")).status == 500
    reply = await call(Cut(), "stream")
    assert reply.status == 200
    assert b"internal_error" in reply.body
    assert b"[DONE]" not in reply.body


async def test_a_finished_generation_is_read_to_its_end() -> None:
    # What wraps the chunks, as the cache does, learns only there that the answer is whole.
    ended: list[bool] = []

    class Kept(FakeGateway):
        async def generate(self, request: GenerateRequest, use_cache: bool) -> GenerateAnswer:
            async def chunks() -> Any:
                yield TokenChunk((97,))
                yield TokenChunk((98,), "length")
                ended.append(True)

            return GenerateAnswer("miss", "id", 0, chunks())

    for name, count in (("completion", 1), ("choices", 4), ("stream", 1)):
        ended.clear()
        await call(Kept(), name)
        assert len(ended) == count


class Silent(AsyncGenerator[TokenChunk, None]):
    """A generation that was admitted and says nothing; `closed` collects those that were closed."""

    def __init__(self, closed: list[Silent]) -> None:
        self._closed = closed

    async def asend(self, value: None) -> TokenChunk:
        await asyncio.Event().wait()
        raise StopAsyncIteration

    async def athrow(self, *error: Any) -> TokenChunk:
        raise StopAsyncIteration

    async def aclose(self) -> None:
        self._closed.append(self)


async def test_one_refused_choice_ends_the_others() -> None:
    closed: list[Silent] = []
    admitted = asyncio.Event()

    class Half(FakeGateway):
        async def generate(self, request: GenerateRequest, use_cache: bool) -> GenerateAnswer:
            self.generated.append(request)
            match len(self.generated):
                case 2:
                    await self._trouble()
                case 3:
                    await admitted.wait()
                    raise OverloadedError("no room")
                case 4:
                    admitted.set()
            return GenerateAnswer("miss", "id", 0, Silent(closed))

    gateway = Half(hang=True)
    reply = await call(gateway, "choices")
    assert reply.status == 429
    # The second had not been admitted yet, the first and the last had.
    assert gateway.cancelled == 1
    assert len(closed) == 2


async def test_generations_that_were_never_read_are_closed() -> None:
    closed: list[Silent] = []

    class Mute(FakeGateway):
        async def generate(self, request: GenerateRequest, use_cache: bool) -> GenerateAnswer:
            return GenerateAnswer("miss", "id", 0, Silent(closed))

    plan = Plan((GenerateRequest("a", (1,)), GenerateRequest("b", (1,))), 2, False, TextRules())
    async with started(Mute(), plan) as answers:
        assert len(answers) == 2
    assert len(closed) == 2


async def test_a_generation_that_does_not_close_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(assembly, "_CLOSE_S", 0.01)

    class Stuck(Silent):
        async def aclose(self) -> None:
            await asyncio.Event().wait()

    class Sticky(FakeGateway):
        async def generate(self, request: GenerateRequest, use_cache: bool) -> GenerateAnswer:
            return GenerateAnswer("miss", "id", 0, Stuck([]))

    for name in ("completion", "choices", "stream"):
        assert (await call(Sticky(settings=QUICK), name, time_s="0.02")).status == 504


async def test_a_refusal_with_the_first_chunk_still_has_its_status() -> None:
    gateway = FakeGateway(fail_after=0, error=OverloadedError("no room"))
    for name in ("stream", "completion", "choices"):
        assert (await call(gateway, name)).status == 429


async def test_a_body_that_does_not_come_is_given_up() -> None:
    settings = ApiSettings(default_timeout_s=0.02)
    statuses: list[int] = []

    async def receive() -> dict[str, Any]:
        await asyncio.Event().wait()
        return {}

    async def send(message: Any) -> None:
        statuses.append(message.get("status", 0))

    scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": []}
    await create_app(FakeGateway(settings=settings))(scope, receive, send)
    assert statuses[0] == 504


async def test_lifetime_leaves_quick_work_alone() -> None:
    async with Lifetime(10.0) as life:
        assert 4.9 < life.limit(5.0) <= 5.0
        life.watch(_gone)
    assert asyncio.current_task().cancelling() == 0  # type: ignore[union-attr]


async def _gone() -> dict[str, Any]:
    return {"type": "http.disconnect"}


async def test_lifetime_deadline_names_the_timeout() -> None:
    async def work() -> None:
        async with Lifetime(10.0) as life:
            life.limit(0.01)
            await asyncio.Event().wait()

    with pytest.raises(DeadlineExceededError, match=r"timeout of 0\.01 s"):
        await work()
    assert asyncio.current_task().cancelling() == 0  # type: ignore[union-attr]


async def test_lifetime_that_is_over_before_it_begins() -> None:
    started_s = asyncio.get_running_loop().time() - 5
    with pytest.raises(DeadlineExceededError):
        async with Lifetime(10.0, started_s) as life:
            life.limit(4.0)


async def test_lifetime_disconnect(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lifetime, "WATCH_AFTER_S", 0.0)

    async def work() -> None:
        async with Lifetime(10.0) as life:
            life.watch(_gone)
            await asyncio.Event().wait()

    with pytest.raises(RequestCancelledError):
        await work()


async def test_lifetime_leaves_no_watcher_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lifetime, "WATCH_AFTER_S", 0.0)
    watching = asyncio.Event()

    async def receive() -> dict[str, Any]:
        watching.set()
        await asyncio.Event().wait()
        return {}

    async with Lifetime(10.0) as life:
        life.watch(receive)
        await watching.wait()
        [watcher] = asyncio.all_tasks() - {asyncio.current_task()}
    await asyncio.sleep(0)
    assert watcher.cancelled()


async def test_lifetime_lets_a_foreign_cancellation_pass() -> None:
    entered = asyncio.Event()

    async def work() -> None:
        async with Lifetime(10.0):
            entered.set()
            await asyncio.Event().wait()

    task = asyncio.create_task(work())
    await entered.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_lifetime_keeps_the_works_own_error() -> None:
    async def work() -> None:
        async with Lifetime(0.01):
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                raise ValueError("mine") from None

    with pytest.raises(ValueError, match="mine"):
        await work()
