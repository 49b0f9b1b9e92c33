"""A whole model on one machine: parity with transformers, and groups in processes that may die."""

from __future__ import annotations

import asyncio
import functools
import json
import os
import signal
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import FAMILIES, make_checkpoint, reference_model
from engines import Answer, prompt_of, read, request
from pimoe.runtime.errors import CheckpointError, ConfigurationError, InvalidRequestError, UnknownFamilyError
from pimoe.runtime.experts import process as process_module
from pimoe.runtime.experts.process import GroupProcess, GroupProcessConfig
from pimoe.runtime.links import LinkPool
from pimoe.runtime.local import LocalRuntime
from pimoe.runtime.model.decoder import ForwardBatch, Segment
from pimoe.runtime.model.layer_model import write_layer_model
from pimoe.runtime.requests import InferRequest
from pimoe.runtime.router.limits import RouterLimits
from pimoe.runtime.tensors import from_wire, to_wire
from safetensors.torch import load_file, save_file
from torch import Tensor
from waiting import eventually, nothing_left_behind, within_patience  # noqa: F401

pytestmark = pytest.mark.usefixtures("nothing_left_behind")

RAGGED = [prompt_of(length, seed) for seed, length in enumerate([5, 1, 23, 12, 40])]


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {family: make_checkpoint(family, tmp_path_factory.mktemp(family)) for family in FAMILIES}


@functools.cache
def reference(folder: Path) -> tuple[list[Tensor], list[list[int]]]:
    """Of transformers, prompt by prompt: logits `[tokens, vocab]`, and 64 greedy tokens."""
    model = reference_model(folder)
    logits, tokens = [], []
    with torch.inference_mode():
        for prompt in RAGGED:
            ids = torch.tensor([prompt])
            logits.append(model(ids).logits[0])
            out = model.generate(ids, max_new_tokens=64, do_sample=False, attention_mask=torch.ones_like(ids))
            tokens.append(out[0, len(prompt) :].tolist())
    return logits, tokens


async def ragged_logits(runtime: LocalRuntime) -> list[Tensor]:
    """All prompts in one forward through the runtime's own decoder, dispatcher and groups."""
    decoder = runtime.router.decoder
    assert decoder is not None
    cache = decoder.new_cache(4 * len(RAGGED), block_tokens=16)
    segments = tuple(Segment(range(4 * i + 1, 4 * i + 5), 0, len(prompt)) for i, prompt in enumerate(RAGGED))
    token_ids = torch.tensor([token for prompt in RAGGED for token in prompt])
    batch = ForwardBatch(token_ids, segments, torch.arange(len(token_ids)))
    experts = runtime.router.dispatcher.until(asyncio.get_running_loop().time() + 60)
    return list(torch.split(await decoder.forward(batch, cache, experts), [len(prompt) for prompt in RAGGED]))


async def generate_all(runtime: LocalRuntime, max_tokens: int = 64) -> list[list[int]]:
    asked = [request(prompt, max_tokens) for prompt in RAGGED]
    answers = await asyncio.gather(*(read(runtime.router.generate(one)) for one in asked))
    assert [answer.error for answer in answers] == [None] * len(asked)
    return [answer.tokens for answer in answers]


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("family", FAMILIES)
async def test_parity_with_transformers(folders: dict[str, Path], family: str, groups: int) -> None:
    logits, tokens = reference(folders[family])
    async with await LocalRuntime.start(folders[family], groups=groups) as runtime:
        assert [len(group) for group in runtime.router.dispatcher.placement.groups] == {
            1: [6],
            2: [3, 3],
            4: [2, 2, 1, 1],
        }[groups]
        for mine, theirs in zip(await ragged_logits(runtime), logits, strict=True):
            torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=0)
        assert await generate_all(runtime) == tokens


async def test_a_runtime_serves_the_dtype_and_limits_that_are_asked_for(folders: dict[str, Path]) -> None:
    limits = RouterLimits()
    async with await LocalRuntime.start(
        folders["mixtral"], 2, name="m", dtype="bfloat16", limits=limits
    ) as runtime:
        assert runtime.router.model.dtype == "bfloat16"
        assert runtime.router.model.name == "m"
        assert runtime.router.limits is limits
        assert [len(tokens) for tokens in await generate_all(runtime, 4)] == [4] * len(RAGGED)


