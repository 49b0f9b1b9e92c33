"""OpenAI's routes: completions, chat completions, models."""

from __future__ import annotations

from contextlib import aclosing
from typing import Any

import orjson

from ...runtime.errors import InvalidRequestError, ModelNotFoundError
from ...runtime.requests import GenerateAnswer, ModelInfo
from .assembly import Piece
from .bodies import decode_json
from .call import Call, cache_header, combined
from .chat_prompt import ModeReport, chat_prompt, report
from .fields import Fields, shown
from .generation import Events, Plan, interleave, make_plan, started, streams
from .openai_format import ChatFormat, Choice, CompletionFormat, Format, usage
from .openai_params import Wanted, read_chat, read_completion
from .openai_prompts import Prompt, encode_all, read_messages, read_prompts
from .prompt_cache import Chat


async def completions(call: Call) -> None:
    """`POST /v1/completions`."""
    fields, model = await _body(call)
    wanted = read_completion(fields, model, call.settings, call.header_options())
    prompts = read_prompts(fields, model, call.settings)
    await _generate(call, wanted, prompts, CompletionFormat(call.context.tokenizer), report(wanted.chosen))


async def chat_completions(call: Call) -> None:
    """`POST /v1/chat/completions`."""
    fields, model = await _body(call)
    wanted = read_chat(fields, model, call.settings, call.header_options())
    chat = Chat(read_messages(fields))
    codec, prompts = call.context.tokenizer, call.context.prompts
    if codec is None or prompts is None:
        raise InvalidRequestError("this checkpoint has no tokenizer, so there is no chat", "messages")
    prompt = await chat_prompt(prompts, chat, wanted.chosen, (model.max_context_tokens, wanted.max_tokens))
    told = report(wanted.chosen, prompt)
    await _generate(call, wanted, [prompt.token_ids], ChatFormat(codec), told)


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
    described = {"id": known.name, "object": "model", "created": created_s, "owned_by": "pimoe"}
    return {**described, "max_model_len": known.max_context_tokens}


async def _body(call: Call) -> tuple[Fields, ModelInfo]:
    known = call.context.model
    return Fields(decode_json(await call.body(), call.settings.max_json_bytes)), known


async def _generate(
    call: Call, wanted: Wanted, prompts: list[Prompt], shape: Format, told: ModeReport | None
) -> None:
    known, codec = call.context.model, call.context.tokenizer
    if codec is None and wanted.stop:
        raise InvalidRequestError(
            "stop needs a tokenizer, which this checkpoint has not; use stop_token_ids", "stop"
        )
    remaining_s = call.start_clock(wanted.options.timeout_s)
    # A rendered chat already holds the special tokens that its template wants, and its answer begins anew.
    continues = not isinstance(shape, ChatFormat)
    encoded = await encode_all(prompts, codec, known, special=continues)
    plan = make_plan(wanted, encoded, known, call.work_id(), remaining_s)
    async with (
        started(call.context, plan) as answers,
        aclosing(interleave(streams(answers, codec, plan, continues))) as events,
    ):
        # Without a tokenizer the ids are all there is of an answer.
        with_ids = wanted.return_token_ids or codec is None
        answer = _Answer(wanted, plan, answers, shape, known, with_ids, told)
        await (_stream(call, answer, events) if wanted.stream else _respond(call, answer, events))


class _Answer:
    """What all parts of one answer share."""

    def __init__(
        self,
        wanted: Wanted,
        plan: Plan,
        answers: list[GenerateAnswer],
        shape: Format,
        known: ModelInfo,
        with_ids: bool,
        told: ModeReport | None,
    ) -> None:
        self.shape = shape
        self.include_usage = wanted.include_usage
        self.outcome = combined(answer.outcome for answer in answers)
        self.prompt_tokens = plan.prompt_tokens
        self.count = len(answers)
        self._logprobs = plan.rules.logprobs
        self._with_ids = with_ids
        self._told = told
        self.headers = [cache_header(self.outcome), *(told.headers() if told else ())]
        self._id = f"{shape.id_prefix}-{answers[0].response_id}"
        self._created_s = answers[0].created_s
        self._model = known.name

    def envelope(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        """The answer, or one chunk of it, around its choices."""
        head = {"id": self._id, "object": kind, "created": self._created_s}
        return {**head, "model": self._model, "choices": choices}

    def choice(self, index: int, piece: Piece) -> dict[str, Any]:
        """A whole choice."""
        return self._add_ids(self.shape.choice(index, piece, self._logprobs), piece)

    def chunk(self, index: int, piece: Piece, first: bool) -> bytes | None:
        """A streamed chunk; None where the piece has nothing to tell yet."""
        if not (piece.text or piece.finish_reason or first or self._with_ids or self._logprobs):
            return None
        choice = self._add_ids(self.shape.delta(index, piece, self._logprobs, first), piece)
        body = self.envelope(self.shape.chunk_object, [choice])
        if self.include_usage:
            body["usage"] = None
        if first and index == 0:
            self.add_report(body)
        return orjson.dumps(body)

    def add_report(self, body: dict[str, Any]) -> None:
        """What there is to tell of the request's mode."""
        if self._told is not None:
            body["pimoe"] = self._told.body()

    def _add_ids(self, choice: dict[str, Any], piece: Piece) -> dict[str, Any]:
        if self._with_ids:
            choice["token_ids"] = piece.token_ids
        return choice


async def _respond(call: Call, answer: _Answer, events: Events) -> None:
    choices = [Choice() for _ in range(answer.count)]
    async for index, piece in events:
        choices[index].add(piece)
    done = [answer.choice(index, choice.whole()) for index, choice in enumerate(choices)]
    body = answer.envelope(answer.shape.object, done)
    body["usage"] = usage(answer.prompt_tokens, sum(len(choice.token_ids) for choice in choices))
    answer.add_report(body)
    await call.respond(orjson.dumps(body), extra=answer.headers)


async def _stream(call: Call, answer: _Answer, events: Events) -> None:
    # A refusal comes with the first piece, and only before the head is sent can it still choose the status.
    index, piece = await anext(events)
    await call.start_stream(answer.headers)
    begun = {index}
    tokens = len(piece.token_ids)
    await _send_chunk(call, answer.chunk(index, piece, first=True))
    async for index, piece in events:
        tokens += len(piece.token_ids)
        await _send_chunk(call, answer.chunk(index, piece, first=index not in begun))
        begun.add(index)
    if answer.include_usage:
        last = answer.envelope(answer.shape.chunk_object, [])
        await call.event(orjson.dumps({**last, "usage": usage(answer.prompt_tokens, tokens)}))
    await call.event(b"[DONE]")
    await call.end_stream()


async def _send_chunk(call: Call, chunk: bytes | None) -> None:
    if chunk is not None:
        await call.event(chunk)
