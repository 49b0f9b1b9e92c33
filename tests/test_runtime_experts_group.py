"""Expert groups: their partial sums, their kernels, and that they read nothing but their own experts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import FAMILIES, make_checkpoint
from custom_experts import ScaleExpert
from pimoe.runtime.errors import CheckpointError, InvalidTensorError
from pimoe.runtime.experts import layers
from pimoe.runtime.experts.group import ExpertGroup
from pimoe.runtime.experts.layers import ClampedExperts, GatedExperts, StackedExperts
from pimoe.runtime.model.checkpoint import Checkpoint
from pimoe.runtime.model.families import read_spec
from pimoe.runtime.model.layer_model import write_layer_model
from pimoe.runtime.model.safetensors_header import read_header
from pimoe.runtime.model.spec import ExpertSpec
from pimoe.runtime.routing.plan import ExpertRows
from torch import Tensor, nn

HIDDEN, INNER, EXPERTS = 16, 8, 6


class ReadingCheckpoint(Checkpoint):
    """Remembers what was read."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.read_names: list[str] = []
        self.read_bytes = 0

    def read(self, name: str, *args: Any, **kwargs: Any) -> Tensor:
        """See `Checkpoint`."""
        self.read_names.append(name)
        tensor = super().read(name, *args, **kwargs)
        self.read_bytes += self._entry(name).nbytes
        return tensor

    def read_slice(self, name: str, start: int, stop: int, *args: Any, **kwargs: Any) -> Tensor:
        """See `Checkpoint`."""
        self.read_names.append(f"{name}[{start}:{stop}]")
        tensor = super().read_slice(name, start, stop, *args, **kwargs)
        self.read_bytes += tensor.nbytes
        return tensor


@pytest.fixture(scope="module")
def decoder_folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {family: make_checkpoint(family, tmp_path_factory.mktemp(family)) for family in FAMILIES}


def gated_weights(seed: int = 0) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        {
            "gate_proj.weight": torch.randn(INNER, HIDDEN, generator=generator),
            "up_proj.weight": torch.randn(INNER, HIDDEN, generator=generator),
            "down_proj.weight": torch.randn(HIDDEN, INNER, generator=generator),
        }
        for _ in range(EXPERTS)
    ]


@pytest.fixture(scope="module")
def layer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("layer")
    return write_layer_model(folder, torch.randn(EXPERTS, HIDDEN), gated_weights(), 2)


def load(folder: Path, experts: tuple[int, ...], dtype: torch.dtype = torch.float32) -> ExpertGroup:
    checkpoint = Checkpoint(folder)
    return ExpertGroup.load(checkpoint, read_spec(checkpoint).experts, experts, dtype)


def random_rows(num_experts: int, seed: int = 0, rows: int = 9, hidden: int = HIDDEN) -> ExpertRows:
    """Each row goes to at least one expert, some to all."""
    rng = np.random.default_rng(seed)
    chosen = [rng.permutation(num_experts)[: rng.integers(1, num_experts + 1)] for _ in range(rows)]
    return ExpertRows(
        torch.from_numpy(rng.standard_normal((rows, hidden), np.float32)),
        np.cumsum([0, *map(len, chosen)], dtype=np.int32),
        np.concatenate(chosen).astype(np.int32),
        rng.random(sum(map(len, chosen)), np.float32),
    )


def reference(rows: ExpertRows, expert: Callable[[int, Tensor], Tensor]) -> Tensor:
    """The sums in float64, one pair after the other."""
    out = torch.zeros(rows.hidden.shape, dtype=torch.float64)
    for row in range(len(rows.hidden)):
        for pair in range(rows.offsets[row], rows.offsets[row + 1]):
            out[row] += float(rows.weights[pair]) * expert(int(rows.experts[pair]), rows.hidden[row].double())
    return out


def gated(weights: dict[str, Tensor], hidden: Tensor) -> Tensor:
    gate, up, down = (weights[f"{part}_proj.weight"].double() for part in ("gate", "up", "down"))
    return down @ (nn.functional.silu(gate @ hidden) * (up @ hidden))


