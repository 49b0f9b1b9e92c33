"""The `pimoe` command as people run it: a process of its own, that leaves nothing behind."""

from __future__ import annotations

import contextlib
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import openai
import pytest
import tritonclient.http as triton
import yaml
from checkpoints import make_checkpoint
from pimoe.deployments.cluster import free_port
from pimoe.runtime.embedded import CHECKPOINT, SKILLS

PIMOE = [sys.executable, "-m", "pimoe.deployments.command"]
MARK = "PIMOE_TEST_MARK"


def _set_signals(ignored: signal.Signals | None) -> None:
    """As in a terminal, whatever the tests themselves were started by, nohup for one; but for `ignored`."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN if number == ignored else signal.SIG_DFL)


class Command:
    """A running `pimoe` command whose descendants can be told from all other processes by a mark."""

    def __init__(self, *arguments: str, ignored: signal.Signals | None = None) -> None:
        self.mark = uuid.uuid4().hex
        self.output = ""
        self.process = subprocess.Popen(
            [*PIMOE, *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env={**os.environ, MARK: self.mark, "COLUMNS": "150"},
            start_new_session=True,
            preexec_fn=partial(_set_signals, ignored),
        )

    def wait_for(self, text: str, timeout_s: float = 120) -> None:
        """Read output until `text` is in it."""
        assert self.process.stdout is not None
        until = time.monotonic() + timeout_s
        while text not in self.output:
            readable, _, _ = select.select([self.process.stdout], [], [], max(0, until - time.monotonic()))
            assert readable, f"no {text!r} in {self.output}"
            piece = os.read(self.process.stdout.fileno(), 65536).decode(errors="replace")
            assert piece, f"ended without {text!r}: {self.output}"
            self.output += piece

    def finish(self, timeout_s: float = 90) -> int:
        """Wait for the end; its exit code."""
        rest, _ = self.process.communicate(timeout=timeout_s)
        self.output += rest.decode(errors="replace")
        return self.process.returncode

    def left_behind(self) -> list[str]:
        """Command lines of processes of this command that still run."""
        found = []
        for entry in os.listdir("/proc"):
            with contextlib.suppress(OSError):
                if entry.isdigit() and self.mark.encode() in Path(f"/proc/{entry}/environ").read_bytes():
                    found.append(Path(f"/proc/{entry}/cmdline").read_text().replace("\0", " "))
        return found


@contextlib.contextmanager
def running(*arguments: str, ignored: signal.Signals | None = None) -> Iterator[Command]:
    command = Command(*arguments, ignored=ignored)
    try:
        yield command
    finally:
        if command.process.poll() is None:
            command.process.send_signal(signal.SIGINT)
            command.finish()


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "COLUMNS": "150"}
    return subprocess.run([*PIMOE, *arguments], capture_output=True, text=True, timeout=120, env=environment)


def assert_free(port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind(("127.0.0.1", port))


def test_demo_shows_everything_and_leaves_nothing() -> None:
    port = free_port()
    with running("demo", "--port", str(port)) as command:
        assert command.finish(180) == 0, command.output
    for text in ("gateway", "router", "group-0", "group-1", "4 5 6 7", *SKILLS, "first token", "[16, 128]", "hit"):
        assert text in command.output, text
    assert "wrong" not in command.output
    assert command.left_behind() == []
    assert_free(port)


@pytest.mark.parametrize("moment", ["starting Ray ...", "expert groups ...", "A prompt of every skill"])
def test_ctrl_c_at_any_moment_leaves_nothing(moment: str) -> None:
    port = free_port()
    with running("demo", "--port", str(port)) as command:
        command.wait_for(moment)
        command.process.send_signal(signal.SIGINT)
        command.process.send_signal(signal.SIGINT)  # people press it twice
        assert command.finish() == 130, command.output
    assert "Traceback" not in command.output
    assert command.left_behind() == []
    assert_free(port)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_stops_where_a_shell_had_interrupts_ignored(number: signal.Signals) -> None:
    """As in a script's background job, or when the terminal closes."""
    port = free_port()
    with running("serve", "--port", str(port), ignored=signal.SIGINT) as command:
        command.wait_for("starting Ray ...")
        command.process.send_signal(number)
        assert command.finish(40) == 130, command.output
    assert command.left_behind() == []
    assert_free(port)


def test_serve_a_checkpoint_of_transformers(tmp_path: Path) -> None:
    """No tokenizer: prompts are token ids. Stopped by SIGTERM, as a service manager does."""
    folder = make_checkpoint("mixtral", tmp_path / "tiny-mixtral")
    port = free_port()
    with running("serve", str(folder), "--port", str(port), "--groups", "2") as command:
        command.wait_for("is served at")
        sdk = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none")
        answer = sdk.completions.create(
            model="tiny-mixtral",
            prompt=[1, 2, 3],
            max_tokens=5,
            temperature=0,
            extra_body={"return_token_ids": True, "ignore_eos": True},
        )
        assert answer.usage is not None
        assert answer.usage.completion_tokens == 5
        tokens = answer.choices[0].model_dump()["token_ids"]
        assert tokens == _transformers_tokens(folder, [1, 2, 3], 5)
        with triton.InferenceServerClient(f"127.0.0.1:{port}") as client:
            metadata = client.get_model_metadata("tiny-mixtral")
            hidden = np.ones((2, metadata["inputs"][0]["shape"][1]), np.float32)
            states = triton.InferInput("hidden_states", list(hidden.shape), "FP32")
            states.set_data_from_numpy(hidden)
            assert client.infer("tiny-mixtral", [states]).as_numpy("output").shape == hidden.shape
        command.process.send_signal(signal.SIGTERM)
        command.finish()
    assert command.left_behind() == []
    assert_free(port)


