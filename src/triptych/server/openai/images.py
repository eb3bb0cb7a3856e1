"""`/v1/images`: pictures as the official clients ask for them, at once or as a stream with previews."""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections.abc import AsyncIterator
from functools import partial
from typing import Any

from anyio import to_thread
from fastapi import APIRouter, Request, Response
from fastapi.responses import FileResponse, StreamingResponse
from starlette.types import Receive, Scope, Send

from triptych.result import Result
from triptych.server.formats import FORMATS
from triptych.server.jobs import StoredJob
from triptych.server.kept_file import KeptFile
from triptych.server.openai.form import read_fields
from triptych.server.openai.image_answer import SUFFIXES, Files, ImagesAnswer, converted, event
from triptych.server.openai.image_order import OWN, PREVIEWS, QUALITIES, order_of
from triptych.server.openai.waiting import CLOSED, ended
from triptych.server.problems import Problem, Refusal
from triptych.server.records import Record
from triptych.server.schema import errors, files_of
from triptych.server.service import Service

FILES = "/v1/images/files"
"""Below which pictures are fetched without a key: their names cannot be guessed."""

_FIELDS: dict[str, Any] = {
    **{name: {"type": {"text": "string", "flag": "boolean"}.get(kind, kind)} for name, kind in OWN.items()},
    "prompt": {"type": "string"},
    "n": {"type": "integer", "minimum": 1, "maximum": 10},
    "size": {"type": "string", "description": "auto, or WIDTHxHEIGHT."},
    "quality": {"type": "string", "enum": list(QUALITIES), "description": "Decides over the number of steps."},
    "output_format": {"type": "string", "enum": list(SUFFIXES)},
    "response_format": {"type": "string", "enum": ["b64_json", "url"]},
    "partial_images": {"type": "integer", "minimum": 0, "maximum": PREVIEWS},
}
_OF_FAMILY = "The family's own parameters (`GET /v1/parameters`) go beside these."


