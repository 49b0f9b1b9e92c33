"""The cache key: everything that can change an answer changes it, and nothing else does."""

from __future__ import annotations

from dataclasses import astuple, fields, replace
from typing import Any

import numpy as np
import pytest
from cache_backend import MODEL
from hypothesis import given, settings
from hypothesis import strategies as st
from pimoe.runtime.caching import Serving, generate_key, infer_key
from pimoe.runtime.caching.key import _CanonicalHash
from pimoe.runtime.requests import GenerateRequest, InferRequest, ModelInfo, SamplingParams, TensorData

SAMPLING = SamplingParams(temperature=0.5, seed=3, stop_token_ids=(9,))
GENERATE = GenerateRequest("id", (1, 2, 3), SAMPLING)
INFER = InferRequest("id", TensorData("float32", (2, 2), bytes(16)))

OTHER_MODEL: dict[str, Any] = {
    "name": "n",
    "kind": "layer",
    "family": "mixtral",
    "dtype": "bfloat16",
    "hidden_size": 8,
    "num_experts": 8,
    "top_k": 1,
    "moe_layers": (0, 2),
    "vocab_size": 300,
    "max_context_tokens": 100,
    "eos_token_ids": (2, 1),
    "weights_digest": "other",
}
OTHER_SAMPLING: dict[str, Any] = {
    "max_tokens": 17,
    "min_tokens": 1,
    "temperature": 0.75,
    "top_p": 0.5,
    "top_k": 5,
    "min_p": 0.25,
    "repetition_penalty": 1.5,
    "presence_penalty": 0.5,
    "frequency_penalty": -0.5,
    "logit_bias": ((1, 2.0),),
    "seed": 4,
    "logprobs": 0,
    "prompt_logprobs": 0,
    "stop": ("x",),
    "stop_token_ids": (),
    "ignore_eos": True,
    "grammar_kind": "regex",
    "grammar": "a+",
}


def test_a_key_is_32_bytes_and_the_same_for_equal_requests() -> None:
    assert len(generate_key(MODEL, GENERATE)) == len(infer_key(MODEL, INFER)) == 32
    assert generate_key(MODEL, GENERATE) == generate_key(replace(MODEL), replace(GENERATE))
    assert infer_key(MODEL, INFER) == infer_key(replace(MODEL), replace(INFER))


@pytest.mark.parametrize("name", [field.name for field in fields(MODEL)])
def test_every_field_of_the_model_changes_the_key(name: str) -> None:
    other = replace(MODEL, **{name: OTHER_MODEL[name]})
    assert generate_key(other, GENERATE) != generate_key(MODEL, GENERATE)
    explicit = replace(INFER, layer=0)
    assert infer_key(other, explicit) != infer_key(MODEL, explicit)


@pytest.mark.parametrize(
    "change",
    [
        {"tokenizer_digest": "x"},
        {"placement": ((0, 1), (2, 3))},
        {"batch_invariant": True},
        {"expert_quantization": "int8"},
    ],
)
def test_what_is_served_changes_the_key(change: dict[str, Any]) -> None:
    other = Serving(**change)
    assert generate_key(MODEL, GENERATE, serving=other) != generate_key(MODEL, GENERATE)
    assert infer_key(MODEL, INFER, serving=other) != infer_key(MODEL, INFER)


@pytest.mark.parametrize("name", [field.name for field in fields(SAMPLING)])
def test_every_sampling_parameter_changes_the_key(name: str) -> None:
    other = replace(GENERATE, sampling=replace(SAMPLING, **{name: OTHER_SAMPLING[name]}))
    assert generate_key(MODEL, other) != generate_key(MODEL, GENERATE)


@pytest.mark.parametrize(
    "change",
    [
        {"prompt_token_ids": (1, 2)},
        {"prompt_token_ids": (1, 2, 4)},
        {"prompt_token_ids": (3, 2, 1)},
        {"emitted": (1,)},
        {"prompt_token_ids": (1, 2), "emitted": (3,)},
        {"cache_salt": "mine"},
    ],
)
def test_prompt_salt_and_what_was_emitted_change_the_key(change: dict[str, Any]) -> None:
    assert generate_key(MODEL, replace(GENERATE, **change)) != generate_key(MODEL, GENERATE)


