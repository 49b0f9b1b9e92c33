"""Choosing the next token of every sequence of a batch from its logits.

Random numbers are keyed by (seed, position): a sequence's tokens do not depend on what else is in the batch, and a
request resumed elsewhere goes on with exactly the tokens it would have had.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence

import torch
from torch import Tensor

from ..requests import SamplingParams, TokenLogprob


def sample(
    logits: Tensor, params: Sequence[SamplingParams], positions: Sequence[int], banned: Sequence[tuple[int, ...]]
) -> tuple[list[int], list[TokenLogprob | None]]:
    """One token for every row.

    Args:
        logits: `[rows, vocab]` float32.
        positions: index of the token to be chosen, counted from the prompt's start.
        banned: token ids that a row must not choose (end of sequence before `min_tokens`).

    Returns:
        The token ids, and the log-probabilities of those rows whose parameters ask for them. These are the model's
        own, before temperature and truncation, as OpenAI's are.
    """
    if any(banned):
        logits = logits.clone()
        for row, row_banned in enumerate(banned):
            logits[row, list(row_banned)] = float("-inf")
    chosen = logits.argmax(dim=-1)
    for row, row_params in enumerate(params):
        if row_params.temperature > 0:
            chosen[row] = _sample_row(logits[row], row_params, positions[row])
    tokens: list[int] = chosen.tolist()
    return tokens, [_logprob(logits[row], tokens[row], p.logprobs) for row, p in enumerate(params)]


def _sample_row(logits: Tensor, params: SamplingParams, position: int) -> Tensor:
    probabilities = torch.softmax(_truncate(logits / params.temperature, params), dim=-1)
    # argmax(p / Exp(1) noise) draws from p (the Gumbel-max trick), with one number per token of the vocabulary.
    generator = torch.Generator().manual_seed(_random_key(params.seed, position))
    noise = torch.empty(len(logits)).exponential_(generator=generator).to(logits.device)
    return (probabilities / noise).argmax()


def _random_key(seed: int, position: int) -> int:
    digest = hashlib.blake2b(struct.pack("<qq", seed, position), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1  # a torch seed is a signed 64-bit number


def _truncate(logits: Tensor, params: SamplingParams) -> Tensor:
    """Keep the `top_k` most likely, then the smallest set of mass `top_p`, then those of at least `min_p` times
    the best one's probability."""
    vocab = len(logits)
    if 0 < params.top_k < vocab:
        kept = logits.topk(params.top_k).values[-1]
        logits = logits.masked_fill(logits < kept, float("-inf"))
    if params.top_p < 1:
        ordered, order = logits.sort(descending=True)
        probabilities = torch.softmax(ordered, dim=-1)
        before = probabilities.cumsum(dim=-1) - probabilities
        logits = logits.index_fill(0, order[before >= params.top_p], float("-inf"))
    if params.min_p > 0:
        probabilities = torch.softmax(logits, dim=-1)
        logits = logits.masked_fill(probabilities < params.min_p * probabilities.max(), float("-inf"))
    return logits


def _logprob(logits: Tensor, token: int, alternatives: int | None) -> TokenLogprob | None:
    if alternatives is None:
        return None
    logprobs = torch.log_softmax(logits, dim=-1)
    top: tuple[tuple[int, float], ...] = ()
    if alternatives:
        best = logprobs.topk(min(alternatives, len(logits)))
        top = tuple(zip(best.indices.tolist(), best.values.tolist(), strict=True))
    return TokenLogprob(token, float(logprobs[token]), top)
