"""Reading the bodies of `/v1/completions` and `/v1/chat/completions`.

Three kinds of fields: those that are honoured; those that cannot change the answer, which are accepted and
ignored; and those that would change it but are not supported, which are refused unless they say "nothing"
(`NEUTRAL`). A field that nobody knows is refused too: a misspelt `max_token` must not be answered as if it
were not there.
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
from .options import CallOptions, read_options, read_truncation

_HONOURED = {
    *("model", "n", "stream", "stream_options", "max_tokens", "min_tokens", "temperature", "top_p", "top_k"),
    *("min_p", "seed", "stop", "stop_token_ids", "ignore_eos", "logprobs", "return_token_ids"),
    *("priority", "service_tier", "timeout", "cache", "mode"),
}
_IGNORED = {
    *("user", "store", "metadata", "safety_identifier", "parallel_tool_calls", "prediction"),
    *("prompt_cache_key", "prompt_cache_options", "prompt_cache_retention"),
}
# Fields that would change the answer, and the values besides null with which they do not.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "audio": (),
    "best_of": (),
    "echo": (False,),
    "frequency_penalty": (0,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "logit_bias": ({},),
    "modalities": (["text"],),
    "moderation": (),
    "presence_penalty": (0,),
    "reasoning_effort": ("none",),
    "repetition_penalty": (1,),
    "response_format": ({"type": "text"},),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "verbosity": ("medium",),
    "web_search_options": (),
}
_KNOWN = _HONOURED | _IGNORED | NEUTRAL.keys()
COMPLETION_FIELDS = _KNOWN | {"prompt"}
CHAT_FIELDS = _KNOWN | {"messages", "max_completion_tokens", "top_logprobs", "truncation"}

_HUGE = 1 << 62
_SEEDS = 1 << 63
_MAX_STOP_TOKEN_IDS = 64


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a body asks for, besides its prompt.

    Attributes:
        max_tokens: None where not given; then `default_tokens`, or what the context has left.
        seed: None where not given.
        sampling: all the rest of the sampling; its `max_tokens` and `seed` are not resolved yet.
        chosen: its mode; already part of `sampling` and `default_tokens`.
    """

    n: int
    stream: bool
    include_usage: bool
    stop: tuple[str, ...]
    return_token_ids: bool
    max_tokens: int | None
    default_tokens: int
    seed: int | None
    sampling: SamplingParams
    options: CallOptions
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
    logprobs = fields.integer("logprobs", 0, settings.max_logprobs)
    limit = fields.integer("max_tokens", 1, _HUGE)
    return _read(fields, model, settings, defaults, (logprobs, limit, settings.default_completion_tokens))


def read_chat(fields: Fields, model: ModelInfo, settings: ApiSettings, defaults: CallOptions) -> Wanted:
    """All of a chat completion's body but its messages.

    Raises:
        InvalidRequestError, ModelNotFoundError.
    """
    fields.only(CHAT_FIELDS)
    check_model(fields, model)
    top = fields.integer("top_logprobs", 0, settings.max_logprobs)
    wants_logprobs = fields.flag("logprobs") or False
    if top is not None and not wants_logprobs:
        raise fields.wrong("top_logprobs", "absent unless logprobs is true")
    old, new = fields.integer("max_tokens", 1, _HUGE), fields.integer("max_completion_tokens", 1, _HUGE)
    if old is not None and new is not None and old != new:
        raise fields.wrong("max_tokens", f"absent, or equal to max_completion_tokens ({new})")
    logprobs = (top or 0) if wants_logprobs else None
    return _read(fields, model, settings, defaults, (logprobs, new or old, settings.default_chat_tokens))


def _read(
    fields: Fields,
    model: ModelInfo,
    settings: ApiSettings,
    defaults: CallOptions,
    special: tuple[int | None, int | None, int],
) -> Wanted:
    logprobs, max_tokens, default_tokens = special
    n = fields.integer("n", 1, settings.max_choices) or 1
    _check_neutral(fields, n)
    stream = fields.flag("stream") or False
    seed = fields.integer("seed", -_SEEDS, _SEEDS - 1)
    options = read_options(fields, defaults, settings)
    chosen = choose(options.mode, read_truncation(fields), settings.modes, default_tokens)
    given = {name for name, value in fields.values.items() if value is not None}
    sampling = _sampling(fields, model, logprobs)
    return Wanted(
        n=n,
        stream=stream,
        include_usage=_include_usage(fields, stream),
        stop=_stop(fields, settings),
        return_token_ids=fields.flag("return_token_ids") or False,
        max_tokens=max_tokens,
        default_tokens=default_tokens if chosen is None else chosen.preset.max_tokens,
        seed=None if seed is None else seed % _SEEDS,
        sampling=sampling if chosen is None else chosen.preset.sampling(sampling, given),
        options=options,
        chosen=chosen,
    )


def _sampling(fields: Fields, model: ModelInfo, logprobs: int | None) -> SamplingParams:
    temperature = fields.number("temperature", 0.0, 2.0)
    top_p = fields.number("top_p", 0.0, 1.0, above=True)
    # Other servers write "all tokens" as -1.
    top_k = max(0, fields.integer("top_k", -1, _HUGE) or 0)
    return SamplingParams(
        min_tokens=fields.integer("min_tokens", 0, _HUGE) or 0,
        temperature=1.0 if temperature is None else temperature,
        top_p=1.0 if top_p is None else top_p,
        top_k=0 if top_k >= model.vocab_size else top_k,
        min_p=fields.number("min_p", 0.0, 1.0) or 0.0,
        logprobs=logprobs,
        stop_token_ids=_stop_token_ids(fields, model),
        ignore_eos=fields.flag("ignore_eos") or False,
    )


def _check_neutral(fields: Fields, n: int) -> None:
    for name in NEUTRAL.keys() & fields.values.keys():
        value = fields.values[name]
        if value is None or value in NEUTRAL[name] or (name == "best_of" and value == n):
            continue
        raise InvalidRequestError(f"{name} is not supported (it is {shown(value)}); leave it out", name)


def _include_usage(fields: Fields, stream: bool) -> bool:
    if fields.values.get("stream_options") is None:
        return False
    if not stream:
        raise fields.wrong("stream_options", "absent unless stream is true")
    options = fields.child("stream_options")
    options.only(("include_usage", "include_obfuscation"))
    return options.flag("include_usage") or False


def _stop(fields: Fields, settings: ApiSettings) -> tuple[str, ...]:
    value = fields.values.get("stop")
    if value is None:
        return ()
    stops = [value] if isinstance(value, str) else value
    longest = settings.max_stop_chars
    fits = isinstance(stops, list) and len(stops) <= settings.max_stop_strings
    if not fits or not all(isinstance(stop, str) and 0 < len(stop) <= longest for stop in stops):
        many = settings.max_stop_strings
        raise fields.wrong("stop", f"a string or a list of at most {many}, each of 1 to {longest} characters")
    return tuple(stops)


def _stop_token_ids(fields: Fields, model: ModelInfo) -> tuple[int, ...]:
    ids = fields.items("stop_token_ids") or []
    if len(ids) > _MAX_STOP_TOKEN_IDS or not all(type(i) is int and 0 <= i < model.vocab_size for i in ids):
        right = f"at most {_MAX_STOP_TOKEN_IDS} token ids from 0 to {model.vocab_size - 1}"
        raise fields.wrong("stop_token_ids", right)
    return tuple(ids)
