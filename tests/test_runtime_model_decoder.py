"""The decoder trunk against transformers, on small random checkpoints of every family."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from checkpoints import FAMILIES, NATIVE_SIZES, as_old_spelling, make_checkpoint, reference_model
from pimoe.runtime.model.checkpoint import Checkpoint
from pimoe.runtime.model.decoder import Decoder, ForwardBatch, Segment
from pimoe.runtime.model.families import read_spec
from pimoe.runtime.model.spec import DecoderSpec
from pimoe.runtime.routing.strategies import Routing
from reference_experts import ReferenceExperts
from torch import Tensor

YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
# name -> (family, overrides of the config)
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    **{family: (family, {}) for family in FAMILIES},
    "qwen3 tied": ("qwen3_moe", {"tie_word_embeddings": True}),
    "qwen3 not renormalized": ("qwen3_moe", {"norm_topk_prob": False}),
    "qwen3 attention bias": ("qwen3_moe", {"attention_bias": True}),
    "qwen3 dense by list": ("qwen3_moe", {"mlp_only_layers": [0, 2]}),
    "qwen3 dense by step": ("qwen3_moe", {"decoder_sparse_step": 2}),
    "qwen3 dense last": ("qwen3_moe", {"mlp_only_layers": [2]}),
    "qwen3 sliding": ("qwen3_moe", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 0}),
    "qwen3 linear rope": (
        "qwen3_moe",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 3.0}},
    ),
    "qwen3 yarn": ("qwen3_moe", {"rope_parameters": YARN}),
    "qwen3 llama3 rope": ("qwen3_moe", {"rope_parameters": LLAMA3}),
    "qwen3 gelu": ("qwen3_moe", {"hidden_act": "gelu_pytorch_tanh"}),
    "qwen2 without bias": ("qwen2_moe", {"qkv_bias": False}),
    "qwen2 dense by list": ("qwen2_moe", {"mlp_only_layers": [1]}),
    "qwen2 sliding by depth": (
        "qwen2_moe",
        {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 2},
    ),
    "qwen2 sliding by type": (
        "qwen2_moe",
        {
            "use_sliding_window": True,
            "sliding_window": 4,
            "layer_types": ["full_attention", "sliding_attention", "sliding_attention"],
        },
    ),
    "mixtral sliding": ("mixtral", {"sliding_window": 7}),
    "mixtral one kv head": ("mixtral", {"num_key_value_heads": 1, "head_dim": 8}),
    "olmoe clipped": ("olmoe", {"clip_qkv": 0.7}),
    "olmoe all kv heads": ("olmoe", {"num_key_value_heads": 4, "norm_topk_prob": True}),
    "deepseek v2 without query rank": ("deepseek_v2", {"q_lora_rank": None}),
    "deepseek v2 by groups": (
        "deepseek_v2",
        {"topk_method": "group_limited_greedy", "n_group": 3, "topk_group": 2, "num_experts_per_tok": 3},
    ),
    "deepseek v2 without dense layers": ("deepseek_v2", {"first_k_dense_replace": 0, "rms_norm_eps": 0.03}),
    "deepseek v2 yarn": (
        "deepseek_v2",
        {"rope_parameters": {**YARN, "mscale": 0.707, "mscale_all_dim": 0.707}, "attention_bias": True},
    ),
    "deepseek v2 tied": ("deepseek_v2", {"tie_word_embeddings": True, "hidden_act": "gelu"}),
    "deepseek v3 without query rank": ("deepseek_v3", {"q_lora_rank": None, "attention_bias": True}),
    "deepseek v3 ungrouped": ("deepseek_v3", {"n_group": 1, "topk_group": 1, "num_experts_per_tok": 4}),
    "deepseek v3 one group of two": ("deepseek_v3", {"n_group": 2, "topk_group": 1, "num_experts_per_tok": 3}),
    "deepseek v3 not renormalized": ("deepseek_v3", {"norm_topk_prob": False}),
    "deepseek v3 half rotation": ("deepseek_v3", {"rope_interleave": False}),
    "deepseek v3 yarn": (
        "deepseek_v3",
        {"rope_parameters": {**YARN, "mscale": 1.0, "mscale_all_dim": 0.5}, "first_k_dense_replace": 2},
    ),
    "deepseek v3 tied, biased": ("deepseek_v3", {"tie_word_embeddings": True, "attention_bias": True}),
    "gpt-oss by type": (
        "gpt_oss",
        {"layer_types": ["full_attention", "sliding_attention", "full_attention"], "sliding_window": 3},
    ),
    "gpt-oss default rope": ("gpt_oss", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}),
    "gpt-oss all kv heads": ("gpt_oss", {"num_key_value_heads": 4, "tie_word_embeddings": True}),
    "gpt-oss without attention bias": ("gpt_oss", {"attention_bias": False, "swiglu_limit": 7.0}),
}
NATIVE = {
    f"{name}, native": (family, {**NATIVE_SIZES, **overrides, "head_dim": 32})
    for name, (family, overrides) in VARIANTS.items()
    if not family.startswith("deepseek")
}


class Model(NamedTuple):
    """One checkpoint, twice."""

    decoder: Decoder
    experts: ReferenceExperts
    reference: Callable[[list[int]], Tensor]  # token ids -> logits [tokens, vocab]


def load(folder: Path, dtype: torch.dtype = torch.float32) -> Model:
    checkpoint = Checkpoint(folder)
    spec = read_spec(checkpoint)
    assert isinstance(spec, DecoderSpec)
    experts = ReferenceExperts(checkpoint, spec.experts, dtype)
    transformers_model = reference_model(folder, dtype=dtype)

    def reference(tokens: list[int]) -> Tensor:
        with torch.no_grad():
            logits: Tensor = transformers_model(torch.tensor([tokens])).logits[0].float()
        return logits

    return Model(Decoder.load(checkpoint, spec, dtype), experts, reference)


@pytest.fixture(scope="module", params=[*VARIANTS, *NATIVE])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Model:
    family, overrides = {**VARIANTS, **NATIVE}[request.param]
    return load(make_checkpoint(family, tmp_path_factory.mktemp("checkpoint"), **overrides))


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return load(make_checkpoint("qwen3_moe", tmp_path_factory.mktemp("checkpoint")))


def random_tokens(count: int, seed: int = 0, vocab: int = 96) -> list[int]:
    return torch.randint(0, vocab, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


class PagedCache:
    """A cache for some sequences of some length, whose blocks lie interleaved, or (`in_a_row`) side by side."""

    def __init__(self, model: Model, sequences: int, tokens: int, in_a_row: bool = False) -> None:
        self.block_tokens = 4
        blocks = -(-tokens // self.block_tokens)
        self.cache = model.decoder.new_cache(sequences * blocks, self.block_tokens)
        ids = torch.arange(1, sequences * blocks + 1)
        self.tables = (ids.view(sequences, blocks) if in_a_row else ids.view(blocks, sequences).T).tolist()
        self._next = 0

    def allocate(self) -> int:
        """The next sequence."""
        self._next += 1
        return self._next - 1


async def run(
    model: Model, cache: PagedCache, parts: list[tuple[int, int, list[int]]], rows: Tensor | None = None
) -> Tensor:
    """One forward of (slot, start, new tokens) parts."""
    token_ids = torch.tensor([token for _, _, tokens in parts for token in tokens])
    segments = tuple(Segment(cache.tables[slot], start, len(tokens)) for slot, start, tokens in parts)
    return await model.decoder.forward(ForwardBatch(token_ids, segments, rows), cache.cache, model.experts)


def assert_close(actual: Tensor, expected: Tensor, tolerance: float = 1e-4) -> None:
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=0)


async def test_ragged_prefill_gives_the_reference_logits_of_every_token(model: Model) -> None:
    prompts = [random_tokens(count, seed=count) for count in (13, 1, 30, 2)]
    cache = PagedCache(model, 4, 64)
    parts = [(cache.allocate(), 0, prompt) for prompt in prompts]
    rows = torch.arange(sum(map(len, prompts)))
    logits = await run(model, cache, parts, rows)
    assert logits.dtype is torch.float32
    assert_close(logits, torch.cat([model.reference(prompt) for prompt in prompts]))


async def test_decode_mixed_with_arriving_and_chunked_prefill(model: Model) -> None:
    """A life of four sequences: two prefill, decode together; a third arrives during a decode step; a fourth comes
    in chunks while the others decode; every step's last-row logits match the reference on the full sequence."""
    sequences = [random_tokens(count, seed=100 + count) for count in (34, 20, 17, 33)]
    cache = PagedCache(model, 8, 64)
    slots = [cache.allocate() for _ in sequences]
    done = [0, 0, 0, 0]
    steps = [
        {0: 9, 1: 4},
        {0: 1, 1: 1},
        {2: 7, 1: 1, 0: 1},
        {0: 1, 3: 11, 2: 1},
        {3: 12, 0: 1, 1: 1, 2: 1},
        {2: 1, 3: 1, 0: 1, 1: 1},
        {3: 1, 0: 1},
        {1: 1, 3: 5, 0: 2},
        {0: 1, 1: 1, 2: 1, 3: 1},
    ]
    for step in steps:
        parts = [(slots[i], done[i], sequences[i][done[i] : done[i] + count]) for i, count in step.items()]
        logits = await run(model, cache, parts)
        for i, count in step.items():
            done[i] += count
        assert_close(logits, torch.stack([model.reference(sequences[i][: done[i]])[-1] for i in step]))


