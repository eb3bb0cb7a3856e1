"""Files of results that are dropped while they are on their way out."""

import asyncio
from pathlib import Path
from typing import Any

import pytest

from triptych.server.kept_file import KeptFile
from triptych.server.problems import Refusal

SCOPE: dict[str, Any] = {"type": "http", "method": "GET", "path": "/", "headers": [], "extensions": {}}


async def receive() -> dict[str, Any]:
    await asyncio.Event().wait()
    raise AssertionError


def test_a_file_that_is_dropped_after_its_headers_were_sent_comes_whole(tmp_path: Path) -> None:
    path, content = tmp_path / "result.png", bytes(200_000)
    path.write_bytes(content)
    sent: list[dict[str, Any]] = []

    async def send(message: Any) -> None:
        sent.append(message)
        path.unlink(missing_ok=True)

    asyncio.run(KeptFile(path, media_type="image/png")(SCOPE, receive, send))
    assert sent[0]["status"] == 200 and (b"content-length", b"200000") in sent[0]["headers"]
    assert b"".join(each["body"] for each in sent[1:]) == content


def test_a_file_that_was_dropped_before_is_not_found(tmp_path: Path) -> None:
    async def send(message: Any) -> None:
        raise AssertionError(message)

    with pytest.raises(Refusal) as refused:
        asyncio.run(KeptFile(tmp_path / "gone.png")(SCOPE, receive, send))
    assert refused.value.problem.status == 404
