"""Choosing tokens: greedy, temperature, truncation, seeds by position, bans, and what is reported of it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pimoe.runtime.generation import chunks, sampler
from pimoe.runtime.requests import SamplingParams, TokenLogprob
from samplers import state, state_of
from torch import Tensor
from transformers import (
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

GREEDY = SamplingParams(temperature=0)


def sample(
    logits: Tensor,
    params: Sequence[SamplingParams],
    positions: Sequence[int],
    banned: Sequence[tuple[int, ...]] | None = None,
) -> tuple[list[int], list[TokenLogprob | None]]:
    """For rows without a history. What is `banned` would end an answer that has to go on."""
    bans = banned if banned is not None else [()] * len(params)
    states = [
        state_of(replace(row_params, min_tokens=1 if row_banned else 0), logits.shape[1], end_tokens=row_banned)
        for row_params, row_banned in zip(params, bans, strict=True)
    ]
    return sampler.sample(logits, states, positions)


def choose(logits: Tensor, params: SamplingParams, position: int = 0, banned: tuple[int, ...] = ()) -> int:
    """One token for one row."""
    tokens, _ = sample(logits[None], [params], [position], [banned])
    return tokens[0]


def draws(logits: Tensor, params: SamplingParams, count: int) -> Counter[int]:
    """The tokens of `count` positions."""
    tokens, _ = sample(logits.expand(count, -1), [params] * count, range(count))
    return Counter(tokens)


def log_of(*probabilities: float) -> Tensor:
    return torch.tensor(probabilities, dtype=torch.float64).log().float()


def logits_of(seed: int, rows: int = 1, vocab: int = 50) -> Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * 3


def test_temperature_zero_takes_the_most_likely() -> None:
    logits = logits_of(0, rows=5)
    assert sample(logits, [GREEDY] * 5, range(5))[0] == logits.argmax(dim=-1).tolist()


def test_greedy_and_drawn_rows_share_a_batch() -> None:
    logits = logits_of(1, rows=4)
    hot = SamplingParams(seed=3)
    tokens, _ = sample(logits, [GREEDY, hot, GREEDY, hot], [9, 9, 9, 2])
    assert tokens[0] == int(logits[0].argmax())
    assert tokens[2] == int(logits[2].argmax())
    assert tokens[1] == choose(logits[1], hot, 9)
    assert tokens[3] == choose(logits[3], hot, 2)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_tokens_come_as_often_as_the_temperature_says(temperature: float) -> None:
    logits = log_of(0.5, 0.3, 0.15, 0.05)
    count = 4000
    seen = draws(logits, SamplingParams(temperature=temperature, seed=5), count)
    for token, probability in enumerate(torch.softmax(logits / temperature, dim=-1).tolist()):
        spread = math.sqrt(probability * (1 - probability) / count)
        assert abs(seen[token] / count - probability) < 4 * spread


@pytest.mark.parametrize("temperature", [1e-3, 1e-6, 1e-30, 1e-300])
def test_a_tiny_temperature_is_greedy_and_never_nonsense(temperature: float) -> None:
    logits = log_of(0.2, 0.1, 0.69, 0.01)
    assert draws(logits, SamplingParams(temperature=temperature), 50) == {2: 50}
    assert draws(logits * 1e30, SamplingParams(temperature=temperature), 50) == {2: 50}


def test_a_huge_temperature_makes_all_alike() -> None:
    seen = draws(log_of(0.97, 0.01, 0.01, 0.01), SamplingParams(temperature=1e30), 2000)
    assert all(abs(seen[token] - 500) < 100 for token in range(4))


# Truncation: the tokens that can come are exactly these.

FIVE = log_of(0.4, 0.1, 0.25, 0.05, 0.2)  # best first: 0 2 4 1 3


@pytest.mark.parametrize(
    ("truncation", "kept"),
    [
        ({}, {0, 1, 2, 3, 4}),
        ({"top_k": 1}, {0}),
        ({"top_k": 3}, {0, 2, 4}),
        ({"top_k": 5}, {0, 1, 2, 3, 4}),
        ({"top_k": 99}, {0, 1, 2, 3, 4}),
        ({"top_p": 0.39}, {0}),
        ({"top_p": 0.41}, {0, 2}),
        ({"top_p": 0.84}, {0, 2, 4}),
        ({"top_p": 0.86}, {0, 1, 2, 4}),
        ({"top_p": 1e-9}, {0}),
        ({"min_p": 0.49}, {0, 2, 4}),
        ({"min_p": 0.51}, {0, 2}),
        ({"min_p": 1.0}, {0}),
        # After top_k the mass is counted anew: 0.4 and 0.25 of 0.85.
        ({"top_k": 3, "top_p": 0.76}, {0, 2}),
        ({"top_k": 3, "top_p": 0.77}, {0, 2, 4}),
        ({"top_k": 4, "min_p": 0.26}, {0, 2, 4}),
        ({"top_p": 0.7, "min_p": 0.6}, {0, 2}),
    ],
)
def test_truncation_keeps_exactly_these(truncation: dict[str, Any], kept: set[int]) -> None:
    seen = draws(FIVE, SamplingParams(seed=1, **truncation), 400)
    assert set(seen) == kept


def test_truncation_leaves_the_kept_ones_proportions() -> None:
    seen = draws(FIVE, SamplingParams(top_k=2, seed=2), 4000)
    assert abs(seen[0] / 4000 - 0.4 / 0.65) < 4 * math.sqrt(0.62 * 0.38 / 4000)


@pytest.mark.parametrize("truncation", [{"top_k": 2}, {"top_p": 0.45}, {"top_k": 3, "min_p": 0.5}])
def test_what_is_as_likely_as_the_last_one_kept_stays_too(truncation: dict[str, Any]) -> None:
    """Half precision makes ties; which of them stayed must not depend on the batch."""
    logits = torch.tensor([1.0, 0.5, 1.0, 1.0, -1.0])
    assert set(draws(logits, SamplingParams(seed=3, **truncation), 400)) == {0, 2, 3}


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 999), top_k=st.integers(0, 60), top_p=st.floats(0.05, 1.0), min_p=st.floats(0.0, 0.5))
def test_truncation_keeps_what_a_plain_reference_keeps(seed: int, top_k: int, top_p: float, min_p: float) -> None:
    logits = logits_of(seed)[0]
    order = logits.argsort(descending=True).tolist()
    kept = order[:top_k] if 0 < top_k < len(order) else order
    if top_p < 1:
        probabilities = torch.softmax(logits[kept].double(), dim=-1).tolist()
        mass, count = 0.0, 0
        while count < len(kept) and (count == 0 or mass < top_p - 1e-6):
            mass += probabilities[count]
            count += 1
        kept = kept[:count]
    allowed = {t for t in kept if logits[t] >= logits[kept[0]] + (math.log(min_p) if min_p else -math.inf) - 1e-5}
    params = SamplingParams(temperature=1.0, top_k=top_k, top_p=top_p, min_p=min_p, seed=seed)
    assert set(draws(logits, params, 60)) <= allowed


def test_a_large_vocabulary_is_drawn_from_in_proportion() -> None:
    """It is searched in blocks: both the blocks and what is in them must come as often as they should."""
    vocab, count = 3000, 6000
    weights = torch.arange(1.0, vocab + 1)
    weights[700:1300] = 0
    seen = draws(weights.log(), SamplingParams(seed=4), count)
    assert not [token for token in seen if 700 <= token < 1300]
    for first, last in ((0, 512), (512, 1024), (1024, 2000), (2000, 2048), (2048, 2990), (2990, 3000)):
        share = float(weights[first:last].sum() / weights.sum())
        came = sum(times for token, times in seen.items() if first <= token < last)
        assert abs(came - share * count) < 4 * math.sqrt(share * count) + 1


@pytest.mark.parametrize(
    ("truncation", "kept"),
    [
        ({"top_p": 0.8}, 2400),
        ({"min_p": 0.2}, 2400),
        ({"top_k": 2400}, 2400),
        ({"top_k": 3000, "top_p": 0.8}, 2400),
    ],
)
def test_truncation_may_keep_thousands(truncation: dict[str, Any], kept: int) -> None:
    """More than are looked at first; beside a row that keeps few, which must not notice."""
    logits = torch.zeros(2, 3000)
    logits[:, kept:] = -2.0 if "min_p" in truncation else -1e-4
    few = SamplingParams(seed=2, top_k=3)
    many = [SamplingParams(seed=seed, **truncation) for seed in range(2000)]
    tokens, _ = sample(logits[torch.tensor([0] * 2000 + [1])], [*many, few], [0] * 2001)
    assert max(tokens[:2000]) < kept
    assert len({token // 600 for token in tokens[:2000]}) == 4, "from all over what is kept"
    assert tokens[2000] == choose(logits[1], few)


def test_a_point_at_the_very_end_falls_on_the_last_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """And one at the very beginning on the first, neither on one that is impossible."""
    for vocab in (10, 3000):
        logits = torch.full((vocab,), -math.inf)
        logits[2:-2] = 0.0
        for point, token in ((0.0, 2), (1 - 2.0**-40, vocab - 3)):
            monkeypatch.setattr(sampler, "_uniform", lambda seed, position, point=point: point)
            assert choose(logits, SamplingParams()) == token


def test_a_row_of_nan_does_not_fail_the_others() -> None:
    for vocab in (10, 2000):
        logits = logits_of(3, rows=3, vocab=vocab)
        logits[1] = float("nan")
        params = [SamplingParams(seed=1), SamplingParams(seed=1, top_p=0.9), SamplingParams(seed=2, top_k=4)]
        tokens, _ = sample(logits, params, [5, 5, 5])
        assert tokens[0] == choose(logits[0], params[0], 5)
        assert tokens[2] == choose(logits[2], params[2], 5)
        assert 0 <= tokens[1] < vocab


# Seeds.


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**63 - 1), order=st.permutations(range(6)), vocab=st.sampled_from([3, 50, 513, 5000]))
def test_a_rows_token_depends_on_nothing_but_its_logits_seed_and_position(
    seed: int, order: list[int], vocab: int
) -> None:
    logits = logits_of(seed % 1000, rows=6, vocab=vocab)
    params = [SamplingParams(temperature=0.7 + row / 5, seed=seed - row if seed > 6 else row) for row in range(6)]
    params[4] = SamplingParams(temperature=1.3, top_p=0.9, top_k=20, seed=seed)
    alone = [choose(logits[row], params[row], 10 + row) for row in range(6)]
    tokens, _ = sample(logits[order], [params[r] for r in order], [10 + r for r in order])
    assert tokens == [alone[row] for row in order]


def test_each_position_and_each_seed_draws_anew() -> None:
    flat = torch.zeros(1000)
    by_position = [choose(flat, SamplingParams(seed=1), position) for position in range(20)]
    by_seed = [choose(flat, SamplingParams(seed=seed), 1) for seed in range(20)]
    assert len(set(by_position)) > 15
    assert len(set(by_seed)) > 15
    assert by_position == [choose(flat, SamplingParams(seed=1), position) for position in range(20)]


def test_seeds_and_positions_are_not_mixed_up() -> None:
    flat = torch.zeros(100_000)
    assert choose(flat, SamplingParams(seed=1), 23) != choose(flat, SamplingParams(seed=12), 3)
    assert choose(flat, SamplingParams(seed=2), 1) != choose(flat, SamplingParams(seed=1), 2)


@pytest.mark.parametrize("seed", [-1, 2**63, 2**64 - 1, -(2**70)])
def test_any_integer_is_a_seed(seed: int) -> None:
    assert 0 <= choose(torch.zeros(10), SamplingParams(seed=seed)) < 10


def test_sampling_leaves_torchs_own_generator_alone() -> None:
    before = torch.get_rng_state()
    choose(torch.zeros(10), SamplingParams(seed=1))
    assert torch.equal(before, torch.get_rng_state())


# Bans.


def test_banned_tokens_never_come() -> None:
    logits = log_of(0.9, 0.06, 0.04)
    assert choose(logits, GREEDY, banned=(0,)) == 1
    assert choose(logits, GREEDY, banned=(1, 0)) == 2
    tokens, _ = sample(logits.expand(200, -1), [SamplingParams()] * 200, range(200), [(0,)] * 200)
    assert set(tokens) == {1, 2}


def test_a_ban_is_one_rows_only_and_changes_no_logits() -> None:
    logits = log_of(0.9, 0.06, 0.04).expand(3, -1).contiguous()
    before = logits.clone()
    assert sample(logits, [GREEDY] * 3, [0] * 3, [(), (0,), ()])[0] == [0, 1, 0]
    assert torch.equal(logits, before)


# Log-probabilities.


def test_logprobs_are_the_models_own() -> None:
    logits = logits_of(4, rows=3)
    expected = torch.log_softmax(logits.double(), dim=-1)
    params = [
        SamplingParams(temperature=0, logprobs=0),
        SamplingParams(temperature=0.3, top_k=2, seed=1, logprobs=5),
        SamplingParams(temperature=0, logprobs=3),
    ]
    tokens, logprobs = sample(logits, params, [0, 1, 2], [(), (), (int(logits[2].argmax()),)])
    assert [item.token_id for item in logprobs if item is not None] == tokens
    for row, item in enumerate(logprobs):
        assert item is not None
        assert item.logprob == pytest.approx(float(expected[row, tokens[row]]), abs=1e-5)
        assert len(item.top) == params[row].logprobs
        best = expected[row].topk(len(item.top))
        assert [token for token, _ in item.top] == best.indices.tolist()
        assert [value for _, value in item.top] == pytest.approx(best.values.tolist(), abs=1e-5)
    banned_row = logprobs[2]
    assert banned_row is not None
    assert banned_row.top[0][0] != tokens[2], "a banned token is still the model's most likely one"
    assert all(math.isfinite(value) for _, value in banned_row.top)


def test_logprobs_come_only_where_asked_for_and_for_no_more_than_the_vocabulary() -> None:
    logits = logits_of(5, rows=2, vocab=4)
    _, logprobs = sample(logits, [GREEDY, SamplingParams(temperature=0, logprobs=20)], [0, 0])
    assert logprobs[0] is None
    assert logprobs[1] is not None
    assert len(logprobs[1].top) == 4


def test_no_rows_give_no_tokens() -> None:
    assert sample(torch.empty(0, 7), [], []) == ([], [])


# The order of things, and transformers as the oracle.


def transformers_keeps(logits: Tensor, params: SamplingParams) -> set[int]:
    """What is left by transformers' processors, in their order."""
    scores = TemperatureLogitsWarper(params.temperature)(torch.empty(1, 0), logits[None].double())
    if params.top_k:
        scores = TopKLogitsWarper(params.top_k)(torch.empty(1, 0), scores)
    if params.top_p < 1:
        scores = TopPLogitsWarper(params.top_p)(torch.empty(1, 0), scores)
    if params.min_p:
        scores = MinPLogitsWarper(params.min_p)(torch.empty(1, 0), scores)
    return set(torch.isfinite(scores[0]).nonzero()[:, 0].tolist())


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 9999),
    vocab=st.sampled_from([5, 60, 1500, 4000]),
    spread=st.sampled_from([0.02, 1.0, 4.0]),
    temperature=st.floats(0.2, 2.0),
    top_k=st.sampled_from([0, 1, 7, 64, 65, 1024, 1100, 3999]),
    top_p=st.sampled_from([1.0, 0.999, 0.9, 0.5, 0.01]),
    min_p=st.sampled_from([0.0, 0.02, 0.3]),
)
def test_what_is_kept_is_what_transformers_keep(
    seed: int, vocab: int, spread: float, temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    logits = logits_of(seed, vocab=vocab)[0] * spread
    params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    found = set(sampler._probabilities(logits[None], [params])[0].nonzero()[:, 0].tolist())
    possible = torch.softmax(logits.double() / temperature, dim=-1) > 1e-36  # in single precision
    expected = {token for token in transformers_keeps(logits, params) if possible[token]}
    found = {token for token in found if possible[token]}
    # In single and in double precision, and summed from either end, a boundary may fall one token further.
    doubtful = found ^ expected
    assert len(doubtful) <= (1 if top_p < 1 or min_p else 0) + vocab // 1000


def test_the_answer_may_not_end_before_min_tokens_as_with_transformers() -> None:
    logits = log_of(0.5, 0.3, 0.15, 0.05)
    oracle = MinNewTokensLengthLogitsProcessor(2, 3, [0, 2])
    for generated in range(4):
        params = SamplingParams(temperature=0, min_tokens=3, stop_token_ids=(2,))
        row = state_of(params, 4, prompt=(1, 1), emitted=(1,) * generated, end_tokens=(0,))
        tokens, _ = sampler.sample(logits[None], [row], [2 + generated])
        scores = oracle(torch.zeros(1, 2 + generated, dtype=torch.int64), logits[None])
        assert tokens == [int(scores.argmax())]
        assert tokens == [1 if generated < 3 else 0]


def test_penalties_come_after_biases_and_before_temperature() -> None:
    logits = torch.tensor([[1.0, 1.4, 0.0]])
    biased = state(3, prompt=(0,), logit_bias=((0, 1.0),), repetition_penalty=1.5)
    assert sampler.sample(logits, [biased], [1])[0] == [1], "(1 + 1) / 1.5 < 1.4"
    frequent = state(3, emitted=(1, 1), frequency_penalty=0.15, presence_penalty=0.15)
    assert sampler.sample(logits, [frequent], [1])[0] == [0], "1.4 - 2 * 0.15 - 0.15 < 1"
    cold = state_of(SamplingParams(temperature=0.001, presence_penalty=0.5), 3, emitted=(1,))
    assert sampler.sample(logits, [cold], [1])[0] == [0]


def test_reported_is_what_the_model_says_before_biases_and_penalties() -> None:
    logits = torch.tensor([[1.0, 1.4, 0.0]])
    row = state(3, emitted=(1,), logit_bias=((2, 50.0),), presence_penalty=2.0, logprobs=3)
    tokens, (report,) = sampler.sample(logits, [row], [1])
    expected = torch.log_softmax(logits[0], dim=-1).tolist()
    assert tokens == [2]
    assert report is not None
    assert report.rank == 3
    assert report.logprob == pytest.approx(expected[2])
    assert [token for token, _ in report.top] == [1, 0, 2]


# Alone and among others, bit by bit; whole and resumed.

varied = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.0, 0.7, 1.0, 1.5]),
    top_k=st.sampled_from([0, 0, 1, 5, 200]),
    top_p=st.sampled_from([1.0, 0.95, 0.5]),
    min_p=st.sampled_from([0.0, 0.1]),
    repetition_penalty=st.sampled_from([1.0, 1.2]),
    presence_penalty=st.sampled_from([0.0, 0.6]),
    frequency_penalty=st.sampled_from([0.0, -0.4]),
    logit_bias=st.sampled_from([(), ((1, 3.0), (0, -100.0))]),
    logprobs=st.sampled_from([None, None, 0, 2, 3]),
    min_tokens=st.sampled_from([0, 8]),
    stop_token_ids=st.sampled_from([(), (2,)]),
    seed=st.integers(0, 2**63 - 1),
)