async def test_sixty_four_greedy_tokens_equal_the_reference(model: Model) -> None:
    prompt = random_tokens(6, seed=7)
    cache = PagedCache(model, 1, 80)
    slot, expected, start, new = cache.allocate(), list(prompt), 0, list(prompt)
    generated: list[int] = []
    for _ in range(64):
        logits = await run(model, cache, [(slot, start, new)])
        start, new = start + len(new), [int(logits[0].argmax())]
        generated += new
        expected.append(int(model.reference(expected)[-1].argmax()))
    assert generated == expected[len(prompt) :]
    assert len(set(generated)) > 3, "the random model repeats itself too soon to prove anything"


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("rope", [{}, {"rope_parameters": LLAMA3}], ids=["default", "llama3"])
async def test_old_config_spelling_and_shards(family: str, rope: dict[str, Any], tmp_path: Path) -> None:
    folder = make_checkpoint(family, tmp_path, max_shard_size="60KB", **rope)
    assert len(list(folder.glob("*.safetensors"))) > 1
    new = read_spec(Checkpoint(folder))
    as_old_spelling(folder)
    assert read_spec(Checkpoint(folder)) == new
    model, prompt = load(folder), random_tokens(20)
    cache = PagedCache(model, 1, 32)
    logits = await run(model, cache, [(cache.allocate(), 0, prompt)], torch.arange(20))
    assert_close(logits, model.reference(prompt))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("variant", [*FAMILIES, "olmoe all kv heads", "qwen3 tied"])
