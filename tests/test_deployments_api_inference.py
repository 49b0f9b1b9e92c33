"""`/v2`: the real `tritonclient.http`, unchanged, and raw msgpack and JSON over aiohttp."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from typing import Any

import aiohttp
import ml_dtypes
import msgpack
import numpy as np
import pytest
import tritonclient.http as triton
import tritonclient.http.aio as triton_aio
from fake_gateway import HIDDEN, FakeGateway, ask, served, wait_until
from pimoe.deployments.api import ApiSettings
from pimoe.runtime.errors import OverloadedError
from tritonclient.utils import InferenceServerException

Server = tuple[FakeGateway, str]

DTYPES: dict[str, Any] = {
    "FP32": np.float32,
    "FP16": np.float16,
    "FP64": np.float64,
    "BF16": ml_dtypes.bfloat16,
}
MSGPACK = {"content-type": "application/msgpack"}
INFER = "/v2/models/echo/infer"
INFER_MANY = "/v2/models/echo/infer_many"


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    gateway = FakeGateway()
    with served(gateway) as address:
        yield gateway, address


@pytest.fixture
def gateway(server: Server) -> FakeGateway:
    """The server's gateway, as new."""
    gateway = server[0]
    gateway.__dict__.update(FakeGateway().__dict__)
    return gateway


@pytest.fixture
def client(server: Server, gateway: FakeGateway) -> Iterator[Any]:
    with triton.InferenceServerClient(server[1]) as client:
        yield client


@pytest.fixture
async def session(server: Server, gateway: FakeGateway) -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession(f"http://{server[1]}") as session:
        yield session


def states(datatype: str = "FP32", tokens: int = 3) -> Any:
    """Hidden states that every datatype holds exactly."""
    return (np.arange(tokens * HIDDEN).reshape(tokens, HIDDEN) / 4 - 2).astype(DTYPES[datatype])


def triton_input(array: Any, datatype: str = "FP32", binary: bool = True) -> list[Any]:
    item = triton.InferInput("hidden_states", list(array.shape), datatype)
    return [item.set_data_from_numpy(array, binary_data=binary)]


def operation(array: Any, datatype: str = "FP32", **fields: Any) -> dict[str, Any]:
    """One request as a plain map, for msgpack."""
    tensor = {"name": "hidden_states", "shape": list(array.shape), "datatype": datatype}
    return {"inputs": [{**tensor, "data": array.tobytes()}], **fields}


def unpacked(response: dict[str, Any]) -> Any:
    output = response["outputs"][0]
    return np.frombuffer(output["data"], DTYPES[output["datatype"]]).reshape(output["shape"])


@pytest.mark.parametrize("datatype", DTYPES)
def test_binary_tensors(client: Any, gateway: FakeGateway, datatype: str) -> None:
    array = states(datatype)
    result = client.infer("echo", triton_input(array, datatype), request_id="mine")
    output = result.as_numpy("output")
    assert output.dtype == array.dtype
    np.testing.assert_array_equal(output, array * 2)
    assert result.get_response()["id"] == "mine"
    assert result.get_output("output")["parameters"] == {"binary_data_size": array.nbytes}
    assert gateway.inferred[0].hidden_states.data == array.tobytes()
    assert gateway.use_cache == [True]


@pytest.mark.parametrize("datatype", ["FP32", "FP16", "FP64"])
def test_json_tensors(client: Any, datatype: str) -> None:
    array = states(datatype)
    outputs = [triton.InferRequestedOutput("output", binary_data=False)]
    result = client.infer("echo", triton_input(array, datatype, binary=False), outputs=outputs)
    np.testing.assert_array_equal(result.as_numpy("output"), array * 2)
    assert result.get_output("output")["data"] == (array * 2).ravel().tolist()


@pytest.mark.parametrize(("binary_in", "binary_out"), [(True, False), (False, True)])
def test_mixed_tensors(client: Any, binary_in: bool, binary_out: bool) -> None:
    outputs = [triton.InferRequestedOutput("output", binary_data=binary_out)]
    result = client.infer("echo", triton_input(states(), binary=binary_in), outputs=outputs)
    np.testing.assert_array_equal(result.as_numpy("output"), states() * 2)


