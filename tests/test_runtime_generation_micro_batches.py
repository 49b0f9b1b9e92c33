"""When two micro-batches pay, by numbers; and that steps run as two give what steps run as one give."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from checkpoints import make_checkpoint
from engines import alone, make_engine, prompt_of, read, request
from hypothesis import given
from hypothesis import strategies as st
from pimoe.runtime.errors import ConfigurationError, UnavailableError
from pimoe.runtime.generation.limits import EngineLimits
from pimoe.runtime.generation.micro_batches import ForwardTimes, Line, MicroBatchModel, split_point


def one(tokens: int, trunk: float, experts: float, link: float) -> ForwardTimes:
    return ForwardTimes(tokens, trunk, experts, experts + link)


class Machine:
    """Takes (fixed, per token) seconds for trunk, experts and link; two micro-batches overlap as well as they
    can."""

    def __init__(
        self, trunk: tuple[float, float], experts: tuple[float, float], link: tuple[float, float]
    ) -> None:
        self.parts = trunk, experts, link

    def times(self, tokens: int) -> ForwardTimes:
        return one(tokens, *(fixed + slope * tokens for fixed, slope in self.parts))

    def one_s(self, tokens: int) -> float:
        times = self.times(tokens)
        return times.trunk_s + times.waited_s

    def two_s(self, tokens: int) -> float:
        half = self.times(tokens // 2)
        return max(2 * half.trunk_s, 2 * half.expert_s, half.trunk_s + half.waited_s)

    def step(self, model: MicroBatchModel, tokens: int, slower: float = 1.0) -> bool:
        """One step as the model decides."""
        if model.wants_two(tokens):
            half = self.times(tokens // 2)
            model.observe_two(half, half, self.two_s(tokens) * slower)
            return True
        model.observe_one(self.times(tokens))
        return False


BALANCED = Machine((1e-4, 1e-4), (1e-4, 1e-4), (1e-4, 0))
FIXED_COSTS = Machine((1e-2, 1e-6), (1e-2, 1e-6), (1e-4, 0))
ALL_TRUNK = Machine((1e-4, 1e-4), (1e-5, 1e-6), (1e-6, 0))
SLOW_LINK = Machine((1e-4, 1e-5), (1e-4, 1e-5), (5e-3, 1e-4))


@pytest.mark.parametrize(
    ("machine", "pays"), [(BALANCED, True), (SLOW_LINK, True), (FIXED_COSTS, False), (ALL_TRUNK, False)]
)
def test_it_finds_out_what_pays_although_the_batch_never_changes(machine: Machine, pays: bool) -> None:
    assert (machine.one_s(128) > 1.05 * machine.two_s(128)) == pays, "as the machine is"
    model = MicroBatchModel()
    for _ in range(400):
        machine.step(model, 128)
    decisions = [machine.step(model, 128) for _ in range(200)]
    assert 190 <= sum(decisions) < 200 if pays else sum(decisions) <= 10, "but for a probe now and then"
    statistics = model.statistics()
    assert statistics.single + statistics.double == 600
    if statistics.probes and not pays:  # while steps run as two, the line of the link is from before
        assert statistics.predicted_gain == pytest.approx(machine.one_s(128) / machine.two_s(128), rel=0.1)
    if pays:
        assert statistics.measured_gain == pytest.approx(machine.one_s(128) / machine.two_s(128), rel=0.1)


def test_probes_that_change_nothing_become_rare_and_cost_little() -> None:
    """A machine where lines do not rule it out that two pay, and a step run as two takes twice its time."""
    model = MicroBatchModel()
    doubles = sum(FIXED_COSTS.step(model, 128, slower=2.0) for _ in range(2000))
    assert 2 <= doubles <= 11
    lost_s = doubles * (2 * FIXED_COSTS.two_s(128) - FIXED_COSTS.one_s(128))
    assert lost_s < 0.01 * 2000 * FIXED_COSTS.one_s(128)


def test_a_machine_that_changes_is_noticed_although_probes_have_become_rare() -> None:
    """Also when what is known of the link is from before, since steps that run as two do not tell of it."""
    model = MicroBatchModel()
    for _ in range(2):
        for _ in range(1000):
            FIXED_COSTS.step(model, 128, slower=2.0)
        assert sum(FIXED_COSTS.step(model, 128, slower=2.0) for _ in range(100)) <= 2
        for _ in range(600):
            SLOW_LINK.step(model, 128)
        assert sum(SLOW_LINK.step(model, 128) for _ in range(100)) >= 98


def test_sizes_are_probed_on_their_own() -> None:
    """Decode steps that have long settled must not keep the first prefill steps from being tried."""
    model = MicroBatchModel()
    for _ in range(1000):
        BALANCED.step(model, 16)
    probes = model.statistics().probes
    for _ in range(33):
        BALANCED.step(model, 512)
    assert model.statistics().probes == probes + 1


def test_what_two_really_take_corrects_what_was_expected() -> None:
    """Cores that both micro-batches want: the times say that it pays, and it does not."""
    model = MicroBatchModel()
    doubles = [BALANCED.step(model, 128, slower=2.5) for _ in range(1000)]
    assert any(doubles)
    assert sum(doubles[500:]) < 50
    assert model.statistics().measured_gain < 1


def test_experts_in_this_thread_are_never_worth_it_and_policies_are_obeyed() -> None:
    in_thread = MicroBatchModel(overlaps=False)
    assert not any(BALANCED.step(in_thread, 128) for _ in range(200))
    assert MicroBatchModel("always").wants_two(2)
    never = MicroBatchModel("never")
    assert not any(BALANCED.step(never, 128) for _ in range(200))


def test_two_replicas_of_the_groups_compute_both_halves_at_once() -> None:
    experts_bound = Machine((1e-5, 1e-6), (5e-3, 1e-5), (1e-5, 0))
    for parallelism, pays in ((1, False), (2, False)):
        model = MicroBatchModel(parallelism=parallelism)
        for _ in range(400):
            experts_bound.step(model, 128)
        assert (sum(experts_bound.step(model, 128) for _ in range(30)) > 5) == pays
    model = MicroBatchModel(parallelism=2)
    linear = Machine((1e-5, 1e-6), (0, 1e-4), (1e-5, 0))
    for tokens in (32, 64, 128) * 60:
        model.observe_one(linear.times(tokens))
    assert model.wants_two(128)


def test_a_line_learns_fixed_cost_and_slope_and_forgets() -> None:
    line = Line()
    assert line.at(100) == 0
    line.observe(64, 2.0)
    assert line.at(10) == line.at(1000) == 2.0, "of one size only it is flat"
    for tokens in (10, 20, 40, 80) * 100:
        line.observe(tokens, 1.0 + 0.5 * tokens)
    assert line.at(100) == pytest.approx(51, rel=0.01)
    assert line.at(0) == pytest.approx(1, abs=0.1)


@given(st.lists(st.integers(1, 600), min_size=2, max_size=40))
def test_the_split_is_as_even_as_any_and_leaves_something_on_both_sides(counts: list[int]) -> None:
    point = split_point(counts)
    assert 1 <= point < len(counts)
    difference = abs(sum(counts[:point]) - sum(counts[point:]))
    assert difference == min(abs(sum(counts[:i]) - sum(counts[i:])) for i in range(1, len(counts)))


def test_a_policy_that_does_not_exist_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="micro_batches"):
        EngineLimits(micro_batches="sometimes")  # type: ignore[arg-type]


# In the engine.


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint("qwen2_moe", tmp_path_factory.mktemp("checkpoint"))


REQUESTS = [request(prompt_of(length, length), 16) for length in (30, 4, 1, 17, 60, 9)]


@pytest.mark.parametrize("options", [{}, {"max_step_tokens": 7}, {"kv_blocks": 16, "block_tokens": 8}])
async def test_steps_in_two_give_the_same_tokens(folder: Path, options: dict[str, Any]) -> None:
    engine = make_engine(folder, groups=2, micro_batches="always", **options)
    engine.start()
    answers = await asyncio.gather(*(read(engine.generate(asked)) for asked in REQUESTS))
    statistics = engine.statistics().micro_batches
    await engine.close()
    for asked, answer in zip(REQUESTS, answers, strict=True):
        assert answer.tokens == (await alone(folder, asked)).tokens
    assert statistics.double > 8


async def test_a_failure_of_one_half_fails_the_step_and_leaves_nothing_running(folder: Path) -> None:
    engine = make_engine(folder, micro_batches="always")
    (group,) = engine.dispatcher.groups
    assert hasattr(group, "failures")
    engine.start()
    group.failures = [UnavailableError("gone")]
    answers = await asyncio.gather(*(read(engine.generate(asked)) for asked in REQUESTS[:2]))
    assert all(isinstance(answer.error, UnavailableError) for answer in answers)
    assert not engine.statistics().kv_blocks.held
    again = await read(engine.generate(REQUESTS[0]))
    assert again.tokens == (await alone(folder, REQUESTS[0])).tokens
    await engine.close()
