"""Who runs, how far each advances, and who makes room: numbers in, decisions out.

The last part drives the scheduler with a model of dictionaries, thousands of times, and holds it to what the
engine promises: every sequence ends once, with the tokens that it has alone, and gives back every block.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pimoe.runtime.errors import ConfigurationError
from pimoe.runtime.generation.block_pool import BlockPool
from pimoe.runtime.generation.limits import EngineLimits
from pimoe.runtime.generation.scheduler import Generation, Scheduler, StepItem, share_prefill
from pimoe.runtime.requests import GenerateRequest, SamplingParams, TokenLogprob

BLOCK = 4


def generation(
    prompt: int | Sequence[int],
    *,
    rank: int = 2,
    key: float = 0.0,
    number: int = 0,
    max_tokens: int = 8,
    emitted: Sequence[int] = (),
    prompt_logprobs: int | None = None,
    tenant: str = "",
    cache_salt: str = "",
) -> Generation:
    tokens = tuple(range(prompt)) if isinstance(prompt, int) else tuple(prompt)
    params = SamplingParams(max_tokens=max_tokens, prompt_logprobs=prompt_logprobs)
    request = GenerateRequest("r", tokens, params, emitted=tuple(emitted), tenant=tenant, cache_salt=cache_salt)
    return Generation(request, rank, key, number, 1e9, [*tokens, *emitted])


def scheduler(blocks: int = 100, block_tokens: int = BLOCK, reuse: bool = True, **limits: int) -> Scheduler:
    return Scheduler(BlockPool(blocks, block_tokens, reuse), EngineLimits(**limits))


def step(of: Scheduler) -> list[StepItem]:
    """One step that goes well; everyone who samples gets a 7."""
    items = of.plan()
    of.take_fresh()
    of.advance(items)
    for item in items:
        if item.generation.wants_prompt_logprobs:
            done = min(item.generation.computed + 1, len(item.generation.request.prompt_token_ids))
            item.generation.prompt_logprobs = [None] * done
        if item.samples:
            item.generation.tokens.append(7)
    return items


def counts(items: Sequence[StepItem], generations: Sequence[Generation]) -> list[tuple[int, int, bool]]:
    """(which of `generations`, tokens, whether it samples)."""
    return [(generations.index(item.generation), item.count, item.samples) for item in items]


def held(of: Scheduler) -> int:
    return of.pool.statistics().held


# A generation.


def test_a_generation_counts_its_tokens() -> None:
    fresh, resumed = generation(5), generation(5, emitted=[9, 9])
    assert (fresh.generated, fresh.pending) == (0, 5)
    assert (resumed.generated, resumed.pending) == (2, 7)
    resumed.computed = 6
    assert resumed.pending == 1


def test_the_most_important_comes_first_in_order() -> None:
    by_class = generation(1, rank=4, key=9.0, number=9)
    by_key = generation(1, rank=2, key=1.0, number=8)
    by_number = generation(1, rank=2, key=2.0, number=1)
    last = generation(1, rank=2, key=2.0, number=2)
    lowest = generation(1, rank=0, key=0.0, number=0)
    ordered = sorted([last, lowest, by_number, by_key, by_class], key=lambda g: g.order)
    assert ordered == [by_class, by_key, by_number, last, lowest]


# Equal prompts at the same time.


@pytest.mark.parametrize("budget", [6, 400])
def test_who_begins_alike_at_the_same_time_is_computed_once(budget: int) -> None:
    of = scheduler(max_step_tokens=budget)
    crowd = [generation([*range(21), 50 + number], number=number) for number in range(4)]
    for each in crowd:
        assert of.admit(each)
    computed = 0
    while any(each.pending > 1 for each in crowd):
        computed += sum(item.count for item in step(of) if item.generation.pending != 1 or item.count > 1)
        assert computed < 100, "it does not end"
    assert [each.cached_tokens for each in crowd] == [0, 20, 20, 20]
    assert len({tuple(each.blocks[:5]) for each in crowd}) == 1, "they share the blocks"
    assert held(of) == 5 + 4
    statistics = of.pool.statistics()
    assert (statistics.prefix_query_tokens, statistics.prefix_hit_tokens) == (4 * 22, 3 * 20)
    for each in crowd:
        of.remove(each)
    assert held(of) == 0


def test_nobody_waits_for_who_left() -> None:
    of = scheduler(max_step_tokens=8)
    first, second = generation(40, number=0), generation(40, number=1)
    assert of.admit(first)
    assert of.admit(second)
    assert counts(step(of), [first, second]) == [(0, 8, False)]
    of.remove(first)
    assert counts(step(of), [first, second]) == [(1, 8, False)]
    assert second.cached_tokens == 8


def test_what_is_known_need_not_be_computed() -> None:
    of = scheduler()
    first = generation(21)
    assert of.to_compute(first) == 21
    assert of.admit(first)
    step(of)
    assert of.to_compute(generation([*range(17), 90, 91])) == 3
    assert of.to_compute(generation(21, tenant="another")) == 21
    assert of.to_compute(generation(21, prompt_logprobs=0)) == 21
    assert scheduler(reuse=False).to_compute(generation(21)) == 21


def test_without_reuse_nobody_waits_for_equal_prompts() -> None:
    of = scheduler(reuse=False)
    crowd = [generation(21, number=number) for number in range(3)]
    for each in crowd:
        assert of.admit(each)
    assert counts(step(of), crowd) == [(0, 21, True), (1, 21, True), (2, 21, True)]


def test_prompts_of_other_salts_do_not_wait_for_each_other() -> None:
    of = scheduler()
    crowd = [generation(21, number=number, cache_salt=str(number)) for number in range(3)]
    for each in crowd:
        assert of.admit(each)
    assert sorted(counts(step(of), crowd)) == [(0, 21, True), (1, 21, True), (2, 21, True)]


# Sharing the budget.


def test_half_of_the_budget_goes_to_the_shortest_and_the_rest_to_the_first() -> None:
    assert share_prefill([100, 10, 20], 40) == [20, 10, 10]
    assert share_prefill([100, 3, 4], 40) == [33, 3, 4]
    assert share_prefill([5, 6, 2], 100) == [5, 6, 2]
    assert share_prefill([], 10) == []


def test_with_one_token_a_step_the_first_still_gets_on() -> None:
    assert share_prefill([9, 1, 1], 1) == [1, 0, 0]


@given(st.lists(st.integers(0, 40), max_size=8), st.integers(1, 60))
def test_a_share_keeps_the_budget_and_wastes_none(pending: list[int], budget: int) -> None:
    shares = share_prefill(pending, budget)
    assert all(0 <= share <= wanted for share, wanted in zip(shares, pending, strict=True))
    assert sum(shares) == min(budget, sum(pending))
    if pending and pending[0]:
        assert shares[0] > 0, "the first never waits for the shorter ones"


# Planning.


def test_everyone_who_decodes_advances_whatever_the_budget() -> None:
    of = scheduler(max_step_tokens=4)
    sequences = [generation(3, number=n) for n in range(6)]
    for sequence in sequences:
        assert of.admit(sequence)
    while any(sequence.pending > 1 for sequence in sequences):
        step(of)
    late = generation(9, number=9)
    assert of.admit(late)
    items = of.plan()
    assert counts(items[:6], sequences) == [(n, 1, True) for n in range(6)]
    assert [(item.generation, item.count) for item in items[6:]] == [(late, 1)], "prompts go on beside them"


def test_a_long_prompt_comes_in_chunks_and_samples_with_its_last() -> None:
    of, sequence = scheduler(max_step_tokens=4), generation(10)
    of.admit(sequence)
    planned = [(items[0].count, items[0].samples, items[0].outputs) for items in (step(of), step(of), step(of))]
    assert planned == [(4, False, 0), (4, False, 0), (2, True, 1)]
    assert (sequence.pending, sequence.generated) == (1, 1)


def test_a_prompt_of_a_low_class_is_not_held_up_for_ever_by_higher_ones() -> None:
    of = scheduler(blocks=1000, max_step_tokens=8, max_sequences=4)
    low = generation(200, rank=0, key=0.0)
    of.admit(low)
    for number in range(1, 400):
        other = generation(range(number, number + 30), rank=4, key=float(number), number=number)
        of.admit(other)
        step(of)
        for done in [g for g in of.running if g.generated]:
            of.remove(done)
        if low not in of.running:
            return
    pytest.fail("newcomers of a higher class took all of the budget")


def test_nobody_running_makes_no_step() -> None:
    assert scheduler().plan() == []


def test_prompt_logprobs_come_in_small_chunks_for_all_together() -> None:
    of = scheduler(max_step_tokens=512)
    asking = [generation(100, number=n, key=float(n), prompt_logprobs=0) for n in (0, 1)]
    other = generation(range(100, 200), number=2, key=2.0)
    for sequence in (*asking, other):
        of.admit(sequence)
    steps = [step(of) for _ in range(4)]
    assert counts(steps[0], [*asking, other]) == [(0, 64, False), (2, 100, True)]
    for items in steps:
        noting = [item for item in items if item.generation in asking and item.count > 1]
        assert all(item.outputs == item.count for item in noting)
        assert sum(item.outputs for item in noting) <= 64
    assert all(sequence.generated for sequence in asking)


# Admission.


def test_admission_is_bounded_by_seats() -> None:
    of = scheduler(max_sequences=2)
    assert of.has_seat(2)
    assert of.admit(generation(5, number=0))
    assert of.admit(generation(5, number=1))
    assert not of.has_seat(2)
    assert not of.admit(generation(1, number=2))
    assert of.preemptions == 0


def test_admission_leaves_a_block_for_each_that_runs() -> None:
    of = scheduler(blocks=6, max_sequences=9)
    assert of.admit(generation(range(0, 8)))
    assert not of.admit(
        generation(range(50, 66)),
    ), "4 of 4 are left, and one may be needed"
    assert of.admit(generation(range(50, 62)))
    assert held(of) == 5


@pytest.mark.parametrize("block_tokens", [1, 3, 4])
def test_a_sequence_can_fill_the_whole_cache_alone(block_tokens: int) -> None:
    of = scheduler(blocks=5, block_tokens=block_tokens)
    whole = 5 * block_tokens
    sequence = generation(whole - 1, max_tokens=1)
    assert of.admit(sequence)
    assert step(of)[0].samples
    of.remove(sequence)
    growing = generation(range(50, 51), max_tokens=whole - 1)
    assert of.admit(growing)
    while growing.generated < growing.request.sampling.max_tokens:
        assert len(step(of)) == 1
    assert of.preemptions == 0
    of.remove(growing)
    assert held(of) == 0


def test_a_longer_prompt_does_not_fit_and_costs_nothing() -> None:
    of = scheduler(blocks=4)
    newcomer = generation(17)
    assert not of.admit(newcomer)
    assert (newcomer.blocks, held(of), of.running) == ([], 0, [])


# Taking over from a lower class.


def test_a_higher_class_takes_the_seat_of_the_least_important() -> None:
    of = scheduler(max_sequences=3)
    lower = [generation(4, rank=rank, key=key, number=n) for n, (rank, key) in enumerate([(1, 5), (0, 1), (0, 2)])]
    for sequence in lower:
        assert of.admit(sequence)
    urgent = generation(4, rank=3, key=9.0, number=9)
    assert of.has_seat(3)
    assert of.admit(urgent)
    assert of.preempted == [lower[2]], "the lowest class, and in it the last"
    assert (lower[2].blocks, lower[2].computed) == ([], 0)
    assert of.running == [lower[0], lower[1], urgent]


def test_nobody_takes_the_seat_of_its_own_class() -> None:
    of = scheduler(max_sequences=1)
    of.admit(generation(4, rank=2, key=5.0))
    assert not of.has_seat(2)
    assert not of.admit(generation(4, rank=2, key=1.0, number=1))


def test_who_gave_way_once_need_not_again() -> None:
    of = scheduler(max_sequences=1)
    low, first, second = generation(4, rank=0), generation(4, rank=4, number=1), generation(4, rank=4, number=2)
    of.admit(low)
    assert of.admit(first)
    of.remove(first)
    assert of.first_preempted() is low
    assert of.admit(low)
    assert not of.has_seat(4)
    assert not of.admit(second)
    assert (of.running, of.preemptions) == ([low], 1)


def test_a_higher_class_takes_as_many_blocks_as_it_needs_and_no_more() -> None:
    of = scheduler(blocks=12, max_sequences=9)
    lower = [generation(range(100 * n, 100 * n + 12), rank=0, key=float(n), number=n) for n in range(3)]
    for sequence in lower:
        assert of.admit(sequence)
    assert of.admit(generation(range(900, 912), rank=3, number=9))
    assert of.preempted == [lower[2]]
    assert held(of) == 9


def test_nobody_is_given_up_in_vain() -> None:
    """Of a lower class are blocks for a part of what the newcomer needs: they stay with whom they do good."""
    of = scheduler(blocks=12, max_sequences=9)
    same = generation(range(0, 24), rank=3)
    low = generation(range(100, 108), rank=0, number=1)
    assert of.admit(same)
    assert of.admit(low)
    assert not of.admit(generation(range(200, 232), rank=3, number=2))
    assert (of.running, of.preempted, of.preemptions) == ([same, low], [], 0)
    assert not low.gave_way


def test_shared_blocks_are_not_counted_as_room() -> None:
    of = scheduler(blocks=6, max_sequences=9)
    first = generation(range(0, 16), rank=3)
    of.admit(first)
    step(of)
    sharing = generation([*range(0, 12), 99], rank=0, number=1)
    assert of.admit(sharing)
    assert sharing.computed == 12
    assert held(of) == 5
    # Of the sharing one's four blocks three stay with the first.
    assert not of.admit(generation(range(200, 208), rank=2, number=2))
    assert of.running == [first, sharing]
    assert of.admit(generation(range(200, 204), rank=2, number=3))
    assert of.preempted == [sharing]


def test_blocks_found_with_the_victim_are_taken_over() -> None:
    of = scheduler(blocks=5, max_sequences=9)
    low = generation(range(0, 16), rank=0)
    of.admit(low)
    step(of)
    heir = generation(range(0, 20), rank=3, number=1)
    assert of.admit(heir)
    assert heir.cached_tokens == 16
    assert of.preempted == [low]


# Out of blocks.


def grow_until_preempted(of: Scheduler) -> None:
    for _ in range(100):
        if of.preempted:
            return
        step(of)
    pytest.fail("nobody had to give way")


def test_out_of_blocks_the_least_important_gives_way() -> None:
    of = scheduler(blocks=5, max_sequences=9)
    sequences = [
        generation([50 + n], rank=rank, key=key, number=n)
        for n, (rank, key) in enumerate([(1, 0.0), (3, 5.0), (1, 7.0)])
    ]
    for sequence in sequences:
        assert of.admit(sequence)
    grow_until_preempted(of)
    assert of.preempted == [sequences[2]], "of the lowest class the last"
    assert of.preemptions == 1
    assert sequences[2].tokens == [52, *[7] * sequences[2].generated]
    assert not sequences[2].gave_way, "who is out of blocks may still make room for others later"
    assert of.running == sequences[:2]


def test_who_needs_a_block_and_is_the_least_important_gives_its_own_up() -> None:
    of = scheduler(blocks=4, max_sequences=9)
    urgent = generation([1, 1, 1], rank=3, key=1.0)
    patient = generation([2, 2, 2, 2, 2], rank=3, key=2.0, number=1)
    assert of.admit(urgent)
    assert of.admit(patient)
    grow_until_preempted(of)
    assert of.running == [urgent]
    assert of.first_preempted() is patient
    for _ in range(3):
        assert not of.admit(patient), "it would only be in the way again"
        step(of)
    of.remove(urgent)
    assert of.admit(patient)


def test_the_most_important_of_the_preempted_goes_on_first() -> None:
    of = scheduler(max_sequences=2)
    lower = [generation(4, rank=0, key=2.0), generation(4, rank=1, key=5.0, number=1)]
    for sequence in lower:
        of.admit(sequence)
    for number in (2, 3):
        assert of.admit(generation(4, rank=4, number=number))
    assert of.preempted == [lower[0], lower[1]]
    assert of.first_preempted() is lower[1]
    assert scheduler().first_preempted() is None


# Reuse of prefixes.


def test_a_known_beginning_is_not_computed_again() -> None:
    of = scheduler()
    first = generation(10)
    of.admit(first)
    step(of)
    of.remove(first)
    second = generation([*range(9), 77, 78])
    assert of.admit(second)
    assert second.cached_tokens == second.computed == 8
    assert step(of)[0].count == 3
    assert of.pool.statistics()[4:6] == (21, 8)


def test_at_least_one_token_is_computed() -> None:
    """The last token's logits are needed, whatever is known of it."""
    of = scheduler()
    for number, cached in enumerate((0, 4)):
        sequence = generation(8, number=number)
        of.admit(sequence)
        assert sequence.cached_tokens == cached
        assert step(of)[0].samples
        of.remove(sequence)


