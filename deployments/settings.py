"""The application's settings, as they come from a Serve config's `args`, a YAML file or the command line.

Pydantic lives at this edge only: each section turns into the frozen dataclasses of the runtime, which check values
once more where they are used. Unknown keys are errors, so that a typing mistake never passes for a default.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, model_validator

from ..runtime.batching import CLASS_NAMES, BatchLimits, QueueLimits
from ..runtime.batching.classes import ClassName
from ..runtime.batching.limits import Order
from ..runtime.caching import CacheLimits, PrefetchLimits, RedisLevel, RedisLimits
from ..runtime.embedded import CHECKPOINT
from ..runtime.errors import ConfigurationError
from ..runtime.experts.options import ExpertOptions, Quantization
from ..runtime.generation.limits import EngineLimits
from ..runtime.generation.micro_batches import MicroBatching
from ..runtime.links import LinkLimits
from ..runtime.router.limits import RouterLimits
from .api.context import ApiSettings
from .api.modes import MODE_NAMES, Mode, Modes
from .api.prompt_cache import PromptCacheLimits

EMBEDDED_MODEL_NAME = "pimoe-embedded"

T = TypeVar("T")


def _made(kind: Callable[..., T], where: str, values: dict[str, Any]) -> T:
    """A frozen dataclass of the runtime from a free-form section.

    Raises:
        ConfigurationError: a key that it does not have, or a value that it refuses.
    """
    try:
        return kind(**values)
    except TypeError as error:
        raise ConfigurationError(f"{where}: {error}", where) from error


class _Section(BaseModel):
    # Errors name the field and not its value, which may be a secret.
    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)


class ReplicaSettings(_Section):
    """Where and how often a deployment runs. Everything else that Serve offers can be set in the Serve config's
    `deployments:` list under the deployment's name, and wins over this."""

    num_replicas: int = Field(default=1, ge=1)
    num_cpus: float = Field(default=1.0, ge=0)
    num_gpus: float = Field(default=0.0, ge=0)
    resources: dict[str, float] = Field(default_factory=dict)
    autoscaling: dict[str, Any] | None = None
    max_replicas_per_node: int | None = Field(default=None, ge=1)
    threads: int = Field(default=1, ge=1, description="torch threads of one replica")


class GroupSettings(ReplicaSettings):
    """One expert group; `experts` are global ids (None: an even share)."""

    experts: list[int] | None = None


class LinkSettings(_Section):
    """The data plane.

    Attributes:
        transport: "unix" (one machine), "tcp", or "both": Unix sockets within a node, TCP between nodes.
        secret: shared by all replicas; a fresh one for every `build` when empty, or from PIMOE_LINK_SECRET.
        tls_certificate, tls_key, tls_authority: PEM files for TLS on TCP links; mutual when all three are given.
        attempt_timeout_s: a dispatch without an answer for so long goes to a sibling replica.
    """

    transport: Literal["unix", "tcp", "both"] = "both"
    secret: str = ""
    tls_certificate: str | None = None
    tls_key: str | None = None
    tls_authority: str | None = None
    refresh_s: float = Field(default=1.0, gt=0)
    attempt_timeout_s: float = Field(default=30.0, gt=0)
    limits: dict[str, float] = Field(default_factory=dict)

    def to_limits(self) -> LinkLimits:
        """The runtime's limits.

        Raises:
            ConfigurationError: an unknown limit, or a wrong one.
        """
        return _made(LinkLimits, "links.limits", self.limits)


class BatchSettings(_Section):
    """See `BatchLimits`."""

    max_batch_tokens: int = 4096
    max_wait_s: float = 0.005
    max_in_flight: int = 2
    max_patience_s: float = 1.0
    service_margin_s: float = 0.0
    min_batch_tokens: int = 1

    def to_limits(self) -> BatchLimits:
        """The runtime's limits."""
        return BatchLimits(**self.model_dump())


class QueueSettings(_Section):
    """See `QueueLimits`; `class_shares` names the classes that shall differ from the default."""

    max_tokens: int = 262_144
    max_items: int = 8192
    retry_after_s: float = 1.0
    class_shares: dict[ClassName, float] = Field(default_factory=dict)
    target_delay_s: float = 2.0
    standing_s: float = 1.0
    min_share: float = 1 / 16
    order: Order = "priority"

    def to_limits(self) -> QueueLimits:
        """The runtime's limits."""
        shares = dict(zip(CLASS_NAMES, QueueLimits().class_shares, strict=True)) | self.class_shares
        values = self.model_dump(exclude={"class_shares"})
        return QueueLimits(class_shares=tuple(shares.values()), **values)


