"""Multi-head latent attention: what it caches, and what the checkpoint may hold besides it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from checkpoints import add_prediction_layer, make_checkpoint, reference_model
from pimoe.runtime.errors import CheckpointError, ConfigurationError
from pimoe.runtime.model.checkpoint import Checkpoint
from pimoe.runtime.model.decoder import Decoder, ForwardBatch, Segment
from pimoe.runtime.model.families import read_spec
from pimoe.runtime.model.spec import DecoderSpec, LatentSpec
from reference_experts import ReferenceExperts
from safetensors.torch import load_file, save_file


def load(folder: Path) -> tuple[Decoder, ReferenceExperts]:
    checkpoint = Checkpoint(folder)
    spec = read_spec(checkpoint)
    assert isinstance(spec, DecoderSpec)
    return Decoder.load(checkpoint, spec), ReferenceExperts(checkpoint, spec.experts)


@pytest.mark.parametrize("family", ["deepseek_v2", "deepseek_v3"])
def test_the_cache_holds_one_small_row_per_token(family: str, tmp_path: Path) -> None:
    decoder, _ = load(make_checkpoint(family, tmp_path))
    layout = decoder.kv_layout
    assert (layout.num_kv_heads, layout.key_dim, layout.value_dim) == (1, 20 + 8, 0)
    # Of whole keys and values it would be 4 heads of 20 and 10 numbers.
    assert decoder.new_cache(5, 16).bytes_per_block == 3 * 16 * 28 * 4


def test_layers_behind_the_last_are_not_read(tmp_path: Path) -> None:
    folder = make_checkpoint("deepseek_v3", tmp_path)
    before, _ = load(folder)
    add_prediction_layer(folder)
    decoder, _ = load(folder)
    assert decoder.weights_bytes == before.weights_bytes
    assert set(decoder.gates) == set(decoder.spec.experts.moe_layers) == {1, 2}


async def test_a_checkpoint_with_such_layers_computes_what_transformers_does(tmp_path: Path) -> None:
    folder = make_checkpoint("deepseek_v3", tmp_path)
    tokens = torch.arange(20) * 4
    with torch.no_grad():
        expected = reference_model(folder)(tokens[None]).logits[0]
    add_prediction_layer(folder)
    decoder, experts = load(folder)
    batch = ForwardBatch(tokens, (Segment((1, 2), 0, 20),), torch.arange(20))
    logits = await decoder.forward(batch, decoder.new_cache(2, 16), experts)
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)


def test_missing_projections_are_named(tmp_path: Path) -> None:
    folder = make_checkpoint("deepseek_v2", tmp_path)
    file, name = folder / "model.safetensors", "model.layers.2.self_attn.kv_b_proj.weight"
    tensors = load_file(file)
    save_file({**tensors, name: tensors[name][:-1].contiguous()}, file)
    with pytest.raises(CheckpointError, match=rf"'{name}' has shape \[87, 20\], expected \[88, 20\]"):
        load(folder)
    del tensors[name]
    save_file(tensors, file)
    with pytest.raises(CheckpointError, match=f"no tensor '{name}'"):
        load(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rope_dim": 7}, "rope_dim = 7; expected an even number"),
        ({"kv_rank": 0}, "kv_rank = 0; expected a number above 0"),
        ({"query_rank": 0}, "query_rank = 0"),
    ],
)
def test_latent_specs_are_checked_when_made(changes: dict[str, int], message: str) -> None:
    fields = {"kv_rank": 16, "query_rank": 8, "plain_dim": 4, "rope_dim": 4, "value_dim": 4, "interleaved": True}
    with pytest.raises(ConfigurationError, match=message):
        LatentSpec(**{**fields, **changes})  # type: ignore[arg-type]
