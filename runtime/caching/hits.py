"""Answers that were in memory, for who keeps what requests became."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from ..requests import InferRequest, ModelInfo
from .entry import CachedAnswer
from .sharing import Request, item_bytes

_TOKEN_ID_BYTES = 36  # an integer, and its place in a tuple


class Hit(NamedTuple):
    """An answer that was in memory, and all that it was found by: see `CachedBackend.recall`."""

    key: bytes
    answer: CachedAnswer
    model: ModelInfo
    tenant: str
    request: Request


def held_bytes(hits: Sequence[object]) -> int:
    """About the memory that the answers and requests of these hits take."""
    return sum(_held_bytes(hit) for hit in hits if isinstance(hit, Hit))


def _held_bytes(hit: Hit) -> int:
    request = hit.request
    if isinstance(request, InferRequest):
        asked = request.hidden_states.nbytes
    else:
        asked = _TOKEN_ID_BYTES * len(request.prompt_token_ids)
    return asked + sum(map(item_bytes, hit.answer.items))