@pytest.mark.parametrize("experts", [(0, 1, 2, 3, 4, 5), (4, 1), (3,)])
def test_partial_sums_equal_a_plain_reference(layer_folder: Path, experts: tuple[int, ...]) -> None:
    group, weights = load(layer_folder, experts), gated_weights()
    for seed in range(5):
        rows = random_rows(len(experts), seed)
        partial = group.forward(0, rows)
        assert partial.dtype is torch.float32
        expected = reference(rows, lambda local, x: gated(weights[experts[local]], x))
        torch.testing.assert_close(partial.double(), expected, atol=1e-4, rtol=1e-4)


def test_a_row_without_experts_gets_zeros(layer_folder: Path) -> None:
    rows = ExpertRows(
        torch.ones(3, HIDDEN),
        np.array([0, 0, 1, 1], np.int32),
        np.array([1], np.int32),
        np.array([1.0], np.float32),
    )
    partial = load(layer_folder, (0, 1)).forward(0, rows)
    assert not partial[[0, 2]].any()
    assert partial[1].any()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.03), (torch.float16, 0.004)])
def test_half_precision_experts_sum_in_float32(tmp_path: Path, dtype: torch.dtype, tolerance: float) -> None:
    weights = [{name: t.to(dtype) for name, t in expert.items()} for expert in gated_weights()]
    folder = write_layer_model(tmp_path, torch.randn(EXPERTS, HIDDEN).to(dtype), weights, 2)
    group = load(folder, tuple(range(EXPERTS)), dtype)
    rows = random_rows(EXPERTS)
    rows = replace(rows, hidden=rows.hidden.to(dtype))

    partial = group.forward(0, rows)

    assert partial.dtype is torch.float32
    expected = reference(rows, lambda local, x: gated(weights[local], x))
    assert (partial.double() - expected).abs().max() < tolerance * expected.abs().max()
    assert not torch.equal(partial, partial.to(dtype).float()), "sums were rounded on their way"
    # Rows may come in another dtype than the experts': they are converted.
    assert torch.equal(group.forward(0, replace(rows, hidden=rows.hidden.float())), partial)


# What is read, and what is held.


def own_bytes(folder: Path, experts: tuple[int, ...]) -> int:
    spec = read_spec(Checkpoint(folder)).experts
    return 4 * spec.parameters_per_expert * len(experts) * len(spec.moe_layers)


def own_pieces(spec: ExpertSpec, experts: tuple[int, ...]) -> list[str]:
    """Names of tensors, with the rows of those that are shared."""
    pieces: list[str] = []
    for layer in spec.moe_layers:
        for expert in experts:
            if spec.stacked is None:
                pieces += spec.tensor_names(layer, expert)
            else:
                pieces += [f"{name}[{expert}:{expert + 1}]" for name in spec.stacked.names(layer)]
    return pieces


