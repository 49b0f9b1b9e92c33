"""What users would generate with instead: transformers' `generate` in this process, llama.cpp in its own."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from generation import in_step
from report import cores
from switch_engines import Answer, Prompt

LLAMA_PYTHON = Path(__file__).parents[1] / ".venv" / "llama" / "bin" / "python"
EXPERTS = ("eager", "batched_mm", "grouped_mm")
# batched_mm copies the weights of every pair of token and expert: for a hundred tokens of prompts it takes
# seconds, where the others take a tenth of one.
_BATCHED_MM_TOKENS = 64
_CLOSE_TIMEOUT_S = 10.0


class RivalMissingError(Exception):
    """A rival cannot take part; the message says why."""


# transformers --------------------------------------------------------------------------------------------------


class _Steps:
    """A streamer for `generate`: when each step's tokens came, the prompts first."""

    def __init__(self) -> None:
        self.at: list[float] = []
        self.tokens: list[list[int]] = []

    def put(self, value: torch.Tensor) -> None:
        self.at.append(time.monotonic())
        self.tokens.append(value.flatten().tolist())

    def end(self) -> None:
        """Nothing is left to do."""


@dataclass(frozen=True)
class Choice:
    """How transformers computes: its experts implementation and torch's threads."""

    experts: str
    threads: int

    def __str__(self) -> str:
        return f"{self.experts} with {self.threads} thread{'s' if self.threads > 1 else ''}"


class Transformers:
    """`generate` with equally long prompts side by side, and whichever experts implementation and number of
    threads was the fastest for their number and length.

    Attributes:
        choices: (sequences, prompt tokens) -> what was chosen.
    """

    def __init__(self, folder: Path, dtype: str) -> None:
        os.environ["HF_HUB_OFFLINE"] = "1"
        from transformers import AutoModelForCausalLM, GenerationConfig
        from transformers.utils import logging

        logging.disable_progress_bar()
        logging.set_verbosity_error()
        self._model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=getattr(torch, dtype), attn_implementation="sdpa"
        ).eval()
        self._config = GenerationConfig
        self.choices: dict[tuple[int, int], Choice] = {}

    async def choose(
        self, prompts: Sequence[Prompt], max_tokens: int, rate: Callable[[list[Answer]], float]
    ) -> None:
        """Try all for such prompts, and keep what gives the highest `rate`."""
        long = sum(map(len, prompts)) > _BATCHED_MM_TOKENS
        found: dict[Choice, float] = {}
        for experts, threads in itertools.product(EXPERTS, sorted({1, cores()})):
            if long and experts == "batched_mm":
                continue
            self.choices[self._case(prompts)] = choice = Choice(experts, threads)
            await self.burst(prompts, min(2, max_tokens))
            # The better of two, so that one disturbance does not choose.
            found[choice] = max([rate(await self.burst(prompts, max_tokens)) for _ in range(2)])
        self.choices[self._case(prompts)] = max(found, key=found.__getitem__)

    @staticmethod
    def _case(prompts: Sequence[Prompt]) -> tuple[int, int]:
        return len(prompts), len(prompts[0])

    async def burst(self, prompts: Sequence[Prompt], max_tokens: int) -> list[Answer]:
        """See `Burst`. It blocks this thread: nothing else is to be done."""
        choice = self.choices[self._case(prompts)]
        torch.set_num_threads(choice.threads)
        self._model.set_experts_implementation(choice.experts)
        steps, ids = _Steps(), torch.tensor(prompts)
        config = self._config(do_sample=False, max_new_tokens=max_tokens, eos_token_id=-1, pad_token_id=0)
        asked = time.monotonic()
        with torch.inference_mode():
            self._model.generate(
                ids, attention_mask=torch.ones_like(ids), generation_config=config, streamer=steps
            )
        return in_step(asked, steps.at[1:], steps.tokens[1:])


# llama.cpp -----------------------------------------------------------------------------------------------------


class Llama:
    """llama.cpp in a process of its own. `about`: its version, its file's bytes, how it was built."""

    def __init__(self, process: subprocess.Popen[str], errors: IO[str]) -> None:
        self._process, self._errors = process, errors
        self.about: dict[str, Any] = self._answer()["ready"]

    async def burst(self, prompts: Sequence[Prompt], max_tokens: int) -> list[Answer]:
        """See `Burst`. It blocks this thread."""
        asked = time.monotonic()
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"prompts": prompts, "max_tokens": max_tokens}) + "\n")
        self._process.stdin.flush()
        answer = self._answer()
        return in_step(asked, [asked + seconds for seconds in answer["at"]], answer["steps"])

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._errors.seek(0)
            last = self._errors.read().strip().splitlines()[-1:] or ["it said nothing"]
            raise RivalMissingError(f"llama.cpp ended: {last[0]}")
        found: dict[str, Any] = json.loads(line)
        return found


@contextmanager
def llama(folder: Path, matrices: str, sequences: int, context_tokens: int) -> Iterator[Llama]:
    """llama.cpp with a thread per core.

    Args:
        matrices: "BF16" or "Q8_0".
        context_tokens: of each of `sequences`.

    Raises:
        RivalMissingError: llama-cpp-python is not installed, or cannot read the checkpoint.
    """
    if not LLAMA_PYTHON.exists():
        raise RivalMissingError("llama-cpp-python is not installed in .venv/llama")
    script = str(Path(__file__).with_name("generation_llama.py"))
    numbers = [str(number) for number in (cores(), sequences, context_tokens)]
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            [str(LLAMA_PYTHON), script, str(folder), matrices, *numbers],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )
        try:
            yield Llama(process, errors)
        finally:
            _close(process)


def _close(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    process.stdin.close()
    try:
        process.wait(_CLOSE_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    assert process.stdout is not None
    process.stdout.close()
