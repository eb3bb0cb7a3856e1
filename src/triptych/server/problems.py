"""Problems: the one form in which every error leaves the server."""

from __future__ import annotations

import errno
import math
import sqlite3
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from triptych.errors import (
    Cancelled,
    DeadlineExceeded,
    MemoryShortageError,
    OverloadedError,
    ParameterError,
    ReplicaLost,
    RequestLostError,
    TriptychError,
    UnknownParameterError,
    UsageError,
    shown,
)
from triptych.server.jobs import StoreClosedError

_LONGEST = 200
"""Characters of a refused name or value that are sent back."""
_LONGEST_MESSAGE = 4000
"""Characters."""
_LONGEST_INTEGER = 2048
"""Bits of a refused value that is sent back as a number."""
_LONGEST_WAIT = 600.0
"""Seconds."""

_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
"""OpenAI's words for statuses that have one of their own."""
_STATUSES: tuple[tuple[type[Exception], int, str], ...] = (
    (UnknownParameterError, 400, "unknown_parameter"),
    (ParameterError, 400, "bad_parameter"),
    (UsageError, 400, "bad_request"),
    (OverloadedError, 429, "overloaded"),
    (DeadlineExceeded, 504, "deadline_exceeded"),
    (Cancelled, 410, "cancelled"),
    (RequestLostError, 500, "lost"),
    (MemoryShortageError, 500, "no_memory"),
    (ReplicaLost, 503, "not_ready"),
    (StoreClosedError, 503, "not_ready"),
    (TriptychError, 500, "internal"),
)


@dataclass(frozen=True)
class Problem:
    """An error as a caller sees it: `{"error": {"message": ..., "type": ..., "param": ..., "code": ..., ...}}`.

    Attributes:
        status: of the HTTP response.
        code: what exactly went wrong, as a word for programs.
        message: a line for people.
        details: the error's own fields: `field`, `value`, `accepted`, `close_match`, ...
        headers: of the HTTP response.
    """

    status: int
    code: str
    message: str
    details: Mapping[str, Any] = field(default_factory=dict)
    headers: Mapping[str, str] = field(default_factory=dict)

    @property
    def type(self) -> str:
        """Whose turn it is now, in OpenAI's words: the caller's (`invalid_request_error`, ...) or `server_error`."""
        return _TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")

    def body(self) -> dict[str, Any]:
        """Return it as JSON values."""
        told = {"message": self.message, "type": self.type, "param": self.details.get("field"), "code": self.code}
        return {**told, **self.details}


class Refusal(Exception):
    """Raised where a handler answers with a problem that only HTTP knows."""

    def __init__(self, status: int, code: str, message: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.problem = Problem(status, code, message, headers=headers or {})

    @classmethod
    def of(cls, problem: Problem) -> Refusal:
        """Return the refusal that answers with a problem."""
        refusal = cls(problem.status, problem.code, problem.message)
        refusal.problem = problem
        return refusal


def problem_of(error: Exception) -> Problem:
    """Return the problem that an error is to a caller."""
    if isinstance(error, Refusal):
        return error.problem
    status, code = next(((s, c) for cls, s, c in _STATUSES if isinstance(error, cls)), (500, "internal"))
    if _is_full(error):
        status, code = 507, "no_space"
    message = str(error) if isinstance(error, TriptychError) else f"unexpected {type(error).__name__}: {error}"
    headers = {}
    if isinstance(error, OverloadedError):
        headers["Retry-After"] = str(math.ceil(_wait(error)))
    return Problem(status, code, sendable(message, _LONGEST_MESSAGE), _details(error), headers)


def _details(error: Exception) -> dict[str, Any]:
    if isinstance(error, UnknownParameterError):
        field = sendable(error.field, _LONGEST)
        return {"field": field, "accepted": error.known, "close_match": error.close_match}
    if isinstance(error, ParameterError):
        field = sendable(error.field, _LONGEST)
        return {"field": field, "value": _plain(error.value), "accepted": error.accepted}
    if isinstance(error, OverloadedError):
        return {"waiting": error.waiting, "retry_after": _wait(error)}
    if isinstance(error, RequestLostError):
        return {"reasons": error.reasons}
    return {}


def _is_full(error: Exception) -> bool:
    """Return whether an error says that the disk is full."""
    if isinstance(error, sqlite3.Error):
        return getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_FULL
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


def _wait(error: OverloadedError) -> float:
    """Return the seconds that a caller is told to wait: a prediction may be anything."""
    return min(error.retry_after, _LONGEST_WAIT)


def _plain(value: object) -> object:
    """Return a refused value as it may be sent back: itself where it is short and plain, else its beginning as text."""
    if value is None or isinstance(value, bool) or (isinstance(value, float) and math.isfinite(value)):
        return value
    if isinstance(value, int) and value.bit_length() <= _LONGEST_INTEGER:
        return value
    return sendable(value if isinstance(value, str) else shown(value), _LONGEST)


def sendable(text: str, longest: int | None = None) -> str:
    """Return the beginning of a text that may repeat what was sent, or a path, in characters that UTF-8 has."""
    text = text if longest is None or len(text) <= longest else f"{text[:longest]}..."
    return text.encode(errors="backslashreplace").decode()
