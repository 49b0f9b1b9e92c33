"""Which sequences advance, how far, and who is let in. Numbers in, decisions out."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pimoe.runtime.errors import ConfigurationError
from pimoe.runtime.generation.scheduler import EngineLimits, Generation, can_admit, plan_step
from pimoe.runtime.requests import GenerateRequest, SamplingParams


def generation(prompt: int, generated: int = 0, computed: int = 0, max_tokens: int = 8) -> Generation:
    request = GenerateRequest("r", tuple(range(prompt)), SamplingParams(max_tokens=max_tokens))
    return Generation(request, 0, 1e9, list(range(prompt + generated)), computed)


def plan(running: list[Generation], budget: int) -> list[tuple[int, int, bool]]:
    """(which of `running`, tokens, whether it samples)."""
    return [(running.index(item.generation), item.count, item.samples) for item in plan_step(running, budget)]


def test_a_generation_counts_its_tokens() -> None:
    fresh, decoding = generation(5), generation(5, generated=3, computed=7, max_tokens=4)
    assert (fresh.generated, fresh.pending, fresh.reserved_tokens) == (0, 5, 13)
    assert (decoding.generated, decoding.pending, decoding.reserved_tokens) == (3, 1, 9)


def test_everyone_who_decodes_advances_whatever_the_budget() -> None:
    running = [generation(5, 1, 5), generation(9), generation(4, 2, 5)]
    assert plan(running, 1) == [(0, 1, True), (1, 1, False), (2, 1, True)]


def test_a_long_prompt_comes_in_chunks_and_samples_with_its_last() -> None:
    sequence = generation(10)
    steps = []
    while sequence.computed < 10:
        ((_, count, samples),) = plan([sequence], 4)
        steps.append((count, samples))
        sequence.computed += count
    assert steps == [(4, False), (4, False), (2, True)]


def test_prompts_share_the_budget_in_order_of_admission() -> None:
    running = [generation(3), generation(6), generation(2)]
    assert plan(running, 5) == [(0, 3, True), (1, 2, False)]
    assert plan(running, 100) == [(0, 3, True), (1, 6, True), (2, 2, True)]


def test_nobody_running_makes_no_step() -> None:
    assert plan([], 5) == []


@given(
    states=st.lists(st.tuples(st.integers(1, 9), st.integers(0, 3), st.integers(0, 8)), max_size=6),
    budget=st.integers(1, 12),
)
def test_a_step_keeps_its_budget_and_always_advances(states: list[tuple[int, int, int]], budget: int) -> None:
    running = [generation(p, g, min(c, p + g - 1)) for p, g, c in states]
    items = plan_step(running, budget)
    assert len({id(item.generation) for item in items}) == len(items)
    assert sum(item.count for item in items if item.generation.pending > 1) <= budget
    assert all(1 <= item.count <= item.generation.pending for item in items)
    decoding = [sequence for sequence in running if sequence.pending == 1]
    assert all(any(item.generation is sequence for item in items) for sequence in decoding)
    assert bool(items) == bool(running)


def test_admission_is_bounded_by_sequences() -> None:
    limits = EngineLimits(max_sequences=2)
    assert can_admit([generation(5)], 10_000, limits)
    assert not can_admit([generation(5), generation(5)], 1, limits)


def test_admission_is_bounded_by_the_tokens_that_all_may_come_to() -> None:
    limits = EngineLimits(max_kv_tokens=30)
    running = [generation(5, max_tokens=8)]  # may come to 13
    assert can_admit(running, 17, limits)
    assert not can_admit(running, 18, limits)
    assert can_admit([], 30, limits)
    assert not can_admit([], 31, limits)


@pytest.mark.parametrize("name", ["max_sequences", "max_step_tokens", "max_context_tokens", "max_kv_tokens"])
@pytest.mark.parametrize("value", [0, -5])
def test_limits_must_be_positive(name: str, value: int) -> None:
    with pytest.raises(ConfigurationError, match=f"engine.{name} is {value}; it must be at least 1") as caught:
        EngineLimits(**{name: value})
    assert caught.value.param == name


@pytest.mark.parametrize("value", [-0.1, float("nan")])
def test_the_drain_time_must_not_be_negative(value: float) -> None:
    with pytest.raises(ConfigurationError, match="drain_s"):
        EngineLimits(drain_s=value)
