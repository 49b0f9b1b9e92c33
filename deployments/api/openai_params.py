"""Reading the bodies of `/v1/completions` and `/v1/chat/completions`, all but the prompt.

Three kinds of fields: those that are honoured; those that cannot change the answer, which are accepted and
ignored; and those that would change it but are not supported, which are refused unless they say "nothing"
(`NEUTRAL`). A field that nobody knows is refused too: a misspelt `max_token` must not be answered as if it
were not there.

Fields by topic: `openai_sampling`, `openai_structured` (what an answer must match), `openai_shown` (what is told
of it), `openai_tools`, `openai_chat` (messages and template), `openai_prompts`, `options` (priority, timeout,
cache).
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ...runtime.caching import BypassReason
from ...runtime.errors import InvalidRequestError, ModelNotFoundError
from ...runtime.requests import ModelInfo, SamplingParams
from .context import ApiSettings
from .fields import Fields, shown
from .modes import Chosen, choose, seed_of_prompt
from .openai_sampling import HUGE, SAMPLING_FIELDS, read_sampling
from .openai_shown import Shown, read_shown
from .openai_structured import STRUCTURED_FIELDS, read_grammar
from .options import CallOptions, read_options, read_truncation

_HONOURED = {
    *("model", "n", "best_of", "stream", "stream_options", "max_tokens", "logprobs", "prompt_logprobs"),
    *("return_token_ids", "return_tokens_as_token_ids", "include_stop_str_in_output", "skip_special_tokens"),
    *("truncate_prompt_tokens", "add_special_tokens", "cache_salt"),
    *("priority", "service_tier", "timeout", "cache", "mode"),
}
_IGNORED = {
    *("user", "store", "metadata", "safety_identifier", "prediction", "request_id"),
    *("prompt_cache_key", "prompt_cache_options", "prompt_cache_retention"),
}
# Fields that would change the answer, and the values besides null with which they do not.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "allowed_token_ids": (),
    "audio": (),
    "bad_words": ([],),
    "early_stopping": (False,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "length_penalty": (1,),
    "logits_processors": ([],),
    "modalities": (["text"],),
    "moderation": (),
    "spaces_between_special_tokens": (True,),
    "suffix": ("",),
    "use_beam_search": (False,),
    "verbosity": ("medium",),
    "web_search_options": (),
}
# The same, of fields that the other endpoint honours.
COMPLETION_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "parallel_tool_calls": (True, False),
    "reasoning_effort": ("none",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
}
CHAT_NEUTRAL: dict[str, tuple[Any, ...]] = {"chat_template": (), "documents": ([],), "echo": (False,)}

_KNOWN = _HONOURED | _IGNORED | NEUTRAL.keys() | SAMPLING_FIELDS | STRUCTURED_FIELDS
COMPLETION_FIELDS = _KNOWN | COMPLETION_NEUTRAL.keys() | {"prompt", "echo"}
CHAT_FIELDS = (
    _KNOWN
    | CHAT_NEUTRAL.keys()
    | {
        *("messages", "max_completion_tokens", "top_logprobs", "tools", "tool_choice", "parallel_tool_calls"),
        *("add_generation_prompt", "continue_final_message", "chat_template_kwargs", "reasoning_effort"),
        *("include_reasoning", "truncation"),
    }
)

_SEEDS = 1 << 63
_MAX_SALT_CHARS = 256


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a body asks for, besides its prompt.

    Attributes:
        max_tokens: None where not given; then `default_tokens`, or what the context has left.
        seed: None where not given.
        sampling: all the rest of the sampling; its `max_tokens` and `seed` are not resolved yet.
        grammar_field: the field that asks for the sampling's grammar.
        truncate: keep so many of the prompt's tokens, the last ones; 0 keeps what the context has room for.
        add_special_tokens: whether the tokenizer adds its own to a prompt; None: completions only.
        chosen: its mode; already part of `sampling` and `default_tokens`.
    """

    n: int
    shown: Shown
    max_tokens: int | None
    default_tokens: int
    seed: int | None
    sampling: SamplingParams
    options: CallOptions
    cache_salt: str = ""
    grammar_field: str = ""
    truncate: int | None = None
    add_special_tokens: bool | None = None
    chosen: Chosen | None = None

    @property
    def repeatable(self) -> bool:
        """Whether its mode seeds it by its prompt."""
        return self.chosen is not None and self.chosen.preset.repeatable and self.options.use_cache

    @property
    def deterministic(self) -> bool:
        """Whether the same request gives the same answer, so that the cache may hold it."""
        return self.sampling.temperature == 0.0 or self.seed is not None or self.repeatable

    @property
    def bypass(self) -> BypassReason | None:
        """Why the cache is to leave the request alone; None: it may answer."""
        return self.options.bypass or (None if self.deterministic else "nondeterministic")

    def seed_of(self, choice: int, base: int) -> int:
        """The seed of one choice. Greedy choices share seed 0: they are one request, and one cache entry."""
        return 0 if self.sampling.temperature == 0.0 else (base + choice) % _SEEDS

    def base_seed(self, prompt: Sequence[int]) -> int:
        """The given seed, the prompt's, or a new one, from which the choices of one prompt count up."""
        if self.seed is not None:
            return self.seed
        return seed_of_prompt(prompt) if self.repeatable else secrets.randbelow(_SEEDS)


