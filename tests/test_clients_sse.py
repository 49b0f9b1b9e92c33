"""Server-sent events, however a stream was cut into pieces."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pimoe.clients import ProtocolError
from pimoe.clients.sse import SseParser

STREAM = (
    b": a comment\n\ndata: one\n\nevent: x\nid: 3\nretry: 5\ndata:two\n\n"
    b'data: three\r\ndata:  lines\r\n\r\ndata\n\ndata: {"a": 1}\n\ndata: [DONE]\n\n'
)
EVENTS = [b"one", b"two", b"three\n lines", b'{"a": 1}', b"[DONE]"]


@given(st.lists(st.integers(0, len(STREAM)), max_size=12))
def test_events_do_not_depend_on_the_pieces(cuts: list[int]) -> None:
    parser = SseParser(1000)
    edges = [0, *sorted(cuts), len(STREAM)]
    pieces = [STREAM[start:end] for start, end in pairwise(edges)]
    assert [event for piece in pieces for event in parser.feed(piece)] == EVENTS


def test_an_event_without_its_end_is_none() -> None:
    assert SseParser(1000).feed(b"data: half") == []
    assert SseParser(1000).feed(b"data: half\n") == []


@pytest.mark.parametrize("piece", [b"x" * 11, b"data: 123456\ndata: 12345\n"])
def test_events_are_bounded(piece: bytes) -> None:
    with pytest.raises(ProtocolError, match="10 bytes"):
        SseParser(10).feed(piece)
