"""Penalties and biases: against plain references over the whole vocabulary, and transformers' processor."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pimoe.runtime.generation.penalties import LogitBias, TokenCounts, add_bias, apply_penalties
from pimoe.runtime.requests import SamplingParams
from torch import Tensor
from transformers import RepetitionPenaltyLogitsProcessor

VOCAB = 30


def logits_of(seed: int, rows: int = 1) -> Tensor:
    return torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(seed)) * 3


def penalised(
    logits: Tensor, params: SamplingParams, prompt: Sequence[int], generated: Sequence[int]
) -> list[float]:
    """The formulas, token by token, in double precision."""
    counts, found = Counter(generated), []
    for token, logit in enumerate(logits.tolist()):
        if token in counts or token in prompt:
            logit = logit / params.repetition_penalty if logit > 0 else logit * params.repetition_penalty
        found.append(
            logit
            - params.frequency_penalty * counts[token]
            - params.presence_penalty * (1 if counts[token] else 0)
        )
    return found


tokens = st.lists(st.integers(0, VOCAB - 1), max_size=40)
histories = st.tuples(
    st.sampled_from([1.0, 0.5, 1.3, 10.0]), st.floats(-2, 2), st.sampled_from([0.0, 0.7, -1.5]), tokens, tokens
)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 999), rows=st.lists(histories, min_size=1, max_size=5))
def test_penalties_are_those_of_the_formulas(
    seed: int, rows: list[tuple[float, float, float, list[int], list[int]]]
) -> None:
    logits, counted, expected = logits_of(seed, len(rows)), [], []
    for row, (repetition, presence, frequency, prompt, generated) in enumerate(rows):
        params = SamplingParams(
            repetition_penalty=repetition, presence_penalty=presence, frequency_penalty=frequency
        )
        counted.append((row, TokenCounts(params, prompt, generated)))
        expected.append(penalised(logits[row], params, prompt, generated))
    apply_penalties(logits, counted)
    torch.testing.assert_close(logits.double(), torch.tensor(expected, dtype=torch.float64), rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("penalty", [0.3, 1.7])
def test_the_repetition_penalty_is_transformers(penalty: float) -> None:
    logits, prompt, generated = logits_of(1), [3, 4, 4, 29], [0, 3, 7]
    expected = RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor([prompt + generated]), logits.clone())
    counts = TokenCounts(SamplingParams(repetition_penalty=penalty), prompt, generated)
    apply_penalties(logits, [(0, counts)])
    torch.testing.assert_close(logits, expected)


def test_only_the_repetition_penalty_looks_at_the_prompt() -> None:
    logits = logits_of(2)
    before = logits.clone()
    counts = TokenCounts(SamplingParams(presence_penalty=2, frequency_penalty=2), [1, 2, 3], [])
    apply_penalties(logits, [(0, counts)])
    assert torch.equal(logits, before)


@settings(max_examples=30, deadline=None)
@given(prompt=tokens, generated=st.lists(st.integers(0, 500), max_size=300), repetition=st.sampled_from([1, 1.2]))
def test_counts_grow_with_the_answer(prompt: list[int], generated: list[int], repetition: float) -> None:
    """One token after the other, past every capacity, is as all at once."""
    params = SamplingParams(repetition_penalty=repetition, frequency_penalty=1.0)
    counts = TokenCounts(params, prompt, [])
    for token in generated:
        counts.add(token)
    whole = TokenCounts(params, prompt, generated)
    found = dict(zip(counts.tokens.tolist(), counts.subtrahends.tolist(), strict=True))
    known = set(generated) | (set(prompt) if repetition != 1.0 else set())
    assert found == {token: Counter(generated)[token] for token in known}
    assert found == dict(zip(whole.tokens.tolist(), whole.subtrahends.tolist(), strict=True))


def test_a_row_keeps_its_bits_whatever_is_penalised_beside_it() -> None:
    params = SamplingParams(repetition_penalty=1.37, presence_penalty=0.21, frequency_penalty=0.13)
    counts = TokenCounts(params, [1, 5, 9], [2, 2, 5])
    alone = logits_of(3)
    others = torch.cat([logits_of(4, 3), alone, logits_of(5)])
    busy = TokenCounts(SamplingParams(repetition_penalty=3.0), range(20), range(10, 30))
    apply_penalties(others, [(0, busy), (3, counts), (4, busy)])
    apply_penalties(alone, [(0, counts)])
    assert torch.equal(others[3], alone[0])


def test_what_is_impossible_stays_so() -> None:
    logits = torch.full((1, VOCAB), -math.inf)
    params = SamplingParams(repetition_penalty=0.5, presence_penalty=-2, frequency_penalty=-2)
    apply_penalties(logits, [(0, TokenCounts(params, range(VOCAB), [1, 1, 2]))])
    assert torch.equal(logits, torch.full((1, VOCAB), -math.inf))


def test_biases_are_added_to_their_rows_tokens_only() -> None:
    logits = logits_of(6, 3)
    expected = logits.clone()
    expected[0, 3] += 100
    expected[2, 3] -= 0.5
    expected[2, 29] += 7
    add_bias(logits, [(0, LogitBias([(3, 100.0)])), (2, LogitBias([(29, 7.0), (3, -0.5)]))])
    assert torch.equal(logits, expected)
