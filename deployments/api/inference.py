"""Open Inference Protocol (KServe v2): tensors in, tensors out. And `infer_many`, pimoe's own, for many at
once."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import orjson

from ...runtime import __version__
from ...runtime.errors import ModelNotFoundError, PimoeError, UnavailableError
from ...runtime.requests import CacheOutcome, ModelInfo, TensorData
from . import errors, wire
from .bodies import MSGPACK_TYPES, decode_json, decode_msgpack, media_type
from .call import Call, cache_header, combined
from .fields import Fields, shown
from .inference_codec import (
    JSON_LENGTH_HEADER,
    MODEL_VERSION,
    Encoding,
    Reader,
    TensorCall,
    pack,
    response_map,
    split_body,
    tensor_data,
)
from .lifetime import Lifetime, cancelled_from_behind

logger = logging.getLogger(__name__)

_CONTENT_TYPES: dict[Encoding, bytes] = {"json": b"application/json", "msgpack": b"application/msgpack"}


def served_model(call: Call) -> ModelInfo:
    """The model that the path names.

    Raises:
        ModelNotFoundError: another one, or another version than "1".
        UnavailableError: no model is known yet.
    """
    name: str = call.scope["path_params"]["name"]
    # Names of models may hold slashes, and tritonclient does not escape those.
    version = MODEL_VERSION
    if "/versions/" in name:
        name, _, version = name.rpartition("/versions/")
    model = call.context.model
    if name != model.name:
        raise ModelNotFoundError(f"no model {shown(name)} here; this is {shown(model.name)}", "model")
    if version != MODEL_VERSION:
        raise ModelNotFoundError(f"{shown(name)} has no version {shown(version)}", "version")
    return model


def _reader(call: Call, model: ModelInfo) -> Reader:
    encoding: Encoding = "msgpack" if media_type(call.headers) in MSGPACK_TYPES else "json"
    return Reader(model, call.settings, call.header_options(), encoding)


async def infer(call: Call) -> None:
    """`POST /v2/models/{name}/infer`."""
    model = served_model(call)
    reader = _reader(call, model)
    body = await call.body()
    if reader.defaults.use_cache and await call.repeat(body):
        return
    if reader.encoding == "msgpack":
        tensor_call = reader.read(decode_msgpack(body, 0))
    elif call.headers.get(JSON_LENGTH_HEADER) == b"0":
        tensor_call = reader.read_raw(body)
    else:
        text, binary = split_body(body, call.headers.get(JSON_LENGTH_HEADER))
        if binary:
            tensor_call = call.kept.heads.read(reader, bytes(text), binary)
        else:
            tensor_call = reader.read(decode_json(text, call.settings.max_json_bytes), binary)
    remaining_s = call.start_clock(tensor_call.options.timeout_s)
    request = tensor_call.request(call.work_id(), remaining_s)
    answer = await call.context.infer(request, tensor_call.options.bypass)
    content, content_type, extra = _written(model, reader.encoding, tensor_call, answer.result.output)
    extra.append(cache_header(answer.outcome))
    if answer.hit is None:
        await call.respond(content, content_type, extra=extra)
    else:
        await call.respond_hit(content, content_type, extra, (answer.hit,))


def _written(
    model: ModelInfo, encoding: Encoding, call: TensorCall, output: TensorData
) -> tuple[bytes, bytes, errors.Headers]:
    """An answer's body, its content type, and the headers that tell how to read it."""
    if not call.binary_output:
        return (
            pack(response_map(model, call, output, tensor_data(encoding)), encoding),
            _CONTENT_TYPES[encoding],
            [],
        )
    head = orjson.dumps(response_map(model, call, output, lambda tensor: None))
    # One copy: Serve's proxy mode pickles what is sent, so that a view would not do.
    body = b"".join((head, output.data))
    return body, b"application/octet-stream", [(JSON_LENGTH_HEADER, str(len(head)).encode())]


