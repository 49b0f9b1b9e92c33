"""Lanes: the bits that links give, opened only by who holds a token, and left for links at any irregularity."""

from __future__ import annotations

import asyncio
import errno
import os
import socket
import struct
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
import pytest
import torch
from pimoe.runtime.errors import DeadlineExceededError
from pimoe.runtime.experts import lanes
from pimoe.runtime.experts.client import RemoteGroup
from pimoe.runtime.experts.group import ExpertGroup
from pimoe.runtime.experts.lanes import TOKEN_BYTES, LaneServer, lane_table
from pimoe.runtime.experts.layers import GatedExperts, LayerExperts
from pimoe.runtime.experts.native import NativeExperts
from pimoe.runtime.experts.server import ExpertGroupHandler
from pimoe.runtime.experts.tensors import ExpertTensors
from pimoe.runtime.links import Endpoint, LinkPool, LinkServer
from pimoe.runtime.links.addresses import new_unix_address
from pimoe.runtime.model.expert_spec import ExpertSpec
from pimoe.runtime.native import kernels
from pimoe.runtime.native.lanes import MAX_HIDDEN_BYTES, LaneDispatch
from pimoe.runtime.routing import dispatch as dispatching
from pimoe.runtime.routing.dispatch import Dispatched, Dispatcher
from pimoe.runtime.routing.plan import contiguous_placement
from pimoe.runtime.routing.strategies import Routing
from torch import Tensor
from waiting import eventually, nothing_left_behind  # noqa: F401

pytestmark = [
    pytest.mark.usefixtures("nothing_left_behind"),
    pytest.mark.skipif(not kernels.available(), reason=f"no native kernels here: {kernels.description()}"),
]

HIDDEN, INNER, EXPERTS, LAYER = 64, 32, 6, 2
SECRET, NODE = b"secret", "here"


def make_group(experts: tuple[int, ...], dtype: torch.dtype = torch.float32) -> ExpertGroup:
    spec = ExpertSpec(EXPERTS, HIDDEN, INNER, "silu", (0, LAYER), "{layer}{expert}", "{expert}", "{expert}")
    layers: dict[int, LayerExperts] = {}
    for layer in spec.moe_layers:
        layers[layer] = held = NativeExperts(len(experts), spec, dtype, int8=False)
        for local, expert in enumerate(experts):
            random = torch.Generator().manual_seed(10 * layer + expert)
            sizes = (2 * INNER, HIDDEN), (HIDDEN, INNER)
            held.store(local, ExpertTensors(*(torch.randn(s, generator=random).to(dtype) / 8 for s in sizes)))
    return ExpertGroup(experts, layers, HIDDEN)


class Stand:
    """Groups behind links in this process, and a dispatcher before them."""

    def __init__(self) -> None:
        self.handlers: list[ExpertGroupHandler] = []
        self.servers: list[LinkServer] = []
        self.remotes: list[RemoteGroup] = []

    async def start(self, groups: int, dtype: torch.dtype = torch.float32) -> Dispatcher:
        placement = contiguous_placement(EXPERTS, groups)
        for index, experts in enumerate(placement.groups):
            handler = ExpertGroupHandler(make_group(experts, dtype))
            server = LinkServer(handler, SECRET, credits=2)
            address = await server.listen_unix(new_unix_address())
            pool = LinkPool(f"group-{index}", _discover(f"replica-{index}", address), SECRET, NODE)
            await pool.start()
            self.handlers.append(handler)
            self.servers.append(server)
            self.remotes.append(RemoteGroup(pool))
        return Dispatcher(placement, self.remotes)

    def are_open(self) -> bool:
        found = [remote.lane() for remote in self.remotes]
        return all(lane is not None and lane.descriptor is not None for lane in found)

    async def close(self) -> None:
        for remote in self.remotes:
            await remote.pool.close()
        for handler, server in zip(self.handlers, self.servers, strict=True):
            handler.close()
            await server.close()


def _discover(replica: str, address: str):  # type: ignore[no-untyped-def]
    async def discover() -> list[Endpoint]:
        return [Endpoint(replica, NODE, (address,))]

    return discover


@pytest.fixture
async def stand() -> AsyncIterator[Stand]:
    made = Stand()
    yield made
    await made.close()


