"""The front: what its socket is like."""

import asyncio
import socket

from triptych.server.front import listen


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