class EngineSettings(_Section):
    """See `EngineLimits`."""

    max_sequences: int = 32
    max_step_tokens: int = 512
    max_context_tokens: int | None = None
    block_tokens: int = 16
    kv_blocks: int | None = None
    kv_memory_fraction: float = 0.25
    reuse_prefixes: bool = True
    micro_batches: MicroBatching = "auto"
    drain_s: float = 20.0

    def to_limits(self) -> EngineLimits:
        """The runtime's limits."""
        return EngineLimits(**self.model_dump())


class RouterSettings(ReplicaSettings):
    """The router's replicas and bounds. `per_expert_metrics` shows how many tokens each single expert was given,
    which tells something of prompts; without it only groups and the imbalance are shown."""

    batching: BatchSettings = Field(default_factory=BatchSettings)
    queue: QueueSettings = Field(default_factory=QueueSettings)
    engine: EngineSettings = Field(default_factory=EngineSettings)
    per_expert_metrics: bool = False

    def to_limits(self) -> RouterLimits:
        """The runtime's limits."""
        limits = self.batching.to_limits(), self.queue.to_limits(), self.engine.to_limits()
        return RouterLimits(*limits, self.per_expert_metrics)


class SecondLevelSettings(_Section):
    """See `RedisLimits`. The key for encryption may come from PIMOE_CACHE_KEY instead."""

    url: str = Field(repr=False)
    namespace: str = "pimoe"
    ttl_s: float = 86_400.0
    lookup_timeout_s: float = 0.05
    command_timeout_s: float = 1.0
    max_connections: int = 16
    max_entry_bytes: int = 16 * 2**20
    max_pending_entries: int = 1024
    max_pending_bytes: int = 64 * 2**20
    compression: Literal["none", "zstd"] = "zstd"
    encryption_key: str = Field(default="", repr=False)
    breaker_failures: int = 5
    breaker_retry_s: float = 1.0

    def to_limits(self) -> RedisLimits:
        """The runtime's limits.

        Raises:
            ConfigurationError: a value is wrong; neither URL nor key are shown.
        """
        key = self.encryption_key or os.environ.get("PIMOE_CACHE_KEY", "")
        return RedisLimits(**{**self.model_dump(), "encryption_key": key})


class CacheSettings(_Section):
    """See `CacheLimits`; `max_bytes: 0` switches the cache off, its second level included.

    Attributes:
        share_tenants: give what was computed for one tenant to others, its request id included.
        second_level: a Redis or Valkey that gateways share; None: each has its memory only.
        prefetch: see `PrefetchLimits`; off unless `enabled` is true.
    """

    max_bytes: int = 256 * 2**20
    max_entry_bytes: int = 16 * 2**20
    ttl_s: float = 3600.0
    policy: str = "lru"
    min_bytes: int | None = None
    share_tenants: bool = False
    second_level: SecondLevelSettings | None = None
    prefetch: dict[str, bool | int | float] = Field(default_factory=dict)

    def live(self) -> dict[str, Any]:
        """What may change while serving, as plain values; no secret among them."""
        return self.model_dump(exclude={"share_tenants", "second_level"})

    def to_limits(self) -> CacheLimits:
        """The runtime's limits."""
        return CacheLimits(**self.model_dump(exclude={"share_tenants", "second_level", "prefetch"}))

    def to_prefetch(self) -> PrefetchLimits:
        """The runtime's limits. Raises: ConfigurationError."""
        return _made(PrefetchLimits, "gateway.cache.prefetch", self.prefetch)

    def to_second_level(self) -> RedisLimits | None:
        """The runtime's limits of the second level.

        Raises:
            ConfigurationError: a value is wrong, or a package that it needs is not installed.
        """
        if self.second_level is None:
            return None
        limits = self.second_level.to_limits()
        RedisLevel(limits)  # says what is missing; it connects when it is asked
        return limits


class PromptCacheSettings(_Section):
    """See `PromptCacheLimits`."""

    max_entries: int = 4096
    max_bytes: int = 32 * 2**20

    def to_limits(self) -> PromptCacheLimits:
        """The HTTP layer's limits."""
        return PromptCacheLimits(**self.model_dump())