def test_what_is_not_computed_yet_is_not_found() -> None:
    of = scheduler(max_step_tokens=4)
    first, second = generation(12), generation(12, number=1)
    of.admit(first)
    of.plan()
    of.admit(second)
    assert second.cached_tokens == 0
    step(of)
    third = generation(12, number=2)
    of.admit(third)
    assert third.cached_tokens == first.computed == 4 - 4 % BLOCK


def test_a_step_that_failed_publishes_nothing() -> None:
    of = scheduler()
    failing = generation(12)
    of.admit(failing)
    of.plan()
    of.remove(failing)
    second = generation(12, number=1)
    of.admit(second)
    assert second.cached_tokens == 0


def test_generated_tokens_are_found_by_who_continues_them() -> None:
    of = scheduler()
    first = generation(6)
    of.admit(first)
    for _ in range(7):
        step(of)
    assert first.tokens == [*range(6), *[7] * 7]
    of.remove(first)
    second = generation(first.tokens)
    of.admit(second)
    assert second.cached_tokens == 12, "the last token of the first was never computed"


def test_the_token_that_is_not_computed_yet_fills_no_block() -> None:
    of = scheduler()
    first = generation(7)
    of.admit(first)
    step(of)
    assert (len(first.tokens), first.computed) == (8, 7)
    second = generation([*first.tokens, 1], number=1)
    of.admit(second)
    assert second.cached_tokens == 4


