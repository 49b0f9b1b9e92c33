"""Which messages stay: decided with numbers, and properties that hold for any conversation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from pimoe.deployments.api.trimming import trim

Message = dict[str, Any]


def say(role: str, size: int = 1) -> Message:
    return {"role": role, "content": "x" * size}


def calls(*names: str) -> Message:
    return {"role": "assistant", "content": None, "tool_calls": [{"id": name} for name in names]}


def result(name: str, size: int = 1) -> Message:
    return {"role": "tool", "tool_call_id": name, "content": "x" * size}


def talk(letters: str) -> list[Message]:
    """A conversation of one token each: s(ystem), u(ser), a(ssistant)."""
    return [say({"s": "system", "u": "user", "a": "assistant"}[letter]) for letter in letters]


def size_of(message: Message) -> int:
    return len(message["content"] or "x")


def counter(messages: Sequence[Message], seen: list[int] | None = None) -> Callable[[tuple[int, ...]], int]:
    def count(indices: tuple[int, ...]) -> int:
        if seen is not None:
            seen.append(len(indices))
        return sum(size_of(messages[index]) for index in indices)

    return count


def left(messages: Sequence[Message], newest: int = 0, budget: int = 10**6) -> list[int]:
    return list(trim(messages, newest, budget, counter(messages)))


@pytest.mark.parametrize(
    ("letters", "newest", "kept"),
    [
        ("u", 6, "u"),
        ("suauau", 6, "suauau"),
        ("suauauauau", 6, "suauau"),  # of nine spoken ones five: with a sixth it would begin with an answer
        ("suauauauau", 8, "suauauau"),
        ("suauauauaua", 6, "suauaua"),
        ("suauauauau", 0, "suauauauau"),
        ("uuuuu", 3, "uuu"),
        ("auau", 4, "auau"),  # a greeting in front stays with the whole only
        ("auauau", 5, "uauau"),
        ("uasuau", 3, "suau"),
        ("saaaa", 2, "saaaa"),  # nobody's turn ever ended: nothing is cut by number
    ],
)
def test_by_number(letters: str, newest: int, kept: str) -> None:
    messages = talk(letters)
    indices = left(messages, newest)
    assert "".join(letters[index] for index in indices) == kept
    spoken = [index for index in indices if letters[index] != "s"]
    assert spoken == [i for i, letter in enumerate(letters) if letter != "s"][-len(spoken) :]


@pytest.mark.parametrize(("budget", "kept"), [(6, 6), (5, 4), (4, 4), (3, 2), (2, 2), (1, 2), (0, 2), (-5, 2)])
def test_by_tokens(budget: int, kept: int) -> None:
    assert len(left(talk("suauau"), budget=budget)) == kept


def test_a_turn_under_way_is_cut_by_tokens_only_and_between_its_steps() -> None:
    messages = [say("system"), say("user"), say("assistant"), say("user", 10)]
    for step in "abc":
        messages += [calls(step + "1", step + "2"), result(step + "1"), result(step + "2")]
    assert left(messages, newest=2) == [0, *range(3, 13)]
    assert left(messages, budget=20) == [0, *range(3, 13)]
    assert left(messages, budget=19) == [0, 3, *range(7, 13)]
    assert left(messages, budget=14) == [0, 3, 10, 11, 12]
    assert left(messages, budget=1) == [0, 3, 10, 11, 12]


def test_calls_answered_late_are_not_parted_from_their_results() -> None:
    messages = [say("user"), calls("a"), say("user"), result("a"), say("assistant"), say("user")]
    assert left(messages, newest=4) == [5]
    assert left(messages, newest=5) == [5]
    assert left(messages[:5], newest=3) == [0, 1, 2, 3, 4]
    without_ids: list[Message] = [say("user"), calls(), {**result("?")}, say("user")]
    assert left(without_ids, budget=2) == [3]


def test_old_functions_are_tools_too() -> None:
    called: Message = {"role": "assistant", "content": "", "function_call": {"name": "f"}}
    messages = [say("user"), called, {"role": "function", "name": "f", "content": "1"}, say("assistant")]
    assert left(messages, budget=2) == [0, 3]
    assert left(messages[:3], budget=1) == [0, 1, 2]


def test_few_counts_find_the_cut() -> None:
    messages = talk("ua" * 2000 + "u")
    seen: list[int] = []
    kept = trim(messages, 0, 99, counter(messages, seen))
    assert len(kept) == 99
    assert len(seen) <= 13


def test_of_far_too_much_little_more_is_counted_than_fits() -> None:
    messages = [say(("user", "assistant")[at % 2], 50) for at in range(4001)]
    seen: list[int] = []
    kept = trim(messages, 0, 50 * 99, counter(messages, seen))
    assert len(kept) == 99
    assert max(seen) <= 2 * 99 + 2
    for fits in range(1, 60, 2):
        assert len(trim(messages[-59:], 0, fits, lambda indices: len(indices))) == fits


def test_a_template_that_writes_less_for_more_is_searched_one_by_one() -> None:
    messages = talk("ua" * 8 + "u")
    tokens = {17: 50, 15: 60, 13: 20, 11: 70, 9: 80, 7: 90, 5: 30, 3: 10, 1: 5}
    assert len(trim(messages, 0, 40, lambda indices: tokens[len(indices)])) == 13


def test_what_a_template_refuses_is_not_chosen() -> None:
    messages = talk("ua" * 4 + "u")
    accepted = {3: 3, 1: 1}
    assert len(trim(messages, 0, 100, lambda indices: accepted.get(len(indices)))) == 3
    assert len(trim(messages, 0, 100, lambda indices: None)) == 1


def test_nothing_to_trim() -> None:
    assert trim([], 6, 10, lambda indices: 0) == ()
    assert left(talk("sss"), 1, 1) == [0, 1, 2]


@st.composite
def conversations(draw: st.DrawFn) -> list[Message]:
    """Any order of roles, with tool results of calls that may be near, far, or nowhere."""
    messages: list[Message] = []
    made: list[str] = []
    for number in range(draw(st.integers(1, 14))):
        kind = draw(st.sampled_from(("system", "developer", "user", "user", "assistant", "calls", "tool")))
        size = draw(st.integers(1, 9))
        if kind == "calls":
            names = [f"{number}-{i}" for i in range(draw(st.integers(1, 2)))]
            made += names
            messages.append(calls(*names))
        elif kind == "tool":
            messages.append(result(draw(st.sampled_from([*made, "nobody"])), size))
        else:
            messages.append(say(kind, size))
    return messages


def caller_of(messages: Sequence[Message], at: int) -> int | None:
    """The call that a result at `at` answers."""
    before = [i for i in range(at) if messages[i].get("tool_calls")]
    name = messages[at]["tool_call_id"]
    named = [i for i in before if name in [call["id"] for call in messages[i]["tool_calls"]]]
    return (named or before or [None])[-1]


@given(conversations(), st.integers(0, 8), st.integers(-1, 60))
@example([say("user"), calls("a"), say("user"), result("a")], 1, 0)
def test_whatever_the_conversation(messages: list[Message], newest: int, budget: int) -> None:
    count = counter(messages)
    kept = list(trim(messages, newest, budget, count))
    least = set(trim(messages, 1, -1, count))

    assert kept == sorted(set(kept))
    assert {i for i, message in enumerate(messages) if message["role"] in ("system", "developer")} <= set(kept)
    assert len(messages) - 1 in kept
    users = [i for i, message in enumerate(messages) if message["role"] == "user"]
    assert not users or users[-1] in kept
    for at, message in enumerate(messages):
        if message["role"] == "tool":
            caller = caller_of(messages, at)
            assert caller is None or (at in kept) == (caller in kept)

    assert least <= set(kept)
    assert count(tuple(kept)) <= budget or set(kept) == least
    spoken = [i for i in kept if messages[i]["role"] not in ("system", "developer")]
    if newest and users and len(spoken) > newest:
        # Only where no earlier turn could go: each that begins later would part a result from its call.
        for turn in (i for i in users if spoken[0] < i):
            late = [i for i in range(turn, len(messages)) if messages[i]["role"] == "tool"]
            assert any((caller := caller_of(messages, i)) is not None and caller < turn for i in late)

    again = [messages[i] for i in kept]
    assert list(trim(again, newest, budget, counter(again))) == list(range(len(again)))


@given(conversations(), st.integers(0, 8), st.integers(0, 60))
def test_no_longer_choice_would_fit(messages: list[Message], newest: int, budget: int) -> None:
    """Of all budgets' choices the one made is the longest within this budget."""
    count = counter(messages)
    kept = trim(messages, newest, budget, count)
    for other in range(budget, 140):
        longer = trim(messages, newest, other, count)
        if len(longer) > len(kept):
            assert count(longer) > budget
