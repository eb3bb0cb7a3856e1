"""Waiting: the end of a request for a caller who stays for it."""

from __future__ import annotations

import asyncio

from fastapi import Request

from triptych.server.records import Record

CLOSED = 499
"""The status of what nobody reads any more; nginx's word for it."""


async def ended(record: Record, request: Request) -> bool:
    """Wait for a request's end; returns False, at once, where its caller went away before."""

    async def follow() -> None:
        async for _ in record.follow(0, 60.0):
            pass

    async def leave() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    end, gone = asyncio.create_task(follow()), asyncio.create_task(leave())
    try:
        await asyncio.wait({end, gone}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        end.cancel()
        gone.cancel()
    return record.ended is not None
