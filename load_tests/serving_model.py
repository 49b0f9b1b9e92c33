"""The layer that is served, its right answers, and how fast plain torch computes it here."""

from __future__ import annotations

import importlib.util
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pimoe.runtime.model.layer_model import write_layer_model
from report import cores
from serving_contenders import HERE, HIDDEN, TOKENS

EXPERTS, TOP_K, INNER = 8, 2, 1024


class WrongAnswerError(Exception):
    """A server computes something else than the layer."""


def write_model(folder: Path) -> Path:
    """The layer, in pimoe's format, with random weights that are the same every time."""
    torch.manual_seed(0)
    shapes = {"gate_proj": (INNER, HIDDEN), "up_proj": (INNER, HIDDEN), "down_proj": (HIDDEN, INNER)}
    experts = [
        {f"{name}.weight": torch.randn(shape) / shape[1] ** 0.5 for name, shape in shapes.items()}
        for _ in range(EXPERTS)
    ]
    return write_layer_model(folder, gate=torch.randn(EXPERTS, HIDDEN), experts=experts, top_k=TOP_K)


class Sample:
    """Requests, what they must be answered with, and the forward that says so: the rivals' own."""

    def __init__(self, model: Path, requests: int) -> None:
        self._layer = _rivals_layer(model)
        hidden = torch.randn(requests, TOKENS, HIDDEN, generator=torch.Generator().manual_seed(1))
        self.bodies = [one.numpy().tobytes() for one in hidden]
        self.answers = self._layer(hidden.flatten(0, 1)).reshape(hidden.shape).numpy()

    def check(self, index: int, answer: bytes) -> None:
        """Raises: WrongAnswerError: far from what torch gives, or not even as long."""
        wanted = self.answers[index % len(self.bodies)]
        if len(answer) != wanted.nbytes:
            raise WrongAnswerError(f"{len(answer)} bytes instead of {wanted.nbytes}")
        found = np.frombuffer(answer, np.float32).reshape(wanted.shape)
        if not np.allclose(found, wanted, rtol=1e-4, atol=1e-4):
            raise WrongAnswerError(f"off by up to {np.abs(found - wanted).max():.2g}")

    def tokens_per_s(self, tokens: int, times: int) -> float:
        """The plain forward with all cores: the fastest of so many, since it is to be a ceiling, and two threads
        that wait for each other take many times as long when anything else runs."""
        hidden = torch.randn(tokens, HIDDEN, generator=torch.Generator().manual_seed(2))
        before = torch.get_num_threads()
        torch.set_num_threads(cores())
        took = []
        for _ in range(times + 2):
            started = time.perf_counter()
            self._layer(hidden)
            took.append(time.perf_counter() - started)
        torch.set_num_threads(before)
        return tokens / min(took[2:])


def _rivals_layer(model: Path) -> Any:
    """By its file: the folder of the rivals holds names that would hide others."""
    spec = importlib.util.spec_from_file_location("moe_layer", HERE / "rivals" / "moe_layer.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module.MoeLayer(model)
