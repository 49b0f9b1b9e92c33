"""The client. `Client` is this one too, driven from a thread of its own."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping, Sequence
from types import TracebackType
from typing import Any, Literal, Self, TypeAlias, Unpack, overload
from urllib.parse import urlsplit

from numpy.typing import NDArray

from .about import Health, flush_cache, get_health, get_json, get_models
from .aiohttp_transport import AiohttpTransport
from .calls import Caller, Deadline
from .errors import InvalidRequestError, ModelNotFoundError, PimoeClientError, ProtocolError
from .generate_options import (
    GenerateOptions,
    Message,
    Prompt,
    check_options,
    generation_request,
    is_chat,
)
from .generation import Generation, GenerationBuilder
from .inference import (
    InferBatch,
    InferOperation,
    InferOptions,
    Outcome,
    arrays,
    as_operation,
    infer_request,
    read_infer,
    split,
)
from .settings import Limits, RetryPolicy
from .streaming import AsyncGenerationStream, EventSource
from .tokens import Tokens, detokenize_request, read_text, read_tokens, tokenize_request
from .transport import Transport

DEFAULT_URL = "http://127.0.0.1:8000"
DEFAULT_TIMEOUT_S = 60.0
_HEALTH_TIMEOUT_S = 5.0
Operations: TypeAlias = Iterable[NDArray[Any] | InferOperation]


class AsyncClient:
    """Talks to a pimoe server from asyncio code. Everything waits without blocking, and may be cancelled.

    >>> async with AsyncClient() as client:                                        # doctest: +SKIP
    ...     answer = await client.generate("reverse: expert", max_tokens=16)
    ...     async with client.stream("add: 12 34", temperature=0) as chunks:
    ...         async for chunk in chunks:
    ...             print(chunk.text, end="")

    Any number of tasks of one event loop may use it at once. It stays with the loop of its first call.

    Args:
        base_url: where the server listens.
        timeout_s: for a whole call, retries included, unless the call says otherwise. The server knows it too and
            gives up by itself.
        retries: how often and when to try again, or just how often at most.
        model: name of the model; None takes the first that the server lists, asked for once.
        headers: sent with every request.
        limits: bounds on connections, waits and sizes.
        transport: carries the requests instead of a new pool of connections; for tests, or for an aiohttp
            session of your own (`AiohttpTransport`). It is closed with the client.

    Raises:
        ValueError: `base_url` is no http URL, or `timeout_s` is not positive.
    """

    def __init__(
        self,
        base_url: str = DEFAULT_URL,
        *,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        retries: int | RetryPolicy | None = None,
        model: str | None = None,
        headers: Mapping[str, str] | None = None,
        limits: Limits | None = None,
        transport: Transport | None = None,
    ) -> None:
        self.base_url = _checked_url(base_url)
        self.timeout_s = timeout_s
        self._model = model
        self._limits = limits or Limits()
        if not timeout_s > 0:
            raise ValueError(f"timeout_s is {timeout_s!r}, and must be more than 0 seconds")
        policy = RetryPolicy(max_retries=retries) if isinstance(retries, int) else retries or RetryPolicy()
        transport = transport or AiohttpTransport(self.base_url, self._limits)
        headers = {"User-Agent": "pimoe-client", **(headers or {})}
        self._caller = Caller(transport, self._limits, policy, headers)
        self._model_lock = asyncio.Lock()
        self._closed = False

    async def infer(self, array: NDArray[Any], **options: Unpack[InferOptions]) -> NDArray[Any]:
        """Sends hidden states through one MoE layer.

        >>> output = await client.infer(hidden_states, layer=0, priority=0.9)      # doctest: +SKIP

        Args:
            array: `[tokens, hidden]`, float32, float16, bfloat16 (of ml_dtypes) or float64. Sent without a copy
                where it is C-contiguous, so leave it alone until the call returns.
            options: see `InferOptions`.

        Returns:
            `[tokens, hidden]` of the same dtype: a read-only view of the answer. `.copy()` gives one to write to.

        Raises:
            InvalidTensorError: the server or this client cannot use the array.
            PimoeClientError: see `pimoe.clients.errors`.
        """
        operation = InferOperation(array, **options)
        deadline = self._deadline(operation.timeout_s)
        model = await self._model_name(deadline)
        answer = await self._caller.call(lambda left_s: infer_request(model, operation, left_s), deadline)
        return read_infer(answer, operation)

    @overload
    async def infer_many(
        self,
        operations: Operations,
        *,
        return_exceptions: Literal[False] = False,
        **options: Unpack[InferOptions],
    ) -> list[NDArray[Any]]: ...

    @overload
    async def infer_many(
        self, operations: Operations, *, return_exceptions: bool, **options: Unpack[InferOptions]
    ) -> list[Outcome]: ...

    async def infer_many(
        self, operations: Operations, *, return_exceptions: bool = False, **options: Unpack[InferOptions]
    ) -> list[NDArray[Any]] | list[Outcome]:
        """Sends many arrays at once; each is batched, cached and answered on its own.

        Args:
            operations: arrays, or `InferOperation`s where they differ in layer, priority or time.
            return_exceptions: put the error of an operation in its place in the list. Otherwise the first one
                is raised, with a note that says which operation it was.
            options: for all operations that do not say otherwise; see `InferOptions`.

        Returns:
            One result for each operation, in order, as from `infer`. Operations that the server turned away
            under load, and those only, were sent again. Very many go in several requests at once (`Limits`).
        """
        deadline = self._deadline(options.get("timeout_s"))
        wanted = [as_operation(item, options) for item in operations]
        batches = split(wanted, self._limits.batch_operations, self._limits.batch_bytes)
        await asyncio.gather(*(self._infer_batch(batch, deadline) for batch in batches))
        outcomes = [outcome for batch in batches for outcome in batch.outcomes if outcome is not None]
        return outcomes if return_exceptions else arrays(outcomes)

    async def _infer_batch(self, batch: InferBatch, deadline: Deadline) -> None:
        async def attempt() -> None:
            batch.take(await self._caller.exchange(lambda left_s: batch.request(model, left_s), deadline))

        try:
            model = await self._model_name(deadline)
            await self._caller.retrying(attempt, deadline)
        except PimoeClientError as error:
            batch.fail(error)

    async def generate(self, prompt: Prompt, **options: Unpack[GenerateOptions]) -> Generation:
        """Continues `prompt`: text, or token ids (the only way for a model without a tokenizer).

        >>> (await client.generate("sort: expert", temperature=0)).text            # doctest: +SKIP

        Args:
            options: see `GenerateOptions`.

        Raises:
            ContextLengthError: prompt and `max_tokens` together exceed the model's context.
            PimoeClientError: see `pimoe.clients.errors`.
        """
        return await self._generate(prompt, options)

    async def chat(self, messages: Sequence[Message], **options: Unpack[GenerateOptions]) -> Generation:
        """Answers a conversation, written for the model by its own chat template.

        >>> await client.chat([{"role": "user", "content": "reverse: expert"}])    # doctest: +SKIP

        Args:
            messages: `{"role": "system" | "user" | "assistant", "content": text}`, at least one. An answer of the
                model, with its tool calls, goes in as `Generation.as_message()`, their results as
                `{"role": "tool", "tool_call_id": id, "content": text}`.
            options: see `GenerateOptions`.

        Raises:
            PimoeClientError: see `pimoe.clients.errors`.
        """
        if not is_chat(messages):
            raise InvalidRequestError('messages must be a list of {"role", "content"}', param="messages")
        return await self._generate(messages, options)

    async def _generate(self, prompt: Prompt | Sequence[Message], options: GenerateOptions) -> Generation:
        check_options(options)
        deadline = self._deadline(options.get("timeout_s"))
        model = await self._model_name(deadline)
        answer = await self._caller.call(
            lambda left_s: generation_request(prompt, model, options, False, left_s), deadline
        )
        builder = GenerationBuilder(answer.headers.get("x-pimoe-cache"), answer.headers.get("x-request-id"))
        if builder.add(answer.body) is None or builder.finish_reason is None:
            raise ProtocolError(f"the answer to {answer.call} holds no finished choice")
        return builder.build()

    def stream(
        self, prompt: Prompt | Sequence[Message], **options: Unpack[GenerateOptions]
    ) -> AsyncGenerationStream:
        """The answer piece by piece, to a prompt or to a list of chat messages.

        Leaving the `async with` block, or dropping the stream, ends the request on the server too. Before the
        first chunk a request is retried as any other; after it, never.

        >>> async with client.stream("spell: 42", max_tokens=32) as chunks:        # doctest: +SKIP
        ...     async for chunk in chunks:
        ...         print(chunk.text, end="", flush=True)

        Raises (from the iteration):
            ConnectionFailed: the stream was cut; what came before is in `AsyncGenerationStream.generation`.
            PimoeClientError: see `pimoe.clients.errors`.
        """
        check_options(options)

        async def open_source() -> EventSource:
            deadline = self._deadline(options.get("timeout_s"))
            model = await self._model_name(deadline)
            response = await self._caller.open(
                lambda left_s: generation_request(prompt, model, options, True, left_s), deadline
            )
            return EventSource(response, deadline, self._limits)

        return AsyncGenerationStream(open_source)

    async def tokenize(
        self,
        prompt: str | Sequence[Message],
        *,
        add_special_tokens: bool | None = None,
        return_token_strs: bool | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        timeout_s: float | None = None,
    ) -> Tokens:
        """The tokens of a text, or of the prompt that the chat template makes of messages.

        >>> (await client.tokenize("reverse: expert")).count                       # doctest: +SKIP

        Args:
            add_special_tokens: whether the tokenizer adds its own; by default to texts and not to messages, whose
                template writes them.
            return_token_strs: tell how the vocabulary spells each token.
            tools: of a chat.

        Raises:
            PimoeClientError: see `pimoe.clients.errors`.
        """
        given = {"add_special_tokens": add_special_tokens, "return_token_strs": return_token_strs, "tools": tools}
        deadline = self._deadline(timeout_s)
        request = tokenize_request(prompt, await self._model_name(deadline), given)
        return read_tokens(await self._caller.call(lambda _: request, deadline))

    async def detokenize(self, token_ids: Sequence[int], *, timeout_s: float | None = None) -> str:
        """The text of token ids.

        Raises:
            PimoeClientError: see `pimoe.clients.errors`.
        """
        deadline = self._deadline(timeout_s)
        request = detokenize_request(token_ids, await self._model_name(deadline))
        return read_text(await self._caller.call(lambda _: request, deadline))

    async def models(self) -> list[str]:
        """Names of the models that the server lists."""
        return await get_models(self._caller, self._deadline(None))

    async def status(self) -> dict[str, Any]:
        """What runs where: model, expert groups and their replicas, routers, gateways, queue and cache."""
        return await get_json(self._caller, "/admin/status", self._deadline(None))

    async def flush_cache(self, *, model: str | None = None, tenant: str | None = None) -> dict[str, Any]:
        """Makes the server forget stored answers of a model, a tenant, both, or all. See `about.flush_cache`."""
        return await flush_cache(self._caller, model, tenant, self._deadline(None))

    async def health(self) -> Health:
        """Whether the server answers, and whether every expert group has a live replica. Never raises for a
        server that does not, and never retries."""
        return await get_health(self._caller, self._deadline(min(self.timeout_s, _HEALTH_TIMEOUT_S)))

    async def close(self) -> None:
        """Closes all connections; further calls raise `RuntimeError`."""
        self._closed = True
        await self._caller.transport.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    def __repr__(self) -> str:
        model = f", model={self._model!r}" if self._model else ""
        return f"{type(self).__name__}({self.base_url!r}{model}, timeout_s={self.timeout_s:g})"

    def _deadline(self, timeout_s: float | None) -> Deadline:
        # Every call begins here.
        if self._closed:
            raise RuntimeError(f"{self!r} is closed")
        return self._caller.deadline(self.timeout_s if timeout_s is None else timeout_s)

    async def _model_name(self, deadline: Deadline) -> str:
        if self._model is None:
            async with self._model_lock:  # calls that begin together ask once
                if self._model is None:
                    self._model = await self._first_model(deadline)
        return self._model

    async def _first_model(self, deadline: Deadline) -> str:
        names = await get_models(self._caller, deadline)
        if not names:
            raise ModelNotFoundError(f"{self.base_url} serves no model")
        return names[0]


def _checked_url(base_url: str) -> str:
    try:
        parts = urlsplit(base_url)
        is_http = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:  # a port that is no number, or too large
        is_http = False
    if not is_http or "?" in base_url or "#" in base_url:
        raise ValueError(f"base_url is {base_url!r}, and must be like {DEFAULT_URL!r}")
    return base_url.rstrip("/")
