"""How long batches take: what is learnt, from what, and how soon it is forgotten."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pimoe.runtime.batching import LatencyModel
from pimoe.runtime.batching.latency import AimdLimit

FIXED_S, PER_TOKEN_S, PER_ROW_S = 2e-3, 3e-5, 6e-5
Rows = Callable[[int, random.Random], int]


def independent(tokens: int, chance: random.Random) -> int:
    return chance.randint(max(1, tokens // 8), tokens)


def all_of_them(tokens: int, chance: random.Random) -> int:
    return tokens


def half_of_them(tokens: int, chance: random.Random) -> int:
    return max(1, tokens // 2)


def seconds(tokens: float, rows: float) -> float:
    return FIXED_S + PER_TOKEN_S * tokens + PER_ROW_S * rows


def learn(
    model: LatencyModel,
    batches: int = 300,
    sizes: tuple[int, int] = (1, 4096),
    rows: Rows = independent,
    noise: float = 0.05,
    slowness: float = 1.0,
    seed: int = 0,
) -> LatencyModel:
    chance = random.Random(seed)
    for _ in range(batches):
        tokens = chance.randint(*sizes)
        largest = rows(tokens, chance)
        model.observe(tokens, largest, max(1e-6, seconds(tokens, largest) * slowness * chance.gauss(1.0, noise)))
    return model


def test_nothing_is_said_before_anything_was_seen() -> None:
    model = LatencyModel()
    assert (model.trusted, model.error, model.mean_s) == (False, 1.0, 0.0)
    assert (model.predict_s(100), model.least_s(100), model.tokens_within(1.0)) == (0.0, 0.0, math.inf)
    learn(model, 7, noise=0.0)
    assert not model.trusted
    assert model.predict_s(100) == 0.0


@pytest.mark.parametrize(
    ("rows", "share"),
    [(independent, 9 / 16), (all_of_them, 1.0), (half_of_them, 0.5)],
    ids=[
        "independent",
        "all",
        "half",
    ],
)
@pytest.mark.parametrize("sizes", [(1, 4096), (1, 32), (1000, 4096)], ids=str)
def test_known_coefficients_are_recovered_through_noise(rows: Rows, share: float, sizes: tuple[int, int]) -> None:
    model = learn(LatencyModel(4096), sizes=sizes, rows=rows)
    assert model.trusted
    visible = 0.02 * seconds(sizes[1], share * sizes[1])  # noise is in proportion: it hides what is less
    for tokens in (sizes[0], sum(sizes) // 2, sizes[1]):
        expected = seconds(tokens, share * tokens)
        assert model.predict_s(tokens) == pytest.approx(expected, rel=0.25, abs=visible)
    middle = sum(sizes) // 2
    assert model.fixed_s + model.per_token_s * middle == model.predict_s(middle)


def test_without_noise_it_is_exact() -> None:
    model = learn(LatencyModel(4096), noise=0.0)
    assert model.fixed_s == pytest.approx(FIXED_S, rel=0.01)
    share = (model.per_token_s - PER_TOKEN_S) / PER_ROW_S
    assert 1 / 8 < share < 1.0  # of the rows, which are no part of the question, it knows only the lately usual
    assert model.error < 0.01


@pytest.mark.parametrize("scale", [1, 64, 1024, 4096, 2**20])
def test_small_batches_are_learnt_however_large_ones_may_be(scale: int) -> None:
    model = learn(LatencyModel(scale), sizes=(1, 16), rows=half_of_them, noise=0.01)
    assert model.per_token_s == pytest.approx(PER_TOKEN_S + PER_ROW_S / 2, rel=0.2)


@pytest.mark.parametrize("rows", [all_of_them, half_of_them])
def test_tokens_and_rows_that_go_together_leave_it_bounded(rows: Rows) -> None:
    model = LatencyModel(4096)
    for seed in range(20):
        learn(model, 200, rows=rows, seed=seed)
        for tokens in (300, 1000, 3800):
            expected = seconds(tokens, rows(tokens, random.Random(0)))
            assert model.predict_s(tokens) == pytest.approx(expected, rel=0.1, abs=0.02 * seconds(4096, 4096))
        assert max(map(abs, model._theta)) < 10 * PER_ROW_S * 4096


def test_batches_of_one_size_leave_it_bounded() -> None:
    model = learn(LatencyModel(4096), 2000, sizes=(100, 100), rows=half_of_them)
    assert model.predict_s(100) == pytest.approx(seconds(100, 50), rel=0.1)
    assert model.predict_s(4096) == model.predict_s(1) == model.predict_s(100)
    assert (model.least_s(99), model.least_s(4096)) == (0.0, model.least_s(100))


def test_beyond_the_sizes_that_were_seen_it_knows_nothing() -> None:
    model = learn(LatencyModel(4096), 40, sizes=(100, 200))
    assert model.predict_s(1) == model.predict_s(model._smallest) > 0  # type: ignore[arg-type]
    assert model.predict_s(4096) == model.predict_s(200)
    assert 0 < model.least_s(4096) < model.predict_s(4096)
    assert model.least_s(99) == 0.0


def test_sizes_are_forgotten_a_window_after_they_were_seen_last() -> None:
    model = learn(LatencyModel(4096), 64, sizes=(1, 4096), noise=0.0)
    wide = model.predict_s(4096)
    learn(model, 64, sizes=(1000, 1010), noise=0.0)
    assert model.predict_s(4096) == pytest.approx(wide, rel=0.2)  # still known
    learn(model, 64, sizes=(1000, 1010), noise=0.0)
    assert model.predict_s(4096) == model.predict_s(1010) < wide / 2
    assert model.predict_s(1) == model.predict_s(1000)


def test_the_least_is_two_deviations_below_the_expectation() -> None:
    model = learn(LatencyModel(4096), noise=0.2)
    assert model.least_s(2000) == model.predict_s(2000) - 2 * model.deviation_s
    assert model.least_s(10) == 0.0  # no time is negative


def test_no_rows_at_all_divide_by_nothing() -> None:
    model = LatencyModel()
    for n in range(1, 3000):
        model.observe(n % 7, 0, 0.001 * (1 + n % 7))
    assert model.predict_s(5) == pytest.approx(0.006, rel=0.05)


def test_rows_that_cease_divide_by_nothing() -> None:
    model = learn(LatencyModel(), 50)
    for n in range(60_000):  # until what was seen of them has decayed to less than a float holds
        model.observe(1 + n % 7, 0, 0.001 * (2 + n % 7))
    assert model.predict_s(6) == pytest.approx(0.007, rel=0.05)


@pytest.mark.parametrize("slowness", [5.0, 0.2])
def test_a_change_of_speed_is_learnt_and_the_old_forgotten(slowness: float) -> None:
    model = learn(learn(LatencyModel(4096)), 400, slowness=slowness, seed=1)
    assert model.trusted
    for tokens in (100, 1000, 4096):
        assert model.predict_s(tokens) == pytest.approx(slowness * seconds(tokens, tokens * 9 / 16), rel=0.25)


@pytest.mark.parametrize("times", [100.0, 0.01])
def test_one_outlier_does_not_wreck_what_is_trusted(times: float) -> None:
    model = learn(LatencyModel(4096))
    before = {tokens: model.predict_s(tokens) for tokens in (10, 1000, 4096)}
    least = model.least_s(4096)
    model.observe(1000, 500, times * model.predict_s(1000))
    assert model.trusted
    for tokens, predicted in before.items():
        assert model.predict_s(tokens) == pytest.approx(predicted, rel=0.2, abs=2 * FIXED_S)
    assert model.least_s(4096) > 0.5 * least


def test_what_cannot_be_predicted_is_not_trusted() -> None:
    chance = random.Random(5)
    model = LatencyModel(1024)
    trusted = 0
    for _ in range(1000):
        tokens = chance.randint(1, 1024)
        model.observe(tokens, tokens, 10 ** chance.uniform(-5, 1))
        trusted += model.trusted
    assert trusted < 50
    learn(model, 400, (1, 1024), slowness=1.0)
    assert model.trusted  # and is again, once it can be


def test_batches_that_get_faster_with_size_have_no_negative_slope() -> None:
    model = LatencyModel(1024)
    for tokens in range(1, 1000):
        model.observe(tokens, tokens, 0.2 - 0.0001 * tokens)
    assert model.per_token_s == 0.0
    assert model.tokens_within(0.001) == math.inf


@given(st.integers(0, 2**32), st.floats(0, 0.5), st.sampled_from([independent, all_of_them, half_of_them]))
def test_what_is_said_is_consistent(seed: int, noise: float, rows: Rows) -> None:
    model = learn(LatencyModel(2048), 40, (1, 2048), rows, noise, seed=seed)
    assert model.fixed_s >= 0
    assert model.per_token_s >= 0
    previous = 0.0
    for tokens in (0, 1, 10, 1000, 100_000):
        predicted = model.predict_s(tokens)
        assert 0 <= model.least_s(tokens) <= predicted
        assert predicted >= previous
        previous = predicted
        if model.trusted and model.per_token_s > 0:
            within = min(max(tokens, model._smallest), model._sizes[1])
            assert model.tokens_within(predicted) == pytest.approx(within, rel=1e-6, abs=1e-3)
    assert model.tokens_within(0.0) == (0.0 if model.trusted and model.per_token_s > 0 else math.inf)


@given(
    st.lists(
        st.tuples(st.integers(1, 10**6), st.floats(0, 1), st.floats(0, 1e6)),
        min_size=1,
        max_size=60,
    ),
    st.integers(0, 10**6),
)
def test_it_stays_finite_whatever_it_sees(batches: list[tuple[int, float, float]], scale: int) -> None:
    model = LatencyModel(scale)
    for tokens, share, took_s in batches:
        model.observe(tokens, int(share * tokens), took_s)
        assert all(map(math.isfinite, (model.fixed_s, model.per_token_s, model.mean_s, model.predict_s(tokens))))
        assert math.isfinite(model.least_s(tokens))
        assert 0 <= model.error <= 1


def test_the_mean_is_of_the_latest() -> None:
    model = LatencyModel()
    model.observe(1, 1, 3.0)
    assert model.mean_s == 3.0
    for _ in range(200):
        model.observe(1, 1, 1.0)
    assert model.mean_s == pytest.approx(1.0)


def test_the_snapshot_is_plain() -> None:
    model = learn(LatencyModel(4096))
    snapshot = json.loads(json.dumps(model.snapshot()))
    assert snapshot["trusted"] is True
    assert snapshot["samples"] == model.samples == 300
    assert snapshot["per_token_s"] == model.per_token_s


# The bound for where the model does not fit


def test_the_bound_is_halved_by_what_is_late_and_grows_back_by_steps() -> None:
    limit = AimdLimit()
    assert limit.tokens(1, 1600) == 1600
    limit.observe(False)
    assert limit.tokens(1, 1600) == 800
    limit.observe(False)
    assert limit.tokens(1, 1600) == 400
    sizes = []
    for _ in range(14):
        limit.observe(True)
        sizes.append(limit.tokens(1, 1600))
    assert sizes == [*range(500, 1600, 100), 1600, 1600, 1600]


@given(st.lists(st.booleans(), max_size=100), st.integers(1, 100), st.integers(0, 10_000))
def test_the_bound_stays_in_its_range(met: list[bool], low: int, more: int) -> None:
    limit = AimdLimit()
    for each in met:
        limit.observe(each)
    assert low <= limit.tokens(low, low + more) <= low + more


def test_the_bound_comes_back_after_any_trouble() -> None:
    limit = AimdLimit()
    for _ in range(10_000):
        limit.observe(False)
    assert limit.tokens(1, 4096) == 1
    for _ in range(17):
        limit.observe(True)
    assert limit.tokens(1, 4096) == 4096