def random_work(tokens: int, top_k: int, seed: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Routing]:
    random = torch.Generator().manual_seed(seed)
    ids = torch.stack([torch.randperm(EXPERTS, generator=random)[:top_k] for _ in range(tokens)])
    hidden = torch.randn(tokens, HIDDEN, generator=random).to(dtype)
    return hidden, Routing(ids, torch.rand(tokens, top_k, generator=random))


async def dispatch(
    dispatcher: Dispatcher, work: tuple[Tensor, Routing], over_lanes: bool, layer: int = LAYER
) -> Dispatched:
    return await dispatcher.run_counted(layer, *work, time.monotonic() + 60, lanes=over_lanes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("groups", [1, 2, 6])
async def test_a_lane_gives_the_bits_and_the_counts_that_links_give(
    stand: Stand, groups: int, dtype: torch.dtype
) -> None:
    dispatcher = await stand.start(groups, dtype)
    await eventually(stand.are_open)
    for seed, (tokens, top_k) in enumerate([(1, 1), (1, 4), (7, 2), (40, 3), (3, 6)]):
        work = random_work(tokens, top_k, seed, dtype)
        before = dispatcher.statistics()
        over_links = await dispatch(dispatcher, work, False)
        between = dispatcher.statistics()
        over_lanes = await dispatch(dispatcher, work, True)
        after = dispatcher.statistics()
        assert torch.equal(over_lanes.output, over_links.output)
        assert over_lanes.largest_expert_tokens == over_links.largest_expert_tokens
        assert (between.over_lanes, after.over_lanes) == (before.over_lanes, before.over_lanes + 1)
        for name in ("group_rows", "expert_pairs"):
            grown = [
                [new - old for new, old in zip(getattr(later, name), getattr(earlier, name), strict=True)]
                for earlier, later in ((before, between), (between, after))
            ]
            assert grown[0] == grown[1], name
    assert all(handler.group.statistics().batches > 0 for handler in stand.handlers)
    assert all(seconds > 0 for seconds in dispatcher.computed_s())


async def test_groups_count_what_their_lanes_compute(stand: Stand) -> None:
    dispatcher = await stand.start(1)
    await eventually(stand.are_open)
    await dispatch(dispatcher, random_work(5, 3, 0), True)
    statistics = stand.handlers[0].group.statistics()
    assert statistics[:3] == (1, 5, 15)
    assert statistics.busy_s > 0


async def test_a_new_number_of_threads_holds_on_open_lanes(stand: Stand) -> None:
    dispatcher = await stand.start(1)
    await eventually(stand.are_open)
    group, own = stand.handlers[0].group, torch.get_num_threads()
    try:
        group.use_threads(1)
        await dispatch(dispatcher, random_work(40, 3, 0), True)
        alone = len(os.listdir("/proc/self/task"))
        group.use_threads(2)
        await dispatch(dispatcher, random_work(40, 3, 0), True)
        assert len(os.listdir("/proc/self/task")) == alone + 1
    finally:
        torch.set_num_threads(own)
        kernels.use_threads(None)


async def test_large_dispatches_go_over_links(stand: Stand) -> None:
    dispatcher = await stand.start(2)
    await eventually(stand.are_open)
    tokens = MAX_HIDDEN_BYTES // (4 * HIDDEN)
    await dispatch(dispatcher, random_work(tokens, 1, 0), True)
    assert dispatcher.statistics().over_lanes == 1
    await dispatch(dispatcher, random_work(tokens + 1, 1, 0), True)
    assert dispatcher.statistics().over_lanes == 1
    await dispatch(dispatcher, random_work(5, 1, 0), False)
    assert dispatcher.statistics()[:2] == (3, 1)


async def test_who_has_little_time_left_does_not_end_lanes_for_others(stand: Stand) -> None:
    dispatcher = await stand.start(2)
    await eventually(stand.are_open)
    with suppress(DeadlineExceededError):
        await dispatcher.run_counted(LAYER, *random_work(3, 2, 0), time.monotonic() + 0.1, lanes=True)
    assert stand.are_open()
    assert dispatcher.statistics().over_lanes == 0
    await dispatch(dispatcher, random_work(3, 2, 0), True)
    assert dispatcher.statistics().over_lanes == 1


async def test_what_large_experts_take_is_not_taken_for_hanging(
    stand: Stand, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A lane that was too impatient once has more time the next."""
    monkeypatch.setattr(dispatching, "_LANE_TIMEOUT_S", 0.0)
    monkeypatch.setattr(lanes, "_REST_S", 0.0)
    dispatcher = await stand.start(2)
    await eventually(stand.are_open)
    work = random_work(30, 3, 0)
    await dispatch(dispatcher, work, True)
    assert dispatcher.statistics()[:2] == (1, 0), "late at once"
    await eventually(stand.are_open)
    monkeypatch.setattr(dispatcher, "_longest_s", 10.0)
    await dispatch(dispatcher, work, True)
    assert dispatcher.statistics()[:2] == (2, 1)
    assert dispatcher._lane_limit_s() == 5.0, "bounded"


async def test_ids_that_no_expert_has_are_refused_and_odd_types_go_over_links(stand: Stand) -> None:
    dispatcher = await stand.start(2)
    await eventually(stand.are_open)
    hidden, routing = random_work(4, 2, 0)
    expected = (await dispatch(dispatcher, (hidden, routing), False)).output
    for wrong in (-1, EXPERTS, 2**40):
        ids = routing.expert_ids.clone()
        ids[2, 1] = wrong
        with pytest.raises(IndexError, match="names experts"):
            await dispatch(dispatcher, (hidden, Routing(ids, routing.weights)), True)
    assert stand.are_open()
    short = Routing(routing.expert_ids.to(torch.int32), routing.weights)
    assert torch.equal((await dispatch(dispatcher, (hidden, short), True)).output, expected)
    assert dispatcher.statistics().over_lanes == 0


async def test_a_link_that_is_lost_is_not_kept_for_its_lane(stand: Stand) -> None:
    await stand.start(1)
    await eventually(stand.are_open)
    assert len(stand.remotes[0]._lanes) == 1
    await stand.remotes[0].pool.close()
    await eventually(lambda: not stand.remotes[0]._lanes)


async def test_what_a_group_refuses_comes_back_from_its_link_with_the_reason(stand: Stand) -> None:
    dispatcher = await stand.start(2)
    await eventually(stand.are_open)
    with pytest.raises(Exception, match="layer 1 has no experts"):
        await dispatch(dispatcher, random_work(3, 2, 0), True, layer=1)
    assert not stand.are_open(), "the lane is left alone for a while"
    assert (await dispatch(dispatcher, random_work(3, 2, 0), True)).output.isfinite().all()


async def test_a_lane_that_ends_is_replaced_after_a_rest(stand: Stand, monkeypatch: pytest.MonkeyPatch) -> None:
    dispatcher = await stand.start(2)
    await eventually(stand.are_open)
    work = random_work(4, 2, 0)
    expected = (await dispatch(dispatcher, work, True)).output
    (ended,) = stand.handlers[1]._lanes._lanes  # type: ignore[union-attr]
    ended.shutdown(socket.SHUT_RDWR)
    assert torch.equal((await dispatch(dispatcher, work, True)).output, expected), "over links"
    assert dispatcher.statistics()[:2] == (2, 1)
    assert not stand.are_open()
    monkeypatch.setattr(lanes, "_REST_S", 0.0)
    await eventually(stand.are_open)
    assert torch.equal((await dispatch(dispatcher, work, True)).output, expected)
    assert dispatcher.statistics()[:2] == (3, 2)


async def test_with_its_link_a_lane_ends_on_both_sides(stand: Stand) -> None:
    await stand.start(1)
    await eventually(stand.are_open)
    server = stand.handlers[0]._lanes
    assert server is not None
    lane = stand.remotes[0].lane()
    await stand.remotes[0].pool.close()
    assert lane is not None
    assert lane.descriptor is None
    await eventually(lambda: not server._lanes)


async def test_experts_that_torch_computes_have_no_lanes(stand: Stand) -> None:
    dispatcher = await stand.start(1)
    torch_experts = GatedExperts(
        torch.zeros(EXPERTS, 2 * INNER, HIDDEN), torch.zeros(EXPERTS, HIDDEN, INNER), "silu"
    )
    assert lane_table({0: torch_experts}) is None
    handler = ExpertGroupHandler(ExpertGroup(range(EXPERTS), {LAYER: torch_experts}, HIDDEN))
    stand.servers[0].handler = handler
    lane = stand.remotes[0].lane()
    assert lane is not None
    await eventually(lambda: lane._refused)
    assert (await dispatch(dispatcher, random_work(3, 2, 0), True)).output.eq(0).all()
    assert dispatcher.statistics()[:2] == (1, 0)
    assert not lane.may_be_replaced


# Who may open one.


@pytest.fixture
def server() -> Iterator[LaneServer]:
    table = lane_table(make_group((0, 1)).layers)
    assert table is not None
    made = LaneServer(table)
    yield made
    made.close()


@contextmanager
def knock(name: bytes, token: bytes) -> Iterator[bytes]:
    """What comes back for a token."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as peer:
        peer.settimeout(10)
        peer.connect(name)
        peer.sendall(token)
        try:
            yield peer.recv(1)
        except ConnectionResetError:
            yield b""


def test_a_want_of_threads_or_descriptors_passes(server: LaneServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lanes are refused meanwhile, and opened again after it."""
    name = server.offer()["name"]
    monkeypatch.setattr(lanes, "_PAUSE_S", 0.001)
    with monkeypatch.context() as without:
        without.setattr(threading.Thread, "start", _no_thread)
        with knock(name, server.offer()["token"]) as said:
            assert said == b""
    accept, failures = socket.socket.accept, [OSError(errno.EMFILE, "too many open files")]

    def failing(self: socket.socket) -> tuple[socket.socket, Any]:
        peer = accept(self)
        if failures:
            peer[0].close()
            raise failures.pop()
        return peer

    monkeypatch.setattr(socket.socket, "accept", failing)
    assert not server._lanes
    for _ in range(3):  # one is waited for already by the real thing; one fails
        with knock(name, server.offer()["token"]) as said:
            last = said
    assert last == b"+"
    assert not failures


def _no_thread(self: threading.Thread) -> None:
    raise RuntimeError("can't start new thread")


def test_a_token_opens_one_lane_and_nothing_else_any(server: LaneServer, monkeypatch: pytest.MonkeyPatch) -> None:
    offer = server.offer()
    name, token = offer["name"], offer["token"]
    assert len(token) == TOKEN_BYTES
    with knock(name, bytes(TOKEN_BYTES)) as answer:
        assert answer == b""
    with knock(name, token) as answer:
        assert answer == b"+"
        with knock(name, token) as second:
            assert second == b"", "used up"
    monkeypatch.setattr(lanes, "_TOKEN_LIFE_S", -1.0)
    with knock(name, server.offer()["token"]) as answer:
        assert answer == b"", "too old"


def test_processes_of_other_users_get_none(server: LaneServer, monkeypatch: pytest.MonkeyPatch) -> None:
    offer = server.offer()
    monkeypatch.setattr(lanes, "getuid", lambda: 123456789)
    with knock(offer["name"], offer["token"]) as answer:
        assert answer == b""


def test_tokens_and_lanes_are_bounded(server: LaneServer, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = [server.offer()["token"] for _ in range(200)]
    assert len(server._tokens) == 64
    with knock(server.offer()["name"], tokens[0]) as answer:
        assert answer == b"", "pushed out"
    monkeypatch.setattr(lanes, "_MAX_LANES", 0)
    assert server.offer() == {"full": True}, "there may be room later"
    server.close()
    monkeypatch.setattr(lanes, "_MAX_LANES", 9)
    assert server.offer() == {}


def test_after_closing_nobody_is_served(server: LaneServer) -> None:
    offer = server.offer()
    with knock(offer["name"], offer["token"]):
        server.close()
    with pytest.raises(OSError), knock(offer["name"], offer["token"]) as answer:  # noqa: PT011
        assert answer != b""


# Nonsense, from either side.

_REQUEST = struct.Struct("=6I2Q")  # magic, bytes of a number, layer, rows, hidden, pairs; remaining ns, sequence
_MAGIC = 0x50694D31


@pytest.mark.parametrize(
    "said",
    [
        b"GET / HTTP/1.1\r\n" * 4,
        _REQUEST.pack(_MAGIC, 4, LAYER, 2**31, 2**31, 1, 10**9, 1),
        _REQUEST.pack(_MAGIC, 4, LAYER, 0, HIDDEN, 1, 10**9, 1),
        _REQUEST.pack(_MAGIC, 400, LAYER, 1, HIDDEN, 1, 10**9, 1),
        _REQUEST.pack(_MAGIC, 0, LAYER, 1, HIDDEN, 1, 10**9, 1),
        _REQUEST.pack(_MAGIC, 4, LAYER, 2**30, 2**32 - 1, 1, 10**9, 1),
        _REQUEST.pack(_MAGIC, 4, LAYER, 1, HIDDEN, 1, 10**9, 1)[:20],
    ],
    ids=["http", "too long", "no rows", "wide numbers", "no numbers", "a length that overflows", "cut off"],
)
def test_a_lane_ends_at_nonsense(server: LaneServer, said: bytes) -> None:
    offer = server.offer()
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as peer:
        peer.settimeout(10)
        peer.connect(offer["name"])
        peer.sendall(offer["token"])
        assert peer.recv(1) == b"+"
        peer.sendall(said)
        peer.shutdown(socket.SHUT_WR)
        with suppress(ConnectionResetError):
            assert peer.recv(1) == b""
    until = time.monotonic() + 10
    while server._lanes and time.monotonic() < until:
        time.sleep(0.001)
    assert not server._lanes


def sent_to(*answers: bytes | None) -> tuple[LaneDispatch, list[socket.socket], threading.Thread]:
    """A dispatch whose groups are this test, which says something whatever it is asked; None: nothing."""
    pairs = [socket.socketpair() for _ in answers]
    for ours, _ in pairs:
        ours.setblocking(False)
    placement = contiguous_placement(EXPERTS, len(answers))

    def answer() -> None:
        for (_, theirs), said in zip(pairs, answers, strict=True):
            if said is not None:
                theirs.recv(2**20)
                theirs.sendall(said)

    thread = threading.Thread(target=answer)
    thread.start()
    made = LaneDispatch(placement.group_of, placement.local_of, len(answers))
    return made, [end for pair in pairs for end in pair], thread


_ANSWER = struct.Struct("=2I3Q")  # magic, status; computed ns, sequence, bytes of sums
_SUMS = 2 * HIDDEN * 4


@pytest.mark.parametrize(
    "said",
    [
        b"x" * 5000,
        _ANSWER.pack(_MAGIC, 1, 0, 1, 0),
        _ANSWER.pack(_MAGIC, 2, 0, 1, 0),
        _ANSWER.pack(_MAGIC, 0, 0, 7, _SUMS) + bytes(_SUMS),
        _ANSWER.pack(_MAGIC, 0, 0, 1, _SUMS - 4) + bytes(_SUMS),
        None,
    ],
    ids=["noise", "refused", "late", "another's answer", "another length", "silence"],
)
def test_what_is_no_answer_is_taken_for_none(said: bytes | None) -> None:
    right = _ANSWER.pack(_MAGIC, 0, 5, 1, _SUMS) + np.ones(2 * HIDDEN, np.float32).tobytes()
    hidden = torch.zeros(2, HIDDEN)
    routing = torch.tensor([[0, 5], [1, 4]]), torch.ones(2, 2)
    made, ends, thread = sent_to(right, said)
    assert made([ends[0].fileno(), ends[2].fileno()], LAYER, hidden, *routing, 0.2) is None
    assert made.expert_pairs.sum() == made.group_rows.sum() == 0, "what failed is not counted"
    thread.join()
    for end in ends:
        end.close()


def test_answers_are_added_up_in_the_order_of_groups() -> None:
    said = [
        _ANSWER.pack(_MAGIC, 0, 5, 1, _SUMS) + np.full(2 * HIDDEN, value, np.float32).tobytes()
        for value in (1.5, 2.0)
    ]
    made, ends, thread = sent_to(*said)
    routing = torch.tensor([[0, 5], [1, 5]]), torch.ones(2, 2)
    found = made([ends[0].fileno(), ends[2].fileno()], LAYER, torch.zeros(2, HIDDEN), *routing, 10.0)
    assert found is not None
    assert found[0].eq(3.5).all()
    assert found[1] == 2, "tokens of expert 5"
    assert made.computed_ns.tolist() == [5, 5]
    assert made.group_rows.tolist() == [2, 2]
    assert made.expert_pairs.tolist() == [1, 1, 0, 0, 0, 2]
    thread.join()
    for end in ends:
        end.close()


async def test_a_dispatch_waits_for_no_lane(stand: Stand) -> None:
    """The first ones, while lanes open, go over links at once."""
    dispatcher = await stand.start(2)
    async with asyncio.timeout(10):
        await dispatch(dispatcher, random_work(3, 2, 0), True)
    assert dispatcher.statistics()[:2] == (1, 0)
