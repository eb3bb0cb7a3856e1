"""A family: the recipe of one pipeline class, as declarations that are checked before anything is loaded."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any, ClassVar

from triptych.components.lora import LoraDesk, loadable
from triptych.components.need import Need, join
from triptych.components.repository import Repository
from triptych.errors import ComponentFileError, ParameterError, RoleError, TriptychError, UsageError, did_you_mean
from triptych.request import pipeline_annotations, pipeline_parameters
from triptych.roles import RoleType, filter_modules_for_role
from triptych.stages.base import Stage, stage_name
from triptych.stages.graph import check_components, check_recipe
from triptych.stages.noise_levels import check_noise_levels


class Family:
    """Base of all families. A subclass is a handful of declarations, its stages, and `admit`.

    Attributes:
        pipelines: the pipeline classes served, by their names in `model_index.json` and in diffusers.
        tasks: what the family can do: task, and one line that says it. The first is the default. A repository may have
            fewer.
        geometry: components whose configuration the diffusers pipeline's constructor reads, in every role.
        admission: further components whose configuration `admit` reads.
        refused: parameters of the pipeline that a request may not carry.
        optional: parameters with a default for which None means something else.
        fps: frames per second of a video family.
        transparency: whether the model sees what is transparent in a picture. For others, pictures are made opaque.
    """

    pipelines: ClassVar[tuple[str, ...]]
    tasks: Mapping[str, str]
    geometry: ClassVar[Mapping[str, Need]] = {}
    admission: ClassVar[Mapping[str, Need]] = {}
    refused: ClassVar[frozenset[str] | set[str]] = frozenset()
    optional: ClassVar[frozenset[str] | set[str]] = frozenset()
    fps: ClassVar[float | None] = None
    transparency: ClassVar[bool] = False

    def __init__(self, repository: Repository) -> None:
        self.repository = repository
        self.recipe: list[tuple[str, type[Stage]]] = []
        self.compose()

    def compose(self) -> None:
        """Add the family's stages, in order, by `add_stage`."""
        raise TypeError(f"{type(self).__name__} adds no stages: it must override compose()")

    def add_stage(self, factory: type[Stage], name: str | None = None) -> None:
        """Append a stage to the recipe. It is built later, and only in a process that has its role."""
        self.recipe.append((name or stage_name(factory), factory))

    def task_of(self, parameters: Mapping[str, Any]) -> str:
        """Return the task that a request's parameters ask for."""
        return next(iter(self.tasks))

    def admit(self, parameters: dict[str, Any], helpers: Any) -> None:
        """Check a request's parameters and settle those that depend on the model (sizes), in place.

        Args:
            helpers: the family's diffusers pipeline over hollow components.

        Raises:
            ParameterError: a value is not accepted; nothing has been computed yet.
        """

    def lone_forward(self) -> str | None:
        """Return why a step of this model is always one forward; None where guidance may make it two."""
        return None

    def frame_rate(self, parameters: Mapping[str, Any]) -> float | None:
        """Return the frames per second of the video that a request's parameters ask for; None where none is made."""
        asked = parameters.get("frame_rate", self.parameters.get("frame_rate"))
        return float(asked) if isinstance(asked, (int, float)) else self.fps

    def enlargement(self, parameters: Mapping[str, Any]) -> float:
        """Return by how much more pixels a request takes than its settled sizes and counts say."""
        return 1.0

    def chunks(self, parameters: Mapping[str, Any]) -> int:
        """Return how often a request's steps are run, because what it asks for is made piece by piece."""
        return 1

    def check_noise_levels(self, parameters: Mapping[str, Any]) -> None:
        """Check that the model's scheduler has the steps that a request asks for.

        Raises:
            ParameterError: it has not.
        """
        if "scheduler" in self.repository.components:
            check_noise_levels(self.repository.config("scheduler"), parameters)

    def validate_disagg_role(self, role: RoleType) -> None:
        """Refuse a role that the family cannot run in, with a reason.

        Raises:
            RoleError: it cannot.
        """
        if role not in (RoleType.MONOLITHIC, RoleType.SERVER) and all(stage.role != role for _, stage in self.recipe):
            raise RoleError(f"{self.repository.family} has no stages for the role {role.value!r}")

    @cached_property
    def oracle(self) -> type[Any]:
        """The diffusers pipeline class of the repository."""
        import diffusers

        cls: type[Any] = getattr(diffusers, self.repository.family)
        return cls

    @cached_property
    def parameters(self) -> dict[str, object]:
        """The request parameters and their defaults."""
        own = {"lora": None} if self.loras is not None else {}
        return {**pipeline_parameters(self.oracle.__call__, self.refused), **own}

    @cached_property
    def annotations(self) -> dict[str, Any]:
        """What the diffusers pipeline says its parameters are."""
        return pipeline_annotations(self.oracle.__call__)

    @cached_property
    def loras(self) -> LoraDesk | None:
        """What admits LoRAs; None where the diffusers pipeline has no loader of them."""
        return LoraDesk(self.oracle, self.repository) if loadable(self.oracle) else None

    def check(self) -> None:
        """Prove the whole graph, whatever role is loaded; reads no weights.

        Raises:
            RecipeError: the stages' declarations contradict each other.
            ModelError: the repository lacks a component that a stage needs, or its `triptych.json` names no parameter.
        """
        check_recipe(self.recipe, self.parameters, self.repository.family)
        check_components(self.recipe, self.repository)
        for name in self.repository.defaults:
            if name not in self.parameters:
                hint = did_you_mean(name, self.parameters)
                raise ComponentFileError("triptych.json", f"{self.repository.family} has no parameter {name!r}{hint}")

    def needs_of(self, stage: type[Stage]) -> dict[str, Need]:
        """Return what a stage needs of this repository: its own needs and what its helpers' constructor reads."""
        return self.present(join([self.geometry, stage.needs]))

    def stages_of(self, roles: Collection[RoleType], tasks: Collection[str]) -> list[tuple[str, type[Stage]]]:
        """Return the stages that a process with these roles runs for these tasks, in order."""
        return [
            (name, stage)
            for name, stage in self.recipe
            if stage.role in roles and (stage.tasks is None or not stage.tasks.isdisjoint(tasks))
        ]

    def needs(self, roles: Collection[RoleType], tasks: Collection[str]) -> dict[str, Need]:
        """Return what a process with these roles loads for these tasks, in the order of the model's index.

        A process that admits requests (a server, or one that has the first stage) needs what checking them reads.
        """
        admits = not roles or self.recipe[0][1].role in roles
        total = join(
            [
                self.present({**self.geometry, **(self.admission if admits else {})}),
                *(self.needs_of(stage) for _, stage in self.stages_of(roles, tasks)),
            ]
        )
        return {name: total[name] for name in self.repository.components if name in total}

    def extra_allowed_modules(self, role: RoleType, tasks: Collection[str] | None = None) -> frozenset[str]:
        """Return the components a role's stages need beyond those it owns by name; derived from the needs."""
        names = list(self.needs((role,), self.tasks if tasks is None else tasks))
        return frozenset(names) - set(filter_modules_for_role(names, role))

    def present(self, needs: Mapping[str, Need]) -> dict[str, Need]:
        """Leave out optional components that this checkpoint does not have or does not use."""
        return {
            name: need
            for name, need in needs.items()
            if name in self.repository.components
            and (need.condition is None or need.condition(self.repository.options))
        }

    def select_tasks(self, tasks: str | Iterable[str] | None) -> frozenset[str]:
        """Return the tasks to load for: all where `tasks` is None.

        Raises:
            ParameterError: one is not a task of the family.
        """
        if tasks is None:
            return frozenset(self.tasks)
        wanted = {task.strip().lower().replace("_", "-") for task in ([tasks] if isinstance(tasks, str) else tasks)}
        for task in wanted:
            if task not in self.tasks:
                hint = did_you_mean(task, self.tasks)
                raise ParameterError("tasks", task, f"{self.repository.family} does {', '.join(self.tasks)}{hint}")
        if not wanted:
            raise ParameterError("tasks", tasks, f"name at least one of {', '.join(self.tasks)}")
        return frozenset(wanted)


