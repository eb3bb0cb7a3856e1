"""How errors end the command line: one line on stderr, and an exit code that says who has to act."""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

import typer

from triptych.cli.leaving import in_order
from triptych.errors import ModelError, TriptychError, UsageError

UNEXPECTED = 1
USAGE = 2
MODEL = 3
INTERNAL = 4
INTERRUPTED = 130

_LONGEST = 500
"""Characters of an error that a library raised."""


@contextmanager
def reported(debug: bool) -> Iterator[None]:
    """Turn whatever is raised inside, by signals too, into one line and an exit code; `debug`: after the traceback."""
    came: list[int] = []
    try:
        with in_order() as came:
            yield
    except (typer.Exit, typer.TyperException):
        raise
    except KeyboardInterrupt:
        say("interrupted", label="")
        raise typer.Exit(INTERRUPTED) from None
    except BrokenPipeError:  # whoever read our output has gone: `triptych families | head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(UNEXPECTED) from None
    except Exception as error:  # noqa: BLE001 (the last place that can put it into one line)
        if debug:
            traceback.print_exc()
        if came:  # a library that was being imported has taken the signal for a failure of its own
            if came[0] == signal.SIGINT:
                say("interrupted", label="")
            raise typer.Exit(128 + came[0]) from None
        say(message_of(error, debug))
        raise typer.Exit(exit_code(error)) from None


def exit_code(error: Exception) -> int:
    """Return the exit code of an error: its class says who has to act."""
    if isinstance(error, UsageError):
        return USAGE
    if isinstance(error, ModelError):
        return MODEL
    return INTERNAL if isinstance(error, TriptychError) else UNEXPECTED


def message_of(error: Exception, debug: bool = False) -> str:
    """Return an error as one line."""
    line = " ".join(str(error).split())
    if isinstance(error, TriptychError):
        return line
    if len(line) > _LONGEST:
        line = f"{line[:_LONGEST]}..."
    hint = "" if debug else " (run with --debug for the traceback)"
    return f"unexpected {type(error).__name__}: {line or 'no message'}{hint}"


def say(line: str, label: str = "error: ") -> None:
    """Print a line on stderr, its label in red where that is a terminal."""
    if label and sys.stderr.isatty() and "NO_COLOR" not in os.environ:
        label = f"\033[31m{label}\033[0m"
    print(f"{label}{line}", file=sys.stderr, flush=True)
