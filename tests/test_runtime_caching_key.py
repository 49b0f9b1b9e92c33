"""The cache key: everything that can change an answer changes it, and nothing else does."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
from cache_backend import MODEL
from hypothesis import given
from hypothesis import strategies as st
from pimoe.runtime.caching import generate_key, infer_key
from pimoe.runtime.caching.key import _CanonicalHash
from pimoe.runtime.requests import GenerateRequest, InferRequest, SamplingParams, TensorData

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
    "seed": 4,
    "logprobs": 0,
    "stop_token_ids": (),
    "ignore_eos": True,
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
    ],
)
def test_the_prompt_and_what_was_emitted_change_the_key(change: dict[str, Any]) -> None:
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
    for key, request in ((generate_key, GENERATE), (infer_key, INFER)):
        assert len({key(MODEL, request, tenant) for tenant in ("", "a", "b")}) == 3  # type: ignore[arg-type]


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