def test_what_goes_on_takes_what_is_left_of_it() -> None:
    of = scheduler(max_sequences=1)
    low = generation(10, rank=0)
    of.admit(low)
    step(of)
    step(of)
    urgent = generation([50], rank=4, number=1)
    of.admit(urgent)
    of.remove(urgent)
    assert of.admit(low)
    assert (low.computed, low.cached_tokens) == (8, 0), "cached when it first ran, it was not"
    assert of.pool.statistics().prefix_query_tokens == 10 + 1, "nobody looked it up again"


def test_resuming_counts_only_the_prompt_as_cached() -> None:
    of = scheduler()
    first = generation(8)
    of.admit(first)
    for _ in range(6):
        step(of)
    of.remove(first)
    resumed = generation(8, emitted=[7] * 5)
    of.admit(resumed)
    assert (resumed.computed, resumed.cached_tokens) == (12, 8)


@pytest.mark.parametrize("other", [{"tenant": "b"}, {"cache_salt": "s"}])
def test_tenants_and_salts_share_nothing(other: dict[str, str]) -> None:
    of = scheduler()
    first = generation(12)
    of.admit(first)
    step(of)
    second = generation(12, number=1, **other)
    of.admit(second)
    assert second.cached_tokens == 0
    step(of)
    of.remove(second)
    third = generation(12, number=2, **other)
    of.admit(third)
    assert third.cached_tokens == 8


