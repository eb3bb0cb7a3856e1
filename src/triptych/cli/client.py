"""A client of a running service, for the commands that talk to one."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, BinaryIO, NoReturn, Self

from triptych.errors import ParameterError, TriptychError, UnknownParameterError, UsageError

if TYPE_CHECKING:
    import httpx

_TIMEOUT = 60.0  # seconds without a byte; streams of events are never silent for so long
KEY = "TRIPTYCH_API_KEY"
"""The environment variable with the key of a service."""
_RECONNECTS = 10
"""Attempts, a second apart, to take up a stream of events again."""


class ServiceError(TriptychError):
    """A service did not do what it was asked for."""


class Client:
    """Speaks to the service at a URL; closed by the end of `with`."""

    def __init__(self, url: str) -> None:
        import httpx

        url = url if "://" in url else f"http://{url}"
        try:
            parsed = httpx.URL(url)
            parsed.raw_host.decode("ascii").encode("idna")  # as Python's resolver will
        except (httpx.InvalidURL, UnicodeError) as error:
            raise UsageError(f"{url!r} is no URL: {error}") from None
        if parsed.scheme not in ("http", "https") or not parsed.host:
            raise UsageError(f"{url!r} is no URL of a service, such as http://127.0.0.1:8000")
        self.url = url.rstrip("/")
        # As many connections as there are clients to be measured: one that waits for another's would count as slow.
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
        self._http = httpx.Client(base_url=self.url, timeout=_TIMEOUT, headers=_authorization(), limits=limits)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._http.close()

    def get(self, path: str) -> dict[str, Any]:
        """Return what a path answers."""
        return self._json("GET", path)

    def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """Return what a path answers to a body."""
        return self._json("POST", path, body)

    def submit(self, parameters: dict[str, Any]) -> dict[str, Any]:
        """Post a request; returns its status.

        Raises:
            ParameterError, UnknownParameterError, UsageError: the service refuses it.
            ServiceError: it cannot be reached, or cannot take it now.
        """
        return self._json("POST", "/v1/requests", {"parameters": parameters})

    def forget(self, request: dict[str, Any]) -> None:
        """Have a request stopped, and its result thrown away; silently where that is not possible."""
        import httpx

        try:
            self._http.delete(request["links"]["self"], timeout=5.0)
        except httpx.HTTPError:
            pass

    def events(self, request: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield a request's events, kind and details, to the last; a lost connection is taken up again."""
        import httpx

        last, failures = "", 0
        while True:
            headers = {"Last-Event-ID": last} if last else {}
            try:
                with self._http.stream("GET", request["links"]["events"], headers=headers) as response:
                    self._check(response)
                    for number, kind, details in _events(response.iter_lines()):
                        last, failures = number, 0
                        yield kind, details
                        if kind in ("done", "failed", "cancelled"):
                            return
            except httpx.HTTPError as error:
                failures += 1
                if failures > _RECONNECTS:
                    raise ServiceError(f"the connection to {self.url} is lost: {error}") from None
            time.sleep(1.0)

    def fetch(self, request: dict[str, Any], index: int, format: str, file: BinaryIO) -> None:
        """Write one output of a request into a file. A service makes it when it is asked: it may be silent for long.

        Raises:
            ServiceError: the service does not hand it over.
        """
        import httpx

        query: dict[str, str | int] = {"index": index, "format": format}
        patience = httpx.Timeout(_TIMEOUT, read=None)
        try:
            with self._http.stream("GET", request["links"]["result"], params=query, timeout=patience) as response:
                self._check(response)
                file.writelines(response.iter_bytes())
        except httpx.HTTPError as error:
            raise ServiceError(f"{self.url}: the result could not be fetched: {error}") from None

    def _json(self, method: str, path: str, body: object = None) -> dict[str, Any]:
        import httpx

        try:
            response = self._http.request(method, path, json=body)
        except httpx.HTTPError as error:
            raise ServiceError(f"{self.url} cannot be reached: {error}") from None
        self._check(response)
        try:
            answer: dict[str, Any] = response.json()
        except ValueError:
            raise ServiceError(f"{self.url}{path} answers no JSON: is it `triptych serve`?") from None
        return answer

    def _check(self, response: httpx.Response) -> None:
        if response.is_success:
            return
        response.read()
        try:
            error = response.json()["error"]
            code, message = str(error["code"]), str(error["message"])
        except (ValueError, KeyError, TypeError):
            raise ServiceError(f"{response.url} answers {response.status_code}: is it `triptych serve`?") from None
        _raise(code, message, error)


def _authorization() -> dict[str, str]:
    """Return the header that says who asks, where the environment has a key.

    Raises:
        UsageError: it cannot be one.
    """
    key = os.environ.get(KEY, "")
    if key.startswith("@"):
        raise UsageError(f"{KEY}: a file of hashes is for the server; to ask one, the key itself is needed")
    if not all("!" <= character <= "~" for character in key):  # its value is nobody's to read
        raise UsageError(f"{KEY}: a key of printable ASCII characters without spaces or line ends is accepted")
    return {"Authorization": f"Bearer {key}"} if key else {}


def _raise(code: str, message: str, error: dict[str, Any]) -> NoReturn:
    """Raise what the service raised, as far as the one who asked can act on it."""
    if code == "unknown_parameter":
        raise UnknownParameterError(error["field"], "the service's model", error["accepted"])
    if code == "bad_parameter":
        raise ParameterError(error["field"], error.get("value"), error["accepted"])
    if code == "bad_request":
        raise UsageError(message)
    raise ServiceError(message)


def _events(lines: Iterator[str]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Yield number, kind and details of server-sent events."""
    fields: dict[str, str] = {}
    for line in lines:
        name, _, value = line.partition(":")
        if line and name:
            fields[name] = value.removeprefix(" ")
        elif not line and "data" in fields:
            yield fields.get("id", ""), fields.get("event", ""), json.loads(fields["data"])
            fields = {}
