"""A public load generator, guidellm, finishes its run against the served application.

It lives in an environment of its own, which `make test` makes. Nothing is fetched from a model hub: the tokenizer
is the checkpoint's folder, the prompts are synthetic.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pimoe.deployments.cluster import LocalCluster
from pimoe.runtime.embedded import CHECKPOINT

GUIDELLM = Path(sys.prefix) / "load_generator" / "bin" / "guidellm"
REQUESTS, STREAMS, PROMPT_TOKENS, OUTPUT_TOKENS = 16, 4, 60, 12
_TIMEOUT_S = 240.0  # only so that a broken test ends

pytestmark = pytest.mark.skipif(
    not GUIDELLM.exists(), reason="guidellm is not installed: `make test` installs it where it can be fetched"
)


def run_guidellm(url: str, endpoint: str, folder: Path) -> dict[str, Any]:
    """What guidellm measured, from its report."""
    backend = {"kind": "openai_http", "target": url, "request_format": endpoint}
    report = folder / "report.json"
    command = [
        *(str(GUIDELLM), "run", "--disable-console"),
        *("--backend", json.dumps(backend)),
        *("--tokenizer", f"kind=huggingface_auto,model={CHECKPOINT}"),
        *("--data", f"kind=synthetic_text,prompt_tokens={PROMPT_TOKENS},output_tokens={OUTPUT_TOKENS}"),
        *("--profile", f"kind=concurrent,streams={STREAMS}"),
        *("--constraint", f"kind=max_requests,count={REQUESTS}"),
        *("--output", f"kind=json,path={report}"),
    ]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=_TIMEOUT_S,
        cwd=folder,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr[-4000:]
    [benchmark] = json.loads(report.read_text())["benchmarks"]
    found: dict[str, Any] = benchmark
    return found


def first_error(benchmark: dict[str, Any]) -> str:
    failed = benchmark["requests"]["errored"] or []
    return str(failed[0]["info"]["error"]) if failed else "none"


@pytest.mark.parametrize("endpoint", ["/v1/chat/completions", "/v1/completions"])
def test_guidellm_finishes_a_run(application: LocalCluster, endpoint: str, tmp_path: Path) -> None:
    benchmark = run_guidellm(application.url, endpoint, tmp_path)
    metrics = benchmark["metrics"]
    totals = metrics["request_totals"]
    assert totals == {"successful": REQUESTS, "errored": 0, "incomplete": 0, "total": REQUESTS}, first_error(
        benchmark
    )
    # It asks for an exact number of tokens, past the end of the text, and believes the usage of the last chunk.
    answered = [request["output_metrics"]["text_tokens"] for request in benchmark["requests"]["successful"]]
    assert answered == [OUTPUT_TOKENS] * REQUESTS
    asked = [request["input_metrics"]["text_tokens"] for request in benchmark["requests"]["successful"]]
    assert min(asked) >= PROMPT_TOKENS
    # It saw streams: tokens past the end of a text have none, so single answers may well come in one piece.
    for measured in ("time_to_first_token_ms", "inter_token_latency_ms"):
        assert metrics[measured]["successful"]["mean"] > 0, measured
