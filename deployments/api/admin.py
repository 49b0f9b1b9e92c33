"""Routes for operators and probes: health, metrics, status, and the cache's flush."""

from __future__ import annotations

import orjson

from ...runtime.errors import InvalidRequestError, ModelNotFoundError, UnavailableError
from .bodies import decode_json
from .call import Call
from .fields import Fields, shown
from .options import TENANT_RULE, is_tenant

_SCOPES = ("all", "model", "tenant")
_SHAPES = '{"scope": "all"}, {"model": "NAME"}, {"tenant": "NAME"} or {"tenant": "NAME", "model": "NAME"}'


async def health(call: Call) -> None:
    """`GET /health`: the process lives and knows its model; 503 before that."""
    name = call.context.model.name
    await call.respond(orjson.dumps({"status": "ok", "model": name}))


async def metrics(call: Call) -> None:
    """`GET /metrics`."""
    body, content_type = await call.context.metrics()
    await call.respond(body, content_type.encode("latin-1"))


async def status(call: Call) -> None:
    """`GET /admin/status`."""
    page = await call.context.status()
    await call.respond(orjson.dumps(page, default=str, option=orjson.OPT_NON_STR_KEYS))


async def flush_cache(call: Call) -> None:
    """`POST /admin/cache/flush`: `{"scope": "all" | "model" | "tenant", "model": ..., "tenant": ...}`.

    The field that the scope is called after must be there. With "tenant" a `model` may be there too, and means
    that tenant's answers of that model. A scope that is absent is the one that a `tenant` or a `model` implies;
    "all" must be said.
    """
    try:
        body = await call.body()
    except InvalidRequestError as error:
        if type(error) is not InvalidRequestError:  # too large, perhaps
            raise
        body = b"{}"  # it is empty: let the error be the one that shows what is right
    model, tenant = _flush_scope(Fields(decode_json(body, call.settings.max_json_bytes)))
    if model is not None:
        _check_model(call, model)
    await call.respond(orjson.dumps(await call.context.flush_cache(model, tenant)))


def _flush_scope(fields: Fields) -> tuple[str | None, str | None]:
    """Raises: InvalidRequestError: a field is unknown, missing, or there and without meaning."""
    fields.only(("scope", "model", "tenant"))
    scope, model, tenant = fields.text("scope"), fields.text("model"), fields.text("tenant")
    if scope is None:
        scope = "tenant" if tenant is not None else "model" if model is not None else None
    if scope not in _SCOPES:
        raise fields.wrong("scope", f"one of {', '.join(_SCOPES)}, in a body such as {_SHAPES}")
    given = {"model": model is not None, "tenant": tenant is not None}
    for name, allowed in (("model", scope != "all"), ("tenant", scope == "tenant")):
        if given[name] and not allowed:
            raise fields.wrong(name, f"absent where scope is {scope!r}")
    if scope != "all" and not given[scope]:
        raise fields.wrong(scope, f"there where scope is {scope!r}")
    if tenant is not None and not is_tenant(tenant):  # no request can have it
        raise fields.wrong("tenant", TENANT_RULE)
    return model, tenant


def _check_model(call: Call, name: str) -> None:
    """Raises: ModelNotFoundError: a flush of it would do nothing."""
    try:
        known = call.context.model.name
    except UnavailableError:  # while no router is there, a flush is possible still
        return
    if name != known:
        raise ModelNotFoundError(f"no model {shown(name)} here; this is {shown(known)}", "model")
