"""Checks of frozen specs when they are made: errors that name the class, the field, its value and what would be
right."""

from __future__ import annotations

from ..errors import ConfigurationError


def wrong(spec: object, name: str, expected: str) -> ConfigurationError:
    """The error, to be raised by the caller."""
    return ConfigurationError(
        f"{type(spec).__name__}: {name} = {getattr(spec, name)!r}; expected {expected}", name
    )


def positive(spec: object, *names: str) -> None:
    """Raises ConfigurationError where a field is not above 0."""
    for name in names:
        if not getattr(spec, name) > 0:
            raise wrong(spec, name, "a number above 0")


def among(spec: object, name: str, options: tuple[str, ...]) -> None:
    """Raises ConfigurationError where a field is none of `options`."""
    if getattr(spec, name) not in options:
        raise wrong(spec, name, f"one of {', '.join(options)}")