def test_large_binary_tensor_arrives_in_many_pieces(client: Any, gateway: FakeGateway) -> None:
    array = states(tokens=100_000)
    np.testing.assert_array_equal(client.infer("echo", triton_input(array)).as_numpy("output"), array * 2)


def test_metadata_and_health(client: Any, gateway: FakeGateway) -> None:
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("echo")
    assert client.is_model_ready("echo", "1")
    assert not client.is_model_ready("echo", "2")
    assert not client.is_model_ready("other")
    assert "binary_tensor_data" in client.get_server_metadata()["extensions"]
    metadata = client.get_model_metadata("echo", "1")
    assert metadata["inputs"] == [{"name": "hidden_states", "datatype": "FP32", "shape": [-1, HIDDEN]}]
    gateway.is_ready = False
    assert not client.is_server_ready()
    assert not client.is_model_ready("echo")
    assert client.is_server_live()


def test_versions_in_the_path(client: Any) -> None:
    client.infer("echo", triton_input(states()), model_version="1")
    with pytest.raises(InferenceServerException, match="no version '7'"):
        client.infer("echo", triton_input(states()), model_version="7")


def test_a_model_name_may_hold_slashes(client: Any, gateway: FakeGateway) -> None:
    assert gateway.info is not None
    gateway.info = replace(gateway.info, name="org/model")
    assert client.is_model_ready("org/model")
    client.infer("org/model", triton_input(states()), model_version="1")


def test_parameters(client: Any, gateway: FakeGateway) -> None:
    # tritonclient keeps the names priority and timeout to itself: its arguments are Triton's.
    client.infer(
        "echo", triton_input(states()), priority=1, timeout=2_500_000, parameters={"layer": 2, "cache": False}
    )
    request = gateway.inferred[0]
    assert (request.layer, request.priority) == (2, 1.0)
    assert 2.4 < request.timeout_s <= 2.5
    assert gateway.use_cache == [False]


def test_errors_reach_tritonclient(client: Any, gateway: FakeGateway) -> None:
    with pytest.raises(InferenceServerException, match="hidden size is 7; 'echo' has 8") as wrong:
        client.infer("echo", triton_input(np.zeros((1, 7), np.float32)))
    assert wrong.value.status() == "400"
    with pytest.raises(InferenceServerException, match="compressed") as compressed:
        client.infer("echo", triton_input(states()), request_compression_algorithm="gzip")
    assert compressed.value.status() == "415"
    with pytest.raises(InferenceServerException, match="sequence_id"):
        client.infer("echo", triton_input(states()), sequence_id=4)
    with pytest.raises(InferenceServerException, match="priority"):
        client.infer("echo", triton_input(states()), priority=2)
    gateway.error = OverloadedError("queue full")
    with pytest.raises(InferenceServerException, match="queue full") as busy:
        client.infer("echo", triton_input(states()))
    assert busy.value.status() == "429"


async def test_async_tritonclient(server: Server, gateway: FakeGateway) -> None:
    async with triton_aio.InferenceServerClient(server[1]) as client:
        result = await client.infer("echo", triton_input(states()))
        np.testing.assert_array_equal(result.as_numpy("output"), states() * 2)


@pytest.mark.parametrize("datatype", DTYPES)
async def test_msgpack(session: aiohttp.ClientSession, gateway: FakeGateway, datatype: str) -> None:
    array = states(datatype)
    request = operation(array, datatype, id="a", parameters={"layer": 0, "priority": 0.25, "timeout": 1.5})
    async with session.post(INFER, data=msgpack.packb(request), headers=MSGPACK) as response:
        assert response.status == 200
        assert response.content_type == "application/msgpack"
        assert response.headers["x-pimoe-cache"] == "miss"
        answer = msgpack.unpackb(await response.read())
    np.testing.assert_array_equal(unpacked(answer), array * 2)
    assert (answer["id"], answer["model_name"], answer["model_version"]) == ("a", "echo", "1")
    assert gateway.inferred[0].priority == 0.25
    assert 1.4 < gateway.inferred[0].timeout_s <= 1.5


