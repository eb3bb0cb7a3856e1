"""`triptych top`: what a running service is doing, live."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer

from triptych.cli.client import Client, ServiceError
from triptych.cli.console import human
from triptych.cli.errors import reported
from triptych.cli.options import Debug, finite

if TYPE_CHECKING:
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

_REQUESTS = 20
"""Requests shown."""
_BAR = 10
"""Characters of a bar."""


def top(
    url: Annotated[
        str, typer.Argument(help="Where `triptych serve` listens.", metavar="[URL]")
    ] = "http://127.0.0.1:8000",
    once: Annotated[bool, typer.Option("--once", help="Show one frame and end.")] = False,
    interval: Annotated[float, typer.Option(help="Seconds between frames.", min=0.1, callback=finite)] = 1.0,
    debug: Debug = False,
) -> None:
    """Show pools, replicas, queues, steps and bytes of a running service, until Ctrl-C.

    Example:  [bold]triptych top http://10.0.0.5:8000[/]
    """
    with reported(debug), Client(url) as client:
        from rich.console import Console

        console = Console(highlight=False)
        if once:
            console.print(frame(client.get("/v1/status")))
        else:
            _watch(client, console, interval)


def _watch(client: Client, console: Any, interval: float) -> None:
    first = frame(client.get("/v1/status"))  # an address that is wrong is told at once
    if not console.is_terminal or console.is_dumb_terminal:  # where Rich's live view shows nothing before its end
        console.print(first)
        for each in _frames(client, interval):
            console.print(each)
        return
    from rich.live import Live

    with Live(first, console=console, auto_refresh=False, screen=True) as live:
        for each in _frames(client, interval):
            live.update(each, refresh=True)


def _frames(client: Client, interval: float) -> Iterator[Group | Text]:
    """Yield a picture of how things stand after every interval, for ever; of a service that is away, why."""
    from rich.text import Text

    while True:
        time.sleep(interval)
        try:
            yield frame(client.get("/v1/status"))
        except ServiceError as error:
            yield Text(str(error), style="red")


def frame(status: dict[str, Any]) -> Group:
    """Return one picture of how things stand."""
    from rich.console import Group
    from rich.text import Text

    model = str(status.get("model") or "no model yet").rstrip("/").rpartition("/")[2]
    state = ("ready", "green") if status.get("ready") else ("not ready", "yellow")
    kept = status.get("kept", {})
    return Group(
        Text.assemble((model, "bold"), f"  {status.get('family') or ''}  ", state),
        Text(f"{status.get('requests', 0)} requests on their way; {_waiting(status.get('waiting', {}))}"),
        Text(f"{kept.get('requests', 0)} remembered, {human(kept.get('result_bytes', 0))} of results", style="dim"),
        _replicas(status.get("replicas", [])),
        _current(status.get("current", [])),
    )


def _waiting(waiting: dict[str, int]) -> str:
    return (
        "waiting for: " + ", ".join(f"{role} {count}" for role, count in waiting.items()) if waiting else "none waiting"
    )


def _replicas(replicas: list[dict[str, Any]]) -> Table:
    """Return a table of replicas, a line for each role of each."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table("replica", "device", "role", "slots", "", box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for name in ("left", "loaded", "cached", "batch"):  # seconds, bytes, share of prompts, size of a shared forward
        table.add_column(name, justify="right")
    for each in replicas:
        state = "draining" if each.get("draining") else each.get("state", "")
        shown = Text(str(each.get("name")))
        if state not in ("", "ready", "running"):
            shown.append(f" {state}", "yellow")
        beginning = [shown, Text(str(each.get("device") or each.get("host") or ""))]
        end = [f"{each.get('backlog') or 0:.1f} s", human(each.get("loaded_bytes") or 0), _prompts(each), _budget(each)]
        for role in each.get("roles", []):
            running, slots = each.get("running", {}).get(role, 0), each.get("slots", {}).get(role, 0)
            table.add_row(*beginning, role, _bar(running, slots), f"{running}/{slots}", *end)
            beginning, end = [Text(), Text()], ["", "", "", ""]
    return table


def _current(requests: list[dict[str, Any]]) -> Table:
    """Return a table of the requests on their way, the oldest first."""
    from rich import box
    from rich.table import Table

    table = Table("request", "role", "step", "", "lost", box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for each in requests[:_REQUESTS]:
        progress = each.get("progress") or {}
        step, steps = progress.get("step"), progress.get("steps")
        role = progress.get("role") or each["status"]
        count = f"{step}/{steps}" if steps else ""
        table.add_row(each["id"], role, _bar(step or 0, steps or 0), count, str(len(each.get("lost", [])) or ""))
    return table


def _bar(part: int, whole: int) -> Text:
    from rich.text import Text

    filled = round(_BAR * part / whole) if whole else 0
    filled = max(filled, 1) if part else 0
    return Text.assemble(("█" * filled, "cyan"), ("·" * (_BAR - filled), "dim"))


def _prompts(replica: dict[str, Any]) -> str:
    cache = replica.get("prompt_cache")
    if not cache:
        return "-"
    calls = cache.get("hits", 0) + cache.get("misses", 0)
    return f"{100 * cache.get('hits', 0) / calls:.0f} %" if calls else "0"


def _budget(replica: dict[str, Any]) -> str:
    budget = replica.get("budget")
    return "-" if budget is None else "off" if budget == 0 else f"{budget}"
