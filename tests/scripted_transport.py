"""A transport without a network, for tests of `pimoe.clients`: answers what it is told and keeps what it got."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import msgpack
import numpy as np
from numpy.typing import NDArray
from pimoe.clients import HttpRequest, HttpResponse


@dataclass
class Reply:
    """An answer; its body comes in `pieces`. `closed` when the client dropped it."""

    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)
    pieces: list[bytes] = field(default_factory=list)
    closed: bool = False

    async def read_some(self) -> bytes:
        return self.pieces.pop(0) if self.pieces else b""

    def close(self) -> None:
        self.closed = True


Answer = Reply | Exception
Handler = Callable[[HttpRequest], Answer | Awaitable[Answer]]


class ScriptedTransport:
    """Gives `answers` one after the other, or what the handler says."""

    def __init__(self, *answers: Answer, handler: Handler | None = None) -> None:
        self._answers = list(answers)
        self._handler = handler or (lambda _: self._answers.pop(0))
        self.requests: list[HttpRequest] = []
        self.closed = False

    async def send(self, request: HttpRequest) -> HttpResponse:
        self.requests.append(request)
        answer = self._handler(request)
        if isinstance(answer, Awaitable):
            answer = await answer
        if isinstance(answer, Exception):
            raise answer
        return answer

    async def close(self) -> None:
        self.closed = True

    def body(self, index: int = -1) -> dict[str, Any]:
        """The body of a request, decoded."""
        request = self.requests[index]
        data = b"".join(request.body)
        value = json.loads(data) if "json" in request.headers["Content-Type"] else msgpack.unpackb(data)
        assert isinstance(value, dict)
        return value


def json_reply(value: object, status: int = 200, headers: Mapping[str, str] | None = None) -> Reply:
    """A JSON answer."""
    return Reply(status, headers or {}, [json.dumps(value).encode()])


def msgpack_reply(value: object) -> Reply:
    """A msgpack answer."""
    return Reply(200, {}, [msgpack.packb(value)])


def tensor(array: NDArray[Any], datatype: str = "FP32") -> dict[str, Any]:
    """The answer of one operation."""
    output = {"name": "output", "datatype": datatype, "shape": list(array.shape), "data": array.tobytes()}
    return {"model_name": "m", "outputs": [output]}


def ones(tokens: int = 2, hidden: int = 4) -> NDArray[np.float32]:
    """Hidden states."""
    return np.ones((tokens, hidden), np.float32)


def completion(text: str = "ok", **more: object) -> dict[str, Any]:
    """A whole completion, or one event of a streamed one."""
    choice = {"index": 0, "text": text, "token_ids": [7], "finish_reason": "stop", "logprobs": None, **more}
    return {"id": "c", "model": "m", "choices": [choice], "usage": {"prompt_tokens": 3, "completion_tokens": 1}}


def sse(*events: object, done: bool = True) -> bytes:
    """A stream's body."""
    data = [json.dumps(event).encode() for event in events] + [b"[DONE]"] * done
    return b"".join(b"data: " + item + b"\n\n" for item in data)