def test_who_wants_prompt_logprobs_computes_the_prompt() -> None:
    of = scheduler()
    first = generation(12)
    of.admit(first)
    step(of)
    asking = generation(12, number=1, prompt_logprobs=1)
    of.admit(asking)
    assert asking.cached_tokens == 0
    (item,) = [item for item in step(of) if item.generation is asking]
    assert (item.count, item.outputs) == (12, 12)
    assert not asking.wants_prompt_logprobs


def test_nothing_is_reused_where_that_is_switched_off() -> None:
    of = scheduler(reuse=False)
    for number in (0, 1):
        sequence = generation(12, number=number)
        of.admit(sequence)
        assert sequence.cached_tokens == 0
        step(of)
        of.remove(sequence)
    assert of.pool.statistics()[1:4] == (100, 0, 0)


def test_what_was_distrusted_is_computed_again() -> None:
    of = scheduler()
    wrong = generation(12)
    of.admit(wrong)
    step(of)
    of.distrust(wrong)
    of.remove(wrong)
    second = generation(12, number=1)
    of.admit(second)
    assert second.cached_tokens == 0


def test_new_blocks_are_to_be_cleared_and_found_ones_are_not() -> None:
    of = scheduler()
    first = generation(10)
    of.admit(first)
    assert of.take_fresh() == first.blocks
    assert of.take_fresh() == []
    step(of)
    second = generation(10, number=1)
    of.admit(second)
    assert second.blocks[:2] == first.blocks[:2]
    assert of.take_fresh() == second.blocks[2:]


