"""What a user of transformers would use instead: its own continuous batching, in this process, without HTTP."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from generation import Generate
from report import cores

PAGE_TOKENS = 64
_START_TIMEOUT_S = 120.0


@contextmanager
def transformers_batching(folder: Path, step_tokens: int, kv_tokens: int) -> Iterator[Generate]:
    """The checkpoint in float32 with a torch thread per core.

    Args:
        step_tokens: of a step, prompts and decoding sequences together.
        kv_tokens: what its paged cache holds.
    """
    os.environ["HF_HUB_OFFLINE"] = "1"
    from transformers import AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig

    logging.getLogger("ContinuousBatchingLogger").setLevel(logging.CRITICAL)
    torch.set_num_threads(cores())
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa").eval()
    manager = model.init_continuous_batching(
        # No end: every sequence generates as many tokens as are asked for.
        generation_config=GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0, max_new_tokens=1),
        continuous_batching_config=ContinuousBatchingConfig(
            page_size=PAGE_TOKENS, num_blocks=-(-kv_tokens // PAGE_TOKENS), max_batch_tokens=step_tokens
        ),
    )
    manager.start()
    try:
        yield _streaming(manager)
    finally:
        manager.stop(block=True, timeout=_START_TIMEOUT_S)
        torch.set_num_threads(1)


def _streaming(manager: Any) -> Generate:
    numbers = iter(range(1 << 62))

    async def generate(prompt: list[int], max_tokens: int) -> AsyncGenerator[Sequence[int], None]:
        name, outputs = f"mixed-{next(numbers)}", asyncio.Queue[Any]()
        manager.register_result_handler(name, outputs.put_nowait)
        manager.add_request(prompt, request_id=name, max_new_tokens=max_tokens, streaming=True)
        seen = 0
        while True:
            output = await outputs.get()
            if output.error is not None:
                raise RuntimeError(f"transformers failed: {output.error}")
            yield output.generated_tokens[seen:]
            seen = len(output.generated_tokens)
            if output.is_finished():
                return

    return generate