@pytest.mark.usefixtures("torch_experts")
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("experts", [(0, 1, 2), (5,), (4, 2)])
def test_a_group_reads_and_holds_the_bytes_of_its_own_experts_only(
    decoder_folders: dict[str, Path], family: str, experts: tuple[int, ...]
) -> None:
    checkpoint = ReadingCheckpoint(decoder_folders[family])
    spec = read_spec(checkpoint).experts
    group = ExpertGroup.load(checkpoint, spec, experts, torch.float32)
    assert sorted(checkpoint.read_names) == sorted(own_pieces(spec, experts))
    assert checkpoint.read_bytes == group.weights_bytes == own_bytes(decoder_folders[family], experts)
    everyone = own_bytes(decoder_folders[family], tuple(range(6)))
    assert group.weights_bytes * 6 == everyone * len(experts)


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_what_other_experts_bytes_are_does_not_matter(family: str, tmp_path: Path) -> None:
    """Every byte of the file that is not its own becomes 0xFF, a NaN in any dtype; the group must not notice."""
    folder = make_checkpoint(family, tmp_path)
    experts = (1, 4)
    intact = load(folder, experts)
    spec = read_spec(Checkpoint(folder)).experts
    own = set(own_pieces(spec, experts))
    file = folder / "model.safetensors"
    content = bytearray(file.read_bytes())
    for name, entry in read_header(file).entries.items():
        rows = entry.shape[0] if spec.stacked is not None else 1
        for row in range(rows):
            if name not in own and f"{name}[{row}:{row + 1}]" not in own:
                size = entry.nbytes // rows
                start = entry.offset + row * size
                content[start : start + size] = b"\xff" * size
    file.write_bytes(content)

    loaded = load(folder, experts)

    rows = random_rows(2, hidden=spec.hidden_size)
    for layer in spec.moe_layers:
        assert loaded.forward(layer, rows).isfinite().all()
        assert torch.equal(loaded.forward(layer, rows), intact.forward(layer, rows))
    assert not load(folder, (0, 1)).forward(0, rows).isfinite().all(), "the corruption reaches no group at all"


def test_only_the_shards_of_own_experts_need_to_be_readable(tmp_path: Path) -> None:
    folder = make_checkpoint("qwen3_moe", tmp_path, max_shard_size="20KB")
    checkpoint = Checkpoint(folder)
    spec = read_spec(checkpoint).experts
    own = {checkpoint._entry(n).file for layer in spec.moe_layers for n in spec.tensor_names(layer, 2)}
    others = set(folder.glob("*.safetensors")) - own
    assert own
    assert others
    for file in others:
        file.unlink()
    group = ExpertGroup.load(checkpoint, spec, (2,), torch.float32)
    assert sorted(group.layers) == list(spec.moe_layers)


def test_loading_converts_to_the_dtype_that_is_served(decoder_folders: dict[str, Path]) -> None:
    folder = decoder_folders["mixtral"]
    assert load(folder, (0, 1), torch.bfloat16).weights_bytes * 2 == load(folder, (0, 1)).weights_bytes


@pytest.mark.parametrize("experts", [(6,), (-1,), (0, 99)])
def test_experts_that_the_model_lacks_are_refused(layer_folder: Path, experts: tuple[int, ...]) -> None:
    with pytest.raises(CheckpointError, match="not in the model, which has 6"):
        load(layer_folder, experts)


# Bad rows.

BAD_ROWS: dict[str, Callable[[ExpertRows], ExpertRows]] = {
    "another hidden size": lambda r: replace(r, hidden=r.hidden[:, :-1]),
    "one dimension": lambda r: replace(r, hidden=r.hidden[0]),
    "a row too few": lambda r: replace(r, hidden=r.hidden[:-1]),
    "a row too many": lambda r: replace(r, hidden=torch.cat([r.hidden, r.hidden[:1]])),
    "an expert that is not held": lambda r: replace(r, experts=r.experts + 1),
    "a negative expert": lambda r: replace(r, experts=r.experts - 1),
    "a pair too few": lambda r: replace(r, experts=r.experts[:-1], weights=r.weights[:-1]),
    "a weight too few": lambda r: replace(r, weights=r.weights[:-1]),
    "offsets from 1": lambda r: replace(r, offsets=np.maximum(r.offsets, 1)),
    "falling offsets": lambda r: replace(r, offsets=r.offsets[[0, 3, 2, 1, *range(4, len(r.offsets))]]),
    "no pairs": lambda r: replace(r, offsets=r.offsets * 0, experts=r.experts[:0], weights=r.weights[:0]),
    "experts in two dimensions": lambda r: replace(r, experts=r.experts[:, None]),
    "offsets in two dimensions": lambda r: replace(r, offsets=r.offsets[None]),
    "experts as floats": lambda r: replace(r, experts=r.experts.astype(np.float32)),
    "offsets in 64 bits": lambda r: replace(r, offsets=r.offsets.astype(np.int64)),
    "weights as integers": lambda r: replace(r, weights=r.weights.astype(np.int32)),
    "no rows": lambda r: ExpertRows(r.hidden[:0], r.offsets[:1], r.experts[:0], r.weights[:0]),
}


