"""Parameters: what a request may carry over HTTP, for callers that build a form of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, Field

from triptych.engine.base import Engine
from triptych.request import types_of
from triptych.server.limits import Limits
from triptych.server.problems import sendable
from triptych.server.submission import PICTURE, TENSOR
from triptych.stages.graph import makes

Kind = Literal["text", "integer", "number", "flag", "list", "image", "images", "loras"]

_KINDS: tuple[tuple[type, Kind], ...] = ((bool, "flag"), (str, "text"), (int, "integer"), (float, "number"))
_OWN = {"seed": int, "exact": bool}
_UNTOLD = frozenset(("output_type", "exact"))
"""The first has no meaning for files; the second has a default of its own over HTTP."""


class Parameter(BaseModel):
    """One parameter of a request."""

    name: str
    kind: Kind = Field(
        description="`image` takes one picture, `images` one or several; `list` a list of numbers; `loras` a list of "
        "`{path, scale}`."
    )
    default: Any = Field(description="What holds where none is given; null where the model settles it.")


class FamilyParameters(BaseModel):
    """What requests to the loaded model may carry."""

    model: str
    family: str
    makes: str = Field(description="`images` or `videos`.")
    tasks: dict[str, str] = Field(description="What the model is loaded for, each with a line that says it.")
    images: int = Field(description="Pictures that one request may carry.")
    parameters: list[Parameter]


def parameters_of(engine: Engine, limits: Limits) -> FamilyParameters:
    """Return what requests to an engine's model may carry, with the model's own defaults."""
    family = engine.front.family
    told = []
    for name, default in family.parameters.items():
        if name in _UNTOLD or name.startswith("_") or (TENSOR.search(name) and not PICTURE.search(name)):
            continue
        if (kind := kind_of(name, default, family.annotations)) is not None:
            value = family.repository.defaults.get(name, default)
            told.append(Parameter(name=name, kind=kind, default=list(value) if isinstance(value, tuple) else value))
    return FamilyParameters(
        model=sendable(family.repository.name),
        family=family.repository.family,
        makes=makes(family.recipe) or "images",
        tasks={name: line for name, line in family.tasks.items() if name in engine.front.tasks},
        images=limits.images,
        parameters=[*told, Parameter(name="exact", kind="flag", default=False)],
    )


def kind_of(name: str, default: object, annotations: Mapping[str, Any]) -> Kind | None:
    """Return the kind of a parameter, from its annotation, else from its default; None where neither tells."""
    if name == "lora":
        return "loras"
    possible = types_of(annotations.get(name, _OWN.get(name)))
    if PICTURE.search(name):
        return "images" if list in possible else "image"
    for kind_type, kind in _KINDS:
        if kind_type in possible:
            return kind
    if possible & {list, tuple}:
        return "list"
    for kind_type, kind in _KINDS:
        if isinstance(default, kind_type):
            return kind
    return "list" if isinstance(default, (list, tuple)) else None
