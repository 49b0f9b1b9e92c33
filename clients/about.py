"""What a server says of itself: models, status, health; and what an operator may tell it: to flush its cache."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from .calls import Answer, Caller, Deadline
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
    return _object(await caller.call(lambda _: HttpRequest("GET", path), deadline))


async def flush_cache(caller: Caller, model: str | None, tenant: str | None, deadline: Deadline) -> dict[str, Any]:
    """Forget stored answers of a model, of a tenant, of both, or all. May be sent again.

    Returns:
        `flushed`: answers forgotten in memory; `gateways`: how many were asked; `second_level`: None without one,
        else `{"deleted": ...}`.

    Raises:
        UnavailableError: some part was not reached; flush again.
        ModelNotFoundError: the server has no such model.
        ProtocolError: what answers is no pimoe server.
    """
    scope = {"scope": "all" if model is None else "model"} if tenant is None else {"scope": "tenant"}
    given = {name: value for name, value in (("model", model), ("tenant", tenant)) if value is not None}
    body = json.dumps({**scope, **given}).encode()
    request = HttpRequest("POST", "/admin/cache/flush", {"Content-Type": "application/json"}, (body,))
    return _object(await caller.call(lambda _: request, deadline))


def _object(answer: Answer) -> dict[str, Any]:
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
