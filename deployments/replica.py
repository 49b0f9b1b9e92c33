"""What all three deployments share: the replica's identity, its link server, discovery of others, and how live
settings are taken."""

from __future__ import annotations

import asyncio
import logging
import os
import ssl as tls
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import ray
from ray import serve

from ..runtime.errors import ConfigurationError
from ..runtime.links import Endpoint, LinkLimits, LinkPool, LinkServer
from ..runtime.links.addresses import new_unix_address
from ..runtime.links.messages import Handler

_log = logging.getLogger(__name__)

_BROADCAST_TIMEOUT_S = 5.0

Accept = Callable[[dict[str, Any]], bool]


@dataclass(frozen=True, slots=True)
class LinkConfig:
    """How replicas reach each other; plain values, sent to every replica."""

    secret: str = field(repr=False)
    transport: Literal["unix", "tcp", "both"]
    limits: LinkLimits
    refresh_s: float
    attempt_timeout_s: float
    tls_certificate: str | None = None
    tls_key: str | None = None
    tls_authority: str | None = None

    def ssl(self, purpose: tls.Purpose) -> tls.SSLContext | None:
        """The TLS context for one side of TCP links, or None where TLS is off."""
        if self.tls_certificate is None:
            return None
        context = tls.create_default_context(purpose, cafile=self.tls_authority)
        context.load_cert_chain(self.tls_certificate, self.tls_key)
        context.check_hostname = False  # replicas move between nodes; the authority and the secret vouch for them
        if self.tls_authority is not None:
            context.verify_mode = tls.CERT_REQUIRED
        return context


def node_id() -> str:
    """This node, as Ray names it."""
    return str(ray.get_runtime_context().get_node_id())


async def listen(
    config: LinkConfig, handler: Handler, limits: LinkLimits, credits: int | None, name: str
) -> LinkServer:
    """A link server on every transport that the configuration asks for."""
    server = LinkServer(handler, config.secret.encode(), limits, credits)
    if config.transport in ("unix", "both"):
        await server.listen_unix(new_unix_address((name,)))
    if config.transport in ("tcp", "both"):
        host = str(ray.util.get_node_ip_address())  # type: ignore[no-untyped-call]
        await server.listen_tcp(host, 0, config.ssl(tls.Purpose.CLIENT_AUTH))
    return server


def identity(addresses: Sequence[str]) -> dict[str, Any]:
    """The part of a replica's description that is the same for all deployments."""
    context = serve.get_replica_context()
    return {
        "id": context.replica_tag,
        "deployment": context.deployment,
        "pid": os.getpid(),
        "node": node_id(),
        "address": next(iter(addresses), None),
        "addresses": list(addresses),
        "state": "running",
    }


async def describe_all(handle: Any, timeout_s: float = _BROADCAST_TIMEOUT_S) -> list[dict[str, Any]]:
    """What every live replica of a deployment says of itself.

    Raises:
        Exception: whatever Ray raises while a replica is dying; ask again.
    """
    # Synchronous, in a thread: the caller's loop need not be the one that Serve gave the handle.
    response = handle.broadcast("describe")
    results = await asyncio.to_thread(response.results, timeout_s=timeout_s)
    return list(results)


def discover(handle: Any, accept: Accept) -> Callable[[], Awaitable[Sequence[Endpoint]]]:
    """Discovery for a `LinkPool`: the replicas of a deployment, through Serve's broadcast."""

    async def endpoints() -> Sequence[Endpoint]:
        return [
            Endpoint(found["id"], found["node"], tuple(found["addresses"]), found)
            for found in await describe_all(handle)
            if accept(found) or _refuse(found)
        ]

    return endpoints


def _refuse(found: dict[str, Any]) -> bool:
    _log.error("replica %s of %s holds other weights and is not used", found["id"], found["deployment"])
    return False


def make_pool(name: str, handle: Any, config: LinkConfig, accept: Accept = lambda _: True) -> LinkPool:
    """Links to all replicas of a deployment whose description `accept` takes."""
    return LinkPool(
        name,
        discover(handle, accept),
        config.secret.encode(),
        node_id(),
        config.limits,
        config.refresh_s,
        config.attempt_timeout_s,
        config.ssl(tls.Purpose.SERVER_AUTH),
    )


def choose_device(device: str) -> str:
    """ "auto" is the GPU that Ray gave this replica, if any."""
    if device != "auto":
        return device
    import torch

    return "cuda" if ray.get_gpu_ids() and torch.cuda.is_available() else "cpu"


class LiveSettings:
    """Guards `reconfigure`: a running replica keeps its settings where new ones are wrong. Serve would end it, and
    start others that fail in the same way, until nothing serves any more.

    Args:
        base: the sections that may change, as the application's `args` have them. What a `user_config` leaves out
            is as it is there.

    Attributes:
        refused: what is wrong with the latest `user_config`; None: it is in force. For the status page.
    """

    def __init__(self, base: Mapping[str, Any]) -> None:
        self.refused: str | None = None
        self._base = base
        self._in_force = False

    def take(self, user_config: Mapping[str, Any], change: Callable[[Mapping[str, Any]], None]) -> None:
        """Puts a `user_config` in force with `change`, which reads all of it before it changes anything.

        Raises:
            Exception: it is wrong, and the replica only starts: then the deployment fails, as it should.
        """
        try:
            change({name: self._section(name, given) for name, given in user_config.items()})
        except Exception as error:  # pydantic's, ours, or whatever a value of a wrong type leads to
            if not self._in_force:
                raise
            self.refused = " ".join(str(error).split()).partition(" For further information")[0]
            _log.error("the new live settings are refused, the old ones stay: %s", self.refused)
        else:
            self.refused, self._in_force = None, True

    def _section(self, name: str, given: Any) -> Any:
        if name not in self._base:
            raise ConfigurationError(f"{name!r} is none of {', '.join(self._base)}", "user_config")
        base = self._base[name]
        if not isinstance(base, Mapping):
            return given
        if not isinstance(given, Mapping):
            raise ConfigurationError(f"{name} is {given!r}; it must be a map", "user_config")
        if unknown := sorted(map(str, given.keys() - base.keys())):
            raise ConfigurationError(f"{name}.{unknown[0]} cannot change while serving", "user_config")
        return {**base, **given}
