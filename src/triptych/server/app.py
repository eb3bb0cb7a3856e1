"""The HTTP interface: paths, what they take and what they answer."""

from __future__ import annotations

import asyncio
import logging
import sqlite3
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from anyio import CapacityLimiter, to_thread
from fastapi import FastAPI, Header, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.middleware.errors import ServerErrorMiddleware
from starlette.requests import ClientDisconnect

import triptych
from triptych.errors import ParameterError, TriptychError
from triptych.server import formats, sse
from triptych.server.formats import MEDIA_TYPES
from triptych.server.guard import Access, Guard
from triptych.server.kept_file import Fetches, KeptFile
from triptych.server.openai.images import images_router
from triptych.server.openai.models import models_router
from triptych.server.openai.videos import videos_router
from triptych.server.openai.waiting import CLOSED
from triptych.server.openapi import completed
from triptych.server.page import page_router
from triptych.server.pools import pools_router
from triptych.server.problems import Problem, Refusal, problem_of
from triptych.server.records import Record
from triptych.server.resume import restore, resume
from triptych.server.schema import RequestStatus, error_body, errors, files_of, status_of
from triptych.server.service import Service
from triptych.server.submission import Submission
from triptych.server.telemetry import Telemetry
from triptych.server.uploads import Uploads

log = logging.getLogger(__name__)

_TRIM = 5.0
"""Seconds between two looks for records that are too old."""
_RENDERERS = 4
"""Results that are turned into files at a time."""

_SUBMISSION = {
    "requestBody": {"required": True, "content": {"application/json": {"schema": Submission.model_json_schema()}}}
}

_EVENTS: dict[int | str, dict[str, Any]] = {
    200: {"content": {"text/event-stream": {}}},
    204: {"description": "There is nothing more to come: a browser then stops asking."},
}

_CORS: dict[str, Any] = {
    "allow_methods": ["GET", "POST", "DELETE"],
    "allow_headers": ["*"],
    "expose_headers": ["Location", "Retry-After", "Content-Range", "openai-poll-after-ms"],
}


def create_app(service: Service, access: Access | None = None) -> FastAPI:
    """Return the application that serves a service to those who have access."""
    records, limits = service.records, service.limits
    telemetry = Telemetry(service)
    renderers = CapacityLimiter(_RENDERERS)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        async def trim() -> None:
            while True:
                await asyncio.sleep(_TRIM)
                records.trim()

        tasks = [asyncio.create_task(trim())]
        if records.store is not None:
            waiting = await restore(service, records.store)
            tasks.append(asyncio.create_task(resume(service, records.store, waiting)))
        yield
        for task in tasks:
            task.cancel()
        await to_thread.run_sync(telemetry.close)

    app = FastAPI(
        title="Triptych",
        version=triptych.__version__,
        lifespan=lifespan,
        docs_url=None,  # they load scripts from other hosts
        redoc_url=None,
    )
    app.openapi = completed(app)  # type: ignore[method-assign]

    @app.post("/v1/requests", status_code=202, responses=errors(400, 429, 507), openapi_extra=_SUBMISSION)
    async def submit(request: Request, response: Response) -> RequestStatus:
        """Take a request on, and answer at once."""
        service.open_engine()  # before the body is read
        record = await service.submit(await request.body())
        status = status_of(record, records.position(record))
        response.headers["Location"] = status.links.self
        return status

    @app.get("/v1/requests/{name}", responses=errors(404))
    async def status(name: str) -> RequestStatus:
        """Tell how a request stands."""
        record = records.get(name)
        return status_of(record, records.position(record))

    @app.get("/v1/requests/{name}/events", response_class=StreamingResponse, responses={**_EVENTS, **errors(404)})
    async def events(name: str, last_event_id: str | None = Header(None)) -> Response:
        """Tell what happens to a request, as it happens, from after `Last-Event-ID` on."""
        record = records.get(name)
        start = sse.first_unseen(last_event_id) - record.first
        if not 0 <= start <= len(record.events):
            start = 0  # the server has started anew since, and so has the request
        if record.ended is not None and start == len(record.events):
            return Response(status_code=204)  # a browser then stops asking
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        stream = sse.stream(record, start, limits.keep_alive)
        return StreamingResponse(stream, media_type="text/event-stream", headers=headers)

    @app.head("/v1/requests/{name}/result", include_in_schema=False)
    @app.get(
        "/v1/requests/{name}/result",
        response_class=FileResponse,
        responses={**files_of(*MEDIA_TYPES), **errors(400, 404, 406, 409, 410, 507)},
    )
    async def result(
        name: str, index: int = Query(0), format: str | None = Query(None), accept: str | None = Header(None)
    ) -> Response:
        """Hand one output over, in the format of `format`, or of `Accept`."""
        record = records.get(name)
        _check_done(record)
        if not 0 <= index < record.outputs:
            raise ParameterError("index", index, f"there are {record.outputs} results, from 0 on")
        makes, kept = record.makes, _kept_as(record)
        wanted = formats.accepted(makes, accept, kept) if format is None else formats.named(makes, format, kept)
        record.fetched = True
        work = (record.id, index, record.outputs, wanted.suffix)
        try:
            path = await to_thread.run_sync(records.spool.file, *work, limiter=renderers)
        except FileNotFoundError:
            raise Refusal(404, "not_found", f"the result of {name} is no longer kept") from None
        records.trim()
        filename = f"{record.id}-{index}{wanted.suffix}"
        headers = {"Vary": "Accept"}
        return KeptFile(
            path, media_type=wanted.media_type, headers=headers, filename=filename, content_disposition_type="inline"
        )

    @app.post("/v1/requests/{name}/cancel", responses=errors(404))
    async def cancel(name: str) -> RequestStatus:
        """Stop a request before its next step; one that has ended stays as it is."""
        record = records.get(name)
        await service.cancel(record)
        return status_of(record, records.position(record))

    @app.delete("/v1/requests/{name}", status_code=204, responses=errors(404, 507))
    async def delete(name: str) -> None:
        """Stop a request, and forget it and its result."""
        await service.forget(records.get(name))

    @app.get("/v1/status")
    def snapshot() -> dict[str, Any]:
        """Tell how things stand: replicas, queues, bytes."""
        return service.snapshot()

    @app.head("/health", include_in_schema=False)
    @app.get("/health")
    async def health() -> dict[str, str]:
        """Answer as long as the process is alive."""
        return {"status": "alive"}

    @app.head("/ready", include_in_schema=False)
    @app.get("/ready", responses=errors(503))
    def ready() -> dict[str, str]:
        """Answer 200 when requests can be served."""
        if (reason := service.why_not_ready()) is not None:
            raise Refusal(503, "not_ready", reason)
        return {"status": "ready"}

    app.include_router(page_router(service))
    app.include_router(pools_router(service))
    app.include_router(telemetry.router())
    app.add_middleware(Fetches, records=records)
    app.add_middleware(Uploads, limits=limits)
    app.add_middleware(Guard, access=access or Access())
    telemetry.install(app)
    _answer_errors(app)
    if access is not None and access.origins:
        app.add_middleware(CORSMiddleware, allow_origins=access.origins, **_CORS)  # the last is the first to be asked
    app.include_router(videos_router(service))
    app.include_router(images_router(service))
    app.include_router(models_router(service))
    return app


