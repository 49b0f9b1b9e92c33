"""Batch invariance: the same bits alone and among others, in whatever pieces a sequence is computed."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
import torch
from checkpoints import FAMILIES, make_checkpoint
from engines import prompt_of, read, request
from pimoe.runtime.errors import ConfigurationError
from pimoe.runtime.generation.limits import EngineLimits
from pimoe.runtime.local import LocalRuntime
from pimoe.runtime.model.tiles import TILE_ROWS, by_tiles, check_tiles
from pimoe.runtime.router.limits import RouterLimits
from torch import Tensor

CPU = torch.device("cpu")


@pytest.mark.parametrize("count", [0, 1, TILE_ROWS - 1, TILE_ROWS, TILE_ROWS + 1, 3 * TILE_ROWS + 5])
def test_every_call_has_the_same_number_of_rows(count: int) -> None:
    shapes = []

    def function(rows: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
        shapes.append((rows.shape[0], others.shape[0]))
        return rows * 2, others.sum(1)

    rows, others = torch.randn(count, 3), torch.randn(count, 2, 2)
    doubled, summed = by_tiles(function, rows, others)
    assert torch.equal(doubled, rows * 2)
    assert torch.equal(summed, others.sum(1))
    assert set(shapes) == {(TILE_ROWS, TILE_ROWS)} if count else {(0, 0)}
    assert len(shapes) == max(1, -(-count // TILE_ROWS))


def test_a_function_that_looks_at_a_rows_place_or_neighbours_is_found_out() -> None:
    places = torch.arange(TILE_ROWS)[:, None] * 1e-7
    for function in (lambda rows: rows + places, lambda rows: rows + rows.mean(0)):
        with pytest.raises(ConfigurationError, match="batch_invariant"):
            check_tiles(function, 4, torch.float32, CPU)
    check_tiles(lambda rows: rows * 3, 4, torch.float32, CPU)


PROMPTS = [prompt_of(length, seed) for seed, length in enumerate((5, 70, 1, 33, 2, 48, 17, 9) * 4)]


async def answers(folder: Path, prompts: list[tuple[int, ...]], dtype: str, **limits: int) -> list[list[object]]:
    """Tokens and all of their logprobs, to the bit."""
    engine = EngineLimits(**{"drain_s": 0.0, "max_sequences": 32, **limits})  # type: ignore[arg-type]
    async with await LocalRuntime.start(
        folder, groups=2, dtype=dtype, batch_invariant=True, limits=RouterLimits(engine=engine)
    ) as runtime:
        done = await asyncio.gather(
            *(read(runtime.router.generate(request(prompt, 12, logprobs=3))) for prompt in prompts)
        )
        if "kv_blocks" in limits:
            assert runtime.router.engine is not None
            assert runtime.router.engine.statistics().preemptions
    return [[answer.tokens, answer.logprobs] for answer in done]


@pytest.mark.parametrize("family", FAMILIES)
async def test_the_same_bits_alone_and_among_31_others(family: str, tmp_path: Path) -> None:
    folder = make_checkpoint(family, tmp_path)
    together = await answers(folder, PROMPTS, "float32")
    for place in (0, 1, 2, 6, 31):
        assert await answers(folder, [PROMPTS[place]], "float32") == [together[place]]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
async def test_the_same_bits_in_whatever_pieces(dtype: str, tmp_path: Path) -> None:
    """Prompts in chunks, prefixes that are there already, sequences that give way and are computed again."""
    folder = make_checkpoint("qwen3_moe", tmp_path)
    whole = await answers(folder, PROMPTS, dtype)
    assert await answers(folder, PROMPTS, dtype, max_step_tokens=37) == whole
    assert await answers(folder, [*PROMPTS, *PROMPTS], dtype, kv_blocks=40, block_tokens=4) == [*whole, *whole]
