"""A gateway with nothing behind it, for tests of `pimoe.deployments.api` and of what calls it over HTTP.

Generation echoes the prompt token by token; tensors come back doubled. What it is told to do wrong
(`error`, `hang`, `fail_after`) it does, and it counts what was started, closed and cancelled.
"""

from __future__ import annotations

import asyncio
import codecs
import threading
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import uvicorn
from pimoe.deployments.api import ApiSettings, create_app
from pimoe.deployments.api.known_answers import KnownAnswers
from pimoe.deployments.api.prompt_cache import ChatPrompts, PromptCache
from pimoe.runtime.caching import BypassReason
from pimoe.runtime.errors import UnavailableError
from pimoe.runtime.requests import (
    CacheOutcome,
    GenerateAnswer,
    GenerateRequest,
    InferAnswer,
    InferRequest,
    InferResult,
    ModelInfo,
    TensorData,
    TokenChunk,
    TokenLogprob,
)

BOS, EOS, VOCAB = 256, 257, 258
HIDDEN = 8

# Only so that a broken test ends; nothing here is ever expected to take that long.
PATIENCE_S = 60.0

MODEL = ModelInfo(
    name="echo",
    kind="decoder",
    family="echo",
    dtype="float32",
    hidden_size=HIDDEN,
    num_experts=4,
    top_k=2,
    moe_layers=(0, 2),
    vocab_size=VOCAB,
    max_context_tokens=400,
    eos_token_ids=(EOS,),
    weights_digest="0" * 64,
)


class ByteText:
    """Bytes to text, whole characters only."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_ids: list[int]) -> str:
        return self._decoder.decode(bytes(i for i in token_ids if i < BOS))

    def finish(self) -> str:
        return self._decoder.decode(b"", final=True)


class ByteCodec:
    """One token per byte of UTF-8, BOS in front of texts that are no chat."""

    special_token_ids = frozenset((BOS, EOS))
    chat_template = ""
    chat_variables: frozenset[str] = frozenset()

    def __init__(self) -> None:
        self.contexts: list[list[int]] = []

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [BOS] * add_special_tokens + list(text.encode())

    def decode(self, token_ids: list[int], skip_special_tokens: bool = True) -> str:
        texts = [bytes([i]) if i < BOS else b"" if skip_special_tokens else b"<%d>" % i for i in token_ids]
        return b"".join(texts).decode("utf-8", "replace")

    def token_text(self, token_id: int) -> str:
        return bytes([token_id]).decode("utf-8", "replace") if token_id < BOS else f"<{token_id}>"

    def incremental(self, context: list[int]) -> ByteText:
        self.contexts.append(context)
        return ByteText()

    def token_piece(self, token_id: int) -> str:
        return self.token_text(token_id)

    def added_token_id(self, piece: str) -> int | None:
        return {"<256>": BOS, "<257>": EOS}.get(piece)

    def render_unfinished_chat(
        self, messages: list[dict[str, Any]], variables: Mapping[str, Any] | None = None
    ) -> str:
        return self.render_chat(messages)[:-1]

    def render_chat(self, messages: list[dict[str, Any]], variables: Mapping[str, Any] | None = None) -> str:
        return "".join(f"{message['role']}: {message['content']}\n" for message in messages)


@dataclass
class FakeGateway:
    """See the module. `tokens_per_chunk` sizes chunks; `outcome` is what the cache is said to have done."""

    settings: ApiSettings = field(default_factory=ApiSettings)
    info: ModelInfo | None = MODEL
    tokenizer: ByteCodec | None = field(default_factory=ByteCodec)
    created_s: int = 1_700_000_000
    tokens_per_chunk: int = 1
    outcome: CacheOutcome = "miss"
    error: BaseException | None = None
    fail_after: int | None = None
    hang: bool = False
    is_ready: bool = True
    model_error: Exception | None = None
    generated: list[GenerateRequest] = field(default_factory=list)
    inferred: list[InferRequest] = field(default_factory=list)
    use_cache: list[bool] = field(default_factory=list)
    bypasses: list[BypassReason | None] = field(default_factory=list)
    flushes: list[tuple[str | None, str | None]] = field(default_factory=list)
    prompt_cache: PromptCache = field(default_factory=PromptCache)
    open_streams: int = 0
    cancelled: int = 0

    @property
    def model(self) -> ModelInfo:
        if self.model_error is not None:
            raise self.model_error
        if self.info is None:
            raise UnavailableError("no router yet", retry_after_s=2.5)
        return self.info

    known: KnownAnswers | None = None
    reads_clock: bool = False

    def recall(self, hits: Sequence[object]) -> bool:
        return False

    @property
    def prompts(self) -> ChatPrompts | None:
        return None if self.tokenizer is None else ChatPrompts(self.tokenizer, self.prompt_cache, self.reads_clock)

    async def infer(self, request: InferRequest, bypass: BypassReason | None) -> InferAnswer:
        self.inferred.append(request)
        self.use_cache.append(bypass is None)
        await self._trouble()
        return InferAnswer(self.outcome, InferResult(doubled(request.hidden_states)))

    async def generate(self, request: GenerateRequest, bypass: BypassReason | None) -> GenerateAnswer:
        self.generated.append(request)
        self.use_cache.append(bypass is None)
        self.bypasses.append(bypass)
        if self.fail_after is None:
            await self._trouble()
        return GenerateAnswer(self.outcome, request.request_id, self.created_s, self._chunks(request))

    async def _chunks(self, request: GenerateRequest) -> AsyncGenerator[TokenChunk, None]:
        self.open_streams += 1
        try:
            for count, chunk in enumerate(echo(request, self.tokens_per_chunk)):
                if self.fail_after is not None and count >= self.fail_after:
                    await self._trouble()
                yield chunk
                await asyncio.sleep(0)
        except (asyncio.CancelledError, GeneratorExit):
            self.cancelled += 1
            raise
        finally:
            self.open_streams -= 1

    async def _trouble(self) -> None:
        if self.hang:
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                self.cancelled += 1
                raise
        if self.error is not None:
            raise self.error

    async def ready(self) -> bool:
        return self.is_ready

    async def status(self) -> dict[str, Any]:
        return {"model": self.model.name, "groups": []}

    async def flush_cache(self, model: str | None, tenant: str | None) -> dict[str, Any]:
        await self._trouble()
        self.flushes.append((model, tenant))
        return {"flushed": 3, "gateways": 2, "second_level": {"deleted": 5}}

    async def metrics(self) -> tuple[bytes, str]:
        return b"pimoe_up 1\n", "text/plain; version=0.0.4; charset=utf-8"


def echo(request: GenerateRequest, size: int) -> Iterator[TokenChunk]:
    """The prompt's own tokens, then EOS, in chunks of `size`, cut at `max_tokens`."""
    sampling = request.sampling
    tokens = [token for token in request.prompt_token_ids if token != BOS]
    tokens = (tokens * 400 if sampling.ignore_eos else [*tokens, EOS])[: sampling.max_tokens]
    for start in range(0, len(tokens), size):
        part = tuple(tokens[start : start + size])
        last = start + size >= len(tokens)
        reason: Any = ("stop" if tokens[-1] == EOS else "length") if last else None
        logprobs = None
        if sampling.logprobs is not None:
            logprobs = tuple(logprob(token, sampling.logprobs) for token in part)
        yield TokenChunk(part, reason, logprobs)


