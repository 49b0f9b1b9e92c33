"""The embedded model: a small byte-level MoE decoder with its weights in the package, and its skills.

It answers questions whose answers can be checked (`skills`), so that tests, examples and load tests can
tell a right completion from a wrong one without a download. Nothing here imports torch; the training
script (`train`) does.
"""

from __future__ import annotations

from pathlib import Path

from .skills import SKILLS, Example, held_out, is_exact, training_stream

CHECKPOINT: Path = Path(__file__).parent / "checkpoint"
"""Folder of the trained checkpoint: Qwen3-MoE, float32, with tokenizer and chat template."""

__all__ = ["CHECKPOINT", "SKILLS", "Example", "held_out", "is_exact", "training_stream"]
