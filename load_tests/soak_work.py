"""The mixed work of the soak: what clients send to a served application, well-behaved and not."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import numpy as np
from numpy.typing import NDArray
from pimoe.clients import AsyncClient, DeadlineExceededError, OverloadedError, PimoeClientError

# Of all requests.
SHARES = {"generate": 0.25, "tensor": 0.35, "cached": 0.25, "leave": 0.10, "bad": 0.05}
TIMED = ("generate", "tensor", "cached")  # whose latency means something
POPULAR = 64  # different requests that are asked for again and again
_LEFT_TOKENS = 64


@dataclass(frozen=True)
class Model:
    """What is asked for must fit.

    Attributes:
        layers: those with experts.
    """

    name: str
    hidden: int
    layers: tuple[int, ...]
    vocabulary: int


@dataclass(frozen=True)
class Outcome:
    """One request.

    Attributes:
        due_s: when it was to be sent, on `time.monotonic()`.
        latency_s: from then until its end.
        ended: "done", "refused" (429 or 503), "late", or "failed: ..." with what was wrong.
    """

    kind: str
    due_s: float
    latency_s: float
    ended: str


class WrongAnswerError(Exception):
    """The application answered what it must not."""


class Work:
    """Draws requests and sends them. The same ones in the same order for the same seed."""

    def __init__(self, url: str, client: AsyncClient, session: aiohttp.ClientSession, model: Model) -> None:
        self._url, self._client, self._session, self._model = url, client, session, model
        self._random = np.random.default_rng(0)
        self._popular = [self._draw_popular(index) for index in range(POPULAR)]
        weights = 1 / np.arange(1, POPULAR + 1)
        self._weights = weights / weights.sum()
        self._bad = _bad_requests(model)
        self._send: dict[str, Callable[[], Awaitable[None]]] = {
            "generate": self._generate,
            "tensor": self._tensor,
            "cached": self._cached,
            "leave": self._leave,
            "bad": self._send_bad,
        }

    async def one(self, due_s: float) -> Outcome:
        """Send the next request, and say how it ended."""
        kind = str(self._random.choice(list(SHARES), p=list(SHARES.values())))
        ended = "done"
        try:
            await self._send[kind]()
        except OverloadedError:
            ended = "refused"
        except (DeadlineExceededError, TimeoutError):
            ended = "late"
        except PimoeClientError as error:
            ended = f"failed: {error.code}"
        except (WrongAnswerError, aiohttp.ClientError, OSError) as error:
            ended = f"failed: {type(error).__name__}: {error}"
        return Outcome(kind, due_s, time.monotonic() - due_s, ended)

    # The kinds -----------------------------------------------------------------------------------------------

    async def _generate(self) -> None:
        """An answer that nobody asked for before, read to its end."""
        await self._read(self._prompt(), int(self._random.integers(4, 25)))

    async def _tensor(self) -> None:
        await self._infer(self._hidden_states(int(self._random.integers(1, 33))), self._layer())

    async def _cached(self) -> None:
        await self._popular[int(self._random.choice(POPULAR, p=self._weights))]()

    async def _leave(self) -> None:
        """Half of these leave after the first tokens, the others cut the connection before the answer begins."""
        if self._random.random() < 0.5:
            await self._read(self._prompt(), _LEFT_TOKENS, leave_after=int(self._random.integers(1, 4)))
        else:
            await self._cut()

    async def _send_bad(self) -> None:
        path, body, content_type = self._bad[int(self._random.integers(len(self._bad)))]
        headers = {"content-type": content_type}
        async with self._session.post(self._url + path, data=body, headers=headers) as answer:
            text = await answer.text()
            if answer.status in (429, 503):
                raise OverloadedError(text, "overloaded")
            if not 400 <= answer.status < 500:
                raise WrongAnswerError(f"{answer.status} to a bad request to {path}")

    # What they are made of -----------------------------------------------------------------------------------

    async def _read(self, prompt: list[int], max_tokens: int, leave_after: int | None = None) -> None:
        tokens = 0
        async with self._client.stream(prompt, max_tokens=max_tokens, temperature=0, ignore_eos=True) as chunks:
            async for chunk in chunks:
                tokens += len(chunk.token_ids)
                if leave_after is not None and tokens >= leave_after:
                    return
        if tokens != max_tokens:
            raise WrongAnswerError(f"{tokens} tokens instead of {max_tokens}")

    async def _infer(self, states: NDArray[np.float32], layer: int) -> None:
        answer = await self._client.infer(states, layer=layer)
        if answer.shape != states.shape or not np.isfinite(answer).all():
            raise WrongAnswerError(f"a tensor {answer.shape} to one of {states.shape}, or numbers that are none")

    async def _cut(self) -> None:
        address = urlsplit(self._url)
        fields = {"model": self._model.name, "prompt": self._prompt(), "max_tokens": _LEFT_TOKENS, "stream": True}
        body = json.dumps(fields).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nhost: {address.netloc}\r\ncontent-type: application/json\r\n"
        _, writer = await asyncio.open_connection(address.hostname, address.port)
        writer.write(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
        with contextlib.suppress(OSError):
            await writer.drain()
            await asyncio.sleep(0.005)
        writer.transport.abort()

    def _draw_popular(self, index: int) -> Callable[[], Awaitable[None]]:
        if index % 2:
            prompt = self._prompt()
            return lambda: self._read(prompt, 8)
        states, layer = self._hidden_states(8), self._layer()
        return lambda: self._infer(states, layer)

    def _prompt(self) -> list[int]:
        size = int(self._random.integers(8, 49))
        drawn: list[int] = self._random.integers(1, self._model.vocabulary, size).tolist()
        return drawn

    def _hidden_states(self, tokens: int) -> NDArray[np.float32]:
        return self._random.standard_normal((tokens, self._model.hidden), dtype=np.float32)

    def _layer(self) -> int:
        return int(self._random.choice(self._model.layers))


def _bad_requests(model: Model) -> Sequence[tuple[str, bytes, str]]:
    """Path, body and content type of requests that must be refused with a status of 4xx."""
    infer = f"/v2/models/{model.name}/infer"

    def tensor(shape: list[int], data: list[Any]) -> bytes:
        inputs = [{"name": "hidden_states", "shape": shape, "datatype": "FP32", "data": data}]
        return json.dumps({"inputs": inputs, "parameters": {"layer": model.layers[0]}}).encode()

    def completion(**fields: Any) -> bytes:
        return json.dumps({"model": model.name, "prompt": [1, 2], **fields}).encode()

    bodies = [
        ("/v1/completions", b'{"model": '),
        ("/v1/completions", completion(model="nobody")),
        ("/v1/completions", completion(max_tokens=-1)),
        ("/v1/completions", completion(prompt=[model.vocabulary + 7])),
        ("/v1/completions", completion(temperature="warm")),
        (infer, tensor([1, model.hidden + 1], [0.0] * (model.hidden + 1))),
        (infer, tensor([1, model.hidden], [0.0])),
        (infer, b"\x00\xff"),
        ("/v2/models/nobody/infer", tensor([1, model.hidden], [0.0] * model.hidden)),
        ("/v1/nothing", b"{}"),
    ]
    return [(path, body, "application/json") for path, body in bodies]
