"""The trunk's kernels against plain float64: norms, gate, attention over a paged cache."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from pimoe.runtime.model.kv_cache import KVCache, KVLayout
from pimoe.runtime.model.rope import RotaryTable, rotate
from pimoe.runtime.model.spec import RopeSpec
from pimoe.runtime.native import kernels
from pimoe.runtime.native.kernels import PackedLinear
from pimoe.runtime.native.trunk import (
    AttendedTokens,
    AttentionShape,
    PackedAttention,
    PackedGate,
    TokenPlaces,
    add,
    rms_norm,
)
from torch import Tensor
from torch.nn import functional as F

pytestmark = pytest.mark.skipif(not kernels.available(), reason=f"no native kernels here: {kernels.description()}")

DTYPES = [torch.float32, torch.bfloat16]
BLOCK_TOKENS = 4


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def tolerance(dtype: torch.dtype) -> dict[str, float]:
    return {"rtol": 2e-2, "atol": 3e-2} if dtype is torch.bfloat16 else {"rtol": 1e-4, "atol": 1e-5}


def norm64(x: Tensor, scale: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * scale


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width"), [(0, 16), (1, 16), (3, 128), (9, 80)])
def test_norms_and_sums_are_those_of_torch(kernel_set: str, dtype: torch.dtype, rows: int, width: int) -> None:
    hidden, scale = normal(rows, width).to(dtype), normal(width, seed=1).to(dtype)
    expected = norm64(hidden.double(), scale.double(), 1e-5)
    torch.testing.assert_close(rms_norm(hidden, scale, 1e-5).double(), expected, **tolerance(dtype))
    sums = normal(rows, width, seed=2)
    assert torch.equal(add(hidden, sums), hidden + sums.to(dtype))


def test_a_sum_of_any_length_is_right_to_its_end(kernel_set: str) -> None:
    hidden, sums = normal(1, 37), normal(1, 37, seed=1)
    assert torch.equal(add(hidden, sums), hidden + sums)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("experts", "top_k"), [(3, 1), (8, 2), (70, 8)])
@pytest.mark.parametrize("renormalize", [False, True])
def test_the_gate_chooses_as_torch_does(
    kernel_set: str, dtype: torch.dtype, experts: int, top_k: int, renormalize: bool
) -> None:
    weight, hidden = normal(experts, 64).to(dtype), normal(20, 64, seed=1).to(dtype)
    ids, weights = PackedGate(weight, top_k, renormalize, False)(hidden)
    logits = F.linear(hidden.double(), weight.double()).to(dtype).double()
    expected, order = logits.softmax(-1).topk(top_k)
    if renormalize:
        expected = expected / expected.sum(-1, keepdim=True)
    torch.testing.assert_close(weights.double(), expected, rtol=1e-4, atol=1e-5)
    # Two logits of bfloat16 may be equal: then any of the two is right.
    assert torch.equal(logits.gather(1, ids), logits.gather(1, order))
    assert all(len(set(row)) == top_k for row in ids.tolist())


def test_of_equal_experts_the_first_are_chosen_and_nan_chooses_valid_ones(kernel_set: str) -> None:
    gate = PackedGate(torch.zeros(6, 16), 3, True, True)
    hidden = torch.ones(2, 16)
    hidden[1] = float("nan")
    ids, weights = gate(hidden)
    assert ids.tolist() == [[0, 1, 2]] * 2
    torch.testing.assert_close(weights[0], torch.full((3,), 1 / 3))
    assert weights[1].isnan().all()


class Case:
    """One layer with random weights and a cache, in any form of attention."""

    def __init__(self, dtype: torch.dtype, **changes: object) -> None:
        shape = AttentionShape(64, 4, 2, 32, 1e-5, 32**-0.5, None, None, "none")
        self.shape = shape = replace(shape, **changes)  # type: ignore[arg-type]
        self.dtype = dtype
        dim, heads, kv = shape.head_dim, shape.heads, shape.kv_heads
        self.qkv = (normal((heads + 2 * kv) * dim, shape.hidden) * shape.hidden**-0.5).to(dtype)
        self.bias = normal((heads + 2 * kv) * dim, seed=1).to(dtype)
        self.output = (normal(shape.hidden, heads * dim, seed=2) * (heads * dim) ** -0.5).to(dtype)
        self.norms = [normal(shape.hidden, seed=seed).to(dtype) for seed in (3, 4)]
        self.qk_scale = None if shape.qk_norm == "none" else normal(heads + kv, dim, seed=5).to(dtype)
        self.sinks: Tensor | None = None
        self.rotary = RotaryTable(RopeSpec(theta=100.0), dim, torch.device("cpu"))
        self.cache = KVCache(KVLayout(1, kv, dim, dim), 64, BLOCK_TOKENS, dtype, torch.device("cpu"))

    def pack(self) -> PackedAttention:
        return PackedAttention(
            self.shape,
            PackedLinear(self.qkv, self.bias),
            PackedLinear(self.output),
            *self.norms,
            self.qk_scale,
            self.sinks,
        )

    def run(
        self, packed: PackedAttention, parts: list[tuple[list[int], int, Tensor]], rows: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Parts are a sequence's blocks, how many of its tokens are cached, and its new hidden states."""
        hidden = torch.cat([new for _, _, new in parts])
        at = [(blocks, p) for blocks, start, new in parts for p in range(start, start + len(new))]
        positions = torch.tensor([p for _, p in at])
        places = [blocks[p // BLOCK_TOKENS] * BLOCK_TOKENS + p % BLOCK_TOKENS for blocks, p in at]
        cache_rows = torch.tensor(places)
        length = int(positions.max()) + 1
        told = TokenPlaces(
            len(at), positions.data_ptr(), cache_rows.data_ptr(), self.rotary.address(length), BLOCK_TOKENS
        )
        segments, row = [], 0
        for blocks, _, new in parts:
            segments.append((blocks, row, len(new)))
            row += len(new)
        address = self.cache.address(0)
        queries = packed.project(hidden, told, address)
        out = packed.attend(queries, AttendedTokens.of(segments), told, address)
        return packed.finish(out, hidden, rows)

    def expected(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """A whole sequence at once, in float64."""
        shape, x = self.shape, hidden.double()
        heads, kv, dim = shape.heads, shape.kv_heads, shape.head_dim
        merged = F.linear(norm64(x, self.norms[0].double(), shape.eps), self.qkv.double(), self.bias.double())
        q, k, v = merged.view(len(x), -1, dim).split([heads, kv, kv], 1)
        if self.qk_scale is not None:
            scales = self.qk_scale.double().split([heads, kv])
            if shape.qk_norm == "head":
                q, k = (norm64(t, s, shape.eps) for t, s in zip((q, k), scales, strict=True))
            else:
                q, k = (
                    norm64(t.flatten(1), s.flatten(), shape.eps).view_as(t)
                    for t, s in zip((q, k), scales, strict=True)
                )
        if shape.clip is not None:
            q, k, v = (t.clamp(-shape.clip, shape.clip) for t in (q, k, v))
        turns = self.rotary.rows(torch.arange(len(x)), len(x), torch.float64)
        q, k = rotate(q, *turns), rotate(k, *turns)
        k, v = (t.repeat_interleave(heads // kv, 1) for t in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q, k) * shape.scale
        distance = torch.arange(len(x))[:, None] - torch.arange(len(x))
        hidden_from = distance < 0
        if shape.window is not None:
            hidden_from |= distance >= shape.window
        scores = scores.masked_fill(hidden_from, -torch.inf)
        if self.sinks is not None:
            scores = torch.cat((scores, self.sinks.double()[:, None, None].expand(-1, len(x), 1)), -1)
        weights = scores.softmax(-1)[..., : len(x)]
        attended = torch.einsum("hqk,khd->qhd", weights, v).flatten(1)
        out = x + F.linear(attended, self.output.double())
        return out, norm64(out, self.norms[1].double(), shape.eps)


FORMS: dict[str, dict[str, object]] = {
    "plain": {},
    "every head normed": {"qk_norm": "head"},
    "all heads normed": {"qk_norm": "full", "clip": 0.7},
    "window": {"window": 5},
    "wide window": {"window": 21},
    "one kv head": {"kv_heads": 1},
    "wide heads": {"head_dim": 96, "scale": 0.05, "hidden": 80},
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("sinks", [False, True])
def test_a_sequence_in_pieces_is_what_it_is_at_once(
    kernel_set: str, dtype: torch.dtype, form: str, sinks: bool
) -> None:
    """Blocks lie in no order; a piece of many tokens, then one by one."""
    case = Case(dtype, **FORMS[form])
    case.sinks = normal(case.shape.heads, seed=9) if sinks else None
    packed = case.pack()
    hidden = normal(41, case.shape.hidden, seed=7).to(dtype)
    expected = case.expected(hidden)
    blocks = [9, 3, 30, 1, 22, 7, 8, 40, 2, 5, 17]
    pieces = [case.run(packed, [(blocks, 0, hidden[:19])])]
    pieces += [case.run(packed, [(blocks, at, hidden[at : at + 1])]) for at in range(19, 41)]
    for found, whole in zip(zip(*pieces, strict=True), expected, strict=True):
        torch.testing.assert_close(torch.cat(found).double(), whole, **tolerance(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_token_has_the_same_bits_in_any_company(kernel_set: str, dtype: torch.dtype) -> None:
    """Alone or among others, in one piece or several, with one thread or three."""
    case = Case(dtype, qk_norm="head")
    packed, threads = case.pack(), torch.get_num_threads()
    first, second = (normal(23, 64, seed=seed).to(dtype) for seed in (7, 8))
    tables = [1, 2, 3, 4, 5, 6], [20, 18, 16, 14, 12, 10]
    try:
        torch.set_num_threads(3)
        together = case.run(packed, [(tables[0], 0, first), (tables[1], 0, second)])
    finally:
        torch.set_num_threads(threads)
    alone = [case.run(packed, [(tables[1], at, second[at : at + 1])]) for at in range(23)]
    for found, both in zip(zip(*alone, strict=True), together, strict=True):
        assert torch.equal(torch.cat(found), both[23:])


@pytest.mark.parametrize("dtype", DTYPES)
def test_only_chosen_rows_are_finished(kernel_set: str, dtype: torch.dtype) -> None:
    case = Case(dtype)
    packed, hidden = case.pack(), normal(12, 64, seed=7).to(dtype)
    blocks = [5, 6, 7]
    whole = case.run(packed, [(blocks, 0, hidden)])
    for rows in (torch.tensor([11]), torch.tensor([0, 7, 3]), torch.empty(0, dtype=torch.int64)):
        some = case.run(packed, [(blocks, 0, hidden)], rows)
        assert all(torch.equal(found, all_rows[rows]) for found, all_rows in zip(some, whole, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_sequence_that_overflows_harms_no_other(kernel_set: str, dtype: torch.dtype) -> None:
    case = Case(dtype)
    packed = case.pack()
    good, bad = normal(9, 64, seed=7).to(dtype), torch.full((9, 64), float("inf"), dtype=dtype)
    alone = case.run(packed, [([1, 2, 3], 0, good)])
    beside = case.run(packed, [([1, 2, 3], 0, good), ([4, 5, 6], 0, bad)])
    assert all(torch.equal(both[:9], one) for both, one in zip(beside, alone, strict=True))
    assert not beside[1][9:].isfinite().any()
