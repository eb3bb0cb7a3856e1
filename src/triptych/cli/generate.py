"""`triptych generate`: from a prompt to a file."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from triptych.cli.console import logging_to, quieten_libraries, stderr_console
from triptych.cli.errors import reported
from triptych.cli.options import PARAMETER_OPTIONS, Debug, Dtype, Revision, Tasks, Variant, dtype_spec, option_of
from triptych.errors import ParameterError, UnknownParameterError, UsageError

if TYPE_CHECKING:
    from PIL.Image import Image
    from rich.console import Console

    from triptych.pipelines.base import Family
    from triptych.result import Result
    from triptych.runtime.model import Model, OnStep
    from triptych.state import State

_REQUEST, _OUTPUT = "Request", "Output"  # headings of --help
_SLUG = 60
"""Characters of the prompt in a file's name: in any script it stays below a file system's 255 bytes."""


def generate(
    arguments: Annotated[
        list[str],
        typer.Argument(
            metavar="[MODEL] PROMPT",
            help="The prompt, after the model: a folder in diffusers' layout or a hub id. "
            "Without a model, the emoji model that ships.",
            show_default=False,
        ),
    ],
    seed: Annotated[
        int | None,
        typer.Option(
            help="Where the random numbers start; drawn, and printed, where left out.", rich_help_panel=_REQUEST
        ),
    ] = None,
    height: Annotated[
        int | None,
        typer.Option(help="Pixels.", rich_help_panel=_REQUEST),
    ] = None,
    width: Annotated[
        int | None,
        typer.Option(help="Pixels.", rich_help_panel=_REQUEST),
    ] = None,
    size: Annotated[
        str | None,
        typer.Option(metavar="WxH", help="Width and height in one: 1024x768.", rich_help_panel=_REQUEST),
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(help="Denoising steps.", rich_help_panel=_REQUEST),
    ] = None,
    guidance: Annotated[
        float | None,
        typer.Option(help="The guidance scale.", rich_help_panel=_REQUEST),
    ] = None,
    true_cfg: Annotated[
        float | None,
        typer.Option(help="The scale of guidance by the negative prompt (Qwen-Image).", rich_help_panel=_REQUEST),
    ] = None,
    negative_prompt: Annotated[
        str | None,
        typer.Option(help="What it should not look like.", rich_help_panel=_REQUEST),
    ] = None,
    image: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE", help="A picture to start from or to refer to; may be repeated.", rich_help_panel=_REQUEST
        ),
    ] = None,
    num_images: Annotated[
        int | None,
        typer.Option(help="Outputs, images or videos, made as one batch.", rich_help_panel=_REQUEST),
    ] = None,
    num_frames: Annotated[
        int | None,
        typer.Option(help="Frames of a video.", rich_help_panel=_REQUEST),
    ] = None,
    max_sequence_length: Annotated[
        int | None,
        typer.Option(help="Tokens of the prompt that count.", rich_help_panel=_REQUEST),
    ] = None,
    exact: Annotated[
        bool | None,
        typer.Option(
            "--exact/--no-exact",
            help="Every forward as diffusers runs it (the default), or guidance branches joined in one.",
            rich_help_panel=_REQUEST,
        ),
    ] = None,
    param: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=VALUE",
            help="Any other parameter of the family, its value in JSON or plain text; may be repeated. "
            "`triptych families NAME` lists them.",
            rich_help_panel=_REQUEST,
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="Where to write: .png, .jpg, .webp; .mp4, .gif for videos. Replaces what is there. Left out, or a folder: "
            "<prompt>-<seed>.png (.mp4) under a name that is free. Several outputs are numbered.",
            rich_help_panel=_OUTPUT,
            show_default=False,
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option("--model", "-m", help="The model, for who likes to name it.", rich_help_panel="Model"),
    ] = None,
    dtype: Dtype = None,
    tasks: Tasks = None,
    revision: Revision = None,
    variant: Variant = None,
    device: Annotated[
        str, typer.Option(help="A torch device, or auto: the first accelerator there is.", rich_help_panel="Model")
    ] = "auto",
    split: Annotated[
        bool,
        typer.Option(
            "--split",
            help="Run encoder, denoiser and decoder in processes of their own, one after another: the same file, with "
            "less memory at a time.",
            rich_help_panel="Model",
        ),
    ] = False,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Tell what each role loaded; let the libraries speak.")
    ] = False,
    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", help="Only the paths written, and warnings and errors.")
    ] = False,
    debug: Debug = False,
) -> None:
    """Make a picture or a video from a prompt and write it to a file, whose path is printed on stdout.

    Example:  [bold]triptych generate black-forest-labs/FLUX.2-klein-4B "a red fox in the snow" -o fox.png --seed 7[/]

    What is not given is the model's default. Exit codes: 2 usage, 3 model, 4 internal, 1 unexpected.
    """
    console = stderr_console()
    console.quiet = quiet
    with reported(debug), logging_to(stderr_console(), verbose=verbose):
        source, prompt = model_and_prompt(arguments, model)
        asked = Asked()
        asked.add("prompt", prompt)
        asked.add("negative_prompt", negative_prompt)
        asked.add("seed", seed)
        for name, pixels in zip(("width", "height"), parse_size(size)):
            asked.add(name, pixels, "--size")
        asked.add("height", height)
        asked.add("width", width)
        asked.add("num_inference_steps", steps)
        asked.add("guidance_scale", guidance)
        asked.add("true_cfg_scale", true_cfg)
        asked.add("num_images_per_prompt", num_images)
        asked.add("num_frames", num_frames)
        asked.add("max_sequence_length", max_sequence_length)
        asked.add("exact", exact)
        for name, value in parse_parameters(param or []):
            asked.add(name, value, f"--param {name}")
        asked.add("image", open_images(image or []))

        began = time.perf_counter()
        import triptych  # heavy from here on: everything above is checked first

        if not verbose:
            quieten_libraries(downloads=not quiet)
        options: dict[str, Any] = {"dtype": dtype_spec(dtype), "revision": revision, "variant": variant}
        console.print(f"Opening {source}", markup=False, soft_wrap=True)
        checker = triptych.load(
            source, role="server", device="cpu" if split else device, tasks=tasks or None, **options
        )
        state = asked.admit(checker)
        path = output_path(output, checker.family, state)
        options["revision"] = checker.family.repository.files.revision or revision  # no two roles of two revisions
        loading = {"libraries, checks": time.perf_counter() - began}

        if split:
            from triptych.runtime.split import run_split

            with progress(console) as on_step:
                state = run_split(
                    source,
                    state,
                    device=device,
                    **options,
                    on_step=on_step,
                    on_loaded=lambda role, seconds: loading.update({f"loading {role}": seconds}),
                    show_output=verbose,
                )
        else:
            began = time.perf_counter()
            loaded = triptych.load(source, device=device, tasks=[state.task], **options)
            loading["loading"] = time.perf_counter() - began
            with progress(console) as on_step:
                state = loaded.run(state, on_step=on_step)
        began = time.perf_counter()
        result = state.result
        written = result.save(path)
        summary(console, {**loading, **result.timings, "writing": time.perf_counter() - began}, result)
        for each in written:
            print(each)


def model_and_prompt(arguments: list[str], model: str | None) -> tuple[str | Path, str]:
    """Return the model and the prompt that the positional arguments and `--model` name.

    Raises:
        UsageError: there are too many or too few.
    """
    from triptych import embedded

    example = 'for example: triptych generate "a red heart"'
    if model is not None and len(arguments) == 2:
        raise UsageError("the model is given twice: by --model and before the prompt")
    if len(arguments) > 2 or (model is not None and len(arguments) > 1):
        raise UsageError(f"{len(arguments)} arguments where [MODEL] PROMPT are accepted; quote the prompt, {example}")
    if not arguments:
        raise UsageError(f"the prompt is missing; {example}")
    if len(arguments) == 2:
        return arguments[0], arguments[1]
    if model is None and Path(arguments[0], "model_index.json").is_file():
        raise UsageError(f"{arguments[0]} is a model, and the prompt is missing; {example}")
    return embedded.path() if model is None else model, arguments[0]


@dataclass
class Asked:
    """The request parameters that the user gave, and the option each came from. The others are the model's."""

    values: dict[str, Any] = field(default_factory=dict)
    options: dict[str, str] = field(default_factory=dict)

    def add(self, name: str, value: object, option: str | None = None) -> None:
        """Add a parameter unless its value is None, which means that it was not given.

        Raises:
            UsageError: it was given already, by another option.
        """
        option = option or PARAMETER_OPTIONS[name]
        if value is None and not option.startswith("--param"):
            return
        if name in self.values:
            raise UsageError(f"{option}: {name} is given already, by {self.options[name]}")
        self.values[name], self.options[name] = value, option

    def admit(self, model: Model) -> State:
        """Let a model check the parameters; returns the request's state.

        Raises:
            UsageError: one is not accepted; the message begins with its option.
        """
        from triptych.request import Request

        values = dict(self.values)
        if (
            "num_images_per_prompt" not in model.family.parameters
            and "num_videos_per_prompt" in model.family.parameters
        ):
            values = {name.replace("num_images_per", "num_videos_per"): value for name, value in values.items()}
        try:
            return model.admit(Request(**values))
        except UnknownParameterError as error:
            raise UsageError(f"{self._option(error.field)}: {error}") from error
        except ParameterError as error:
            option = self._option(error.field)
            value = f" {error.value!r}" if isinstance(error.value, (str, int, float, list)) else ""
            raise UsageError(f"{option}{value}: {error.accepted}") from error

    def _option(self, name: str) -> str:
        return self.options.get(name.replace("num_videos_per", "num_images_per"), option_of(name))


