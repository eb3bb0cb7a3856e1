"""What each role of a model would load, from headers and configurations alone."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from triptych.components.blueprint import Blueprint, component_class, draw, has_weights
from triptych.components.cutting import CannotLoadByKey
from triptych.components.dtypes import NAMES, DtypeSpec, parse_dtype, resolve_dtype
from triptych.components.need import Need
from triptych.components.repository import Repository
from triptych.errors import ModelError, UnknownDtypeError
from triptych.pipelines.registry import open_family
from triptych.roles import WORKERS, RoleType

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ComponentPlan:
    """What one role loads of one component.

    Attributes:
        need: how much of it, in words.
        bytes: of weights, in the dtype they are loaded in.
        dtype: None for a component without weights.
        whole_bytes: what the whole component would take.
    """

    need: str
    bytes: int
    dtype: str | None
    whole_bytes: int


@dataclass
class Plan(Mapping[str, Mapping[str, ComponentPlan]]):
    """Role to component to what it loads: `plan["encoder"]["text_encoder"].bytes`.

    Attributes:
        whole: bytes of every component of the model, loaded or not.
        notes: what had to be assumed.
    """

    source: str
    family: str
    tasks: list[str]
    roles: dict[str, dict[str, ComponentPlan]]
    whole: dict[str, int]
    notes: list[str] = field(default_factory=list)

    def __getitem__(self, role: str) -> Mapping[str, ComponentPlan]:
        return self.roles[RoleType(role).value]

    def __iter__(self) -> Iterator[str]:
        return iter(self.roles)

    def __len__(self) -> int:
        return len(self.roles)

    @property
    def whole_bytes(self) -> int:
        """Bytes of all weights of the model."""
        return sum(self.whole.values())

    def role_bytes(self, role: str) -> int:
        """Bytes of all weights that one role loads."""
        return sum(component.bytes for component in self[role].values())

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as plain values, for JSON."""
        roles = {
            role: {
                "bytes": self.role_bytes(role),
                "components": {name: asdict(component) for name, component in components.items()},
            }
            for role, components in self.roles.items()
        }
        whole = {"bytes": self.whole_bytes, "components": self.whole}
        return {
            "source": self.source,
            "family": self.family,
            "tasks": self.tasks,
            "roles": roles,
            "whole": whole,
            "notes": self.notes,
        }


def plan(
    source: str | Path,
    *,
    dtype: DtypeSpec = "auto",
    tasks: str | Iterable[str] | None = None,
    revision: str | None = None,
    variant: str | None = None,
) -> Plan:
    """Say what each role would load of a model. Reads headers and configurations, never weights.

    A model without weight files is planned too: its dtype is then `dtype`, else what a configuration names, else
    bfloat16, and a note says which.

    Raises:
        ModelError: the repository is missing, damaged or not served.
        UsageError: a task or dtype does not exist.
    """
    family = open_family(source, revision=revision, variant=variant)
    chosen = family.select_tasks(tasks)
    counter = _Counter(family.repository, parse_dtype(dtype, family.repository))
    processes = {**{role.value: (role,) for role in WORKERS}, RoleType.MONOLITHIC.value: WORKERS}
    roles = {
        process: {name: counter.count(name, need) for name, need in family.needs(held, chosen).items()}
        for process, held in processes.items()
    }
    whole = {name: counter.whole(name) for name in family.repository.components}
    ordered = [task for task in family.tasks if task in chosen]
    return Plan(family.repository.name, family.repository.family, ordered, roles, whole, counter.notes)


class _Counter:
    """Counts the bytes of components; draws each one once per need."""

    def __init__(self, repository: Repository, dtypes: Mapping[str, str]) -> None:
        self.repository = repository
        self.dtypes = dtypes
        self.notes: list[str] = []
        self._dtype: dict[str, str] = {}
        self._bytes: dict[tuple[str, Need], int] = {}

    def count(self, name: str, need: Need) -> ComponentPlan:
        if not has_weights(component_class(self.repository, name)):
            return ComponentPlan(str(need), 0, None, 0)
        dtype = self._dtype_of(name)
        return ComponentPlan(str(need), self._count(name, need), dtype, self._count(name, Need.FULL))

    def whole(self, name: str) -> int:
        """Return all bytes of a component, by its files where it cannot be built; those that roles use were counted before."""
        try:
            return self.count(name, Need.FULL).bytes
        except ModelError as error:
            self._note(f"{name} is used by no role, and counted by its files: {error}")
            return self.repository.stored_bytes(name)

    def _count(self, name: str, need: Need) -> int:
        if not need.weights:
            return 0
        key = (name, replace(need, required=True, condition=None))
        if key not in self._bytes:
            dtype = getattr(torch, self._dtype_of(name))
            try:
                self._bytes[key] = self._draw(name, need, dtype).nbytes
            except CannotLoadByKey as reason:
                held = sum(tensor.nbytes for tensor in self.repository.tensors(name).values())
                self._bytes[key] = held or self.repository.stored_bytes(name)  # of pickles only the size is known
                self._note(f"{name} is loaded whole, by what its files hold: {reason}")
        return self._bytes[key]

    def _draw(self, name: str, need: Need, dtype: torch.dtype) -> Blueprint:
        return draw(self.repository, name, need, dtype=dtype, device=torch.device("cpu"), role="plan")

    def _dtype_of(self, name: str) -> str:
        if name not in self._dtype:
            try:
                self._dtype[name] = resolve_dtype(self.repository, name, self.dtypes)
            except UnknownDtypeError:
                self._dtype[name] = self._guess(name)
        return self._dtype[name]

    def _guess(self, name: str) -> str:
        config = self.repository.config(name)
        named = str(config.get("torch_dtype") or config.get("dtype")).removeprefix("torch.")
        guess, origin = (named, "named by its configuration") if named in NAMES else ("bfloat16", "assumed")
        lacks = "safetensors file, and a dtype has to be named to load it" if self._is_pickled(name) else "weight file"
        self._note(f"{name} has no {lacks}: {guess} is {origin}")
        return guess

    def _is_pickled(self, name: str) -> bool:
        return bool(self.repository.unsafe_weight_files(name))

    def _note(self, note: str) -> None:
        if note not in self.notes:
            self.notes.append(note)