async def test_half_precision_stays_near_the_reference(variant: str, dtype: torch.dtype, tmp_path: Path) -> None:
    family, overrides = VARIANTS[variant]
    name = str(dtype).removeprefix("torch.")
    folder = make_checkpoint(family, tmp_path, dtype=name, initial_std=0.1, **overrides)
    model, exact, tokens = load(folder, dtype), load(folder), random_tokens(24)
    assert model.decoder.dtype is dtype
    cache = PagedCache(model, 1, 32)
    slot = cache.allocate()
    logits = [await run(model, cache, [(slot, 0, tokens[:12])], torch.arange(12))]
    logits += [await run(model, cache, [(slot, start, [tokens[start]])]) for start in range(12, 24)]
    truth = exact.reference(tokens)
    # Both round along the way, differently; ours must not be further from float32 than theirs is. The median of
    # the tokens: where rounding makes one choose another expert is chance.
    ours = (torch.cat(logits) - truth).abs().mean(-1).median()
    theirs = (model.reference(tokens) - truth).abs().mean(-1).median()
    assert ours < 1.3 * theirs


@pytest.mark.parametrize("slots", [[0, 1, 2], [2, 0, 1], [0, 2, 3], [7, 0], [3, 7, 5]])
async def test_decode_of_any_set_of_sequences(plain: Model, slots: list[int]) -> None:
    cache = PagedCache(plain, 8, 64)
    for _ in range(8):
        cache.allocate()
    prompts = {slot: random_tokens(5 + 3 * slot, seed=slot) for slot in slots}
    await run(plain, cache, [(slot, 0, prompt[:-1]) for slot, prompt in prompts.items()])
    logits = await run(plain, cache, [(slot, len(p) - 1, p[-1:]) for slot, p in prompts.items()])
    assert_close(logits, torch.stack([plain.reference(prompt)[-1] for prompt in prompts.values()]))


async def test_output_does_not_depend_on_the_rest_of_the_batch(plain: Model) -> None:
    prompt, others = random_tokens(9, seed=1), [random_tokens(n, seed=n) for n in (3, 21)]
    cache = PagedCache(plain, 3, 64)
    slots = [cache.allocate() for _ in range(3)]
    alone = await run(plain, cache, [(slots[0], 0, prompt)])
    among = await run(plain, cache, [(slots[1], 0, others[0]), (slots[0], 0, prompt), (slots[2], 0, others[1])])
    assert_close(among[1:2], alone, 1e-5)


