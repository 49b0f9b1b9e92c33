"""The served application, whole: Ray Serve, HAProxy, gateway, router, groups, and the clients people have."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
import torch
import tritonclient.http as triton
from pimoe.clients import AsyncClient, Client, InvalidRequestError, InvalidTensorError
from pimoe.deployments.app import build
from pimoe.deployments.cli import in_process_answer
from pimoe.deployments.cluster import LocalCluster
from pimoe.runtime.embedded import CHECKPOINT, SKILLS, held_out, is_exact
from pimoe.runtime.embedded.evaluate import evaluate
from pimoe.runtime.local import LocalRuntime
from pimoe.runtime.model.layer_model import write_layer_model
from pimoe.runtime.model.tokenizer import Tokenizer
from prometheus_client.parser import text_string_to_metric_families
from ray import serve

PROMPT = "reverse: planet\n"


@pytest.fixture
def client(application: LocalCluster) -> Any:
    with Client(application.url) as client:
        yield client


def test_every_skill_is_answered(client: Client) -> None:
    for skill in SKILLS:
        examples = held_out(skill, 5, seed=3)
        right = [is_exact(e, client.generate(e.prompt, max_tokens=64, temperature=0).text) for e in examples]
        assert sum(right) >= 4, skill


def test_status_says_what_runs_where(client: Client) -> None:
    status = client.status()
    assert [group["name"] for group in status["groups"]] == ["group-0", "group-1"]
    assert [len(group["replicas"]) for group in status["groups"]] == [2, 1]
    assert sorted(e for group in status["groups"] for e in group["experts"]) == list(range(8))
    replicas = [r for part in (*status["groups"], {"replicas": status["routers"]}) for r in part["replicas"]]
    assert len({replica["pid"] for replica in replicas}) == 4
    for replica in replicas:
        assert {"id", "pid", "node", "address", "weights_bytes", "state"} <= set(replica)
    assert status["queue"]["items"] == 0
    assert status["cache"]["max_bytes"] > 0
    assert len(status["gateways"]) == 1


@pytest.mark.parametrize("stream", [False, True])
def test_a_repeated_request_comes_from_the_cache_byte_for_byte(application: LocalCluster, stream: bool) -> None:
    body = {"model": "pimoe-embedded", "prompt": "sort: stratum\n", "max_tokens": 32, "temperature": 0}
    answers = []
    for _ in range(2):
        request = urllib.request.Request(
            f"{application.url}/v1/completions", json.dumps({**body, "stream": stream, "logprobs": 2}).encode()
        )
        request.add_header("content-type", "application/json")
        with urllib.request.urlopen(request) as response:
            answers.append((response.headers["x-pimoe-cache"], response.read()))
    # The stream finds what the whole answer stored, or the other way round: the format is not part of the key.
    assert answers[1][0] == "hit"
    assert answers[0][1] == answers[1][1]


def test_tensors_pass_the_experts_of_every_layer(client: Client) -> None:
    hidden = np.random.default_rng(1).standard_normal((5, 128), dtype=np.float32)
    outputs = [client.infer(hidden, layer=layer) for layer in range(4)]
    assert all(output.shape == (5, 128) and output.dtype == np.float32 for output in outputs)
    assert not np.allclose(outputs[0], outputs[1])
    rows = [client.infer(hidden[i : i + 1], layer=0)[0] for i in range(5)]
    np.testing.assert_allclose(np.stack(rows), outputs[0], atol=1e-5)


@pytest.mark.parametrize("path", ["/health", "/v1/models", "/v2/health/ready", "/nowhere"])
def test_every_answer_has_one_request_id(application: LocalCluster, path: str) -> None:
    request = urllib.request.Request(application.url + path, headers={"x-request-id": "mine-1"})
    try:
        with urllib.request.urlopen(request) as response:
            headers = response.headers
    except urllib.error.HTTPError as error:
        headers = error.headers
    assert headers.get_all("x-request-id") == ["mine-1"]


def test_overflow_is_an_error_and_no_answer(client: Client) -> None:
    with pytest.raises(InvalidTensorError, match="range"):
        client.infer(np.full((1, 128), 1e300))
    with pytest.raises(InvalidTensorError, match="overflow"):
        client.infer(np.full((1, 128), 3e38, np.float32))


def test_openai_sdk(application: LocalCluster) -> None:
    sdk = openai.OpenAI(base_url=f"{application.url}/v1", api_key="none")
    assert [model.id for model in sdk.models.list()] == ["pimoe-embedded"]
    whole = sdk.completions.create(model="pimoe-embedded", prompt=PROMPT, max_tokens=32, temperature=0)
    assert whole.choices[0].text == "tenalp"
    assert whole.choices[0].finish_reason == "stop"
    assert whole.usage is not None
    assert whole.usage.prompt_tokens == len(PROMPT)
    stream = sdk.chat.completions.create(
        model="pimoe-embedded",
        messages=[{"role": "user", "content": "reverse: planet"}],
        max_tokens=32,
        temperature=0,
        stream=True,
        extra_body={"priority": 1.0, "cache": False},
    )
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices) == "tenalp"
    with pytest.raises(openai.NotFoundError):
        sdk.completions.create(model="another", prompt=PROMPT)


@pytest.mark.parametrize("binary", [True, False])
def test_tritonclient(application: LocalCluster, client: Client, binary: bool) -> None:
    hidden = np.random.default_rng(2).standard_normal((3, 128), dtype=np.float32)
    with triton.InferenceServerClient(application.url.removeprefix("http://")) as sdk:
        assert sdk.is_server_live()
        assert sdk.is_server_ready()
        assert sdk.is_model_ready("pimoe-embedded")
        states = triton.InferInput("hidden_states", list(hidden.shape), "FP32")
        states.set_data_from_numpy(hidden, binary_data=binary)
        wanted = triton.InferRequestedOutput("output", binary_data=binary)
        output = sdk.infer("pimoe-embedded", [states], outputs=[wanted]).as_numpy("output")
    np.testing.assert_allclose(output, client.infer(hidden), rtol=1e-6)


def test_metrics_are_prometheus_text(application: LocalCluster, client: Client) -> None:
    client.generate(PROMPT, max_tokens=8, temperature=0, cache=False)
    with urllib.request.urlopen(f"{application.url}/metrics") as response:
        families = {f.name: f for f in text_string_to_metric_families(response.read().decode())}
    assert sum(sample.value for sample in families["pimoe_dispatch_rows"].samples) > 0
    assert not families["pimoe_expert_tokens"].samples  # only where it was asked for
    waits = [s for s in families["pimoe_queue_wait_seconds"].samples if s.name.endswith("_count")]
    assert {s.labels["class"] for s in waits} == {"batch", "low", "default", "high", "interactive"}
    assert sum(s.value for s in waits if s.labels["queue"] == "generation") > 0
    bypassed = families["pimoe_cache_requests"].samples
    assert sum(s.value for s in bypassed if s.labels["outcome"] == "bypass") > 0
    names = {family for family in families if family.startswith("pimoe_")}
    assert {"pimoe_batch_tokens", "pimoe_latency_model_error_ratio", "pimoe_queue_shed"} <= names
    forbidden = {"request", "tenant", "token", "prompt"}
    assert not forbidden & {label for f in families.values() for s in f.samples for label in s.labels}
    assert {s.labels["group"] for s in families["pimoe_group_rows"].samples} == {"group-0", "group-1"}
    assert any(s.value > 0 for s in families["pimoe_requests"].samples)


def test_a_second_application_with_experts_of_the_users_own(application: LocalCluster, tmp_path: Path) -> None:
    """A layer model whose experts are modules by import path, in two groups, under a prefix of its own."""
    torch.manual_seed(0)
    modules = [torch.nn.Linear(16, 16) for _ in range(4)]
    gate = torch.randn(4, 16)
    options = {"expert_class": "torch.nn:Linear", "expert_kwargs": {"in_features": 16, "out_features": 16}}
    folder = write_layer_model(tmp_path / "my-layer", gate, modules, top_k=2, **options)
    share = {"num_cpus": 0.1}
    settings = {"model": str(folder), "group_defaults": share, "router": share, "gateway": share}
    serve.run(build({**settings, "links": {"transport": "unix"}}), name="layer", route_prefix="/layer")
    hidden = torch.randn(7, 16)
    try:
        with Client(f"{application.url}/layer") as client:
            _wait_ready(client)
            output = client.infer(hidden.numpy())
            with pytest.raises(InvalidRequestError, match="one layer"):
                client.generate([1, 2, 3])
    finally:
        serve.delete("layer")
    np.testing.assert_allclose(output, _layer_reference(hidden, gate, modules), atol=1e-5)


def _wait_ready(client: Client) -> None:
    until = time.monotonic() + 30
    while not client.health().ready:
        assert time.monotonic() < until, "not ready"
        time.sleep(0.05)


def _layer_reference(hidden: torch.Tensor, gate: torch.Tensor, modules: list[torch.nn.Linear]) -> Any:
    weights, chosen = torch.softmax(hidden @ gate.T, dim=-1).topk(2)
    weights = weights / weights.sum(dim=-1, keepdim=True)
    with torch.inference_mode():
        everything = torch.stack([module(hidden) for module in modules], dim=1)
        picked = everything.gather(1, chosen[:, :, None].expand(-1, -1, 16))
        return (picked * weights[:, :, None]).sum(dim=1).numpy()


async def test_accuracy_is_the_same_served_and_in_process(application: LocalCluster) -> None:
    tokenizer = Tokenizer.load(CHECKPOINT)
    async with AsyncClient(application.url) as client, await LocalRuntime.start(CHECKPOINT, 2) as runtime:

        async def served(prompt: str) -> str:
            return (await client.generate(prompt, max_tokens=64, temperature=0, cache=False)).text

        assert await evaluate(served, 20) == await evaluate(in_process_answer(runtime, tokenizer), 20)


async def _ask_all(url: str, prompts: list[str]) -> list[tuple[int, ...]]:
    async with AsyncClient(url) as client:
        answers = await asyncio.gather(
            *(client.generate(p, max_tokens=48, temperature=0, ignore_eos=True, cache=False) for p in prompts)
        )
    return [tuple(answer.token_ids) for answer in answers]


async def _ask_while_killing(url: str, prompts: list[str], pid: int) -> list[tuple[int, ...]]:
    """Ask all at once, and kill `pid` as soon as the first token of any is there."""
    async with AsyncClient(url) as client:

        async def ask(prompt: str) -> tuple[int, ...]:
            tokens: list[int] = []
            options: Any = {"max_tokens": 48, "temperature": 0, "ignore_eos": True, "cache": False}
            async for chunk in client.stream(prompt, **options):
                tokens += chunk.token_ids
                if not killed:
                    killed.append(pid)
                    os.kill(pid, signal.SIGKILL)
            return tuple(tokens)

        killed: list[int] = []
        return await asyncio.gather(*map(ask, prompts))


@pytest.mark.parametrize("group", [0, 1], ids=["one of two replicas", "the only replica"])
async def test_requests_survive_the_death_of_a_replica(application: LocalCluster, group: int) -> None:
    prompts = [f"spell: {number}\n" for number in range(4200, 4216)]
    calm = await _ask_all(application.url, prompts)
    async with AsyncClient(application.url) as client:
        before = (await client.status())["groups"][group]["replicas"]
    survived = await _ask_while_killing(application.url, prompts, before[0]["pid"])
    assert survived == calm
    await _wait_replaced(application.url, group, len(before), before[0]["pid"])


async def _wait_replaced(url: str, group: int, replicas: int, killed: int) -> None:
    async with AsyncClient(url) as client, asyncio.timeout(60):
        while True:
            pids = [replica["pid"] for replica in (await client.status())["groups"][group]["replicas"]]
            if len(pids) == replicas and killed not in pids:
                return
            await asyncio.sleep(0.2)


async def test_requests_survive_the_death_of_the_router(application: LocalCluster) -> None:
    prompts = [f"spell: {number}\n" for number in range(700, 704)]
    calm = await _ask_all(application.url, prompts)
    async with AsyncClient(application.url) as client:
        (router,) = (await client.status())["routers"]
    assert await _ask_while_killing(application.url, prompts, router["pid"]) == calm


def test_user_config_changes_limits_without_a_restart(application: LocalCluster, client: Client) -> None:
    """Through Serve's own interface for live settings, as a redeployed config does."""
    before = client.status()
    handle = serve.get_deployment_handle("gateway", "pimoe")
    handle.broadcast("reconfigure", {"cache": {"max_bytes": 1_000_000}}).results(timeout_s=10)
    after = client.status()
    assert after["cache"]["max_bytes"] == 1_000_000
    assert after["gateways"][0]["pid"] == before["gateways"][0]["pid"]
