"""The front: a thread of this process that speaks HTTP."""

from __future__ import annotations

import asyncio
import socket
import ssl
import threading
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from triptych.errors import TriptychError, UsageError

_GRACE = 3
"""Seconds that open connections are given at the end."""
_START = 30.0
"""Seconds that the thread may take to start."""
HEAD = 20.0
"""Seconds in which a connection has to bring the head of a request."""


@dataclass(frozen=True)
class Tls:
    """What a server that encrypts shows of itself.

    Attributes:
        certificate: a file with its chain, in PEM.
        key: a file with its private key; None where the certificate's has it.
    """

    certificate: Path
    key: Path | None = None

    def check(self) -> None:
        """Make sure that the two files can be used.

        Raises:
            UsageError: they cannot.
        """
        try:
            ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(self.certificate, self.key, password=_no_password)
        except (OSError, ValueError) as error:
            files = f"{self.certificate}{f' and {self.key}' if self.key else ''}"
            raise UsageError(f"--ssl-certfile, --ssl-keyfile: {files} cannot be used: {error}") from None


def _no_password() -> str:
    raise ValueError("the private key is encrypted")


class Front:
    """Listens from `with` on, and stops at its end.

    Attributes:
        url: where it can be reached from this machine.
    """

    def __init__(self, app: FastAPI, host: str, port: int, tls: Tls | None = None) -> None:
        if tls is not None:
            tls.check()
        self._socket = listen(host, port)
        bound, number = self._socket.getsockname()[:2]
        reachable = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(bound, bound)
        self.url = f"http{'s' if tls else ''}://{f'[{reachable}]' if ':' in reachable else reachable}:{number}"
        config = uvicorn.Config(
            app,
            http=_Protocol,
            log_config=None,
            access_log=False,
            timeout_graceful_shutdown=_GRACE,
            ssl_certfile=None if tls is None else tls.certificate,
            ssl_keyfile=None if tls is None else tls.key,
        )
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._run, name="http", daemon=True)
        self._started = threading.Event()

    @property
    def alive(self) -> bool:
        """Whether it still listens."""
        return self._thread.is_alive()

    def __enter__(self) -> Self:
        self._thread.start()
        for _ in range(int(_START / 0.01)):
            if self._server.started:
                return self
            self._thread.join(0.01)
            if not self._thread.is_alive():
                break
        raise TriptychError("the HTTP server did not start")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.should_exit = True
        self._thread.join(_GRACE + 2)

    def _run(self) -> None:
        self._server.run(sockets=[self._socket])


class _Protocol(H11Protocol):
    """Lets go of connections that do not say what they want."""

    _patience: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._wait_for_head()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._wait_for_head()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        if self._patience is not None:
            self._patience.cancel()

    def _wait_for_head(self) -> None:
        if self._patience is not None:
            self._patience.cancel()
        self._patience = self.loop.call_later(HEAD, self._give_up)

    def _give_up(self) -> None:
        if self.cycle is None or self.cycle.response_complete:
            self.transport.close()


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens there; port 0 takes one that is free.

    Raises:
        UsageError: that is not possible.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        # With the protocol's number: asyncio sets TCP_NODELAY only where it sees it, and without it answers wait 40 ms.
        bound = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        try:
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            bound.bind(address)
        except OSError:
            bound.close()
            raise
    except (OSError, OverflowError, UnicodeError) as error:  # the last: a name that no host can have
        reason = getattr(error, "strerror", None) or error
        raise UsageError(f"cannot listen on {host}, port {port}: {reason}") from None
    return bound
