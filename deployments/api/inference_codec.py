"""The Open Inference Protocol's infer request and response, as plain maps: JSON, JSON with binary data,
msgpack.

The three carry one schema. In JSON a tensor's `data` is a list of numbers, or its bytes follow the JSON
(binary tensor data extension); in msgpack `data` is bin. And a body may be the tensor's bytes alone (Triton's raw
binary request).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import msgpack
import orjson

from ...runtime.errors import InvalidRequestError, InvalidTensorError
from ...runtime.requests import DTYPE_BYTES, InferRequest, ModelInfo, TensorData
from . import wire
from .bodies import decode_json
from .context import ApiSettings
from .fields import Fields, shown
from .options import CallOptions, read_options

Encoding = Literal["json", "msgpack"]

JSON_LENGTH_HEADER = b"inference-header-content-length"
MODEL_VERSION = "1"

_REQUEST_FIELDS = frozenset(("id", "inputs", "outputs", "parameters"))
_INPUT_FIELDS = frozenset(("name", "shape", "datatype", "parameters", "data"))
_OUTPUT_FIELDS = frozenset(("name", "parameters"))
_PARAMETERS = frozenset(("layer", "priority", "timeout", "cache", "binary_data_output"))
_MAX_ID_CHARS = 256
_MAX_KNOWN_HEADS, _MAX_KNOWN_HEAD_BYTES = 256, 1024


@dataclass(frozen=True, slots=True)
class TensorCall:
    """One operation, read and checked. `echo_id` and `binary_output` shape its answer."""

    tensor: TensorData
    layer: int | None
    options: CallOptions
    echo_id: str | None
    binary_output: bool

    @property
    def shape(self) -> tuple[int, int]:
        """`[tokens, hidden]`."""
        tokens, hidden_size = self.tensor.shape
        return tokens, hidden_size

    def request(self, request_id: str, remaining_s: float) -> InferRequest:
        """What goes to the router."""
        options = self.options
        return InferRequest(
            request_id, self.tensor, self.layer, options.priority, remaining_s, tenant=options.tenant
        )


@dataclass(frozen=True, slots=True)
class Reader:
    """Reads operations for one model, with the options that the call's headers gave."""

    model: ModelInfo
    settings: ApiSettings
    defaults: CallOptions
    encoding: Encoding

    def read(self, body: object, binary: memoryview | None = None) -> TensorCall:
        """One operation. `binary` is what followed the JSON.

        Raises:
            InvalidRequestError, InvalidTensorError.
        """
        fields = Fields(body)
        fields.only(_REQUEST_FIELDS)
        echo_id = fields.text("id")
        if echo_id is not None and len(echo_id) > _MAX_ID_CHARS:
            raise fields.wrong("id", f"at most {_MAX_ID_CHARS} characters")
        parameters = fields.child("parameters")
        parameters.only(_PARAMETERS)
        options = read_options(parameters, self.defaults, self.settings, triton=True)
        return TensorCall(
            tensor=self._tensor(fields, binary),
            layer=self._layer(parameters),
            options=options,
            echo_id=echo_id,
            binary_output=_binary_output(fields, parameters) and self.encoding == "json",
        )

    def read_raw(self, body: bytes) -> TensorCall:
        """A body that is nothing but the tensor's bytes, in the datatype of the model's metadata; answered with
        bytes too. Triton's raw binary request, which says so with `Inference-Header-Content-Length: 0`.

        Raises:
            InvalidTensorError: no whole rows, or not finite.
        """
        kind = wire.DATATYPES[wire.DATATYPE_OF.get(self.model.dtype, "FP32")]
        row_bytes = self.model.hidden_size * DTYPE_BYTES[kind.name]
        tokens, rest = divmod(len(body), row_bytes)
        if rest:
            wire.wrong(f"{len(body)} bytes of data; a row of {kind.name} takes {row_bytes}")
        tensor = wire.from_bytes(kind, (tokens, self.model.hidden_size), body)
        return TensorCall(tensor, None, self.defaults, None, True)

    def _layer(self, parameters: Fields) -> int | None:
        layer = parameters.integer("layer", 0, 1 << 31)
        if layer is not None and layer not in self.model.moe_layers:
            known = ", ".join(map(str, self.model.moe_layers[:64]))
            raise parameters.wrong("layer", f"one of the model's MoE layers: {known}")
        return layer

    def _tensor(self, fields: Fields, binary: memoryview | None) -> TensorData:
        inputs = fields.items("inputs")
        if inputs is None or len(inputs) != 1:
            raise fields.wrong("inputs", f"a list with one tensor, named {wire.INPUT_NAME}")
        item = Fields(inputs[0], "inputs[0].")
        item.only(_INPUT_FIELDS)
        if item.values.get("name") != wire.INPUT_NAME:
            raise InvalidTensorError(
                f"inputs[0].name is {shown(item.values.get('name'))}; it must be {wire.INPUT_NAME}",
                "inputs[0].name",
            )
        kind = wire.checked_datatype(item.values.get("datatype"))
        shape = wire.checked_shape(item.values.get("shape"), self.model)
        data = item.values.get("data")
        size = _binary_size(item, binary)
        if size is not None:
            if data is not None:
                wire.wrong("has both data and binary_data_size")
            return wire.from_bytes(kind, shape, binary or b"")
        if self.encoding == "json":
            return wire.from_numbers(kind, shape, data)
        if not isinstance(data, bytes):
            wire.wrong(f"data is {shown(data)}; in msgpack it must be bin: the bytes, C order, little endian")
        return wire.from_bytes(kind, shape, data)