async def test_a_layer_model_runs_without_a_decoder(tmp_path: Path) -> None:
    shapes = {"gate_proj": (8, 16), "up_proj": (8, 16), "down_proj": (16, 8)}
    experts = [{f"{name}.weight": torch.randn(shape) for name, shape in shapes.items()} for _ in range(4)]
    folder = write_layer_model(tmp_path / "layer", torch.randn(4, 16), experts, 2)
    rows = torch.randn(5, 16)
    outputs = []
    for groups in (1, 3):
        async with await LocalRuntime.start(folder, groups=groups) as runtime:
            outputs.append(from_wire((await runtime.router.infer(InferRequest("r", to_wire(rows)))).output))
            with pytest.raises(InvalidRequestError, match="layer model"):
                runtime.router.generate(request((1,)))
    torch.testing.assert_close(outputs[0], outputs[1])


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"groups": 7}, ConfigurationError, "6 experts cannot be split into 7 groups"),
        ({"groups": 0}, ConfigurationError, "cannot be split into 0 groups"),
        ({"dtype": "int64"}, ConfigurationError, "dtype 'int64' is not one of float32, bfloat16, float16"),
        ({"dtype": "fp8"}, ConfigurationError, "dtype 'fp8'"),
    ],
)
async def test_what_cannot_be_served_is_refused(
    folders: dict[str, Path], options: dict[str, object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        await LocalRuntime.start(folders["olmoe"], **options)  # type: ignore[arg-type]


async def test_folders_that_hold_no_model_are_refused(tmp_path: Path, folders: dict[str, Path]) -> None:
    with pytest.raises(CheckpointError, match="no such folder"):
        await LocalRuntime.start(tmp_path / "nowhere")
    other = make_checkpoint("olmoe", tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "model_type": "llama"}))
    with pytest.raises(UnknownFamilyError, match=r"known: .*mixtral, olmoe, pimoe_layer, qwen2_moe, qwen3_moe"):
        await LocalRuntime.start(other)


# Groups in processes of their own.


@pytest.fixture
def socket_folder(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where sockets go, with a short path; nothing may be left there after the test."""
    with tempfile.TemporaryDirectory() as folder:
        monkeypatch.setenv("PIMOE_SOCKET_FOLDER", folder)
        yield Path(folder)
        assert list(Path(folder).iterdir()) == []


def command_line(pid: int) -> str:
    return Path(f"/proc/{pid}/cmdline").read_text()


def runs(pid: int) -> bool:
    """Whether the process is there, and no zombie."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


async def busy_replica(pool: LinkPool) -> str:
    """A replica that computes just now."""
    await eventually(lambda: pool.statistics().in_flight)
    return next(link.endpoint.replica_id for link in pool.links.values() if link.in_flight)


async def test_killing_a_process_of_a_group_changes_no_token_and_closing_leaves_nothing(
    folders: dict[str, Path], socket_folder: Path
) -> None:
    """Two groups of two processes each; 16 requests run when one is killed."""
    folder = folders["qwen3_moe"]
    sampling = [{}, {"temperature": 1.0, "seed": 3}]
    asked = [request(prompt_of(4 + n, n), 48, **sampling[n % 2]) for n in range(16)]
    async with await LocalRuntime.start(folder, groups=2) as runtime:
        expected = await asyncio.gather(*(read(runtime.router.generate(one)) for one in asked))

    runtime = await LocalRuntime.start(folder, groups=2, isolation="processes", replicas=2)
    pids = [process.process.pid for group in runtime.processes for process in group]
    try:
        assert len(set(pids)) == 4
        assert all(map(runs, pids))
        await asyncio.gather(*(pool.wait_ready(60) for pool in runtime.pools))
        for mine, theirs in zip(await ragged_logits(runtime), reference(folder)[0], strict=True):
            torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=0)
        answers = [Answer() for _ in asked]
        reading = [
            asyncio.ensure_future(read(runtime.router.generate(one), answer))
            for one, answer in zip(asked, answers, strict=True)
        ]
        await eventually(lambda: all(answer.tokens for answer in answers))
        at_work = await busy_replica(runtime.pools[0])
        (victim,) = [p for p in runtime.processes[0] if p.endpoint.replica_id == at_work]
        victim.process.send_signal(signal.SIGKILL)
        assert not any(answer.reason for answer in answers), "all 16 run"
        await within_patience(asyncio.gather(*reading))
        await eventually(lambda: not victim.alive)
        assert [answer.error for answer in answers] == [None] * 16
        assert [answer.tokens for answer in answers] == [answer.tokens for answer in expected]
        assert sum(map(runs, pids)) == 3
    finally:
        await within_patience(runtime.close())
    assert not any(map(runs, pids))
    survivors = [p.process for group in runtime.processes for p in group if p is not victim]
    assert [process.returncode for process in survivors] == [0, 0, 0], "they ended by themselves"


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Ids of the processes that were started."""
    pids: list[int] = []
    create = asyncio.create_subprocess_exec

    async def record(*args: str, **kwargs: Any) -> asyncio.subprocess.Process:
        process = await create(*args, **kwargs)
        pids.append(process.pid)
        return process

    monkeypatch.setattr(process_module.asyncio, "create_subprocess_exec", record)
    return pids


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Makes shell commands run in place of Python."""
    script = tmp_path / "python"
    monkeypatch.setattr(process_module.sys, "executable", str(script))

    def write(commands: str) -> None:
        script.write_text(f"#!/bin/sh\n{commands}\n")
        script.chmod(0o700)

    return write


