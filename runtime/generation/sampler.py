"""Choosing the next token of every sequence of a batch from its logits.

In this order, which is vLLM's but for the last steps (there it is transformers'):

1. `logprobs` are reported of the raw logits, the model's own.
2. `logit_bias` is added.
3. `repetition_penalty`, then `frequency_penalty` and `presence_penalty` (OpenAI's formula).
4. What the grammar does not allow is banned, and before `min_tokens` all that would end the answer. Where that
   leaves nothing, the grammar wins: the answer may then be shorter than `min_tokens`.
5. `temperature` 0 takes the largest, the first of equals. Otherwise: `temperature`, `top_k`, `top_p`, `min_p`, and
   one random number.

Random numbers are keyed by (seed, position), and every row is computed as if it were alone, bit by bit: a
sequence's tokens depend neither on what else is in the batch nor on the number of threads, and a request resumed
elsewhere goes on with exactly the tokens it would have had.
"""

from __future__ import annotations

import hashlib
import math
from collections import defaultdict
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from ..requests import SamplingParams, TokenLogprob
from .chunks import row_slices
from .grammar import ban_all_but
from .logprobs import token_logprobs
from .penalties import add_bias, apply_penalties
from .sampling_state import SamplingState

_LEAST_TEMPERATURE = 1e-6  # below, float32 would divide by zero
_FEW_TOKENS, _MANY_TOKENS = 64, 1024
_BLOCK = 512


def sample(
    logits: Tensor, states: Sequence[SamplingState], positions: Sequence[int]
) -> tuple[list[int], list[TokenLogprob | None]]:
    """One token for every row. The states do not advance by it.

    Args:
        logits: `[rows, vocab]` float32; left as they are.
        positions: index of the token to be chosen, counted from the prompt's start.

    Returns:
        The token ids, and the log-probabilities of those rows whose parameters ask for them.
    """
    if any(state.params.temperature > 0 or state.alters_logits for state in states):
        tokens: list[int] = []
        for part in row_slices(logits):
            tokens += _choose(logits[part], states[part], positions[part])
    else:
        tokens = _largest(logits)
    return tokens, _logprobs(logits, tokens, states)


def _choose(logits: Tensor, states: Sequence[SamplingState], positions: Sequence[int]) -> list[int]:
    if any(state.alters_logits for state in states):
        logits = _altered(logits, states)
    drawn = [row for row, state in enumerate(states) if state.params.temperature > 0]
    if len(drawn) == len(states):
        return _draw(logits, [state.params for state in states], positions)
    tokens = _largest(logits)
    if drawn:
        params = [states[row].params for row in drawn]
        for row, token in zip(drawn, _draw(logits[drawn], params, [positions[row] for row in drawn]), strict=True):
            tokens[row] = token
    return tokens


def _altered(logits: Tensor, states: Sequence[SamplingState]) -> Tensor:
    """A copy with everything applied that comes before temperature."""
    altered = logits.clone(memory_format=torch.contiguous_format)
    if biased := [(row, state.bias) for row, state in enumerate(states) if state.bias is not None]:
        add_bias(altered, biased)
    if counted := [(row, state.counts) for row, state in enumerate(states) if state.counts is not None]:
        apply_penalties(altered, counted)
    for row, state in enumerate(states):
        if state.grammar is not None:
            ban_all_but(altered[row], state.grammar.allowed(without=state.banned))
        elif banned := state.banned:
            altered[row, list(banned)] = -math.inf
    return altered


def _largest(logits: Tensor) -> list[int]:
    """The first of each row's largest logits."""
    # On CPUs numpy's is seven times as fast as torch's.
    chosen = logits.numpy().argmax(axis=-1) if logits.is_cpu else logits.argmax(dim=-1)
    tokens: list[int] = chosen.tolist()
    return tokens


def _logprobs(logits: Tensor, tokens: Sequence[int], states: Sequence[SamplingState]) -> list[TokenLogprob | None]:
    reports: list[TokenLogprob | None] = [None] * len(states)
    rows_by_top: dict[int, list[int]] = defaultdict(list)
    for row, state in enumerate(states):
        if state.params.logprobs is not None:
            rows_by_top[state.params.logprobs].append(row)
    for top, rows in rows_by_top.items():
        wanted = logits if len(rows) == len(states) else logits[rows]
        for row, report in zip(rows, token_logprobs(wanted, [tokens[row] for row in rows], top), strict=True):
            reports[row] = report
    return reports


