"""Requests: what a caller asks for. Parameters carry the names and defaults of the family's own pipeline."""

from __future__ import annotations

import inspect
import math
import random
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Union, get_args, get_origin

from triptych.errors import ParameterError, UnknownParameterError

OWN = {"seed": None, "exact": True}
"""Parameters every family has beside its pipeline's: the seed (drawn where None) and bit-equality with the oracle."""

NEVER = frozenset(
    ("self", "generator", "return_dict", "callback_on_step_end", "callback_on_step_end_tensor_inputs", "callback_steps")
)
"""Parameters of pipelines that a request cannot carry: `seed` takes the place of `generator`."""

OUTPUT_TYPES = ("pil", "np", "pt", "latent")


class Request:
    """One request: parameters by name, checked when a model admits it.

    `Request(prompt="a red fox", seed=7)`; see `triptych families` for what a family takes.
    """

    lora_folders: Sequence[Path] | None = None
    """The folders, beside the model's own, in which `lora` may name files; None for any file or hub id. A server sets
    it on what others send."""
    release: Callable[[], None] | None = None
    """Called when it is refused, or has ended: lets go of what was counted for its pictures."""

    def __init__(self, /, **parameters: object) -> None:
        self.parameters = parameters

    def __repr__(self) -> str:
        return f"Request({', '.join(f'{name}={value!r}' for name, value in self.parameters.items())})"


def pipeline_parameters(call: Callable[..., object], refused: Iterable[str] = ()) -> dict[str, object]:
    """Return the request parameters of a pipeline with their defaults, read off its `__call__`."""
    hidden = NEVER | set(refused)
    parameters = {
        name: parameter.default
        for name, parameter in inspect.signature(call).parameters.items()
        if name not in hidden and parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
    }
    return {name: None if default is inspect.Parameter.empty else default for name, default in parameters.items()} | OWN


def pipeline_annotations(call: Callable[..., object]) -> dict[str, Any]:
    """Return what a pipeline's `__call__` says its parameters are, for those that it says it of."""
    parameters = inspect.signature(call).parameters.values()
    return {each.name: each.annotation for each in parameters if not isinstance(each.annotation, str)}


def types_of(annotation: Any) -> set[Any]:
    """Return the types that an annotation joins by `|`."""
    origin = get_origin(annotation)
    if origin in (Union, types.UnionType):
        return set().union(*(types_of(each) for each in get_args(annotation)))
    return {origin or annotation}


def fill_in(
    given: Mapping[str, object],
    defaults: Mapping[str, object],
    better: Mapping[str, object],
    family: str,
    annotations: Mapping[str, Any] | None = None,
    optional: Iterable[str] = (),
) -> dict[str, Any]:
    """Return all parameters of a request: what was given, else the model's own default, else the pipeline's.

    Args:
        annotations: those of the pipeline; what is annotated as one plain type alone is checked to be of it.
        optional: parameters that have a default and for which None, if it is given, means something else.

    Raises:
        UnknownParameterError: a given parameter is not one of the family's.
        ParameterError: a value is of the wrong kind or out of range.
    """
    for name in given:
        if name not in defaults:
            raise UnknownParameterError(name, family, defaults)
    values = {**defaults, **better, **given}
    for name, value in values.items():
        if value is None and defaults[name] is not None and name not in optional:
            values[name] = value = better.get(name, defaults[name])
        if value is not None and (check := _check_of(name, (annotations or {}).get(name))) is not None:
            check(name, value)
    if values["seed"] is None:
        values["seed"] = draw_seed()
    return values


def _check_of(name: str, annotation: Any) -> Callable[[str, object], None] | None:
    if name in _CHECKS:
        return _CHECKS[name]
    kinds = types_of(annotation) - {type(None)}
    return _CHECKS_OF_TYPES.get(kinds.pop()) if len(kinds) == 1 else None


