"""`triptych bench`: measure a model, or a running service."""

from __future__ import annotations

import json
import secrets
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Self

import typer

from triptych.cli.arguments import Asked, parse_parameters, parse_size
from triptych.cli.client import Client, ServiceError
from triptych.cli.console import logging_to, quieten_libraries, stderr_console
from triptych.cli.errors import reported
from triptych.cli.leaving import at_once
from triptych.cli.options import MODEL_HELP, Debug, Dtype, Revision, Variant, dtype_spec, path_of
from triptych.cli.output import progress
from triptych.cli.remote import as_json, check_json
from triptych.errors import UsageError
from triptych.result import check_folder

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from triptych.bench.load import Ask, Load

_PROMPT = "a red heart"
_PATIENCE = 5.0  # seconds until a service has let go of what it was asked for


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
    prompt: Annotated[
        str | None,
        typer.Option(help="Of every request; their seeds differ, and --server appends a number.", show_default=_PROMPT),
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Denoising steps.")] = None,
    size: Annotated[str | None, typer.Option(metavar="WxH", help="Width and height: 1024x768.")] = None,
    param: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=VALUE", help="Any other parameter of the family; may be repeated."),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", parser=path_of, metavar="FILE", help="Write the figures there, in JSON."),
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
            if output.is_dir():
                raise UsageError(f"--output {output}: this is a folder; name a file in it")
        asked = Asked()
        asked.add("prompt", prompt, "--prompt")
        asked.add("num_inference_steps", steps)
        for name, pixels in zip(("width", "height"), parse_size(size)):
            asked.add(name, pixels, "--size")
        for name, value in parse_parameters(param or []):
            asked.add(name, value, f"--param {name}")
        if "seed" in asked.values:
            raise UsageError("--param seed: every request has a seed of its own")
        split = scenario is Scenario.SPLIT
        if split and asked.values.get("exact", True) is not True:
            raise UsageError("--param exact: split compares requests that run each by itself, which exact ones do")
        if split and min(clients, requests) < 2:
            what = "--clients" if clients < 2 else "--requests"
            raise UsageError(f"{what} 1: split compares one request after another with several at a time")
        parameters = {"prompt": _PROMPT, "exact": split, **asked.values}
        places = {"--device": device, "--dtype": dtype, "--revision": revision, "--variant": variant}
        with _asking(model, server, parameters, places, console) as ask:
            ask(0)  # what happens only once is not measured, and what is wrong with a request is told at once
            loads = [_measure(ask, max(3, requests // 2), 1, console)] if split else []
            loads.append(_measure(ask, requests, clients, console))
        _show(loads)
        figures: dict[str, object] = {"scenario": scenario.value, "loads": [each.figures() for each in loads]}
        if split:
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
            raise UsageError(f"--server: {given[0] if model is None else 'the model'} is the service's to choose")
        sent = {name: as_json(value) for name, value in parameters.items()}
        for name, value in sent.items():
            check_json(name, value)
        with Client(server) as client, _Service(client) as service:
            yield lambda number: service.ask({**sent, "seed": number})
        return
    from triptych import embedded

    source = embedded.path() if model is None else model
    console.print(f"Opening {source}", markup=False, soft_wrap=True)
    devices = [each.strip() for each in (places["--device"] or "auto").split(",")]
    if len(devices) not in (1, 3):
        raise UsageError(f"--device {places['--device']!r}: one is accepted, or three: cuda:1,cuda:0,cuda:1")
    encoder, denoiser, decoder = devices * (3 // len(devices))
    with at_once():
        from triptych.engine.local import LocalEngine

        quieten_libraries(downloads=True)
        engine = LocalEngine(
            source,
            encoder=encoder,
            denoiser=denoiser,
            decoder=decoder,
            dtype=dtype_spec(places["--dtype"]),
            revision=places["--revision"],
            variant=places["--variant"],
            batching=not parameters["exact"],
            prompt_cache=0,  # the prompt is always the same one, and what encoding it takes is measured too
            warm_up=False,
            max_waiting=sys.maxsize,  # there are as many as clients
        )
    with engine:
        yield lambda number: engine.generate(**{**parameters, "seed": number}).timings


class _Service:
    """Asks a service, from many threads, and takes back at the end what is still on its way."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._lock = threading.Lock()
        self._asking = 0
        self._open: list[dict[str, Any]] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        end = time.monotonic() + _PATIENCE
        while self._asking and time.monotonic() < end:  # one that is being submitted is known only after that
            for request in list(self._open):
                if time.monotonic() < end:  # a service that hangs takes seconds for each
                    self._client.forget(request)  # which ends its stream of events, and so its thread
            time.sleep(0.05)

    def ask(self, parameters: dict[str, Any]) -> Mapping[str, float]:
        """Make a request and wait for it; returns the seconds of its stages.

        Raises:
            TriptychError: it is refused, or fails.
        """
        # A service remembers encoded prompts, those of earlier measurements too; as many digits are as many tokens.
        parameters = {**parameters, "prompt": f"{parameters['prompt']} {secrets.randbelow(10**8):08d}"}
        with self._lock:
            self._asking += 1
        try:
            request = self._client.submit(parameters)
            self._open.append(request)
            try:
                for kind, details in self._client.events(request):
                    if kind in ("failed", "cancelled"):
                        raise ServiceError(f"the service gave a request up: {details.get('reason', kind)}")
                timings: dict[str, float] = self._client.get(request["links"]["self"])["timings"]
                return timings
            finally:
                self._client.forget(request)
                self._open.remove(request)
        finally:
            with self._lock:
                self._asking -= 1


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
    table.add_column("clients", overflow="fold")
    for each in loads:
        table.add_column(str(each.clients), justify="right", overflow="fold")
    table.add_row("requests", *(str(len(each.seconds)) for each in loads))
    table.add_row("requests/s", *(f"{each.rate:.3g}" for each in loads))
    for name, share in (("p50", 0.5), ("p90", 0.9), ("p99", 0.99)):
        table.add_row(name, *(f"{each.percentile(share):.3g} s" for each in loads))
    stages = [each.stage_seconds() for each in loads]
    for name in stages[0]:
        table.add_row(name, *(f"{each[name]:.3g} s" if name in each else "-" for each in stages))
    return table
