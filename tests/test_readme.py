"""The README's code blocks, run as they stand against the served application."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
from pimoe.deployments.cluster import LocalCluster

README = Path(__file__).parent.parent / "README.md"


class Block(NamedTuple):
    heading: str
    language: str
    code: str
    needs_server: bool


def _blocks() -> list[Block]:
    found = []
    heading = ""
    pattern = re.compile(r"^#+ ([^\n]+)$|(<!-- test: no server -->\n)?```(python|bash)\n(.*?)```", re.M | re.S)
    for match in pattern.finditer(README.read_text()):
        if match[1]:
            heading = match[1]
        else:
            found.append(Block(heading, match[3], match[4], match[2] is None))
    return found


def test_the_blocks_are_found() -> None:
    assert len(_blocks()) >= 7


@pytest.mark.parametrize("block", _blocks(), ids=lambda block: f"{block.heading}, {block.language}")
def test_block_runs(block: Block, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    code = block.code
    if block.needs_server and "127.0.0.1:8000" in code:
        application: LocalCluster = request.getfixturevalue("application")
        code = code.replace("127.0.0.1:8000", f"127.0.0.1:{application.port}")
    command = (
        [sys.executable, "-c", code] if block.language == "python" else ["bash", "-euo", "pipefail", "-c", code]
    )
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    result = subprocess.run(
        command, capture_output=True, text=True, timeout=120, cwd=tmp_path, env={**os.environ, "PATH": path}
    )
    assert result.returncode == 0, result.stderr
    assert '"error"' not in result.stdout.lower()  # as a field; the status page has an "error_ratio"


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", README.read_text()):
        assert target.startswith("http") or (README.parent / target).exists(), target