def logprob(token: int, top: int) -> TokenLogprob:
    """A made-up logprob, with `top` alternatives, the token itself first, the second impossible."""
    others = [((token + i) % VOCAB, -0.5 * (i + 1) if i != 1 else float("-inf")) for i in range(top)]
    return TokenLogprob(token, -0.5, tuple(others))


def doubled(tensor: TensorData) -> TensorData:
    """Twice the tensor: 16-bit ones by way of float32."""
    if tensor.dtype == "bfloat16":
        bits = np.frombuffer(tensor.data, "<u2").astype(np.uint32) << 16
        data = ((bits.view(np.float32) * 2).view(np.uint32) >> 16).astype("<u2").tobytes()
    else:
        data = (np.frombuffer(tensor.data, tensor.dtype) * 2).tobytes()
    return replace(tensor, data=memoryview(data))


@contextmanager
def served(gateway: FakeGateway) -> Iterator[str]:
    """Serves the gateway with uvicorn on a free loopback port; gives `host:port`."""
    config = uvicorn.Config(create_app(gateway), port=0, log_level="error", access_log=False, lifespan="off")
    server = uvicorn.Server(config)
    started = threading.Event()
    original = server.startup

    async def startup(sockets: Any = None) -> None:
        await original(sockets)
        started.set()

    server.startup = startup  # type: ignore[method-assign]
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        if not started.wait(PATIENCE_S):
            raise RuntimeError("the test server did not start")
        yield f"127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(PATIENCE_S)


@dataclass
class Reply:
    """What an ASGI call sent."""

    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    complete: bool = False


async def ask(
    gateway: FakeGateway,
    method: str,
    path: str,
    parts: bytes | list[bytes] = b"",
    headers: dict[str, str] | None = None,
    leave: asyncio.Event | None = None,
) -> Reply:
    """One request to the application without a socket. The client leaves when `leave` is set."""
    reply = Reply()
    bodies = [parts] if isinstance(parts, bytes) else list(parts)
    gone = leave or asyncio.Event()

    async def receive() -> dict[str, Any]:
        if bodies:
            return {"type": "http.request", "body": bodies.pop(0), "more_body": bool(bodies)}
        await gone.wait()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        if message["type"] == "http.response.start":
            reply.status = message["status"]
            reply.headers = {name.decode(): value.decode() for name, value in message["headers"]}
        else:
            reply.body += message.get("body", b"")
            reply.complete = not message.get("more_body", False)

    raw = [(name.lower().encode(), value.encode("latin-1")) for name, value in (headers or {}).items()]
    scope = {
        "type": "http",
        "method": method,
        "path": path,
        "headers": raw,
        "query_string": b"",
        "root_path": "",
    }
    async with asyncio.timeout(PATIENCE_S):
        await create_app(gateway)(scope, receive, send)
    return reply


def wait_until(condition: Callable[[], object]) -> None:
    """Waits for what another thread brings about."""
    end = time.monotonic() + PATIENCE_S
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError("what the test waits for did not happen")
        time.sleep(0.005)
