"""`triptych serve`: a model behind HTTP."""

from __future__ import annotations

import atexit
import importlib
import importlib.util
import signal
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated, Any

import typer

from triptych.cli.acceleration import Given, accelerated, accelerations
from triptych.cli.console import logging_to, quieten_libraries, quieten_libraries_to_come, stderr_console
from triptych.cli.engine import choose_engine, threads_of
from triptych.cli.errors import reported
from triptych.cli.leaving import at_once
from triptych.cli.listening import announce, listen
from triptych.cli.options import (
    MODEL_HELP,
    Debug,
    Dtype,
    Revision,
    Tasks,
    Variant,
    by_role,
    dtype_spec,
    finite,
    path_of,
)
from triptych.errors import UsageError
from triptych.roles import WORKERS, RoleType
from triptych.runtime.collection import collection_paused

if TYPE_CHECKING:
    from triptych.engine.base import Engine
    from triptych.server.jobs import JobStore

_HTTP, _LOCAL, _RAY, _RUNNING = "HTTP", "In this process", "On Ray", "Running"  # headings of --help


def _gpus(help: str) -> Any:
    """Return the option of how many GPUs a role's replicas reserve."""
    return typer.Option(metavar="N", min=0, callback=finite, help=help, rich_help_panel=_RAY)


_ROUTING = {"policy", "max_waiting", "warm_up"}
"""What a router is asked for, beside HTTP; a replica that is added has no use for either."""