def check_model(fields: Fields, model: ModelInfo) -> None:
    """Whether the body names the model served, and that generates text.

    Raises:
        InvalidRequestError, ModelNotFoundError.
    """
    name = fields.text("model")
    if name is None:
        raise InvalidRequestError("model is missing; it must be the name of the model", "model")
    if name != model.name:
        raise ModelNotFoundError(f"no model {shown(name)} here; this is {shown(model.name)}", "model")
    if model.kind != "decoder":
        raise InvalidRequestError(f"{shown(name)} is one layer, for tensors (/v2), not for text", "model")


def read_completion(fields: Fields, model: ModelInfo, settings: ApiSettings, defaults: CallOptions) -> Wanted:
    """All of a completion's body but its prompt.

    Raises:
        InvalidRequestError, ModelNotFoundError.
    """
    fields.only(COMPLETION_FIELDS)
    check_model(fields, model)
    _check_neutral(fields, NEUTRAL | COMPLETION_NEUTRAL)
    logprobs = fields.integer("logprobs", 0, settings.max_logprobs)
    echo = fields.flag("echo") or False
    limit = fields.integer("max_tokens", 0 if echo else 1, HUGE)
    return _read(
        fields, model, settings, defaults, _Special(logprobs, limit, settings.default_completion_tokens, echo)
    )


def read_chat(fields: Fields, model: ModelInfo, settings: ApiSettings, defaults: CallOptions) -> Wanted:
    """All of a chat completion's body but its messages, tools and template.

    Raises:
        InvalidRequestError, ModelNotFoundError.
    """
    fields.only(CHAT_FIELDS)
    check_model(fields, model)
    _check_neutral(fields, NEUTRAL | CHAT_NEUTRAL)
    top = fields.integer("top_logprobs", 0, settings.max_logprobs)
    wants_logprobs = fields.flag("logprobs") or False
    if top is not None and not wants_logprobs:
        raise fields.wrong("top_logprobs", "absent unless logprobs is true")
    old, new = fields.integer("max_tokens", 1, HUGE), fields.integer("max_completion_tokens", 1, HUGE)
    if old is not None and new is not None and old != new:
        raise fields.wrong("max_tokens", f"absent, or equal to max_completion_tokens ({new})")
    logprobs = (top or 0) if wants_logprobs else None
    return _read(fields, model, settings, defaults, _Special(logprobs, new or old, settings.default_chat_tokens))


@dataclass(frozen=True, slots=True)
class _Special:
    """What the two endpoints spell differently."""

    logprobs: int | None
    max_tokens: int | None
    default_tokens: int
    echo: bool = False


def _read(
    fields: Fields, model: ModelInfo, settings: ApiSettings, defaults: CallOptions, special: _Special
) -> Wanted:
    n = fields.integer("n", 1, settings.max_choices) or 1
    best_of = fields.integer("best_of", 1, settings.max_choices)
    if best_of not in (None, n):
        raise fields.wrong("best_of", f"absent, or equal to n ({n}): choices are not ranked")
    shown = read_shown(fields, settings, special.echo, special.max_tokens == 0)
    of_prompt = (shown.prompt_logprobs, special.logprobs if special.echo else None)
    logprobs = special.logprobs, max((most for most in of_prompt if most is not None), default=None)
    seed = fields.integer("seed", -_SEEDS, _SEEDS - 1)
    options = read_options(fields, defaults, settings)
    grammar, grammar_field = read_grammar(fields)
    sampling = read_sampling(fields, model, settings, logprobs, grammar)
    chosen = choose(options.mode, read_truncation(fields), settings.modes, special.default_tokens)
    given = {name for name, value in fields.values.items() if value is not None}
    return Wanted(
        n=n,
        shown=shown,
        # Nothing can be computed of a prompt without a token following.
        max_tokens=1 if shown.only_echo else special.max_tokens,
        default_tokens=special.default_tokens if chosen is None else chosen.preset.max_tokens,
        seed=None if seed is None else seed % _SEEDS,
        sampling=sampling if chosen is None else chosen.preset.sampling(sampling, given),
        options=options,
        cache_salt=_cache_salt(fields),
        grammar_field=grammar_field,
        truncate=_truncate(fields),
        add_special_tokens=fields.flag("add_special_tokens"),
        chosen=chosen,
    )


def _check_neutral(fields: Fields, neutral: dict[str, tuple[Any, ...]]) -> None:
    for name in neutral.keys() & fields.values.keys():
        value = fields.values[name]
        if value is not None and value not in neutral[name]:
            raise InvalidRequestError(f"{name} is not supported (it is {shown(value)}); leave it out", name)


def _cache_salt(fields: Fields) -> str:
    salt = fields.text("cache_salt")
    if salt is not None and not 0 < len(salt) <= _MAX_SALT_CHARS:
        raise fields.wrong("cache_salt", f"a string of 1 to {_MAX_SALT_CHARS} characters")
    return salt or ""


def _truncate(fields: Fields) -> int | None:
    truncate = fields.integer("truncate_prompt_tokens", -1, HUGE)
    if truncate == 0:
        raise fields.wrong("truncate_prompt_tokens", "an integer from 1, or -1 for what the context has room for")
    return None if truncate is None else max(0, truncate)
