"""The native kernels: torch's numbers within rounding, the same bits for a row in any company."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from pimoe.runtime.errors import InvalidTensorError
from pimoe.runtime.experts.group import ExpertGroup
from pimoe.runtime.native import kernels
from pimoe.runtime.native.kernels import Kind, PackedExperts, PackedLinear
from pimoe.runtime.native.packing import quantize
from pimoe.runtime.routing.plan import ExpertRows
from torch import Tensor
from torch.nn import functional as F

pytestmark = pytest.mark.skipif(not kernels.available(), reason=f"no native kernels here: {kernels.description()}")


def activate(name: str, projected: Tensor, clamp: tuple[float, float]) -> Tensor:
    gate, up = projected.chunk(2, -1)
    if name == "clamped_swiglu":
        gate, up = gate.clamp(max=clamp[1]), up.clamp(-clamp[1], clamp[1])
        return (up + 1) * gate * torch.sigmoid(gate * clamp[0])
    functions = {"silu": F.silu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"), "relu": F.relu}
    return functions[name](gate) * up


class Case:
    """Random experts and pairs, and what float64 says of them."""

    def __init__(
        self,
        kind: Kind,
        activation: str = "silu",
        hidden: int = 130,
        inner: int = 40,
        experts: int = 5,
        has_bias: bool = False,
    ) -> None:
        self.random = torch.Generator().manual_seed(hidden + inner)
        self.dtype = torch.bfloat16 if kind in (Kind.BF16, Kind.I8_BF16) else torch.float32
        self.experts, self.hidden, self.activation, self.clamp = experts, hidden, activation, (1.7, 0.9)
        self.gate_up = self.normal(experts, 2 * inner, hidden)
        self.down = self.normal(experts, hidden, inner)
        self.biases = (self.normal(experts, 2 * inner), self.normal(experts, hidden)) if has_bias else None
        self.packed = PackedExperts(experts, hidden, inner, kind, activation, self.clamp, has_bias)
        for expert in range(experts):
            biases = None if self.biases is None else (self.biases[0][expert], self.biases[1][expert])
            self.packed.store(expert, self.gate_up[expert], self.down[expert], biases)
        self.whole = [self.gate_up.double(), self.down.double()]
        if kind in (Kind.I8_F32, Kind.I8_BF16):
            for stack in self.whole:
                for expert in range(experts):
                    numbers, scales = quantize(stack[expert])
                    stack[expert] = numbers * scales[:, None]

    def normal(self, *shape: int) -> Tensor:
        return (torch.randn(shape, generator=self.random) * shape[-1] ** -0.5).to(self.dtype)

    def rows(self, count: int) -> ExpertRows:
        """Every row has one to three experts; some rows in a row may want none but one."""
        rng = np.random.default_rng(count)
        chosen = [rng.choice(self.experts, rng.integers(1, 4), replace=False) for _ in range(count)]
        offsets = np.cumsum([0, *map(len, chosen)]).astype(np.int32)
        weights = rng.random(int(offsets[-1]), np.float32)
        hidden = torch.randn(count, self.hidden, generator=self.random).to(self.dtype)
        return ExpertRows(hidden, offsets, np.concatenate(chosen).astype(np.int32), weights)

    def compute(self, rows: ExpertRows) -> Tensor:
        out = self.packed(rows.hidden, rows.offsets, rows.experts, rows.weights)
        assert out is not None
        return out

    def expected(self, rows: ExpertRows) -> Tensor:
        out = torch.zeros(rows.hidden.shape, dtype=torch.float64)
        for row, (start, end) in enumerate(zip(rows.offsets, rows.offsets[1:], strict=False)):
            for pair in range(start, end):
                expert, x = int(rows.experts[pair]), rows.hidden[row].double()
                projected = self.whole[0][expert] @ x
                if self.biases is not None:
                    projected += self.biases[0][expert]
                y = self.whole[1][expert] @ activate(self.activation, projected, self.clamp)
                out[row] += float(rows.weights[pair]) * (y if self.biases is None else y + self.biases[1][expert])
        return out


def tolerance(dtype: torch.dtype) -> dict[str, float]:
    # With bfloat16 the values between the two products are rounded to 8 bits.
    return {"rtol": 2e-2, "atol": 2e-2} if dtype is torch.bfloat16 else {"rtol": 1e-4, "atol": 1e-5}


@pytest.mark.parametrize("kind", list(Kind))
@pytest.mark.parametrize(("hidden", "inner"), [(2, 1), (64, 32), (130, 40), (256, 64)])
@pytest.mark.parametrize("count", [1, 2, 7, 40])
def test_experts_give_the_exact_sums_within_rounding(
    kernel_set: str, kind: Kind, hidden: int, inner: int, count: int
) -> None:
    case = Case(kind, hidden=hidden, inner=inner)
    rows = case.rows(count)
    torch.testing.assert_close(case.compute(rows).double(), case.expected(rows), **tolerance(case.dtype))


@pytest.mark.parametrize("activation", list(kernels.ACTIVATIONS))
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("kind", list(Kind))
def test_every_activation_and_bias(kernel_set: str, activation: str, has_bias: bool, kind: Kind) -> None:
    case = Case(kind, activation, has_bias=has_bias)
    rows = case.rows(9)
    torch.testing.assert_close(case.compute(rows).double(), case.expected(rows), **tolerance(case.dtype))


@pytest.mark.parametrize("kind", list(Kind))
def test_a_row_has_the_same_bits_alone_among_others_and_on_more_threads(kernel_set: str, kind: Kind) -> None:
    case = Case(kind, hidden=128, inner=96)
    rows = case.rows(50)
    together, threads = case.compute(rows), torch.get_num_threads()
    for row in range(50):
        start, end = rows.offsets[row], rows.offsets[row + 1]
        offsets = np.array([0, end - start], np.int32)
        alone = ExpertRows(rows.hidden[row : row + 1], offsets, rows.experts[start:end], rows.weights[start:end])
        assert torch.equal(case.compute(alone)[0], together[row])
    try:
        torch.set_num_threads(3 if threads != 3 else 2)
        assert torch.equal(case.compute(rows), together)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("kind", list(Kind))
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_so_and_with_its_row(kernel_set: str, kind: Kind, bad: float) -> None:
    case = Case(kind)
    rows = case.rows(9)
    clean = case.compute(rows)
    rows.hidden[4, 3] = bad
    spoilt = case.compute(rows)
    assert not spoilt[4].isfinite().any()
    others = [row for row in range(9) if row != 4]
    assert torch.equal(spoilt[others], clean[others])


def test_large_values_saturate_as_the_activation_does(kernel_set: str) -> None:
    case = Case(Kind.F32, hidden=64, inner=32)
    rows = case.rows(6)
    rows.hidden.mul_(1e4)
    torch.testing.assert_close(case.compute(rows).double(), case.expected(rows), rtol=1e-3, atol=1.0)


@pytest.mark.parametrize(
    ("offsets", "experts"),
    [([0, 1, 2], [0, 5]), ([0, 1, 2], [-1, 0]), ([0, 2, 1], [0, 1]), ([1, 1, 2], [0, 1])],
    ids=["unknown", "negative", "backwards", "late start"],
)
def test_pairs_that_do_not_fit_are_refused(offsets: list[int], experts: list[int]) -> None:
    case = Case(Kind.F32)
    pairs = np.array(experts, np.int32)
    weights, starts = np.ones(2, np.float32), np.array(offsets, np.int32)
    assert case.packed(torch.zeros(2, 130), starts, pairs, weights) is None

    class Layer:
        weights_bytes = 0

        def partial_sums(self, rows: ExpertRows) -> Tensor | None:
            return case.packed(rows.hidden, rows.offsets, rows.experts, rows.weights)

    group = ExpertGroup(range(5), {0: Layer()}, 130)
    with pytest.raises(InvalidTensorError, match="do not fit a group of 5"):
        group.forward(0, ExpertRows(torch.zeros(2, 130), starts, pairs, weights))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("columns", "k"), [(1, 2), (64, 64), (100, 30), (192, 256)])
@pytest.mark.parametrize("count", [0, 1, 5, 20])
@pytest.mark.parametrize("has_bias", [False, True])
def test_a_product_is_torchs_within_rounding(
    kernel_set: str, dtype: torch.dtype, columns: int, k: int, count: int, has_bias: bool
) -> None:
    generator = torch.Generator().manual_seed(columns)
    weight = torch.randn(columns, k, generator=generator).to(dtype)
    bias = torch.randn(columns, generator=generator).to(dtype) if has_bias else None
    rows = torch.randn(count, k, generator=generator).to(dtype)
    expected = F.linear(rows.double(), weight.double(), None if bias is None else bias.double())
    linear = PackedLinear(weight, bias)
    assert linear(rows).dtype is dtype
    torch.testing.assert_close(linear(rows).double(), expected, rtol=1e-2, atol=1e-2 * k**0.5)
    torch.testing.assert_close(linear(rows, torch.float32).double(), expected, rtol=1e-4, atol=1e-4)
    if count:
        assert torch.equal(linear(rows)[-1:], linear(rows[-1:])), "a row's bits depend on the others"


def test_int8_takes_little_more_than_half_the_memory_of_bfloat16() -> None:
    sizes = [PackedExperts(8, 512, 256, kind, "silu").nbytes for kind in (Kind.I8_BF16, Kind.BF16)]
    assert sizes[0] <= 0.52 * sizes[1]


def test_int8_rounds_to_the_nearest_of_255_steps() -> None:
    weight = torch.randn(7, 33, generator=torch.Generator().manual_seed(1))
    numbers, scales = quantize(weight)
    assert numbers.dtype is torch.int8
    assert numbers.abs().amax(1).tolist() == [127] * 7
    assert ((numbers * scales[:, None] - weight).abs() <= 0.5001 * scales[:, None]).all()
    assert quantize(torch.zeros(2, 3))[0].tolist() == [[0] * 3] * 2


def run_with(value: str) -> subprocess.CompletedProcess[str]:
    program = "from pimoe.runtime.native import kernels; print(kernels.available(), kernels.description())"
    environment = {**os.environ, "PIMOE_NATIVE": value}
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)


def test_they_can_be_chosen_by_the_environment() -> None:
    assert run_with("off").stdout == "False PIMOE_NATIVE is off\n"
    assert run_with("portable").stdout == "True portable\n"
    failed = run_with("fastest")
    assert failed.returncode != 0
    assert "PIMOE_NATIVE is 'fastest'" in failed.stderr


def test_to_name_the_default_is_to_leave_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where torch's own kernels are faster only a kernel that was asked for by name is preferred to them."""
    monkeypatch.setattr(kernels, "_name", "avx2")
    for value, preferred in ((None, False), ("best", False), ("avx2", True)):
        if value is None:
            monkeypatch.delenv("PIMOE_NATIVE", raising=False)
        else:
            monkeypatch.setenv("PIMOE_NATIVE", value)
        assert kernels.are_fast() == preferred
