"""Choosing the next token of every sequence of a batch from its logits.

Random numbers are keyed by (seed, position): a sequence's tokens do not depend on what else is in the batch, and a
request resumed elsewhere goes on with exactly the tokens it would have had.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from ..requests import SamplingParams, TokenLogprob

_LEAST_TEMPERATURE = 1e-6  # below, float32 would divide by zero
_MANY_TOKENS = 1024
_BLOCK = 512


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
    probabilities = torch.softmax(scaled, dim=-1)
    cut = [row for row, p in enumerate(params) if p.top_k > 0 or p.top_p < 1 or p.min_p > 0]
    if cut:
        probabilities[cut] = _truncate(probabilities[cut], [params[row] for row in cut])
    points = [_uniform(p.seed, at) for p, at in zip(params, positions, strict=True)]
    return _token_at(probabilities, torch.tensor(points, dtype=torch.float64, device=logits.device))


def _uniform(seed: int, position: int) -> float:
    """In [0, 1), by a hash of both."""
    digest = hashlib.blake2b(f"{seed} {position}".encode(), digest_size=5).digest()
    return int.from_bytes(digest, "little") / 2.0**40


def _token_at(weights: Tensor, points: Tensor) -> Tensor:
    """Which token each row's point in [0, 1) falls on when its `weights [rows, vocab]` are laid end to end."""
    vocab = weights.shape[1]
    if vocab <= _BLOCK:
        return _locate(weights, points)[0]
    # Block first, then within it: running sums over 150,000 tokens in float64 take 1 ms a row.
    blocks = F.pad(weights, (0, -vocab % _BLOCK)).view(len(weights), -1, _BLOCK)
    block, points = _locate(blocks.sum(dim=-1), points)
    inside, _ = _locate(blocks[torch.arange(len(block), device=block.device), block], points)
    return (block * _BLOCK + inside).clamp_(max=vocab - 1)


def _locate(weights: Tensor, points: Tensor) -> tuple[Tensor, Tensor]:
    """On which of the weights each row's point falls, and where within that, again in [0, 1)."""
    sizes = weights.double()
    ends = sizes.cumsum(dim=-1)
    at = points[:, None] * ends[:, -1:]
    # Never beyond the end, except in rows of NaN: those must not fail the others.
    index = torch.searchsorted(ends, at, right=True).clamp_(max=sizes.shape[1] - 1)
    size = sizes.gather(1, index)
    within = (at - (ends.gather(1, index) - size)) / size
    return index[:, 0], within[:, 0].clamp(0, 1 - 2.0**-40)


def _truncate(probabilities: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """Of each row `[rows, vocab]` keep the `top_k` most likely, of them the smallest set of mass `top_p`, and of
    those what has at least `min_p` times the best one's probability; the rest becomes 0. The best one stays. So do
    all that are as likely as the last one kept: which of them came first would depend on the rest of the batch."""
    vocab = probabilities.shape[1]
    limits = [p.top_k if 0 < p.top_k < vocab else vocab for p in params]
    # Sorting 150,000 tokens takes 12 ms a row, and what is kept hardly ever reaches beyond the first thousand.
    count = min(vocab, max(_MANY_TOKENS if limit == vocab else limit for limit in limits))
    values = probabilities.topk(count).values
    least = _least_kept(values, params, limits, vocab)
    reaches_end = (least == values[:, -1]).tolist()
    if further := [row for row, limit in enumerate(limits) if reaches_end[row] and count < limit]:
        values = probabilities[further].sort(descending=True).values
        least[further] = _least_kept(values, [params[row] for row in further], [vocab] * len(further), vocab)
    return probabilities.where(probabilities >= least[:, None], 0.0)


def _least_kept(values: Tensor, params: Sequence[SamplingParams], limits: Sequence[int], vocab: int) -> Tensor:
    """The smallest probability that each row keeps of `values [rows, count]`, its largest ones, best first.

    Args:
        limits: how many `top_k` leaves of each row's `vocab` tokens.
    """
    device, count = values.device, values.shape[1]
    top_k = torch.tensor([min(limit, count) for limit in limits], device=device)
    sums = values.cumsum(dim=-1)
    # Mass is counted anew after top_k; without one, all tokens have 1.
    top_p = torch.tensor([p.top_p if p.top_p < 1 else math.inf for p in params], device=device)
    limited = torch.tensor([limit < vocab for limit in limits], device=device)
    mass = torch.where(limited, top_p * sums.gather(1, top_k[:, None] - 1)[:, 0], top_p)
    min_p = torch.tensor([p.min_p for p in params], device=device)
    kept = torch.arange(count, device=device) < top_k[:, None]
    kept &= (sums - values < mass[:, None]) & (values >= min_p[:, None] * values[:, :1])
    return values.gather(1, kept.sum(dim=-1, keepdim=True).clamp_(min=1) - 1)[:, 0]


def _logprob(logits: Tensor, token: int, alternatives: int | None) -> TokenLogprob | None:
    if alternatives is None:
        return None
    logprobs = torch.log_softmax(logits, dim=-1)
    top: tuple[tuple[int, float], ...] = ()
    if alternatives:
        best = logprobs.topk(min(alternatives, len(logits)))
        top = tuple(zip(best.indices.tolist(), best.values.tolist(), strict=True))
    return TokenLogprob(token, float(logprobs[token]), top)
