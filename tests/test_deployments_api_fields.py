"""Reading one untrusted map: what is an integer, and what is none."""

from __future__ import annotations

from typing import Any

import orjson
import pytest
from fake_gateway import MODEL
from pimoe.deployments.api import ApiSettings
from pimoe.deployments.api.fields import Fields
from pimoe.deployments.api.openai_params import read_completion
from pimoe.deployments.api.options import from_headers
from pimoe.runtime.errors import InvalidRequestError

EXACT = 2**53


@pytest.mark.parametrize(
    ("value", "integer"),
    [
        (1, 1),
        (1.0, 1),
        (-3.0, -3),
        (-0.0, 0),
        (1e3, 1000),
        (float(EXACT - 1), EXACT - 1),
        (-float(EXACT - 1), 1 - EXACT),
        (EXACT + 1, EXACT + 1),  # written as an integer it is exact, however large
        (None, None),
    ],
)
def test_one_is_one_however_it_is_written(value: Any, integer: int | None) -> None:
    read = Fields({"n": value}).integer("n", -(2**63), 2**63)
    assert read == integer
    assert type(read) is type(integer)


@pytest.mark.parametrize(
    "value",
    [
        1.5,
        float(EXACT),
        -float(EXACT),
        1e300,
        float("inf"),
        float("-inf"),
        float("nan"),
        True,
        False,
        "1",
        "1.0",
        [],
    ],
)
def test_what_is_no_integer_or_no_exact_one_is_refused(value: Any) -> None:
    with pytest.raises(InvalidRequestError, match="an integer from") as raised:
        Fields({"n": value}, "parameters.").integer("n", -(2**70), 2**70)
    assert raised.value.param == "parameters.n"


@pytest.mark.parametrize("value", [0.0, 11.0, -1.0, 0, 11])
def test_bounds_hold_for_either_spelling(value: float) -> None:
    with pytest.raises(InvalidRequestError, match="from 1 to 10"):
        Fields({"n": value}).integer("n", 1, 10)


def test_a_seed_is_the_same_as_a_float() -> None:
    settings = ApiSettings()
    seeds = []
    for text in (b"7", b"7.0", b"7e0"):
        body = b'{"model": "echo", "prompt": "a", "max_tokens": 3.0, "n": 1.0, "seed": ' + text + b"}"
        wanted = read_completion(Fields(orjson.loads(body)), MODEL, settings, from_headers({}, settings))
        seeds.append(repr(wanted))
    assert len(set(seeds)) == 1
