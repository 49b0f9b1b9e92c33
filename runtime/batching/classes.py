"""Priorities by name, and the five classes that bounds, shedding and metrics know.

A priority is any number from 0 to 1. Where something has to be counted or bounded it falls into one of five equal
classes, so that labels and books stay few whatever callers send.
"""

from __future__ import annotations

from typing import Literal

ClassName = Literal["batch", "low", "default", "high", "interactive"]
CLASS_NAMES: tuple[ClassName, ...] = ("batch", "low", "default", "high", "interactive")
CLASSES = range(len(CLASS_NAMES))

NAMED_PRIORITIES = {"batch": 0.0, "default": 0.5, "interactive": 1.0}

# OpenAI's `service_tier`. "auto" is left out: it asks for what the request would get without it.
SERVICE_TIERS = {"flex": 0.0, "default": 0.5, "standard": 0.5, "priority": 1.0, "scale": 1.0}


def class_of(priority: float) -> int:
    """The class of a priority: its index in `CLASS_NAMES`, higher is more urgent."""
    return min(max(int(priority * len(CLASS_NAMES)), 0), len(CLASS_NAMES) - 1)
