"""What `AsyncClient` sends and makes of the answers, over a transport that is no network."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import numpy as np
import pytest
from pimoe.clients import (
    AsyncClient,
    ConnectionFailed,
    GenerationChunk,
    Health,
    HttpRequest,
    InferOperation,
    InvalidRequestError,
    InvalidTensorError,
    Limits,
    ModelNotFoundError,
    OverloadedError,
    ProtocolError,
    RetryPolicy,
    TokenLogprob,
    UnavailableError,
    Usage,
)
from scripted_transport import (
    Answer,
    Reply,
    ScriptedTransport,
    completion,
    json_reply,
    msgpack_reply,
    ones,
    sse,
    tensor,
)

QUICK = RetryPolicy(base_delay_s=0.0)
MODELS = {"object": "list", "data": [{"id": "first"}, {"id": "second"}]}
HEADERS = {"x-pimoe-cache": "hit", "x-request-id": "r1"}
BUSY = {"error": {"code": "overloaded", "message": "full", "status": 429, "retry_after_s": 0.0}}


def client(*answers: Answer, model: str | None = "m", **options: Any) -> tuple[AsyncClient, ScriptedTransport]:
    transport = ScriptedTransport(*answers)
    return AsyncClient(model=model, transport=transport, retries=QUICK, **options), transport


# Tensors ---------------------------------------------------------------------------------------------------------


async def test_infer_sends_what_the_server_reads() -> None:
    own, transport = client(msgpack_reply(tensor(ones() * 3)), model="a/b")
    output = await own.infer(ones(), layer=2, priority=0.75, timeout_s=5.0, cache=False)
    assert np.array_equal(output, ones() * 3)
    request = transport.requests[0]
    assert (request.method, request.path) == ("POST", "/v2/models/a%2Fb/infer")
    assert request.headers["Content-Type"] == "application/msgpack"
    body = transport.body()
    assert body["inputs"] == [
        {"name": "hidden_states", "shape": [2, 4], "datatype": "FP32", "data": ones().tobytes()}
    ]
    timeout = body["parameters"].pop("timeout")
    assert isinstance(timeout, float)
    assert 0 < timeout <= 5.0
    assert body["parameters"] == {"layer": 2, "priority": 0.75, "cache": False}


@pytest.mark.parametrize("array", [np.ones(4), np.ones((1, 2, 3)), np.float32(1)])
async def test_arrays_of_other_dimensions_are_refused_before_they_travel(array: Any) -> None:
    own, transport = client()
    with pytest.raises(InvalidTensorError, match=r"must be \[tokens, hidden\]"):
        await own.infer(array)
    assert transport.requests == []


@pytest.mark.parametrize("answer", [{}, {"outputs": 3}, {"outputs": [{"name": "else"}]}, {"outputs": ["x"]}])
async def test_answers_without_an_output_are_no_answers(answer: dict[str, Any]) -> None:
    own, _ = client(msgpack_reply(answer))
    with pytest.raises(ProtocolError, match="output"):
        await own.infer(ones())


async def test_options_that_do_not_exist_are_refused() -> None:
    own, _ = client()
    with pytest.raises(TypeError, match="layers"):
        await own.infer(ones(), layers=3)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match=r"'maxtokens'; there are mode, truncation, max_tokens"):
        await own.generate("x", maxtokens=3)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="'tempreature'"):
        own.stream("x", tempreature=3)  # type: ignore[call-arg]


async def test_infer_many_merges_options_and_keeps_order() -> None:
    own, transport = client(msgpack_reply({"responses": [tensor(ones() * n) for n in range(3)]}))
    operations: Any = [ones(), InferOperation(ones(), layer=7, timeout_s=1), InferOperation(ones(), cache=True)]
    outputs = await own.infer_many(operations, layer=1, cache=False, priority=0.5)
    assert [output[0, 0] for output in outputs] == [0, 1, 2]
    parameters = [request["parameters"] for request in transport.body()["requests"]]
    times = [item.pop("timeout") for item in parameters]
    assert times[1] == 1.0
    assert times[0] == times[2] > 1.0
    assert parameters == [
        {"layer": 1, "priority": 0.5, "cache": False},
        {"layer": 7, "priority": 0.5, "cache": False},
        {"layer": 1, "priority": 0.5, "cache": True},
    ]


async def test_infer_many_sends_again_only_what_was_turned_away() -> None:
    wrong = {"error": {"code": "invalid_tensor", "message": "NaN", "param": "x", "status": 400}}
    own, transport = client(
        msgpack_reply({"responses": [BUSY, tensor(ones()), wrong, BUSY]}),
        msgpack_reply({"responses": [BUSY, tensor(ones() * 3)]}),
        msgpack_reply({"responses": [tensor(ones() * 2)]}),
    )
    outcomes = await own.infer_many([ones()] * 4, return_exceptions=True)
    assert [len(transport.body(n)["requests"]) for n in range(3)] == [4, 2, 1]
    assert isinstance(outcomes[2], InvalidTensorError)
    assert [outcome[0, 0] for outcome in outcomes if isinstance(outcome, np.ndarray)] == [2, 1, 3]


async def test_infer_many_raises_the_first_error_and_says_whose_it_is() -> None:
    answers = [msgpack_reply({"responses": [tensor(ones()), BUSY]})]
    answers += [msgpack_reply({"responses": [BUSY]}) for _ in range(9)]
    own, transport = client(*answers)
    with pytest.raises(OverloadedError, match="full") as caught:
        await own.infer_many([ones(), ones()])
    assert "operation 1 of 2" in caught.value.__notes__
    assert len(transport.requests) == 1 + QUICK.max_retries


async def test_infer_many_fills_in_the_error_of_a_whole_request() -> None:
    own, _ = client(json_reply({"code": "invalid_request", "detail": "no"}, 400))
    outcomes = await own.infer_many([ones(), ones()], return_exceptions=True)
    assert [type(outcome) for outcome in outcomes] == [InvalidRequestError] * 2


@pytest.mark.parametrize("limits", [Limits(batch_operations=2), Limits(batch_bytes=2 * ones().nbytes)])
async def test_infer_many_splits_what_is_too_much_for_one_request(limits: Limits) -> None:
    def answer(request: HttpRequest) -> Reply:
        sent = transport.body()["requests"]
        return msgpack_reply({"responses": [tensor(np.frombuffer(r["inputs"][0]["data"], "<f4")) for r in sent]})

    transport = ScriptedTransport(handler=answer)
    own = AsyncClient(model="m", transport=transport, limits=limits)
    outputs = await own.infer_many([ones() * n for n in range(5)])
    assert [output[0] for output in outputs] == [0, 1, 2, 3, 4]
    assert [len(transport.body(n)["requests"]) for n in range(3)] == [2, 2, 1]


async def test_infer_many_of_nothing_asks_nobody() -> None:
    own, transport = client()
    assert await own.infer_many([]) == []
    assert transport.requests == []


@pytest.mark.parametrize("answer", [{"responses": [1]}, {"responses": []}, {}])
async def test_infer_many_does_not_guess(answer: dict[str, Any]) -> None:
    own, _ = client(msgpack_reply(answer))
    with pytest.raises(ProtocolError):
        await own.infer_many([ones()])


# Generation ------------------------------------------------------------------------------------------------------


async def test_generate() -> None:
    own, transport = client(json_reply(completion("hello"), headers=HEADERS))
    answer = await own.generate(
        "hi", max_tokens=5, temperature=0, stop=("a", "b"), seed=None, logprobs=0, extra_body={"user": "u"}
    )
    assert (answer.text, answer.token_ids, answer.finish_reason) == ("hello", (7,), "stop")
    assert (answer.usage, answer.logprobs, answer.model) == (Usage(3, 1), None, "m")
    assert (answer.cache, answer.request_id) == ("hit", "r1")
    assert transport.requests[0].path == "/v1/completions"
    body = transport.body()
    assert 0 < body.pop("timeout") <= 60.0
    assert body == {
        "model": "m",
        "prompt": "hi",
        "max_tokens": 5,
        "temperature": 0,
        "stop": ["a", "b"],
        "logprobs": 0,
        "user": "u",
        "return_token_ids": True,
    }


@pytest.mark.parametrize("prompt", [[1, 2, 3], (1, 2, 3), np.array([1, 2, 3])])
async def test_prompts_may_be_token_ids(prompt: Any) -> None:
    own, transport = client(json_reply(completion()))
    await own.generate(prompt)
    assert transport.body()["prompt"] == [1, 2, 3]


async def test_chat() -> None:
    content = [{"token": "h", "logprob": -0.5, "top_logprobs": [{"token": "x", "logprob": -1}]}]
    message = {"role": "assistant", "content": "hello"}
    own, transport = client(json_reply(completion("", message=message, logprobs={"content": content})))
    answer = await own.chat([{"role": "user", "content": "hi"}], logprobs=1)
    assert answer.text == "hello"
    assert answer.logprobs == (TokenLogprob("h", -0.5, (("x", -1.0),)),)
    assert transport.requests[0].path == "/v1/chat/completions"
    body = transport.body()
    assert body["messages"] == [{"role": "user", "content": "hi"}]
    assert (body["logprobs"], body["top_logprobs"]) == (True, 1)


async def test_logprobs_of_completions() -> None:
    found = {"tokens": ["h", "i"], "token_logprobs": [-0.5, -1], "top_logprobs": [{"h": -0.5, "x": -2}, None]}
    own, _ = client(json_reply(completion(logprobs=found)))
    answer = await own.generate("x", logprobs=2)
    assert answer.logprobs == (
        TokenLogprob("h", -0.5, (("h", -0.5), ("x", -2.0))),
        TokenLogprob("i", -1.0),
    )


@pytest.mark.parametrize("messages", ["hi", [], [1, 2]])
async def test_chats_are_made_of_messages(messages: Any) -> None:
    own, _ = client()
    with pytest.raises(InvalidRequestError, match="messages"):
        await own.chat(messages)


@pytest.mark.parametrize(
    ("prompt", "options"),
    [([1, "x"], {}), ("x", {"temperature": float("nan")}), ("x", {"extra_body": {"a": object()}})],
)
async def test_what_cannot_be_written_is_refused(prompt: Any, options: Any) -> None:
    own, transport = client()
    with pytest.raises(InvalidRequestError):
        await own.generate(prompt, **options)
    assert transport.requests == []


@pytest.mark.parametrize(
    "body",
    [
        b"<html>",
        b"[]",
        b"{}",
        b'{"choices": []}',
        b'{"choices": [3]}',
        json.dumps(completion(finish_reason=None)).encode(),
        json.dumps(completion(token_ids=["x"])).encode(),
        json.dumps(completion(logprobs={"tokens": ["a"], "token_logprobs": []})).encode(),
    ],
)
async def test_what_is_no_completion_is_no_answer(body: bytes) -> None:
    own, _ = client(Reply(200, {}, [body]))
    with pytest.raises(ProtocolError):
        await own.generate("x")


async def test_stream() -> None:
    events = [
        {"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}]},
        completion("he", finish_reason=None, token_ids=[1, 2]),
        completion("", finish_reason=None, token_ids=[3]),
        completion("y", token_ids=[4], finish_reason="length"),
        {"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 4}},
    ]
    reply = Reply(200, HEADERS, [sse(*events)])
    own, transport = client(reply)
    stream = own.stream("x", seed=3)
    assert transport.requests == [], "nothing is sent before it is asked for"
    chunks = [chunk async for chunk in stream]
    assert chunks == [
        GenerationChunk("he", (1, 2)),
        GenerationChunk("", (3,)),
        GenerationChunk("y", (4,), "length"),
    ]
    whole = stream.generation
    assert (whole.text, whole.token_ids, whole.finish_reason, whole.usage) == (
        "hey",
        (1, 2, 3, 4),
        "length",
        Usage(3, 4),
    )
    assert (whole.cache, whole.request_id) == ("hit", "r1")
    body = transport.body()
    assert (body["stream"], body["stream_options"], body["seed"]) == (True, {"include_usage": True}, 3)
    assert [chunk async for chunk in stream] == [], "an ended stream stays ended"


@pytest.mark.parametrize(
    ("pieces", "error", "message"),
    [
        ([], ConnectionFailed, "cut after 0 events"),
        ([sse(completion(finish_reason=None), done=False)], ConnectionFailed, "cut after 1 events"),
        ([sse(completion(), done=False)], ConnectionFailed, "cut after 1 events"),
        ([sse(completion(finish_reason=None))], ConnectionFailed, "finish reason"),
        ([sse({"error": {"code": "unavailable", "message": "gone"}}, done=False)], UnavailableError, "gone"),
        ([b"data: {\n\n"], ProtocolError, "no completion"),
    ],
)
async def test_a_stream_never_ends_short_in_silence(
    pieces: list[bytes], error: type[Exception], message: str
) -> None:
    reply = Reply(200, {}, pieces)
    own, transport = client(reply)
    stream = own.stream("x")
    with pytest.raises(error, match=message):
        async for _ in stream:
            pass
    assert reply.closed
    assert len(transport.requests) == 1, "a stream that has begun is not sent again"
    assert [chunk async for chunk in stream] == []


async def test_a_stream_is_retried_before_it_begins() -> None:
    own, transport = client(Reply(429), ConnectionFailed("x"), Reply(200, {}, [sse(completion())]))
    async with own.stream("x") as chunks:
        assert len(transport.requests) == 3, "opened by the block"
        assert [chunk.text async for chunk in chunks] == ["ok"]


async def test_leaving_or_dropping_a_stream_closes_it() -> None:
    def endless() -> Reply:
        return Reply(200, {}, [sse(completion(finish_reason=None), done=False)] * 99)

    replies = [endless(), endless(), endless()]
    own, _ = client(*replies)
    async with own.stream("x") as chunks:
        await anext(chunks)
    async for _ in own.stream("x"):
        break
    stream = own.stream("x")
    await anext(stream)
    assert "open, 1 tokens" in repr(stream)
    await stream.aclose()
    await asyncio.sleep(0)  # a dropped stream is closed by the loop's next turn
    assert [reply.closed for reply in replies] == [True] * 3
    with pytest.raises(StopAsyncIteration):
        await anext(stream)


async def test_silence_within_a_stream_is_bounded() -> None:
    class Silent(Reply):
        async def read_some(self) -> bytes:
            return self.pieces.pop(0) if self.pieces else await asyncio.Event().wait() and b""

    reply = Silent(200, {}, [sse(completion(finish_reason=None), done=False)])
    own, _ = client(reply, limits=Limits(idle_timeout_s=0.01))
    with pytest.raises(ConnectionFailed, match=r"silent for 0\.01 s"):
        async for _ in own.stream("x"):
            pass
    assert reply.closed


# The rest --------------------------------------------------------------------------------------------------------


async def test_the_model_is_asked_for_once() -> None:
    def answer(request: HttpRequest) -> Reply:
        return json_reply(MODELS) if request.method == "GET" else json_reply(completion())

    transport = ScriptedTransport(handler=answer)
    own = AsyncClient(transport=transport)
    await asyncio.gather(*(own.generate("x") for _ in range(5)))
    assert [request.path for request in transport.requests].count("/v1/models") == 1
    assert transport.body()["model"] == "first"
    assert repr(own) == "AsyncClient('http://127.0.0.1:8000', model='first', timeout_s=60)"
    assert await own.models() == ["first", "second"]


async def test_a_server_without_models() -> None:
    own, _ = client(json_reply({"data": []}), json_reply({"detail": "Not Found"}, 404), model=None)
    with pytest.raises(ModelNotFoundError, match=r"127\.0\.0\.1:8000 serves no model"):
        await own.generate("x")
    with pytest.raises(Exception, match="Not Found"):
        await own.generate("x")


@pytest.mark.parametrize("reply", [Reply(200, {}, [b"hello"]), json_reply([1]), json_reply({"data": [{}]})])
async def test_something_else_that_listens_there(reply: Reply) -> None:
    own, _ = client(reply, model=None)
    with pytest.raises(ProtocolError, match="is it a pimoe server"):
        await own.infer(ones())


async def test_status() -> None:
    own, transport = client(json_reply({"model": "m", "groups": []}))
    assert await own.status() == {"model": "m", "groups": []}
    assert transport.requests[0].path == "/admin/status"


@pytest.mark.parametrize(
    ("answers", "health"),
    [
        ([json_reply({})], Health(True, True)),
        (
            [json_reply({"code": "unavailable", "detail": "no group 1"}, 503), json_reply({})],
            Health(True, False, "no group 1"),
        ),
        ([json_reply({"code": "unavailable", "detail": "x"}, 503), Reply(503)], Health(False, False, "x")),
        ([ConnectionFailed("nothing listens")], Health(False, False, "nothing listens")),
    ],
)
async def test_health(answers: list[Answer], health: Health) -> None:
    own, transport = client(*answers)
    found = await own.health()
    assert found == health
    assert bool(found) is health.ready
    assert len(transport.requests) == len(answers), "never retried"


async def test_closing() -> None:
    transport = ScriptedTransport()
    async with AsyncClient(transport=transport) as own:
        pass
    assert transport.closed
    with pytest.raises(RuntimeError, match="closed"):
        await own.generate("x")
    with pytest.raises(RuntimeError, match="closed"):
        await anext(own.stream("x"))


@pytest.mark.parametrize("url", ["", "localhost:8000", "ftp://x", "http://", "http://x?y=1", "http://x:99999"])
def test_addresses_that_are_none(url: str) -> None:
    with pytest.raises(ValueError, match=r"base_url is .* must be like"):
        AsyncClient(url)


def test_constructor_values() -> None:
    with pytest.raises(ValueError, match="timeout_s is 0"):
        AsyncClient(timeout_s=0)
    assert AsyncClient("http://host/prefix/").base_url == "http://host/prefix"


async def test_own_headers_travel_and_are_not_shown() -> None:
    own, transport = client(json_reply(completion()), headers={"Authorization": "Bearer secret"})
    await own.generate("x")
    assert transport.requests[0].headers["Authorization"] == "Bearer secret"
    assert "secret" not in repr(own)