def _transformers_tokens(folder: Path, prompt: list[int], count: int) -> list[int]:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder)
    tokens = list(prompt)
    with torch.inference_mode():
        for _ in range(count):
            tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
    return tokens[len(prompt) :]


def test_plan_says_what_would_run_where() -> None:
    result = run("plan", "--groups", "4")
    assert result.returncode == 0, result.stderr
    for text in ("gateway", "router", "group-3", "6 to 7", "1.5 MiB", "KV cache"):
        assert text in result.stdout, text


def test_build_prints_a_config_that_serve_accepts() -> None:
    from ray.serve.schema import ServeDeploySchema

    result = run("build", str(CHECKPOINT), "--groups", "2")
    assert result.returncode == 0, result.stderr
    config = ServeDeploySchema.model_validate(yaml.safe_load(result.stdout))
    (application,) = config.applications
    assert application.import_path == "pimoe.deployments.app:build"
    assert [d.name for d in application.deployments] == ["gateway", "router", "group-0", "group-1"]


def test_evaluate_in_process() -> None:
    result = run("evaluate", "--samples", "10")
    assert result.returncode == 0, result.stderr
    for skill in SKILLS:
        assert skill in result.stdout


def _copy_embedded(folder: Path) -> Path:
    shutil.copytree(CHECKPOINT, folder)
    return folder


def _break_family(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "llama"}))


def _truncate(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])


def _break_config(folder: Path) -> None:
    (folder / "config.json").write_text("{")


@pytest.mark.parametrize(
    ("spoil", "code", "words"),
    [
        (_break_family, "unknown_model_family", ["llama", "mixtral", "qwen3_moe"]),
        (_truncate, "invalid_checkpoint", ["model.safetensors"]),
        (_break_config, "invalid_checkpoint", ["config.json"]),
        (shutil.rmtree, "invalid_checkpoint", ["checkpoint"]),
    ],
)
def test_a_bad_checkpoint_is_named(tmp_path: Path, spoil: object, code: str, words: list[str]) -> None:
    folder = _copy_embedded(tmp_path / "checkpoint")
    spoil(folder)  # type: ignore[operator]
    result = run("serve", str(folder), "--port", str(free_port()))
    assert result.returncode == 1
    assert code in result.stderr
    assert "Traceback" not in result.stderr
    for word in words:
        assert word in result.stderr


def test_a_port_in_use_is_named() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        result = run("serve", "--port", str(port))
    assert result.returncode == 1
    assert f"127.0.0.1:{port}" in result.stderr
    assert "Traceback" not in result.stderr


def test_too_few_resources_are_named(tmp_path: Path) -> None:
    config = tmp_path / "app.yaml"
    config.write_text("group_defaults: {num_gpus: 8, num_cpus: 1000}\n")
    command = Command("serve", "--config", str(config), "--port", str(free_port()))
    assert command.finish() == 1
    assert "insufficient_resources" in command.output
    assert "16 GPU needed" in command.output
    assert command.left_behind() == []


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("gruops: 3", ["gruops"]),
        ("router: {batching: {max_batch_tokens: 0}}", ["max_batch_tokens"]),
        ("groups: 9", ["9 groups"]),
        ("groups: [{experts: [0, 1]}, {experts: [1, 2]}]", ["exactly one group"]),
        ("applications: []", ["serve deploy"]),
        ("[", ["app.yaml"]),
        ("dtype: float7", ["float7", "bfloat16"]),
    ],
)
def test_a_bad_setting_is_named(tmp_path: Path, text: str, words: list[str]) -> None:
    config = tmp_path / "app.yaml"
    config.write_text(text)
    result = run("serve", "--config", str(config), "--port", str(free_port()))
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    for word in words:
        assert word in result.stderr


def test_a_broken_tokenizer_is_named(tmp_path: Path) -> None:
    folder = _copy_embedded(tmp_path / "checkpoint")
    (folder / "tokenizer.json").write_text('{"x": 1}')
    result = run("build", str(folder))
    assert result.returncode == 1
    assert "invalid_checkpoint" in result.stderr
    assert "tokenizer.json" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("serve", "--host", "::1"), ["IPv4"]),
        (("generate", "hello", "--url", "foo"), ["foo", "http://127.0.0.1:8000"]),
        (("serve", "--groups", "0"), ["--groups"]),
        (("nonsense",), ["nonsense"]),
    ],
)
def test_wrong_usage_is_named(arguments: tuple[str, ...], words: list[str]) -> None:
    result = run(*arguments)
    assert result.returncode in (1, 2)
    assert "Traceback" not in result.stderr
    for word in words:
        assert word in result.stderr


def test_nobody_at_the_other_end_is_said_plainly() -> None:
    result = run("status", "--url", f"http://127.0.0.1:{free_port()}")
    assert result.returncode == 1
    assert "pimoe serve" in result.stderr
    assert "Traceback" not in result.stderr