def check_inputs(helpers: Any, parameters: Mapping[str, Any]) -> None:
    """Let the diffusers pipeline check the parameters by its own rules.

    Raises:
        UsageError: it refuses them.
    """
    check: Callable[..., None] = helpers.check_inputs
    accepted = inspect.signature(check).parameters
    try:
        check(**{name: parameters.get(name) for name in accepted})
    except (ValueError, TypeError, AttributeError) as error:
        if isinstance(error, TriptychError):
            raise
        raise UsageError(str(error)) from error


def check_tensors(parameters: Mapping[str, Any], shapes: Mapping[str, Sequence[int | None]]) -> None:
    """Check the kind and shape of tensors that a request may give, so that they fail here and not in a model.

    Args:
        shapes: by parameter, how many entries each dimension has; None where that is for the model to say.

    Raises:
        ParameterError: one is no tensor of floating point numbers, or of another shape.
    """
    import torch

    for name, shape in shapes.items():
        given = parameters.get(name)
        if given is None:
            continue
        told = given
        if isinstance(given, torch.Tensor):
            told = f"of shape {tuple(given.shape)} and dtype {given.dtype}"
            alike = given.ndim == len(shape) and all(size in (None, own) for own, size in zip(given.shape, shape))
            if given.is_floating_point() and given.numel() and alike:
                continue
        sizes = ", ".join("any" if size is None else str(size) for size in shape)
        raise ParameterError(name, told, f"a tensor of floating point numbers, of shape ({sizes}), is accepted")


