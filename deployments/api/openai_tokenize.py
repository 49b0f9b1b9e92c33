"""vLLM's `/tokenize` and `/detokenize`: what a prompt or a chat is in tokens, and back. Nothing is computed."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import orjson

from ...runtime.errors import InvalidRequestError
from .bodies import decode_json
from .call import Call
from .chat_prompt import chat_prompt
from .context import TextCodec
from .fields import Fields
from .openai_chat import read_conversation
from .openai_params import check_model
from .openai_prompts import THREAD_FROM_CHARS, encode_all

_COMMON_FIELDS = ("model", "add_special_tokens", "return_token_strs")
_PROMPT_FIELDS = frozenset((*_COMMON_FIELDS, "prompt"))
_CHAT_FIELDS = frozenset(
    (
        *(*_COMMON_FIELDS, "messages", "tools", "tool_choice", "add_generation_prompt", "continue_final_message"),
        *("chat_template_kwargs", "reasoning_effort"),
    )
)


async def tokenize(call: Call) -> None:
    """`POST /tokenize`: of `prompt`, or of `messages` with the fields of a chat that its template reads."""
    fields, codec = await _body(call)
    model = call.context.model
    strings = fields.flag("return_token_strs") or False
    if "messages" in fields.values:
        fields.only(_CHAT_FIELDS)
        ids = await _chat(call, fields, codec)
    else:
        fields.only(_PROMPT_FIELDS)
        prompt = fields.text("prompt")
        if prompt is None:
            raise fields.wrong("prompt", "a string; or there must be messages")
        special = fields.flag("add_special_tokens") is not False
        many = [prompt] if prompt else []
        (ids,) = await encode_all(list(many), codec, model, special, whole=False) or [codec.encode("", special)]

    def answer() -> bytes:
        names = [codec.token_piece(token) for token in ids] if strings else None
        context = model.max_context_tokens
        return orjson.dumps({"count": len(ids), "max_model_len": context, "tokens": ids, "token_strs": names})

    await call.respond(await _done(answer, len(ids)))


async def detokenize(call: Call) -> None:
    """`POST /detokenize`: the text of `tokens`, special tokens by name."""
    fields, codec = await _body(call)
    fields.only(("model", "tokens"))
    model, ids = call.context.model, fields.items("tokens")

    def answer() -> bytes:
        if ids is None or not all(type(token) is int and 0 <= token < model.vocab_size for token in ids):
            raise fields.wrong("tokens", f"a list of token ids from 0 to {model.vocab_size - 1}")
        return orjson.dumps({"prompt": codec.decode(ids, skip_special_tokens=False)})

    await call.respond(await _done(answer, len(ids or ())))


async def _done(work: Callable[[], bytes], size: int) -> bytes:
    """What `work` gives; in a thread where it would hold the event loop for milliseconds."""
    return await asyncio.to_thread(work) if size >= THREAD_FROM_CHARS else work()


async def _body(call: Call) -> tuple[Fields, TextCodec]:
    fields = Fields(decode_json(await call.body(), call.settings.max_json_bytes))
    if fields.values.get("model") is not None:
        check_model(fields, call.context.model)
    codec = call.context.tokenizer
    if codec is None:
        raise InvalidRequestError("this checkpoint has no tokenizer", "model")
    return fields, codec


async def _chat(call: Call, fields: Fields, codec: TextCodec) -> list[int]:
    prompts = call.context.prompts
    assert prompts is not None  # there is a codec
    chat = read_conversation(fields, codec).chat
    return (
        await chat_prompt(prompts, chat, None, (call.context.model.max_context_tokens, None), whole=False)
    ).token_ids
