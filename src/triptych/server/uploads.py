"""Uploads: bodies that must come in time, not too many at once, and not too long."""

from __future__ import annotations

import asyncio
import time

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from triptych.server.guard import refuse
from triptych.server.limits import Limits

SMALL = 65_536
"""Bytes of a body that is not counted among the uploads at a time."""


class Uploads:
    """Bounds the bodies of requests for whatever is behind it.

    Attributes:
        running: uploads now.
    """

    def __init__(self, app: ASGIApp, limits: Limits) -> None:
        self.app, self.limits = app, limits
        self.running = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        length = headers.get("content-length", "")
        announced = int(length) if length.isdecimal() and len(length) < 20 else None
        if announced is None and "transfer-encoding" not in headers:
            await self.app(scope, receive, send)
            return
        if announced is not None and announced > self.limits.body:
            await _too_large(self.limits)(scope, receive, send)
            return
        counts = announced is None or announced > SMALL
        if counts and self.running >= self.limits.uploads:
            words = f"{self.limits.uploads} uploads are running already"
            retry = {"Retry-After": "2", "Connection": "close"}
            await refuse(503, words, "too_many_uploads", **retry)(scope, receive, send)
            return
        upload = _Upload(receive, self.limits, self, counts)
        try:
            await self._pass_on(scope, upload, send)
        finally:
            upload.end()

    async def _pass_on(self, scope: Scope, upload: _Upload, send: Send) -> None:
        """Run what is behind; where the upload went wrong, answer in its place."""
        started = False

        async def unless_wrong(message: Message) -> None:
            nonlocal started
            if started or upload.wrong is None:
                started = True
                await send(message)

        try:
            await self.app(scope, upload.receive, unless_wrong)
        except Exception:  # raised again, unless it is what the broken upload led to
            if upload.wrong is None or started:
                raise
        if upload.wrong is not None and not started:
            await upload.wrong(scope, upload.receive, send)


class _Upload:
    """One body on its way. To whatever reads it, one that is too slow or too long ends as if its sender had gone."""

    def __init__(self, receive: Receive, limits: Limits, uploads: Uploads, counts: bool) -> None:
        self.wrong: JSONResponse | None = None
        self._receive, self._limits = receive, limits
        self._end = time.monotonic() + limits.upload_seconds
        self._size = 0
        self._complete = False
        self._uploads = uploads if counts else None
        if counts:
            uploads.running += 1

    def end(self) -> None:
        """Count it no longer."""
        if self._uploads is not None:
            self._uploads.running -= 1
            self._uploads = None

    async def receive(self) -> Message:
        if self._complete:
            return await self._receive()
        if self.wrong is not None:
            return {"type": "http.disconnect"}
        patience = min(self._limits.upload_silence, self._end - time.monotonic())
        try:
            message = await asyncio.wait_for(self._receive(), max(patience, 0.0))
        except TimeoutError:
            words = f"the body did not come within {self._limits.upload_seconds:g} s, or paused for too long"
            return self._stop(refuse(408, words, "upload_timeout", Connection="close"))
        self._size += len(message.get("body", b""))
        if self._size > self._limits.body:
            return self._stop(_too_large(self._limits))
        if not message.get("more_body", False):
            self._complete = True
            self.end()
        return message

    def _stop(self, wrong: JSONResponse) -> Message:
        self.wrong = wrong
        self.end()
        return {"type": "http.disconnect"}


def _too_large(limits: Limits) -> JSONResponse:
    words = f"a request of at most {limits.body} bytes is accepted"
    return refuse(413, words, "too_large", Connection="close")