@pytest.mark.parametrize(
    "states",
    [
        TensorData("float32", (2, 2), bytes(15) + b"\1"),
        TensorData("float32", (4, 1), bytes(16)),
        TensorData("float32", (1, 2, 2), bytes(16)),
        TensorData("int32", (2, 2), bytes(16)),
        TensorData("float32", (2, 1), bytes(8)),
    ],
)
def test_bytes_shape_and_dtype_change_the_key(states: TensorData) -> None:
    assert infer_key(MODEL, replace(INFER, hidden_states=states)) != infer_key(MODEL, INFER)


def test_the_first_layer_is_the_default_one() -> None:
    assert infer_key(MODEL, replace(INFER, layer=0)) == infer_key(MODEL, INFER)
    assert infer_key(MODEL, replace(INFER, layer=1)) != infer_key(MODEL, INFER)


def test_tenants_share_nothing() -> None:
    requests: tuple[tuple[Any, Any], ...] = ((generate_key, GENERATE), (infer_key, INFER))
    for key, request in requests:
        keys = [key(MODEL, replace(request, tenant=tenant)) for tenant in ("", "a", "b")]
        assert len(set(keys)) == 3
        assert [key(MODEL, request, tenant) for tenant in ("", "a", "b")] == keys
        assert len({key(MODEL, replace(request, tenant=tenant), "") for tenant in ("", "a", "b")}) == 1


def test_when_and_by_whom_does_not_matter() -> None:
    other = {"request_id": "another", "priority": 1.0, "timeout_s": 1.0}
    assert generate_key(MODEL, replace(GENERATE, **other)) == generate_key(MODEL, GENERATE)
    assert infer_key(MODEL, replace(INFER, **other)) == infer_key(MODEL, INFER)


@pytest.mark.parametrize(
    ("name", "spellings"),
    [("temperature", (1, 1.0)), ("top_p", (1, 1.0)), ("min_p", (0, 0.0, -0.0)), ("temperature", (0.0, -0.0, 0))],
)
def test_spellings_of_one_number_share_a_key(name: str, spellings: tuple[float, ...]) -> None:
    requests = [replace(GENERATE, sampling=replace(SAMPLING, **{name: value})) for value in spellings]
    assert len({generate_key(MODEL, request) for request in requests}) == 1


def test_greedy_generations_draw_no_random_numbers() -> None:
    greedy = [replace(GENERATE, sampling=SamplingParams(temperature=0, seed=seed)) for seed in (0, 5)]
    assert generate_key(MODEL, greedy[0]) == generate_key(MODEL, greedy[1])


def test_stop_tokens_are_a_set() -> None:
    orders = [(1, 2), (2, 1), (2, 1, 2)]
    requests = [replace(GENERATE, sampling=replace(SAMPLING, stop_token_ids=order)) for order in orders]
    assert len({generate_key(MODEL, request) for request in requests}) == 1


def test_any_buffer_with_the_same_bytes_has_the_same_key() -> None:
    array = np.arange(4, dtype=np.float32).reshape(2, 2)
    buffers = [array.tobytes(), bytearray(array.tobytes()), memoryview(array.tobytes()), array.data]
    keys = {infer_key(MODEL, replace(INFER, hidden_states=TensorData("float32", (2, 2), b))) for b in buffers}
    assert len(keys) == 1


plain = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary()
nested = st.recursive(plain, lambda inner: st.lists(inner, max_size=3).map(tuple), max_leaves=6)


def canonical(values: list[Any]) -> bytes:
    encoder = _CanonicalHash()
    for value in values:
        encoder.add(value)
    return encoder.digest()


def marked(value: Any) -> Any:
    """Equal exactly for what must encode alike: 1, 1.0 and True are three values here."""
    return (type(value), tuple(map(marked, value)) if isinstance(value, tuple) else value)


@given(st.lists(nested, max_size=4), st.lists(nested, max_size=4))
def test_different_values_never_encode_alike(first: list[Any], second: list[Any]) -> None:
    same = [marked(value) for value in first] == [marked(value) for value in second]
    assert (canonical(first) == canonical(second)) == same


