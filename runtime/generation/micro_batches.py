"""Whether a step runs as two micro-batches: while one waits for its experts, the other computes attention.

    one batch of n tokens   trunk(n) + experts(n) + link(n)
    two of h = n / 2        the longest of 2 trunk(h), 2 experts(h), trunk(h) + experts(h) + link(h)

(MegaScale-Infer, arXiv 2504.02263, has the idea of ping-pong between attention and experts.) Smaller batches
compute less well, so it pays only where a good part of a step is waiting. Each of the three times is a line over
tokens, learnt from the steps as they run. What lines cannot know of sizes that never ran is found out by a probe
now and then, a step run the other way, where lines without fixed costs say that it might pay; the more seldom, the
more probes of such a size changed nothing, since a step run the wrong way may take twice its time. What lines get
wrong (cores that are shared, a noisy machine) does not last: once steps of about one size were run both ways, what
they really took decides.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Literal, NamedTuple

MicroBatching = Literal["auto", "always", "never"]

_FORGETTING = 0.99  # the last hundred forwards count
_LEAST_GAIN = 1.05
_PROBE_EVERY = 32
_PROBE_AT_LEAST_EVERY = 256
_SMOOTHING = 0.1
_PROBE_WEIGHT = 0.5
_TINY = 1e-9


class Line:
    """`fixed + slope * tokens`, by least squares with forgetting. Of one size only, it is flat."""

    def __init__(self) -> None:
        self._n = self._t = self._tt = self._y = self._ty = 0.0

    def observe(self, tokens: float, seconds: float) -> None:
        """Learn from one measurement."""
        self._n = _FORGETTING * self._n + 1.0
        self._t = _FORGETTING * self._t + tokens
        self._tt = _FORGETTING * self._tt + tokens * tokens
        self._y = _FORGETTING * self._y + seconds
        self._ty = _FORGETTING * self._ty + tokens * seconds

    def forget(self) -> None:
        """Time passes without a measurement: the next one tells more."""
        self._n, self._t, self._tt, self._y, self._ty = (
            _FORGETTING * value for value in (self._n, self._t, self._tt, self._y, self._ty)
        )

    @property
    def mean_s(self) -> float:
        """Of the latest measurements; 0 before any."""
        return self._y / self._n if self._n else 0.0

    def at(self, tokens: float) -> float:
        """Seconds expected; never below nothing."""
        if not self._n:
            return 0.0
        mean_t, mean_s = self._t / self._n, self.mean_s
        spread = self._tt / self._n - mean_t * mean_t
        if spread < 1e-3 * mean_t * mean_t:
            return mean_s
        slope = max(0.0, (self._ty / self._n - mean_t * mean_s) / spread)
        return max(0.0, mean_s + slope * (tokens - mean_t))


@dataclass(frozen=True, slots=True)
class ForwardTimes:
    """What one forward took.

    Attributes:
        tokens: of its batch.
        trunk_s: computing in this process.
        expert_s: computing of the expert group that computed longest.
        waited_s: from sending to the experts until their answers were here.
    """

    tokens: int
    trunk_s: float
    expert_s: float
    waited_s: float


class MicroBatchStatistics(NamedTuple):
    """Steps in one batch and in two, and of both those run to probe; mean seconds of trunk, experts and link in
    the latest forwards; how many times as fast as one two should be by the model, at the last decision, and were
    by what steps of that size took."""

    single: int
    double: int
    probes: int
    trunk_s: float
    expert_s: float
    link_s: float
    predicted_gain: float
    measured_gain: float


@dataclass(slots=True)
class _Probing:
    """Of steps of about one size: how many since the last probe, how many from one to the next, and what was
    decided at the last one; and the smoothed seconds per token of steps in one and in two."""

    since: int = 0
    every: int = _PROBE_EVERY
    paid: bool = False
    single: float = 0.0
    double: float = 0.0

    def measured_gain(self) -> float | None:
        """How many times as fast two were; None before both were seen."""
        return self.single / self.double if self.single and self.double else None

    def observe_single(self, per_token_s: float) -> None:
        """A step ran in one. Probes are few: one tells as much of how it is now as several steps would."""
        weight = _PROBE_WEIGHT if self.paid else _SMOOTHING
        self.single += (per_token_s - self.single) * (weight if self.single else 1.0)

    def observe_double(self, per_token_s: float) -> None:
        """A step ran in two."""
        weight = _SMOOTHING if self.paid else _PROBE_WEIGHT
        self.double += (per_token_s - self.double) * (weight if self.double else 1.0)
        if not self.paid and per_token_s * _LEAST_GAIN <= self.single:
            self.every = _PROBE_EVERY  # something has changed

    def decide(self, pays: bool) -> None:
        """Another step. A decision that changed is tried again soon."""
        self.since += 1
        if pays != self.paid:
            self.paid, self.every = pays, _PROBE_EVERY

    def is_due(self) -> bool:
        """Whether the step is to be a probe."""
        if self.since < self.every:
            return False
        self.since, self.every = 0, min(2 * self.every, _PROBE_AT_LEAST_EVERY)
        return True


class MicroBatchModel:
    """Decides step by step.

    Args:
        policy: "auto" decides, the others are forced.
        overlaps: whether experts compute anywhere else than in this thread.
        parallelism: how many dispatches the groups compute at once.
    """

    def __init__(self, policy: MicroBatching = "auto", overlaps: bool = True, parallelism: int = 1) -> None:
        self.policy, self.overlaps, self.parallelism = policy, overlaps, parallelism
        self._lines = self._trunk, self._experts, self._link = Line(), Line(), Line()
        self._single = self._double = self._probes = 0
        self._probing: defaultdict[int, _Probing] = defaultdict(_Probing)  # by binary digits of a step's tokens
        self._predicted_gain = self._measured_gain = 0.0

    def wants_two(self, tokens: int) -> bool:
        """Whether the next step, of so many tokens in at least two sequences, is to run as two."""
        if self.policy != "auto":
            return self.policy == "always"
        if not self.overlaps or not self._single:
            return False
        one = self._one_s(tokens)
        self._predicted_gain = one / max(_TINY, self._two_s(tokens))
        probing = self._probing[tokens.bit_length()]
        if not probing.single:  # what two are to beat is measured first
            return False
        measured = probing.measured_gain()
        pays = (self._predicted_gain if measured is None else measured) >= _LEAST_GAIN
        probing.decide(pays)
        might_pay = pays or one >= _LEAST_GAIN * self._least_two_s(tokens)
        if not might_pay or not probing.is_due():
            return pays
        self._probes += 1
        return not pays

    def observe_one(self, times: ForwardTimes) -> None:
        """Learn from a step that ran as one batch."""
        self._single += 1
        link_s = max(0.0, times.waited_s - times.expert_s)
        for line, seconds in zip(self._lines, (times.trunk_s, times.expert_s, link_s), strict=True):
            line.observe(times.tokens, seconds)
        taken_s = times.trunk_s + times.waited_s
        self._probing[times.tokens.bit_length()].observe_single(taken_s / times.tokens)

    def observe_two(self, first: ForwardTimes, second: ForwardTimes, total_s: float) -> None:
        """Learn from a step that ran as two. What each waited says nothing of the link: it waited for the other,
        too.

        Args:
            total_s: from the beginning of the first to the end of the last.
        """
        self._double += 1
        tokens = first.tokens + second.tokens
        for times in (first, second):
            self._trunk.observe(times.tokens, times.trunk_s)
            self._experts.observe(times.tokens, times.expert_s)
        self._link.forget()
        probing = self._probing[tokens.bit_length()]
        probing.observe_double(total_s / tokens)
        self._measured_gain = probing.measured_gain() or 0.0

    def statistics(self) -> MicroBatchStatistics:
        """See `MicroBatchStatistics`."""
        means = self._trunk.mean_s, self._experts.mean_s, self._link.mean_s
        counts = self._single, self._double, self._probes
        return MicroBatchStatistics(*counts, *means, self._predicted_gain, self._measured_gain)

    def _one_s(self, tokens: int) -> float:
        return self._trunk.at(tokens) + self._experts.at(tokens) + self._link.at(tokens)

    def _two_s(self, tokens: int) -> float:
        half = tokens / 2
        trunk, experts, link = self._trunk.at(half), self._experts.at(half), self._link.at(half)
        return self._longest(trunk, experts, link)

    def _least_two_s(self, tokens: int) -> float:
        """As if half of the tokens took half of the time."""
        return self._longest(self._trunk.at(tokens) / 2, self._experts.at(tokens) / 2, self._link.at(tokens) / 2)

    def _longest(self, trunk: float, experts: float, link: float) -> float:
        busy = 2 * experts / min(2, max(1, self.parallelism))
        return max(2 * trunk, busy, trunk + experts + link)


def split_point(counts: list[int]) -> int:
    """Where to cut a step's items in two, so that both have about as many tokens.

    Args:
        counts: tokens of each item, at least two of them.

    Returns:
        How many items the first part has, at least one and not all.
    """
    total, before = sum(counts), 0
    best, least = 1, total
    for index, count in enumerate(counts[:-1], start=1):
        before += count
        if abs(total - 2 * before) < least:
            best, least = index, abs(total - 2 * before)
    return best