def _body(required: list[str], kinds: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Return what a route says of its body, from the fields that each kind of content adds to the common ones."""
    content = {
        kind: {"schema": {"type": "object", "required": required, "properties": {**_FIELDS, **more}}}
        for kind, more in kinds.items()
    }
    return {"requestBody": {"required": True, "description": _OF_FAMILY, "content": content}}


def _pictures(one: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of an edit's pictures, from what one is."""
    several = {"oneOf": [one, {"type": "array", "items": one, "maxItems": 16}], "description": one["description"]}
    return {"image": several, "mask": one}


_FILE = {"type": "string", "format": "binary", "description": "A file, or a picture as a data URL or in base64."}
_TEXT = {"type": "string", "description": "A picture as a data URL or in base64."}
_GENERATION = _body(["prompt"], {"application/json": {}})
_EDIT = _body(["prompt", "image"], {"multipart/form-data": _pictures(_FILE), "application/json": _pictures(_TEXT)})
_KINDS = [each.media_type for each in FORMATS["images"]]
_STREAM: dict[str, Any] = {"text/event-stream": {}}


_ANSWERS: dict[int | str, dict[str, Any]] = {
    200: {"model": ImagesAnswer, "content": _STREAM},
    **errors(400, 404, 410, 415, 429, 504, 507),
}


def images_router(service: Service) -> APIRouter:
    """Return the routes of `/v1/images`."""
    router = APIRouter(prefix="/v1/images", tags=["images"])

    @router.post("/generations", response_model=None, responses=_ANSWERS, openapi_extra=_GENERATION)
    async def generate(request: Request) -> Response:
        """Make pictures from a prompt. A caller that goes away stops it before its next step."""
        return await _serve(service, request, edit=False)

    @router.post("/edits", response_model=None, responses=_ANSWERS, openapi_extra=_EDIT)
    async def edit(request: Request) -> Response:
        """Make pictures from a prompt and other pictures."""
        return await _serve(service, request, edit=True)

    @router.head("/files/{name}/{file}", include_in_schema=False)
    @router.get(
        "/files/{name}/{file}", response_class=FileResponse, responses={**files_of(*_KINDS), **errors(404, 507)}
    )
    async def fetch(name: str, file: str) -> Response:
        """Hand over a picture that was asked for with `response_format=url`."""
        record = service.records.get(name)
        suffix = str(record.told.get("suffix") or "/")  # which no name ends with
        number = file.removesuffix(suffix)
        if (
            number == file
            or len(number) > 3
            or not number.isascii()
            or not number.isdecimal()
            or int(number) >= record.outputs
        ):
            raise Refusal(404, "not_found", f"there is no picture {file[:20]!r} of this request")
        work = (record.id, int(number), record.outputs, suffix)
        try:
            path = await to_thread.run_sync(service.records.spool.file, *work)
        except FileNotFoundError:
            raise Refusal(404, "not_found", "this picture is no longer kept") from None
        record.fetched = True
        media_type = next(each.media_type for each in FORMATS["images"] if each.suffix == suffix)
        return KeptFile(path, media_type=media_type, filename=path.name, content_disposition_type="inline")

    return router


async def _serve(service: Service, request: Request, *, edit: bool) -> Response:
    engine, limits = service.open_engine(), service.limits  # before the body is read
    fields = await read_fields(request, limits.images + 1)  # and a mask
    order = await to_thread.run_sync(partial(order_of, fields, engine, limits, edit=edit))
    files = Files(order)
    record = await _take_on(service, files)
    if order.stream:
        kind = "image_edit" if edit else "image_generation"
        return _Stream(service, record, _events(record, files, kind, limits.keep_alive))
    if not await ended(record, request):
        await service.forget(record)
        return Response(status_code=CLOSED)
    record.fetched = not order.links
    if record.status != "done":
        raise Refusal.of(_problem(record))
    count = len(files.data) if order.links else 0
    links = [
        f"{str(request.base_url).rstrip('/')}{FILES}/{record.id}/{k}{SUFFIXES[order.format]}" for k in range(count)
    ]
    return Response(await to_thread.run_sync(_json, files, record.seed, links), media_type="application/json")


def _json(files: Files, seed: int, links: list[str]) -> bytes:
    return files.answer(seed, links).model_dump_json().encode()


async def _take_on(service: Service, files: Files) -> Record:
    """Have the engine make an order's pictures.

    Raises:
        UsageError, OverloadedError: it does not.
    """
    records, engine, order = service.records, service.open_engine(), files.order
    name, suffix = f"image_{secrets.token_hex(16)}", SUFFIXES[order.format]
    told = {"object": "image", "suffix": suffix if order.links else None}

    def keep(result: Result) -> None:
        files.fill(result)
        if not order.links:
            return
        try:
            records.spool.put_files(name, suffix, files.data, lasting=records.store is not None)
            if records.store is not None:  # its caller has gone by the next start, the address has not
                who = (name, engine.front.fingerprint, "images", record.seed, record.created, told)
                records.store.add(StoredJob(*who, status="done", ended=time.time(), outputs=len(files.data)), None)
                record.lasting = True
        except BaseException:  # the request fails without outputs, so that nobody would look for files of it
            records.spool.release(name)
            records.spool.erase(name)
            raise

    record = Record(name, None, 0, "images", time.time(), told=told, keep=keep)
    await service.take_on(record, order.request, previews=order.previews)
    return record


async def _events(record: Record, files: Files, kind: str, keep_alive: float) -> AsyncIterator[str]:
    """Yield a stream of pictures as server-sent events."""
    order, index = files.order, 0
    async for each in record.follow(0, keep_alive):
        if each is None:
            yield ": still here\n\n"
        elif each.kind == "preview" and index < order.previews and "png" in each.details:
            file, size = await to_thread.run_sync(converted, each.details["png"], order)
            yield _encoded(event(order, f"{kind}.partial_image", file, size, partial_image_index=index))
            index += 1
    record.fetched = True
    if record.status == "done":
        more = {"usage": files.usage().model_dump(), "seed": record.seed, "safety_identifier": order.user}
        yield _encoded(event(order, f"{kind}.completed", files.data[0], files.size, **more))
    else:
        yield _encoded({"type": "error", "error": _problem(record).body()})


def _encoded(told: dict[str, Any]) -> str:
    return f"event: {told['type']}\ndata: {json.dumps(told)}\n\n"


def _problem(record: Record) -> Problem:
    return record.error or Problem(410, record.status, f"the request was {record.status}")


class _Stream(StreamingResponse):
    """A stream whose end, whatever it is, stops the request that it tells of."""

    def __init__(self, service: Service, record: Record, events: AsyncIterator[str]) -> None:
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        super().__init__(events, media_type="text/event-stream", headers=headers)
        self._service, self._record = service, record

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            if self._record.ended is None and self._record.job is not None:
                # Not awaited: this task may be one that is being cancelled.
                asyncio.get_running_loop().run_in_executor(None, self._record.job.cancel)
                self._service.records.remove(self._record)
