"""msgpack bodies, in both directions. Extension types are refused, and nothing is ever unpickled."""

from __future__ import annotations

from typing import Any, NoReturn

import msgpack

from .errors import ProtocolError
from .transport import Buffer

# Smaller buffers are copied into the body: cheaper than to write them on their own.
_INLINE_BYTES = 2**12
_BIN32 = b"\xc6"


def pack(value: Any) -> tuple[Buffer, ...]:
    """`value` as msgpack, in pieces: large memoryviews in it are pieces of their own and not copied."""
    # The packer's own buffer is 1 MiB unless told otherwise, and fresh pages cost more than all the packing.
    packer = msgpack.Packer(autoreset=False, buf_size=2 * _INLINE_BYTES)
    pieces: list[Buffer] = []
    _add(value, packer, pieces)
    pieces.append(packer.bytes())
    return tuple(piece for piece in pieces if len(piece))


def _add(item: Any, packer: Any, pieces: list[Buffer]) -> None:
    if isinstance(item, dict):
        packer.pack_map_header(len(item))
        for key, inner in item.items():
            packer.pack(key)
            _add(inner, packer, pieces)
    elif isinstance(item, list | tuple):
        packer.pack_array_header(len(item))
        for inner in item:
            _add(inner, packer, pieces)
    elif isinstance(item, memoryview) and item.nbytes > _INLINE_BYTES:
        pieces.append(packer.bytes() + _BIN32 + item.nbytes.to_bytes(4, "big"))
        packer.reset()
        pieces.append(item)
    else:
        packer.pack(item)


def unpack(body: bytes, call: str) -> dict[str, Any]:
    """The map in `body`; msgpack bounds every length in it by the body's own.

    Raises:
        ProtocolError: not one msgpack map, or with an extension type in it. `call` names the request.
    """
    try:
        value = msgpack.unpackb(body, ext_hook=_refuse_extension, strict_map_key=True)
    except Exception as error:  # msgpack raises a dozen types; all of them mean the same to us
        raise ProtocolError(f"the answer to {call} is not msgpack: {error}") from error
    if not isinstance(value, dict):
        raise ProtocolError(f"the answer to {call} is no map but {type(value).__name__}")
    return value


def _refuse_extension(code: int, _data: bytes) -> NoReturn:
    raise ValueError(f"extension type {code} refused")
