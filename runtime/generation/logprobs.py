"""Reporting log-probabilities: the model's own, of its raw logits, before anything that sampling does to them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ..requests import TokenLogprob
from .chunks import row_slices


def token_logprobs(logits: Tensor, tokens: Sequence[int], top: int) -> list[TokenLogprob]:
    """The log-probability and rank of one token of every row.

    Args:
        logits: `[rows, vocab]` float32, as the model gave them.
        tokens: `tokens[i]` is the one to report of row i.
        top: how many of the most likely tokens to report with it, best first; all, where the vocabulary has fewer.
    """
    reports: list[TokenLogprob] = []
    for part in row_slices(logits):
        reports += _report(logits[part], tokens[part], min(top, logits.shape[1]))
    return reports


def prompt_logprobs(logits: Tensor, tokens: Sequence[int], top: int) -> list[TokenLogprob]:
    """The same for tokens of a prompt: `tokens[i]` is what row i of `logits [rows, vocab]` predicts."""
    return token_logprobs(logits, tokens, top)


def _report(logits: Tensor, tokens: Sequence[int], top: int) -> list[TokenLogprob]:
    # Row by row inside torch, whatever the number of rows; `logsumexp` would split a single row among threads.
    logprobs = torch.log_softmax(logits.contiguous(), dim=-1)
    chosen = torch.tensor(tokens, device=logits.device)[:, None]
    values = logprobs.gather(1, chosen)[:, 0].tolist()
    ranks = _ranks(logits, logits.gather(1, chosen))
    # Of the logits: where two of them differ by less than the rounding of their logarithms, they still differ.
    best = logits.topk(top).indices
    alternatives, best_values = best.tolist(), logprobs.gather(1, best).tolist()
    return [
        TokenLogprob(token, value, tuple(zip(ids, of_ids, strict=True)), rank)
        for token, value, ids, of_ids, rank in zip(tokens, values, alternatives, best_values, ranks, strict=True)
    ]


def _ranks(logits: Tensor, chosen: Tensor) -> list[int]:
    """1 and how many logits of each row exceed its `chosen [rows, 1]` one."""
    above = logits > chosen
    if logits.is_cpu:  # ten times as fast as torch's count of booleans
        counts: list[int] = np.count_nonzero(above.numpy(), axis=-1).tolist()
    else:
        counts = above.sum(dim=-1).tolist()
    return [1 + count for count in counts]
