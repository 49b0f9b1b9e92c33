"""The Serve configs in deployments/configs: valid, buildable, and one of them really deployed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from pimoe.deployments.settings import AppSettings

CONFIGS = sorted((Path(__file__).parent.parent / "deployments" / "configs").glob("*.yaml"))


def _serve_config(path: Path) -> dict[str, Any]:
    config = yaml.safe_load(path.read_text())
    return dict(yaml.safe_load(config["spec"]["serveConfigV2"]) if config.get("kind") == "RayService" else config)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_config_is_valid_and_builds(path: Path) -> None:
    from pimoe.deployments.app import build
    from ray.serve.schema import ServeDeploySchema

    (application,) = ServeDeploySchema.model_validate(_serve_config(path)).applications
    settings = AppSettings.model_validate(application.args)
    deployments = {"gateway", "router", *(f"group-{i}" for i in range(len(settings.group_settings())))}
    assert {deployment.name for deployment in application.deployments} <= deployments
    assert build(application.args) is not None


def test_one_machine_is_accepted_by_serve_deploy() -> None:
    """A process of its own: it needs a cluster with a dashboard, which takes the config."""
    script = Path(__file__).parent / "serve_deploy.py"
    # Nothing of this process' own cluster.
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "PIMOE_"))}
    flags = {"RAY_SERVE_ENABLE_HA_PROXY": "1", "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "0.5"}
    result = subprocess.run(
        [sys.executable, str(script), str(next(path for path in CONFIGS if path.stem == "one_machine"))],
        capture_output=True,
        text=True,
        timeout=300,
        env={**clean, **flags},
    )
    lines = [line for line in result.stdout.splitlines() if line.startswith("{")]
    assert [json.loads(line) for line in lines] == [{"file": "one_machine.yaml", "status": "RUNNING"}], (
        result.stderr
    )