async def test_a_chunk_that_wants_no_logits_skips_the_last_experts(plain: Model) -> None:
    prompt = random_tokens(12, seed=3)
    cache = PagedCache(plain, 1, 32)
    slot = cache.allocate()
    plain.experts.calls.clear()
    logits = await run(plain, cache, [(slot, 0, prompt[:8])], torch.empty(0, dtype=torch.int64))
    assert logits.shape == (0, 96)
    assert plain.experts.calls == [(0, 8), (1, 8)]
    plain.experts.calls.clear()
    logits = await run(plain, cache, [(slot, 8, prompt[8:])])
    assert plain.experts.calls == [(0, 4), (1, 4), (2, 1)]
    assert_close(logits[0], plain.reference(prompt)[-1])


async def test_a_failed_forward_may_be_repeated(plain: Model) -> None:
    prompt = random_tokens(10, seed=4)
    cache = PagedCache(plain, 1, 32)
    slot = cache.allocate()
    await run(plain, cache, [(slot, 0, prompt[:6])])

    async def failing(layer: int, hidden: Tensor, routing: Routing) -> Tensor:
        if layer == 1:
            raise ConnectionError("the group died")
        return await plain.experts(layer, hidden, routing)

    batch = ForwardBatch(torch.tensor(prompt[6:]), (Segment(cache.tables[slot], 6, 4),))
    with pytest.raises(ConnectionError):
        await plain.decoder.forward(batch, cache.cache, failing)
    logits = await plain.decoder.forward(batch, cache.cache, plain.experts)
    assert_close(logits[0], plain.reference(prompt)[-1])


async def test_the_dispatch_starts_before_the_shared_expert_computes(tmp_path: Path) -> None:
    model = load(make_checkpoint("qwen2_moe", tmp_path))
    order: list[str] = []
    shared = model.decoder._layers[0].shared
    assert shared is not None
    network = shared.network

    def recorded(hidden: Tensor) -> Tensor:
        order.append("shared")
        return network(hidden)

    async def experts(layer: int, hidden: Tensor, routing: Routing) -> Tensor:
        order.append("sent")
        await asyncio.sleep(0)
        order.append("answered")
        return await model.experts(layer, hidden, routing)

    shared.network = recorded  # type: ignore[assignment]
    cache = PagedCache(model, 1, 32)
    await model.decoder.forward(
        ForwardBatch(torch.tensor([1]), (Segment(cache.tables[0], 0, 1),)), cache.cache, experts
    )
    assert order[:3] == ["sent", "shared", "answered"]


async def test_cancelling_a_forward_cancels_its_dispatch(tmp_path: Path) -> None:
    model = load(make_checkpoint("qwen2_moe", tmp_path))
    sent, cancelled = asyncio.Event(), asyncio.Event()

    async def experts(layer: int, hidden: Tensor, routing: Routing) -> Tensor:
        sent.set()
        try:
            await asyncio.get_running_loop().create_future()
            return hidden
        finally:
            cancelled.set()

    cache = PagedCache(model, 1, 32)
    batch = ForwardBatch(torch.tensor([1]), (Segment(cache.tables[0], 0, 1),))
    forward = asyncio.ensure_future(model.decoder.forward(batch, cache.cache, experts))
    await sent.wait()
    forward.cancel()
    with pytest.raises(asyncio.CancelledError):
        await forward
    await cancelled.wait()


@pytest.mark.parametrize("in_a_row", [True, False])
async def test_blocks_in_a_row_are_read_like_any_others(model: Model, in_a_row: bool) -> None:
    prompt = random_tokens(30, seed=5)
    cache = PagedCache(model, 2, 40, in_a_row)
    slot = cache.allocate()
    for start, stop in ((0, 11), (11, 19), (19, 20), (20, 29), (29, 30)):
        logits = await run(model, cache, [(slot, start, prompt[start:stop])])
        assert_close(logits[0], model.reference(prompt[:stop])[-1])


async def test_a_sequence_cannot_outgrow_its_blocks(plain: Model) -> None:
    cache = PagedCache(plain, 1, 16)
    slot = cache.allocate()
    with pytest.raises(IndexError):
        await run(plain, cache, [(slot, 16, random_tokens(1))])