def draw_seed() -> int:
    """Return a seed that nobody chose."""
    return random.SystemRandom().randrange(2**32)


def split_prompts(given: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return one set of parameters per prompt where `prompt` is a list, else the parameters as they are.

    All have the seed that was given, or one that is drawn for them together.

    Raises:
        ParameterError: the list is empty, or `negative_prompt` is a list of another length.
    """
    prompts = given.get("prompt")
    if not isinstance(prompts, (list, tuple)):
        return [dict(given)]
    if not prompts:
        raise ParameterError("prompt", prompts, "the list is empty")
    given = {**given, "seed": draw_seed() if given.get("seed") is None else given["seed"]}
    negative = given.get("negative_prompt")
    if isinstance(negative, (list, tuple)):
        if len(negative) != len(prompts):
            raise ParameterError("negative_prompt", negative, f"{len(prompts)} prompts need as many, or a single one")
        return [{**given, "prompt": one, "negative_prompt": other} for one, other in zip(prompts, negative)]
    return [{**given, "prompt": one} for one in prompts]


def _text(name: str, value: object) -> None:
    if not isinstance(value, str):
        raise ParameterError(name, value, f"a text is accepted, not {type(value).__name__}")
    try:
        value.encode()
    except UnicodeEncodeError:  # half of a character, which neither tokenizers nor files take
        raise ParameterError(name, value, "valid Unicode text is accepted") from None


def _whole(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ParameterError(name, value, "a whole number is accepted")


def _count(least: int, most: float = math.inf) -> Callable[[str, object], None]:
    def check(name: str, value: object) -> None:
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            limit = f" and at most {most}" if most < math.inf else ""
            raise ParameterError(name, value, f"a whole number of at least {least}{limit} is accepted")

    return check


def _number(name: str, value: object, accepted: str = "a finite number is accepted") -> None:
    try:
        fits = not isinstance(value, bool) and isinstance(value, (int, float)) and math.isfinite(value)
    except OverflowError:  # a whole number beyond all floats
        fits = False
    if not fits:
        raise ParameterError(name, value, accepted)


def _number_or_flag(name: str, value: object) -> None:
    if not isinstance(value, bool):
        _number(name, value)


def _numbers(name: str, value: Any) -> None:
    try:
        fits = len(value) > 0 and all(math.isfinite(each) for each in value)
    except (TypeError, OverflowError):
        fits = False
    if not fits:
        raise ParameterError(name, value, "a list of finite numbers is accepted")


def _flag(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise ParameterError(name, value, "True or False is accepted")


def _output_type(name: str, value: object) -> None:
    if not isinstance(value, str) or value not in OUTPUT_TYPES:
        raise ParameterError(name, value, f"one of {', '.join(OUTPUT_TYPES)} is accepted")


_CHECKS: dict[str, Callable[[str, object], None]] = {
    "prompt": _text,
    "prompt_2": _text,
    "prompt_3": _text,
    "negative_prompt": _text,
    "negative_prompt_2": _text,
    "negative_prompt_3": _text,
    "height": _count(1),
    "width": _count(1),
    "num_frames": _count(1),
    "num_inference_steps": _count(1),
    "num_images_per_prompt": _count(1),
    "num_videos_per_prompt": _count(1),
    "max_sequence_length": _count(1),
    "guidance_scale": _number,
    "guidance_scale_2": _number,
    "cfg_normalization": _number_or_flag,  # annotated as a flag, and used as a limit
    "max_area": partial(_number, accepted="a number of pixels is accepted"),  # annotated as a whole one
    "true_cfg_scale": _number,
    "sigmas": _numbers,
    "timesteps": _numbers,
    "seed": _count(0, 2**64 - 1),
    "exact": _flag,
    "output_type": _output_type,
}
_CHECKS_OF_TYPES: dict[Any, Callable[[str, object], None]] = {
    bool: _flag, int: _whole, float: _number, str: _text,
}  # fmt: skip
