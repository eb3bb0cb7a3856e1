"""A loaded model: the components and stages of this process's roles, and what runs requests through them."""

from __future__ import annotations

import inspect
import json
import logging
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from triptych.components.acceleration import Acceleration, AccelerationSpec, parse_acceleration
from triptych.components.adapters import Adapters
from triptych.components.dtypes import DtypeSpec, is_widened, parse_dtype, suited
from triptych.components.hollow import is_hollow
from triptych.components.interruption import watch
from triptych.components.loading import load_component
from triptych.components.need import Need
from triptych.components.repository import Repository
from triptych.components.switches import on_card
from triptych.errors import ParameterError, UsageError, WireError, WrongRoleError
from triptych.pipelines.base import Family
from triptych.pipelines.registry import open_family
from triptych.request import Request, fill_in, split_prompts
from triptych.result import Result, is_plain
from triptych.roles import WORKERS, RoleType, parse_roles, role_name
from triptych.runtime.accelerated import Accelerated
from triptych.runtime.segment import OnStep, Segment, finish, run_segment
from triptych.stages.base import Stage, Undeclared
from triptych.stages.graph import route_of
from triptych.state import TOLD, State

log = logging.getLogger(__name__)

ADMISSION = "admission"
"""The name under which checking a request appears in errors."""


