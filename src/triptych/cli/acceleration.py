"""The options of "Speed and memory", and the accelerations that they ask for."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import typer

from triptych.components.acceleration import Acceleration
from triptych.errors import ParameterError, UsageError
from triptych.roles import RoleType

_PANEL = "Speed and memory"
_KERNEL = "The kernel of attention, by diffusers' name: flash, sage, _native_cudnn, ..."
_COMPILE = "Compile the model's blocks with torch.compile; changes numbers."
_KEPT = "Keep the weights in 8 bits: fp8, or int8 (needs torchao). Changes numbers."
_OFFLOAD = "Keep the weights in the host's memory and bring each layer in when it runs: group."
_CACHE = "Leave out work that would change little since the last step: first_block[:SHARE], taylorseer[:STEPS]."


@dataclass(frozen=True)
class _Option:
    """One option: the role and the field of its `Acceleration` that it sets."""

    role: RoleType
    field: str
    kind: Any
    help: str
    metavar: str | None = None
    default: Any = None

    @property
    def name(self) -> str:
        return f"{self.role.value}_{self.field}"

    @property
    def flag(self) -> str:
        return f"--{self.name.replace('_', '-')}"

    @property
    def parameter(self) -> inspect.Parameter:
        told = typer.Option(self.flag, help=self.help, metavar=self.metavar, rich_help_panel=_PANEL, show_default=False)
        annotation = Annotated[self.kind, told]  # type: ignore[name-defined]
        return inspect.Parameter(self.name, inspect.Parameter.KEYWORD_ONLY, default=self.default, annotation=annotation)


_DENOISER, _ENCODER, _DECODER = RoleType.DENOISER, RoleType.ENCODER, RoleType.DECODER
OPTIONS = (
    _Option(_DENOISER, "attention", str | None, _KERNEL, "KERNEL"),
    _Option(_DENOISER, "compile", bool, _COMPILE, default=False),
    _Option(_DENOISER, "cache", str | None, _CACHE, "CACHE"),
    _Option(_DENOISER, "quantization", str | None, _KEPT, "KIND"),
    _Option(_ENCODER, "quantization", str | None, _KEPT, "KIND"),
    _Option(_DENOISER, "offload", str | None, _OFFLOAD, "KIND"),
    _Option(_ENCODER, "offload", str | None, _OFFLOAD, "KIND"),
    _Option(_DECODER, "tiling", bool, "Decode a large picture tile by tile; changes numbers a little.", default=False),
    _Option(_DECODER, "compile", bool, _COMPILE, default=False),
    _Option(_DENOISER, "ulysses", int, "Processes of one replica that share a sequence by heads.", "RANKS", 1),
    _Option(_DENOISER, "ring", int, "Processes of one replica that share a sequence in a ring.", "RANKS", 1),
    _Option(_DENOISER, "cfg_parallel", bool, "A process of its own for each guidance branch.", default=False),
)


def accelerated(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command these options; what they ask for reaches it as `acceleration`, a mapping from role to it."""
    inner = inspect.signature(command, eval_str=True)
    own = [parameter for name, parameter in inner.parameters.items() if name != "acceleration"]

    @functools.wraps(command)
    def run(*arguments: Any, **values: Any) -> None:
        given = {option: values.pop(option.name) for option in OPTIONS}
        command(*arguments, **values, acceleration=given)

    run.__signature__ = inner.replace(parameters=[*own, *(each.parameter for each in OPTIONS)])  # type: ignore[attr-defined]
    run.__annotations__ = {name: each.annotation for name, each in run.__signature__.parameters.items()}  # type: ignore[attr-defined]
    return run


Given = Mapping[_Option, Any]
"""What the options were given, defaults included."""


def flags(given: Given) -> dict[str, Any]:
    """Return the options that were given, and their values."""
    return {option.flag: value for option, value in given.items() if value != option.default}


def accelerations(given: Given) -> dict[RoleType, Acceleration]:
    """Return what the options ask for.

    Raises:
        UsageError: a value is not accepted, or two exclude each other; the message names the option.
    """
    wanted: dict[RoleType, dict[str, Any]] = {}
    for option, value in given.items():
        if value == option.default:
            continue
        try:
            Acceleration(**{option.field: value})
        except ParameterError as error:
            raise UsageError(f"{option.flag} {value}: {error.accepted}") from None
        wanted.setdefault(option.role, {})[option.field] = value
    found: dict[RoleType, Acceleration] = {}
    for role, values in wanted.items():
        try:
            found[role] = Acceleration(**values)
        except UsageError as error:
            raise UsageError(f"the {role}'s options: {error}") from None
    return found
