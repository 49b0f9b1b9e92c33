"""Giving one answer of `/v1`: whole, or as server-sent events."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import orjson

from ...runtime.requests import GenerateAnswer, ModelInfo
from .assembly import Piece
from .call import Call, cache_header, combined
from .chat_prompt import ModeReport
from .generation import Events, Plan
from .openai_format import Choice, Format, usage
from .openai_shown import Shown


class Answer:
    """What all parts of one answer share, and what it has cost so far."""

    def __init__(
        self,
        shown: Shown,
        plan: Plan,
        answers: list[GenerateAnswer],
        shape: Format,
        known: ModelInfo,
        told: ModeReport | None = None,
    ) -> None:
        self.shape = shape
        self.shown = shown
        outcome = combined(answer.outcome for answer in answers)
        self.headers = [cache_header(outcome), *(told.headers() if told else ())]
        self.count = len(answers)
        # Where it is kept (`Call.repeat`), what a mode left out of the chat would not be counted again.
        self.hits = [answer.hit for answer in answers] if told is None else []
        # What there is to tell of the request's mode.
        self.told = {"pimoe": told.body()} if told else {}
        self._n = plan.n
        self._id = f"{shape.id_prefix}-{answers[0].response_id}"
        self._created_s = answers[0].created_s
        self._model = known.name
        self._prompt_tokens = plan.prompt_tokens
        self._cached_tokens = self._tokens = 0

    def taken(self, index: int, piece: Piece) -> Piece:
        """Counts a piece; what of it is to be given."""
        if self.shown.only_echo:
            reason = piece.finish_reason and "length"
            piece = replace(
                piece, text="", token_ids=(), logprobs=(), offsets=(), finish_reason=reason, stop_reason=None
            )
        self._tokens += len(piece.token_ids)
        if index % self._n == 0:  # the other choices share this one's prompt
            self._cached_tokens += piece.cached_tokens
        return piece

    def usage(self) -> dict[str, Any]:
        """Of what was taken."""
        return usage(self._prompt_tokens, self._tokens, self._cached_tokens)

    def envelope(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        """The answer, or one chunk of it, around its choices."""
        head = {"id": self._id, "object": kind, "created": self._created_s}
        return {**head, "model": self._model, "choices": choices}

    def chunk(self, index: int, piece: Piece, first: bool, first_of_all: bool = False) -> bytes | None:
        """A streamed chunk; None where the piece has nothing to tell yet."""
        choice = self.shape.delta(index, self.taken(index, piece), first)
        if choice is None:
            return None
        body = self.envelope(self.shape.chunk_object, [choice])
        if first_of_all:
            body |= self.shape.around(piece) | self.told
        if self.shown.include_usage:
            body["usage"] = self.usage() if self.shown.continuous_usage else None
        return orjson.dumps(body)


async def respond(call: Call, answer: Answer, events: Events) -> None:
    """Sends the answer when it is whole."""
    choices = [Choice() for _ in range(answer.count)]
    async for index, piece in events:
        choices[index].add(piece)
    whole = [answer.taken(index, choice.whole()) for index, choice in enumerate(choices)]
    done = [answer.shape.choice(index, piece) for index, piece in enumerate(whole)]
    body = answer.envelope(answer.shape.object, done)
    body["usage"] = answer.usage()
    body |= answer.shape.around(whole[0]) | answer.told
    content = orjson.dumps(body)
    if answer.hits and None not in answer.hits:
        await call.respond_hit(content, b"application/json", answer.headers, answer.hits)
    else:
        await call.respond(content, extra=answer.headers)


async def stream(call: Call, answer: Answer, events: Events) -> None:
    """Sends the answer as it comes."""
    # A refusal comes with the first piece, and only before the head is sent can it still choose the status.
    index, piece = await anext(events)
    await call.start_stream(answer.headers)
    begun = {index}
    await _send(call, answer.chunk(index, piece, first=True, first_of_all=True))
    async for index, piece in events:
        await _send(call, answer.chunk(index, piece, first=index not in begun))
        begun.add(index)
    if answer.shown.include_usage:
        last = answer.envelope(answer.shape.chunk_object, [])
        await call.event(orjson.dumps({**last, "usage": answer.usage()}))
    await call.event(b"[DONE]")
    await call.end_stream()


async def _send(call: Call, chunk: bytes | None) -> None:
    if chunk is not None:
        await call.event(chunk)