@accelerated
def serve(
    context: typer.Context,
    model: Annotated[str | None, typer.Argument(help=MODEL_HELP, show_default=False)] = None,
    host: Annotated[
        str, typer.Option(help="The address to listen on; 0.0.0.0 for all.", rich_help_panel=_HTTP)
    ] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(help="The port; 0 for one that is free.", min=0, max=65535, rich_help_panel=_HTTP)
    ] = 8000,
    drain: Annotated[
        float,
        typer.Option(
            metavar="SECONDS",
            min=0,
            callback=finite,
            help="How long running requests may take after Ctrl-C or SIGTERM.",
            rich_help_panel=_HTTP,
        ),
    ] = 30.0,
    api_key: Annotated[
        str | None,
        typer.Option(
            metavar="KEY|@FILE",
            envvar="TRIPTYCH_API_KEY",
            show_envvar=False,
            help="What every request has to bring: a key, or a file of hashed keys (`triptych key` makes them). Also "
            "from TRIPTYCH_API_KEY, which other users of the machine cannot see.",
            rich_help_panel=_HTTP,
        ),
    ] = None,
    insecure: Annotated[
        bool,
        typer.Option("--insecure", help="Listen beyond this machine without a key.", rich_help_panel=_HTTP),
    ] = False,
    cors_origin: Annotated[
        list[str] | None,
        typer.Option(
            metavar="ORIGIN",
            help="A site whose pages may use the server: https://example.org; may be repeated.",
            rich_help_panel=_HTTP,
        ),
    ] = None,
    ssl_certfile: Annotated[
        Path | None,
        typer.Option(parser=path_of, metavar="FILE", help="Encrypt, with this certificate.", rich_help_panel=_HTTP),
    ] = None,
    ssl_keyfile: Annotated[
        Path | None,
        typer.Option(
            parser=path_of, metavar="FILE", help="Its private key, where not in the same file.", rich_help_panel=_HTTP
        ),
    ] = None,
    lora_dir: Annotated[
        list[Path] | None,
        typer.Option(
            parser=path_of,
            metavar="DIR",
            help="A folder whose safetensors files requests may name as LoRAs, beside those in the model's own; may be "
            "repeated. Every machine needs it under the same path.",
            rich_help_panel=_HTTP,
        ),
    ] = None,
    max_prompt: Annotated[
        int,
        typer.Option(metavar="CHARACTERS", min=1, help="The longest text that is taken.", rich_help_panel=_HTTP),
    ] = 32_000,
    state_dir: Annotated[
        Path | None,
        typer.Option(
            parser=path_of,
            metavar="DIR",
            help="Where requests and results are kept, so that they outlive this process; by default a folder for the "
            "model.",
            rich_help_panel=_HTTP,
        ),
    ] = None,
    no_state: Annotated[
        bool, typer.Option("--no-state", help="Keep nothing beyond this process.", rich_help_panel=_HTTP)
    ] = False,
    engine: Annotated[
        str | None,
        typer.Option(
            metavar="local|ray",
            help="Everything in this process (the default), or processes and machines on Ray.",
            rich_help_panel=_RUNNING,
        ),
    ] = None,
    encoder: Annotated[
        str | None,
        typer.Option(
            metavar="DEVICES",
            help="Where prompts are encoded: cuda:1, or several: cuda:1,cuda:2.",
            rich_help_panel=_LOCAL,
        ),
    ] = None,
    denoiser: Annotated[
        str | None, typer.Option(metavar="DEVICES", help="Where latents are denoised.", rich_help_panel=_LOCAL)
    ] = None,
    decoder: Annotated[
        str | None, typer.Option(metavar="DEVICES", help="Where latents are decoded.", rich_help_panel=_LOCAL)
    ] = None,
    slots: Annotated[
        str | None,
        typer.Option(
            metavar="ROLE=N,...", help="Requests that a replica takes at a time: denoiser=8.", rich_help_panel=_LOCAL
        ),
    ] = None,
    pools: Annotated[
        str | None,
        typer.Option(
            metavar="ROLE=N,...",
            help="Replicas by role: encoder=1,denoiser=4,decoder=1; encoder+decoder=1,denoiser=1..3; monolithic=2.",
            rich_help_panel=_RAY,
        ),
    ] = None,
    address: Annotated[
        str | None,
        typer.Option(metavar="HOST:PORT", help="The cluster to join; a new one where left out.", rich_help_panel=_RAY),
    ] = None,
    disagg_role: Annotated[
        str | None,
        typer.Option(
            metavar="ROLE",
            help="Add one replica of encoder, denoiser or decoder to the cluster at --address; server: the router and "
            "HTTP only.",
            rich_help_panel=_RAY,
        ),
    ] = None,
    encoder_gpus: Annotated[
        float | None,
        _gpus("GPUs to reserve for each encoder replica; by default one. Several replicas share one GPU by 0.25 each."),
    ] = None,
    denoiser_gpus: Annotated[
        float | None,
        _gpus("GPUs to reserve for each denoiser replica; by default one, or one for each of its ranks."),
    ] = None,
    decoder_gpus: Annotated[
        float | None,
        _gpus("GPUs to reserve for each decoder replica; by default one."),
    ] = None,
    transport: Annotated[
        str | None,
        typer.Option(
            metavar="host | nixl",
            help="How large states go from replica to replica: through main memory, or from card to card by NIXL.",
            rich_help_panel=_RAY,
        ),
    ] = None,
    threads: Annotated[
        str | None,
        typer.Option(
            metavar="N | ROLE=N,...",
            help="CPU threads: of each role's lane (denoiser=4,decoder=1), or on Ray of every process (2).",
            rich_help_panel=_RUNNING,
        ),
    ] = None,
    policy: Annotated[
        str,
        typer.Option(
            metavar="POLICY",
            help="Who gets a request: predicted (seconds), round_robin, max_free_slots.",
            rich_help_panel=_RUNNING,
        ),
    ] = "predicted",
    max_waiting: Annotated[
        int,
        typer.Option(
            help="Requests on their way before further ones are answered 429.", min=1, rich_help_panel=_RUNNING
        ),
    ] = 256,
    prompt_cache: Annotated[
        bool,
        typer.Option("--prompt-cache/--no-prompt-cache", help="Remember encoded prompts.", rich_help_panel=_RUNNING),
    ] = True,
    batching: Annotated[
        bool,
        typer.Option("--batching/--no-batching", help="Let requests share forwards.", rich_help_panel=_RUNNING),
    ] = True,
    warm_up: Annotated[
        bool,
        typer.Option(
            "--warm-up/--no-warm-up", help="Run one small request before saying ready.", rich_help_panel=_RUNNING
        ),
    ] = True,
    dtype: Dtype = None,
    tasks: Tasks = None,
    revision: Revision = None,
    variant: Variant = None,
    acceleration: Given = MappingProxyType({}),
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Tell what each role loaded; let the libraries speak.")
    ] = False,
    debug: Debug = False,
) -> None:
    """Serve a model over HTTP: POST /v1/requests, its events, its result. The URL is printed when it is ready.

    Example:  [bold]triptych serve black-forest-labs/FLUX.2-klein-4B --encoder cuda:1 --denoiser cuda:0 --decoder cuda:1[/]

    Ctrl-C or SIGTERM lets running requests finish; a second one stops at once.
    """
    with reported(debug), logging_to(stderr_console(), verbose=verbose):
        if no_state and state_dir is not None:
            raise UsageError("--no-state keeps nothing, and --state-dir says where: give one of them")
        for folder in lora_dir or ():
            if not folder.is_dir():
                raise UsageError(f"--lora-dir {str(folder)!r}: there is no such folder")
        if ssl_keyfile is not None and ssl_certfile is None:
            raise UsageError("--ssl-keyfile: it belongs to a certificate; give --ssl-certfile too")
        devices = {"encoder": encoder, "denoiser": denoiser, "decoder": decoder}
        cards = {"encoder": encoder_gpus, "denoiser": denoiser_gpus, "decoder": decoder_gpus}
        on_ray = choose_engine(engine, devices, slots, pools, address, disagg_role, cards, transport)
        role = None if disagg_role is None else RoleType(disagg_role)
        if role is RoleType.MONOLITHIC:
            raise UsageError("--disagg-role monolithic: a whole model is a pool of its own: --pools monolithic=1")
        if role is not None and address is None:
            raise UsageError(f"--disagg-role {role}: name the cluster to join by --address HOST:PORT")
        gpus = {RoleType(name): count for name, count in cards.items() if count is not None}
        for other in gpus:
            if role not in (None, other):
                raise UsageError(f"--{other}-gpus: this command adds no {other}, but --disagg-role {role}")
        if role is not None and pools is not None:
            raise UsageError("--disagg-role: --pools belongs to the command that starts the cluster")
        if role in WORKERS and transport is not None:
            raise UsageError(
                f"--transport: a replica that is added uses the service's; leave it out of --disagg-role {role}"
            )
        if role in WORKERS and (idle := _router_options(context)):
            raise UsageError(
                f"{', '.join(idle)}: for the command that listens; leave it out of --disagg-role {role}, which only joins"
            )
        options: dict[str, Any] = {
            "dtype": dtype_spec(dtype),
            "tasks": tasks or None,
            "revision": revision,
            "variant": variant,
            **({"acceleration": faster} if (faster := accelerations(acceleration)) else {}),
            "batching": batching,
            **({} if prompt_cache else {"prompt_cache": 0}),
        }
        routing: dict[str, Any] = {"policy": policy, "max_waiting": max_waiting, "warm_up": warm_up}
        if (count := threads_of(threads, on_ray=on_ray)) is not None:
            options["threads"] = count
        shares = by_role("--slots", slots)
        reach: dict[str, Any] = {
            "api_key": api_key,
            "origins": cors_origin,
            "certificate": ssl_certfile,
            "private": ssl_keyfile,
            "lora_folders": tuple(lora_dir or ()),
            "max_prompt": max_prompt,
        }

        from triptych import embedded  # heavy from here on: everything above is checked first

        source = str(embedded.path()) if model is None else model
        if on_ray and importlib.util.find_spec("ray") is None:
            raise UsageError('Ray is not installed; to get it: pip install "triptych[ray]"')
        if not verbose and on_ray:
            quieten_libraries_to_come()
        elif not on_ray:
            with at_once():
                if not verbose:
                    quieten_libraries(downloads=True)
                importlib.import_module("triptych.engine.local")  # with most of the libraries
        if role in WORKERS:
            from triptych.engine.ray_join import join

            assert role is not None and address is not None
            reserved: dict[str, Any] = {"gpus": gpus[role]} if role in gpus else {}
            join(source, role, address, **options, **reserved, on_ready=lambda told: announce([told], address))
            return

        if on_ray:
            from triptych.engine.ray_cluster import begin_connecting

            connecting = begin_connecting(address)  # while what is below imports the libraries

        @collection_paused()
        def build() -> Engine:
            if on_ray:
                from triptych.engine.ray import RayEngine

                chosen: dict[str, Any] = {} if pools is None and role is None else {"pools": pools}
                if gpus:
                    chosen["gpus"] = gpus
                if transport is not None:
                    chosen["transport"] = transport
                return RayEngine(source, address=address, connecting=connecting, **chosen, **options, **routing)
            from triptych.engine.local import LocalEngine

            where: dict[str, Any] = {name: device for name, device in devices.items() if device is not None}
            return LocalEngine(source, **where, slots=shares, **options, **routing)

        def keep() -> JobStore | None:
            from triptych.server.jobs import JobStore, open_default

            return None if no_state else open_default(source) if state_dir is None else JobStore(state_dir)

        listen(build, host, port, drain, keep, **reach, insecure=insecure)
        atexit.register(_heed_no_signal)


def _heed_no_signal() -> None:
    """Let no further signal become the exit code of a server that has stopped.

    The interpreter's own end takes seconds with these libraries, and by then has given up Python's handlers.
    """
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        if (number := getattr(signal, name, None)) is not None:  # Windows has no SIGHUP
            signal.signal(number, signal.SIG_IGN)


def _router_options(context: typer.Context) -> list[str]:
    """Return those options for HTTP and routing that the command line has. The key may be in everyone's environment."""
    return [
        "/".join((*option.opts, *option.secondary_opts))
        for option in context.command.params
        if (getattr(option, "rich_help_panel", None) == _HTTP or option.name in _ROUTING)
        and (source := context.get_parameter_source(option.name)) is not None
        and source.name == "COMMANDLINE"
    ]
