"""Typed reading of a `config.json`, with errors that name the field, its value and what would be right."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import ConfigurationError


class ConfigFields:
    """The fields of one JSON object. Absent and null count alike: Hugging Face configs use both for "not set".

    Args:
        values: the object.
        source: what the object is, for errors, such as the path of the config.json.
    """

    def __init__(self, values: Mapping[str, Any], source: str) -> None:
        self.values = values
        self.source = source

    def get(self, *names: str) -> Any:
        """The first of `names` that is set, else None; several names are spellings of one field."""
        return next((self.values[name] for name in names if self.values.get(name) is not None), None)

    def integer(self, *names: str, default: int | None = None) -> int:
        """A whole number above zero. Raises ConfigurationError; so do all below."""
        value = self._present(names, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise self.error(names[0], value, "a whole number above 0")
        return value

    def number(self, *names: str, default: float | None = None) -> float:
        """A number above zero."""
        value = self._present(names, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
            raise self.error(names[0], value, "a number above 0")
        return float(value)

    def flag(self, *names: str, default: bool | None = None) -> bool:
        """true or false."""
        value = self._present(names, default)
        if not isinstance(value, bool):
            raise self.error(names[0], value, "true or false")
        return value

    def text(self, *names: str, default: str | None = None) -> str:
        """A string."""
        value = self._present(names, default)
        if not isinstance(value, str):
            raise self.error(names[0], value, "a string")
        return value

    def optional_number(self, *names: str) -> float | None:
        """A number above zero, or None where the field is not set."""
        return None if self.get(*names) is None else self.number(*names)

    def integers(self, *names: str) -> tuple[int, ...]:
        """A list of whole numbers or a single one; empty where the field is not set."""
        value = self.get(*names)
        items = [] if value is None else value if isinstance(value, list) else [value]
        if any(isinstance(item, bool) or not isinstance(item, int) or item < 0 for item in items):
            raise self.error(names[0], value, "a whole number or a list of them")
        return tuple(items)

    def choice(self, *names: str, options: Mapping[str, str], default: str | None = None) -> str:
        """A string out of the keys of `options`, translated to its value there."""
        value = self.text(*names, default=default)
        if value not in options:
            raise self.error(names[0], value, f"one of {', '.join(sorted(options))}")
        return options[value]

    def refuse(self, refused: Mapping[str, Sequence[Any]]) -> None:
        """Fails for a field that would change numbers and is not implemented, unless it is not set or has one of
        the values listed, which mean "off". Computing something else in silence would be worse."""
        for name, harmless in refused.items():
            value = self.values.get(name)
            if value is not None and value not in harmless:
                raise ConfigurationError(f"{self.source}: {name} = {value!r} is not supported by pimoe", name)

    def error(self, name: str, value: Any, expected: str) -> ConfigurationError:
        """The error for a field of a wrong value, to be raised by the caller."""
        return ConfigurationError(f"{self.source}: {name} = {value!r}; expected {expected}", name)

    def _present(self, names: Sequence[str], default: Any) -> Any:
        value = self.get(*names)
        if value is None:
            value = default
        if value is None:
            raise ConfigurationError(f"{self.source}: the field {' or '.join(names)} is missing", names[0])
        return value
