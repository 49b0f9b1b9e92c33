"""The sampling fields of `/v1`: OpenAI's, and vLLM's under their own names."""

from __future__ import annotations

from ...runtime.requests import GrammarKind, ModelInfo, SamplingParams
from .context import ApiSettings
from .fields import Fields

SAMPLING_FIELDS = frozenset(
    (
        *("temperature", "top_p", "top_k", "min_p", "seed", "min_tokens", "ignore_eos", "stop", "stop_token_ids"),
        *("presence_penalty", "frequency_penalty", "repetition_penalty", "logit_bias"),
    )
)
HUGE = 1 << 62

_MAX_STOP_TOKEN_IDS = 64
_MAX_BIASES = 1024
_MAX_BIAS = 100.0
_MAX_REPETITION_PENALTY = 10.0


def read_sampling(
    fields: Fields,
    model: ModelInfo,
    settings: ApiSettings,
    logprobs: tuple[int | None, int | None],
    grammar: tuple[GrammarKind, str],
) -> SamplingParams:
    """The sampling of a body; its `max_tokens` and `seed` are not resolved yet.

    Args:
        logprobs: how many to report for each token of the answer, and of the prompt.

    Raises:
        InvalidRequestError: a value is out of its range.
    """
    temperature = fields.number("temperature", 0.0, 2.0)
    top_p = fields.number("top_p", 0.0, 1.0, above=True)
    # Other servers write "all tokens" as -1.
    top_k = max(0, fields.integer("top_k", -1, HUGE) or 0)
    repetition = fields.number("repetition_penalty", 0.0, _MAX_REPETITION_PENALTY, above=True)
    return SamplingParams(
        min_tokens=fields.integer("min_tokens", 0, HUGE) or 0,
        temperature=1.0 if temperature is None else temperature,
        top_p=1.0 if top_p is None else top_p,
        top_k=0 if top_k >= model.vocab_size else top_k,
        min_p=fields.number("min_p", 0.0, 1.0) or 0.0,
        repetition_penalty=1.0 if repetition is None else repetition,
        presence_penalty=fields.number("presence_penalty", -2.0, 2.0) or 0.0,
        frequency_penalty=fields.number("frequency_penalty", -2.0, 2.0) or 0.0,
        logit_bias=_logit_bias(fields, model),
        logprobs=logprobs[0],
        prompt_logprobs=logprobs[1],
        stop=_stop(fields, settings),
        stop_token_ids=_stop_token_ids(fields, model),
        ignore_eos=fields.flag("ignore_eos") or False,
        grammar_kind=grammar[0],
        grammar=grammar[1],
    )


def _stop(fields: Fields, settings: ApiSettings) -> tuple[str, ...]:
    """Sorted: in whatever order a client names them, it is one question."""
    value = fields.values.get("stop")
    if value is None:
        return ()
    stops = [value] if isinstance(value, str) else value
    longest = settings.max_stop_chars
    fits = isinstance(stops, list) and len(stops) <= settings.max_stop_strings
    if not fits or not all(isinstance(stop, str) and 0 < len(stop) <= longest for stop in stops):
        many = settings.max_stop_strings
        raise fields.wrong("stop", f"a string or a list of at most {many}, each of 1 to {longest} characters")
    return tuple(sorted(set(stops)))


def _stop_token_ids(fields: Fields, model: ModelInfo) -> tuple[int, ...]:
    ids = fields.items("stop_token_ids") or []
    if len(ids) > _MAX_STOP_TOKEN_IDS or not all(type(i) is int and 0 <= i < model.vocab_size for i in ids):
        right = f"at most {_MAX_STOP_TOKEN_IDS} token ids from 0 to {model.vocab_size - 1}"
        raise fields.wrong("stop_token_ids", right)
    return tuple(ids)


def _logit_bias(fields: Fields, model: ModelInfo) -> tuple[tuple[int, float], ...]:
    """OpenAI's map of token ids, which JSON makes strings, in the order of the ids; a bias of 0 is none."""
    given = fields.child("logit_bias").values
    right = f"an object of at most {_MAX_BIASES} token ids, each with a number from -100 to 100"
    if len(given) > _MAX_BIASES:
        raise fields.wrong("logit_bias", right)
    biases: dict[int, float] = {}
    for key, value in given.items():
        token = int(key) if isinstance(key, str) and key.isascii() and key.isdigit() and len(key) < 19 else -1
        if not 0 <= token < model.vocab_size or type(value) not in (int, float) or not abs(value) <= _MAX_BIAS:
            raise fields.wrong("logit_bias", f"{right}; token ids are from 0 to {model.vocab_size - 1}")
        biases[token] = float(value)
    return tuple((token, bias) for token, bias in sorted(biases.items()) if bias)
