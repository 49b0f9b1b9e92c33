"""Model families: how the `config.json` of each becomes a spec.

To add one:

1. Write a module here with `read(source: FamilyInput) -> DecoderSpec`: `common_fields` reads what all share; name
   the experts' tensors in an `ExpertSpec` (one set per expert, or stacked), and set what differs from the
   siblings: the gate (`GateSpec`), norms, biases, windows, sinks, latent attention, shared and dense layers. What
   a config may say and would change numbers, and is not read, must be refused (`ConfigFields.refuse`).
2. Add it to `FAMILIES` under its `model_type`.
3. Add it to `tests/checkpoints.py`, which puts it through every parity test against transformers, and each switch
   of its config to `VARIANTS` in `tests/test_runtime_model_decoder.py`.

Nothing outside this folder knows a family's name. A numeric feature that the trunk lacks is first built behind a
field of the spec: attention in `attention` or a sibling of it (as `latent_attention` is), gates in
`runtime/routing`, kinds of experts in `runtime/experts/layers`; until then the family must refuse it with a
ConfigurationError.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from ...errors import UnknownFamilyError
from ..checkpoint import Checkpoint
from ..config_fields import ConfigFields
from ..spec import DTYPES, ModelSpec
from . import deepseek, gpt_oss, layer, mixtral, olmoe, qwen2_moe, qwen3_moe
from .common import FamilyInput

FAMILIES: Mapping[str, Callable[[FamilyInput], ModelSpec]] = {
    "deepseek_v2": deepseek.read_v2,
    "deepseek_v3": deepseek.read_v3,
    "gpt_oss": gpt_oss.read,
    "mixtral": mixtral.read,
    "olmoe": olmoe.read,
    "pimoe_layer": layer.read,
    "qwen2_moe": qwen2_moe.read,
    "qwen3_moe": qwen3_moe.read,
}


def read_spec(checkpoint: Checkpoint) -> ModelSpec:
    """What the checkpoint needs, from its config.json and generation_config.json.

    Raises:
        UnknownFamilyError: `model_type` is not in `FAMILIES`.
        ConfigurationError: a field is missing, malformed, or would change numbers and is not implemented.
        CheckpointError: generation_config.json is no JSON object.
    """
    config = ConfigFields(checkpoint.config, str(checkpoint.folder / "config.json"))
    family = config.text("model_type")
    if family not in FAMILIES:
        known = ", ".join(sorted(FAMILIES))
        raise UnknownFamilyError(f"{config.source}: unknown model_type {family!r}; known: {known}", "model_type")
    generation = checkpoint.optional_json("generation_config.json") or {}
    generation_fields = ConfigFields(generation, str(checkpoint.folder / "generation_config.json"))
    return FAMILIES[family](FamilyInput(config, generation_fields, _stored_dtype(checkpoint)))


def _stored_dtype(checkpoint: Checkpoint) -> str:
    """The dtype of the first tensor that is stored in one to compute in; families look only where the config names
    none."""
    stored = (str(checkpoint.dtype(name)).removeprefix("torch.") for name in checkpoint.names)
    return next((dtype for dtype in stored if dtype in DTYPES), "float32")
