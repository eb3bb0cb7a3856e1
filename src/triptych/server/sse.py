"""Server-sent events: a request's events as a stream that can be taken up again.

The format: https://html.spec.whatwg.org/multipage/server-sent-events.html
"""

from __future__ import annotations

import base64
import json
from collections.abc import AsyncIterator

from triptych.engine.job import Event
from triptych.server.records import Record

RETRY = 1000
"""Milliseconds after which a reader that lost its connection comes back."""


def first_unseen(last_event_id: str | None) -> int:
    """Return the number of the event that follows the last one a reader has; 0 for one that has none."""
    text = (last_event_id or "").strip()
    return int(text) + 1 if text.isascii() and text.isdigit() and len(text) < 16 else 0


def encode(record: Record, event: Event) -> str:
    """Return one event as text."""
    data = json.dumps({"request": record.id, "time": event.time, **event.details}, default=_base64)
    return f"id: {event.number}\nevent: {event.kind}\ndata: {data}\n\n"


def _base64(value: object) -> str:
    if not isinstance(value, bytes):
        raise TypeError(f"{type(value).__name__} is no JSON")
    return base64.b64encode(value).decode("ascii")


async def stream(record: Record, start: int, keep_alive: float) -> AsyncIterator[str]:
    """Yield a record's events as text, with a comment after every `keep_alive` seconds of silence."""
    yield f"retry: {RETRY}\n\n"
    async for event in record.follow(start, keep_alive):
        yield ": still here\n\n" if event is None else encode(record, event)
