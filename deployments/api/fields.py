"""Typed reading of one untrusted map. Every complaint names the field, the value and what would be right.

By hand rather than with pydantic: on this path a validated model per request costs more than the routing.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from ...runtime.errors import InvalidRequestError

_SHOWN_CHARS = 40
_NAME_CHARS = 100
_EXACT_BELOW = 2.0**53  # from there on, floats stand for several integers each


def shown(value: object) -> str:
    """A value for an error message: short, and never a whole prompt or tensor."""
    if isinstance(value, list | dict | bytes):
        return f"a {type(value).__name__} of {len(value)}"
    if isinstance(value, int) and not -(10**18) < value < 10**18:
        return "a huge integer"
    text = repr(value)
    return text if len(text) <= _SHOWN_CHARS else text[:_SHOWN_CHARS] + "..."


class Fields:
    """A map and where it stands in the request (`prefix`, for error messages). JSON null means absent."""

    __slots__ = ("prefix", "values")

    def __init__(self, values: object, prefix: str = "") -> None:
        if not isinstance(values, dict):
            name = prefix.rstrip(".")
            raise InvalidRequestError(
                f"{name or 'the body'} is {shown(values)}; it must be an object", name or None
            )
        self.values: dict[Any, Any] = values
        self.prefix = prefix

    def wrong(self, name: str, right: str) -> InvalidRequestError:
        """The error for a field whose value is not `right`."""
        param = self.prefix + name
        return InvalidRequestError(f"{param} is {shown(self.values.get(name))}; it must be {right}", param)

    def child(self, name: str) -> Fields:
        """The map in a field; an empty one where absent."""
        value = self.values.get(name)
        return Fields({} if value is None else value, f"{self.prefix}{name}.")

    def only(self, known: Collection[str]) -> None:
        """Refuses fields that nothing reads: to drop them silently would answer another question.

        Raises:
            InvalidRequestError: names the first unknown field.
        """
        for name in self.values:
            if name not in known:
                param = (self.prefix + (name if isinstance(name, str) else shown(name)))[:_NAME_CHARS]
                raise InvalidRequestError(f"unknown field {param!r}", param)

    def integer(self, name: str, low: int, high: int) -> int | None:
        """An integer in [low, high], or None where absent. 1.0 is 1, which some clients cannot write otherwise."""
        value = self.values.get(name)
        if value is None:
            return None
        if type(value) is float and value.is_integer() and abs(value) < _EXACT_BELOW:
            value = int(value)
        if type(value) is not int or not low <= value <= high:
            raise self.wrong(name, f"an integer from {low} to {high}")
        return value

    def number(self, name: str, low: float, high: float, above: bool = False) -> float | None:
        """A number in [low, high] (in (low, high] if `above`), or None where absent. NaN is in no range."""
        value = self.values.get(name)
        if value is None:
            return None
        fits = type(value) in (int, float) and low <= value <= high and not (above and value == low)
        if not fits:
            bounds = f"above {low:g} and up to {high:g}" if above else f"from {low:g} to {high:g}"
            raise self.wrong(name, f"a number {bounds}")
        return float(value)

    def flag(self, name: str) -> bool | None:
        """A boolean, or None where absent."""
        value = self.values.get(name)
        if value is None:
            return None
        if type(value) is not bool:
            raise self.wrong(name, "true or false")
        return value

    def text(self, name: str) -> str | None:
        """A string, or None where absent."""
        value = self.values.get(name)
        if value is None:
            return None
        if type(value) is not str:
            raise self.wrong(name, "a string")
        return value

    def items(self, name: str) -> list[Any] | None:
        """A list, or None where absent."""
        value = self.values.get(name)
        if value is None:
            return None
        if type(value) is not list:
            raise self.wrong(name, "a list")
        return value
