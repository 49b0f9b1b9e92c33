"""Modes: one field of a request that stands for a preset. Pure: nothing here reads a request or counts a token.

                      accuracy           speed              ultra
    newest_messages   8                  6                  6             of a chat stay, besides the system's
    context_share     all                a half             a quarter     of the context, for the prompt of a chat
    max_tokens        1024               256                128           where the request names none
    top_k             as without a mode  50                 20            tokens that are drawn from
    penalties         as without a mode  as without a mode  none          the sampler skips that work
    repeatable        no                 no                 yes           seeded by the prompt: see below

What a request says itself wins over its mode, field by field; "none" stands for no mode, where the settings have a
`default_mode`.

`accuracy` shortens no sampling and computes what a request without a mode computes. Where nothing is drawn
(temperature 0) no mode changes the sampling: all of them give the same tokens for the same prompt, and share its
entry in the result cache.

The result cache holds what is greedy or has a seed. A sampled request without a seed is answered anew each time,
which is what people expect of it, so `accuracy` and `speed` leave it alone. In `ultra` it is given a seed made of
its prompt: asked the same again it answers the same, and from the cache. Whoever wants another answer there gives
a `seed`, or `cache: false`, which draws a fresh one.

Trimming (`trimming.py`) needs a budget of tokens for the prompt: the mode's share of what the context has besides
the answer, for which `max_tokens` are reserved, or where the request names none the mode's default, but of a small
context no more than a quarter.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Collection, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, get_args

from ...runtime.errors import ConfigurationError
from ...runtime.requests import SamplingParams

ModeName = Literal["accuracy", "speed", "ultra"]
Truncation = Literal["auto", "disabled"]
MODE_NAMES: tuple[ModeName, ...] = get_args(ModeName)
NO_MODE = "none"

_NO_PENALTIES: dict[str, float] = {"repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}
_SEEDS = 1 << 63
_LEAST_CONTEXT_FOR_PROMPT = 4  # a default `max_tokens` reserves one part in so many of the context at most


@dataclass(frozen=True, slots=True)
class Mode:
    """One preset; see the module.

    Attributes:
        newest_messages: how many messages of a chat stay, besides the system's; 0: as many as fit.
        context_share: of the tokens that the context has besides the answer, for the prompt of a chat; (0, 1].
        max_tokens: for requests that name none.
        top_k: 0 leaves it as it is without a mode.
        penalties: False sets those to nothing that the request does not name.
        repeatable: a sampled request without a seed is given one that its prompt decides.

    Raises:
        ConfigurationError: a value is outside its range.
    """

    newest_messages: int
    context_share: float
    max_tokens: int
    top_k: int = 0
    penalties: bool = True
    repeatable: bool = False

    def __post_init__(self) -> None:
        least = {"newest_messages": 0, "max_tokens": 1, "top_k": 0}
        for name, low in least.items():
            value = getattr(self, name)
            if type(value) is not int or value < low:
                raise ConfigurationError(f"{name} is {value!r}; it must be an integer from {low}", name)
        share = self.context_share
        if isinstance(share, bool) or not isinstance(share, int | float) or not 0 < share <= 1:
            raise ConfigurationError(
                f"context_share is {share!r}; it must be above 0 and up to 1", "context_share"
            )
        for name in ("penalties", "repeatable"):
            if type(getattr(self, name)) is not bool:
                raise ConfigurationError(f"{name} is {getattr(self, name)!r}; it must be true or false", name)

    def sampling(self, asked: SamplingParams, given: Collection[str]) -> SamplingParams:
        """The sampling of a request: what it names itself (`given`) stays as `asked`."""
        presets: dict[str, Any] = {} if self.penalties else dict(_NO_PENALTIES)
        if self.top_k and asked.temperature != 0.0:  # of greedy choices there is nothing to draw
            presets["top_k"] = self.top_k
        return replace(asked, **{name: value for name, value in presets.items() if name not in given})

    def prompt_budget(self, context_tokens: int, max_tokens: int | None) -> int:
        """Most tokens of a chat's prompt; see the module. Not above 0 where `max_tokens` leave nothing.

        Args:
            context_tokens: what prompt and answer have together.
            max_tokens: of the request, if it names any.
        """
        reserved = max_tokens
        if reserved is None:
            reserved = min(self.max_tokens, context_tokens // _LEAST_CONTEXT_FOR_PROMPT)
        return int((context_tokens - reserved) * self.context_share)


@dataclass(frozen=True, slots=True)
class Modes:
    """The presets by name."""

    accuracy: Mode = Mode(newest_messages=8, context_share=1.0, max_tokens=1024)
    speed: Mode = Mode(newest_messages=6, context_share=0.5, max_tokens=256, top_k=50)
    ultra: Mode = Mode(6, context_share=0.25, max_tokens=128, top_k=20, penalties=False, repeatable=True)

    def __post_init__(self) -> None:
        for field in fields(self):
            if not isinstance(getattr(self, field.name), Mode):
                raise ConfigurationError(f"{field.name} is no mode", field.name)

    def named(self, name: ModeName) -> Mode:
        """The preset of that name."""
        mode: Mode = getattr(self, name)
        return mode


@dataclass(frozen=True, slots=True)
class Chosen:
    """What a request's mode and its `truncation` come to.

    Attributes:
        name: None where there is only a `truncation` and no mode.
        truncation: "disabled" keeps every message, whatever the mode; "auto" without a mode drops the oldest ones
            only where the context has no room for all, as OpenAI's field of that name does.
    """

    name: ModeName | None
    preset: Mode
    truncation: Truncation = "auto"

    @property
    def trims(self) -> bool:
        """Whether messages may be left out."""
        return self.truncation == "auto"


def choose(
    name: ModeName | None, truncation: Truncation | None, modes: Modes, default_tokens: int
) -> Chosen | None:
    """The preset of a request; None where it asks for nothing of the kind.

    Args:
        default_tokens: `max_tokens` of requests that name neither it nor a mode.
    """
    if name is not None:
        return Chosen(name, modes.named(name), truncation or "auto")
    if truncation == "auto":
        return Chosen(None, Mode(newest_messages=0, context_share=1.0, max_tokens=default_tokens))
    return None


def seed_of_prompt(token_ids: Sequence[int]) -> int:
    """A seed that a prompt decides, in [0, 2**63): equal prompts draw equal numbers, others unrelated ones."""
    digest = hashlib.sha256(struct.pack(f"<{len(token_ids)}q", *token_ids)).digest()
    return int.from_bytes(digest[:8], "little") % _SEEDS
