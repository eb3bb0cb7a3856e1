"""Limits: what one caller may take of a server, and what is kept for all of them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """Bounds of a server; none can be passed by a request.

    Attributes:
        body: bytes of a request's JSON, images included.
        images: pictures of one request.
        pixels: of all pictures of one request together.
        deadline: seconds that a request may ask for.
        kept: finished requests that are remembered.
        kept_seconds: how long each of them is.
        kept_bytes: of results on disk; the oldest go first.
        keep_alive: seconds of silence on a stream of events before a comment is sent.
        linger: seconds that a result which nobody has fetched holds a server back that is to stop.
    """

    body: int = 64 * 2**20
    images: int = 16
    pixels: int = 64_000_000
    deadline: float = 24 * 3600
    kept: int = 1000
    kept_seconds: float = 3600
    kept_bytes: int = 4 * 2**30
    keep_alive: float = 15
    linger: float = 5
