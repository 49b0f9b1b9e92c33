"""How a tensor request and its answer are packed between gateways and routers; both ends read it.

request's meta   version, code of the dtype, layer (-1: none named), priority, tokens, hidden size
request's body   the hidden states' bytes
answer's meta    version, code of the dtype, tokens, hidden size
answer's body    the output's bytes
"""

from __future__ import annotations

import struct

from ..errors import InvalidTensorError, LinkProtocolError
from ..links import Packed
from ..requests import DTYPE_BYTES, InferRequest, InferResult, TensorData

_VERSION = 1
_REQUEST = struct.Struct("<BBidII")
_ANSWER = struct.Struct("<BBII")
_NO_LAYER = -1
_DTYPES = ("float32", "bfloat16", "float16", "float64")
_CODES = {dtype: code for code, dtype in enumerate(_DTYPES)}


def pack_request(request: InferRequest) -> Packed:
    """A request; its time travels with the call. It looks at the tensor's memory until it is sent.

    Raises:
        InvalidTensorError: not `[tokens, hidden]`, or of a dtype that is not computed in.
    """
    states = request.hidden_states
    if states.dtype not in _CODES:
        raise InvalidTensorError(f"hidden states are {states.dtype}; they must be one of {_DTYPES}")
    if len(states.shape) != 2:
        raise InvalidTensorError(f"hidden states have shape {list(states.shape)}; it must be [tokens, hidden]")
    layer = _NO_LAYER if request.layer is None else request.layer
    meta = _REQUEST.pack(_VERSION, _CODES[states.dtype], layer, request.priority, *states.shape)
    return Packed(meta, (states.flat(),))


def unpack_request(packed: Packed, timeout_s: float) -> InferRequest:
    """The request that `pack_request` packed, over the same memory, with the time that remains of it. Whether its
    numbers go together is not checked.

    Raises:
        LinkProtocolError: another version of the layout.
    """
    version, code, layer, priority, tokens, hidden_size = _fields(_REQUEST, packed)
    return InferRequest(
        "",
        _tensor(packed, version, code, tokens, hidden_size),
        None if layer == _NO_LAYER else layer,
        priority,
        timeout_s,
    )


def pack_result(result: InferResult) -> Packed:
    """An answer."""
    output = result.output
    return Packed(_ANSWER.pack(_VERSION, _CODES[output.dtype], *output.shape), (output.flat(),))


def unpack_result(packed: Packed) -> InferResult:
    """The answer that `pack_result` packed, over the same memory.

    Raises:
        LinkProtocolError: another version of the layout, or lengths that do not go together.
    """
    output = _tensor(packed, *_fields(_ANSWER, packed))
    if output.nbytes != DTYPE_BYTES[output.dtype] * output.shape[0] * output.shape[1]:
        raise LinkProtocolError(f"a router's answer of shape {output.shape} has {output.nbytes} bytes")
    return InferResult(output)


def _fields(layout: struct.Struct, packed: Packed) -> tuple[int, ...]:
    if len(packed.meta) != layout.size:
        raise LinkProtocolError(f"a packed tensor describes itself in {layout.size} bytes, not {len(packed.meta)}")
    return layout.unpack(packed.meta)


def _tensor(packed: Packed, version: int, code: int, tokens: int, hidden_size: int) -> TensorData:
    if version != _VERSION or code >= len(_DTYPES):
        raise LinkProtocolError(f"a packed tensor of version {version}, dtype {code} is unknown here")
    (body,) = packed.body
    return TensorData(_DTYPES[code], (tokens, hidden_size), body)
