"""The comparison of HTTP libraries runs; what it measures is no test's business."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[1] / "load_tests" / "compare_http_clients.py"


def test_the_tiny_comparison_gives_a_ratio_for_every_client(tmp_path: Path) -> None:
    results = tmp_path / "results.json"
    command = [sys.executable, str(SCRIPT), "--preset", "tiny", "--json", str(results)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
    found = {result["client"]: result for result in json.loads(results.read_text())["results"]}
    assert {"aiohttp", "pimoe async", "pimoe threads"} <= found.keys()
    assert all(result["requests_per_s"] > 0 for result in found.values())
    assert all(name in done.stdout for name in found)
