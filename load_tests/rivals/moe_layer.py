"""What every rival serves: the MoE layer of a checkpoint, in plain torch, and what they are told.

Imports nothing of pimoe: the rivals run in an environment of their own.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional

MAX_BATCH_REQUESTS = 64
MAX_WAIT_S = 0.002


class MoeLayer:
    """Softmax gate, the top k renormalised, gated experts: those of a layer checkpoint of pimoe, see
    `runtime/model/layer_model.py`."""

    def __init__(self, folder: Path | str) -> None:
        config = json.loads((Path(folder) / "config.json").read_text())
        tensors = load_file(Path(folder) / "model.safetensors")
        experts: int = config["num_experts"]
        self.hidden: int = config["hidden_size"]
        self._top_k: int = config["num_experts_per_tok"]
        self._renormalize: bool = config["norm_topk_prob"]
        self._gate = tensors["gate.weight"]
        # One multiplication for gate and up.
        self._gate_up = [
            torch.cat([tensors[f"experts.{i}.{name}_proj.weight"] for name in ("gate", "up")])
            for i in range(experts)
        ]
        self._down = [tensors[f"experts.{i}.down_proj.weight"] for i in range(experts)]

    @torch.inference_mode()
    def __call__(self, hidden: Tensor) -> Tensor:
        """`[tokens, hidden]` to the same shape. Rows are sorted by expert, and only experts with rows compute."""
        weights, chosen = functional.softmax(hidden @ self._gate.T, dim=-1).topk(self._top_k)
        if self._renormalize:
            weights = weights / weights.sum(-1, keepdim=True)
        order = chosen.flatten().argsort()
        tokens = order // self._top_k
        rows = hidden[tokens]
        counts = torch.bincount(chosen.flatten(), minlength=len(self._down)).tolist()
        pieces = []
        for expert, piece in enumerate(rows.split(counts)):
            if len(piece):
                gate, up = functional.linear(piece, self._gate_up[expert]).chunk(2, dim=-1)
                pieces.append(functional.linear(functional.silu(gate) * up, self._down[expert]))
        weighted = torch.cat(pieces) * weights.flatten()[order, None]
        return torch.zeros_like(hidden).index_add_(0, tokens, weighted)

    def many(self, bodies: Sequence[bytes]) -> list[bytes]:
        """One forward for many requests, each the bytes of `[tokens, hidden]` in float32."""
        answer = self.array(np.frombuffer(b"".join(bodies), np.float32))
        lengths = np.cumsum([len(body) // 4 for body in bodies])
        return [part.tobytes() for part in np.split(answer, lengths[:-1])]

    def array(self, values: NDArray[np.float32]) -> NDArray[np.float32]:
        """A whole number of tokens, flat; and so is the answer."""
        rows = torch.from_numpy(values.reshape(-1, self.hidden).copy())
        answer: NDArray[np.float32] = self(rows).numpy()
        return answer.reshape(-1)


@dataclass(frozen=True)
class Options:
    """What a server is told: `workers` compute, each in `threads` of torch."""

    model: Path
    port: int
    workers: int
    threads: int

    def layer(self) -> MoeLayer:
        """The model, in the process that is to compute."""
        torch.set_num_threads(self.threads)
        return MoeLayer(self.model)


def options() -> Options:
    """In environment variables, since most of the servers start processes of their own."""
    port, workers, threads = (int(os.environ[f"MOE_LAYER_{name}"]) for name in ("PORT", "WORKERS", "THREADS"))
    return Options(Path(os.environ["MOE_LAYER_MODEL"]), port, workers, threads)
