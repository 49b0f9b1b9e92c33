"""Both ends of an expert group's link: the handler, and the router's view of a group over links or in-process."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable

import numpy as np
import pytest
import torch
from pimoe.runtime.errors import (
    DeadlineExceededError,
    InvalidRequestError,
    InvalidTensorError,
    LinkProtocolError,
)
from pimoe.runtime.experts.client import LocalGroup, RemoteGroup
from pimoe.runtime.experts.group import ExpertGroup
from pimoe.runtime.experts.layers import GatedExperts
from pimoe.runtime.experts.server import METHOD, ExpertGroupHandler
from pimoe.runtime.experts.wire import pack_rows, pack_sums, unpack_sums
from pimoe.runtime.links import Call, Endpoint, LinkPool, LinkServer, Packed, Reply
from pimoe.runtime.links.addresses import new_unix_address
from pimoe.runtime.routing.plan import ExpertRows
from pimoe.runtime.tensors import to_wire
from waiting import within_patience

SECRET, NODE = b"secret", "here"
HIDDEN = 16


def make_group(dtype: torch.dtype = torch.float32) -> ExpertGroup:
    generator = torch.Generator().manual_seed(0)
    gate_up = torch.randn(3, 16, HIDDEN, generator=generator).to(dtype)
    down = torch.randn(3, HIDDEN, 8, generator=generator).to(dtype)
    return ExpertGroup([7, 2, 5], {4: GatedExperts(gate_up, down, "silu")}, HIDDEN)


def make_rows(dtype: torch.dtype = torch.float32) -> ExpertRows:
    return ExpertRows(
        torch.randn(2, HIDDEN, generator=torch.Generator().manual_seed(1)).to(dtype),
        np.array([0, 2, 3], np.int32),
        np.array([2, 0, 1], np.int32),
        np.array([0.5, 0.25, 1.0], np.float32),
    )


def make_call(rows: ExpertRows, layer: int = 4, deadline: float = 1e12, method: str = METHOD) -> Call:
    return Call(method, {}, [], deadline, received(pack_rows(layer, rows)))


def received(packed: Packed) -> Packed:
    """As it comes out of a link: one buffer, that may be written."""
    return Packed(packed.meta, (memoryview(bytearray(b"".join(packed.body))),))


OpenLink = Callable[[Callable[[Call], Packed | Reply]], Awaitable[tuple[RemoteGroup, LinkServer]]]


@pytest.fixture
async def link() -> AsyncIterator[OpenLink]:
    """Serves a handler on a Unix socket, with a pool linked to it."""
    opened: list[tuple[LinkServer, LinkPool]] = []

    async def open_link(handler: Callable[[Call], Packed | Reply]) -> tuple[RemoteGroup, LinkServer]:
        server = LinkServer(handler, SECRET, credits=2)
        address = await server.listen_unix(new_unix_address())

        async def discover() -> list[Endpoint]:
            return [Endpoint("a", NODE, (address,))]

        pool = LinkPool("group-0", discover, SECRET, NODE)
        await pool.start()
        opened.append((server, pool))
        return RemoteGroup(pool), server

    yield open_link
    for server, pool in opened:
        await pool.close()
        await server.close()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
async def test_over_a_link_a_group_gives_the_bits_that_it_gives_in_process(
    link: OpenLink, dtype: torch.dtype
) -> None:
    rows = make_rows(dtype)
    remote, _ = await link(ExpertGroupHandler(make_group(dtype)))
    over_link = await remote.run(4, rows, time.monotonic() + 60)
    assert over_link.dtype is torch.float32
    assert torch.equal(over_link, await LocalGroup(make_group(dtype)).run(4, rows, time.monotonic() + 60))
    assert torch.equal(over_link, await started(remote, rows, time.monotonic() + 60))
    assert remote.computed_s is not None
    assert remote.computed_s > 0
    over_link.add_(1)  # the memory is the caller's to use up


async def test_rows_that_do_not_fit_come_back_as_the_same_error(link: OpenLink) -> None:
    group = make_group()
    remote, _ = await link(ExpertGroupHandler(group))
    with pytest.raises(InvalidTensorError, match=r"layer 0 has no experts; these have: \[4\]"):
        await remote.run(0, make_rows(), time.monotonic() + 60)
    with pytest.raises(InvalidTensorError, match=r"layer 0 has no experts"):
        await started(remote, make_rows(), time.monotonic() + 60, layer=0)
    rows = make_rows()
    spoiled = ExpertRows(rows.hidden, rows.offsets, rows.experts + 1, rows.weights)
    with pytest.raises(InvalidTensorError, match="do not fit a group of 3 experts"):
        await remote.run(4, spoiled, time.monotonic() + 60)
    assert (await remote.run(4, rows, time.monotonic() + 60)).shape == rows.hidden.shape, "the link lives on"


@pytest.mark.parametrize(
    "answer",
    [
        Reply({}, []),
        Packed(b""),
        Packed(pack_sums(torch.zeros(2, HIDDEN), 0.0).meta),
        Packed(b"\x09" + pack_sums(torch.zeros(2, HIDDEN), 0.0).meta[1:], (bytes(2 * 4 * HIDDEN),)),
        pack_sums(torch.zeros(1, HIDDEN), 0.0),
        pack_sums(torch.zeros(2, HIDDEN, dtype=torch.bfloat16), 0.0),
    ],
    ids=["not packed", "nothing", "no body", "another version", "another shape", "another dtype"],
)
async def test_an_answer_that_does_not_fit_is_refused(link: OpenLink, answer: Packed | Reply) -> None:
    remote, _ = await link(lambda _: answer)
    with pytest.raises(LinkProtocolError, match="answer"):
        await remote.run(4, make_rows(), time.monotonic() + 60)
    with pytest.raises(LinkProtocolError, match="answer"):
        await started(remote, make_rows(), time.monotonic() + 60)
    assert remote.pool.statistics().in_flight == 0


async def started(remote: RemoteGroup, rows: ExpertRows, deadline: float, layer: int = 4) -> torch.Tensor:
    """What `send` tells."""
    told: asyncio.Future[torch.Tensor] = asyncio.get_running_loop().create_future()

    def done(outcome: torch.Tensor | BaseException) -> None:
        if isinstance(outcome, BaseException):
            told.set_exception(outcome)
        else:
            told.set_result(outcome)

    remote.send(layer, rows, deadline, done)
    return await within_patience(told)


async def test_a_late_dispatch_fails_at_once(link: OpenLink) -> None:
    group = make_group()
    remote, server = await link(ExpertGroupHandler(group))
    with pytest.raises(DeadlineExceededError):
        await remote.run(4, make_rows(), time.monotonic() - 1)
    with pytest.raises(DeadlineExceededError):
        await started(remote, make_rows(), time.monotonic() - 1)
    with pytest.raises(DeadlineExceededError):
        await LocalGroup(group).run(4, make_rows(), time.monotonic() - 1)
    assert group.statistics().batches == 0
    assert server.calls == 0


def test_the_handler_spends_nothing_on_a_call_whose_time_ran_out() -> None:
    group = make_group()
    with pytest.raises(DeadlineExceededError, match="too late"):
        ExpertGroupHandler(group)(make_call(make_rows(), deadline=time.monotonic()))
    assert group.statistics().batches == 0


def test_the_handler_answers_at_once_with_one_float32_row_per_token() -> None:
    group, rows = make_group(), make_rows()
    answer = received(ExpertGroupHandler(group)(make_call(rows)))
    sums, computed_s = unpack_sums(answer, rows.hidden)
    assert torch.equal(sums, make_group().forward(4, rows))
    assert computed_s > 0


@pytest.mark.parametrize(
    "call",
    [make_call(make_rows(), method="infer"), Call(METHOD, {"layer": 4}, [to_wire(make_rows().hidden)], 1e12)],
    ids=["method", "not packed"],
)
def test_other_calls_are_refused(call: Call) -> None:
    with pytest.raises(InvalidRequestError, match="answers packed calls of 'experts'"):
        ExpertGroupHandler(make_group())(call)


def test_a_group_describes_itself_in_plain_values() -> None:
    group = make_group()
    group.forward(4, make_rows())
    described = ExpertGroupHandler(group).describe()
    assert json.loads(json.dumps(described)) == {
        "experts": [7, 2, 5],
        "kernels": group.kernels,
        "weights_bytes": group.weights_bytes,
        "statistics": {"batches": 1, "rows": 2, "pairs": 3, "busy_s": group.statistics().busy_s},
    }
