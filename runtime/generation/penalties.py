"""What changes single logits before anything is chosen: `logit_bias`, and the penalties on tokens that were there.

Both touch few tokens of a vocabulary of 150,000, so they are kept sparse: a step reads and writes only these, of
many rows in one operation. Every entry is computed by itself; nothing depends on what else is in the batch.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..requests import SamplingParams

_FIRST_CAPACITY = 64


class LogitBias:
    """What a request adds to the logits of some tokens.

    Args:
        entries: (token id, bias); no token twice.
    """

    __slots__ = ("bias", "tokens")

    def __init__(self, entries: Sequence[tuple[int, float]]) -> None:
        self.tokens = np.array([token for token, _ in entries], dtype=np.int64)
        self.bias = np.array([bias for _, bias in entries], dtype=np.float32)


class TokenCounts:
    """The distinct tokens that a request's penalties apply to, and how often each was generated.

    Args:
        prompt: counted 0 times; only `repetition_penalty` looks at it.
        generated: the tokens generated so far.
    """

    __slots__ = ("_counts", "_places", "_tokens", "params")

    def __init__(self, params: SamplingParams, prompt: Sequence[int], generated: Sequence[int]) -> None:
        self.params = params
        known = np.unique(np.array(prompt if params.repetition_penalty != 1.0 else (), dtype=np.int64))
        self._places = {token: place for place, token in enumerate(known.tolist())}
        self._tokens = np.concatenate([known, np.empty(_FIRST_CAPACITY, dtype=np.int64)])
        self._counts = np.zeros(len(self._tokens))
        for token in generated:
            self.add(token)

    def add(self, token: int) -> None:
        """One more `token` was generated."""
        place = self._places.setdefault(token, len(self._places))
        if place == len(self._tokens):
            self._tokens = np.concatenate([self._tokens, np.empty_like(self._tokens)])
            self._counts = np.concatenate([self._counts, np.zeros_like(self._counts)])
        self._tokens[place] = token
        self._counts[place] += 1

    @property
    def tokens(self) -> NDArray[np.int64]:
        """The distinct tokens `[distinct]`."""
        return self._tokens[: len(self._places)]

    @property
    def subtrahends(self) -> NDArray[np.float64]:
        """What presence and frequency penalty take off each of `tokens`: as in OpenAI's formula."""
        counts = self._counts[: len(self._places)]
        return self.params.frequency_penalty * counts + self.params.presence_penalty * (counts > 0)


def add_bias(logits: Tensor, biased: Sequence[tuple[int, LogitBias]]) -> None:
    """Add each (row, bias) to `logits [rows, vocab]`, in place."""
    places = _places(logits, [(row, bias.tokens) for row, bias in biased])
    flat = logits.view(-1)
    flat[places] += torch.from_numpy(np.concatenate([bias.bias for _, bias in biased])).to(logits.device)


def apply_penalties(logits: Tensor, counted: Sequence[tuple[int, TokenCounts]]) -> None:
    """Penalise each (row, counts) of `logits [rows, vocab]`, in place: `repetition_penalty` divides what is
    positive and multiplies the rest (Keskar et al., arXiv 1909.05858); then the other two are subtracted."""
    places = _places(logits, [(row, counts.tokens) for row, counts in counted])
    lengths = [len(counts.tokens) for _, counts in counted]
    factors = np.repeat([counts.params.repetition_penalty for _, counts in counted], lengths)
    factor = torch.from_numpy(factors.astype(np.float32)).to(logits.device)
    subtrahends = np.concatenate([counts.subtrahends for _, counts in counted]).astype(np.float32)
    flat = logits.view(-1)
    values = flat[places]
    values = torch.where(values > 0, values / factor, values * factor)
    flat[places] = values - torch.from_numpy(subtrahends).to(logits.device)


def _places(logits: Tensor, tokens: Sequence[tuple[int, NDArray[np.int64]]]) -> Tensor:
    """Where (row, tokens) lie in the flattened logits."""
    vocab = logits.shape[1]
    return torch.from_numpy(np.concatenate([row * vocab + ids for row, ids in tokens])).to(logits.device)
