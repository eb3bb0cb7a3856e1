"""The guard: every request passes it before anything else sees it."""

from __future__ import annotations

import ipaddress
import logging
import re
import socket
from dataclasses import dataclass, replace
from typing import Self
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from triptych.errors import UsageError
from triptych.server import keys
from triptych.server.keys import Key
from triptych.server.problems import Problem

log = logging.getLogger(__name__)

OPEN = frozenset(("/", "/health", "/ready", "/favicon.ico"))
"""Paths without a key: whether the server lives, and the page, which asks its user for one."""
OPEN_BELOW = ("/page/", "/v1/images/files/")
"""The page's files, and pictures whose URL only the caller who asked for them has been told."""
SAFE = ("GET", "HEAD", "OPTIONS")
"""Methods that change nothing, whoever makes a browser send them."""
_SCOPES: tuple[tuple[str, keys.Scope], ...] = (("/metrics", "metrics"), ("/v1/pools", "all"), ("/v1/replicas", "all"))
_ORIGIN = re.compile(r"https?://[^/\s@?#]+")


@dataclass(frozen=True)
class Access:
    """Who may ask.

    Attributes:
        keys: one of them has to come with every request; with none, nobody is asked.
        origins: sites whose pages may use the server from a browser (CORS); `*` for all.
        host: what requests have to be addressed to, if not to a loopback address; with None that is not looked at.
    """

    keys: tuple[Key, ...] = ()
    origins: tuple[str, ...] = ()
    host: str | None = None

    def __post_init__(self) -> None:
        for origin in self.origins:
            if origin != "*" and not _ORIGIN.fullmatch(origin):
                raise UsageError(f"--cors-origin {origin!r}: https://host[:port] is accepted, without a path, or *")

    def listening_on(self, host: str) -> Self:
        """Return the access to a server that listens there.

        What only this machine reaches is open without a key, and so to every page that its browsers show, if the page's
        site lets its name lead to 127.0.0.1 (DNS rebinding): to a browser the server is then that site. `Host` tells.
        """
        return replace(self, host=host if not self.keys and is_loopback(host) else None)


class Guard:
    """Turns away requests without a key, and those that a foreign site makes a browser send."""

    def __init__(self, app: ASGIApp, access: Access) -> None:
        self.app, self.access = app, access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and (refusal := self._refusal(scope)) is not None:
            await refusal(scope, receive, send)
            return
        await self.app(scope, receive, send)

    def _refusal(self, scope: Scope) -> JSONResponse | None:
        headers, path = Headers(scope=scope), scope["path"]
        if scope["method"] not in SAFE and self._foreign(headers):
            words = "this server takes no requests from pages of other sites; --cors-origin allows those of one"
            return refuse(403, words, "foreign_origin")
        if path in OPEN or path.startswith(OPEN_BELOW):
            return None
        if self.access.host is not None and not _names(headers.get("host", ""), self.access.host):
            words = (
                f"this server has no keys, so it takes only requests to localhost or {self.access.host}: a page of "
                "another site can make its own name lead here; --api-key lets requests to any name in"
            )
            return refuse(403, words, "foreign_host")
        if not self.access.keys:
            return None
        kind, _, given = headers.get("authorization", "").partition(" ")
        if kind.lower() != "bearer" or not given.strip():
            words = "an API key is needed: send it as `Authorization: Bearer KEY`"
            return refuse(401, words, "missing_api_key", **{"WWW-Authenticate": "Bearer"})
        key = keys.find(self.access.keys, given.strip())
        if key is None:
            words = "this API key is not one of the server's"
            return refuse(401, words, "invalid_api_key", **{"WWW-Authenticate": "Bearer"})
        wanted: keys.Scope = next((needs for start, needs in _SCOPES if path.startswith(start)), "requests")
        if not key.opens(wanted):
            words = f"the API key of {key.name} is for {key.scope}: this needs one for {wanted}"
            return refuse(403, words, "insufficient_scope")
        return None

    def _foreign(self, headers: Headers) -> bool:
        """Return whether a page of another site has sent this; such requests need no leave of ours to be sent.

        Follows Go's `net/http.CrossOriginProtection`: browsers say so in `Sec-Fetch-Site`, older ones by `Origin`, and
        programs that are no browsers say neither.
        """
        origin = headers.get("origin")
        if origin is not None and (origin in self.access.origins or "*" in self.access.origins):
            return False
        site = headers.get("sec-fetch-site")
        if site is not None:
            return site not in ("same-origin", "none")
        try:
            return origin is not None and urlsplit(origin).netloc != headers.get("host")
        except ValueError:  # it is no origin at all
            return True


def refuse(status: int, message: str, code: str, **headers: str) -> JSONResponse:
    """Return a refusal in the form that every error has."""
    return JSONResponse({"error": Problem(status, code, message).body()}, status, headers=headers)


def check_exposure(host: str, access: Access, *, encrypted: bool, insecure: bool) -> None:
    """Make sure that a server which others can reach knows whom it serves.

    Raises:
        UsageError: it would listen beyond this machine without a key, and nobody said that this is meant.
    """
    if is_loopback(host):
        return
    if not access.keys:
        if not insecure:
            raise UsageError(
                f"--host {host}: whoever reaches this address could use the server; set --api-key, or --insecure where "
                "something in front of it asks who they are"
            )
        log.warning("listening on %s without a key: whoever reaches this address can use the server", host)
    elif not encrypted:
        log.warning("keys cross the network in clear text: use --ssl-certfile, or something in front that encrypts")


def _names(header: str, host: str) -> bool:
    """Return whether a `Host` header is of this machine: `localhost`, a loopback address, or the given name."""
    try:
        name = urlsplit(f"//{header}").hostname or ""
    except ValueError:  # it is no name at all
        return False
    if name in ("localhost", host.lower()):
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def is_loopback(host: str) -> bool:
    """Return whether only this machine reaches an address; True also for names that lead nowhere."""
    try:
        # As `listen` does: without the flag, `*` is this machine alone.
        found = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError):
        return True  # listening there will fail, and say why
    return all(ipaddress.ip_address(str(each[4][0]).partition("%")[0]).is_loopback for each in found)
