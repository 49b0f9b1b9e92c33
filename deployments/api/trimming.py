"""Which messages of a chat stay when it is to be short. Pure: counting tokens is the caller's.

What always stays: system and developer messages, the newest message of the user, and what came last, with the call
that it answers. Of the rest the newest stays:

1. *Earlier turns* go first, whole ones and the oldest first, until no more than so many messages are left and
   their prompt fits the budget. A turn is a message of the user with all that follows it. Whole ones, because an
   answer without its question misleads, and many templates refuse what does not begin with the user.
2. *The turn under way* is not cut by number: an assistant in the middle of its work must not forget what its tools
   said. Where it alone exceeds the budget, its oldest steps go, those right after the user's message.

A tool's result never stays without the message that called it, nor the call without its results; nothing is cut
within a message, and the order stays. What must stay is given back even where it exceeds the budget: whether the
context has room for it is then for the caller to say.

The longer a rest is kept, the longer is its prompt, for almost any template: so the cut is found by binary search,
in about log2 renders of as many candidates as there are. Where the counts seen say otherwise, or a template
refuses a candidate, the candidates are tried one by one from the longest, up to a bound. Either way what is chosen
was counted itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

Message = Mapping[str, Any]
# Tokens of the prompt that the messages of these indices make; None where the template refuses them.
Count = Callable[[tuple[int, ...]], int | None]

_ALWAYS = frozenset(("system", "developer"))
_RESULTS = frozenset(("tool", "function"))
_MAX_ONE_BY_ONE = 64
# With more characters for each token of the budget a conversation hardly fits as a whole. A guess, and it decides
# nothing but where the search begins.
_CHARS_FAR_OVER = 8


@dataclass(frozen=True, slots=True)
class _Cut:
    """The messages from position `start` of the conversation on, and the user's message `anchor` before them."""

    start: int
    anchor: int | None = None


def trim(messages: Sequence[Message], newest: int, budget: int, count: Count) -> tuple[int, ...]:
    """The indices of the messages that stay, in order.

    Args:
        newest: how many may stay besides the system's; 0: any number.
        budget: how many tokens their prompt may have.
    """
    spoken = [index for index, message in enumerate(messages) if message.get("role") not in _ALWAYS]
    cuts = _cuts([messages[index] for index in spoken], newest)

    def kept(cut: _Cut) -> tuple[int, ...]:
        first = spoken[cut.start] if spoken else 0
        anchor = None if cut.anchor is None else spoken[cut.anchor]
        return tuple(
            index
            for index, message in enumerate(messages)
            if index >= first or index == anchor or message.get("role") in _ALWAYS
        )

    chars = sum(len(text) for message in messages if isinstance(text := message.get("content"), str))
    far_over = chars > _CHARS_FAR_OVER * max(1, budget)
    return kept(cuts[_first_that_fits(len(cuts), budget, lambda at: count(kept(cuts[at])), far_over)])


def _cuts(spoken: Sequence[Message], newest: int) -> list[_Cut]:
    """All ways to shorten, each keeping less than the one before; the last keeps only what must stay."""
    total = len(spoken)
    users = [at for at, message in enumerate(spoken) if message.get("role") == "user"]
    user = users[-1] if users else None
    whole = _splits_no_call(spoken)
    turns = [0] if user is None else [0, *(at for at in users if at > 0 and whole[at])]
    short = [at for at in turns if not newest or total - at <= newest] or turns[-1:]
    steps = [
        at
        for at in range(0 if user is None else user + 2, total)
        if whole[at] and at > turns[-1] and spoken[at].get("role") not in _RESULTS
    ]
    return [*(_Cut(at) for at in short), *(_Cut(at, user) for at in steps)]


def _splits_no_call(spoken: Sequence[Message]) -> list[bool]:
    """For every position, whether a cut before it leaves each result on the side of its call."""
    changes = [0] * (len(spoken) + 1)
    callers: dict[object, int] = {}
    latest: int | None = None
    for at, message in enumerate(spoken):
        if message.get("role") in _RESULTS:
            caller = callers.get(message.get("tool_call_id"), latest)
            if caller is not None:
                changes[caller + 1] += 1
                changes[at + 1] -= 1
        elif message.get("tool_calls") or message.get("function_call"):
            latest = at
            callers.update((call.get("id"), at) for call in message.get("tool_calls") or ())
    return [depth == 0 for depth in accumulate(changes)]


def _first_that_fits(candidates: int, budget: int, count: Callable[[int], int | None], from_the_end: bool) -> int:
    """The first candidate within the budget; the last where none is.

    Args:
        from_the_end: count ever more from the last on, so that nothing much longer than what fits is counted;
            otherwise all of it is counted first, which mostly fits.
    """
    counted: dict[int, int | None] = {}

    def fits(at: int) -> bool:
        if at not in counted:
            counted[at] = count(at)
        tokens = counted[at]
        return tokens is not None and tokens <= budget

    low, high = 0, candidates - 1  # the last one is the answer where nothing fits
    if from_the_end:
        step = 1
        while low < high and fits(max(0, candidates - 1 - step)):
            high, step = max(0, candidates - 1 - step), 2 * step
        low = min(high, max(0, candidates - step))
    elif candidates == 1 or fits(0):
        return 0
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(middle) else (middle + 1, high)
    if _shrinks(counted):
        return low
    tried = range(min(candidates, _MAX_ONE_BY_ONE))
    return next((at for at in tried if fits(at)), low if fits(low) else candidates - 1)


def _shrinks(counted: Mapping[int, int | None]) -> bool:
    """Whether what was counted grows with what is kept, so that the search has missed nothing it could see."""
    known = [counted[at] for at in sorted(counted)]
    return None not in known and all(a >= b for a, b in pairwise(known) if a is not None and b is not None)