def parse_size(text: str | None) -> tuple[int, ...]:
    """Return width and height, or nothing where no size was given.

    Raises:
        UsageError: it is not two numbers.
    """
    if text is None:
        return ()
    match = re.fullmatch(r"(\d+)\s*[xX×*]\s*(\d+)", text.strip(), re.ASCII)
    if match is None:
        raise UsageError(f"--size {text!r}: width and height are accepted, as in 1024x768")
    return int(match[1]), int(match[2])


def parse_parameters(texts: Iterable[str]) -> Iterator[tuple[str, object]]:
    """Yield names and values of `name=value`, the value in JSON or, where it is none, plain text.

    Raises:
        UsageError: a text has no name, or its value is Python rather than JSON.
    """
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name.strip().isidentifier():
            raise UsageError(f"--param {text!r}: name=value is accepted, as in --param sigmas=[1.0,0.5]")
        if value in ("True", "False", "None"):
            json_word = {"True": "true", "False": "false", "None": "null"}[value]
            raise UsageError(f"--param {text!r}: values are JSON: write {json_word}")
        try:
            yield name.strip(), json.loads(value)
        except ValueError:
            if value[:1] in ("[", "{", '"'):
                raise UsageError(f"--param {text!r}: the value is not valid JSON") from None
            yield name.strip(), value


