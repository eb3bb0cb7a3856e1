"""`triptych families`: what is supported, task by task."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from triptych.cli.errors import reported
from triptych.cli.options import Debug, option_of
from triptych.errors import UsageError, did_you_mean

if TYPE_CHECKING:
    from triptych.components.files import Files
    from triptych.pipelines.base import Family


def families(
    pipeline: Annotated[
        str | None,
        typer.Argument(help="Show this pipeline class and its parameters.", show_default=False),
    ] = None,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Show the parameters of all.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    debug: Debug = False,
) -> None:
    """List the pipeline classes that are served, their tasks, and the roles each task runs through.

    Example:  [bold]triptych families Flux2KleinPipeline[/]  shows what a request may carry.
    """
    with reported(debug):
        described = describe(pipeline, parameters=verbose or pipeline is not None)
        if as_json:
            print(json.dumps(described, indent=2, default=repr))
        else:
            show(described)


def describe(pipeline: str | None, *, parameters: bool) -> dict[str, dict[str, Any]]:
    """Return by pipeline class: tasks with their line and their roles, and on request the parameters with defaults.

    Imports the libraries only for the parameters.

    Raises:
        UsageError: no family serves `pipeline`.
    """
    from triptych.pipelines.registry import families as served
    from triptych.stages.graph import route_of

    if pipeline is not None and pipeline not in served():
        hint = did_you_mean(pipeline, served())
        raise UsageError(f"no family serves {pipeline!r}{hint}. Served: {', '.join(served())}")
    described: dict[str, dict[str, Any]] = {}
    for name, kind in served().items():
        if pipeline not in (None, name):
            continue
        family = without_repository(kind, name)
        tasks = {
            task: {"description": line, "roles": [role.value for role, _ in route_of(family.recipe, task)]}
            for task, line in family.tasks.items()
        }
        described[name] = {"tasks": tasks, **({"parameters": family.parameters} if parameters else {})}
    return described


def without_repository(kind: type[Family], pipeline: str) -> Family:
    """Return a family for which no model is there: enough for its recipe and its parameters."""
    from triptych.components.repository import Repository

    return kind(Repository(cast("Files", None), None, pipeline, {}, {}, {}, {}))


def show(described: dict[str, dict[str, Any]]) -> None:
    """Print the families as a table, with one more table for the parameters of each."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False)
    routes = {" > ".join(about["roles"]) for family in described.values() for about in family["tasks"].values()}
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("pipeline, and its tasks", no_wrap=True)
    table.add_column("makes")
    if len(routes) > 1:
        table.add_column("roles")
    for name, family in described.items():
        table.add_row(Text(name, style="bold"))
        for task, about in family["tasks"].items():
            table.add_row(f"  {task}", about["description"], *[" > ".join(about["roles"])] * (len(routes) > 1))
    console.print(table)
    if len(routes) == 1:
        console.print(f"Every task runs through the roles {routes.pop()}.")
    for name, family in described.items():
        if "parameters" in family:
            table = Table("parameter", "default", "triptych generate", box=box.SIMPLE_HEAD, pad_edge=False)
            for parameter, default in family["parameters"].items():
                table.add_row(parameter, Text(repr(default)), option_of(parameter))
            console.print(f"{name} takes:", markup=False)
            console.print(table)
            console.print("A model's own defaults, from its triptych.json, come before these.")
