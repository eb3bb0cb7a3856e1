"""`triptych bench`: measure a model, or a running service."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from triptych.cli.arguments import parse_parameters, parse_size
from triptych.cli.client import Client, ServiceError
from triptych.cli.console import logging_to, quieten_libraries, stderr_console
from triptych.cli.errors import reported
from triptych.cli.options import MODEL_HELP, Debug, Dtype, Revision, Variant, dtype_spec
from triptych.cli.output import progress
from triptych.errors import UsageError
from triptych.result import check_folder

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from triptych.bench.load import Ask, Load


class Scenario(StrEnum):
    """What is measured."""

    LOAD = "load"
    SPLIT = "split"


def bench(
    scenario: Annotated[
        Scenario,
        typer.Argument(
            help="[bold]load[/]: requests a second, and what each takes, with many clients at a time. [bold]split[/]: "
            "whether it pays that roles overlap, one request after another against many, every one by itself.",
            show_default=False,
        ),
    ],
    model: Annotated[str | None, typer.Argument(metavar="[MODEL]", help=MODEL_HELP, show_default=False)] = None,
    server: Annotated[
        str | None, typer.Option(metavar="URL", help="Measure a running `triptych serve` instead of a model.")
    ] = None,
    clients: Annotated[int, typer.Option(min=1, help="They ask again as soon as they have their answer.")] = 8,
    requests: Annotated[int, typer.Option(min=1, help="Requests in all.")] = 32,
    prompt: Annotated[str, typer.Option(help="Of every request; their seeds differ.")] = "a red heart",
    steps: Annotated[int | None, typer.Option(help="Denoising steps.")] = None,
    size: Annotated[str | None, typer.Option(metavar="WxH", help="Width and height: 1024x768.")] = None,
    param: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=VALUE", help="Any other parameter of the family; may be repeated."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="Write the figures there, in JSON.")
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(
            metavar="DEVICES",
            help="For every role, or for encoder, denoiser and decoder: cuda:1,cuda:0,cuda:1.",
            rich_help_panel="Model",
        ),
    ] = None,
    dtype: Dtype = None,
    revision: Revision = None,
    variant: Variant = None,
    debug: Debug = False,
) -> None:
    """Measure a model in this process, or a running service, and print a table.

    Example:  [bold]triptych bench load --server http://127.0.0.1:8000 --clients 32 --requests 256[/]
    """
    console = stderr_console()
    with reported(debug), logging_to(console, verbose=False):
        if output is not None:
            check_folder(output)
        parameters = {"prompt": prompt, "exact": scenario is Scenario.SPLIT, **dict(parse_parameters(param or []))}
        parameters |= dict(zip(("width", "height"), parse_size(size)))
        if steps is not None:
            parameters["num_inference_steps"] = steps
        places = {"--device": device, "--dtype": dtype, "--revision": revision, "--variant": variant}
        with _asking(model, server, parameters, places, console) as ask:
            ask(0)  # what happens only once is not measured, and what is wrong with a request is told at once
            loads = [_measure(ask, max(3, requests // 2), 1, console)] if scenario is Scenario.SPLIT else []
            loads.append(_measure(ask, requests, clients, console))
        _show(loads)
        figures: dict[str, object] = {"scenario": scenario.value, "loads": [each.figures() for each in loads]}
        if scenario is Scenario.SPLIT:
            from triptych.bench.verdict import verdict

            figures["verdict"] = said = verdict(*loads)
            console.print(said, markup=False)
        if output is not None:
            output.write_text(json.dumps(figures, indent=2) + "\n")
            print(output)


@contextmanager
def _asking(
    model: str | None,
    server: str | None,
    parameters: dict[str, Any],
    places: Mapping[str, str | None],
    console: Console,
) -> Iterator[Ask]:
    """Yield what makes a request and waits for it, of a service or of a model in this process."""
    if server is not None:
        given = [option for option, value in places.items() if value is not None]
        if model is not None or given:
            raise UsageError(f"--server: {'the model' if model else given[0]} is the service's to choose")
        with Client(server) as client:
            yield lambda number: _ask_service(client, {**parameters, "seed": number})
        return
    from triptych import embedded
    from triptych.engine.local import LocalEngine

    quieten_libraries(downloads=True)
    source = model or embedded.path()
    console.print(f"Opening {source}", markup=False, soft_wrap=True)
    devices = [each.strip() for each in (places["--device"] or "auto").split(",")]
    if len(devices) not in (1, 3):
        raise UsageError(f"--device {places['--device']!r}: one is accepted, or three: cuda:1,cuda:0,cuda:1")
    encoder, denoiser, decoder = devices * (3 // len(devices))
    with LocalEngine(
        source,
        encoder=encoder,
        denoiser=denoiser,
        decoder=decoder,
        dtype=dtype_spec(places["--dtype"]),
        revision=places["--revision"],
        variant=places["--variant"],
        batching=not parameters["exact"],
        warm_up=False,
    ) as engine:
        yield lambda number: engine.generate(**{**parameters, "seed": number}).timings


def _ask_service(client: Client, parameters: dict[str, Any]) -> Mapping[str, float]:
    request = client.submit(parameters)
    try:
        for kind, details in client.events(request):
            if kind in ("failed", "cancelled"):
                raise ServiceError(f"the service gave a request up: {details.get('reason', kind)}")
        timings: dict[str, float] = client.get(request["links"]["self"])["timings"]
        return timings
    finally:
        client.forget(request)


def _measure(ask: Ask, requests: int, clients: int, console: Console) -> Load:
    from triptych.bench.load import closed_loop

    with progress(console) as on_step:
        what = "1 client" if clients == 1 else f"{clients} clients"
        return closed_loop(ask, requests, clients, lambda done: on_step(what, done, requests))


def _show(loads: list[Load]) -> None:
    from rich.console import Console

    Console(highlight=False).print(_table(loads))


def _table(loads: list[Load]) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("clients", "requests", "requests/s", "p50", "p90", "p99", *loads[0].stage_seconds()):
        table.add_column(name, justify="right")
    for each in loads:
        seconds = [each.percentile(share) for share in (0.5, 0.9, 0.99)] + list(each.stage_seconds().values())
        table.add_row(
            str(each.clients), str(len(each.seconds)), f"{each.rate:.3g}", *(f"{value:.3g} s" for value in seconds)
        )
    return table