class Toy:
    """A model whose logits follow from the last tokens, with a request and its state."""

    def __init__(self, params: SamplingParams, vocab: int, prompt: list[int], emitted: Sequence[int] = ()) -> None:
        self.vocab, self.tokens = vocab, [*prompt, *emitted]
        self.state = state_of(params, vocab, prompt=prompt, emitted=emitted, end_tokens=(1,))

    def logits(self) -> Tensor:
        return logits_of(hash(tuple(self.tokens[-3:])) % 10_000, vocab=self.vocab)


def advance(toys: Sequence[Toy]) -> list[TokenLogprob | None]:
    logits = torch.cat([toy.logits() for toy in toys])
    tokens, reports = sampler.sample(logits, [toy.state for toy in toys], [len(toy.tokens) for toy in toys])
    for toy, token in zip(toys, tokens, strict=True):
        toy.tokens.append(token)
        toy.state.advance(token)
    return reports


@settings(max_examples=40, deadline=None)
@given(
    rows=st.lists(varied, min_size=2, max_size=7),
    vocab=st.sampled_from([5, 258, 1300]),
    steps=st.integers(1, 12),
    chunk=st.sampled_from([1, 3000, 1 << 19]),
)
def test_every_row_is_alone_whatever_the_others_ask_for(
    rows: list[SamplingParams], vocab: int, steps: int, chunk: int
) -> None:
    """Tokens and reports, over many steps, however the rows are cut into pieces."""
    together, alone = ([Toy(params, vocab, [0, 1, row % 3]) for row, params in enumerate(rows)] for _ in range(2))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunks, "_CHUNK_ELEMENTS", chunk)
        reports = [advance(together) for _ in range(steps)]
    for row, toy in enumerate(alone):
        assert [advance([toy])[0] for _ in range(steps)] == [step[row] for step in reports]
        assert toy.tokens == together[row].tokens