@pytest.mark.parametrize(("dtype", "datatype"), [("float32", "FP32"), ("bfloat16", "BF16"), ("float16", "FP16")])
async def test_a_body_may_be_the_tensor_alone(
    session: aiohttp.ClientSession, gateway: FakeGateway, dtype: str, datatype: str
) -> None:
    assert gateway.info is not None
    gateway.info = replace(gateway.info, dtype=dtype)
    array = states(datatype)
    headers = {"inference-header-content-length": "0", "content-type": "application/octet-stream"}
    async with session.post(INFER, data=array.tobytes(), headers=headers) as response:
        assert response.status == 200
        body, head = await response.read(), int(response.headers["inference-header-content-length"])
    (output,) = json.loads(body[:head])["outputs"]
    assert (output["datatype"], output["shape"]) == (datatype, list(array.shape))
    np.testing.assert_array_equal(np.frombuffer(body[head:], array.dtype).reshape(array.shape), array * 2)
    assert gateway.inferred[0].hidden_states.dtype == dtype


async def test_a_tensor_alone_has_whole_rows(session: aiohttp.ClientSession, gateway: FakeGateway) -> None:
    headers = {"inference-header-content-length": "0"}
    async with session.post(INFER, data=bytes(4 * HIDDEN + 2), headers=headers) as response:
        assert response.status == 400
        assert f"a row of float32 takes {4 * HIDDEN}" in (await response.json())["detail"]
    assert not gateway.inferred


async def test_equal_heads_are_read_once_and_their_bytes_each_time(
    session: aiohttp.ClientSession, gateway: FakeGateway
) -> None:
    async def send(array: Any, headers: dict[str, str] | None = None, **fields: Any) -> tuple[int, bytes]:
        tensor = {"name": "hidden_states", "shape": list(array.shape), "datatype": "FP32"}
        head = json.dumps({"inputs": [{**tensor, "parameters": {"binary_data_size": array.nbytes}}], **fields})
        sent = {"inference-header-content-length": str(len(head)), **(headers or {})}
        async with session.post(INFER, data=head.encode() + array.tobytes(), headers=sent) as response:
            return response.status, await response.read()

    binary = {"binary_data_output": True}
    for factor in (1, 2, 3):
        status, body = await send(states() * factor, parameters=binary)
        assert status == 200
        assert body.endswith((states() * factor * 2).tobytes())
    assert (await send(states() * np.nan, parameters=binary))[0] == 400
    assert (await send(states(), {"x-pimoe-priority": "0.75"}, parameters=binary))[0] == 200
    assert gateway.inferred[-1].priority == 0.75
    assert (await send(states(), parameters={**binary, "layer": 2}))[0] == 200
    assert (gateway.inferred[-1].layer, gateway.inferred[-1].priority) == (2, 0.5)
    assert gateway.info is not None
    gateway.info = replace(gateway.info, moe_layers=(0,))
    assert (await send(states(), parameters={**binary, "layer": 2}))[0] == 400
    for count in range(600):
        status, body = await send(states(), id=str(count), parameters=binary)
        assert f'"id":"{count}"'.encode() in body


@pytest.mark.parametrize(("own", "binary"), [(None, True), (False, False), (True, True)])
async def test_an_output_decides_for_itself(
    session: aiohttp.ClientSession, own: bool | None, binary: bool
) -> None:
    tensor = {"name": "hidden_states", "shape": [1, HIDDEN], "datatype": "FP32", "data": [1.0] * HIDDEN}
    output = {"name": "output", "parameters": {} if own is None else {"binary_data": own}}
    request = {"inputs": [tensor], "outputs": [output], "parameters": {"binary_data_output": True}}
    async with session.post(INFER, json=request) as response:
        assert response.status == 200
        assert ("inference-header-content-length" in response.headers) is binary


@pytest.mark.parametrize("nested", [True, False])
async def test_json_numbers_nested_or_flat(session: aiohttp.ClientSession, nested: bool) -> None:
    array = states("BF16")
    numbers = array.astype(np.float32)
    data = numbers.tolist() if nested else numbers.ravel().tolist()
    tensor = {"name": "hidden_states", "shape": list(array.shape), "datatype": "BF16", "data": data}
    async with session.post(INFER, json={"inputs": [tensor]}) as response:
        answer = await response.json()
    assert answer["outputs"][0]["data"] == (numbers * 2).ravel().tolist()


