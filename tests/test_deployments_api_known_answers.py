"""Answers kept by the bytes of their requests: bounded, and never one for another. That they are given only as
long as the cache gives them is in test_deployments_api_cached.py."""

from __future__ import annotations

from typing import Any

import pytest
from pimoe.deployments.api.known_answers import MAX_BYTES, KnownAnswer, KnownAnswers
from pimoe.deployments.api.options import read_headers

Headers = list[tuple[bytes, bytes]]


def request(body: bytes, headers: Headers | None = None, path: str = "/v1/completions") -> Any:
    return path, read_headers(headers or []), body


def answer(body: bytes = b"answer") -> KnownAnswer:
    return KnownAnswer([], body, [object()], len(body))


def test_what_was_put_is_found() -> None:
    known, kept = KnownAnswers(), answer()
    known.put(request(b"a"), kept)
    assert known.find(request(b"a")) is kept
    assert known.find(request(b"b")) is None
    known.drop(request(b"a"))
    assert known.find(request(b"a")) is None


@pytest.mark.parametrize(
    "other",
    [
        request(b"body", [(b"x-pimoe-tenant", b"a")]),
        request(b"body", [(b"x-pimoe-tenant", b"a"), (b"x-pimoe-tenant", b"b")]),
        request(b"body", [(b"X-Pimoe-Tenant", b"a")]),
        request(b"body", [(b"content-type", b"application/msgpack")]),
        request(b"body", [(b"inference-header-content-length", b"4")]),
        request(b"body", path="/v1/chat/completions"),
        request(b"bodY"),
    ],
)
def test_other_requests_are_told_apart(other: Any) -> None:
    assert other != request(b"body")


def test_headers_that_nobody_reads_do_not_matter() -> None:
    assert request(b"a", [(b"x-request-id", b"1"), (b"user-agent", b"wrk")]) == request(b"a")


def test_headers_and_what_hits_hold_count() -> None:
    known = KnownAnswers(max_bytes=50_000)
    for count in range(100):
        known.put(request(b"a", [(b"x-pimoe-%d" % count, bytes(10_000))]), answer())
    assert 0 < len(known) <= 5
    known.clear()
    for count in range(100):
        known.put(request(b"%d" % count), KnownAnswer([], b"", [object()], 10_000))
    assert 0 < len(known) <= 5


def test_bounded_in_bytes_and_the_longest_unused_go() -> None:
    known = KnownAnswers(max_bytes=20_000)
    for name in (b"a", b"b"):
        known.put(request(name), answer(bytes(3000)))
    known.find(request(b"a"))
    known.put(request(b"c"), answer(bytes(3000)))
    assert [known.find(request(name)) is not None for name in (b"a", b"b", b"c")] == [True, False, True]
    for count in range(1000):
        known.put(request(b"%d" % count), answer(bytes(100)))
    assert len(known) < 10


def test_an_answer_takes_the_place_of_the_one_before() -> None:
    known, latest = KnownAnswers(max_bytes=10_000), answer(bytes(1000))
    for _ in range(100):
        known.put(request(b"a"), answer(bytes(1000)))
    known.put(request(b"a"), latest)
    assert known.find(request(b"a")) is latest
    assert len(known) == 1


def test_what_is_too_large_is_not_kept_and_pushes_nothing_out() -> None:
    known = KnownAnswers()
    known.put(request(b"small"), answer())
    known.put(request(b"large"), answer(bytes(MAX_BYTES // 16)))
    assert [known.find(request(name)) is not None for name in (b"small", b"large")] == [True, False]


def test_clear() -> None:
    known = KnownAnswers(max_bytes=5000)
    known.put(request(b"a"), answer())
    known.clear()
    assert len(known) == 0
    known.put(request(b"b"), answer())
    assert len(known) == 1
