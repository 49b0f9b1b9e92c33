"""`/v1` through the real `openai` SDK, unchanged, over real sockets."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import chain
from typing import Any

import openai
import orjson
import pytest
from fake_gateway import EOS, MODEL, FakeGateway, ask, served, wait_until
from pimoe.runtime.errors import OverloadedError

Server = tuple[FakeGateway, str]


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    gateway = FakeGateway()
    with served(gateway) as address:
        yield gateway, address


@pytest.fixture
def gateway(server: Server) -> FakeGateway:
    """The server's gateway, as new."""
    gateway = server[0]
    gateway.__dict__.update(FakeGateway().__dict__)
    return gateway


@pytest.fixture
def client(server: Server, gateway: FakeGateway) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"http://{server[1]}/v1", api_key="none", max_retries=0) as client:
        yield client


def user(text: str) -> list[Any]:
    return [{"role": "user", "content": text}]


def test_completion(client: openai.OpenAI, gateway: FakeGateway) -> None:
    answer = client.completions.create(model="echo", prompt="hello", temperature=0)
    assert answer.choices[0].text == "hello"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.object == "text_completion"
    assert answer.id.startswith("cmpl-")
    assert answer.created == gateway.created_s
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (
        6,
        6,
        12,
    )


def test_completion_defaults_are_openais(client: openai.OpenAI, gateway: FakeGateway) -> None:
    answer = client.completions.create(model="echo", prompt="a" * 50)
    assert answer.choices[0].text == "a" * 16
    assert answer.choices[0].finish_reason == "length"
    request = gateway.generated[0]
    assert request.sampling.max_tokens == 16
    assert request.sampling.temperature == 1.0
    assert request.priority == 0.5
    assert 59 < request.timeout_s <= 60


def test_all_sampling_parameters_arrive(client: openai.OpenAI, gateway: FakeGateway) -> None:
    extra = {"top_k": 5, "min_p": 0.1, "stop_token_ids": [7], "ignore_eos": True, "min_tokens": 2}
    urgency = {"priority": 0.9, "timeout": 12.5, "cache": False}
    client.completions.create(
        model="echo",
        prompt="x",
        max_tokens=4,
        temperature=0.5,
        top_p=0.8,
        seed=11,
        extra_body=extra | urgency,
    )
    request = gateway.generated[0]
    expected = replace(
        request.sampling, max_tokens=4, temperature=0.5, top_p=0.8, seed=11, top_k=5, min_p=0.1, min_tokens=2
    )
    assert request.sampling == replace(expected, stop_token_ids=(7,), ignore_eos=True, logprobs=None)
    assert request.priority == 0.9
    assert 12 < request.timeout_s <= 12.5
    assert gateway.use_cache == [False]


@pytest.mark.parametrize(
    ("prompt", "texts"),
    [
        ("ab", ["ab"]),
        (["ab", "c"], ["ab", "c"]),
        ([104, 105], ["hi"]),
        ([[104], [105, 33]], ["h", "i!"]),
    ],
)
def test_every_form_of_prompt(client: openai.OpenAI, prompt: Any, texts: list[str]) -> None:
    answer = client.completions.create(model="echo", prompt=prompt)
    assert [choice.text for choice in answer.choices] == texts
    assert [choice.index for choice in answer.choices] == list(range(len(texts)))


def test_choices_have_seeds_of_their_own(client: openai.OpenAI, gateway: FakeGateway) -> None:
    answer = client.completions.create(model="echo", prompt=["a", "b"], n=3, seed=5)
    assert [choice.text for choice in answer.choices] == ["a", "a", "a", "b", "b", "b"]
    assert [request.sampling.seed for request in gateway.generated] == [5, 6, 7, 5, 6, 7]
    assert len({request.request_id for request in gateway.generated}) == 6
    assert gateway.use_cache == [True] * 6
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == 4


def test_only_deterministic_work_uses_the_cache(client: openai.OpenAI, gateway: FakeGateway) -> None:
    for settings in (
        {"temperature": 0},
        {"seed": 1},
        {"temperature": 0, "seed": 1},
        {"temperature": 0.7},
        {},
    ):
        client.completions.create(model="echo", prompt="a", **settings)
    assert gateway.use_cache == [True, True, True, False, False]
    seeds = [request.sampling.seed for request in gateway.generated]
    # Greedy work is the same work whatever its seed; sampled work without one gets a new one each time.
    assert seeds[:3] == [0, 1, 0]
    assert seeds[3] != seeds[4]


