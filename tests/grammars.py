"""Tokenizers and random models, for the tests of structured output."""

from __future__ import annotations

import asyncio
import functools
from pathlib import Path

import tokenizers
import torch
from pimoe.runtime.generation.grammar import GrammarMatcher
from pimoe.runtime.generation.grammar_compiler import GrammarCompiler
from pimoe.runtime.generation.sampler import sample
from pimoe.runtime.generation.sampling_state import SamplingState
from pimoe.runtime.requests import GrammarKind
from tokenizers import decoders, models, pre_tokenizers, trainers

EMBEDDED = Path(__file__).parent.parent / "runtime" / "embedded" / "checkpoint"
EMBEDDED_VOCAB, EMBEDDED_END = 258, (257,)
TEXT = '{"name": "Ada", "tags": ["red", "green"], "age": 36, "zip": "01234"} the cat, and then - 2024-11-21? no. '
MARGIN = 10  # tokens that a model's vocabulary has beyond its tokenizer's


def train_bpe(folder: Path) -> tuple[int, tuple[int, ...]]:
    """Write a byte-level BPE `tokenizer.json`, with whole words and special tokens; returns vocabulary size (of a
    model that pads it) and end tokens."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<|end|>", "<|turn|>", "<|pad|>"]
    trainer = trainers.BpeTrainer(vocab_size=420, initial_alphabet=alphabet, special_tokens=special)
    backend.train_from_iterator([TEXT] * 5, trainer)
    backend.save(str(folder / "tokenizer.json"))
    return backend.get_vocab_size() + MARGIN, (0, 1)


@functools.cache
def tokenizer_of(folder: Path) -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))


async def compiled(compiler: GrammarCompiler, kind: GrammarKind, source: str) -> GrammarMatcher:
    """Within a minute."""
    return await compiler.compile(kind, source, asyncio.get_running_loop().time() + 60)


def generate(state: SamplingState, vocab: int, seed: int, max_tokens: int) -> list[int] | None:
    """What a random model says until the grammar or an end token ends it; None if they do not."""
    numbers, chosen = torch.Generator().manual_seed(seed), []
    for position in range(max_tokens):
        logits = torch.randn(1, vocab, generator=numbers) * 3
        (token,), _ = sample(logits, [state], [position])
        chosen.append(token)
        state.advance(token)
        if state.error is not None:
            raise state.error
        if state.finished_by_grammar:
            return chosen
    return None
