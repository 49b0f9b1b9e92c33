"""Deploys Serve configs as `serve deploy` does, on a cluster of this process' own: `serve_deploy.py FILE...`.

The cluster claims CPUs and GPUs that the machine need not have; replicas without a GPU compute on the CPU. Prints
one line of JSON per file: its name, and the application's status when it was up or had failed.
`max_replicas_per_node` is taken out, since here is one node only.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml
from pimoe.deployments.cluster import free_port
from pimoe.deployments.processes import adopt_orphans, end_descendants


def _without(key: str, value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _without(key, v) for k, v in value.items() if k != key}
    return [_without(key, v) for v in value] if isinstance(value, list) else value


def _load(path: Path, port: int) -> dict[str, Any]:
    config = yaml.safe_load(path.read_text())
    if config.get("kind") == "RayService":
        config = yaml.safe_load(config["spec"]["serveConfigV2"])
    config["http_options"] = {"host": "127.0.0.1", "port": port}
    return dict(_without("max_replicas_per_node", config))


def main() -> None:
    """See the module."""
    adopt_orphans()
    import ray
    from ray import serve

    port = free_port()
    dashboard = f"127.0.0.1:{free_port()}"
    host, dashboard_port = dashboard.split(":")
    ray.init(
        address="local",
        num_cpus=64,
        num_gpus=16,
        include_dashboard=True,
        dashboard_host=host,
        dashboard_port=int(dashboard_port),
        log_to_driver=False,
    )
    try:
        for name in sys.argv[1:]:
            print(
                json.dumps({"file": Path(name).name, "status": _deploy(Path(name), port, dashboard)}), flush=True
            )
    finally:
        serve.shutdown()
        ray.shutdown()
        end_descendants()


def _deploy(path: Path, port: int, dashboard: str) -> str:
    from ray import serve

    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        yaml.safe_dump(_load(path, port), file)
        file.flush()
        deploy = [str(Path(sys.executable).parent / "serve"), "deploy", "-a", f"http://{dashboard}", file.name]
        done = subprocess.run(deploy, capture_output=True, text=True, timeout=60)
        if done.returncode:
            return f"refused: {done.stderr[-2000:]}"
    until = time.monotonic() + 120
    while time.monotonic() < until:
        application = serve.status().applications.get("pimoe")
        if application is not None and application.status in ("RUNNING", "DEPLOY_FAILED", "UNHEALTHY"):
            if application.message:
                print(application.message, file=sys.stderr)
            return str(application.status.value)
        time.sleep(0.2)
    return "timed out"


if __name__ == "__main__":
    main()