@pytest.mark.parametrize("spoil", BAD_ROWS.values(), ids=BAD_ROWS)
def test_rows_that_do_not_fit_are_refused(layer_folder: Path, spoil: Callable[[ExpertRows], ExpertRows]) -> None:
    group, rows = load(layer_folder, (0, 1, 2)), random_rows(3)
    group.forward(0, rows)
    with pytest.raises(InvalidTensorError, match="do not fit a group of 3 experts of hidden size 16"):
        group.forward(0, spoil(rows))
    assert group.statistics().batches == 1


def test_a_layer_without_experts_is_refused(layer_folder: Path) -> None:
    with pytest.raises(InvalidTensorError, match=r"layer 3 has no experts; these have: \[0\]"):
        load(layer_folder, (0,)).forward(3, random_rows(1))


def test_statistics_count_what_was_computed(layer_folder: Path) -> None:
    group = load(layer_folder, (0, 1, 2))
    assert group.statistics() == (0, 0, 0, 0.0)
    rows = random_rows(3)
    group.forward(0, rows)
    group.forward(0, rows)
    statistics = group.statistics()
    assert statistics[:3] == (2, 18, 2 * len(rows.experts))
    assert statistics.busy_s > 0


# Kernels.


def random_experts(dtype: torch.dtype, hidden: int, inner: int, count: int, kind: str = "gated") -> StackedExperts:
    generator = torch.Generator().manual_seed(hidden + inner)
    gate_up = (torch.randn(count, 2 * inner, hidden, generator=generator) / hidden**0.5).to(dtype)
    down = (torch.randn(count, hidden, inner, generator=generator) / inner**0.5).to(dtype)
    if kind == "gated":
        return GatedExperts(gate_up, down, "silu")
    biases = (torch.randn(count, size, generator=generator).to(dtype) for size in (2 * inner, hidden))
    return ClampedExperts(gate_up, down, (next(biases), next(biases)), 1.702, 0.9)


