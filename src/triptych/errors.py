"""Every error Triptych raises on purpose, sorted by who has to act on it.

The base classes say who is at fault: the caller (`UsageError`), the model repository (`ModelError`), the family's own
recipe (`RecipeError`) or what arrived over a hop (`WireError`). Messages are written for a person; the fields a program
needs are attributes.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterable
from difflib import get_close_matches

_LONGEST_NAME = 100
"""Characters of a name that may be a known one misspelt: comparing takes time for each of them."""


class TriptychError(Exception):
    """Base of all errors raised on purpose."""


class UsageError(TriptychError, ValueError):
    """The caller asked for something that cannot be done as asked."""


class ModelError(TriptychError):
    """The model repository is missing something, broken or not supported."""


class RecipeError(TriptychError):
    """A family's recipe (its stages and their declarations) contradicts itself: a bug in the family's file."""


class WireError(TriptychError):
    """Bytes that arrived are not a valid state, or a state cannot be put into bytes."""


class ParameterError(UsageError):
    """A request parameter has a value that is not accepted; `field` and `value` name it."""

    def __init__(self, field: str, value: object, accepted: str) -> None:
        super().__init__(f"{field}={shown(value)}: {accepted}")
        self.field = field
        self.value = value
        self.accepted = accepted


def shown(value: object) -> str:
    """Return a refused value as it is told: pictures by what they are, and no value that Python cannot write out."""
    pictures = sys.modules.get("PIL.Image")
    if pictures is not None:
        if isinstance(value, pictures.Image):
            return f"a picture ({value.mode}, {value.width}x{value.height})"
        if isinstance(value, (list, tuple)) and any(isinstance(each, pictures.Image) for each in value):
            return f"[{', '.join(map(shown, value))}]"
    try:
        return repr(value)
    except (ValueError, RecursionError):  # an integer of thousands of digits, or lists in lists in lists
        return f"{type(value).__name__} too long to be told"


class UnknownParameterError(UsageError):
    """A request names a parameter that the family does not have."""

    def __init__(self, field: str, family: str, known: Iterable[str]) -> None:
        known = sorted(known)
        told = field if len(field) <= _LONGEST_NAME else f"{field[:_LONGEST_NAME]}..."
        self.close_match = closest(field, known)
        hint = f"; did you mean {self.close_match!r}?" if self.close_match else "."
        super().__init__(f"{family} has no parameter {told!r}{hint} It takes: {', '.join(known)}")
        self.field = field
        self.known = known


class RoleError(UsageError):
    """A role's name is not one of the roles, or a family refuses the role."""


class WrongRoleError(UsageError):
    """A role was handed a state whose next segment belongs to another role, or a result was asked for too early."""


class UnsupportedFamilyError(ModelError):
    """No family file serves the repository's pipeline class."""


class ComponentFileError(ModelError):
    """A file of a component is missing, truncated or not what its name says; `path` names it."""

    def __init__(self, path: str, problem: str) -> None:
        super().__init__(f"{path}: {problem}")
        self.path = path


class UnknownDtypeError(ModelError):
    """A component's dtype was left to the checkpoint and the checkpoint does not tell."""


class HollowComponentError(RecipeError):
    """A stage ran a component, or a part of one, whose weights its role did not load."""

    def __init__(self, component: str, role: str, stage: str | None, part: str | None = None) -> None:
        what = f"{part!r} of component {component!r}" if part else f"component {component!r}"
        where = f"stage {stage!r}" if stage else "code outside any stage"
        super().__init__(
            f"{where} ran {what}, but role {role!r} loads only its configuration: "
            "the stage's needs must declare how much of it is used"
        )
        self.component, self.role, self.stage, self.part = component, role, stage, part


class UndeclaredError(RecipeError):
    """A stage touched a component or a field that it does not declare."""

    def __init__(self, stage: str, kind: str, name: str) -> None:
        super().__init__(f"stage {stage!r} uses {kind} {name!r} without declaring it")
        self.stage, self.kind, self.name = stage, kind, name


class RoleProcessError(TriptychError):
    """The process of a role ended without an answer; `role` and `returncode` (negative: a signal) tell of it."""

    def __init__(self, role: str, returncode: int, last_words: str) -> None:
        if returncode < 0:
            hint = "; was there enough memory?" if returncode == -signal.SIGKILL else ""
            how = f"was killed by {signal.Signals(-returncode).name}{hint}"
        else:
            how = f"ended with exit status {returncode}"
        super().__init__(f"the process of the {role} {how}{f' ({last_words})' if last_words else ''}")
        self.role, self.returncode = role, returncode


class Cancelled(TriptychError):
    """The request was cancelled between two steps."""


class DeadlineExceeded(TriptychError):
    """The request's deadline passed before it was done."""


class OverloadedError(TriptychError):
    """There is no room for another request; `retry_after` says in how many seconds there may be."""

    def __init__(self, waiting: int, retry_after: float) -> None:
        super().__init__(f"{waiting} requests are waiting already; try again in {retry_after:.0f} s")
        self.waiting, self.retry_after = waiting, retry_after


class RequestLostError(TriptychError):
    """A request was lost too often with the replicas that ran it; `reasons` tells of each time."""

    def __init__(self, reasons: Iterable[str]) -> None:
        self.reasons = list(reasons)
        super().__init__(f"given up after {len(self.reasons)} lost attempts: {'; '.join(self.reasons)}")


class ReplicaLost(TriptychError):
    """A replica died, hung or answered garbage while it ran a request."""


class MemoryShortageError(TriptychError):
    """There was not enough memory where a role computes, for a request and what ran beside it."""


class ReplicaRefusedError(UsageError):
    """A replica may not join a service: it is of another version or has another model."""


_CARRIED = (
    "Cancelled", "DeadlineExceeded", "ReplicaLost", "MemoryShortageError", "UsageError", "ModelError", "RecipeError",
    "WireError",
)  # fmt: skip
"""What an error is in another process; the constructors of more special ones need more than the message."""


class RemoteError(TriptychError):
    """A role's process met an error that Triptych does not raise itself."""


def to_text(error: Exception) -> tuple[str, str]:
    """Return an error's kind and message, for another process."""
    kind = next((name for name in _CARRIED if isinstance(error, globals()[name])), None)
    if kind is None and isinstance(error, TriptychError):
        kind = "TriptychError"
    return (kind, str(error)) if kind else ("RemoteError", f"{type(error).__name__}: {error}")


def from_text(kind: str, message: str) -> TriptychError:
    """Return the error that another process told of by `to_text`; never raises for what it does not know."""
    known = {"TriptychError": TriptychError, **{name: globals()[name] for name in _CARRIED}}
    error: TriptychError = known.get(kind, RemoteError)(message)
    return error


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return `"; did you mean 'x'?"` for the closest known name, or nothing."""
    close = closest(name, known)
    return f"; did you mean {close!r}?" if close else ""


def closest(name: str, known: Iterable[str]) -> str | None:
    """Return the known name that another one may have been meant as; None where none is near."""
    close = get_close_matches(name, list(known), n=1) if len(name) <= _LONGEST_NAME else []
    return close[0] if close else None
