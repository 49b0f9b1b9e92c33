"""`build(settings) -> Application`: the import path of every Serve config, `pimoe.deployments.app:build`."""

from __future__ import annotations

from typing import Any, cast

from ray import serve
from ray.serve import Application

from ..runtime.errors import ConfigurationError
from ..runtime.links.authentication import new_secret
from ..runtime.model.checkpoint import Checkpoint
from ..runtime.model.families import read_spec
from ..runtime.model.loading import serving_dtype
from ..runtime.routing.plan import Placement, contiguous_placement
from . import direct
from .autoscaling import with_default_policy
from .expert_group import ExpertGroupReplica, GroupConfig
from .gateway import GatewayConfig, GatewayReplica
from .replica import LinkConfig
from .router import RouterConfig, RouterReplica
from .settings import AppSettings, GroupSettings, ReplicaSettings

_MANY = 100_000  # Serve's own queues are FIFO and must never be the ones that wait: ours know priorities


def build(args: AppSettings | dict[str, Any]) -> Application:
    """The application: gateway -> router -> one deployment per expert group.

    Args:
        args: the settings, or a Serve config's `args` as they were read.

    Raises:
        pydantic.ValidationError: a setting is unknown or has the wrong type.
        ConfigurationError: the settings contradict the checkpoint or each other.
        CheckpointError, UnknownFamilyError: the checkpoint cannot be served.
    """
    # Serve converts by the annotation itself, and does not see through a postponed one.
    args = AppSettings.model_validate(args)
    groups = plan_groups(args)
    spec = read_spec(Checkpoint(args.folder))
    folder = str(args.folder)
    dtype = serving_dtype(spec, args.dtype)
    links = _link_config(args)
    group_apps = {
        name: _deployment(ExpertGroupReplica, name, args, settings, {"threads": settings.threads}).bind(
            GroupConfig(name, folder, experts, dtype, args.device, settings.threads, args.expert_options()), links
        )
        for name, experts, settings in groups
    }
    placed = tuple((name, experts) for name, experts, _ in groups)
    live = {"batching": args.router.batching.model_dump(), "queue": args.router.queue.model_dump()}
    router_config = RouterConfig(
        name=args.served_name,
        folder=folder,
        dtype=dtype,
        device=args.device,
        threads=args.router.threads,
        groups=placed,
        limits=args.router.to_limits(),
        live=live,
        batch_invariant=args.batch_invariant,
    )
    router_app = _deployment(RouterReplica, "router", args, args.router, live).bind(
        router_config, links, list(group_apps.values())
    )
    ingress = serve.ingress()(GatewayReplica)
    gateway_config = _gateway_config(args, placed)
    environment = ingress_environment(args.gateway)
    gateway = _deployment(ingress, "gateway", args, args.gateway, dict(gateway_config.live), environment)
    return cast(Application, gateway.bind(gateway_config, links, router_app, group_apps))


def ingress_environment(settings: ReplicaSettings) -> dict[str, str]:
    """Serve's flags for the replicas of the gateway."""
    # The ingress does nothing that blocks, and a hop between threads would cost it a third of its requests/s.
    flags = {"RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0"}
    # Serve's autoscaling goes by the requests that it has seen.
    return flags if settings.autoscaling is not None else {**flags, **direct.ENVIRONMENT}


def plan_groups(args: AppSettings) -> list[tuple[str, tuple[int, ...], GroupSettings]]:
    """Name, experts and settings of every group.

    Raises:
        ConfigurationError: experts are given for some groups only, twice, or not at all for one.
    """
    num_experts = read_spec(Checkpoint(args.folder)).experts.num_experts
    settings = args.group_settings()
    given = [group.experts for group in settings if group.experts is not None]
    if given and len(given) != len(settings):
        raise ConfigurationError("either every group names its experts, or none does", "groups")
    placement = Placement(given) if given else contiguous_placement(num_experts, len(settings))
    if placement.num_experts != num_experts:
        raise ConfigurationError(
            f"the groups hold {placement.num_experts} experts, the model has {num_experts}", "groups"
        )
    return [
        (f"group-{index}", experts, group)
        for index, (experts, group) in enumerate(zip(placement.groups, settings, strict=True))
    ]


def _gateway_config(args: AppSettings, placed: tuple[tuple[str, tuple[int, ...]], ...]) -> GatewayConfig:
    cache = args.gateway.cache
    return GatewayConfig(
        folder=str(args.folder),
        groups=placed,
        api=args.gateway.to_api(),
        cache=cache.to_limits(),
        live={"cache": cache.live()},
        second_level=cache.to_second_level(),
        share_tenants=cache.share_tenants,
        prefetch=cache.to_prefetch(),
        prompt_cache=args.gateway.prompt_cache.to_limits(),
        batch_invariant=args.batch_invariant,
        expert_quantization=args.expert_quantization,
    )


def _link_config(args: AppSettings) -> LinkConfig:
    links = args.links
    return LinkConfig(
        secret=args.link_secret(new_secret()),
        transport=links.transport,
        limits=links.to_limits(),
        refresh_s=links.refresh_s,
        attempt_timeout_s=links.attempt_timeout_s,
        tls_certificate=links.tls_certificate,
        tls_key=links.tls_key,
        tls_authority=links.tls_authority,
    )


def _deployment(
    replica: Any,
    name: str,
    args: AppSettings,
    settings: ReplicaSettings,
    user_config: dict[str, Any],
    environment: dict[str, str] | None = None,
) -> Any:
    actor_options: dict[str, Any] = {"num_cpus": settings.num_cpus, "num_gpus": settings.num_gpus}
    if settings.resources:
        actor_options["resources"] = settings.resources
    if environment:
        actor_options["runtime_env"] = {"env_vars": environment}
    options: dict[str, Any] = {
        "name": name,
        "ray_actor_options": actor_options,
        "user_config": user_config,
        "max_ongoing_requests": _MANY,
        "health_check_period_s": args.health_check_period_s,
        "health_check_timeout_s": args.health_check_timeout_s,
        "graceful_shutdown_wait_loop_s": 0.1,
        "graceful_shutdown_timeout_s": 30.0,
    }
    if settings.max_replicas_per_node is not None:
        options["max_replicas_per_node"] = settings.max_replicas_per_node
    if settings.autoscaling is not None:
        options["autoscaling_config"] = with_default_policy(settings.autoscaling)
    else:
        options["num_replicas"] = settings.num_replicas
    return serve.deployment(replica, **options)
