"""Native kernels for matrix products on the CPU, where they could be built; elsewhere torch computes.

One call serves all experts of a layer: gather, both products, activation, weighted sums. A row's result does not
depend on the rows beside it, to the bit. The sources lie beside this file; they are built when pimoe is installed.

`PIMOE_NATIVE` chooses: `best` (the default), `avx512`, `avx2`, `portable`, or `off`.
"""

from __future__ import annotations

import contextlib
import mmap
import os
from enum import IntEnum
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..errors import ConfigurationError
from .packing import HALF, PANEL, interleaved, pack, padded, quantize

_VARIABLE = "PIMOE_NATIVE"
_LARGE_PAGE = 2 * 2**20
_MOST_THREADS = 8

Int32 = NDArray[np.int32]
Float32 = NDArray[np.float32]


class Kind(IntEnum):
    """Weights and the activations they are multiplied with."""

    F32 = 0
    BF16 = 1
    I8_F32 = 2
    I8_BF16 = 3


# Numbers of `enum Activation` in common.h.
ACTIVATIONS = {"silu": 0, "gelu_tanh": 1, "relu": 2, "clamped_swiglu": 3}


def _load() -> tuple[Any, str, bool]:
    """The module, the name of its kernels, how they want int8 packed; or None and why there are none."""
    wanted = os.environ.get(_VARIABLE, "best")
    if wanted == "off":
        return None, f"{_VARIABLE} is off", False
    try:
        from . import _kernels
    except ImportError as error:
        return None, f"not built: {error}", False
    try:
        return _kernels, *_kernels.use(wanted)
    except ValueError as error:
        raise ConfigurationError(f"{_VARIABLE} is {wanted!r}: {error}", _VARIABLE) from error


_module, _name, _magnitudes = _load()
_threads: int | None = None


def use_threads(count: int | None) -> None:
    """How many threads a kernel may use at most, the calling one included; None: as many as torch. Those that help
    never hold up the one that calls, so that a process may name all cores although others want them as well."""
    global _threads
    _threads = count


def use_all_cores() -> None:
    """For a router: its experts are idle while its kernels compute, and it sleeps while they do."""
    use_threads(min(_MOST_THREADS, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1))


def threads() -> int:
    """See `use_threads`."""
    return _threads or torch.get_num_threads()


def module() -> Any:
    """The kernels as they are built; only where there are any."""
    return _module


def available() -> bool:
    """Whether there are any."""
    return _module is not None


def are_fast() -> bool:
    """Whether they are to be preferred to torch's own, which on other processors are better than portable code."""
    return available() and (_name not in ("portable", "avx2") or os.environ.get(_VARIABLE, "best") != "best")


def description() -> str:
    """The kernels' name, or why there are none."""
    return _name


def kind_of(dtype: torch.dtype, int8: bool) -> Kind | None:
    """The kind for activations of `dtype`; None where there is no kernel."""
    if dtype is torch.float32:
        return Kind.I8_F32 if int8 else Kind.F32
    if dtype is torch.bfloat16:
        return Kind.I8_BF16 if int8 else Kind.BF16
    return None


def supports(dtype: torch.dtype, device: torch.device | str, k: int) -> bool:
    """Whether there is a kernel for rows of `k` numbers of this type there."""
    return available() and torch.device(device).type == "cpu" and kind_of(dtype, False) is not None and k % 2 == 0


def _on_large_pages(numbers: int, dtype: torch.dtype) -> Tensor:
    """Memory for weights, which are read from one end to the other: on pages of 2 MB, where the system has them, a
    core reads them faster (1.25 times on one machine, the best of 200 calls)."""
    size = numbers * dtype.itemsize
    if size < 2 * _LARGE_PAGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(numbers, dtype=dtype)
    memory = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without them
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype, count=numbers)


