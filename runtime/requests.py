"""The neutral vocabulary of a request: what the gateway, the links, the router and the cache all import.

Plain frozen values; no torch, no HTTP. `to_wire` / `from_wire` turn them into what a link frame carries.
Times here are *remaining* seconds, never absolute: two processes do not share a clock.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, Protocol

DEFAULT_PRIORITY = 0.5

# Bytes per element of every dtype that may travel in a tensor request.
DTYPE_BYTES: dict[str, int] = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2, "int64": 8, "int32": 4}

FinishReason = Literal["stop", "length"]
GrammarKind = Literal["", "json_schema", "json_object", "regex", "choice", "lark"]
CacheOutcome = Literal["hit", "miss", "coalesced", "bypass"]


@dataclass(frozen=True, slots=True)
class TensorData:
    """A tensor as bytes: C order, little endian. `data` may be any buffer; only `owned` copies it."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes | bytearray | memoryview

    @property
    def nbytes(self) -> int:
        """Length of `data` in bytes."""
        return len(self.data) if not isinstance(self.data, memoryview) else self.data.nbytes

    def flat(self) -> bytes | bytearray | memoryview:
        """The same memory in one dimension, byte by byte, as sockets and slices want it."""
        data = self.data
        return data.cast("B") if isinstance(data, memoryview) and (data.ndim != 1 or data.itemsize != 1) else data

    def owned(self) -> TensorData:
        """The same in memory of its own, to be kept: what came over a link may hold memory that others need."""
        return self if isinstance(self.data, bytes) else TensorData(self.dtype, self.shape, bytes(self.data))


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the next token is chosen. `temperature` 0 is greedy. Random numbers are keyed by
    (`seed`, position), so that equal requests give equal tokens whatever else is in the batch.

    Attributes:
        top_k: 0 for all tokens.
        repetition_penalty: divides positive and multiplies negative logits of tokens in prompt and answer (Keskar
            et al., arXiv 1909.05858).
        presence_penalty, frequency_penalty: subtracted once, and once per occurrence, for tokens of the answer.
        logit_bias: (token id, what is added to its logit).
        logprobs: how many alternatives to report per token; None: no logprobs at all.
        prompt_logprobs: the same for the tokens of the prompt.
        stop: texts that end the answer; they are looked for where there is a tokenizer, in the gateway.
        stop_token_ids: in addition to the model's end-of-sequence tokens.
        grammar_kind, grammar: what the answer must match: a JSON schema, any JSON object (`grammar` empty), a
            regular expression, one of a JSON list of strings, or a grammar in Lark's notation. "" for anything.
    """

    max_tokens: int = 16
    min_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    seed: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    grammar_kind: GrammarKind = ""
    grammar: str = ""


@dataclass(frozen=True, slots=True)
class GenerateRequest:
    """A prompt to be continued. `emitted` holds tokens that an earlier router already sent, when resumed.

    `tenant` and `cache_salt` keep caches apart: nothing is shared between requests that differ in either, neither
    answers nor the keys and values of equal prefixes.
    """

    request_id: str
    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams = field(default_factory=SamplingParams)
    priority: float = DEFAULT_PRIORITY
    timeout_s: float = 60.0
    emitted: tuple[int, ...] = ()
    tenant: str = ""
    cache_salt: str = ""

    def to_wire(self) -> dict[str, Any]:
        """Plain values for a link frame; `timeout_s` travels in the frame's own deadline."""
        return {
            "id": self.request_id,
            "prompt": self.prompt_token_ids,
            "sampling": asdict(self.sampling),
            "priority": self.priority,
            "emitted": self.emitted,
            "tenant": self.tenant,
            "salt": self.cache_salt,
        }

    @classmethod
    def from_wire(cls, wire: dict[str, Any], timeout_s: float) -> GenerateRequest:
        """The request that `to_wire` described, with the time that remains of it."""
        sampling = dict(wire["sampling"])
        sampling["stop"] = tuple(sampling["stop"])
        sampling["stop_token_ids"] = tuple(sampling["stop_token_ids"])
        sampling["logit_bias"] = tuple((token, bias) for token, bias in sampling["logit_bias"])
        return cls(
            request_id=wire["id"],
            prompt_token_ids=tuple(wire["prompt"]),
            sampling=SamplingParams(**sampling),
            priority=wire["priority"],
            timeout_s=timeout_s,
            emitted=tuple(wire["emitted"]),
            tenant=wire["tenant"],
            cache_salt=wire["salt"],
        )


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Natural-log probability of the chosen token and of the most likely ones (`[(token id, logprob)]`).
    `rank`: how the chosen token stands among all, 1 for the most likely."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()
    rank: int = 0

    def to_wire(self) -> tuple[Any, ...]:
        """Plain values."""
        return self.token_id, self.logprob, self.top, self.rank

    @classmethod
    def from_wire(cls, wire: Sequence[Any]) -> TokenLogprob:
        """What `to_wire` described."""
        token_id, logprob, top, rank = wire
        return cls(token_id, logprob, tuple((a, b) for a, b in top), rank)


@dataclass(frozen=True, slots=True)
class TokenChunk:
    """The next tokens of one generation. The last chunk, and only it, has a `finish_reason`.

    Attributes:
        prompt_logprobs: of the first chunk, where asked for: one for each token of the prompt, None for the first.
        cached_tokens: of the first chunk: how many tokens of the prompt were not computed, since their keys and
            values were there already.
    """

    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None = None
    logprobs: tuple[TokenLogprob, ...] | None = None
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None
    cached_tokens: int = 0

    def to_wire(self) -> dict[str, Any]:
        """Plain values for a link frame."""
        wire: dict[str, Any] = {"t": self.token_ids}
        if self.finish_reason is not None:
            wire["f"] = self.finish_reason
        if self.logprobs is not None:
            wire["l"] = [item.to_wire() for item in self.logprobs]
        if self.prompt_logprobs is not None:
            wire["p"] = [item and item.to_wire() for item in self.prompt_logprobs]
        if self.cached_tokens:
            wire["c"] = self.cached_tokens
        return wire

    @classmethod
    def from_wire(cls, wire: dict[str, Any]) -> TokenChunk:
        """The chunk that `to_wire` described."""
        logprobs, prompt_logprobs = wire.get("l"), wire.get("p")
        return cls(
            token_ids=tuple(wire["t"]),
            finish_reason=wire.get("f"),
            logprobs=None if logprobs is None else tuple(map(TokenLogprob.from_wire, logprobs)),
            prompt_logprobs=None
            if prompt_logprobs is None
            else tuple(None if item is None else TokenLogprob.from_wire(item) for item in prompt_logprobs),
            cached_tokens=wire.get("c", 0),
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
    """A tensor result, and whether the cache gave it.

    Attributes:
        hit: what the cache can be asked with whether it still gives the same; None where it gave nothing.
    """

    outcome: CacheOutcome
    result: InferResult
    hit: object | None = None


@dataclass(frozen=True, slots=True)
class GenerateAnswer:
    """A generation, live or replayed. `response_id` and `created_s` (Unix time) are those of the request that
    computed it, so that a cached answer is the computed one byte for byte. `hit`: as in `InferAnswer`."""

    outcome: CacheOutcome
    response_id: str
    created_s: int
    chunks: AsyncGenerator[TokenChunk, None]
    hit: object | None = None
