"""Files of results that may be dropped while they are on their way out, and the count of what is."""

from __future__ import annotations

import os
import re

from anyio import to_thread
from fastapi.responses import FileResponse
from starlette.responses import MalformedRangeHeader
from starlette.types import ASGIApp, Receive, Scope, Send

from triptych.server.problems import Refusal
from triptych.server.records import Records

_RESULT = re.compile(r"/v1/(requests/[^/]+/result|images/(generations|edits|files/.+)|videos/([^/]+/content|sync))/?")
"""Paths that answer with results."""


class Fetches:
    """Counts the answers with results that are being made or sent: a server that is to stop waits for them."""

    def __init__(self, app: ASGIApp, records: Records) -> None:
        self.app, self.records = app, records

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        counts = scope["type"] == "http" and _RESULT.fullmatch(scope["path"]) is not None
        self.records.fetches += counts
        try:
            await self.app(scope, receive, send)
        finally:
            self.records.fetches -= counts


class KeptFile(FileResponse):
    """A file of a result; 404 where the result was dropped between the file's making and its sending."""

    @classmethod
    def _parse_range_header(cls, http_range: str, file_size: int) -> list[tuple[int, int]]:
        """Return the ranges asked for; none, which is the whole file, for a header that is to be ignored.

        RFC 9110, 14.2: one of another unit is, and so may one be that cannot be read.
        """
        try:
            return super()._parse_range_header(http_range, file_size)
        except MalformedRangeHeader:
            return []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            file = await to_thread.run_sync(open, self.path, "rb")
        except FileNotFoundError:
            raise Refusal(404, "not_found", "this result is no longer kept") from None
        with file:
            self.path = f"/dev/fd/{file.fileno()}"  # so that it comes whole though it is dropped meanwhile
            self.stat_result = os.fstat(file.fileno())
            self.set_stat_headers(self.stat_result)
            await super().__call__(scope, receive, send)
