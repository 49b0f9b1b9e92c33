"""The cache key: SHA-256 over a canonical encoding of everything that can change an answer.

Fields, in order: key schema, runtime version, every field of the model (its weights digest and compute dtype among
them), tenant, endpoint; then for tensors layer, dtype, shape and bytes, for generation the prompt's token ids, the
tokens emitted before a resumption and every sampling parameter with its default filled in. Priority and timeout
are left out: they change when an answer comes, not what it is. Every value is written with its type and length,
so that no two different requests encode alike.
"""

from __future__ import annotations

import hashlib
import struct
from dataclasses import fields
from typing import Any

from .. import __version__
from ..requests import GenerateRequest, InferRequest, ModelInfo

KEY_SCHEMA = 1


class _CanonicalHash:
    """SHA-256 over type-tagged, length-prefixed values."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()

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


def _start(model: ModelInfo, tenant: str, endpoint: str) -> _CanonicalHash:
    canonical = _CanonicalHash()
    model_fields = (getattr(model, field.name) for field in fields(model))
    for value in (KEY_SCHEMA, __version__, *model_fields, tenant, endpoint):
        canonical.add(value)
    return canonical


def infer_key(model: ModelInfo, request: InferRequest, tenant: str = "") -> bytes:
    """The key of a tensor request; 32 bytes."""
    canonical = _start(model, tenant, "infer")
    layer = model.moe_layers[0] if request.layer is None else request.layer
    states = request.hidden_states
    for value in (layer, states.dtype, tuple(states.shape), states.data):
        canonical.add(value)
    return canonical.digest()


def generate_key(model: ModelInfo, request: GenerateRequest, tenant: str = "") -> bytes:
    """The key of a generation; 32 bytes."""
    canonical = _start(model, tenant, "generate")
    for tokens in (request.prompt_token_ids, request.emitted):
        canonical.add(struct.pack(f"<{len(tokens)}q", *tokens))
    for field in fields(request.sampling):
        value = getattr(request.sampling, field.name)
        if field.name == "seed" and request.sampling.temperature == 0:
            value = 0  # greedy choices draw no random number
        canonical.add(field.name)
        # 1 and 1.0 are one temperature, however the client spelled it.
        canonical.add(float(value) if field.type == "float" else value)
    return canonical.digest()
