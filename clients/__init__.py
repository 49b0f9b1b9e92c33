"""Clients of a pimoe server: `Client`, and `AsyncClient` for asyncio.

They need numpy, msgpack and aiohttp; no torch, no Ray, nothing of the server.

>>> from pimoe.clients import Client
>>> with Client("http://127.0.0.1:8000") as client:                                # doctest: +SKIP
...     print(client.generate("reverse: expert").text)
"""

from .about import Health
from .aiohttp_transport import AiohttpTransport
from .async_client import AsyncClient
from .errors import (
    ERRORS_BY_CODE,
    ConnectionFailed,
    ContextLengthError,
    DeadlineExceededError,
    InvalidRequestError,
    InvalidTensorError,
    ModelNotFoundError,
    OverloadedError,
    PayloadTooLargeError,
    PimoeClientError,
    ProtocolError,
    RequestCancelledError,
    UnavailableError,
)
from .generate_options import GenerateOptions, Message, Mode, Prompt
from .generation import AppliedMode, Generation, GenerationChunk, ToolCall, ToolCallDelta, Usage
from .inference import InferOperation, InferOptions
from .settings import Limits, RetryPolicy
from .streaming import AsyncGenerationStream
from .sync_client import Client, GenerationStream
from .token_logprobs import TokenLogprob
from .tokens import Tokens
from .transport import Buffer, HttpRequest, HttpResponse, Transport

__all__ = [
    "ERRORS_BY_CODE",
    "AiohttpTransport",
    "AppliedMode",
    "AsyncClient",
    "AsyncGenerationStream",
    "Buffer",
    "Client",
    "ConnectionFailed",
    "ContextLengthError",
    "DeadlineExceededError",
    "GenerateOptions",
    "Generation",
    "GenerationChunk",
    "GenerationStream",
    "Health",
    "HttpRequest",
    "HttpResponse",
    "InferOperation",
    "InferOptions",
    "InvalidRequestError",
    "InvalidTensorError",
    "Limits",
    "Message",
    "Mode",
    "ModelNotFoundError",
    "OverloadedError",
    "PayloadTooLargeError",
    "PimoeClientError",
    "Prompt",
    "ProtocolError",
    "RequestCancelledError",
    "RetryPolicy",
    "TokenLogprob",
    "Tokens",
    "ToolCall",
    "ToolCallDelta",
    "Transport",
    "UnavailableError",
    "Usage",
]