NOWHERE = GroupProcessConfig("group-0", "/nowhere", (0, 1), "float32", "secret")


@pytest.mark.parametrize(
    ("commands", "error"),
    [
        ("exit 3", RuntimeError),
        ("echo this is no JSON; exec sleep 1000", ValueError),
        (
            'echo \'{"error": {"code": "invalid_checkpoint", "message": "torn"}}\'; exec sleep 1000',
            CheckpointError,
        ),
    ],
    ids=["ends", "talks nonsense", "gives up"],
)
async def test_a_process_that_does_not_become_ready_is_gone(
    program: Callable[[str], None], started: list[int], socket_folder: Path, commands: str, error: type[Exception]
) -> None:
    program(commands)
    with pytest.raises(error):
        await GroupProcess.start(NOWHERE)
    assert not runs(started[0])


async def test_a_process_that_never_becomes_ready_is_gone_after_the_time_given(
    program: Callable[[str], None], started: list[int], socket_folder: Path
) -> None:
    program("exec sleep 1000")
    with pytest.raises(TimeoutError):
        await GroupProcess.start(NOWHERE, timeout_s=0.3)
    assert not runs(started[0])


async def test_a_cancelled_start_leaves_no_process(
    program: Callable[[str], None], started: list[int], socket_folder: Path
) -> None:
    program("exec sleep 1000")
    starting = asyncio.ensure_future(GroupProcess.start(NOWHERE))
    await eventually(lambda: started)
    starting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await starting
    assert not runs(started[0])


async def test_a_process_that_ignores_the_end_of_its_input_is_killed(
    program: Callable[[str], None], started: list[int], socket_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program("echo '{\"pid\": 1}'; exec sleep 1000")
    monkeypatch.setattr(process_module, "_CLOSE_TIMEOUT_S", 0.01)
    group = await GroupProcess.start(NOWHERE)
    assert group.alive
    assert runs(started[0])
    await within_patience(group.close())
    assert not group.alive
    assert not runs(started[0])
    await within_patience(group.close())  # once more does no harm


async def test_when_one_group_cannot_start_the_others_are_stopped(
    tmp_path: Path, started: list[int], socket_folder: Path
) -> None:
    """Experts 3 to 5 lack a tensor: the process of the first three must not stay."""
    folder = make_checkpoint("mixtral", tmp_path / "torn", num_hidden_layers=1)
    tensors = load_file(folder / "model.safetensors")
    missing = next(name for name in tensors if ".experts.4." in name)
    save_file({name: tensor for name, tensor in tensors.items() if name != missing}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=f"no tensor '{missing}'"):
        await LocalRuntime.start(folder, groups=2, isolation="processes")
    assert len(started) == 2
    assert not any(map(runs, started))


async def test_the_secret_is_in_no_command_line_and_the_process_in_a_session_of_its_own(
    program: Callable[[str], None], started: list[int], socket_folder: Path
) -> None:
    program("echo '{\"pid\": 1}'; exec sleep 1000")
    group = await GroupProcess.start(NOWHERE)
    assert "secret" not in command_line(group.process.pid)
    assert os.getsid(group.process.pid) != os.getsid(0), "Ctrl-C is not meant for it"
    group.process.kill()
    await within_patience(group.close())
