"""Numbers that overflow end their own sequence, and reach nobody else through the KV cache."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import make_checkpoint
from engines import alone, controlled, make_engine, prompt_of, read, request
from pimoe.runtime.routing.plan import ExpertRows
from torch import Tensor


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint("qwen3_moe", tmp_path_factory.mktemp("checkpoint"))


async def test_an_overflow_ends_its_sequence_and_its_blocks_are_known_to_nobody(folder: Path) -> None:
    engine = make_engine(folder, block_tokens=4, kv_blocks=64)
    (group,) = controlled(engine)
    forward, broken = group.run, [True]

    async def run(layer: int, rows: ExpertRows, deadline: float) -> Tensor:
        sums: Tensor = await forward(layer, rows, deadline)
        return torch.full_like(sums, torch.nan) if broken[0] and layer == 0 else sums

    group.run = run
    engine.start()
    asked: Any = request(prompt_of(21), 6)
    answer = await read(engine.generate(asked))
    assert answer.error is not None
    assert "overflowed float32" in answer.error.message
    assert not answer.tokens
    broken[0] = False
    again = await asyncio.gather(*(read(engine.generate(asked)) for _ in range(2)))
    for answer in again:
        assert answer.tokens == (await alone(folder, asked)).tokens
    assert sorted(answer.chunks[0].cached_tokens for answer in again) == [0, 20], "computed anew, and once"
    assert not engine.statistics().kv_blocks.held
    await engine.close()
