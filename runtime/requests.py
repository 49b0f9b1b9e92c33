"""The neutral vocabulary of a request: what the gateway, the links, the router and the cache all import.

Plain frozen values; no torch, no HTTP. `to_wire` / `from_wire` turn them into what a link frame carries.
Times here are *remaining* seconds, never absolute: two processes do not share a clock.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, Protocol

DEFAULT_PRIORITY = 0.5

# Bytes per element of every dtype that may travel in a tensor request.
DTYPE_BYTES: dict[str, int] = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2, "int64": 8, "int32": 4}

FinishReason = Literal["stop", "length"]
CacheOutcome = Literal["hit", "miss", "coalesced", "bypass"]


@dataclass(frozen=True, slots=True)
class TensorData:
    """A tensor as bytes: C order, little endian. `data` may be any buffer and is never copied by us."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes | bytearray | memoryview

    @property
    def nbytes(self) -> int:
        """Length of `data` in bytes."""
        return len(self.data) if not isinstance(self.data, memoryview) else self.data.nbytes


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the next token is chosen. `temperature` 0 is greedy. Random numbers are keyed by
    (`seed`, position), so that equal requests give equal tokens whatever else is in the batch."""

    max_tokens: int = 16
    min_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0  # 0: all tokens
    min_p: float = 0.0
    seed: int = 0
    logprobs: int | None = None  # how many alternatives to report per token; None: no logprobs at all
    stop_token_ids: tuple[int, ...] = ()  # in addition to the model's end-of-sequence tokens
    ignore_eos: bool = False


@dataclass(frozen=True, slots=True)
class GenerateRequest:
    """A prompt to be continued. `emitted` holds tokens that an earlier router already sent, when resumed."""

    request_id: str
    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams = field(default_factory=SamplingParams)
    priority: float = DEFAULT_PRIORITY
    timeout_s: float = 60.0
    emitted: tuple[int, ...] = ()
    tenant: str = ""  # whose it is; the gateway's business, and not sent over links

    def to_wire(self) -> dict[str, Any]:
        """Plain values for a link frame; `timeout_s` travels in the frame's own deadline."""
        return {
            "id": self.request_id,
            "prompt": self.prompt_token_ids,
            "sampling": asdict(self.sampling),
            "priority": self.priority,
            "emitted": self.emitted,
        }

    @classmethod
    def from_wire(cls, wire: dict[str, Any], timeout_s: float) -> GenerateRequest:
        """The request that `to_wire` described, with the time that remains of it."""
        sampling = dict(wire["sampling"])
        sampling["stop_token_ids"] = tuple(sampling["stop_token_ids"])
        return cls(
            request_id=wire["id"],
            prompt_token_ids=tuple(wire["prompt"]),
            sampling=SamplingParams(**sampling),
            priority=wire["priority"],
            timeout_s=timeout_s,
            emitted=tuple(wire["emitted"]),
        )


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Natural-log probability of the chosen token and of the most likely ones (`[(token id, logprob)]`)."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class TokenChunk:
    """The next tokens of one generation. The last chunk, and only it, has a `finish_reason`."""

    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None = None
    logprobs: tuple[TokenLogprob, ...] | None = None

    def to_wire(self) -> dict[str, Any]:
        """Plain values for a link frame."""
        wire: dict[str, Any] = {"t": self.token_ids}
        if self.finish_reason is not None:
            wire["f"] = self.finish_reason
        if self.logprobs is not None:
            wire["l"] = [(item.token_id, item.logprob, item.top) for item in self.logprobs]
        return wire

    @classmethod
    def from_wire(cls, wire: dict[str, Any]) -> TokenChunk:
        """The chunk that `to_wire` described."""
        logprobs = wire.get("l")
        return cls(
            token_ids=tuple(wire["t"]),
            finish_reason=wire.get("f"),
            logprobs=None
            if logprobs is None
            else tuple(TokenLogprob(i, p, tuple((a, b) for a, b in top)) for i, p, top in logprobs),
        )


@dataclass(frozen=True, slots=True)
class InferRequest:
    """Hidden states `[tokens, hidden]` to be sent through one MoE layer (None: the model's first one)."""

    request_id: str
    hidden_states: TensorData
    layer: int | None = None
    priority: float = DEFAULT_PRIORITY
    timeout_s: float = 60.0
    tenant: str = ""  # as in `GenerateRequest`


@dataclass(frozen=True, slots=True)
class InferResult:
    """The layer's output `[tokens, hidden]`, in the dtype of the request's hidden states."""

    output: TensorData


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """What the outside needs to know of the served model.

    Attributes:
        kind: "decoder" (generation and tensors) or "layer" (tensors only).
        moe_layers: indices of the layers that tensor requests may name.
        max_context_tokens: prompt and generated tokens together; 0 for a layer model.
        weights_digest: SHA-256 over the safetensors files, so that a cache never mixes two weights.
    """

    name: str
    kind: Literal["decoder", "layer"]
    family: str
    dtype: str
    hidden_size: int
    num_experts: int
    top_k: int
    moe_layers: tuple[int, ...]
    vocab_size: int
    max_context_tokens: int
    eos_token_ids: tuple[int, ...]
    weights_digest: str

    def to_wire(self) -> dict[str, Any]:
        """Plain values for a link frame or a status page."""
        return asdict(self)

    @classmethod
    def from_wire(cls, wire: dict[str, Any]) -> ModelInfo:
        """The description that `to_wire` gave."""
        lists = ("moe_layers", "eos_token_ids")
        fields: dict[str, Any] = {key: tuple(value) if key in lists else value for key, value in wire.items()}
        return cls(**fields)


class Backend(Protocol):
    """Whatever computes: the router in this process, or routers at the other end of links."""

    @property
    def model(self) -> ModelInfo:
        """The model served."""
        ...

    async def infer(self, request: InferRequest) -> InferResult:
        """One-shot tensor work.

        Raises:
            InvalidTensorError, OverloadedError, DeadlineExceededError, UnavailableError.
        """
        ...

    def generate(self, request: GenerateRequest) -> AsyncGenerator[TokenChunk, None]:
        """Streamed generation; closing the iterator cancels it.

        Raises:
            ContextLengthError, OverloadedError, DeadlineExceededError, UnavailableError.
        """
        ...


@dataclass(frozen=True, slots=True)
class InferAnswer:
    """A tensor result, and whether the cache gave it."""

    outcome: CacheOutcome
    result: InferResult


@dataclass(frozen=True, slots=True)
class GenerateAnswer:
    """A generation, live or replayed. `response_id` and `created_s` (Unix time) are those of the request that
    computed it, so that a cached answer is the computed one byte for byte."""

    outcome: CacheOutcome
    response_id: str
    created_s: int
    chunks: AsyncGenerator[TokenChunk, None]
