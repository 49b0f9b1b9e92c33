"""The client for code that does not await: `AsyncClient`, driven from a thread of its own. No logic here."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, Literal, Self, Unpack, overload

from numpy.typing import NDArray

from .about import Health
from .async_client import DEFAULT_TIMEOUT_S, DEFAULT_URL, AsyncClient, Operations
from .generate_options import GenerateOptions, Message, Prompt
from .generation import Generation, GenerationChunk
from .inference import InferOptions, Outcome
from .loop_thread import LoopThread
from .settings import Limits, RetryPolicy
from .streaming import AsyncGenerationStream
from .tokens import Tokens
from .transport import Transport


class GenerationStream(Iterator[GenerationChunk]):
    """Chunks as they are generated. See `AsyncGenerationStream`, of which this is the blocking form."""

    def __init__(self, stream: AsyncGenerationStream, thread: LoopThread, client: Client) -> None:
        self._stream = stream
        self._thread = thread
        self._client = client  # a client that is dropped closes itself, and must not while this is read

    @property
    def generation(self) -> Generation:
        """All that has come so far; whole when the iteration has ended by itself."""
        return self._stream.generation

    def __next__(self) -> GenerationChunk:
        chunk = self._thread.run(_next_or_none(self._stream))
        if chunk is None:
            raise StopIteration
        return chunk

    def close(self) -> None:
        """Ends the stream; the server stops generating. Harmless when it has ended."""
        self._thread.call_soon(self._stream.abort)

    def __enter__(self) -> Self:
        self._thread.run(self._stream.__aenter__())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return repr(self._stream).replace(type(self._stream).__name__, type(self).__name__)


class Client:
    """Talks to a pimoe server. Every call waits for its answer; any number of threads may call at once.

    >>> with Client() as client:                                                   # doctest: +SKIP
    ...     answer = client.generate("reverse: expert", max_tokens=16)
    ...     for chunk in client.stream("add: 12 34", temperature=0):
    ...         print(chunk.text, end="", flush=True)

    The arguments, methods and errors are those of `AsyncClient`. Connections live on a thread that starts with the
    first call, so that a client may also be made and used where an event loop runs (which it blocks meanwhile).
    A process that forks may use in the child a client that was never used before; one that was raises
    `RuntimeError` there. A client that is not closed closes itself when it is dropped or the program ends.
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
        self._client = AsyncClient(
            base_url,
            timeout_s=timeout_s,
            retries=retries,
            model=model,
            headers=headers,
            limits=limits,
            transport=transport,
        )
        self._thread = LoopThread("pimoe-client")
        self._close = weakref.finalize(self, self._thread.close, self._client.close)

    def infer(self, array: NDArray[Any], **options: Unpack[InferOptions]) -> NDArray[Any]:
        """See `AsyncClient.infer`."""
        return self._thread.run(self._client.infer(array, **options))

    @overload
    def infer_many(
        self,
        operations: Operations,
        *,
        return_exceptions: Literal[False] = False,
        **options: Unpack[InferOptions],
    ) -> list[NDArray[Any]]: ...

    @overload
    def infer_many(
        self, operations: Operations, *, return_exceptions: bool, **options: Unpack[InferOptions]
    ) -> list[Outcome]: ...

    def infer_many(
        self, operations: Operations, *, return_exceptions: bool = False, **options: Unpack[InferOptions]
    ) -> list[NDArray[Any]] | list[Outcome]:
        """See `AsyncClient.infer_many`."""
        return self._thread.run(
            self._client.infer_many(operations, return_exceptions=return_exceptions, **options)
        )

    def generate(self, prompt: Prompt, **options: Unpack[GenerateOptions]) -> Generation:
        """See `AsyncClient.generate`."""
        return self._thread.run(self._client.generate(prompt, **options))

    def chat(self, messages: Sequence[Message], **options: Unpack[GenerateOptions]) -> Generation:
        """See `AsyncClient.chat`."""
        return self._thread.run(self._client.chat(messages, **options))

    def stream(self, prompt: Prompt | Sequence[Message], **options: Unpack[GenerateOptions]) -> GenerationStream:
        """See `AsyncClient.stream`. `with` and plain `for` both end the request when they are left early."""
        return GenerationStream(self._client.stream(prompt, **options), self._thread, self)

    def tokenize(
        self,
        prompt: str | Sequence[Message],
        *,
        add_special_tokens: bool | None = None,
        return_token_strs: bool | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        timeout_s: float | None = None,
    ) -> Tokens:
        """See `AsyncClient.tokenize`."""
        return self._thread.run(
            self._client.tokenize(
                prompt,
                add_special_tokens=add_special_tokens,
                return_token_strs=return_token_strs,
                tools=tools,
                timeout_s=timeout_s,
            )
        )

    def detokenize(self, token_ids: Sequence[int], *, timeout_s: float | None = None) -> str:
        """See `AsyncClient.detokenize`."""
        return self._thread.run(self._client.detokenize(token_ids, timeout_s=timeout_s))

    def models(self) -> list[str]:
        """See `AsyncClient.models`."""
        return self._thread.run(self._client.models())

    def status(self) -> dict[str, Any]:
        """See `AsyncClient.status`."""
        return self._thread.run(self._client.status())

    def flush_cache(self, *, model: str | None = None, tenant: str | None = None) -> dict[str, Any]:
        """See `AsyncClient.flush_cache`."""
        return self._thread.run(self._client.flush_cache(model=model, tenant=tenant))

    def health(self) -> Health:
        """See `AsyncClient.health`."""
        return self._thread.run(self._client.health())

    def close(self) -> None:
        """Closes all connections and ends the thread; calls waiting in other threads raise `RuntimeError`."""
        self._close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return repr(self._client).replace(type(self._client).__name__, type(self).__name__)


async def _next_or_none(stream: AsyncGenerationStream) -> GenerationChunk | None:
    return await anext(stream, None)
