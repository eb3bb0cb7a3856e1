"""`/v1/models`: the one model that is served, as the official clients list it."""

from __future__ import annotations

import time
from typing import Literal

from fastapi import APIRouter
from pydantic import BaseModel

from triptych.server.openai.video_order import check_model
from triptych.server.problems import sendable
from triptych.server.schema import errors
from triptych.server.service import Service


class ModelObject(BaseModel):
    """A model."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "triptych"
    family: str


class ModelList(BaseModel):
    """All models."""

    object: Literal["list"] = "list"
    data: list[ModelObject]


def models_router(service: Service) -> APIRouter:
    """Return the routes of `/v1/models`."""
    router = APIRouter(prefix="/v1/models", tags=["models"])
    since = int(time.time())

    def served(asked: str | None = None) -> ModelObject:
        repository = service.open_engine().front.family.repository
        return ModelObject(id=check_model(asked, sendable(repository.name)), created=since, family=repository.family)

    @router.get("", responses=errors(503))
    async def listed() -> ModelList:
        """List the model that is served."""
        return ModelList(data=[served()])

    @router.get("/{name:path}", responses=errors(404, 503))
    async def retrieve(name: str) -> ModelObject:
        """Tell of the model that is served, by its name."""
        return served(name)

    return router