async def infer_many(call: Call) -> None:
    """`POST /v2/models/{name}/infer_many`: operations run at the same time, each with its own outcome."""
    model = served_model(call)
    reader = _reader(call, model)
    body = await call.body()
    limit = call.settings.max_infer_many
    if reader.encoding == "msgpack":
        envelope = Fields(decode_msgpack(body, limit))
    else:
        envelope = Fields(decode_json(body, call.settings.max_json_bytes))
    envelope.only(("requests",))
    items = envelope.items("requests")
    if not items or len(items) > limit:
        raise envelope.wrong("requests", f"a list of 1 to {limit} requests")
    many = _Many(call, reader)
    calls = [many.read(item) for item in items]
    timeouts = [item.options.timeout_s for item in calls if isinstance(item, TensorCall)]
    longest_s = max(timeouts, default=call.settings.default_timeout_s)
    # Each operation has its own deadline. The call's comes later, so as not to take finished ones with it.
    call.lifetime.limit(longest_s, 2 * call.settings.deadline_grace_s)
    answers = await asyncio.gather(*(many.run(item) for item in calls))
    content = pack({"responses": answers}, reader.encoding)
    extra = [cache_header(combined(many.outcomes))]
    await call.respond(content, _CONTENT_TYPES[reader.encoding], extra=extra)


class _Many:
    """The operations of one `infer_many` call. An error of one stays its own."""

    def __init__(self, call: Call, reader: Reader) -> None:
        self._call = call
        self._reader = reader
        self._data = tensor_data(reader.encoding)
        self.outcomes: list[CacheOutcome] = []

    def read(self, item: object) -> TensorCall | PimoeError:
        try:
            return self._reader.read(item)
        except PimoeError as error:
            return error

    async def run(self, item: TensorCall | PimoeError) -> dict[str, Any]:
        if isinstance(item, PimoeError):
            return errors.item_body(item)
        try:
            return await self._infer(item)
        except asyncio.CancelledError as error:
            if not cancelled_from_behind():
                raise
            return self._failed(PimoeError("the operation was cancelled"), error)
        except Exception as error:
            return self._failed(error, error)

    def _failed(self, error: Exception, cause: BaseException) -> dict[str, Any]:
        if errors.is_fault(error):
            logger.error("request %s failed in infer_many", self._call.request_id, exc_info=cause)
        return errors.item_body(errors.public(error, self._call.request_id))

    async def _infer(self, item: TensorCall) -> dict[str, Any]:
        timeout_s = item.options.timeout_s
        async with Lifetime(timeout_s, self._call.lifetime.started_s) as lifetime:
            remaining_s = lifetime.limit(timeout_s, self._call.settings.deadline_grace_s)
            request = item.request(self._call.work_id(), remaining_s)
            answer = await self._call.context.infer(request, item.options.bypass)
        self.outcomes.append(answer.outcome)
        response = response_map(self._reader.model, item, answer.result.output, self._data)
        return {**response, "parameters": {"cache": answer.outcome}}


async def server_metadata(call: Call) -> None:
    """`GET /v2`."""
    extensions = ["binary_tensor_data", "parameters", "schedule_policy", "msgpack", "infer_many"]
    await call.respond(orjson.dumps({"name": "pimoe", "version": __version__, "extensions": extensions}))


async def model_metadata(call: Call) -> None:
    """`GET /v2/models/{name}`, with or without a version."""
    model = served_model(call)
    datatype = wire.DATATYPE_OF.get(model.dtype, "FP32")
    shape = [-1, model.hidden_size]
    description = {
        "name": model.name,
        "versions": [MODEL_VERSION],
        "platform": "pimoe",
        "inputs": [{"name": wire.INPUT_NAME, "datatype": datatype, "shape": shape}],
        "outputs": [{"name": wire.OUTPUT_NAME, "datatype": datatype, "shape": shape}],
        "parameters": {"kind": model.kind, "family": model.family, "moe_layers": model.moe_layers},
    }
    await call.respond(orjson.dumps(description))


async def model_ready(call: Call) -> None:
    """`GET /v2/models/{name}/ready`."""
    model = served_model(call)
    await check_ready(call)
    await call.respond(orjson.dumps({"name": model.name, "ready": True}))


async def server_live(call: Call) -> None:
    """`GET /v2/health/live`."""
    await call.respond(b'{"live":true}')


async def server_ready(call: Call) -> None:
    """`GET /v2/health/ready`."""
    await check_ready(call)
    await call.respond(b'{"ready":true}')


async def check_ready(call: Call) -> None:
    """Passes when every part is there.

    Raises:
        UnavailableError: some part has no live replica.
    """
    if not await call.context.ready():
        raise UnavailableError("not ready: an expert group or the router has no live replica")
