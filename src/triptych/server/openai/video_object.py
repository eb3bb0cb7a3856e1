"""Video objects: what `/v1/videos` answers, as JSON."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from triptych.server.records import Record

_STATUSES: dict[str, Literal["queued", "in_progress", "completed", "failed"]] = {
    "queued": "queued",
    "running": "in_progress",
    "done": "completed",
    "failed": "failed",
    "cancelled": "failed",
}
_DENOISING = (5, 95)
"""Percent of a video that are done when its denoising begins and ends."""
_POLL = (250, 500, 5000)
"""Milliseconds: between two polls at least, before anything can be predicted, at most."""


class VideoError(BaseModel):
    """Why there is no video."""

    code: str
    message: str


class Video(BaseModel):
    """A video on its way, or at its end. The last four fields are Triptych's own."""

    id: str
    object: Literal["video"] = "video"
    model: str
    status: Literal["queued", "in_progress", "completed", "failed"]
    progress: int = Field(ge=0, le=100, description="Percent.")
    created_at: int = Field(description="Seconds since the epoch.")
    completed_at: int | None = None
    expires_at: int | None = Field(None, description="When the video is no longer kept, once it is completed.")
    error: VideoError | None = None
    prompt: str | None = None
    size: str = Field(description="WIDTHxHEIGHT")
    seconds: str = Field(description="How long the video is: as near to what was asked for as the model can.")
    remixed_from_video_id: str | None = None
    seed: int
    num_frames: int | None = None
    fps: float
    adjusted: str | None = Field(None, description="What was changed to suit the model.")


class VideoList(BaseModel):
    """One page of the videos."""

    model_config = ConfigDict(json_schema_extra={"required": ["object", "data", "has_more"]})

    object: Literal["list"] = "list"
    data: list[Video]
    first_id: str | None = None
    last_id: str | None = None
    has_more: bool = False


class VideoDeleted(BaseModel):
    """A video that is gone."""

    id: str
    object: Literal["video.deleted"] = "video.deleted"
    deleted: bool = True


def video_of(record: Record, lifetime: float) -> Video:
    """Return a record as it is told to the caller of `/v1/videos`."""
    told: dict[str, Any] = {name: value for name, value in record.told.items() if name != "object"}
    ended = record.events[-1].time if record.ended is not None else None
    done = record.status == "done"
    return Video(
        id=record.id,
        status=_STATUSES[record.status],
        progress=percent(record),
        created_at=int(record.created),
        completed_at=int(ended) if ended is not None and done else None,
        expires_at=int(ended + lifetime) if ended is not None and done else None,
        error=None if record.error is None else VideoError(code=record.error.code, message=record.error.message),
        seed=record.seed,
        **told,
    )


def percent(record: Record) -> int:
    """Return about how much of a video is done; it never goes back, even where work is lost."""
    if record.status == "done":
        return 100
    begin, end = _DENOISING
    shares = [
        event.details["step"] / event.details["steps"]
        for event in record.events
        if event.kind == "step" and event.details.get("role") == "denoiser" and event.details.get("steps")
    ]
    return int(begin + (end - begin) * min(1.0, max(shares))) if shares else 0


def poll_after(record: Record, now: float) -> int:
    """Return the milliseconds after which it is worth asking again.

    The official client takes the first answer for all its polls, so that is no more than half a second.
    """
    least, first, most = _POLL
    share = percent(record) / 100
    if share <= _DENOISING[0] / 100 or record.status != "running":
        return first
    spent = now - next((event.time for event in record.events if event.kind == "started"), now)
    return round(min(most, max(least, 1000 * spent * (1 - share) / share / 10)))
