"""The front: what its socket is like."""

import asyncio
import socket

import httpx
import pytest
from fastapi import FastAPI, Request

from triptych.errors import UsageError
from triptych.server.front import Front, listen


@pytest.mark.parametrize(
    ("trusted", "scheme"), [(None, "https"), ("10.0.0.7", "http"), ("10.0.0.7,127.0.0.0/8", "https"), ("*", "https")]
)
def test_a_proxy_that_is_trusted_says_how_it_was_asked(
    trusted: str | None, scheme: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("FORWARDED_ALLOW_IPS", raising=False)
    if trusted is not None:
        monkeypatch.setenv("FORWARDED_ALLOW_IPS", trusted)
    app = FastAPI()

    @app.get("/")
    async def base(request: Request) -> str:
        return str(request.base_url)

    headers = {"Host": "pictures.example", "X-Forwarded-Proto": "https"}
    with Front(app, "127.0.0.1", 0) as front:
        assert httpx.get(front.url, headers=headers).json() == f"{scheme}://pictures.example/"


def test_a_name_that_no_host_can_have_is_told() -> None:
    with pytest.raises(UsageError, match=r"cannot listen on gpu\.\.local, port 0: .*label"):
        listen("gpu..local", 0)


def test_answers_do_not_wait_for_acknowledgements() -> None:
    """Nagle's algorithm is off: with it, an answer in two pieces takes 40 ms."""
    options: list[int] = []

    async def answer(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        options.append(writer.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
        writer.close()

    async def ask() -> None:
        bound = listen("127.0.0.1", 0)
        async with await asyncio.start_server(answer, sock=bound):
            reader, writer = await asyncio.open_connection(*bound.getsockname())
            await reader.read()
            writer.close()

    asyncio.run(ask())
    assert options == [1]