class PackedMatrices:
    """One or several matrices of one shape, packed, one after the other.

    Args:
        count: how many.
        columns, k: shape of each.
        kind: of weights and activations.
        has_bias: whether there is one for each column.
    """

    def __init__(self, count: int, columns: int, k: int, kind: Kind, has_bias: bool = False) -> None:
        self.columns, self.k, self.kind = columns, k, kind
        self._int8 = kind in (Kind.I8_F32, Kind.I8_BF16)
        self._padded = padded(columns, PANEL)
        dtype = torch.int8 if self._int8 else torch.float32 if kind == Kind.F32 else torch.bfloat16
        self._weights = _on_large_pages(count * self._padded * k, dtype).view(count, -1)
        self._scales = torch.ones(count, self._padded) if self._int8 else None
        self._bias = torch.zeros(count, self._padded) if has_bias else None
        tensors = (self._weights, self._scales, self._bias)
        addresses = [0 if tensor is None else tensor.data_ptr() for tensor in tensors]
        self.handle = _module.matrix(*addresses, self._padded, k)

    @property
    def nbytes(self) -> int:
        """Memory of weights, scales and bias."""
        tensors = (self._weights, self._scales, self._bias)
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)

    def store(self, index: int, weight: Tensor, bias: Tensor | None = None) -> None:
        """Packs `weight [columns, k]` and `bias [columns]` as the matrix number `index`."""
        if self._scales is not None:
            weight, scales = quantize(weight)
            self._scales[index, : len(scales)] = scales
        magnitudes = self.kind == Kind.I8_BF16 and _magnitudes
        paired = self.kind == Kind.BF16 or magnitudes
        self._weights[index] = pack(weight.to(self._weights.dtype), paired, magnitudes)
        if self._bias is not None and bias is not None:
            self._bias[index, : len(bias)] = bias


class PackedLinear:
    """`rows @ weight.T + bias` with one matrix.

    Args:
        weight: `[out, in]`, float32 or bfloat16.
        bias: `[out]`, or None.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        kind = kind_of(weight.dtype, int8=False)
        assert kind is not None
        self.dtype = weight.dtype
        columns, k = weight.shape
        self.matrix = PackedMatrices(1, columns, k, kind, bias is not None)
        self.matrix.store(0, weight, bias)

    def __call__(self, rows: Tensor, out_dtype: torch.dtype | None = None) -> Tensor:
        """`[rows, in]` of the weights' dtype -> `[rows, out]`, in that dtype or in float32."""
        rows = rows.contiguous()
        matrix, count = self.matrix, rows.shape[0]
        out = rows.new_empty((count, matrix.columns), dtype=out_dtype or self.dtype)
        _module.run_product(
            matrix.kind, matrix.handle, rows.data_ptr(), count, out.data_ptr(), out.dtype is torch.float32,
            matrix.columns, threads(),
        )  # fmt: skip
        return out


class PackedExperts:
    """The experts of one layer: `down(combine(gate_up(x)))`, weighted and summed for each row.

    Args:
        count: of experts.
        hidden, inner: sizes.
        kind: of weights and activations.
        activation: a name of `ACTIVATIONS`.
        clamp: alpha and limit of a clamped SwiGLU.
        has_bias: of both products.
    """

    def __init__(
        self,
        count: int,
        hidden: int,
        inner: int,
        kind: Kind,
        activation: str,
        clamp: tuple[float, float] = (1.0, 0.0),
        has_bias: bool = False,
    ) -> None:
        self.kind, self._inner = kind, padded(inner, HALF)
        self.gate_up = PackedMatrices(count, 2 * self._inner, hidden, kind, has_bias)
        self.down = PackedMatrices(count, hidden, self._inner, kind, has_bias)
        number = ACTIVATIONS[activation]
        self.handle = _module.experts(
            kind, number, *clamp, count, hidden, self._inner, self.gate_up.handle, self.down.handle
        )

    @property
    def nbytes(self) -> int:
        """Memory of all weights."""
        return self.gate_up.nbytes + self.down.nbytes

    def store(
        self, expert: int, gate_up: Tensor, down: Tensor, biases: tuple[Tensor, Tensor] | None = None
    ) -> None:
        """Packs one expert: `gate_up [2 * inner, hidden]`, gate first, `down [hidden, inner]`, their biases."""
        gate_up_bias, down_bias = (None, None) if biases is None else biases
        mixed_bias = None if gate_up_bias is None else interleaved(gate_up_bias.float())
        self.gate_up.store(expert, interleaved(gate_up), mixed_bias)
        down = torch.nn.functional.pad(down, (0, self._inner - down.shape[1]))
        self.down.store(expert, down, down_bias)

    def __call__(self, hidden: Tensor, offsets: Int32, experts: Int32, weights: Float32) -> Tensor | None:
        """Weighted sums `[rows, hidden]`, float32; None where a pair names no expert of these.

        Args:
            hidden: `[rows, hidden]`, of the kind's activations.
            offsets, experts, weights: `[rows + 1]`, `[pairs]`, `[pairs]`, as in a dispatch plan.
        """
        rows, pairs = hidden.shape[0], len(experts)
        hidden, arrays = (
            hidden.contiguous(),
            [np.ascontiguousarray(array) for array in (offsets, experts, weights)],
        )
        out = torch.empty(hidden.shape, dtype=torch.float32)
        addresses = [array.ctypes.data for array in arrays]
        fits = _module.run_experts(
            self.handle, hidden.data_ptr(), *addresses, out.data_ptr(), rows, pairs, threads()
        )
        return out if fits else None
