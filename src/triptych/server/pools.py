"""Pools over HTTP: how many replicas there are, and which one is to go."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict, Field

from triptych.server.schema import errors
from triptych.server.service import Service

MOST = 1024
"""Replicas that a pool may be asked to have."""


class Size(BaseModel):
    """What a pool is to be."""

    model_config = ConfigDict(extra="forbid", strict=True)

    replicas: int = Field(ge=0, le=MOST)


class Replicas(BaseModel):
    """The replicas that there are, the moment after."""

    replicas: list[dict[str, Any]]


def pools_router(service: Service) -> APIRouter:
    """Return the routes that change pools."""
    router = APIRouter(responses=errors(400, 503))

    @router.post("/v1/pools/{pool}", status_code=202)
    def scale(pool: str, size: Size) -> Replicas:
        """Set how many replicas a pool has; those that are too many finish what they have."""
        engine = service.open_engine()
        engine.scale(pool, size.replicas)
        return Replicas(replicas=service.snapshot()["replicas"])

    @router.post("/v1/replicas/{name}/drain", status_code=202)
    def drain(name: str) -> Replicas:
        """Give a replica nothing more, and end it when it has finished what it has."""
        engine = service.open_engine()
        engine.drain(name)
        return Replicas(replicas=service.snapshot()["replicas"])

    return router
