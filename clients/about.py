"""What a server says of itself: models, status, health."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from .calls import Caller, Deadline
from .errors import ConnectionFailed, DeadlineExceededError, PimoeClientError, ProtocolError
from .transport import HttpRequest


@dataclass(frozen=True, slots=True)
class Health:
    """Whether a server answers (`live`) and can compute (`ready`); true when ready. `detail` says why not."""

    live: bool
    ready: bool
    detail: str = ""

    def __bool__(self) -> bool:
        return self.ready


async def get_models(caller: Caller, deadline: Deadline) -> list[str]:
    """Names of the models that the server lists.

    Raises:
        ProtocolError: what answers is no pimoe server.
    """
    listed = (await get_json(caller, "/v1/models", deadline)).get("data")
    if not isinstance(listed, list) or not all(isinstance(card, dict) and "id" in card for card in listed):
        raise ProtocolError("GET /v1/models was answered with no list of models; is it a pimoe server?")
    return [str(card["id"]) for card in listed]


async def get_json(caller: Caller, path: str, deadline: Deadline) -> dict[str, Any]:
    """The JSON object at `path`.

    Raises:
        ProtocolError: it is none.
    """
    answer = await caller.call(lambda _: HttpRequest("GET", path), deadline)
    try:
        value = json.loads(answer.body)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise ProtocolError(f"{answer.call} was answered with no JSON object; is it a pimoe server?")
    return value


async def get_health(caller: Caller, deadline: Deadline) -> Health:
    """One look at `/v2/health/ready`, and at `/health` where the server is not ready. Never retried."""
    try:
        await caller.exchange(lambda _: HttpRequest("GET", "/v2/health/ready"), deadline)
    except (ConnectionFailed, DeadlineExceededError) as error:
        return Health(live=False, ready=False, detail=error.message)
    except PimoeClientError as error:
        return Health(live=await _is_live(caller, deadline), ready=False, detail=error.message)
    return Health(live=True, ready=True)


async def _is_live(caller: Caller, deadline: Deadline) -> bool:
    try:
        await caller.exchange(lambda _: HttpRequest("GET", "/health"), deadline)
    except PimoeClientError:
        return False
    return True
