"""Targets whose ratio is the median over rounds: how far the rounds lie apart is printed beside it."""

from __future__ import annotations

from typing import Any

from report import target


def target_of_rounds(what: str, ratio: float, lowest: float, highest: float, wanted: float) -> dict[str, Any]:
    """As `target`; `lowest` and `highest` are the ratios of single rounds."""
    row = target(what, ratio, wanted)
    text = f"{row['measured']} ({lowest:.2f} to {highest:.2f})"
    return {**row, "measured": text, "lowest": lowest, "highest": highest}
