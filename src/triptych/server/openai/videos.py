"""`/v1/videos`: videos as the official clients ask for them."""

from __future__ import annotations

import asyncio
import secrets
import sqlite3
import time
from typing import Any, Literal

from anyio import to_thread
from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import FileResponse

from triptych.server.jobs import StoredJob
from triptych.server.kept_file import KeptFile
from triptych.server.openai.form import read_fields
from triptych.server.openai.video_object import Video, VideoDeleted, VideoList, poll_after, video_of
from triptych.server.openai.video_order import VideoOrder, order_of
from triptych.server.problems import Problem, Refusal
from triptych.server.records import Record
from triptych.server.schema import ErrorBody
from triptych.server.service import Service

_PAGE, _LONGEST_PAGE = 20, 100
"""Videos of one page of the list: where nothing is said, and at most."""
_DISCONNECTED = 0.5
"""Seconds between two looks whether the caller of a synchronous request is still there."""
_CLOSED = 499
"""What nobody reads any more; nginx's word for it."""

_PICTURE = {"description": "A picture as a data URL or in base64, or an object with its `image_url`."}
_FIELDS: dict[str, Any] = {
    "prompt": {"type": "string"},
    "model": {"type": "string"},
    "size": {"type": "string", "description": "auto, or WIDTHxHEIGHT."},
    "seconds": {"type": "string", "description": "How long; the nearest that the model can make is made."},
    "fps": {"type": "number", "description": "Frames per second, if not the model's own."},
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
_FILE = {"schema": {"type": "string", "format": "binary"}}


def _errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    return {status: {"model": ErrorBody} for status in statuses}


_REFUSED = _errors(400, 404, 413, 415, 429, 503, 507)


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
        """Take a video on, and answer at once."""
        record = await _take_on(service, await _order(service, request), lasting=records.store is not None)
        return told(record, response)

    @router.post(
        "/sync",
        response_class=FileResponse,
        responses={200: {"content": {"video/mp4": _FILE}}, **_REFUSED, **_errors(410, 500, 504)},
        openapi_extra=_BODY,
    )
    async def sync(request: Request) -> Response:
        """Make a video and answer with the MP4. A caller that goes away stops it before its next step."""
        record = await _take_on(service, await _order(service, request), lasting=False)
        async for _ in record.follow(0, _DISCONNECTED):
            if await request.is_disconnected():
                await service.cancel(record)
                records.remove(record)
                return Response(status_code=_CLOSED)
        return await _file(service, record, "video")

    @router.get("", responses=_errors(400, 404))
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

    @router.get("/{video_id}", responses=_errors(404))
    async def retrieve(video_id: str, response: Response) -> Video:
        """Tell how a video stands."""
        return told(_find(service, video_id), response)

    @router.get(
        "/{video_id}/content",
        response_class=FileResponse,
        responses={
            200: {"content": {"video/mp4": _FILE, "image/webp": _FILE}},
            206: {"content": {"video/mp4": _FILE, "image/webp": _FILE}, "description": "The range asked for."},
            416: {"content": {"text/plain": {"schema": {"type": "string"}}}, "description": "No such range."},
            **_errors(400, 404, 409, 410, 500, 504),
        },
    )
    async def content(video_id: str, variant: Literal["video", "thumbnail"] = Query("video")) -> Response:
        """Hand over the MP4, or a small picture of its first frame; ranges are served."""
        return await _file(service, _find(service, video_id), variant)

    @router.delete("/{video_id}", responses=_errors(404))
    async def delete(video_id: str) -> VideoDeleted:
        """Stop a video, and forget it and its files."""
        record = _find(service, video_id)
        await service.cancel(record)
        if record.lasting and records.store is not None:
            await to_thread.run_sync(records.store.forget, record.id)  # before the answer says so
        records.remove(record)
        return VideoDeleted(id=video_id)

    return router


async def _order(service: Service, request: Request) -> VideoOrder:
    """Read a request's body and check what it asks for."""
    engine, limits = service.open_engine(), service.limits  # before the body is read
    fields = await read_fields(request, limits.body, limits.images)
    return await to_thread.run_sync(order_of, fields, engine, limits)


async def _take_on(service: Service, order: VideoOrder, *, lasting: bool) -> Record:
    """Have the engine make a video; one that lasts is on disk before it is promised.

    Raises:
        OverloadedError, Refusal: there is no room.
    """
    loop, records, engine = asyncio.get_running_loop(), service.records, service.open_engine()
    store = records.store if lasting else None
    name, seed = f"video_{secrets.token_hex(12)}", int(order.submission.parameters["seed"])  # type: ignore[arg-type]
    record = Record(name, None, seed, "videos", time.time(), told=order.told, lasting=store is not None)

    def admit() -> None:
        if store is not None:
            data = order.submission.model_dump_json().encode()
            if store.submitted_bytes() + len(data) > service.limits.kept_bytes:
                words = "the requests that wait already fill the space that there is for them"
                raise Refusal(429, "overloaded", words, {"Retry-After": "30"})
            stored = StoredJob(name, engine.front.fingerprint, "videos", seed, record.created, order.told)
            try:
                store.add(stored, data)
            except (OSError, sqlite3.Error) as error:
                raise Refusal(507, "no_space", f"the request cannot be kept: {error}") from error
        try:
            record.job = engine.submit(order.request)
        except BaseException:
            if store is not None:
                store.forget(name)
            raise
        records.listen(record, record.job, loop)

    await to_thread.run_sync(admit)
    records.add(record)
    return record


async def _file(service: Service, record: Record, variant: Literal["video", "thumbnail"]) -> Response:
    if record.ended is None:
        raise Refusal(409, "not_done", f"{record.id} is not completed yet: ask GET /v1/videos/{record.id}")
    if record.status != "done":
        problem = record.error or Problem(410, record.status, f"{record.id} was {record.status}")
        refusal = Refusal(problem.status, problem.type, problem.message)
        refusal.problem = problem
        raise refusal
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
