"""OpenAI's routes: completions, chat completions, models."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import aclosing, contextmanager
from dataclasses import replace
from typing import Any

import orjson

from ...runtime.errors import InvalidRequestError, ModelNotFoundError
from ...runtime.requests import ModelInfo
from .bodies import decode_json
from .call import Call
from .chat_prompt import ModeReport, chat_prompt, report
from .context import TextCodec
from .fields import Fields, shown
from .generation import Plan, TextKind, interleave, make_plan, started, streams
from .openai_answer import Answer, respond, stream
from .openai_chat import Conversation, read_conversation
from .openai_format import ChatFormat, CompletionFormat, Format, Telling
from .openai_logprobs import Echo, TokenNames, echo_of
from .openai_params import Wanted, read_chat, read_completion
from .openai_prompts import Prompt, encode_all, read_prompts, truncated


async def completions(call: Call) -> None:
    """`POST /v1/completions`."""
    body = await call.body()
    if await call.repeat(body):
        return
    fields, model = _fields(call, body)
    wanted = read_completion(fields, model, call.settings, call.header_options())
    prompts = read_prompts(fields, model, call.settings)
    await _generate(call, wanted, prompts, report(wanted.chosen))


async def chat_completions(call: Call) -> None:
    """`POST /v1/chat/completions`."""
    body = await call.body()
    if not _tells_the_time(call) and await call.repeat(body):
        return
    fields, model = _fields(call, body)
    wanted = read_chat(fields, model, call.settings, call.header_options())
    codec, prompts = call.context.tokenizer, call.context.prompts
    if codec is None or prompts is None:
        raise InvalidRequestError("this checkpoint has no tokenizer, so there is no chat", "messages")
    conversation = read_conversation(fields, codec)
    wanted = _must_call(wanted, conversation, codec)
    limits = (model.max_context_tokens, wanted.max_tokens)
    prompt = await chat_prompt(prompts, conversation.chat, wanted.chosen, limits, whole=wanted.truncate is None)
    await _generate(call, wanted, [prompt.token_ids], report(wanted.chosen, prompt), conversation)


async def models(call: Call) -> None:
    """`GET /v1/models`."""
    data = [_model(call.context.model, call.context.created_s)]
    await call.respond(orjson.dumps({"object": "list", "data": data}))


async def model(call: Call) -> None:
    """`GET /v1/models/{name}`."""
    name, known = call.scope["path_params"]["name"], call.context.model
    if name != known.name:
        raise ModelNotFoundError(f"no model {shown(name)} here; this is {shown(known.name)}", "model")
    await call.respond(orjson.dumps(_model(known, call.context.created_s)))


def _model(known: ModelInfo, created_s: int) -> dict[str, Any]:
    """OpenAI's fields, and those that vLLM's clients read."""
    described = {"id": known.name, "object": "model", "created": created_s, "owned_by": "pimoe"}
    return {**described, "root": known.name, "parent": None, "max_model_len": known.max_context_tokens}


def _fields(call: Call, body: bytes) -> tuple[Fields, ModelInfo]:
    known = call.context.model
    return Fields(decode_json(body, call.settings.max_json_bytes)), known


def _tells_the_time(call: Call) -> bool:
    """Whether equal chats may be different prompts."""
    return call.context.prompts is not None and call.context.prompts.reads_clock


def _must_call(wanted: Wanted, conversation: Conversation, codec: TextCodec) -> Wanted:
    """With the grammar of a forced tool call.

    Raises:
        InvalidRequestError: calls cannot be forced, or the answer must match something else already.
    """
    grammar = conversation.tools.grammar(codec)
    if grammar is None:
        return wanted
    if wanted.sampling.grammar_kind:
        raise InvalidRequestError(
            'tool_choice forces a call, so that the answer cannot match another format too; use "auto"',
            "tool_choice",
        )
    sampling = replace(wanted.sampling, grammar_kind="lark", grammar=grammar)
    return replace(wanted, sampling=sampling, grammar_field="tool_choice")


@contextmanager
def _told_by_field(wanted: Wanted) -> Iterator[None]:
    """Behind the gateway every grammar is one field; the caller knows it by another name."""
    try:
        yield
    except InvalidRequestError as error:
        if error.param != "grammar" or not wanted.grammar_field:
            raise
        raise type(error)(error.message, wanted.grammar_field) from error


async def _generate(
    call: Call,
    wanted: Wanted,
    prompts: list[Prompt],
    told: ModeReport | None,
    conversation: Conversation | None = None,
) -> None:
    known, codec = call.context.model, call.context.tokenizer
    if codec is None and wanted.sampling.stop:
        raise InvalidRequestError(
            "stop needs a tokenizer, which this checkpoint has not; use stop_token_ids", "stop"
        )
    remaining_s = call.start_clock(wanted.options.timeout_s)
    special, whole = wanted.add_special_tokens is not False, wanted.truncate is None
    encoded = await encode_all(prompts, codec, known, special, whole)
    encoded = [truncated(ids, wanted.truncate, wanted.max_tokens, known) for ids in encoded]
    kind = _kind(wanted, conversation, codec)
    plan = make_plan(wanted, encoded, known, call.work_id(), remaining_s, kind)
    with _told_by_field(wanted):
        await _answer(call, wanted, prompts, plan, told, conversation)


async def _answer(
    call: Call,
    wanted: Wanted,
    prompts: list[Prompt],
    plan: Plan,
    told: ModeReport | None,
    conversation: Conversation | None,
) -> None:
    known, codec = call.context.model, call.context.tokenizer
    async with (
        started(call.context, plan) as answers,
        aclosing(interleave(streams(answers, codec, plan))) as events,
    ):
        telling = _telling(wanted, plan, codec)
        if conversation is None:
            shape: Format = CompletionFormat(telling, _echoes(wanted, prompts, plan, codec))
        else:
            shape = ChatFormat(telling, conversation.tools, answers[0].response_id, conversation.reasoning)
        answer = Answer(wanted.shown, plan, answers, shape, known, told)
        await (stream if wanted.shown.stream else respond)(call, answer, events)


def _kind(wanted: Wanted, conversation: Conversation | None, codec: TextCodec | None) -> TextKind:
    if codec is None:
        return TextKind()
    visible = codec.special_token_ids if wanted.shown.special_tokens else frozenset()
    if conversation is None:
        return TextKind(visible=visible)
    visible |= conversation.tools.visible(codec)
    return TextKind(anew=not conversation.chat.unfinished, visible=visible)


def _telling(wanted: Wanted, plan: Plan, codec: TextCodec | None) -> Telling:
    return Telling(
        names=TokenNames(codec, wanted.shown.tokens_as_ids),
        logprobs=plan.rules.logprobs,
        prompt_logprobs=wanted.shown.prompt_logprobs,
        # Without a tokenizer the ids are all there is of an answer.
        token_ids=wanted.shown.token_ids or codec is None,
        prompt_token_ids=wanted.shown.token_ids,
        prompts=plan.prompts,
        n=plan.n,
    )


def _echoes(wanted: Wanted, prompts: list[Prompt], plan: Plan, codec: TextCodec | None) -> list[Echo]:
    if not wanted.shown.echo:
        return []
    whole = wanted.truncate is None
    texts = [prompt if whole and isinstance(prompt, str) else None for prompt in prompts]
    return [echo_of(text, ids, codec) for text, ids in zip(texts, plan.prompts, strict=True)]
