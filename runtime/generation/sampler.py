"""Choosing the next token of every sequence of a batch from its logits.

Random numbers are keyed by (seed, position): a sequence's tokens do not depend on what else is in the batch, and a
request resumed elsewhere goes on with exactly the tokens it would have had.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from ..requests import SamplingParams, TokenLogprob

_LEAST_TEMPERATURE = 1e-6  # below, float32 would divide by zero


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
        own, before bans, temperature and truncation, as OpenAI's are.
    """
    allowed = _without(logits, banned) if any(banned) else logits
    chosen = allowed.argmax(dim=-1)
    drawn = [row for row, row_params in enumerate(params) if row_params.temperature > 0]
    if drawn:
        chosen[drawn] = _draw(allowed[drawn], [params[row] for row in drawn], [positions[row] for row in drawn])
    tokens: list[int] = chosen.tolist()
    return tokens, [_logprob(logits[row], tokens[row], p.logprobs) for row, p in enumerate(params)]


def _without(logits: Tensor, banned: Sequence[tuple[int, ...]]) -> Tensor:
    allowed = logits.clone()
    for row, row_banned in enumerate(banned):
        if row_banned:
            allowed[row, list(row_banned)] = float("-inf")
    return allowed


def _draw(logits: Tensor, params: Sequence[SamplingParams], positions: Sequence[int]) -> Tensor:
    temperatures = torch.tensor([max(p.temperature, _LEAST_TEMPERATURE) for p in params], device=logits.device)
    # The best at 0: however low the temperature, nothing overflows.
    scaled = (logits - logits.amax(dim=-1, keepdim=True)) / temperatures[:, None]
    for row, row_params in enumerate(params):
        if row_params.top_k > 0 or row_params.top_p < 1 or row_params.min_p > 0:
            scaled[row] = _truncate(scaled[row], row_params)
    # argmax(p / Exp(1) noise) draws from p (the Gumbel-max trick), with one number per token of the vocabulary.
    seeds = [p.seed for p in params]
    noise = torch.stack([_noise(seed, at, logits.shape[1]) for seed, at in zip(seeds, positions, strict=True)])
    return (torch.softmax(scaled, dim=-1) / noise.to(logits.device)).argmax(dim=-1)


def _noise(seed: int, position: int, size: int) -> Tensor:
    # Drawn on the CPU whatever the device, so that every router draws the same.
    digest = hashlib.blake2b(f"{seed} {position}".encode(), digest_size=8).digest()
    key = int.from_bytes(digest, "little") >> 1  # a torch seed is a signed 64-bit number
    return torch.empty(size).exponential_(generator=torch.Generator().manual_seed(key))


def _truncate(logits: Tensor, params: SamplingParams) -> Tensor:
    """Keep the `top_k` most likely, then the smallest set of mass `top_p`, then those of at least `min_p` times
    the best one's probability. The best one always stays."""
    order = None  # of those kept, best first
    if 0 < params.top_k < len(logits):
        order = logits.topk(params.top_k).indices
    elif params.top_p < 1:
        order = logits.argsort(descending=True, stable=True)
    if order is not None:
        if params.top_p < 1:
            probabilities = torch.softmax(logits[order], dim=-1)
            before = probabilities.cumsum(dim=-1) - probabilities
            order = order[: max(1, int((before < params.top_p).sum()))]
        logits = torch.full_like(logits, float("-inf")).index_copy_(0, order, logits[order])
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
