"""Stop strings: found wherever tokens and characters break; the token that completes one is the last."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from dataclasses import replace

import pytest
from fake_gateway import EOS, MODEL, ByteCodec
from hypothesis import given, settings
from hypothesis import strategies as st
from pimoe.runtime.generation.stopping import StoppingBackend, StopScanner, first_stop, held_back, prompt_context
from pimoe.runtime.requests import (
    FinishReason,
    GenerateRequest,
    InferRequest,
    InferResult,
    SamplingParams,
    TokenChunk,
    TokenLogprob,
)


class Chunks:
    """A backend that gives these tokens in chunks of these sizes, and notes how far it was read."""

    model = MODEL

    def __init__(self, ids: list[int], sizes: list[int], reason: FinishReason = "length") -> None:
        self.ids, self.sizes, self.reason = ids, sizes, reason
        self.given = 0
        self.closed = False

    async def infer(self, request: InferRequest) -> InferResult:
        raise NotImplementedError

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[TokenChunk, None]:
        try:
            turn = 0
            while self.given < len(self.ids):
                part = tuple(self.ids[self.given :][: self.sizes[turn % len(self.sizes)]])
                self.given += len(part)
                turn += 1
                reason = self.reason if self.given == len(self.ids) else None
                logprobs = tuple(TokenLogprob(token, -1.0) for token in part)
                yield TokenChunk(part, reason, logprobs, (None,) if turn == 1 else None, cached_tokens=turn == 1)
        finally:
            self.closed = True


def request(*stops: str, **sampling: object) -> GenerateRequest:
    return GenerateRequest("id", (1, 2), replace(SamplingParams(stop=stops), **sampling))  # type: ignore[arg-type]


async def read(backend: Chunks, asked: GenerateRequest) -> list[TokenChunk]:
    return [chunk async for chunk in StoppingBackend(backend, ByteCodec()).generate(asked)]


def tokens(chunks: list[TokenChunk]) -> list[int]:
    return [token for chunk in chunks for token in chunk.token_ids]


@settings(deadline=None)
@given(
    text=st.text("abé", min_size=1, max_size=30),
    stops=st.lists(st.text("abé", min_size=1, max_size=4), min_size=1, max_size=4).map(tuple),
    sizes=st.lists(st.integers(1, 7), min_size=1, max_size=5),
)
async def test_it_ends_with_the_token_that_completes_a_stop(
    text: str, stops: tuple[str, ...], sizes: list[int]
) -> None:
    ids = list(text.encode())
    backend = Chunks(ids, sizes)
    chunks = await read(backend, request(*stops))
    ends = [at + len(stop) for stop in stops if (at := text.find(stop)) >= 0]
    expected = list(text[: min(ends)].encode()) if ends else ids
    assert tokens(chunks) == expected
    assert [chunk.finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1].finish_reason == ("stop" if ends else "length")
    assert all(len(chunk.logprobs or ()) == len(chunk.token_ids) for chunk in chunks)
    assert (chunks[0].prompt_logprobs, chunks[0].cached_tokens) == ((None,), 1)
    assert backend.closed
    assert backend.given < len(expected) + max(sizes)


async def test_a_stop_does_not_end_before_min_tokens() -> None:
    assert tokens(await read(Chunks(list(b"abcbabc"), [1]), request("b", min_tokens=4))) == list(b"abcb")
    # The token that reaches the minimum may complete a stop that began before it.
    assert tokens(await read(Chunks(list(b"abcEND"), [1]), request("cE", min_tokens=4))) == list(b"abcE")
    # One that was complete before is text that was given.
    assert tokens(await read(Chunks(list(b"abcdef"), [1]), request("ab", min_tokens=4))) == list(b"abcdef")


async def test_a_terminator_has_no_text() -> None:
    asked = request("a!", stop_token_ids=(ord("!"),))
    assert (await read(Chunks(list(b"a!"), [2], "stop"), asked))[-1].token_ids == tuple(b"a!")
    chunks = await read(Chunks([*b"ab", EOS], [1], "stop"), request("x"))
    assert (tokens(chunks), chunks[-1].finish_reason) == ([*b"ab", EOS], "stop")


async def test_a_resumed_generation_is_searched_over_what_was_emitted() -> None:
    asked = replace(request("cd"), emitted=tuple(b"abc"))
    assert tokens(await read(Chunks(list(b"def"), [1]), asked)) == list(b"d")


async def test_without_stops_or_tokenizer_nothing_is_between() -> None:
    for codec, asked in ((ByteCodec(), request()), (None, request("b"))):
        generation = StoppingBackend(Chunks(list(b"abc"), [1]), codec).generate(asked)
        assert getattr(generation, "ag_code", None) is Chunks.generate.__code__
        assert tokens([chunk async for chunk in generation]) == list(b"abc")


async def test_closing_it_closes_what_computes() -> None:
    backend = Chunks(list(b"abc"), [1])
    generation = StoppingBackend(backend, ByteCodec()).generate(request("z"))
    await anext(generation)
    await generation.aclose()
    assert backend.closed
    assert backend.given == 1


async def test_the_text_continues_the_prompt() -> None:
    codec = ByteCodec()
    asked = replace(request("b"), prompt_token_ids=tuple(range(100)))
    _ = [chunk async for chunk in StoppingBackend(Chunks(list(b"abc"), [1]), codec).generate(asked)]
    assert codec.contexts[0] == list(range(68, 100)) == prompt_context(tuple(range(100)))


def test_two_stops_at_one_place() -> None:
    assert first_stop("xaab", ("aab", "aa", "b")) == (1, "aab")
    assert first_stop("xaab", ("b", "aa")) == (1, "aa")
    assert first_stop("x", ("b",)) is None


def test_text_with_and_without_its_stop() -> None:
    for with_stop, expected in ((False, "ab"), (True, "abEND")):
        scanner = StopScanner(("END",))
        assert scanner.push("abENDxyz")
        assert scanner.matched == "END"
        assert scanner.take(complete=True, with_stop=with_stop) == expected
        assert scanner.take(complete=True) == ""


@pytest.mark.parametrize(
    ("text", "stops", "held"),
    [
        ("", ("a",), 0),
        ("aab", ("aabb",), 3),
        ("xaa", ("aab", "b"), 2),
        ("ab", ("a",), 0),
        ("abab", ("abac",), 2),
    ],
)
def test_held_back(text: str, stops: tuple[str, ...], held: int) -> None:
    assert held_back(text, stops) == held


@settings(deadline=None)
@given(st.text("ab", max_size=12), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3).map(tuple))
def test_held_back_is_the_longest_beginning(text: str, stops: tuple[str, ...]) -> None:
    lengths = [size for stop in stops for size in range(1, len(stop)) if text.endswith(stop[:size])]
    assert held_back(text, stops) == max(lengths, default=0)
