"""`triptych scale` and `triptych drain`: more or fewer replicas of a service that runs."""

from __future__ import annotations

from typing import Annotated, Any
from urllib.parse import quote

import typer

from triptych.cli.client import Client
from triptych.cli.errors import reported
from triptych.cli.options import Debug

Server = Annotated[str, typer.Option(metavar="URL", help="Where `triptych serve` listens.")]
_HERE = "http://127.0.0.1:8000"


def scale(
    pool: Annotated[
        str, typer.Argument(help="A pool as `triptych serve --pools` names it: denoiser, encoder+decoder.")
    ],
    replicas: Annotated[int, typer.Argument(help="How many replicas it is to have.", min=0)],
    server: Server = _HERE,
    debug: Debug = False,
) -> None:
    """Set how many replicas a pool of a running service has. Those that are too many finish what they have.

    Example:  [bold]triptych scale denoiser 4[/]
    """
    with reported(debug), Client(server) as client:
        told = client.post(f"/v1/pools/{quote(pool, safe='')}", {"replicas": replicas})
        print(f"{pool}: {replicas} replicas are wanted; there are {_replicas(told)}")


def drain(
    replica: Annotated[str, typer.Argument(help="A replica's name, as `triptych top` shows it.")],
    server: Server = _HERE,
    debug: Debug = False,
) -> None:
    """Give a replica of a running service nothing more, and end it when it has finished what it has.

    Example:  [bold]triptych drain denoiser-3f09c1[/]
    """
    with reported(debug), Client(server) as client:
        told = client.post(f"/v1/replicas/{quote(replica, safe='')}/drain", {})
        print(f"{replica} is drained; there are {_replicas(told)}")


def _replicas(told: dict[str, Any]) -> str:
    names = [f"{each['name']}{' (draining)' if each.get('draining') else ''}" for each in told["replicas"]]
    return ", ".join(names) or "none"
