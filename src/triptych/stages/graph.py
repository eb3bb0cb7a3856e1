"""The graph of a recipe: proved before any weight is read, cut into segments, and asked what must travel."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from itertools import groupby
from typing import Literal

from triptych.components.repository import Repository
from triptych.errors import ModelError, RecipeError, did_you_mean
from triptych.roles import RoleType
from triptych.stages.base import Stage
from triptych.state import OUTPUTS

ALWAYS = OUTPUTS | {"seed", "output_type", "lora", "exact"}
"""Fields that stay with a request to its end, whoever reads them."""

Recipe = Sequence[tuple[str, type[Stage]]]
"""The stages of a family in order, each with its name."""


def check_recipe(recipe: Recipe, parameters: Collection[str], family: str) -> None:
    """Prove that every field read is a request parameter or written earlier, and that the stages can be told apart.

    Raises:
        RecipeError: a name occurs twice, a field is read that nobody writes, or only a later stage does.
    """
    names = [name for name, _ in recipe]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise RecipeError(f"{family} has two stages named {twice[0]!r}; give one of them another name")
    known = {*parameters, "generator"}
    for position, (name, stage) in enumerate(recipe):
        for field in sorted(set(stage.reads) - known):
            _explain_unwritten(recipe, position, field, known, family)
        known |= set(stage.writes)
    if not known & OUTPUTS:
        raise RecipeError(f"no stage of {family} writes a result; one of {', '.join(sorted(OUTPUTS))} is expected")


def _explain_unwritten(recipe: Recipe, position: int, field: str, known: Collection[str], family: str) -> None:
    name, stage = recipe[position]
    for later, writer in recipe[position + 1 :]:
        if field in writer.writes:
            back = sorted(set(stage.writes) & set(writer.reads))
            if back:
                raise RecipeError(
                    f"{family} has a cycle: stage {name!r} reads {field!r}, which {later!r} writes, and {later!r} reads "
                    f"{back[0]!r}, which {name!r} writes"
                )
            raise RecipeError(f"stage {name!r} of {family} reads {field!r}, which is written only later, by {later!r}")
    raise RecipeError(
        f"stage {name!r} of {family} reads {field!r}, which is no request parameter and which no earlier stage writes"
        f"{did_you_mean(field, known)}"
    )


def check_components(recipe: Recipe, repository: Repository) -> None:
    """Prove that the repository has every component that a stage needs, whatever role is being loaded.

    Raises:
        ModelError: it lacks one.
    """
    for name, stage in recipe:
        for component, need in stage.needs.items():
            if need.required and component not in repository.components:
                hint = did_you_mean(component, repository.components)
                raise ModelError(
                    f"{repository.name} has no component {component!r}, which stage {name!r} of {repository.family} "
                    f"needs{hint}. It has: {', '.join(repository.components)}"
                )


def stages_of_task(recipe: Recipe, task: str) -> list[tuple[str, type[Stage]]]:
    """Return the stages that one task runs."""
    return [(name, stage) for name, stage in recipe if stage.tasks is None or task in stage.tasks]


def route_of(recipe: Recipe, task: str) -> list[tuple[RoleType, list[str]]]:
    """Cut a task's stages into segments: maximal runs of one role. Returns each one's role and stage names."""
    runs = groupby(stages_of_task(recipe, task), key=lambda each: each[1].role)
    return [(role, [name for name, _ in run]) for role, run in runs]


def live_after(recipe: Recipe, task: str, stage: str) -> set[str]:
    """Return the fields that must be kept once `stage` is done: those that a later stage of the task reads."""
    active = stages_of_task(recipe, task)
    position = [name for name, _ in active].index(stage)
    live: set[str] = set(ALWAYS)
    for _, later in reversed(active[position + 1 :]):
        live = (live - (set(later.writes) - set(later.reads))) | set(later.reads) | ALWAYS
    return live


def makes(recipe: Recipe) -> Literal["images", "videos"] | None:
    """Return what comes out of a recipe as files; None for what is neither images nor videos."""
    written = {field for _, stage in recipe for field in stage.writes}
    if "frames" in written:
        return "videos"
    return "images" if "images" in written else None