def open_images(paths: list[Path]) -> Image | list[Image] | None:
    """Return the pictures in these files as diffusers' `load_image` would: upright, and RGB.

    One is returned by itself, and None where there is none.

    Raises:
        UsageError: a file is missing or holds no picture.
    """
    if not paths:
        return None
    from PIL import Image, ImageOps, UnidentifiedImageError

    images = []
    for path in paths:
        try:
            with Image.open(path) as opened:
                images.append(ImageOps.exif_transpose(opened).convert("RGB"))
        except UnidentifiedImageError as error:
            raise UsageError(f"--image {path}: this is no image") from error
        except OSError as error:
            raise UsageError(f"--image {path}: {error.strerror or f'damaged ({error})'}") from error
        except (ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise UsageError(f"--image {path}: cannot be read: {error}") from error
    return images[0] if len(images) == 1 else images


def output_path(asked: Path | None, family: Family, state: State) -> Path:
    """Return where the outputs go, once it is known that they can be written there.

    Without a file's name: the prompt and the seed, under a name that no file has yet.

    Raises:
        UsageError: the suffix, the folder or the output type does not suit.
    """
    from triptych.result import check_path

    written = {name for _, stage in family.recipe for name in stage.writes}
    kind: Literal["images", "videos"] = "videos" if "frames" in written else "images"
    if kind == "images" and "images" not in written:
        raise UsageError(f"{type(family).__name__} makes neither images nor videos: save its result from Python")
    if state.fields.get("output_type") == "latent":
        raise UsageError("--param output_type: latents cannot be saved to a file; use another output type")
    folder = asked if asked is not None and asked.is_dir() else Path()
    if asked is not None and folder is not asked:
        check_path(asked, kind)
        return asked
    count = state.fields.get("num_videos_per_prompt" if kind == "videos" else "num_images_per_prompt", 1)
    suffix = ".png" if kind == "images" else ".mp4"
    path = free_path(folder / f"{slug(str(state.fields.get('prompt') or ''))}-{state.fields['seed']}{suffix}", count)
    check_path(path, kind)
    return path


def slug(prompt: str) -> str:
    """Return a prompt as part of a file's name: words of any script, joined by `-`."""
    return re.sub(r"[\W_]+", "-", prompt.lower()).strip("-")[:_SLUG].rstrip("-") or "untitled"


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


def summary(console: Console, seconds: Mapping[str, float], result: Result) -> None:
    """Print the seconds of each stage, and the seed."""
    from rich.table import Table

    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column()
    table.add_column(justify="right")
    for stage, each in seconds.items():
        table.add_row(stage, f"{each:.2f} s")
    table.add_row("seed", str(result.seed))
    console.print(table)
