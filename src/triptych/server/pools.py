"""Pools over HTTP: how many replicas there are, and which one is to go."""

from __future__ import annotations

from typing import Any

from anyio import to_thread
from fastapi import APIRouter, Request
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from triptych.errors import ParameterError, UsageError
from triptych.server.schema import errors
from triptych.server.service import Service

MOST = 1024
"""Replicas that a pool may be asked to have."""


class Size(BaseModel):
    """What a pool is to be."""

    model_config = ConfigDict(extra="forbid", strict=True)

    replicas: int = Field(ge=0, le=MOST)


_SIZE = {"requestBody": {"required": True, "content": {"application/json": {"schema": Size.model_json_schema()}}}}


class Replicas(BaseModel):
    """The replicas that there are, the moment after."""

    replicas: list[dict[str, Any]]


def pools_router(service: Service) -> APIRouter:
    """Return the routes that change pools."""
    router = APIRouter(responses=errors(400, 503))

    @router.post("/v1/pools/{pool}", status_code=202, openapi_extra=_SIZE)
    async def scale(pool: str, request: Request) -> Replicas:
        """Set how many replicas a pool has; those that are too many finish what they have."""
        engine = service.open_engine()
        size = _size_of(await request.body())  # whatever kind of content it calls itself, as of a request
        await to_thread.run_sync(engine.scale, pool, size.replicas)
        return Replicas(replicas=(await to_thread.run_sync(service.snapshot))["replicas"])

    @router.post("/v1/replicas/{name}/drain", status_code=202)
    def drain(name: str) -> Replicas:
        """Give a replica nothing more, and end it when it has finished what it has."""
        engine = service.open_engine()
        engine.drain(name)
        return Replicas(replicas=service.snapshot()["replicas"])

    return router


def _size_of(body: bytes) -> Size:
    """Return what a body says.

    Raises:
        UsageError: it is no JSON, or not of the form.
    """
    try:
        return Size.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
    if not first["loc"]:
        raise UsageError(f'the body is not what is accepted, as in {{"replicas": 4}}: {first["msg"]}')
    value = None if first["type"] == "missing" else first["input"]
    raise ParameterError(str(first["loc"][0]), value, f'{first["msg"]}; as in {{"replicas": 4}}')
