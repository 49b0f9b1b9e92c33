"""The paged KV cache and the plan of a step: what is written where, and what is read by whom."""

from __future__ import annotations

import pytest
import torch
from pimoe.runtime.model.kv_cache import NULL_BLOCK, BlockRead, KVCache, KVLayout
from pimoe.runtime.model.step import ForwardBatch, Segment, Step, plan_step
from torch import Tensor

CPU = torch.device("cpu")
LAYOUT = KVLayout(num_layers=2, num_kv_heads=3, key_dim=4, value_dim=4)
BLOCK = 4


def new_cache(num_blocks: int = 12, layout: KVLayout = LAYOUT) -> KVCache:
    return KVCache(layout, num_blocks, BLOCK, torch.float32, CPU)


def random_rows(count: int, dim: int = 4) -> Tensor:
    return torch.randn(count, 3, dim, generator=torch.Generator().manual_seed(count))


def rows_of(blocks: list[int], count: int) -> Tensor:
    return torch.tensor([blocks[i // BLOCK] * BLOCK + i % BLOCK for i in range(count)])


@pytest.mark.parametrize("blocks", [[3, 4, 5], [7, 2, 9]], ids=["in a row", "anywhere"])
def test_what_is_written_is_read_in_order(blocks: list[int]) -> None:
    cache = new_cache()
    keys, values = random_rows(10), random_rows(10) + 1
    cache.append(1, rows_of(blocks, 10), keys, values)
    in_a_row = blocks == [3, 4, 5]
    read = BlockRead(1, 3, 10, None if in_a_row else torch.tensor(blocks), blocks[0])
    got_keys, got_values = cache.read(1, read)
    assert got_keys.shape == got_values.shape == (1, 3, 10, 4)
    assert torch.equal(got_keys[0].transpose(0, 1), keys)
    assert torch.equal(got_values[0].transpose(0, 1), values)
    assert not cache.read(0, read)[0].any(), "layers are apart"


def test_several_sequences_are_read_side_by_side() -> None:
    cache = new_cache()
    first, second = random_rows(8), random_rows(3)
    cache.append(0, rows_of([5, 1], 8), first, first)
    cache.append(0, rows_of([6], 3), second, second)
    keys, values = cache.read(0, BlockRead(2, 2, 8, torch.tensor([5, 1, 6, NULL_BLOCK])))
    assert torch.equal(keys[0].transpose(0, 1), first)
    assert torch.equal(values[1, :, :3].transpose(0, 1), second)
    assert not keys[1, :, 3:].any(), "the null block fills up"


def test_keys_may_hold_the_values() -> None:
    cache = new_cache(layout=KVLayout(1, 3, 6, 0))
    keys = random_rows(5, 6)
    cache.append(0, rows_of([2, 3], 5), keys, None)
    got, values = cache.read(0, BlockRead(1, 2, 5, None, 2))
    assert torch.equal(got[0].transpose(0, 1), keys)
    assert values is got


def test_cleared_blocks_hold_nothing_and_others_keep_theirs() -> None:
    cache = new_cache()
    for layer in (0, 1):
        cache.append(layer, rows_of([2, 3], 8), torch.full((8, 3, 4), torch.nan), random_rows(8))
    cache.clear([3])
    cache.clear([])
    for layer in (0, 1):
        keys, values = cache.read(layer, BlockRead(1, 2, 8, None, 2))
        assert keys[:, :, :4].isnan().all()
        assert not keys[:, :, 4:].any()
        assert not values[:, :, 4:].any()


def test_a_block_takes_the_bytes_of_all_layers() -> None:
    cache = new_cache(5)
    assert cache.bytes_per_block == 2 * BLOCK * 3 * 8 * 4


def plan(segments: tuple[Segment, ...], window: int | None = None) -> Step:
    total = sum(segment.count for segment in segments)
    return plan_step(
        ForwardBatch(torch.zeros(total, dtype=torch.int64), segments), BLOCK, {window}, torch.float32, CPU
    )


def test_new_tokens_go_where_their_sequences_blocks_are() -> None:
    step = plan((Segment([7, 2, 5], 3, 6), Segment([4], 0, 2), Segment([1, 9], 4, 1)))
    assert step.positions.tolist() == [3, 4, 5, 6, 7, 8, 0, 1, 4]
    assert step.cache_rows.tolist() == [31, 8, 9, 10, 11, 20, 16, 17, 36]
    assert step.output_rows.tolist() == [5, 7, 8]
    assert step.length == 9


@pytest.mark.parametrize("segments", [(), (Segment([1], 0, 0),), (Segment([1], 0, 2), Segment([2], 0, 3))])
def test_segments_must_add_up(segments: tuple[Segment, ...]) -> None:
    with pytest.raises(ValueError, match="cannot make segments"):
        ForwardBatch(torch.zeros(4, dtype=torch.int64), segments)


def visible(step: Step, window: int | None, tables: list[list[int]]) -> dict[int, list[tuple[int, int]]]:
    """By row of the batch, the (block, place) pairs that its decode read sees."""
    seen = {}
    for read in step.reads[window].decode:
        rows = list(range(100))[read.rows] if isinstance(read.rows, slice) else read.rows.tolist()
        index = read.read.index
        ids = list(range(read.read.first, read.read.first + read.read.blocks)) if index is None else index.tolist()
        for sequence, row in enumerate(rows):
            own = ids[sequence * read.read.blocks : (sequence + 1) * read.read.blocks]
            places = [(block, place) for block in own for place in range(BLOCK)][: read.read.length]
            hidden = torch.zeros(len(places)) if read.mask is None else read.mask[sequence, 0, 0]
            seen[row] = [place for place, value in zip(places, hidden.tolist(), strict=True) if value == 0]
    return seen


@pytest.mark.parametrize("window", [None, 1, 3, 6, 100])
def test_every_decoding_sequence_sees_its_own_tokens_within_the_window(window: int | None) -> None:
    tables = [[block, block + 20, block + 40, block + 60, block + 80, block + 100] for block in range(1, 9)]
    ends = [1, 4, 5, 9, 24, 13, 2, 17]
    segments = tuple(Segment(table, end - 1, 1) for table, end in zip(tables, ends, strict=True))
    seen = visible(plan(segments, window), window, tables)
    for row, (table, end) in enumerate(zip(tables, ends, strict=True)):
        first = 0 if window is None else max(0, end - window)
        assert seen[row] == [(table[i // BLOCK], i % BLOCK) for i in range(first, end)]


def test_nobody_reads_more_than_twice_what_it_needs_for_others() -> None:
    lengths = [1, 16, 17, 40, 100, 101, 400, 399, 3]
    segments = tuple(Segment(list(range(1, 200)), length - 1, 1) for length in lengths)
    step = plan(segments)
    for read in step.reads[None].decode:
        rows = range(len(lengths))[read.rows] if isinstance(read.rows, slice) else read.rows.tolist()
        for row in rows:
            assert read.read.blocks <= 2 * -(-lengths[row] // BLOCK)


def test_a_prompt_from_its_beginning_reads_no_cache() -> None:
    step = plan((Segment([1, 2], 0, 7),))
    assert step.reads[None].prefill[0].read is None
    assert step.reads[None].only is step.reads[None].prefill[0]
    windowed = plan((Segment([1, 2], 0, 7),), 5)
    mask = windowed.reads[5].prefill[0].mask
    assert mask is not None
    assert (mask == 0).sum(1).tolist() == [1, 2, 3, 4, 5, 5, 5]


def test_a_later_chunk_sees_what_came_before_and_itself() -> None:
    step = plan((Segment([5, 6, 9], 6, 4),))
    (read,) = step.reads[None].prefill
    assert read.read is not None
    assert read.read.length == 10
    assert read.mask is not None
    assert (read.mask == 0).sum(1).tolist() == [7, 8, 9, 10]
