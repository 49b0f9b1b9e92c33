"""Who is compared in `compare_serving.py`: how each server is started and spoken to, or why it cannot be."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from pimoe.deployments.cluster import HAPROXY_FLAGS, free_port, haproxy_is_installed
from report import cores

HIDDEN, TOKENS = 512, 4
BODY_BYTES = TOKENS * HIDDEN * 4
HERE = Path(__file__).parent

# In front of the environment that runs this, with which they share torch; `make rivals` makes them. Triton has one
# of its own, since pytriton wants an older numpy.
ENVIRONMENTS = Path(sys.prefix)


def same(data: bytes) -> bytes:
    """A body is a tensor and nothing else."""
    return data


@dataclass(frozen=True)
class Contender:
    """A server of the layer.

    Attributes:
        key: for the command line and for results.
        title: what it is called in tables.
        is_batching, is_ours: a rival's best is taken over those that are not ours.
        script: in `rivals/`; None: `pimoe serve`.
        package: what must be importable in `environment_name`; None: what it needs is always there.
        distribution: whose version is named.
        workers, threads: processes that compute, and torch threads in each; pimoe decides that by itself. One for
            each core was faster than one with all cores for every rival, by 1.2 to 13 times at 128 connections.
        variant_of: the key of whom it is with other workers and threads.
        is_alone: set up for requests that come one by one, and measured at 1 connection only.
        environment: more variables.
        unwrap: from an answer's body to tensor bytes; a request's body is nothing else for all of them.
        note: how it was set up.
    """

    key: str
    title: str
    script: str | None
    note: str
    package: str | None = None
    distribution: str = "ray"
    environment_name: str = "rivals"
    is_batching: bool = True
    workers: int = field(default_factory=cores)
    threads: int = 1
    variant_of: str | None = None
    is_alone: bool = False
    environment: Mapping[str, str] = field(default_factory=dict)
    path: str = "/infer"
    headers: Mapping[str, str] = field(default_factory=lambda: {"Content-Type": "application/octet-stream"})
    unwrap: Callable[[bytes], bytes] = same

    @property
    def is_ours(self) -> bool:
        """Whether it is pimoe."""
        return self.script is None

    @property
    def rival(self) -> str:
        """Its key, or that of whom it is a variant."""
        return self.variant_of or self.key

    def command(self, model: Path, port: int) -> list[str]:
        """What starts it."""
        if self.script is None:
            serve = ["from pimoe.deployments.command import main; main()", "serve", str(model)]
            return [sys.executable, "-c", *serve, "--groups", "2", "--port", str(port)]
        return [str(self._python), str(HERE / "rivals" / self.script)]

    def variables(self, model: Path, port: int) -> dict[str, str]:
        """Its environment, beside what this process has."""
        if self.script is None:
            return dict(self.environment)
        return {
            "MOE_LAYER_MODEL": str(model),
            "MOE_LAYER_PORT": str(port),
            "MOE_LAYER_WORKERS": str(self.workers),
            "MOE_LAYER_THREADS": str(self.threads),
            "OMP_NUM_THREADS": str(self.threads),
            "PYTHONPATH": str(HERE / "rivals"),
            **self.environment,
        }

    @property
    def _python(self) -> Path:
        folder = ENVIRONMENTS if self.package is None else ENVIRONMENTS / self.environment_name
        return folder / "bin" / "python"

    def version(self) -> str:
        """Of what is measured; empty when that is not known."""
        return _ran(self._python, f"import importlib.metadata as m; print(m.version({self.distribution!r}))")[1]

    def missing(self) -> str | None:
        """Why it cannot run here."""
        if self.rival == "serve-haproxy" and not haproxy_is_installed():
            return "HAProxy is not installed; it comes with ray[serve] on Linux"
        if self.package is None:
            return None
        if not self._python.exists():
            return f"{self.package} is not installed: make rivals"
        code, _, error = _ran(self._python, f"import {self.package}")
        if code == 0:
            return None
        return f"{self.package} cannot be imported: {(error or 'no reason given').splitlines()[-1]}"


@cache
def _ran(python: Path, code: str) -> tuple[int, str, str]:
    """Exit code, standard output and error; once for all variants."""
    done = subprocess.run([python, "-c", code], capture_output=True, text=True, timeout=60)
    return done.returncode, done.stdout.strip(), done.stderr.strip()


# pimoe and Triton speak the same protocol, in which a body may be the bytes of its only tensor. They answer with
# some JSON, and then the tensor's bytes.
_RAW = {"Content-Type": "application/octet-stream", "Inference-Header-Content-Length": "0"}


def _after_json(body: bytes) -> bytes:
    """The tensor comes last."""
    return body[-BODY_BYTES:]


_RAY = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    # Workers would otherwise run at a lower priority than whoever started them; pimoe's own cluster says the same.
    "RAY_worker_niceness": "0",
    "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "0.5",
    # Not the default range: HAProxy would send requests to another cluster's replica if one listens there.
    "RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT": "32000",
    "RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT": "33000",
}
_HAPROXY = {
    **_RAY,
    **HAPROXY_FLAGS,
    "RAY_SERVE_ENABLE_HA_PROXY": "1",
    "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
    "RAY_SERVE_HAPROXY_STATS_PORT": str(free_port()),
    "RAY_SERVE_HAPROXY_METRICS_PORT": str(free_port()),
    "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(free_port()),
    "RAY_SERVE_FALLBACK_PROXY_GRPC_PORT": str(free_port()),
}


def contenders(model_name: str) -> list[Contender]:
    """All of them, ours first.

    Args:
        model_name: what pimoe calls the model: its folder's name.
    """
    return [
        Contender(
            "pimoe",
            "pimoe, 2 expert groups",
            None,
            "pimoe serve: HAProxy, gateway, router, expert groups; cache bypassed",
            distribution="pimoe",
            path=f"/v2/models/{model_name}/infer",
            headers={**_RAW, "x-pimoe-cache": "false"},
            unwrap=_after_json,
        ),
        Contender(
            "mosec",
            "mosec",
            "mosec_server.py",
            "raw bytes past its codecs",
            package="mosec",
            distribution="mosec",
            path="/inference",
        ),
        Contender(
            "litserve",
            "LitServe",
            "litserve_server.py",
            "fast_queue (ZeroMQ), raw bytes",
            package="litserve",
            distribution="litserve",
        ),
        Contender(
            "bentoml",
            "BentoML",
            "bentoml_service.py",
            "raw bytes; its window is learnt, not set; metrics off",
            package="bentoml",
            distribution="bentoml",
        ),
        Contender(
            "triton",
            "Triton (pytriton)",
            "triton_server.py",
            "HTTP, binary tensor data; no GRPC, no metrics",
            package="pytriton",
            distribution="nvidia-pytriton",
            environment_name="rivals_triton",
            # Its Python stub finds libpython by the loader's path, and must find the one of this Python.
            environment={"LD_LIBRARY_PATH": str(sysconfig.get_config_var("LIBDIR"))},
            path="/v2/models/layer/infer",
            headers=_RAW,
            unwrap=_after_json,
        ),
        Contender(
            "serve-haproxy",
            "@serve.batch, HAProxy",
            "ray_serve_batch.py",
            "RAY_SERVE_ENABLE_HA_PROXY, RAY_SERVE_THROUGHPUT_OPTIMIZED, pimoe's flags of HAProxy",
            environment=_HAPROXY,
        ),
        Contender(
            "serve",
            "@serve.batch, default",
            "ray_serve_batch.py",
            "Serve's own ingress",
            environment=_RAY,
        ),
        Contender(
            "starlette",
            "Starlette, no batching",
            "starlette_app.py",
            "uvicorn with uvloop and httptools; each request alone",
            is_batching=False,
            distribution="starlette",
        ),
    ]