def _check_done(record: Record) -> None:
    if record.ended is None:
        raise Refusal(409, "not_done", f"{record.id} is {record.status}: there is no result yet")
    if record.status != "done":
        problem = record.error or Problem(410, record.status, f"{record.id} was {record.status}")
        raise Refusal(410, problem.code, f"there is no result: {problem.message}")


def _kept_as(record: Record) -> str | None:
    """Return the suffix of the only files that are kept of a record's result; None where it can be had in any format."""
    if record.told.get("object") == "video":
        return ".mp4"
    suffix: str | None = record.told.get("suffix")
    return suffix


def _answer_errors(app: FastAPI) -> None:
    """Give every error the one form that errors have."""

    def respond(problem: Problem) -> JSONResponse:
        return JSONResponse(error_body(problem), problem.status, headers=dict(problem.headers))

    async def expected(_: Request, error: Exception) -> JSONResponse:
        problem = problem_of(error)
        if problem.status >= 500 and not isinstance(error, Refusal):
            log.error("a request to the server failed", exc_info=error)
        return respond(problem)

    async def unexpected(request: Request, error: Exception) -> JSONResponse:
        response = await expected(request, error)
        # Uvicorn drops the connection after it: a client that was not told would send its next request into it.
        response.headers["Connection"] = "close"
        return response

    async def gone(_: Request, error: Exception) -> Response:
        return Response(status_code=CLOSED)  # nobody reads it: it is for those who count

    async def from_framework(_: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        words = {404: "not_found", 405: "method_not_allowed"}
        code = words.get(error.status_code, "bad_request" if error.status_code < 500 else "internal")
        return respond(Problem(error.status_code, code, str(error.detail), headers=error.headers or {}))

    async def bad_query(_: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        first = error.errors()[0]
        return respond(problem_of(ParameterError(str(first["loc"][-1]), first.get("input"), first["msg"])))

    app.add_exception_handler(Refusal, expected)
    app.add_exception_handler(TriptychError, expected)
    app.add_exception_handler(ClientDisconnect, gone)
    app.add_exception_handler(OSError, expected)  # a full disk
    app.add_exception_handler(sqlite3.Error, expected)
    # Not as a handler: those of `Exception` are outside of what lets pages of other sites read an answer.
    app.add_middleware(ServerErrorMiddleware, handler=unexpected)
    app.add_exception_handler(HTTPException, from_framework)
    app.add_exception_handler(RequestValidationError, bad_query)
