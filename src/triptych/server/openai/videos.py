"""`/v1/videos`: videos as the official clients ask for them."""

from __future__ import annotations

import secrets
import time
from typing import Any, Literal

from anyio import to_thread
from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import FileResponse

from triptych.server.kept_file import KeptFile
from triptych.server.openai.form import read_fields
from triptych.server.openai.video_object import Video, VideoDeleted, VideoList, poll_after, video_of
from triptych.server.openai.video_order import VideoOrder, order_of
from triptych.server.openai.waiting import CLOSED, ended
from triptych.server.problems import Problem, Refusal
from triptych.server.records import Record
from triptych.server.schema import errors, files_of
from triptych.server.service import Service

_PAGE, _LONGEST_PAGE = 20, 100
"""Videos of one page of the list: where nothing is said, and at most."""

_PICTURE = {"description": "A picture as a data URL or in base64, or an object with its `image_url`."}
_FIELDS: dict[str, Any] = {
    "prompt": {"type": "string"},
    "model": {"type": "string"},
    "size": {"type": "string", "description": "auto, or WIDTHxHEIGHT."},
    "seconds": {"type": "string", "description": "How long; the nearest that the model can make is made."},
    "fps": {"type": "number", "description": "Frames per second, if not the model's own."},
    "user": {"type": "string", "description": "Taken from clients that send it, and not used."},
}
_BODY = {
    "requestBody": {
        "required": True,
        "description": "The family's own parameters (`GET /v1/parameters`) go beside these.",
        "content": {
            "application/json": {
                "schema": {
                    "type": "object",
                    "required": ["prompt"],
                    "properties": {**_FIELDS, "input_reference": _PICTURE},
                }
            },
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["prompt"],
                    "properties": {
                        **_FIELDS,
                        "input_reference": {"type": "string", "format": "binary", "description": "The first frame."},
                    },
                }
            },
        },
    }
}
_REFUSED = errors(400, 404, 415, 429, 507)


def videos_router(service: Service) -> APIRouter:
    """Return the routes of `/v1/videos`."""
    router = APIRouter(prefix="/v1/videos", tags=["videos"])
    records = service.records

    def told(record: Record, response: Response) -> Video:
        if record.ended is None:
            response.headers["openai-poll-after-ms"] = str(poll_after(record, time.time()))
        return video_of(record, records.lifetime(record))

    @router.post("", responses=_REFUSED, openapi_extra=_BODY)
    async def create(request: Request, response: Response) -> Video:
        """Take a video on, and answer at once; it is on disk before it is promised."""
        return told(await _take_on(service, await _order(service, request), lasting=True), response)

    @router.post(
        "/sync",
        response_class=FileResponse,
        responses={**files_of("video/mp4"), **_REFUSED, **errors(410, 504)},
        openapi_extra=_BODY,
    )
    async def sync(request: Request) -> Response:
        """Make a video and answer with the MP4. A caller that goes away stops it before its next step."""
        record = await _take_on(service, await _order(service, request), lasting=False)
        if not await ended(record, request):
            await service.forget(record)
            return Response(status_code=CLOSED)
        return await _file(service, record, "video")

    @router.get("", responses=errors(400, 404))
    async def listed(
        after: str | None = Query(None, description="The last id of the page before."),
        limit: int = Query(_PAGE, ge=1, le=_LONGEST_PAGE),
        order: Literal["asc", "desc"] = Query("desc"),
    ) -> VideoList:
        """List the videos, the newest first."""
        found = [record for record in records.all() if _is_video(record)]
        if order == "desc":
            found.reverse()
        if after is not None:
            ids = [record.id for record in found]
            if after not in ids:
                raise _unknown(after)
            found = found[ids.index(after) + 1 :]
        page = [video_of(record, records.lifetime(record)) for record in found[:limit]]
        first, last = (page[0].id, page[-1].id) if page else (None, None)
        return VideoList(data=page, first_id=first, last_id=last, has_more=len(found) > limit)

    @router.get("/{video_id}", responses=errors(404))
    async def retrieve(video_id: str, response: Response) -> Video:
        """Tell how a video stands."""
        return told(_find(service, video_id), response)

    @router.head("/{video_id}/content", include_in_schema=False)
    @router.get(
        "/{video_id}/content",
        response_class=FileResponse,
        responses={**files_of("video/mp4", "image/webp"), **errors(400, 404, 409, 410, 504, 507)},
    )
    async def content(video_id: str, variant: Literal["video", "thumbnail"] = Query("video")) -> Response:
        """Hand over the MP4, or a small picture of its first frame; ranges are served."""
        return await _file(service, _find(service, video_id), variant)

    @router.delete("/{video_id}", responses=errors(404, 507))
    async def delete(video_id: str) -> VideoDeleted:
        """Stop a video, and forget it and its files."""
        await service.forget(_find(service, video_id))
        return VideoDeleted(id=video_id)

    return router


async def _order(service: Service, request: Request) -> VideoOrder:
    """Read a request's body and check what it asks for."""
    engine, limits = service.open_engine(), service.limits  # before the body is read
    fields = await read_fields(request, limits.images)
    return await to_thread.run_sync(order_of, fields, engine, limits)


async def _take_on(service: Service, order: VideoOrder, *, lasting: bool) -> Record:
    """Have the engine make a video.

    Raises:
        UsageError, OverloadedError, Refusal: it does not.
    """
    record = Record(f"video_{secrets.token_hex(12)}", None, 0, "videos", time.time(), told=order.told)
    submission = (lambda: order.submission.model_dump_json().encode()) if lasting else None
    await service.take_on(record, order.request, submission=submission)
    return record


async def _file(service: Service, record: Record, variant: Literal["video", "thumbnail"]) -> Response:
    if record.ended is None:
        raise Refusal(409, "not_done", f"{record.id} is not completed yet: ask GET /v1/videos/{record.id}")
    if record.status != "done":
        problem = record.error or Problem(410, record.status, f"{record.id} was {record.status}")
        raise Refusal.of(problem)
    spool = service.records.spool
    record.fetched = True
    try:
        if variant == "thumbnail":
            path = await to_thread.run_sync(spool.thumbnail, record.id)
        else:
            path = await to_thread.run_sync(spool.file, record.id, 0, 1, ".mp4")
    except FileNotFoundError:
        raise Refusal(404, "not_found", f"the files of {record.id} are no longer kept") from None
    media_type = "image/webp" if variant == "thumbnail" else "video/mp4"
    headers = {"Triptych-Video-Id": record.id, "Triptych-Seed": str(record.seed)}
    filename = f"{record.id}{path.suffix}"
    return KeptFile(path, media_type=media_type, headers=headers, filename=filename, content_disposition_type="inline")


def _find(service: Service, name: str) -> Record:
    try:
        record = service.records.get(name)
    except Refusal:
        raise _unknown(name) from None
    if not _is_video(record):
        raise _unknown(name)
    return record


def _is_video(record: Record) -> bool:
    return record.told.get("object") == "video"


def _unknown(name: str) -> Refusal:
    return Refusal(404, "not_found", f"there is no video {name[:100]!r}; completed ones are kept for some time only")
