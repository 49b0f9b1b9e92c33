"""The router: tensors in batches through one MoE layer, generations through its engine, and what it refuses."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import make_checkpoint
from custom_experts import ScaleExpert
from engines import at_rest, controlled, make_router, prompt_of, read, request
from pimoe.runtime.batching import BatchLimits
from pimoe.runtime.errors import (
    DeadlineExceededError,
    InvalidRequestError,
    InvalidTensorError,
    PimoeError,
    RequestCancelledError,
    UnavailableError,
)
from pimoe.runtime.generation.limits import EngineLimits
from pimoe.runtime.model.checkpoint import Checkpoint
from pimoe.runtime.model.families import read_spec
from pimoe.runtime.model.layer_model import write_layer_model
from pimoe.runtime.requests import InferRequest, TensorData
from pimoe.runtime.router.limits import RouterLimits
from pimoe.runtime.router.router import Router
from pimoe.runtime.tensors import from_wire, to_wire
from torch import Tensor
from torch.nn import functional as F
from waiting import eventually, nothing_left_behind, within_patience  # noqa: F401

pytestmark = pytest.mark.usefixtures("nothing_left_behind")

HIDDEN, INNER, EXPERTS, TOP_K = 16, 8, 5, 2
ROWS = torch.randn(11, HIDDEN, generator=torch.Generator().manual_seed(7))


@pytest.fixture(scope="module")
def layer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    generator = torch.Generator().manual_seed(0)
    shapes = {"gate_proj": (INNER, HIDDEN), "up_proj": (INNER, HIDDEN), "down_proj": (HIDDEN, INNER)}
    experts = [
        {f"{name}.weight": torch.randn(shape, generator=generator) for name, shape in shapes.items()}
        for _ in range(EXPERTS)
    ]
    gate = torch.randn(EXPERTS, HIDDEN, generator=generator)
    return write_layer_model(tmp_path_factory.mktemp("layer"), gate, experts, TOP_K)


@pytest.fixture(scope="module")
def decoder_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint("mixtral", tmp_path_factory.mktemp("mixtral"), num_hidden_layers=2)


StartRouter = Callable[..., Router]


@pytest.fixture
async def start() -> AsyncIterator[StartRouter]:
    """Started routers, closed after the test."""
    routers: list[Router] = []

    def start_router(folder: Path, groups: int = 2, **batching: Any) -> Router:
        limits = RouterLimits(batching=BatchLimits(**batching), engine=EngineLimits(drain_s=0.0))
        routers.append(make_router(folder, groups=groups, limits=limits))
        routers[-1].start()
        return routers[-1]

    yield start_router
    for router in routers:
        await within_patience(router.close())


def infer_request(rows: Tensor = ROWS, layer: int | None = None, timeout_s: float = 60.0) -> InferRequest:
    return InferRequest("r", to_wire(rows), layer, timeout_s=timeout_s)


async def infer(router: Router, rows: Tensor = ROWS, layer: int | None = None) -> Tensor:
    return from_wire((await router.infer(infer_request(rows, layer))).output)


def reference(folder: Path, rows: Tensor, layer: int = 0) -> Tensor:
    """The layer in float64, token by token."""
    checkpoint = Checkpoint(folder)
    spec = read_spec(checkpoint)
    gate_name = "gate.weight" if spec.family == "pimoe_layer" else spec.gate_name(layer)  # type: ignore[union-attr]
    gate = checkpoint.read(gate_name, torch.float64)
    out = torch.zeros(rows.shape, dtype=torch.float64)
    for row, token in enumerate(rows.double()):
        weights, ids = torch.softmax(gate @ token, dim=-1).topk(spec.top_k)
        for weight, expert in zip(weights / weights.sum(), ids.tolist(), strict=True):
            names = spec.experts.tensor_names(layer, expert)
            gate_proj, up, down = (checkpoint.read(name, torch.float64) for name in names)
            out[row] += weight * (down @ (F.silu(gate_proj @ token) * (up @ token)))
    return out


@pytest.mark.parametrize("groups", [1, 2, 5])
async def test_a_tensor_comes_back_as_its_layer_makes_it(
    layer_folder: Path, start: StartRouter, groups: int
) -> None:
    output = await infer(start(layer_folder, groups))
    assert output.dtype is torch.float32
    torch.testing.assert_close(output.double(), reference(layer_folder, ROWS), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("layer", [None, 0, 1])
async def test_a_decoders_layers_can_be_asked_one_by_one(
    decoder_folder: Path, start: StartRouter, layer: int | None
) -> None:
    rows = torch.randn(5, 48, generator=torch.Generator().manual_seed(1))
    output = await infer(start(decoder_folder), rows, layer)
    torch.testing.assert_close(output.double(), reference(decoder_folder, rows, layer or 0), atol=1e-3, rtol=1e-3)


async def test_custom_experts_answer_too(tmp_path: Path, start: StartRouter) -> None:
    experts = [ScaleExpert(HIDDEN) for _ in range(3)]
    for expert in experts:
        expert.scale.data.fill_(3.0)
    folder = write_layer_model(tmp_path, torch.randn(3, HIDDEN), experts, 2, expert_kwargs={"hidden_size": HIDDEN})
    torch.testing.assert_close(await infer(start(folder)), 3 * ROWS)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
async def test_the_output_has_the_dtype_of_the_request(
    layer_folder: Path, start: StartRouter, dtype: torch.dtype
) -> None:
    router = start(layer_folder)
    output = await infer(router, ROWS.to(dtype))
    assert output.dtype is dtype
    in_float32 = await infer(router, ROWS.to(dtype).float())
    assert torch.equal(output, in_float32.to(dtype))


async def test_a_request_longer_than_a_batch_is_cut(layer_folder: Path, start: StartRouter) -> None:
    whole = await infer(start(layer_folder))
    router = start(layer_folder, max_batch_tokens=4)
    torch.testing.assert_close(await infer(router), whole, atol=1e-5, rtol=1e-5)
    batcher = router.batcher.statistics()
    assert (batcher.batches, batcher.tokens) == (3, 11)


async def test_requests_that_wait_share_a_batch_and_get_their_own_rows(
    layer_folder: Path, start: StartRouter
) -> None:
    router = start(layer_folder, groups=1, max_in_flight=1)
    (group,) = controlled(router)
    group.gate.clear()
    sizes = [3, 1, 4, 1, 5]
    pieces = [torch.randn(n, HIDDEN, generator=torch.Generator().manual_seed(n)) for n in sizes]
    first = asyncio.ensure_future(infer(router))
    await eventually(lambda: group.waiting)
    rest = [asyncio.ensure_future(infer(router, rows)) for rows in pieces]
    await eventually(lambda: router.batcher.statistics().queue.items == 5)
    group.gate.set()
    await first
    for rows, output in zip(pieces, await asyncio.gather(*rest), strict=True):
        torch.testing.assert_close(output.double(), reference(layer_folder, rows), atol=1e-4, rtol=1e-4)
    assert router.batcher.statistics().batches == 2


async def test_layers_do_not_share_a_batch(decoder_folder: Path, start: StartRouter) -> None:
    router = start(decoder_folder, groups=1, max_in_flight=1)
    (group,) = controlled(router)
    group.gate.clear()
    rows = torch.randn(5, 48, generator=torch.Generator().manual_seed(1))
    running = [asyncio.ensure_future(infer(router, rows, layer)) for layer in (0, 0, 1, 0, 1)]
    await eventually(lambda: group.waiting)
    group.gate.set()
    for layer, output in zip((0, 0, 1, 0, 1), await asyncio.gather(*running), strict=True):
        torch.testing.assert_close(output.double(), reference(decoder_folder, rows, layer), atol=1e-3, rtol=1e-3)
    assert sorted(group.layers) == [0, 1]


# What is refused.

BAD_TENSORS: dict[str, tuple[TensorData, int | None, str]] = {
    "layer": (to_wire(ROWS), 3, r"layer 3 is not an MoE layer of .*; \(0,\) are"),
    "dtype": (to_wire(torch.ones(2, HIDDEN, dtype=torch.int64)), None, "hidden states are int64"),
    "unknown dtype": (TensorData("complex64", (1, HIDDEN), bytes(8 * HIDDEN)), None, "are complex64"),
    "hidden size": (to_wire(torch.ones(2, HIDDEN + 1)), None, r"shape \[2, 17\]; it must be \[tokens, 16\]"),
    "one dimension": (to_wire(torch.ones(HIDDEN)), None, r"shape \[16\]"),
    "three dimensions": (to_wire(torch.ones(1, 2, HIDDEN)), None, r"shape \[1, 2, 16\]"),
    "no rows": (to_wire(torch.ones(0, HIDDEN)), None, r"shape \[0, 16\]"),
    "too few bytes": (TensorData("float32", (2, HIDDEN), bytes(100)), None, "do not have 100 bytes"),
    "too many bytes": (TensorData("float16", (2, HIDDEN), bytes(128)), None, "do not have 128 bytes"),
}


@pytest.mark.parametrize(("states", "layer", "message"), BAD_TENSORS.values(), ids=BAD_TENSORS)
async def test_tensors_that_do_not_fit_are_refused(
    layer_folder: Path, start: StartRouter, states: TensorData, layer: int | None, message: str
) -> None:
    router = start(layer_folder)
    with pytest.raises(InvalidTensorError, match=message):
        await router.infer(InferRequest("r", states, layer))
    assert router.batcher.statistics().batches == 0


@pytest.mark.parametrize("alone", [True, False])
@pytest.mark.parametrize(
    "bad",
    [
        torch.full((2, HIDDEN), math.nan),
        torch.full((1, HIDDEN), -math.inf),
        torch.full((3, HIDDEN), 1e300, dtype=torch.float64),  # not in float32, in which the model computes
    ],
)
async def test_numbers_that_are_none_are_refused_and_harm_nobody(
    layer_folder: Path, start: StartRouter, bad: Tensor, alone: bool
) -> None:
    router = start(layer_folder, groups=1, max_in_flight=1)
    (group,) = controlled(router)
    group.gate.clear()
    first = asyncio.ensure_future(infer(router))
    await eventually(lambda: group.waiting)
    batch = [bad] if alone else [ROWS, bad, ROWS[:3], bad]
    asking = [asyncio.ensure_future(infer(router, rows)) for rows in batch]
    await eventually(lambda: router.batcher.statistics().queue.items == len(batch))
    group.gate.set()
    await first
    for rows, outcome in zip(batch, await asyncio.gather(*asking, return_exceptions=True), strict=True):
        if rows is bad:
            assert isinstance(outcome, InvalidTensorError)
            assert "hold NaN, Inf or numbers out of float32's range" in outcome.message
        else:
            assert isinstance(outcome, Tensor)
            torch.testing.assert_close(outcome.double(), reference(layer_folder, rows), atol=1e-4, rtol=1e-4)


async def test_batches_use_memory_again_and_answers_keep_theirs(layer_folder: Path, start: StartRouter) -> None:
    router = start(layer_folder)
    outputs = []
    for seed in range(6):
        pieces = torch.randn(5, 2, HIDDEN, generator=torch.Generator().manual_seed(seed))
        outputs.append((pieces, await asyncio.gather(*(infer(router, rows) for rows in pieces))))
    for pieces, together in outputs:
        for rows, output in zip(pieces, together, strict=True):
            torch.testing.assert_close(output.double(), reference(layer_folder, rows), atol=1e-4, rtol=1e-4)


async def test_a_layer_model_does_not_generate(layer_folder: Path, start: StartRouter) -> None:
    router = start(layer_folder)
    with pytest.raises(InvalidRequestError, match="is a layer model: it answers tensor requests only") as caught:
        router.generate(request((1, 2)))
    assert caught.value.param == "model"


async def test_a_decoder_generates(decoder_folder: Path, start: StartRouter) -> None:
    router = start(decoder_folder)
    answer, output = await asyncio.gather(
        read(router.generate(request(prompt_of(9), 5))), infer(router, torch.ones(1, 48))
    )
    assert (len(answer.tokens), answer.reason) == (5, "length")
    assert output.shape == (1, 48)
    assert router.engine is not None
    await eventually(lambda: router.engine is not None and at_rest(router.engine))


# When something goes wrong.


async def test_one_failing_piece_takes_the_others_out_of_the_queue(layer_folder: Path, start: StartRouter) -> None:
    router = start(layer_folder, groups=1, max_batch_tokens=2, max_in_flight=1)
    (group,) = controlled(router)
    group.failures = [UnavailableError("group-0: no live replica")]
    with pytest.raises(UnavailableError, match="no live replica"):
        await infer(router)
    queue = router.batcher.statistics().queue
    assert (queue.items, queue.tokens) == (0, 0)
    await eventually(lambda: not router.batcher.statistics().in_flight)
    assert router.batcher.statistics().batches < 6, "nobody waits for the rest any more"
    torch.testing.assert_close((await infer(router)).double(), reference(layer_folder, ROWS), atol=1e-4, rtol=1e-4)


async def test_what_is_no_error_of_pimoe_becomes_one(layer_folder: Path, start: StartRouter) -> None:
    router = start(layer_folder, groups=1)
    controlled(router)[0].failures = [ValueError("a bug")]
    with pytest.raises(PimoeError, match="ValueError") as caught:
        await infer(router)
    assert caught.value.code == "internal_error"


async def test_a_tensor_that_is_late_is_given_up(layer_folder: Path, start: StartRouter) -> None:
    router = start(layer_folder, groups=1, max_batch_tokens=4, max_in_flight=1)
    controlled(router)[0].gate.clear()
    with pytest.raises(DeadlineExceededError):
        await router.infer(infer_request(timeout_s=0.01))
    assert router.batcher.statistics().queue.items == 0


async def test_a_leaving_caller_leaves_nothing_in_the_queue(layer_folder: Path, start: StartRouter) -> None:
    router = start(layer_folder, groups=1, max_batch_tokens=4, max_in_flight=1)
    (group,) = controlled(router)
    group.gate.clear()
    running = asyncio.ensure_future(infer(router))
    await eventually(lambda: group.waiting)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert router.batcher.statistics().queue.items == 0


async def test_closing_fails_what_is_under_way(layer_folder: Path) -> None:
    router = make_router(layer_folder)
    router.start()
    for group in controlled(router):
        group.gate.clear()
    running = asyncio.ensure_future(infer(router))
    await eventually(lambda: router.batcher.statistics().in_flight)
    await within_patience(router.close())
    with pytest.raises(RequestCancelledError):
        await running


# What it tells.


async def test_statistics_are_plain_values(decoder_folder: Path, layer_folder: Path, start: StartRouter) -> None:
    router = start(decoder_folder)
    await infer(router, torch.ones(3, 48))
    await read(router.generate(request(prompt_of(4), 2)))
    statistics = json.loads(json.dumps(router.statistics()))
    assert statistics["batcher"]["tokens"] == 3
    assert statistics["batcher"]["queue"]["items"] == 0
    assert statistics["engine"]["prefill_tokens"] == 4
    assert statistics["engine"]["queue"]["tokens"] == 0
    # 3 tokens in one layer; then two steps of two layers, the first with 4 tokens and one for its last.
    assert statistics["dispatch"]["dispatches"] == 5
    assert sum(router.dispatcher.statistics().expert_pairs) == 2 * (3 + 4 + 1 + 1 + 1)
    assert "expert_pairs" not in statistics["dispatch"]
    assert router.busy_s() > 0
    assert start(layer_folder).statistics()["engine"] is None


async def test_batch_limits_change_while_serving(decoder_folder: Path, start: StartRouter) -> None:
    router = start(decoder_folder)
    limits = BatchLimits(max_batch_tokens=2, max_wait_s=0.5)
    router.set_batch_limits(limits)
    await infer(router, torch.ones(6, 48))
    assert router.batcher.statistics().batches == 3
    assert router.engine is not None
    assert router.engine.batch_limits is router.batcher.limits is router.limits.batching is limits


async def test_it_describes_the_model(layer_folder: Path, decoder_folder: Path, start: StartRouter) -> None:
    layer, decoder = start(layer_folder).model, start(decoder_folder).model
    assert (layer.kind, layer.hidden_size, layer.num_experts, layer.moe_layers) == ("layer", HIDDEN, EXPERTS, (0,))
    assert (decoder.kind, decoder.family, decoder.moe_layers) == ("decoder", "mixtral", (0, 1))
    assert layer.weights_digest != decoder.weights_digest


async def test_read_only_bytes_are_no_problem(layer_folder: Path, start: StartRouter) -> None:
    """As they come from a request's body."""
    array = np.ones((2, HIDDEN), np.float32)
    for data in (array.tobytes(), memoryview(array.tobytes()), bytearray(array.tobytes())):
        states = TensorData("float32", array.shape, data)
        output = from_wire((await start(layer_folder).infer(InferRequest("r", states))).output)
        assert torch.equal(output[0], output[1])