@given(st.binary(max_size=6), st.integers(0, 6))
def test_where_a_value_ends_matters(data: bytes, cut: int) -> None:
    assert canonical([data[:cut], data[cut:]]) != canonical([data])
    if 0 < cut < len(data):
        assert canonical([data[:cut], data[cut:]]) != canonical([data[: cut - 1], data[cut - 1 :]])


# Any two requests, of few values for each field, so that equal ones are met as well as those that differ in one.

few = st.integers(0, 1)
tokens = st.lists(st.integers(0, 3), max_size=2).map(tuple)
words = st.sampled_from(["", "a", "aa"])
models = st.builds(
    ModelInfo,
    name=words,
    kind=st.sampled_from(["decoder", "layer"]),
    family=words,
    dtype=words,
    hidden_size=few,
    num_experts=few,
    top_k=few,
    moe_layers=st.sampled_from([(0,), (0, 1), (1, 0)]),
    vocab_size=few,
    max_context_tokens=few,
    eos_token_ids=tokens,
    weights_digest=words,
)
servings = st.builds(
    Serving, tokenizer_digest=words, placement=st.sampled_from([(), ((0, 1),), ((0,), (1,)), ((), (0, 1))])
)
samplings = st.builds(
    SamplingParams,
    max_tokens=few,
    min_tokens=few,
    temperature=st.sampled_from([0, 0.0, -0.0, 0.5, 1, 1.0]),
    top_p=st.sampled_from([1, 1.0, 0.5]),
    top_k=few,
    min_p=st.sampled_from([0, 0.0, 0.5]),
    seed=few,
    logprobs=st.none() | few,
    stop_token_ids=tokens,
    ignore_eos=st.booleans(),
)
generations = st.builds(
    GenerateRequest, words, tokens, samplings, st.floats(0, 1), st.floats(1, 9), emitted=tokens, tenant=words
)
shapes = [("float32", (1, 2)), ("float32", (2, 1)), ("int32", (2, 1)), ("float64", (1, 1))]
tensors = st.builds(
    lambda kind, data: TensorData(*kind, data), st.sampled_from(shapes), st.sampled_from([bytes(8), b"12345678"])
)
inferences = st.builds(
    InferRequest, words, tensors, st.sampled_from([None, 0, 1]), st.floats(0, 1), st.floats(1, 9), tenant=words
)


def meaning(model: ModelInfo, serving: Serving, request: Any) -> Any:
    """All that decides the answer, written down a second time, as values that compare."""
    around = (astuple(model), astuple(serving), request.tenant)
    if isinstance(request, InferRequest):
        layer = model.moe_layers[0] if request.layer is None else request.layer
        return (*around, layer, astuple(request.hidden_states))
    plan = replace(request.sampling, stop_token_ids=frozenset(request.sampling.stop_token_ids))  # type: ignore[arg-type]
    plan = replace(plan, seed=0) if plan.temperature == 0 else plan
    return (*around, request.prompt_token_ids, request.emitted, astuple(plan))


@st.composite
def pairs(draw: st.DrawFn, requests: st.SearchStrategy[Any]) -> list[tuple[ModelInfo, Serving, Any]]:
    """Two whole requests; in most of them, nearly all of the second is the first's."""
    first = [draw(models), draw(servings), draw(requests)]
    second = [draw(models), draw(servings), draw(requests)]
    if draw(st.integers(0, 9)):
        changes = [(part, field.name) for part, value in enumerate(first) for field in fields(value)]
        part, name = draw(st.sampled_from(changes))
        second = [
            replace(value, **{name: getattr(second[part], name)}) if index == part else value
            for index, value in enumerate(first)
        ]
    return [tuple(first), tuple(second)]  # type: ignore[list-item]


@settings(max_examples=500, deadline=None)
@given(pairs(generations) | pairs(inferences))
def test_a_key_is_shared_exactly_by_requests_that_mean_the_same(
    pair: list[tuple[ModelInfo, Serving, Any]],
) -> None:
    def key(model: ModelInfo, serving: Serving, request: Any) -> bytes:
        make = infer_key if isinstance(request, InferRequest) else generate_key
        return make(model, request, serving=serving)

    first, second = pair
    assert (key(*first) == key(*second)) == (meaning(*first) == meaning(*second))