# Limits.


@pytest.mark.parametrize(
    "name", ["max_sequences", "max_step_tokens", "max_context_tokens", "block_tokens", "kv_blocks"]
)
@pytest.mark.parametrize("value", [0, -5])
def test_limits_must_be_positive(name: str, value: int) -> None:
    with pytest.raises(ConfigurationError, match=f"engine.{name} is {value}; it must be at least 1") as caught:
        EngineLimits(**{name: value})
    assert caught.value.param == name


@pytest.mark.parametrize("value", [0.0, -0.1, 1.1, float("nan")])
def test_the_memory_fraction_is_a_fraction(value: float) -> None:
    with pytest.raises(ConfigurationError, match="must be above 0 and at most 1") as caught:
        EngineLimits(kv_memory_fraction=value)
    assert caught.value.param == "kv_memory_fraction"


@pytest.mark.parametrize("value", [-0.1, float("nan")])
def test_the_drain_time_must_not_be_negative(value: float) -> None:
    with pytest.raises(ConfigurationError, match="drain_s"):
        EngineLimits(drain_s=value)


def test_micro_batches_are_one_of_three() -> None:
    with pytest.raises(ConfigurationError, match="must be one of") as caught:
        EngineLimits(micro_batches="often")  # type: ignore[arg-type]
    assert caught.value.param == "micro_batches"


