"""The cache key: SHA-256 over a canonical encoding of everything that can change an answer, and of nothing else.

    what                     where from                       why
    key schema, version      here, pimoe                      another encoding, or other kernels
    model                    every field of `ModelInfo`       name, family, compute dtype, sizes, layers, top-k,
                                                              end tokens, context; digest of the weights together
                                                              with config.json: quantisation, routing
    tokenizer_digest         `Serving`                        tokenizer and chat template: what a prompt means
    placement                `Serving`                        experts per group: the order that sums are rounded in
    batch_invariant          `Serving`                        other kernels
    expert_quantization      `Serving`                        other weights
    tenant                   the request                      nothing is shared between tenants, unless configured
    endpoint                 "infer" or "generate"
    generate: cache_salt     the request                      the caller's own way to share nothing
    infer: layer             the request, default filled in
    infer: dtype, shape, bytes    the one tensor, `hidden_states`
    generate: prompt, emitted     token ids, each list with its length
    generate: sampling       every field of `SamplingParams`, by name, defaults filled in; numbers that are floats
                             are hashed as floats (1 is 1.0, -0.0 is 0.0); the seed is 0 where nothing is drawn
                             (temperature 0); `stop_token_ids` as the set that they are; stop strings too, since
                             generations end at them below the cache

Left out: request id, priority and timeout, which change when an answer comes and not what it is; and the
response's format. Every value is written with its type
and length, so that no two different requests encode alike. A parameter that is unknown here cannot be in a
request: the HTTP layer refuses it. What no field can tell (the code of experts of your own) is for `flush`.
"""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Any

from .. import __version__
from ..requests import GenerateRequest, InferRequest, ModelInfo

KEY_SCHEMA = 4


@dataclass(frozen=True, slots=True)
class Serving:
    """What of a deployment, besides its model's description, decides answers. See the module."""

    tokenizer_digest: str = ""
    placement: tuple[tuple[int, ...], ...] = ()
    batch_invariant: bool = False
    expert_quantization: str | None = None


_PLAIN = Serving()


class _CanonicalHash:
    """SHA-256 over type-tagged, length-prefixed values."""

    def __init__(self, begun: Any = None) -> None:
        self._hash = hashlib.sha256() if begun is None else begun

    def copy(self) -> _CanonicalHash:
        """One that goes on from here by itself."""
        return _CanonicalHash(self._hash.copy())

    def add(self, value: Any) -> None:
        if value is None:
            self._put(b"N", b"")
        elif isinstance(value, bool):
            self._put(b"B", bytes([value]))
        elif isinstance(value, int):
            self._put(b"I", str(value).encode())
        elif isinstance(value, float):
            self._put(b"F", struct.pack("<d", value + 0.0))  # + 0.0: minus zero is zero
        elif isinstance(value, str):
            self._put(b"S", value.encode())
        elif isinstance(value, tuple):
            self._hash.update(b"T" + struct.pack("<Q", len(value)))
            for item in value:
                self.add(item)
        else:
            self._put(b"Y", value)

    def _put(self, tag: bytes, data: bytes | bytearray | memoryview) -> None:
        size = data.nbytes if isinstance(data, memoryview) else len(data)
        self._hash.update(tag + struct.pack("<Q", size))
        self._hash.update(data)

    def digest(self) -> bytes:
        return self._hash.digest()


def _start(model: ModelInfo, serving: Serving, tenant: str, endpoint: str) -> _CanonicalHash:
    return _started(model, serving, tenant, endpoint).copy()


# What all requests of a tenant have in common takes longer to hash than most of the rest.
@lru_cache(maxsize=64)
def _started(model: ModelInfo, serving: Serving, tenant: str, endpoint: str) -> _CanonicalHash:
    canonical = _CanonicalHash()
    for value in (KEY_SCHEMA, __version__):
        canonical.add(value)
    for described in (model, serving):
        for field in fields(described):
            canonical.add(field.name)
            canonical.add(getattr(described, field.name))
    for value in (tenant, endpoint):
        canonical.add(value)
    return canonical


def infer_key(
    model: ModelInfo, request: InferRequest, tenant: str | None = None, serving: Serving = _PLAIN
) -> bytes:
    """The key of a tensor request; 32 bytes. `tenant`: None is the request's own."""
    canonical = _start(model, serving, request.tenant if tenant is None else tenant, "infer")
    layer = model.moe_layers[0] if request.layer is None else request.layer
    states = request.hidden_states
    for value in (layer, states.dtype, tuple(states.shape), states.data):
        canonical.add(value)
    return canonical.digest()


def generate_key(
    model: ModelInfo, request: GenerateRequest, tenant: str | None = None, serving: Serving = _PLAIN
) -> bytes:
    """The key of a generation; 32 bytes. `tenant`: None is the request's own."""
    canonical = _start(model, serving, request.tenant if tenant is None else tenant, "generate")
    canonical.add(request.cache_salt)
    for tokens in (request.prompt_token_ids, request.emitted):
        canonical.add(struct.pack(f"<{len(tokens)}q", *tokens))
    for field in fields(request.sampling):
        value = getattr(request.sampling, field.name)
        if field.name == "seed" and request.sampling.temperature == 0:
            value = 0  # greedy choices draw no random number
        if field.name == "stop_token_ids":
            value = tuple(sorted(set(value)))
        canonical.add(field.name)
        # 1 and 1.0 are one temperature, however the client spelled it.
        canonical.add(float(value) if field.type == "float" else value)
    return canonical.digest()
