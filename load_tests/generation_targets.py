"""Targets whose ratio is the median over rounds: how far the rounds lie apart is printed beside it."""

from __future__ import annotations

from typing import Any

from report import target


def target_of_rounds(
    what: str, ratio: float, lowest: float, highest: float, wanted: float, wrong: str | None = None
) -> dict[str, Any]:
    """As `target`.

    Args:
        lowest, highest: ratios of single rounds.
        wrong: why it is missed, whatever the ratio: what was measured did not compute the right thing.
    """
    row = target(what, ratio, wanted)
    text = f"{row['measured']} ({lowest:.2f} to {highest:.2f})"
    if wrong is not None:
        text += f"; {wrong}"
    reached = row["reached"] and wrong is None
    return {**row, "measured": text, "lowest": lowest, "highest": highest, "reached": reached, "wrong": wrong}