class KnownHeads:
    """What the JSON in front of binary tensors says, remembered: a client sends the same each time, with other
    bytes behind it. Bounded."""

    def __init__(self) -> None:
        self._model: ModelInfo | None = None
        self._known: dict[tuple[bytes, int, CallOptions], TensorCall] = {}

    def read(self, reader: Reader, head: bytes, binary: memoryview) -> TensorCall:
        """As `Reader.read`. Raises: as that, and for what is no JSON."""
        if reader.model is not self._model:
            self._model = reader.model
            self._known.clear()
        key = head, len(binary), reader.defaults
        if (known := self._known.get(key)) is not None:
            tensor = wire.from_bytes(wire.DATATYPES[wire.DATATYPE_OF[known.tensor.dtype]], known.shape, binary)
            return TensorCall(tensor, known.layer, known.options, known.echo_id, known.binary_output)
        call = reader.read(decode_json(head, reader.settings.max_json_bytes), binary)
        if len(head) <= _MAX_KNOWN_HEAD_BYTES:
            if len(self._known) >= _MAX_KNOWN_HEADS:
                self._known.clear()
            nothing = TensorData(call.tensor.dtype, call.tensor.shape, b"")
            self._known[key] = TensorCall(nothing, call.layer, call.options, call.echo_id, call.binary_output)
        return call


def _binary_size(item: Fields, binary: memoryview | None) -> int | None:
    parameters = item.child("parameters")
    parameters.only(("binary_data_size",))
    size = parameters.integer("binary_data_size", 0, 1 << 62)
    if size is None:
        if binary:
            wire.wrong(f"{len(binary)} bytes follow the JSON, but no binary_data_size claims them")
        return None
    if binary is None:
        wire.wrong("has binary_data_size, but the request has no header Inference-Header-Content-Length")
    if size != len(binary):
        wire.wrong(f"binary_data_size is {size}, but {len(binary)} bytes follow the JSON")
    return size


def _binary_output(fields: Fields, parameters: Fields) -> bool:
    wanted = parameters.flag("binary_data_output") or False
    outputs = fields.items("outputs") or []
    if len(outputs) > 1:
        raise fields.wrong("outputs", f"at most one output, named {wire.OUTPUT_NAME}")
    for output in outputs:
        item = Fields(output, "outputs[0].")
        item.only(_OUTPUT_FIELDS)
        if item.values.get("name") != wire.OUTPUT_NAME:
            raise item.wrong("name", wire.OUTPUT_NAME)
        details = item.child("parameters")
        details.only(("binary_data",))
        own = details.flag("binary_data")
        wanted = wanted if own is None else own
    return wanted


def split_body(body: bytes, json_length: bytes | None) -> tuple[bytes | memoryview, memoryview | None]:
    """JSON and the bytes after it, without a copy. None where the request has no binary part.

    Raises:
        InvalidRequestError: the header is no number, or more than the body.
    """
    if json_length is None:
        return body, None
    if not json_length.isdigit() or len(json_length) > 18 or int(json_length) > len(body):
        name = "Inference-Header-Content-Length"
        value = shown(json_length.decode("latin-1"))
        raise InvalidRequestError(f"{name} is {value}; it must be at most the body's {len(body)} bytes", name)
    view = memoryview(body)
    return view[: int(json_length)], view[int(json_length) :]


def response_map(
    model: ModelInfo, call: TensorCall, output: TensorData, data: Callable[[TensorData], Any]
) -> dict[str, Any]:
    """The response of one operation; `data` makes its `data`, which is left out where that gives None."""
    tensor: dict[str, Any] = {
        "name": wire.OUTPUT_NAME,
        "datatype": wire.DATATYPE_OF[output.dtype],
        "shape": list(output.shape),
    }
    content = data(output)
    if content is None:
        tensor["parameters"] = {"binary_data_size": output.nbytes}
    else:
        tensor["data"] = content
    answer: dict[str, Any] = {"model_name": model.name, "model_version": MODEL_VERSION}
    if call.echo_id is not None:
        answer["id"] = call.echo_id
    answer["outputs"] = [tensor]
    return answer


def tensor_data(encoding: Encoding) -> Callable[[TensorData], Any]:
    """How `data` looks in that encoding."""
    return (lambda tensor: tensor.data) if encoding == "msgpack" else wire.numbers


def pack(value: Any, encoding: Encoding) -> bytes:
    """A response map as bytes."""
    if encoding == "msgpack":
        packed: bytes = msgpack.packb(value, use_bin_type=True)
        return packed
    return orjson.dumps(value, option=orjson.OPT_SERIALIZE_NUMPY)