class ModesSettings(_Section):
    """What shall differ from the presets of each mode: see `Mode` and the table in `api/modes.py`."""

    accuracy: dict[str, bool | int | float] = Field(default_factory=dict)
    speed: dict[str, bool | int | float] = Field(default_factory=dict)
    ultra: dict[str, bool | int | float] = Field(default_factory=dict)

    def to_modes(self) -> Modes:
        """The presets.

        Raises:
            ConfigurationError: an unknown setting of a mode, or a wrong one.
        """
        known = Modes()
        return Modes(**{name: self._mode(name, known.named(name)) for name in MODE_NAMES})

    def _mode(self, name: str, preset: Mode) -> Mode:
        return _made(partial(replace, preset), f"gateway.modes.{name}", getattr(self, name))


class GatewaySettings(ReplicaSettings):
    """The gateway's replicas, its caches, its modes, and the limits of requests (see `ApiSettings`; its
    `default_mode` is the mode of requests that name none)."""

    cache: CacheSettings = Field(default_factory=CacheSettings)
    prompt_cache: PromptCacheSettings = Field(default_factory=PromptCacheSettings)
    modes: ModesSettings = Field(default_factory=ModesSettings)
    api: dict[str, float | int | str | None] = Field(default_factory=dict)

    def to_api(self) -> ApiSettings:
        """The HTTP layer's settings.

        Raises:
            ConfigurationError: an unknown setting, or a wrong one.
        """
        if "modes" in self.api:
            raise ConfigurationError("gateway.api.modes: the modes are the section gateway.modes", "gateway.api")
        return _made(partial(ApiSettings, modes=self.modes.to_modes()), "gateway.api", self.api)


class AppSettings(_Section):
    """Everything `pimoe.deployments.app:build` takes.

    Attributes:
        model: folder of a checkpoint, at the same path on every node; None: the embedded model.
        name: what requests call the model; the folder's name by default.
        dtype: float32, bfloat16, float16; the checkpoint's own by default.
        batch_invariant: whether a token's numbers are the same to the bit whatever else is computed with it.
            Slower; load_tests/engine_switches.py says by how much.
        expert_quantization: "int8" rounds the experts' weights to 8 bits; see `ExpertOptions`.
        groups: how many expert groups, or one entry for each.
        group_defaults: settings of the groups when `groups` is a number.
        health_check_period_s: how soon a dead replica is noticed and replaced.
    """

    model: str | None = None
    name: str | None = None
    dtype: str | None = None
    device: str = "auto"
    batch_invariant: bool = False
    expert_quantization: Quantization | None = None
    groups: int | list[GroupSettings] = 2
    group_defaults: GroupSettings = Field(default_factory=GroupSettings)
    router: RouterSettings = Field(default_factory=RouterSettings)
    gateway: GatewaySettings = Field(default_factory=GatewaySettings)
    links: LinkSettings = Field(default_factory=LinkSettings)
    health_check_period_s: float = Field(default=1.0, gt=0)
    health_check_timeout_s: float = Field(default=10.0, gt=0)

    def expert_options(self) -> ExpertOptions:
        """How the groups compute."""
        return ExpertOptions(self.batch_invariant, self.expert_quantization)

    @model_validator(mode="after")
    def _check_limits(self) -> Self:
        """The runtime checks its limits when they are made: make them now, before anything is started."""
        self.links.to_limits()
        self.router.to_limits()
        self.gateway.to_api()
        self.gateway.prompt_cache.to_limits()
        self.gateway.cache.to_limits()
        self.gateway.cache.to_second_level()
        self.gateway.cache.to_prefetch()
        return self

    @property
    def folder(self) -> Path:
        """The checkpoint's folder."""
        return CHECKPOINT if self.model is None else Path(self.model).expanduser()

    @property
    def served_name(self) -> str:
        """What requests call the model."""
        if self.name:
            return self.name
        return EMBEDDED_MODEL_NAME if self.model is None else self.folder.resolve().name

    def group_settings(self) -> list[GroupSettings]:
        """One entry per expert group."""
        if isinstance(self.groups, int):
            return [self.group_defaults] * self.groups
        return self.groups

    def link_secret(self, fresh: str) -> str:
        """The configured secret, the environment's, or `fresh`."""
        return self.links.secret or os.environ.get("PIMOE_LINK_SECRET", "") or fresh
