"""The KV cache and the plan of a forward: slots, growth, isolation, and which positions each row sees."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pimoe.runtime.errors import ContextLengthError, OverloadedError
from pimoe.runtime.model.kv_cache import KVCache, SlotView
from pimoe.runtime.model.step import ForwardBatch, Segment, plan_step, select_slots

CPU = torch.device("cpu")


def new_cache(max_sequences: int = 8, max_tokens: int = 1000) -> KVCache:
    return KVCache(2, 3, 4, max_sequences, max_tokens, torch.float32, CPU)


def write(cache: KVCache, slot: int, tokens: int, value: float) -> None:
    """Fills positions 0 to `tokens` of all layers, negated in the values."""
    cache.prepare([(slot, tokens)])
    for layer in range(2):
        keys = torch.full((tokens, 3, 4), value)
        cache.append(layer, torch.full((tokens,), slot), torch.arange(tokens), keys, -keys)


def test_slots_are_handed_out_lowest_first_and_come_back() -> None:
    cache = new_cache(3)
    assert [cache.allocate() for _ in range(3)] == [0, 1, 2]
    with pytest.raises(OverloadedError, match="all 3 sequence slots"):
        cache.allocate()
    cache.free(1)
    cache.free(0)
    assert cache.free_slots == 2
    assert cache.allocate() == 0
    with pytest.raises(KeyError):
        cache.free(1)


def test_growth_keeps_what_was_written_and_stays_within_limits() -> None:
    cache = new_cache(max_sequences=8, max_tokens=1000)
    first = cache.bytes
    write(cache, cache.allocate(), 50, 1.0)
    assert cache.bytes == first
    for _ in range(7):
        cache.allocate()
    write(cache, 7, 990, 2.0)
    assert cache.bytes == 2 * 2 * 8 * 3 * 990 * 4 * 4
    assert cache.bytes_per_token == 2 * 2 * 3 * 4 * 4
    for layer in range(2):
        keys, values = cache.read(layer, SlotView(0, 8), 0, 60)
        assert keys.shape == (8, 3, 60, 4)
        assert (keys[0, :, :50] == 1).all()
        assert (keys[0, :, 50:] == 0).all()
        assert (values[7] == -2).all()
    with pytest.raises(ContextLengthError, match="1001 tokens; the KV cache holds 1000"):
        cache.prepare([(0, 1001)])


def test_reading_a_range_copies_nothing_and_an_index_selects() -> None:
    cache = new_cache(4)
    for value in range(4):
        write(cache, cache.allocate(), 6, float(value))
    whole, _ = cache.read(1, SlotView(0, 4), 0, 6)
    part, _ = cache.read(1, SlotView(1, 3), 2, 6)
    assert part.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()
    assert part[:, 0, 0, 0].tolist() == [1, 2]
    chosen, values = cache.read(1, SlotView(0, 4, torch.tensor([0, 3])), 0, 6)
    assert chosen[:, 0, 0, 0].tolist() == [0, 3]
    assert values.shape == (2, 3, 6, 4)


def test_a_freed_slot_leaves_nothing_to_its_next_sequence() -> None:
    cache = new_cache()
    slot = cache.allocate()
    write(cache, slot, 40, float("nan"))
    cache.free(slot)
    assert cache.allocate() == slot
    keys, values = cache.read(0, SlotView(slot, slot + 1), 0, 64)
    assert not keys.isnan().any()
    assert not values.isnan().any()


def covered_slots(view: SlotView) -> list[int]:
    return list(range(view.first, view.stop)) if view.index is None else view.index.tolist()


@given(st.sets(st.integers(0, 40), min_size=1))
def test_a_view_of_slots_holds_each_and_wastes_at_most_half(chosen: set[int]) -> None:
    slots = sorted(chosen)
    view, places = select_slots(slots, CPU)
    covered = covered_slots(view)
    assert view.count == len(covered) <= 2 * len(slots)
    found = covered[: len(slots)] if places is None else [covered[place] for place in places.tolist()]
    assert found == slots


segments = st.lists(
    st.tuples(st.integers(0, 30), st.one_of(st.just(1), st.integers(1, 12))), min_size=1, max_size=6
).flatmap(
    lambda parts: st.permutations(range(10)).map(
        lambda slots: tuple(Segment(slot, *part) for slot, part in zip(slots, parts, strict=False))
    )
)


@given(segments, st.sampled_from([None, 1, 4, 11]))
def test_every_row_sees_exactly_its_own_past(parts: tuple[Segment, ...], window: int | None) -> None:
    total = sum(part.count for part in parts)
    step = plan_step(ForwardBatch(torch.zeros(total, dtype=torch.int64), parts), {window}, torch.float32, CPU)
    expected = [(part.slot, part.start + i) for part in parts for i in range(part.count)]
    assert list(zip(step.slots.tolist(), step.positions.tolist(), strict=True)) == expected
    assert step.length == max(part.end for part in parts)
    reads, rows = step.reads[window], torch.arange(total)
    seen: dict[int, tuple[int, set[int]]] = {}  # row -> slot, positions
    if reads.decode is not None:
        read = reads.decode
        covered = covered_slots(read.slots)
        width = read.length - read.first
        mask = torch.zeros(len(covered), width) if read.mask is None else read.mask[:, 0, 0]
        assert (mask == 0).any(1).all(), "a row that sees nothing has no finite softmax"
        for index, row in enumerate(rows[read.rows].tolist()):
            place = index if read.places is None else int(read.places[index])
            visible = {read.first + i for i in range(width) if mask[place, i] == 0}
            seen[row] = (covered[place], visible)
    for prefill in reads.prefill:
        width = prefill.length - prefill.first
        causal = torch.ones(width, width).tril() if prefill.causal else None
        for index, row in enumerate(rows[prefill.rows].tolist()):
            line = causal[index] == 1 if causal is not None else prefill.mask[index] == 0  # type: ignore[index]
            seen[row] = (prefill.slots.first, {prefill.first + i for i in range(width) if line[i]})
    for row, (slot, position) in enumerate(expected):
        first = 0 if window is None else max(0, position + 1 - window)
        assert seen[row] == (slot, set(range(first, position + 1)))
