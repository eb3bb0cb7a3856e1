"""Options that several commands have, and what their values mean."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from triptych.errors import RoleError, UsageError
from triptych.roles import WORKERS, RoleType

if TYPE_CHECKING:
    from triptych.components.dtypes import DtypeSpec

PARAMETER_OPTIONS = {
    "prompt": "PROMPT",
    "negative_prompt": "--negative-prompt",
    "image": "--image",
    "height": "--height",
    "width": "--width",
    "num_frames": "--num-frames",
    "num_inference_steps": "--steps",
    "guidance_scale": "--guidance",
    "true_cfg_scale": "--true-cfg",
    "max_sequence_length": "--max-sequence-length",
    "num_images_per_prompt": "--num-images",
    "num_videos_per_prompt": "--num-images",
    "lora": "--lora",
    "seed": "--seed",
    "exact": "--exact",
}
"""The option of `triptych generate` for a request parameter; the others are set by `--param`."""

MODEL_HELP = "A folder in diffusers' layout or a hub id; the emoji model that ships where left out."

Dtype = Annotated[
    str | None,
    typer.Option(
        metavar="DTYPE",
        help="float32, bfloat16, float16 or auto (the checkpoint's; float32 where this CPU only emulates that); or by component: "
        "vae=float32,default=bfloat16.",
        rich_help_panel="Model",
    ),
]
Tasks = Annotated[
    list[str] | None,
    typer.Option(
        metavar="TASK", help="Only for this task; may be repeated. All where left out.", rich_help_panel="Model"
    ),
]
Revision = Annotated[
    str | None,
    typer.Option(help="A branch, tag or commit on the hub.", rich_help_panel="Model"),
]
Variant = Annotated[
    str | None,
    typer.Option(help="The weight files' variant, such as fp16.", rich_help_panel="Model"),
]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


def path_of(text: str) -> Path:
    """Return the path that an option names: the parser of every one that takes a path.

    Raises:
        BadParameter: it is empty, which Python takes for the folder that the process works in.
    """
    if not text:
        raise typer.BadParameter("a path is accepted, and this is empty")
    return Path(text)


def finite(value: float | None) -> float | None:
    """Return a number, if it is finite: the callback of options whose bounds let infinity through, or have none.

    Raises:
        BadParameter: it is not.
    """
    if value is not None and not math.isfinite(value):
        raise typer.BadParameter("a finite number is accepted")
    return value


def dtype_spec(text: str | None) -> DtypeSpec:
    """Return what `--dtype` asks for: one dtype, or one for each component named.

    Raises:
        UsageError: a part of a list is not `component=dtype`.
    """
    if text is None:
        return "auto"
    if "=" not in text:
        return text
    spec: dict[str, str] = {}
    for part in text.split(","):
        component, equals, name = (each.strip() for each in part.partition("="))
        if not (component and equals and name):
            raise UsageError(f"--dtype {text!r}: {part!r} is not component=dtype, as in vae=float32,default=bfloat16")
        if component in spec:
            raise UsageError(f"--dtype {text!r}: {component!r} is given twice")
        spec[component] = name
    return spec


def option_of(parameter: str) -> str:
    """Return how a request parameter is given on the command line."""
    return PARAMETER_OPTIONS.get(parameter, f"--param {parameter}")


def by_role(option: str, text: str | None) -> dict[RoleType, int] | None:
    """Return the numbers of `role=number,...`; None where nothing was given.

    Raises:
        UsageError: a part is not a role that computes and a number of at least 1.
    """
    if text is None:
        return None
    numbers: dict[RoleType, int] = {}
    for part in text.split(","):
        name, _, number = (each.strip() for each in part.partition("="))
        try:
            role = RoleType(name)
        except RoleError as error:
            raise UsageError(f"{option} {text!r}: {error}") from None
        if role not in WORKERS or not number.isdecimal() or int(number) < 1:
            raise UsageError(f"{option} {text!r}: role=number is accepted, as in encoder=1,denoiser=8")
        if role in numbers:
            raise UsageError(f"{option} {text!r}: {name!r} is given twice")
        numbers[role] = int(number)
    return numbers