@pytest.mark.parametrize("kind", ["gated", "clamped"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("hidden", "inner"), [(128, 128), (48, 24), (32, 8), (256, 64)])
def test_loop_and_grouped_kernel_agree_bit_for_bit(dtype: torch.dtype, hidden: int, inner: int, kind: str) -> None:
    """Two replicas may be calibrated differently, and a request moves between them unnoticed."""
    for count in (1, 5):
        experts = random_experts(dtype, hidden, inner, count, kind)
        for pairs in (1, 2, 7, 33, 130):
            rng = np.random.default_rng(pairs)
            ids = np.sort(rng.integers(0, count, pairs))
            bounds = np.searchsorted(ids, np.arange(count + 1)).astype(np.int32)
            rows = torch.from_numpy(rng.standard_normal((pairs, hidden), np.float32)).to(dtype)
            assert torch.equal(experts.forward_loop(rows, bounds), experts.forward_grouped(rows, bounds))


@pytest.mark.parametrize(("hidden", "inner"), [(7, 3), (6, 8), (8, 6)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sizes_that_the_grouped_kernel_cannot_take_are_computed_in_a_loop(
    dtype: torch.dtype, hidden: int, inner: int
) -> None:
    experts = random_experts(dtype, hidden, inner, 3)
    experts.calibrate()
    bounds = np.array([0, 300, 300, 700], np.int32)
    rows = torch.randn(700, hidden).to(dtype)
    assert torch.equal(experts.forward(rows, bounds), experts.forward_loop(rows, bounds))


@pytest.mark.parametrize(
    ("grouped_wins_from", "threshold"), [(1, 1), (8, 8), (64, 64), (513, 2**62)], ids=["1", "8", "64", "never"]
)
def test_calibration_uses_the_grouped_kernel_from_where_it_wins(
    monkeypatch: pytest.MonkeyPatch, grouped_wins_from: int, threshold: int
) -> None:
    used: list[str] = []
    experts = random_experts(torch.float32, 16, 8, 4)
    monkeypatch.setattr(experts, "forward_loop", lambda x, b: (used.append("loop"), x)[1])
    monkeypatch.setattr(experts, "forward_grouped", lambda x, b: (used.append("grouped"), x)[1])

    def time_of(function: Callable[[], Tensor]) -> float:
        pairs = len(function())
        return 1.0 if used[-1] == "loop" else (0.5 if pairs >= grouped_wins_from else 2.0)

    monkeypatch.setattr(layers, "_best_time_s", time_of)
    experts.calibrate()
    assert experts.grouped_from_pairs == threshold
    for pairs in (1, 8, 64, 512):
        experts.forward(torch.zeros(pairs, 16), np.array([0, 0, 0, 0, pairs], np.int32))
        assert used[-1] == ("grouped" if pairs >= threshold else "loop")


@pytest.mark.usefixtures("torch_experts")
def test_one_calibration_serves_all_layers(
    monkeypatch: pytest.MonkeyPatch, decoder_folders: dict[str, Path]
) -> None:
    measured: list[GatedExperts] = []

    def calibrate(self: GatedExperts) -> None:
        measured.append(self)
        self.grouped_from_pairs = 17

    monkeypatch.setattr(GatedExperts, "calibrate", calibrate)
    group = load(decoder_folders["olmoe"], (0, 3))
    assert measured == [group.layers[0]]
    assert [layer.grouped_from_pairs for layer in group.layers.values()] == [17, 17, 17]  # type: ignore[attr-defined]


# Custom experts.


def scale_experts(dtype: torch.dtype = torch.float32) -> list[ScaleExpert]:
    experts = [ScaleExpert(HIDDEN, shift=0.5) for _ in range(EXPERTS)]
    for number, expert in enumerate(experts):
        expert.scale.data.fill_(number + 1.0)
    return [expert.to(dtype) for expert in experts]


def test_custom_experts_are_built_by_import_path_and_summed(tmp_path: Path) -> None:
    folder = write_layer_model(
        tmp_path,
        torch.randn(EXPERTS, HIDDEN),
        scale_experts(),
        2,
        expert_kwargs={"hidden_size": HIDDEN, "shift": 0.5},
    )
    held = (5, 0, 2)
    group = load(folder, held)
    rows = random_rows(3)
    expected = reference(rows, lambda local, x: x * (held[local] + 1) + 0.5)
    torch.testing.assert_close(group.forward(0, rows).double(), expected, atol=1e-4, rtol=1e-4)
    # 16 float32 and the two int64 of a buffer, three times.
    assert group.weights_bytes == 3 * (HIDDEN * 4 + 2 * 8)


def test_custom_experts_compute_in_the_dtype_that_is_served(tmp_path: Path) -> None:
    kwargs = {"hidden_size": HIDDEN, "shift": 0.5}
    gate = torch.randn(EXPERTS, HIDDEN, dtype=torch.bfloat16)
    folder = write_layer_model(tmp_path, gate, scale_experts(torch.bfloat16), 2, expert_kwargs=kwargs)
    group = load(folder, (0, 1), torch.bfloat16)
    rows = random_rows(2)
    expected = reference(rows, lambda local, x: x * (local + 1) + 0.5)
    torch.testing.assert_close(group.forward(0, rows).double(), expected, atol=0.1, rtol=0.02)


def test_a_group_of_custom_experts_reads_its_own_only(tmp_path: Path) -> None:
    folder = write_layer_model(
        tmp_path, torch.randn(EXPERTS, HIDDEN), scale_experts(), 2, expert_kwargs={"hidden_size": HIDDEN}
    )
    checkpoint = ReadingCheckpoint(folder)
    ExpertGroup.load(checkpoint, read_spec(checkpoint).experts, (3, 1), torch.float32)
    assert {name.split(".")[1] for name in checkpoint.read_names} == {"1", "3"}
