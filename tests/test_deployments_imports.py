"""What a process imports that it does not need costs memory in every replica and time at every start."""

from __future__ import annotations

import subprocess
import sys

import pytest
from pimoe.runtime.generation.limits import EngineLimits
from pimoe.runtime.model.kv_cache import BLOCK_TOKENS


@pytest.mark.parametrize("module", ["gateway", "settings", "cli", "cluster"])
def test_who_computes_nothing_does_not_import_torch(module: str) -> None:
    """torch is 190 MB and two seconds."""
    code = f"import sys, pimoe.deployments.{module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == 0


def test_an_expert_group_imports_nothing_of_http_tokenizers_or_the_compiler() -> None:
    """What Ray Serve imports by itself is not ours to leave out."""
    code = (
        "import sys, ray.serve._private.replica; before = set(sys.modules); "
        "import pimoe.deployments.expert_group; "
        "print(*set(sys.modules) - before)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    unwanted = {"transformers", "tokenizers", "jinja2", "llguidance", "torch._dynamo", "torch._inductor", "redis"}
    assert not unwanted & set(done.stdout.split())


def test_the_default_block_is_the_caches_own() -> None:
    assert EngineLimits().block_tokens == BLOCK_TOKENS
