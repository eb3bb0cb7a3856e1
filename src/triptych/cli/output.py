"""Where the outputs go, and what is shown on the way: the files' names, the progress bar and the summary."""

from __future__ import annotations

import os.path
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from triptych.errors import UsageError
from triptych.result import check_path, check_rate

if TYPE_CHECKING:
    from rich.console import Console

    from triptych.pipelines.base import Family
    from triptych.runtime.segment import OnStep
    from triptych.state import State

Kind: TypeAlias = Literal["images", "videos"]

_SLUG, _SLUG_BYTES = 60, 180
"""Characters of the prompt in a file's name, and their bytes at most: seed and number fit into 255 beside them."""
_SUFFIXES: dict[Kind, str] = {"images": ".png", "videos": ".mp4"}


def check_output(asked: Path | None, kind: Kind, rate: float | None = None) -> None:
    """Check, before the outputs are made, that they can be written where they are to go.

    Args:
        rate: frames per second, where that is known.

    Raises:
        UsageError: the suffix, the name, the folder or the rate does not suit.
    """
    format = check_path(_named(asked, f"output{_SUFFIXES[kind]}"), kind)
    if rate is not None:
        check_rate(format, rate)


def output_path(asked: Path | None, kind: Kind, *, prompt: str, seed: int, count: int) -> Path:
    """Return where the outputs go. How many there are is known for certain only when they are there.

    Without a file's name: the prompt and the seed, under a name that no file has yet.
    """
    path = _named(asked, f"{slug(prompt)}-{seed}{_SUFFIXES[kind]}")
    return path if path == asked else free_path(path, count)


def _named(asked: Path | None, name: str) -> Path:
    """Return the file that is asked for; one of that name where a folder is, or nothing."""
    if asked is None:
        return Path(name)
    return asked / name if os.path.isdir(asked) else asked  # `Path.is_dir` raises for what is too long to be a path


def kind_of(family: Family, state: State) -> Kind:
    """Return what a request's outputs are.

    Raises:
        UsageError: they cannot be written into files.
    """
    from triptych.stages.graph import makes

    kind = makes(family.recipe)
    if kind is None:
        raise UsageError(f"{type(family).__name__} makes neither images nor videos: save its result from Python")
    if state.fields.get("output_type") == "latent":
        raise UsageError("--param output_type: latents cannot be saved to a file; use another output type")
    return kind


def slug(prompt: str) -> str:
    """Return a prompt as part of a file's name: words of any script, joined by `-`."""
    words = re.sub(r"[\W_]+", "-", prompt.lower()).strip("-")[:_SLUG]
    return words.encode()[:_SLUG_BYTES].decode(errors="ignore").rstrip("-") or "untitled"


def free_path(path: Path, count: int) -> Path:
    """Return the path, or with `_2`, `_3`, ... the first of which no file exists, numbered for several outputs."""
    numbers = [""] if count == 1 else [f"-{k}" for k in range(count)]
    candidate, attempt = path, 1
    while any(candidate.with_stem(f"{candidate.stem}{number}").exists() for number in numbers):
        attempt += 1
        candidate = path.with_stem(f"{path.stem}_{attempt}")
    return candidate


@contextmanager
def progress(console: Console) -> Iterator[OnStep]:
    """Show a bar for each stage that has steps; yields what is to be told of a step."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    shown = Progress(*columns, TimeRemainingColumn(), console=console, disable=console.quiet)
    bars: dict[str, Any] = {}

    def on_step(stage: str, step: int, steps: int) -> None:
        if stage not in bars:
            shown.start()  # not before there is something to show; does nothing the second time
            bars[stage] = shown.add_task(stage, total=steps)
        shown.update(bars[stage], completed=step)

    try:
        yield on_step
    finally:
        if bars:
            shown.stop()


def summary(console: Console, seconds: Mapping[str, float], seed: int) -> None:
    """Print the seconds of each stage, and the seed."""
    from rich.table import Table

    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column()
    table.add_column(justify="right")
    for stage, each in seconds.items():
        table.add_row(stage, f"{each:.2f} s")
    table.add_row("seed", str(seed))
    console.print(table)