def test_sampled_prompts_of_one_request_differ_in_seed(client: openai.OpenAI, gateway: FakeGateway) -> None:
    client.completions.create(model="echo", prompt=["same", "same"], n=2)
    seeds = [request.sampling.seed for request in gateway.generated]
    assert len(set(seeds)) == 4
    assert seeds[1] == (seeds[0] + 1) % 2**63


def test_streamed_completion(client: openai.OpenAI) -> None:
    chunks = list(client.completions.create(model="echo", prompt="héllo", stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == "héllo"
    assert [chunk.choices[0].finish_reason for chunk in chunks][-1] == "stop"
    # Half a character makes no chunk.
    assert len(chunks) == 6
    assert len({chunk.id for chunk in chunks}) == 1


async def test_the_framing_of_a_stream() -> None:
    body = {"model": "echo", "prompt": "ab", "stream": True, "stream_options": {"include_usage": True}}
    reply = await ask(FakeGateway(outcome="hit"), "POST", "/v1/completions", orjson.dumps(body))
    assert reply.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert reply.headers["cache-control"] == "no-cache"
    assert reply.headers["x-pimoe-cache"] == "hit"
    assert "content-length" not in reply.headers
    *events, done, end = reply.body.split(b"\n\n")
    assert (done, end) == (b"data: [DONE]", b"")
    chunks = [orjson.loads(event.removeprefix(b"data: ")) for event in events]
    assert [chunk["choices"][0]["text"] for chunk in chunks[:-1]] == ["a", "b", ""]
    assert [chunk["usage"] for chunk in chunks[:-1]] == [None] * 3
    details = {"prompt_tokens_details": {"cached_tokens": 0}}
    assert chunks[-1]["usage"] == {"prompt_tokens": 3, "completion_tokens": 3, "total_tokens": 6, **details}


def test_streamed_usage(client: openai.OpenAI) -> None:
    options: Any = {"include_usage": True}
    chunks = list(client.completions.create(model="echo", prompt="abc", stream=True, stream_options=options))
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.total_tokens == 8


def test_streamed_choices(client: openai.OpenAI) -> None:
    texts: dict[int, str] = {}
    reasons: dict[int, str | None] = {}
    for chunk in client.completions.create(model="echo", prompt=["ab", "cde"], n=2, seed=1, stream=True):
        choice = chunk.choices[0]
        texts[choice.index] = texts.get(choice.index, "") + choice.text
        reasons[choice.index] = choice.finish_reason
    assert texts == {0: "ab", 1: "ab", 2: "cde", 3: "cde"}
    assert set(reasons.values()) == {"stop"}


@pytest.mark.parametrize("size", [1, 2, 5, 100])
@pytest.mark.parametrize("stream", [False, True])
def test_stop_strings_over_token_borders(
    client: openai.OpenAI, gateway: FakeGateway, size: int, stream: bool
) -> None:
    gateway.tokens_per_chunk = size
    prompt, stops = "one ENd two END three", ["END", "never"]
    if stream:
        chunks = list(
            client.completions.create(model="echo", prompt=prompt, max_tokens=50, stop=stops, stream=True)
        )
        text = "".join(chunk.choices[0].text for chunk in chunks)
        reason = chunks[-1].choices[0].finish_reason
    else:
        choice = client.completions.create(model="echo", prompt=prompt, max_tokens=50, stop=stops).choices[0]
        text, reason = choice.text, choice.finish_reason
    assert text == "one ENd two "
    assert reason == "stop"
    assert gateway.open_streams == 0
    assert gateway.cancelled == (size < 20)


def test_usage_counts_tokens_up_to_the_stop(client: openai.OpenAI, gateway: FakeGateway) -> None:
    gateway.tokens_per_chunk = 100
    answer = client.completions.create(
        model="echo", prompt="abcdef", stop="d", extra_body={"return_token_ids": True}
    )
    choice: Any = answer.choices[0]
    assert choice.text == "abc"
    assert choice.token_ids == list(b"abcd")
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 4


def test_a_long_prompt(client: openai.OpenAI, gateway: FakeGateway) -> None:
    gateway.info = replace(MODEL, max_context_tokens=100_000)
    answer = client.completions.create(model="echo", prompt=["long" * 5000, "short"], max_tokens=8)
    assert [choice.text for choice in answer.choices] == ["longlong", "short"]
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == 20_007


@pytest.mark.parametrize("stream", [False, True])
def test_token_ids(client: openai.OpenAI, stream: bool) -> None:
    answer: Any = client.completions.create(
        model="echo", prompt="héy", stream=stream, extra_body={"return_token_ids": True}
    )
    parts = [chunk.choices[0].token_ids for chunk in answer] if stream else [answer.choices[0].token_ids]
    assert list(chain(*parts)) == [*"héy".encode(), EOS]


def test_completion_logprobs(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="echo", prompt="aé", logprobs=3, max_tokens=3)
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.tokens == ["a", "\ufffd", "\ufffd"]
    assert logprobs.token_logprobs == [-0.5] * 3
    assert logprobs.text_offset == [0, 1, 1]
    assert logprobs.top_logprobs is not None
    assert logprobs.top_logprobs[0] == {"a": -0.5, "b": -9999.0, "c": -1.5}


def test_streamed_logprobs_are_those_of_the_whole(client: openai.OpenAI) -> None:
    whole = client.completions.create(model="echo", prompt="abc", logprobs=1).choices[0].logprobs
    chunks = client.completions.create(model="echo", prompt="abc", logprobs=1, stream=True)
    parts: Any = [chunk.choices[0].logprobs for chunk in chunks]
    assert whole is not None
    for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
        assert list(chain(*(getattr(part, name) for part in parts))) == getattr(whole, name)


def test_logprobs_zero_reports_the_chosen_only(client: openai.OpenAI) -> None:
    logprobs = client.completions.create(model="echo", prompt="ab", logprobs=0).choices[0].logprobs
    assert logprobs is not None
    assert logprobs.top_logprobs == [{"a": -0.5}, {"b": -0.5}, {"<257>": -0.5}]


def test_chat(client: openai.OpenAI, gateway: FakeGateway) -> None:
    messages: Any = [{"role": "developer", "content": "be brief"}, *user("hi")]
    answer = client.chat.completions.create(model="echo", messages=messages)
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].message.content == "system: be brief\nuser: hi\n"
    assert answer.object == "chat.completion"
    # The template's own special tokens are all there are.
    assert gateway.generated[0].prompt_token_ids[0] == ord("s")
    prompt, sampling = gateway.generated[0].prompt_token_ids, gateway.generated[0].sampling
    assert sampling.max_tokens == MODEL.max_context_tokens - len(prompt), "what the context has left"


def test_chat_default_is_what_the_context_has_left(client: openai.OpenAI, gateway: FakeGateway) -> None:
    client.chat.completions.create(model="echo", messages=user("x" * 300))
    assert gateway.generated[0].sampling.max_tokens == MODEL.max_context_tokens - 307


def test_chat_parts(client: openai.OpenAI) -> None:
    parts: Any = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    answer = client.chat.completions.create(
        model="echo", messages=[{"role": "user", "content": parts}], max_completion_tokens=7
    )
    assert answer.choices[0].message.content == "user: a"
    assert answer.choices[0].finish_reason == "length"


def test_streamed_chat(client: openai.OpenAI) -> None:
    chunks = list(client.chat.completions.create(model="echo", messages=user("hi"), stream=True, n=2))
    for index in (0, 1):
        deltas = [chunk.choices[0].delta for chunk in chunks if chunk.choices[0].index == index]
        assert [delta.role for delta in deltas] == ["assistant"] + [None] * (len(deltas) - 1)
        assert "".join(delta.content or "" for delta in deltas) == "user: hi\n"
    assert chunks[0].object == "chat.completion.chunk"


def test_chat_logprobs(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="echo", messages=user("é"), logprobs=True, top_logprobs=2, max_tokens=8
    )
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert [item.token for item in logprobs.content[:2]] == ["u", "s"]
    assert logprobs.content[0].bytes == [117]
    assert [top.token for top in logprobs.content[0].top_logprobs] == ["u", "v"]
    # Half a character has bytes that the text does not tell.
    assert logprobs.content[6].bytes is None


def test_answers_are_decoded_as_what_continues_their_prompt(client: openai.OpenAI, gateway: FakeGateway) -> None:
    client.completions.create(model="echo", prompt="x" * 50 + "end")
    client.chat.completions.create(model="echo", messages=user("hi"))
    assert gateway.tokenizer is not None
    assert gateway.tokenizer.contexts == [list(b"x" * 29 + b"end"), list(b"user: hi\n")]


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["echo"]
    assert client.models.retrieve("echo").owned_by == "pimoe"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")


def test_errors_are_the_sdks_own(client: openai.OpenAI, gateway: FakeGateway) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        client.completions.create(model="other", prompt="a")
    assert missing.value.code == "model_not_found"
    assert missing.value.param == "model"
    with pytest.raises(openai.BadRequestError) as long:
        client.completions.create(model="echo", prompt="abc", max_tokens=397)
    assert long.value.code == "context_length_exceeded"
    assert "4 prompt tokens and max_tokens 397 exceed the context of 400" in long.value.message
    gateway.error = OverloadedError("queue full", retry_after_s=0.2)
    with pytest.raises(openai.RateLimitError) as busy:
        client.completions.create(model="echo", prompt="a", stream=True)
    assert busy.value.response.headers["retry-after"] == "1"
    assert busy.value.response.headers["retry-after-ms"] == "200"


def test_the_sdk_retries_by_our_headers(server: Server, gateway: FakeGateway) -> None:
    gateway.error = OverloadedError("queue full", retry_after_s=0.001)
    with (
        openai.OpenAI(base_url=f"http://{server[1]}/v1", api_key="none", max_retries=2) as client,
        pytest.raises(openai.RateLimitError),
    ):
        client.completions.create(model="echo", prompt="a")
    assert len(gateway.generated) == 3


def test_an_error_in_a_stream_reaches_the_sdk(client: openai.OpenAI, gateway: FakeGateway) -> None:
    gateway.fail_after, gateway.error = 2, OverloadedError("shed")
    stream = client.completions.create(model="echo", prompt="abc", stream=True)
    assert next(stream).choices[0].text == "a"
    assert next(stream).choices[0].text == "b"
    with pytest.raises(openai.APIError) as error:
        next(stream)
    assert error.value.code == "overloaded"


def test_closing_a_stream_cancels_the_generation(client: openai.OpenAI, gateway: FakeGateway) -> None:
    gateway.fail_after, gateway.hang = 2, True
    stream = client.completions.create(model="echo", prompt="abcdef", stream=True)
    assert next(stream).choices[0].text == "a"
    stream.close()
    client.close()
    wait_until(lambda: gateway.cancelled and not gateway.open_streams)


def test_response_headers(client: openai.OpenAI, gateway: FakeGateway) -> None:
    gateway.outcome = "coalesced"
    raw = client.completions.with_raw_response.create(
        model="echo", prompt="a", extra_headers={"x-request-id": "my-id_1"}
    )
    assert raw.headers["x-pimoe-cache"] == "coalesced"
    assert raw.headers["x-request-id"] == "my-id_1"
    # The id behind the gateway is unique even if the caller's is not.
    assert gateway.generated[0].request_id.startswith("my-id_1-")


async def test_async_client(server: Server, gateway: FakeGateway) -> None:
    async with openai.AsyncOpenAI(base_url=f"http://{server[1]}/v1", api_key="none") as client:
        answer = await client.completions.create(model="echo", prompt="async")
        assert answer.choices[0].text == "async"
        stream = await client.chat.completions.create(model="echo", messages=user("hi"), stream=True)
        texts = [chunk.choices[0].delta.content or "" async for chunk in stream]
        assert "".join(texts) == "user: hi\n"


def test_without_a_tokenizer_prompts_and_answers_are_token_ids(
    client: openai.OpenAI, gateway: FakeGateway
) -> None:
    gateway.tokenizer = None
    answer: Any = client.completions.create(model="echo", prompt=[5, 6], logprobs=0)
    assert answer.choices[0].text == ""
    assert answer.choices[0].token_ids == [5, 6, EOS]
    assert answer.choices[0].logprobs.tokens == ["token_id:5", "token_id:6", f"token_id:{EOS}"]
    for body in ({"prompt": "text"}, {"prompt": [1], "stop": "x"}):
        with pytest.raises(openai.BadRequestError, match="tokenizer"):
            client.completions.create(model="echo", **body)
    with pytest.raises(openai.BadRequestError, match="tokenizer"):
        client.chat.completions.create(model="echo", messages=user("a"))
