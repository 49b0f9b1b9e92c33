"""What of an answer is shown, and how: none of it changes what is generated, but that logprobs must be computed to
be told."""

from __future__ import annotations

from dataclasses import dataclass

from .context import ApiSettings
from .fields import Fields


@dataclass(frozen=True, slots=True)
class Shown:
    """What of an answer is shown, and how; none of it changes what is generated.

    Attributes:
        continuous_usage: every chunk of a stream tells the usage so far.
        tokens_as_ids: logprobs name tokens as `token_id:17`.
        echo: the prompt's text, and its logprobs where logprobs are asked for, go in front of the answer.
        only_echo: and no answer follows.
        prompt_logprobs: how many alternatives to tell of each token of the prompt; None: do not tell them.
        stop: what stopped an answer is part of its text.
        special_tokens: special tokens are part of its text.
    """

    stream: bool = False
    include_usage: bool = False
    continuous_usage: bool = False
    token_ids: bool = False
    tokens_as_ids: bool = False
    echo: bool = False
    only_echo: bool = False
    prompt_logprobs: int | None = None
    stop: bool = False
    special_tokens: bool = False


def read_shown(fields: Fields, settings: ApiSettings, echo: bool, no_answer: bool) -> Shown:
    """The fields of a body that `Shown` is about.

    Args:
        echo, no_answer: what the endpoint's own fields say.

    Raises:
        InvalidRequestError: malformed, or not to be had in a stream.
    """
    stream = fields.flag("stream") or False
    include_usage, continuous_usage = _usage_options(fields, stream)
    prompt_logprobs = fields.integer("prompt_logprobs", 0, settings.max_logprobs)
    if stream and prompt_logprobs is not None:
        raise fields.wrong("prompt_logprobs", "absent where stream is true")
    skips = fields.flag("skip_special_tokens")
    return Shown(
        stream=stream,
        include_usage=include_usage,
        continuous_usage=continuous_usage,
        token_ids=fields.flag("return_token_ids") or False,
        tokens_as_ids=fields.flag("return_tokens_as_token_ids") or False,
        echo=echo,
        only_echo=echo and no_answer,
        prompt_logprobs=prompt_logprobs,
        stop=fields.flag("include_stop_str_in_output") or False,
        special_tokens=skips is False,
    )


def _usage_options(fields: Fields, stream: bool) -> tuple[bool, bool]:
    if fields.values.get("stream_options") is None:
        return False, False
    if not stream:
        raise fields.wrong("stream_options", "absent unless stream is true")
    options = fields.child("stream_options")
    options.only(("include_usage", "continuous_usage_stats", "include_obfuscation"))
    include = options.flag("include_usage") or False
    return include, (options.flag("continuous_usage_stats") or False) and include
