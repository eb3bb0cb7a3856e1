"""The command line. Nothing heavy is imported before a command needs it, so that `--help` is immediate."""

from __future__ import annotations

import io
import sys
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

import triptych
from triptych.cli import bench, families, generate, keys, plan, pools, serve, top
from triptych.cli.errors import USAGE, say
from triptych.cli.leaving import at_once


class _Generate(TyperCommand):
    """Says of its arguments what the parser cannot express: the optional one comes first."""

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        return ["[OPTIONS]", "[MODEL]", "PROMPT"]


app = typer.Typer(
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command(cls=_Generate)(generate.generate)
app.command()(plan.plan)
app.command()(families.families)
app.command()(serve.serve)
app.command()(top.top)
app.command()(pools.scale)
app.command()(pools.drain)
app.command()(keys.key)
app.command()(bench.bench)


@app.callback(invoke_without_command=True)
def root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    """Run diffusion models, whole or split into encoder, denoiser and decoder, with the same result to the bit.

    A picture with the model that ships:  [bold]triptych generate "a red heart"[/]
    """
    if version:
        print(f"triptych {triptych.__version__}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        print(context.get_help())
        raise typer.Exit


def run(arguments: list[str]) -> int:
    """Run the command line with these arguments; returns the exit code."""
    try:
        return app(arguments, prog_name="triptych", standalone_mode=False) or 0
    except typer.TyperException as error:  # what the parser refused
        context: typer.Context | None = getattr(error, "ctx", None)
        command = context.command_path if context else "triptych"
        message = error.format_message().rstrip(".")
        say(f"{message}{'' if message.endswith('?') else '.'} See: {command} --help")
        return USAGE


def main() -> None:
    """The console script `triptych`."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="surrogateescape")  # paths go out as they came in, whatever their bytes
    with at_once():  # until a command begins
        sys.exit(run(sys.argv[1:]))