async def test_options_come_from_headers_too(session: aiohttp.ClientSession, gateway: FakeGateway) -> None:
    headers = {"x-pimoe-priority": "0.75", "x-pimoe-timeout": "9.5", "x-pimoe-cache": "false"}
    for parameters in ({}, {"priority": 0.125, "timeout": 4, "cache": True}):
        body = msgpack.packb(operation(states(), parameters=parameters))
        async with session.post(INFER, data=body, headers=MSGPACK | headers) as response:
            assert response.status == 200
    assert [request.priority for request in gateway.inferred] == [0.75, 0.125]
    assert 9 < gateway.inferred[0].timeout_s <= 9.5
    assert 3 < gateway.inferred[1].timeout_s <= 4
    assert gateway.use_cache == [False, True]


async def test_infer_many(session: aiohttp.ClientSession, gateway: FakeGateway) -> None:
    good = [operation(states(tokens=tokens), id=str(tokens)) for tokens in (1, 2, 3)]
    bad = operation(np.zeros((1, 3), np.float32))
    body = msgpack.packb({"requests": [good[0], bad, good[1], {"inputs": []}, good[2]]})
    async with session.post(INFER_MANY, data=body, headers=MSGPACK) as response:
        assert response.status == 200
        answers = msgpack.unpackb(await response.read())["responses"]
    for place, tokens in ((0, 1), (2, 2), (4, 3)):
        np.testing.assert_array_equal(unpacked(answers[place]), states(tokens=tokens) * 2)
        assert answers[place]["id"] == str(tokens)
        assert answers[place]["parameters"] == {"cache": "miss"}
    assert answers[1]["error"]["code"] == "invalid_tensor"
    assert answers[1]["error"]["status"] == 400
    assert answers[3]["error"]["code"] == "invalid_request"


async def test_infer_many_in_json(session: aiohttp.ClientSession) -> None:
    tensor = {"name": "hidden_states", "shape": [1, HIDDEN], "datatype": "FP32", "data": [1.0] * HIDDEN}
    async with session.post(INFER_MANY, json={"requests": [{"inputs": [tensor]}]}) as response:
        answers = (await response.json())["responses"]
    assert answers[0]["outputs"][0]["data"] == [2.0] * HIDDEN


async def test_infer_many_runs_at_the_same_time() -> None:
    waiting = 0
    everyone = asyncio.Event()

    class Meeting(FakeGateway):
        async def infer(self, request: Any, use_cache: bool) -> Any:
            nonlocal waiting
            waiting += 1
            if waiting == 5:
                everyone.set()
            await everyone.wait()
            return await super().infer(request, use_cache)

    body = msgpack.packb({"requests": [operation(states())] * 5})
    reply = await ask(Meeting(), "POST", INFER_MANY, body, MSGPACK)
    assert all("outputs" in answer for answer in msgpack.unpackb(reply.body)["responses"])


async def test_infer_many_keeps_the_errors_of_one_to_itself() -> None:
    class Picky(FakeGateway):
        async def infer(self, request: Any, use_cache: bool) -> Any:
            match request.hidden_states.shape[0]:
                case 2:
                    raise RuntimeError("secret")
                case 3:
                    await asyncio.Event().wait()
                case 4:
                    raise asyncio.CancelledError
                case 5:
                    raise OverloadedError("full", retry_after_s=3.0)
            return await super().infer(request, use_cache)

    operations = [operation(states(tokens=tokens)) for tokens in (1, 2, 3, 4, 5)]
    operations[2]["parameters"] = {"timeout": 0.05}
    gateway = Picky(settings=ApiSettings(deadline_grace_s=0.01))
    reply = await ask(gateway, "POST", INFER_MANY, msgpack.packb({"requests": operations}), MSGPACK)
    answers = msgpack.unpackb(reply.body)["responses"]
    assert "outputs" in answers[0]
    codes = [answer["error"]["code"] for answer in answers[1:]]
    assert codes == ["internal_error", "deadline_exceeded", "internal_error", "overloaded"]
    assert answers[4]["error"]["retry_after_s"] == 3.0
    assert b"secret" not in reply.body


def test_a_tritonclient_that_gives_up_cancels_the_work(server: Server, gateway: FakeGateway) -> None:
    gateway.hang = True
    with (
        triton.InferenceServerClient(server[1], network_timeout=0.2) as client,
        pytest.raises(TimeoutError),
    ):
        client.infer("echo", triton_input(states()))
    wait_until(lambda: gateway.cancelled)