class Model:
    """A model, loaded for one or more roles. Made by `triptych.load`.

    Attributes:
        family: the recipe it runs.
        roles: the roles this process has; empty for a server.
        components: what is loaded, by name; hollow components included.
        stages: the stages this process runs, in order.
        adapters: the LoRAs that its components hold; None where the family's pipeline has no loader of them.
        loaded_bytes: bytes of weights held, by component.
        device: where it runs.
        identity: what has to be the same in all processes that share requests, as text.
    """

    def __init__(
        self,
        family: Family,
        roles: frozenset[RoleType],
        device: torch.device,
        dtype: DtypeSpec,
        tasks: frozenset[str],
        acceleration: AccelerationSpec = None,
    ) -> None:
        self.family = family
        self.roles = roles
        self.role = role_name(roles)
        self.device = device
        self.tasks = tasks
        self.fingerprint = family.repository.fingerprint
        self.components: dict[str, Any] = {}
        self.loaded_bytes: dict[str, int] = {}
        mine = family.stages_of(roles, tasks)
        named, needs = parse_dtype(dtype, family.repository), family.needs(roles, tasks)
        dtypes = suited(named)
        asked = parse_acceleration(acceleration, roles)
        self.accelerated = Accelerated(family, roles, needs, asked, tasks, device, dtypes)
        self.identity = identity_of(family.repository, named, tasks, asked)
        self._load(needs, dtypes)
        self.adapters = None if family.loras is None else Adapters(family.oracle, family.repository, self.components)
        self.stages = [self._build(name, stage) for name, stage in mine]
        self._helpers = self._helper_pipeline(ADMISSION, {**family.geometry, **family.admission})

    def is_hollow(self, name: str) -> bool:
        """Return whether a component has only its configuration here.

        Raises:
            UsageError: the component is not loaded in this process at all.
        """
        if name not in self.components:
            raise UsageError(f"{name!r} is not loaded here; loaded are: {', '.join(self.components)}")
        return is_hollow(self.components[name])

    def admit(self, request: Request) -> State:
        """Check a request and make its state, with every parameter settled and the random state at its start.

        Raises:
            UsageError: a parameter is unknown, out of range or does not fit the model.
        """
        family = self.family
        given = dict(request.parameters)
        if family.loras is None and (named := given.pop("lora", None)):
            problem = f"diffusers has no loader of LoRAs for {family.repository.family}: leave it out"
            raise ParameterError("lora", named, problem)
        better, pipeline = family.repository.defaults, family.repository.family
        fields = fill_in(given, family.parameters, better, pipeline, family.annotations, family.optional)
        task = family.task_of(fields)
        if task not in self.tasks:
            raise UsageError(
                f"this is a request for {task!r}, but the model was loaded for {', '.join(sorted(self.tasks))}"
            )
        family.admit(fields, self._helpers)
        family.check_noise_levels(fields)
        named = fields.pop("lora", None)
        if named and family.loras is not None:
            fields["lora"] = family.loras.settle(named, request.lora_folders)
        self.accelerated.check(fields)
        fields["generator"] = torch.Generator("cpu").manual_seed(fields["seed"])
        route = tuple(role for role, _ in route_of(family.recipe, task))
        names = [name for name in fields if name in given and name not in {*TOLD, "lora"}]
        told = {name: fields[name] for name in names if is_plain(fields[name])}
        parameters = json.loads(json.dumps(told))  # lists instead of tuples, as they arrive elsewhere
        state = State(family.repository.family, self.fingerprint, task, route, fields=fields, parameters=parameters)
        state.tell()
        return state

    def run(self, work: Request | State, *, on_step: OnStep | None = None) -> State:
        """Run a request, or a state that came from another role, as far as this process's roles reach.

        The state given stays as it is, random state included, so that it can be run again.

        Raises:
            UsageError: the request is not acceptable.
            WrongRoleError: it is another role's turn.
            WireError: the state belongs to another model.
            Cancelled: `on_step` said so.
        """
        first = self.family.recipe[0][1].role
        if isinstance(work, Request) and first not in self.roles:
            raise WrongRoleError(f"a request begins with the {first}; this model is loaded for role {self.role!r}")
        state = self.admit(work) if isinstance(work, Request) else work.copy()
        self.check_turn(state)
        while state.next_role in self.roles:
            with on_card(self.device):
                finish(self.segment(state, on_step))
        return state

    def check_turn(self, state: State) -> None:
        """Check that a state belongs to this model and that its next segment is one of this process's roles'.

        Raises:
            WireError, WrongRoleError: it does not, or is not.
        """
        if state.fingerprint != self.fingerprint or state.family != self.family.repository.family:
            theirs, ours = f"{state.family} {state.fingerprint}", f"{self.family.repository.family} {self.fingerprint}"
            raise WireError(f"this state belongs to another model ({theirs}) than the one loaded here ({ours})")
        if state.next_role not in self.roles:
            turn = f"it is the {state.next_role}'s turn" if state.next_role else "its result is there already"
            raise WrongRoleError(f"this state is not for role {self.role!r}: {turn}")

    def generate(self, *, on_step: OnStep | None = None, **parameters: Any) -> Result:
        """Make what the parameters ask for, in this process.

        A list of prompts becomes as many requests, all with the same seed; their outputs are joined in order. The
        parameters are the family's pipeline's own, and `seed` and `exact`.

        Raises:
            WrongRoleError: this process has not all roles.
            UsageError: a parameter is not acceptable.
        """
        if self.role != RoleType.MONOLITHIC.value:
            raise WrongRoleError(
                f"generate() needs a whole model; this one is loaded for role {self.role!r}: use run()"
            )
        states = [self.admit(Request(**each)) for each in split_prompts(parameters)]
        return gather([self.run(state, on_step=on_step).result for state in states])

    def route(self) -> list[tuple[RoleType, list[str]]]:
        """Return the segments of the tasks it is loaded for, in order; of the longest where they differ."""
        routes = [route_of(self.family.recipe, task) for task in sorted(self.tasks)]
        return max(routes, key=len)

    def segment(self, state: State, on_step: OnStep | None = None, check: Callable[[], None] | None = None) -> Segment:
        """Run the state's next segment, in place, leaving the denoising model's forwards to whoever iterates.

        Args:
            check: called between two parts of an autoencoder's work; what it raises ends the segment.

        Raises:
            ParameterError: the state is of an exact request, and this process's roles compute something else.
        """
        self.accelerated.check(state.fields, self.roles)
        return run_segment(self.family.recipe, self.stages, state, self.device, on_step, check)

    def _load(self, needs: Mapping[str, Need], dtypes: Mapping[str, str]) -> None:
        repository = self.family.repository
        began = time.perf_counter()
        for name, need in needs.items():
            device = torch.device("cpu") if self.accelerated.is_offloaded(name) else self.device
            loaded = load_component(repository, name, need, device=device, dtypes=dtypes, role=self.role)
            self.components[name] = loaded.component
            self.loaded_bytes[name] = loaded.nbytes
        self.loaded_bytes |= self.accelerated.switch_on(self.components)
        for component in self.components.values():
            watch(component)
        self._log(needs, time.perf_counter() - began)
        wider = [name for name in needs if needs[name].weights and is_widened(repository, name, dtypes)]
        if wider:
            log.warning(
                "%s: loaded as float32, in more memory, because this CPU only emulates the checkpoint's dtype and is many "
                "times slower with it; a dtype that is named is kept",
                ", ".join(wider),
            )

    def _log(self, needs: Mapping[str, Need], seconds: float) -> None:
        """Say once what this role loaded and what it left out."""
        repository = self.family.repository
        mine = {name for name, _ in self.family.stages_of(self.roles, self.tasks)}
        skipped = [name for name, _ in self.family.recipe if name not in mine]
        absent = [name for name in repository.components if name not in needs]
        stored = sum(repository.stored_bytes(name) for name in repository.components)
        held = sum(self.loaded_bytes.values())
        log.info(
            "role %s of %s: loaded %s: %.1f MB in %.2f s, of files of %.1f MB (saved %.1f MB); skipped stages: %s; "
            "skipped components: %s",
            self.role,
            repository.name,
            ", ".join(f"{name} ({needs[name]})" for name in needs),
            held / 1e6,
            seconds,
            stored / 1e6,
            max(0, stored - held) / 1e6,
            ", ".join(skipped) or "none",
            ", ".join(absent) or "none",
        )

    def _build(self, name: str, stage: type[Stage]) -> Stage:
        needs = self.family.needs_of(stage)
        declared = {component: self.components[component] for component in needs}
        absent = {component: None for component in stage.needs if component not in needs}
        others = {component: Undeclared(name, component) for component in self.family.repository.components}
        components = {**others, **absent, **declared}
        built = stage(name, components, self._helper_pipeline(name, stage.needs), self.device)
        built.adapters = self.adapters
        return built

    def _helper_pipeline(self, user: str, declared: Mapping[str, Need]) -> Any:
        """Build the family's diffusers pipeline from the components that `user` declares; touching others raises."""
        family = self.family
        usable = family.present({**family.geometry, **declared})
        arguments: dict[str, Any] = {}
        for name, parameter in list(inspect.signature(family.oracle.__init__).parameters.items())[1:]:
            if name in usable and name in self.components:
                arguments[name] = self.components[name]
            elif name in family.repository.components and name not in declared:
                arguments[name] = Undeclared(user, name)
            elif name in family.repository.options:
                arguments[name] = family.repository.options[name]
            elif parameter.default is parameter.empty:
                arguments[name] = None
        return family.oracle(**arguments)


