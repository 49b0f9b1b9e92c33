"""llama.cpp as a process that answers bursts: run by the Python of llama-cpp-python's environment.

    PYTHON load_tests/generation_llama.py FOLDER BF16|Q8_0 THREADS SEQUENCES CONTEXT_TOKENS

It writes the checkpoint in FOLDER as GGUF into a folder of its own, loads it and says `{"ready": ...}`; then for
every line `{"prompts": [[ids]], "max_tokens": n}` on standard input one line `{"at": [...], "steps": [[ids]]}`:
the tokens of each step, one for each sequence, and when they came, in seconds from the beginning. It ends with
standard input.

The low-level interface, since the high-level one runs one sequence at a time: all prompts in one batch, then one
token of each sequence in each batch, greedily.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

import llama_cpp
import numpy as np
from generation_gguf import write_gguf

_UBATCH_TOKENS = 512


class Llama:
    """A model and a context for up to `sequences` sequences of `context_tokens`."""

    def __init__(self, path: Path, threads: int, sequences: int, context_tokens: int) -> None:
        model = llama_cpp.llama_model_default_params()
        model.n_gpu_layers = 0
        self._model = llama_cpp.llama_model_load_from_file(str(path).encode(), model)
        if not self._model:
            raise RuntimeError("llama.cpp could not load the model")
        tokens = sequences * context_tokens
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = params.n_batch = tokens
        params.n_ubatch = _UBATCH_TOKENS
        params.n_seq_max = sequences
        params.n_threads = params.n_threads_batch = threads
        self._context = llama_cpp.llama_init_from_model(self._model, params)
        if not self._context:
            raise RuntimeError("llama.cpp could not make a context")
        self._batch = llama_cpp.llama_batch_init(tokens, 0, 1)
        self._vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))

    def generate(self, prompts: Sequence[Sequence[int]], max_tokens: int) -> tuple[list[float], list[list[int]]]:
        """Seconds from the beginning to each step's tokens, and those."""
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self._context), True)
        started = time.monotonic()
        tokens = self._decode(prompts, [0] * len(prompts))
        at, steps = [time.monotonic() - started], [tokens]
        for step in range(max_tokens - 1):
            tokens = self._decode([[token] for token in tokens], [len(prompt) + step for prompt in prompts])
            at.append(time.monotonic() - started)
            steps.append(tokens)
        return at, steps

    def _decode(self, pieces: Sequence[Sequence[int]], starts: Sequence[int]) -> list[int]:
        """The likeliest token after each sequence's next piece, which begins at its position in `starts`."""
        batch, index = self._batch, 0
        for sequence, (piece, start) in enumerate(zip(pieces, starts, strict=True)):
            for offset, token in enumerate(piece):
                batch.token[index] = token
                batch.pos[index] = start + offset
                batch.n_seq_id[index] = 1
                batch.seq_id[index][0] = sequence
                batch.logits[index] = offset == len(piece) - 1
                index += 1
        batch.n_tokens = index
        if code := llama_cpp.llama_decode(self._context, batch):
            raise RuntimeError(f"llama_decode returned {code}")
        logits = ctypes.cast(llama_cpp.llama_get_logits(self._context), ctypes.POINTER(ctypes.c_float))
        chosen: list[int] = np.ctypeslib.as_array(logits, (len(pieces), self._vocab)).argmax(1).tolist()
        return chosen


def _say(parent: TextIO, message: dict[str, Any]) -> None:
    print(json.dumps(message), file=parent, flush=True)


def main() -> None:
    """Entry point of the process."""
    folder, matrices, threads, sequences, context_tokens = sys.argv[1:]
    parent = os.fdopen(os.dup(1), "w")  # what llama.cpp prints must not pass for our answer
    os.dup2(2, 1)
    with tempfile.TemporaryDirectory(prefix="pimoe-gguf-") as made:
        path = Path(made) / "model.gguf"
        write_gguf(Path(folder), path, matrices)
        llama = Llama(path, int(threads), int(sequences), int(context_tokens))
        system = llama_cpp.llama_print_system_info().decode()
        _say(parent, {"ready": {"version": llama_cpp.__version__, "bytes": path.stat().st_size, "system": system}})
        for line in sys.stdin:
            asked = json.loads(line)
            at, steps = llama.generate(asked["prompts"], asked["max_tokens"])
            _say(parent, {"at": at, "steps": steps})


if __name__ == "__main__":
    main()
