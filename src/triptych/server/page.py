"""The page: what a browser gets at `/`. Plain files, read once; nothing is built and no other host is asked."""

from __future__ import annotations

import gzip
import hashlib
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from anyio import to_thread
from fastapi import APIRouter, Header, Response

from triptych.server.parameters import FamilyParameters, parameters_of
from triptych.server.problems import Refusal
from triptych.server.schema import errors
from triptych.server.service import Service

FOLDER = Path(__file__).parent / "page"
_MEDIA_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
_DIGEST = b"DIGEST"
"""Stands in `index.html` for the part of the paths that changes with the files."""

_POLICY = {
    "default-src": "'none'",
    "script-src": "'self'",
    "style-src": "'self'",
    "img-src": "'self' blob: data:",
    "media-src": "blob:",
    "connect-src": "'self'",
    "base-uri": "'none'",
    "form-action": "'none'",
    "frame-ancestors": "'none'",
    "require-trusted-types-for": "'script'",
}
HEADERS = {
    "Content-Security-Policy": "; ".join(f"{what} {sources}" for what, sources in _POLICY.items()),
    "Cross-Origin-Opener-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "Vary": "Accept-Encoding",
    "X-Content-Type-Options": "nosniff",
}
"""Of every file of the page."""
_FOREVER = "public, max-age=31536000, immutable"


@dataclass(frozen=True)
class File:
    """A file of the page, as it is sent."""

    media_type: str
    content: bytes
    packed: bytes
    etag: str

    def response(self, caching: str, encodings: str | None, known: str | None) -> Response:
        """Return the file for a browser that takes these encodings and may know it already."""
        headers = {**HEADERS, "Cache-Control": caching, "ETag": self.etag}
        if known is not None and self.etag in (each.strip().removeprefix("W/") for each in known.split(",")):
            return Response(status_code=304, headers=headers)
        if "gzip" not in (encodings or ""):
            return Response(self.content, media_type=self.media_type, headers=headers)
        return Response(self.packed, media_type=self.media_type, headers={**headers, "Content-Encoding": "gzip"})


@cache
def files() -> dict[str, File]:
    """Return the files of the page by name.

    All but `index.html` are asked for under a path that changes with them, so a browser may keep them for ever.
    """
    contents = {path.name: path.read_bytes() for path in sorted(FOLDER.iterdir()) if path.suffix in _MEDIA_TYPES}
    contents["index.html"] = contents["index.html"].replace(_DIGEST, digest(contents).encode())
    return {
        name: File(
            _MEDIA_TYPES[Path(name).suffix], content, gzip.compress(content, mtime=0), f'"{digest({name: content})}"'
        )
        for name, content in contents.items()
    }


def digest(contents: dict[str, bytes]) -> str:
    """Return a short name for these contents."""
    return hashlib.sha256(b"\0".join(contents.values())).hexdigest()[:16]


def page_router(service: Service) -> APIRouter:
    """Return the page's routes, and the one that tells it what to put in its form."""
    router = APIRouter()

    @router.api_route("/", methods=["GET", "HEAD"], include_in_schema=False)
    async def index(accept_encoding: str | None = Header(None), if_none_match: str | None = Header(None)) -> Response:
        return files()["index.html"].response("no-cache", accept_encoding, if_none_match)

    @router.api_route("/page/{version}/{name}", methods=["GET", "HEAD"], include_in_schema=False)
    async def file(
        version: str, name: str, accept_encoding: str | None = Header(None), if_none_match: str | None = Header(None)
    ) -> Response:
        found = files().get(name)
        if found is None or name == "index.html":
            raise Refusal(404, "not_found", f"the page has no file {name!r}")
        current = f"/{version}/".encode() in files()["index.html"].content
        return found.response(_FOREVER if current else "no-cache", accept_encoding, if_none_match)

    @router.get("/v1/parameters", responses=errors(503))
    async def parameters() -> FamilyParameters:
        """Tell what a request may carry, with the loaded model's defaults."""
        return await to_thread.run_sync(parameters_of, service.open_engine(), service.limits)

    return router