def check_latents(parameters: Mapping[str, Any], shape: Sequence[int]) -> None:
    """Check the latents that a request may give: a row for each output.

    Args:
        shape: that of one row.

    Raises:
        ParameterError: they are no tensor of floating point numbers, or of another shape.
    """
    embeds = parameters.get("prompt_embeds")
    prompts = 1 if embeds is None else len(embeds)
    check_tensors(parameters, {"latents": (prompts * parameters["num_images_per_prompt"], *shape)})


def check_placeholders(parameters: Mapping[str, Any], names: Iterable[str], placeholders: Iterable[str]) -> None:
    """Check that texts hold nothing that stands for a picture among a model's tokens: there is none to put there.

    Raises:
        ParameterError: one does.
    """
    placeholders = tuple(placeholders)
    for name in names:
        for placeholder in placeholders:
            if placeholder in (parameters[name] or ""):
                reason = f"a text without {placeholder!r} is accepted: to the model it stands for a picture"
                raise ParameterError(name, parameters[name], reason)


def check_multiple(parameters: Mapping[str, Any], names: Iterable[str], multiple: int) -> None:
    """Check that sizes are multiples of what the model works in.

    Raises:
        ParameterError: one is not; the message gives the nearest sizes that are.
    """
    for name in names:
        size = parameters[name]
        if size % multiple:
            below, above = size // multiple * multiple, (size // multiple + 1) * multiple
            nearest = f"{below} or {above}" if below else str(above)
            raise ParameterError(name, size, f"a multiple of {multiple} is accepted; the nearest: {nearest}")


def in_colour(pictures: Any) -> Any:
    """Return PIL images, one or a list of them, as RGB; anything else as it is. Transparency is dropped."""
    from PIL import Image

    if isinstance(pictures, list):
        return [in_colour(each) for each in pictures]
    is_other = isinstance(pictures, Image.Image) and pictures.mode != "RGB"
    return pictures.convert("RGB") if is_other else pictures
