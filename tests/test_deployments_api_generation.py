"""The choices of one request as one stream: in turns, whatever the pace of each."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

import pytest
from pimoe.deployments.api.assembly import Piece
from pimoe.deployments.api.generation import _PIECES_AHEAD, interleave
from pimoe.runtime.errors import OverloadedError
from waiting import eventually, nothing_left_behind, within_patience

__all__ = ["nothing_left_behind"]
pytestmark = pytest.mark.usefixtures("nothing_left_behind")


class Choice:
    """Gives numbered pieces, so many turns of the loop apart; the last one ends it, hangs, or raises."""

    def __init__(self, name: str, count: int, pace: int = 0, end: Exception | str = "stop") -> None:
        self.name, self.count, self.pace, self.end = name, count, pace, end
        self.given = 0
        self.closed = False

    async def pieces(self) -> AsyncGenerator[Piece, None]:
        try:
            for number in range(self.count):
                for _ in range(self.pace):
                    await asyncio.sleep(0)
                last = number == self.count - 1
                if last and isinstance(self.end, Exception):
                    raise self.end
                if last and self.end == "hang":
                    await asyncio.Event().wait()
                self.given += 1
                yield Piece(f"{self.name}{number}", (number,), (), (), "stop" if last else None)
        finally:
            self.closed = True


async def read(*choices: Choice) -> list[str]:
    return [piece.text async for _, piece in interleave([choice.pieces() for choice in choices])]


@pytest.mark.parametrize("paces", [(0, 0, 0), (5, 0, 1), (0, 9, 2)])
async def test_choices_take_turns_at_any_pace(paces: tuple[int, int, int]) -> None:
    choices = [Choice(name, count, pace) for name, count, pace in zip("abc", (2, 4, 1), paces, strict=True)]
    assert await read(*choices) == ["a0", "b0", "c0", "a1", "b1", "b2", "b3"]
    assert all(choice.closed for choice in choices)


async def test_one_choice_is_passed_on() -> None:
    assert await read(Choice("a", 3)) == ["a0", "a1", "a2"]


@pytest.mark.parametrize("before", [1, 3, 60])
async def test_an_error_of_one_ends_all_while_another_hangs(before: int) -> None:
    error = OverloadedError("full")
    hanging, failing = Choice("a", 2, end="hang"), Choice("b", before, end=error)
    with pytest.raises(OverloadedError) as raised:
        await within_patience(read(hanging, failing, Choice("c", 1000)))
    assert raised.value is error
    assert hanging.closed


async def test_closing_closes_all_and_nothing_runs_far_ahead() -> None:
    choices = [Choice("a", 10, end="hang"), Choice("b", 1000)]
    events = interleave([choice.pieces() for choice in choices])
    assert (await anext(events))[1].text == "a0"
    await eventually(lambda: choices[1].given >= _PIECES_AHEAD)
    assert choices[1].given <= _PIECES_AHEAD + 2
    await events.aclose()
    assert all(choice.closed for choice in choices)