def _draw(logits: Tensor, params: Sequence[SamplingParams], positions: Sequence[int]) -> list[int]:
    points = [_uniform(p.seed, at) for p, at in zip(params, positions, strict=True)]
    probabilities = _probabilities(logits, params)
    tokens: list[int] = _token_at(
        probabilities, torch.tensor(points, dtype=torch.float64, device=logits.device)
    ).tolist()
    return tokens


def _probabilities(logits: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """What each row `[rows, vocab]` is drawn from; it adds up to 1 only where nothing is truncated."""
    temperatures = torch.tensor([max(p.temperature, _LEAST_TEMPERATURE) for p in params], device=logits.device)
    # The best at 0: however low the temperature, nothing overflows.
    scaled = (logits - logits.amax(dim=-1, keepdim=True)).div_(temperatures[:, None])
    probabilities = torch.softmax(scaled, dim=-1)
    cut = [row for row, p in enumerate(params) if p.top_k > 0 or p.top_p < 1 or p.min_p > 0]
    if len(cut) == len(params):
        return _truncate(probabilities, params)
    if cut:
        probabilities[cut] = _truncate(probabilities[cut], [params[row] for row in cut])
    return probabilities


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
    min_p = torch.tensor([p.min_p for p in params], device=probabilities.device)
    enough = min_p * probabilities.amax(dim=-1)
    least = enough.clone()
    undecided = [row for row, p in enumerate(params) if p.top_p < 1 or limits[row] < vocab]
    # Sorting 150,000 tokens takes 12 ms a row, and what is kept hardly ever reaches beyond the first few.
    for count in (_FEW_TOKENS, _MANY_TOKENS):
        rows = [row for row in undecided if limits[row] <= count or limits[row] == vocab]
        if rows and 4 * count <= vocab:
            part = probabilities if len(rows) == len(params) else probabilities[rows]
            values = part.topk(count).values
            found = _least_kept(values, [params[row] for row in rows], [limits[row] for row in rows], vocab)
            least[rows] = found
            at_end = dict(zip(rows, (found == values[:, -1]).tolist(), strict=True))
            undecided = [row for row in undecided if at_end.get(row, True) and limits[row] > count]
    if probabilities.is_cpu and vocab > _MANY_TOKENS:
        for row in undecided:
            least[row] = max(float(enough[row]), _least_of_many(probabilities[row].numpy(), params[row]))
    elif undecided:
        values = probabilities[undecided].sort(descending=True).values
        rows_params, rows_limits = [params[row] for row in undecided], [limits[row] for row in undecided]
        least[undecided] = _least_kept(values, rows_params, rows_limits, vocab)
    return probabilities.where(probabilities >= least[:, None], 0.0)


def _least_of_many(values: NDArray[np.float32], params: SamplingParams) -> float:
    """What `_least_kept` finds for one row `values [vocab]`, but for `min_p`; a twentieth of the time of a sort.

    The upper half of a positive float's bits is in the order of the values: histograms of it tell in which bucket
    the last one kept is, and only what is in there has to be sorted.
    """
    buckets = values.view(np.int32) >> 16 & 0x7FFF  # NaN may be negative
    counts, masses = np.bincount(buckets), np.bincount(buckets, weights=values)
    least, mass = 0.0, params.top_p if params.top_p < 1 else math.inf
    if 0 < params.top_k < len(values):
        bucket, inside = _reached(values, buckets, counts, params.top_k)
        inside = inside[: params.top_k - int(counts[bucket + 1 :].sum())]
        least = float(inside[-1])
        mass *= masses[bucket + 1 :].sum() + inside.sum(dtype=np.float64)
    bucket, inside = _reached(values, buckets, masses, mass)
    if len(inside):  # otherwise it is all, or NaN
        before = masses[bucket + 1 :].sum() + inside.cumsum(dtype=np.float64) - inside
        least = max(least, float(inside[max(1, int(np.count_nonzero(before < mass))) - 1]))
    return least


def _reached(
    values: NDArray[np.float32], buckets: NDArray[np.int32], sizes: NDArray[np.generic], wanted: float
) -> tuple[int, NDArray[np.float32]]:
    """The bucket in which the `sizes`, from the best one down, come to what is wanted, and its values, best first;
    -1 and none if they do not."""
    reached = sizes[::-1].cumsum() >= wanted
    bucket = len(sizes) - 1 - int(reached.argmax()) if reached.any() else -1
    return bucket, np.sort(values[buckets == bucket])[::-1]


def _least_kept(values: Tensor, params: Sequence[SamplingParams], limits: Sequence[int], vocab: int) -> Tensor:
    """The smallest probability that each row keeps of `values [rows, count]`, its largest ones, best first.

    Args:
        limits: how many `top_k` leaves of each row's `vocab` tokens; at most `count`, unless all.
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
