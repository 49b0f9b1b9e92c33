"""What would run where: `pimoe plan`, `pimoe build`, and the check of a checkpoint before anything starts."""

from __future__ import annotations

import math
from typing import Any

from rich.table import Table

from ..runtime.errors import CheckpointError
from ..runtime.model.checkpoint import Checkpoint
from ..runtime.model.families import read_spec
from ..runtime.model.loading import serving_dtype
from ..runtime.model.spec import DecoderSpec, ExpertSpec, ModelSpec
from ..runtime.model.tokenizer import Tokenizer
from ..runtime.requests import DTYPE_BYTES
from .app import plan_groups
from .cluster import APP_NAME, required_resources
from .settings import AppSettings


def check_checkpoint(settings: AppSettings) -> None:
    """Open the checkpoint and look for every expert's tensors, by their headers only.

    Raises:
        CheckpointError: something is missing or has the wrong shape; names file and tensor.
        UnknownFamilyError, ConfigurationError.
    """
    checkpoint = Checkpoint(settings.folder)
    spec = read_spec(checkpoint)
    serving_dtype(spec, settings.dtype)
    plan_groups(settings)
    Tokenizer.load(settings.folder)
    for layer in spec.experts.moe_layers:
        for name, shape in spec.experts.stored_shapes(layer).items():
            if checkpoint.shape(name) != shape:
                found = list(checkpoint.shape(name))
                raise CheckpointError(f"{settings.folder}: tensor {name} is {found}, not {list(shape)}")


def _expert_bytes(checkpoint: Checkpoint, spec: ExpertSpec, number_bytes: int, experts: tuple[int, ...]) -> int:
    numbers = len(spec.moe_layers) * len(experts) * spec.parameters_per_expert
    if spec.custom_class is not None:
        prefixes = tuple(spec.prefix(layer, expert) for layer in spec.moe_layers for expert in experts)
        numbers = sum(math.prod(checkpoint.shape(name)) for name in checkpoint.names if name.startswith(prefixes))
    return numbers * number_bytes


def _trunk_bytes(checkpoint: Checkpoint, spec: ModelSpec, dtype: str) -> int:
    """Of everything else; what lies behind the last layer, to predict further tokens, is not read."""
    layers, experts = spec.experts.moe_layers, set[str]()
    for layer in layers:
        experts |= spec.experts.stored_shapes(layer).keys()
    skipped = [
        spec.experts.prefix(layer, expert) for layer in layers for expert in range(spec.experts.num_experts)
    ]
    if isinstance(spec, DecoderSpec):
        skipped = [f"model.layers.{spec.num_layers}."]
    names = [name for name in checkpoint.names if name not in experts and not name.startswith(tuple(skipped))]
    return sum(math.prod(checkpoint.shape(name)) for name in names) * DTYPE_BYTES[dtype]


def plan_table(settings: AppSettings) -> Table:
    """Deployments with replicas, experts, memory of weights and resources.

    Raises: as `check_checkpoint`.
    """
    check_checkpoint(settings)
    checkpoint = Checkpoint(settings.folder)
    spec = read_spec(checkpoint)
    dtype = serving_dtype(spec, settings.dtype)
    title = f"{settings.served_name}: {spec.family}, {dtype}, {len(spec.experts.moe_layers)} MoE layers"
    table = Table(title=title, title_justify="left")
    for column in ("deployment", "replicas", "holds", "weights each", "CPU each", "GPU each"):
        table.add_column(column, justify="left" if column in ("deployment", "holds") else "right")
    table.add_row("gateway", *_copies(settings.gateway), "result cache", "", *_resources(settings.gateway))
    held = f"trunk and gates, {_kv_text(settings, spec, dtype)}"
    trunk_bytes = _human(_trunk_bytes(checkpoint, spec, dtype))
    expert_number_bytes = 1 if settings.expert_quantization == "int8" else DTYPE_BYTES[dtype]
    table.add_row("router", *_copies(settings.router), held, trunk_bytes, *_resources(settings.router))
    for name, experts, group in plan_groups(settings):
        weights = _human(_expert_bytes(checkpoint, spec.experts, expert_number_bytes, experts))
        table.add_row(
            name, *_copies(group), f"{len(experts)} experts: {_ranges(experts)}", weights, *_resources(group)
        )
    needed = ", ".join(f"{amount:g} {kind}" for kind, amount in required_resources(settings).items())
    table.caption = f"together: {needed}"
    return table


def _copies(settings: Any) -> tuple[str]:
    return (str(settings.num_replicas) if settings.autoscaling is None else "auto",)


def _resources(settings: Any) -> tuple[str, str]:
    return f"{settings.num_cpus:g}", f"{settings.num_gpus:g}"


def _kv_text(settings: AppSettings, spec: ModelSpec, dtype: str) -> str:
    if not isinstance(spec, DecoderSpec):
        return "no KV cache"
    engine = settings.router.engine
    context = min(engine.max_context_tokens or spec.max_context_tokens, spec.max_context_tokens)
    width = spec.cached_heads * (spec.cached_key_dim + spec.cached_value_dim)
    per_token = spec.num_layers * width * DTYPE_BYTES[dtype]
    return f"KV cache of up to {_human(engine.max_sequences * context * per_token)}"


def _ranges(experts: tuple[int, ...]) -> str:
    ordered = sorted(experts)
    if ordered == list(range(ordered[0], ordered[-1] + 1)):
        return f"{ordered[0]} to {ordered[-1]}" if len(ordered) > 1 else str(ordered[0])
    return " ".join(map(str, ordered))


def _human(size_bytes: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size_bytes < 1024 or unit == "GiB":
            return f"{size_bytes:.1f} {unit}" if unit != "B" else f"{size_bytes:.0f} B"
        size_bytes /= 1024
    raise AssertionError("unreachable")


def serve_config(settings: AppSettings, host: str, port: int) -> dict[str, Any]:
    """A Serve config of the application, every deployment listed so that it can be scaled by editing a number."""
    application = {
        "name": APP_NAME,
        "route_prefix": "/",
        "import_path": "pimoe.deployments.app:build",
        "args": settings.model_dump(mode="json", exclude_none=True),
        "deployments": [
            {"name": name, "num_replicas": part.num_replicas}
            for name, part in [
                ("gateway", settings.gateway),
                ("router", settings.router),
                *((name, group) for name, _, group in plan_groups(settings)),
            ]
            if part.autoscaling is None
        ],
    }
    return {
        "http_options": {"host": host, "port": port},
        "logging_config": {"enable_access_log": False},
        "applications": [application],
    }
