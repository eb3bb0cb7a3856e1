"""`triptych plan`: what each role would load."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

import typer

from triptych.cli.console import human, logging_to, quieten_libraries, stderr_console
from triptych.cli.errors import reported
from triptych.cli.leaving import at_once
from triptych.cli.options import MODEL_HELP, Debug, Dtype, Revision, Tasks, Variant, dtype_spec

if TYPE_CHECKING:
    from rich.table import Table

    from triptych.planning.plan import Plan


def plan(
    model: Annotated[str | None, typer.Argument(help=MODEL_HELP, show_default=False)] = None,
    dtype: Dtype = None,
    tasks: Tasks = None,
    revision: Revision = None,
    variant: Variant = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    debug: Debug = False,
) -> None:
    """Show what each role would load of a model, before any weight is read or downloaded.

    Example:  [bold]triptych plan black-forest-labs/FLUX.2-klein-4B --tasks text-to-image[/]
    """
    with reported(debug), logging_to(stderr_console(), verbose=False):
        import triptych
        from triptych import embedded

        source = embedded.path() if model is None else model
        with at_once():
            quieten_libraries(downloads=True)
            planned = triptych.plan(
                source, dtype=dtype_spec(dtype), tasks=tasks or None, revision=revision, variant=variant
            )
        if as_json:
            print(json.dumps(planned.to_dict(), indent=2))
        else:
            show(planned)


def show(planned: Plan) -> None:
    """Print a plan as a table: components by roles, and totals against the whole model."""
    from rich.console import Console

    console = Console(highlight=False)
    console.print(f"{planned.source}: {planned.family}", markup=False, soft_wrap=True)
    console.print(f"tasks: {', '.join(planned.tasks)}", markup=False, soft_wrap=True)
    console.print(_table(planned))
    for note in planned.notes:
        console.print(f"note: {note}", markup=False, soft_wrap=True)


def _table(planned: Plan) -> Table:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("component", overflow="fold")
    for role in planned.roles:
        table.add_column(role, justify="right", overflow="fold")
    table.add_column("whole model", justify="right", overflow="fold")
    for name, whole in planned.whole.items():
        loaded = [components[name] for components in planned.roles.values() if name in components]
        dtypes = ", ".join(sorted({each.dtype for each in loaded if each.dtype}))
        cells = []
        for components in planned.roles.values():
            if name in components:
                each = components[name]
                size = human(each.bytes) if each.dtype else ""  # a tokenizer has no weights to speak of
                cells.append(Text.assemble(each.need, "\n", (size, "bold" if each.bytes else "dim")))
            else:
                cells.append(Text("-", style="dim"))
        table.add_row(Text.assemble(name, "\n", (dtypes, "dim")), *cells, Text(f"\n{human(whole)}" if dtypes else ""))
    totals = [planned.role_bytes(role) for role in planned.roles]
    table.add_section()
    table.add_row("total", *map(human, totals), human(planned.whole_bytes), style="bold")
    table.add_row("of the whole", *(_share(total, planned.whole_bytes) for total in totals), "100 %")
    return table


def _share(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f} %" if whole else "-"