# Everything at once, with a model of dictionaries.

VOCAB = 3


@dataclass(frozen=True)
class Visitor:
    """A request, when it comes, after how many of its steps it leaves (None: never) and whether in the middle of
    one."""

    prompt: tuple[int, ...]
    max_tokens: int
    rank: int
    patience: int
    arrival: int
    leaves_after: int | None = None
    leaves_during: bool = False
    prompt_logprobs: bool = False
    salt: str = ""


@dataclass(frozen=True)
class Scenario:
    visitors: tuple[Visitor, ...]
    blocks: int
    block_tokens: int
    max_sequences: int
    max_step_tokens: int
    reuse: bool
    failing_steps: frozenset[int]


def next_token(states: Sequence[int]) -> int:
    """What the model says after a sequence: it depends on everything that the cache holds of it."""
    return hash(tuple(states)) // 7 % VOCAB


def state_of(salt: str, states: Sequence[int], token: int) -> int:
    """What the model keeps of a token: it depends on all before it, as keys and values do."""
    return hash((ord(salt[0]) if salt else 0, states[-1] if states else 0, len(states), token))


def tokens_alone(visitor: Visitor) -> list[int]:
    states: list[int] = []
    for token in visitor.prompt:
        states.append(state_of(visitor.salt, states, token))
    tokens: list[int] = []
    while len(tokens) < visitor.max_tokens:
        tokens.append(next_token(states))
        states.append(state_of(visitor.salt, states, tokens[-1]))
    return tokens


@dataclass(eq=False)
class Outcome:
    visitor: Visitor
    tokens: list[int] = field(default_factory=list)
    ended: list[str] = field(default_factory=list)
    noted: list[tuple[int, int]] = field(default_factory=list)
    steps: int = 0