@settings(max_examples=40, deadline=None)
@given(params=varied, other=varied, vocab=st.sampled_from([5, 258]), at=st.integers(0, 15))
def test_a_request_resumed_anywhere_goes_on_as_if_it_had_not_stopped(
    params: SamplingParams, other: SamplingParams, vocab: int, at: int
) -> None:
    whole = Toy(params, vocab, [3, 0, 4])
    for _ in range(16):
        advance([whole])
    resumed, neighbour = Toy(params, vocab, [3, 0, 4], whole.tokens[3 : 3 + at]), Toy(other, vocab, [1])
    for _ in range(16 - at):
        advance([neighbour, resumed])
    assert resumed.tokens == whole.tokens


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("vocab", [3, 17, 258, 513, 5000, 151_936])
def test_probabilities_have_the_same_bits_alone_and_among_others(vocab: int, threads: int) -> None:
    logits = logits_of(vocab, rows=8, vocab=vocab)
    cuts: list[dict[str, Any]] = [
        {},
        {"top_p": 0.95},
        {"top_k": 20},
        {"top_k": 2000, "top_p": 0.9},
        {"min_p": 0.05},
    ]
    params = [SamplingParams(temperature=0.5 + row / 4, **cuts[row % 5]) for row in range(8)]
    points = torch.rand(8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        together = sampler._probabilities(logits, params)
        tokens = sampler._token_at(together, points)
        torch.set_num_threads(1)
        for row in range(8):
            alone = sampler._probabilities(logits[row : row + 1], params[row : row + 1])
            assert torch.equal(alone[0], together[row])
            assert sampler._token_at(alone, points[row : row + 1])[0] == tokens[row]
    finally:
        torch.set_num_threads(before)


def test_rows_of_nan_are_harmless_however_many_tokens_they_may_keep() -> None:
    logits = logits_of(7, rows=3, vocab=5000)
    logits[1] = math.nan
    logits[2] = -math.nan
    params = [SamplingParams(top_k=2000), SamplingParams(top_k=2000), SamplingParams(top_p=0.9999, top_k=4000)]
    tokens, _ = sample(logits, params, [5, 5, 5])
    assert tokens[0] == choose(logits[0], params[0], 5)
    assert all(0 <= token < 5000 for token in tokens)


def test_the_first_of_equal_logits_is_taken() -> None:
    logits = torch.zeros(3, 5000)
    logits[1, [4999, 37]] = 1.0
    assert sample(logits, [GREEDY] * 3, range(3))[0] == [0, 37, 0]
    assert sample(logits, [GREEDY] * 3, range(3), [(0,), (37,), ()])[0] == [1, 4999, 0]
