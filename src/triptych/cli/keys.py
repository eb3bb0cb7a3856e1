"""`triptych key`: a new key for a service."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from triptych.cli.errors import reported
from triptych.errors import UsageError, did_you_mean


def key(
    name: Annotated[str, typer.Argument(help="Whose key it is, for the log.")],
    scope: Annotated[
        str,
        typer.Option(
            metavar="SCOPE",
            help="What it opens: all; requests: all but metrics and changes of pools; metrics.",
        ),
    ] = "all",
) -> None:
    """Make a key for `triptych serve --api-key @FILE`: its line for the file on stdout, the key itself on stderr.

    Example:  [bold]triptych key alice --scope requests >> keys[/]
    """
    with reported(False):
        from triptych.server.keys import SCOPES, make_key

        for known in SCOPES:
            if scope == known:
                secret, made = make_key(name, known)
                break
        else:
            raise UsageError(f"--scope {scope!r}: one of {', '.join(SCOPES)} is accepted{did_you_mean(scope, SCOPES)}")
        print(made.line())
        print(f"The key, which is shown only now: {secret}", file=sys.stderr)