class World:
    """An engine without tensors and time: the same order of things as in `Engine.step`."""

    def __init__(self, scenario: Scenario) -> None:
        self.scenario = scenario
        limits = EngineLimits(max_sequences=scenario.max_sequences, max_step_tokens=scenario.max_step_tokens)
        self.scheduler = Scheduler(BlockPool(scenario.blocks, scenario.block_tokens, scenario.reuse), limits)
        self.cache: dict[tuple[int, int], int] = {}
        self.outcomes = [Outcome(visitor) for visitor in scenario.visitors]
        self.coming = sorted(self.outcomes, key=lambda outcome: outcome.visitor.arrival)
        self.waiting: list[Generation] = []
        self.of: dict[Generation, Outcome] = {}
        self.steps = self.cached_tokens = 0

    def run(self) -> None:
        patience = 200 + 60 * sum(len(o.visitor.prompt) + o.visitor.max_tokens for o in self.outcomes)
        while self.coming or self.waiting or self.of:
            self.tick()
            assert self.steps < patience, "nobody gets on"

    def tick(self) -> None:
        now = self.steps
        while self.coming and self.coming[0].visitor.arrival <= now:
            self.arrive(self.coming.pop(0), now)
        for gone in [g for g, outcome in self.of.items() if g.finished]:
            if gone not in self.waiting:
                self.scheduler.remove(gone)
            self.waiting = [g for g in self.waiting if g is not gone]
            del self.of[gone]
        self.admit()
        items = self.scheduler.plan()
        self.check(items)
        self.steps += 1
        if items:
            self.compute(items, fails=now in self.scenario.failing_steps)

    def arrive(self, outcome: Outcome, now: int) -> None:
        visitor = outcome.visitor
        sequence = generation(
            visitor.prompt,
            rank=visitor.rank,
            key=float(now + visitor.patience),
            number=self.outcomes.index(outcome),
            max_tokens=visitor.max_tokens,
            prompt_logprobs=0 if visitor.prompt_logprobs else None,
            cache_salt=visitor.salt,
        )
        self.of[sequence] = outcome
        self.waiting.append(sequence)
        self.waiting.sort(key=lambda g: (g.key, g.number))

    def admit(self) -> None:
        while True:
            back, item = self.scheduler.first_preempted(), self.waiting[0] if self.waiting else None
            if back is not None and (item is None or back.rank >= item.rank or back.key <= item.key):
                if not self.scheduler.admit(back):
                    return
            elif item is None or not self.scheduler.admit(item):
                return
            else:
                self.waiting.remove(item)

    def check(self, items: Sequence[StepItem]) -> None:
        """What must hold of every plan."""
        running, pool = self.scheduler.running, self.scheduler.pool
        assert len(running) <= self.scenario.max_sequences
        assert len({id(item.generation) for item in items}) == len(items)
        assert all(item.generation in running for item in items)
        assert all(1 <= item.count <= item.generation.pending for item in items)
        assert bool(items) == bool(running) == bool(self.of), "where there is work, something advances"
        decoding = [g for g in running if g.pending == 1]
        assert all(any(item.generation is g for item in items) for g in decoding)
        prefill = sum(item.count for item in items if item.generation.pending > 1)
        assert prefill <= max(1, self.scenario.max_step_tokens // 4, self.scenario.max_step_tokens - len(decoding))
        for item in items:
            places = len(item.generation.blocks) * self.scenario.block_tokens
            assert item.generation.computed + item.count <= places
        assert pool.statistics().held == len({block for g in running for block in g.blocks})
        assert not any(g.blocks or g.computed for g in self.scheduler.preempted)

    def compute(self, items: Sequence[StepItem], fails: bool) -> None:
        for block in self.scheduler.take_fresh():
            for place in range(self.scenario.block_tokens):
                self.cache.pop((block, place), None)
        sampled = [self.forward(item) for item in items]
        leaving = self.who_leaves(items, during=True)
        for sequence in leaving:
            sequence.finished = True
        if fails:
            for item in items:
                self.end(item.generation, "failed")
            return
        for item in items:
            self.note(item)
        self.scheduler.advance(items)
        for item, token in zip(items, sampled, strict=True):
            self.of[item.generation].steps += 1
            if item.samples and not item.generation.finished:
                self.append(item.generation, token)
        for sequence in self.who_leaves(items, during=False):
            sequence.finished = True

    def forward(self, item: StepItem) -> int:
        """Writes what the model keeps of the step's tokens, and reads all that it kept of the sequence."""
        sequence, size = item.generation, self.scenario.block_tokens
        salt = sequence.request.cache_salt
        rows = [(sequence.blocks[at // size], at % size) for at in range(sequence.computed + item.count)]
        states = [self.cache[row] for row in rows[: sequence.computed]]
        for row in rows[sequence.computed :]:
            states.append(state_of(salt, states, sequence.tokens[len(states)]))
            self.cache[row] = states[-1]
        behind = range(len(rows), len(sequence.blocks) * size)
        left = [at for at in behind if (sequence.blocks[at // size], at % size) in self.cache]
        assert not left, "of a former owner nothing is left behind the end"
        return next_token(states)

    def note(self, item: StepItem) -> None:
        sequence, outcome = item.generation, self.of[item.generation]
        if not sequence.wants_prompt_logprobs:
            assert item.outputs == int(item.samples)
            return
        assert item.outputs == item.count
        if not sequence.prompt_logprobs:
            sequence.prompt_logprobs.append(None)
        first = len(sequence.prompt_logprobs)
        stop = min(sequence.computed + item.count + 1, len(sequence.request.prompt_token_ids))
        assert first >= sequence.computed + 1 or first == stop, "no row is missing"
        for at in range(first, stop):
            sequence.prompt_logprobs.append(TokenLogprob(sequence.tokens[at], 0.0))
            outcome.noted.append((at, sequence.tokens[at]))

    def who_leaves(self, items: Sequence[StepItem], during: bool) -> list[Generation]:
        """Whose time has come; preempted and waiting ones leave, too."""
        return [
            sequence
            for sequence, outcome in self.of.items()
            if (after := outcome.visitor.leaves_after) is not None
            and outcome.visitor.leaves_during == during
            and self.steps >= outcome.visitor.arrival + after
            and not sequence.finished
        ]

    def append(self, sequence: Generation, token: int) -> None:
        sequence.tokens.append(token)
        outcome = self.of[sequence]
        outcome.tokens.append(token)
        if sequence.generated >= sequence.request.sampling.max_tokens:
            self.end(sequence, "length")

    def end(self, sequence: Generation, why: str) -> None:
        if not sequence.finished:
            sequence.finished = True
            self.of[sequence].ended.append(why)


def run(scenario: Scenario) -> World:
    """The whole scenario, and what must hold of its end."""
    world = World(scenario)
    world.run()
    for outcome in world.outcomes:
        visitor = outcome.visitor
        alone = tokens_alone(visitor)
        assert outcome.tokens == alone[: len(outcome.tokens)]
        assert len(outcome.ended) <= 1
        if outcome.ended == ["length"]:
            assert outcome.tokens == alone
        elif not outcome.ended:
            assert visitor.leaves_after is not None
        else:
            assert scenario.failing_steps
        if visitor.prompt_logprobs and outcome.tokens:
            assert outcome.noted == list(enumerate(visitor.prompt))[1:]
    statistics = world.scheduler.pool.statistics()
    assert statistics.held == 0
    assert statistics.free + statistics.kept == statistics.total
    assert (world.scheduler.running, world.scheduler.preempted) == ([], [])
    return world


@st.composite
def scenarios(draw: st.DrawFn) -> Scenario:
    blocks, size = draw(st.integers(1, 12)), draw(st.sampled_from([1, 2, 3, 4]))
    longest = blocks * size
    if longest < 2:
        blocks, longest = 2, 2 * size

    def visitor() -> Visitor:
        prompt = draw(st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=longest - 1))
        return Visitor(
            prompt=tuple(prompt),
            max_tokens=draw(st.integers(1, longest - len(prompt))),
            rank=draw(st.integers(0, 4)),
            patience=draw(st.integers(0, 20)),
            arrival=draw(st.integers(0, 30)),
            leaves_after=draw(st.none() | st.integers(0, 30)),
            leaves_during=draw(st.booleans()),
            prompt_logprobs=draw(st.booleans()),
            salt=draw(st.sampled_from(["", "b"])),
        )

    return Scenario(
        visitors=tuple(visitor() for _ in range(draw(st.integers(1, 7)))),
        blocks=blocks,
        block_tokens=size,
        max_sequences=draw(st.integers(1, 5)),
        max_step_tokens=draw(st.integers(1, 24)),
        reuse=draw(st.booleans()),
        failing_steps=draw(st.frozensets(st.integers(0, 40), max_size=2)),
    )


@settings(max_examples=300, deadline=None)
@given(scenarios())
def test_every_sequence_ends_once_with_its_own_tokens_and_every_block_returns(scenario: Scenario) -> None:
    run(scenario)


def random_scenario(chance: random.Random) -> Scenario:
    """Much alike in the beginning, and little memory: most of these preempt and share."""
    size, blocks = chance.choice([1, 2, 4]), chance.randint(4, 14)
    longest = blocks * size
    common = [chance.randrange(VOCAB) for _ in range(longest)]

    def visitor() -> Visitor:
        shared = chance.randint(0, longest // 2)
        own = [chance.randrange(VOCAB) for _ in range(chance.randint(1, max(1, longest // 3)))]
        prompt = tuple([*common[:shared], *own][: longest - 1])
        return Visitor(
            prompt=prompt,
            max_tokens=chance.randint(1, longest - len(prompt)),
            rank=chance.randrange(5),
            patience=chance.randint(0, 20),
            arrival=chance.randint(0, 30),
            leaves_after=chance.randint(0, 40) if chance.random() < 0.2 else None,
            leaves_during=chance.random() < 0.5,
            prompt_logprobs=chance.random() < 0.2,
            salt=chance.choice(["", "", "", "b"]),
        )

    return Scenario(
        visitors=tuple(visitor() for _ in range(chance.randint(2, 9))),
        blocks=blocks,
        block_tokens=size,
        max_sequences=chance.randint(1, 6),
        max_step_tokens=chance.randint(1, 30),
        reuse=chance.random() < 0.8,
        failing_steps=frozenset({chance.randint(0, 40)} if chance.random() < 0.2 else ()),
    )


def test_thousands_of_crowded_scenarios_end_well() -> None:
    chance = random.Random(4)
    ends: dict[str, int] = {}
    preempted = shared = evicted = 0
    total = 3000
    for _ in range(total):
        world = run(random_scenario(chance))
        statistics = world.scheduler.pool.statistics()
        preempted += bool(world.scheduler.preemptions)
        shared += bool(statistics.prefix_hit_tokens)
        evicted += bool(statistics.evictions)
        for outcome in world.outcomes:
            why = outcome.ended[0] if outcome.ended else "left"
            ends[why] = ends.get(why, 0) + 1
    assert min(preempted, shared, evicted) > total / 3, "the crowd was not crowded"
    assert ends["length"] > 10 * ends["failed"] > 100
    assert ends["left"] > 500