def identity_of(
    repository: Repository,
    dtypes: Mapping[str, str],
    tasks: Iterable[str],
    accelerations: Mapping[RoleType, Acceleration],
) -> dict[str, str]:
    """Return what every process of a service has to have alike, for its answers to be so; what is off is left out.

    Args:
        tasks: those that it can do, which decide what of each component it has.
        dtypes, accelerations: as `parse_dtype` and `parse_acceleration` return them.
    """
    spelled = ", ".join(f"{component}={name}" for component, name in sorted(dtypes.items()))
    numbers = {role: accelerations[role].numbers for role in WORKERS if role in accelerations}
    told = "; ".join(f"{role}: {each}" for role, each in numbers.items() if each)
    identity = {"fingerprint": repository.fingerprint, "dtype": spelled, "tasks": ", ".join(sorted(tasks))}
    return {**identity, **({"acceleration": told} if told else {})}


def gather(results: list[Result]) -> Result:
    """Join the results of several prompts that shared their other parameters into one, in order."""
    if len(results) == 1:
        return results[0]
    first = results[0]
    joined = {name: _concatenate([getattr(each, name) for each in results]) for name in ("images", "frames", "audio")}
    seconds = {stage: sum(each.timings[stage] for each in results) for stage in first.timings}
    told = {}
    for name in dict.fromkeys(name for each in results for name in each.parameters):
        values = [each.parameters.get(name) for each in results]
        alike = name != "prompt" and all(value == values[0] for value in values)
        told[name] = values[0] if alike else values
    return replace(first, **joined, timings=seconds, parameters=told)


def _concatenate(outputs: list[Any]) -> Any:
    import numpy as np

    if isinstance(outputs[0], torch.Tensor):
        return torch.cat(outputs)
    if isinstance(outputs[0], np.ndarray):
        return np.concatenate(outputs)
    return None if outputs[0] is None else [item for output in outputs for item in output]


def pick_device(device: str | torch.device) -> torch.device:
    """Return the device of that name; `auto` takes the first accelerator there is.

    Raises:
        UsageError: there is no such device.
    """
    if str(device) == "auto":
        accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        return accelerator or torch.device("cpu")
    try:
        picked = torch.device(device)
        torch.empty(0, device=picked)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"device={str(device)!r} is not available here: {str(error).splitlines()[0]}") from error
    if picked.type == "meta":
        raise UsageError("device='meta' computes nothing; use cpu, an accelerator, or auto")
    return picked


def load(
    source: str | Path,
    *,
    role: RoleType | str = RoleType.MONOLITHIC,
    device: str | torch.device = "auto",
    dtype: DtypeSpec = "auto",
    tasks: str | Iterable[str] | None = None,
    revision: str | None = None,
    variant: str | None = None,
    acceleration: AccelerationSpec = None,
) -> Model:
    """Load a model, or the part of it that one or more roles use.

    Args:
        source: a folder in the diffusers layout, or a hub id.
        role: `monolithic`, `encoder`, `denoiser`, `decoder`, several joined by `+`, or `server`, which loads no weights.
        device: a torch device, or `auto`.
        dtype: `auto` (the checkpoint's, or float32 where this machine only emulates that), a dtype, or a mapping from
            component to dtype with a `default`.
        tasks: load for these tasks only; None for all that the family has.
        revision, variant: as in `from_pretrained`.
        acceleration: what makes the role's models faster or smaller; of several roles, a mapping from role to it.

    Raises:
        ModelError: the repository is missing, damaged or not served.
        UsageError: a role, task, device or dtype does not exist, or an acceleration is not possible here.
    """
    roles = parse_roles(role)
    family = open_family(source, revision=revision, variant=variant)
    for each in roles or (RoleType.SERVER,):
        family.validate_disagg_role(each)
    return Model(family, roles, pick_device(device), dtype, family.select_tasks(tasks), acceleration)
