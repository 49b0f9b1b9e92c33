"""The clients against the server's own HTTP layer, with a gateway behind it that computes nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from fake_gateway import HIDDEN, MODEL, FakeGateway, served
from pimoe.clients import (
    AppliedMode,
    Client,
    ContextLengthError,
    DeadlineExceededError,
    InvalidRequestError,
    InvalidTensorError,
    ModelNotFoundError,
    OverloadedError,
    PayloadTooLargeError,
    PimoeClientError,
    UnavailableError,
    Usage,
)
from pimoe.runtime import errors as server

MESSAGES = [{"role": "user", "content": "hé"}]


@pytest.fixture(scope="module")
def address() -> Iterator[tuple[FakeGateway, str]]:
    gateway = FakeGateway()
    with served(gateway) as host:
        yield gateway, f"http://{host}"


@pytest.fixture
def gateway(address: tuple[FakeGateway, str]) -> Iterator[FakeGateway]:
    gateway, _ = address
    yield gateway
    gateway.error = gateway.fail_after = None
    gateway.is_ready = True


@pytest.fixture
def client(address: tuple[FakeGateway, str]) -> Iterator[Client]:
    with Client(address[1], retries=0) as running:
        yield running


def hidden_states(tokens: int = 2) -> Any:
    return np.arange(tokens * HIDDEN, dtype=np.float32).reshape(tokens, HIDDEN)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.float64, ml_dtypes.bfloat16])
def test_tensors_of_every_dtype(client: Client, gateway: FakeGateway, dtype: Any) -> None:
    array = hidden_states().astype(dtype)
    output = client.infer(array, layer=2, priority=0.75, timeout_s=30, cache=False)
    assert output.dtype == array.dtype
    assert np.array_equal(output, array * 2)
    request = gateway.inferred[-1]
    assert (request.layer, request.priority, gateway.use_cache[-1]) == (2, 0.75, False)
    assert 0 < request.timeout_s <= 30


def test_many_tensors(client: Client) -> None:
    wrong = np.ones((1, HIDDEN + 1), np.float32)
    outcomes = client.infer_many([hidden_states(), wrong] * 300, return_exceptions=True)
    assert len(outcomes) == 600
    for output, error in zip(outcomes[::2], outcomes[1::2], strict=True):
        assert isinstance(output, np.ndarray)
        assert np.array_equal(output, hidden_states() * 2)
        assert isinstance(error, InvalidTensorError)
        assert error.status == 400


def test_generation(client: Client, gateway: FakeGateway) -> None:
    answer = client.generate("héy", max_tokens=20, temperature=0.5, top_k=5, seed=3, logprobs=2, priority=0.25)
    assert (answer.text, answer.finish_reason, answer.usage) == ("héy", "stop", Usage(5, 5))
    assert bytes(answer.token_ids[:-1]) == "héy".encode()
    assert answer.logprobs is not None
    assert len(answer.logprobs) == 5
    assert (answer.model, answer.cache) == (MODEL.name, gateway.outcome)
    assert answer.request_id
    request = gateway.generated[-1]
    assert (request.priority, request.sampling.top_k, request.sampling.seed) == (0.25, 5, 3)
    by_ids = client.generate(request.prompt_token_ids, max_tokens=20)
    assert by_ids.text == "héy"


@pytest.mark.parametrize("prompt", ["héy", MESSAGES])
def test_a_stream_adds_up_to_the_whole_answer(client: Client, prompt: Any) -> None:
    whole = client.generate(prompt, logprobs=1) if isinstance(prompt, str) else client.chat(prompt, logprobs=1)
    with client.stream(prompt, logprobs=1) as stream:
        chunks = list(stream)
    streamed = stream.generation
    assert (streamed.text, streamed.token_ids) == (whole.text, whole.token_ids)
    assert (streamed.finish_reason, streamed.usage) == (whole.finish_reason, whole.usage)
    assert streamed.logprobs == whole.logprobs
    assert [chunk.finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)


@pytest.mark.parametrize(
    ("call", "kind", "param"),
    [
        (lambda c: c.generate("x" * 1000), ContextLengthError, "prompt"),
        (lambda c: c.generate("x", priority=3), InvalidRequestError, "priority"),
        (lambda c: c.generate("x", timeout_s=1e9), InvalidRequestError, "timeout"),
        (lambda c: c.generate("x", extra_body={"no_such": 1}), InvalidRequestError, "no_such"),
        (lambda c: c.infer(hidden_states() * np.nan), InvalidTensorError, "hidden_states"),
        (lambda c: c.infer(hidden_states(), layer=1), InvalidRequestError, "parameters.layer"),
        (lambda c: c.infer(np.ones((2**22, HIDDEN), np.float32)), PayloadTooLargeError, None),
    ],
)
def test_bad_input(
    client: Client, call: Callable[[Client], object], kind: type[PimoeClientError], param: str | None
) -> None:
    with pytest.raises(PimoeClientError) as caught:
        call(client)
    assert type(caught.value) is kind
    assert caught.value.param == param
    assert caught.value.request_id


def test_another_model(address: tuple[FakeGateway, str]) -> None:
    with Client(address[1], model="a/b") as client:
        with pytest.raises(ModelNotFoundError, match="a/b"):
            client.generate("x")
        with pytest.raises(ModelNotFoundError, match="a/b"):
            client.infer(hidden_states())


@pytest.mark.parametrize(
    ("raised", "kind"),
    [
        (server.OverloadedError("full", None, 1.5), OverloadedError),
        (server.UnavailableError("no group", None, 1.5), UnavailableError),
        (server.DeadlineExceededError("late"), DeadlineExceededError),
        (server.LinkClosedError("gone", None, 1.5), PimoeClientError),
    ],
)
def test_errors_from_behind(
    client: Client, gateway: FakeGateway, raised: Any, kind: type[PimoeClientError]
) -> None:
    gateway.error = raised
    failed = client.infer_many([hidden_states()], return_exceptions=True)[0]
    assert isinstance(failed, PimoeClientError)
    errors = [failed]
    calls: Any = ((client.infer, hidden_states()), (client.generate, "x"), (next, client.stream("x")))
    for call, argument in calls:
        with pytest.raises(PimoeClientError) as caught:
            call(argument)
        errors.append(caught.value)
    for error in errors:
        assert (type(error), error.code, error.retry_after_s) == (kind, raised.code, raised.retry_after_s)
        assert error.retryable == (raised.retry_after_s is not None)


def test_an_error_in_the_middle_of_a_stream(client: Client, gateway: FakeGateway) -> None:
    gateway.fail_after, gateway.error = 2, server.UnavailableError("a group died")
    stream = client.stream("hello")
    with pytest.raises(UnavailableError, match="a group died"):
        list(stream)
    assert stream.generation.text == "he"


def test_health_and_status(client: Client, gateway: FakeGateway) -> None:
    assert client.health()
    gateway.is_ready = False
    health = client.health()
    assert (health.live, health.ready) == (True, False)
    assert health.detail
    assert client.status()["model"] == MODEL.name
    assert client.models() == [MODEL.name]


def test_modes_and_what_they_left_out(client: Client, gateway: FakeGateway) -> None:
    conversation = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}] * 4 + MESSAGES
    whole = client.chat(conversation, mode="speed", max_tokens=4)
    assert whole.mode == AppliedMode("speed", 4, 4, 5)
    with client.stream(conversation, mode="speed", max_tokens=4) as stream:
        list(stream)
    assert stream.generation.mode == whole.mode
    assert gateway.generated[-1].sampling.top_k == 50
    assert client.generate("x", mode="ultra").mode == AppliedMode("ultra")
    assert client.chat(MESSAGES).mode is None
    kept = client.chat(conversation, mode="speed", truncation="disabled", max_tokens=4).mode
    assert kept == AppliedMode("speed", 0, 0, 9)


def test_sampling_options_reach_the_engine(client: Client, gateway: FakeGateway) -> None:
    client.generate(
        "x",
        presence_penalty=0.5,
        frequency_penalty=0.25,
        repetition_penalty=1.5,
        logit_bias={5: -1.0},
        stop=("a", "b"),
        stop_token_ids=[7],
        min_tokens=1,
        max_tokens=3,
        ignore_eos=True,
        cache_salt="mine",
        return_token_ids=False,
    )
    request = gateway.generated[-1]
    sampling = request.sampling
    assert (sampling.presence_penalty, sampling.frequency_penalty, sampling.repetition_penalty) == (0.5, 0.25, 1.5)
    assert (sampling.logit_bias, sampling.stop, sampling.stop_token_ids) == (((5, -1.0),), ("a", "b"), (7,))
    assert (sampling.min_tokens, sampling.max_tokens, sampling.ignore_eos) == (1, 3, True)
    assert request.cache_salt == "mine"


def test_token_ids_only_where_they_are_wanted(client: Client) -> None:
    assert client.generate("hi", max_tokens=9).token_ids
    assert client.generate("hi", max_tokens=9, return_token_ids=False).token_ids == ()


def test_tokens_there_and_back(client: Client) -> None:
    tokens = client.tokenize("hé", add_special_tokens=False, return_token_strs=True)
    assert bytes(tokens.token_ids) == "hé".encode()
    assert (tokens.count, tokens.max_model_len) == (3, MODEL.max_context_tokens)
    assert tokens.token_strs is not None
    assert len(tokens.token_strs) == 3
    assert client.detokenize(tokens.token_ids) == "hé"
    chat = client.tokenize(MESSAGES)
    assert chat.token_ids == client.chat(MESSAGES, max_tokens=1).prompt_token_ids
