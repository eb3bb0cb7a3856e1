"""What the server answers, as JSON."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from triptych.server.problems import Problem
from triptych.server.records import Record


class ErrorDetails(BaseModel):
    """What went wrong; further fields depend on the code."""

    model_config = ConfigDict(extra="allow")

    message: str = Field(description="A line for people.")
    type: str = Field(
        description="invalid_request_error, authentication_error, permission_error, rate_limit_error or server_error."
    )
    param: str | None = Field(None, description="The parameter that is to blame.")
    code: str = Field(description="A word for programs: bad_parameter, unknown_parameter, overloaded, not_done, ...")


class ErrorBody(BaseModel):
    """The form of every error."""

    error: ErrorDetails


def errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Return what a route says of the statuses with which it refuses, beside those that every route may answer."""
    return {status: {"model": ErrorBody} for status in statuses}


def files_of(*media_types: str) -> dict[int | str, dict[str, Any]]:
    """Return what a route says that hands over files of these kinds, whole or in part."""
    content = {each: {"schema": {"type": "string", "format": "binary"}} for each in media_types}
    return {
        200: {"content": content},
        206: {"content": content, "description": "The range asked for."},
        400: {"model": ErrorBody},
        416: {"content": {"text/plain": {"schema": {"type": "string"}}}, "description": "No such range."},
    }


class Progress(BaseModel):
    """How far a running request is."""

    role: str | None = None
    replica: str | None = None
    stage: str | None = None
    step: int | None = None
    steps: int | None = None


class Links(BaseModel):
    """Where the rest is."""

    self: str
    events: str
    result: str
    cancel: str


class RequestStatus(BaseModel):
    """A request on its way, or at its end."""

    id: str
    status: Literal["queued", "running", "done", "failed", "cancelled"]
    created: float = Field(description="Seconds since the epoch.")
    seed: int
    makes: str = Field(description="`images` or `videos`.")
    position: int | None = Field(None, description="How many requests are before it, while it is queued.")
    progress: Progress | None = Field(None, description="While it is running.")
    lost: list[str] = Field(description="Why each lost attempt was lost.")
    outputs: int | None = Field(None, description="How many results there are, when it is done.")
    seconds: float | None = Field(None, description="From its arrival to its end, when it is done.")
    timings: dict[str, float] | None = Field(None, description="Seconds of each stage, when it is done.")
    error: ErrorDetails | None = Field(None, description="When it has failed or was cancelled.")
    links: Links


def status_of(record: Record, position: int) -> RequestStatus:
    """Return a record as it is told to its caller."""
    base = f"/v1/requests/{record.id}"
    done = record.status == "done"
    progress = None
    if record.status == "running":
        started, step = record.last("started"), record.last("step")
        current = step if step.get("role") == started.get("role") else {}
        progress = Progress(
            role=started.get("role"),
            replica=started.get("replica"),
            stage=current.get("stage"),
            step=current.get("step"),
            steps=current.get("steps"),
        )
    return RequestStatus(
        id=record.id,
        status=record.status,
        created=record.created,
        seed=record.seed,
        makes=record.makes,
        position=position if record.status == "queued" else None,
        progress=progress,
        lost=[*record.lost, *([] if record.job is None else record.job.lost)],
        outputs=record.outputs if done else None,
        seconds=record.last("done").get("seconds"),
        timings=record.timings if done else None,
        error=None if record.error is None else ErrorDetails(**record.error.body()),
        links=Links(self=base, events=f"{base}/events", result=f"{base}/result", cancel=f"{base}/cancel"),
    )


def error_body(problem: Problem) -> dict[str, Any]:
    """Return a problem as it leaves the server."""
    return {"error": problem.body()}
