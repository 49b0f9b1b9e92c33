"""The error tree: codes, and the two ways over which errors cross processes."""

from __future__ import annotations

import pickle

import msgpack
import pytest
from pimoe.runtime import errors
from pimoe.runtime.errors import ERRORS_BY_CODE, LinkError, OverloadedError, PimoeError, from_wire

CLASSES = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, PimoeError)]


def test_codes_are_unique_and_complete() -> None:
    assert len(ERRORS_BY_CODE) == len(CLASSES)
    assert {kind.code for kind in CLASSES} == set(ERRORS_BY_CODE)
    assert set(ERRORS_BY_CODE.values()) == set(CLASSES)


def test_the_drawn_tree_names_every_class_and_code() -> None:
    drawing = errors.__doc__
    assert drawing is not None
    for kind in CLASSES:
        line = next(line for line in drawing.splitlines() if f" {kind.__name__} " in line)
        assert kind.code in line.split()


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.code)
def test_every_error_survives_pickle_and_wire(kind: type[PimoeError]) -> None:
    error = kind("what went wrong", "field", 2.5)
    packed = msgpack.unpackb(msgpack.packb(error.to_wire()))
    for copy in (pickle.loads(pickle.dumps(error)), from_wire(packed)):
        assert type(copy) is kind
        assert str(copy) == copy.message == "what went wrong"
        assert (copy.param, copy.retry_after_s) == ("field", 2.5)


def test_defaults_stay_absent_over_the_wire() -> None:
    copy = from_wire(OverloadedError("full").to_wire())
    assert type(copy) is OverloadedError
    assert (copy.param, copy.retry_after_s) == (None, None)


def test_an_unknown_code_becomes_a_plain_error() -> None:
    copy = from_wire({"code": "from_the_future", "message": "hm"})
    assert type(copy) is PimoeError
    assert copy.message == "hm"
    assert type(from_wire({})) is PimoeError


def test_a_message_with_lone_surrogates_can_travel() -> None:
    copy = from_wire(msgpack.unpackb(msgpack.packb(PimoeError("no model 'a\ud800b'").to_wire())))
    assert copy.message == "no model 'a\\ud800b'"


def test_link_errors_are_one_branch() -> None:
    branch = {kind.code for kind in CLASSES if issubclass(kind, LinkError)}
    assert branch == {"link_error", "link_closed", "link_protocol_error", "link_authentication_failed"}
