"""A stage: one step of a recipe. Declares where it runs, what it needs, what it reads and what it writes."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from triptych.components.adapters import Adapters
from triptych.components.lora import Lora
from triptych.components.need import Need
from triptych.errors import UndeclaredError
from triptych.roles import RoleType
from triptych.state import View

if TYPE_CHECKING:
    import torch


class Stage(ABC):
    """Base of all stages.

    Attributes:
        role: the role that runs the stage. A class without one is a `TypeError`.
        needs: how much of which component it uses; each is then an attribute of the stage under its own name.
        reads: the fields it takes from the state.
        writes: the fields it leaves there. It may read back what it wrote.
        tasks: the tasks it is part of; None for all of the family's.
        row_wise: the components whose calls requests may share: each row of what they return depends on no other row of
            what they are given. Only for a stage that draws no random numbers but from its request's generator.
        adapters: the LoRAs that the process's components hold; None where the family's pipeline has no loader of them.
        helpers: the family's own diffusers pipeline, built with the declared components; for its helper methods.
        device: where tensors belong.
    """

    role: ClassVar[RoleType]
    needs: ClassVar[Mapping[str, Need]] = {}
    reads: ClassVar[frozenset[str] | set[str]] = frozenset()
    writes: ClassVar[frozenset[str] | set[str]] = frozenset()
    tasks: ClassVar[frozenset[str] | set[str] | None] = None
    row_wise: ClassVar[frozenset[str] | set[str]] = frozenset()
    adapters: Adapters | None = None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if not isinstance(getattr(cls, "role", None), RoleType):
            raise TypeError(f"stage {cls.__name__} declares no role: give it `role = RoleType.ENCODER` or another")

    def __init__(self, name: str, components: Mapping[str, Any], helpers: Any, device: torch.device) -> None:
        self.name = name
        self.helpers = helpers
        self.device = device
        self._components = components

    def __getattr__(self, name: str) -> Any:
        components = self.__dict__.get("_components", {})
        if name not in components:
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")
        component = components[name]
        if isinstance(component, Undeclared):
            raise UndeclaredError(self.name, "component", name)
        return component

    def adapt(self, loras: Sequence[Lora]) -> None:
        """Let the stage's components compute with these LoRAs, as far as those change them, and with no others."""
        if self.adapters is not None:
            self.adapters.use([name for name, need in self.needs.items() if need.weights], loras)

    def adaptation(self) -> tuple[tuple[str, float], ...]:
        """Return the adapters, and their scales, that the stage's components compute with."""
        if self.adapters is None:
            return ()
        return self.adapters.active([name for name, need in self.needs.items() if need.weights])

    @abstractmethod
    def run(self, state: View) -> None:
        """Do the stage's work: read declared fields of `state`, write declared ones."""


class Undeclared:
    """Stands for a component that a stage does not declare; touching it raises `UndeclaredError`.

    It takes the component's place in the stage's helpers, so that a helper which would fall back to a constant where
    the component is missing fails instead.
    """

    def __init__(self, stage: str, component: str) -> None:
        self.__dict__.update(stage=stage, component=component)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name in ("_orig_mod", "_hf_hook"):
            raise AttributeError(name)
        raise UndeclaredError(self.stage, "component", self.component)

    def __call__(self, *_: Any, **__: Any) -> Any:
        raise UndeclaredError(self.stage, "component", self.component)


def stage_name(cls: type[Stage]) -> str:
    """Return the snake_case of a stage's class.

    Digits and acronyms stay together: `LTX2Refinement` is `ltx2_refinement`, `I2VEncoding` is `i2v_encoding`.
    """
    words = re.findall(r"[A-Z]+(?:[0-9]+[A-Z]*)*(?![a-z])|[A-Z]?[a-z]+[0-9]*|[0-9]+", cls.__name__)
    return "_".join(words).lower()
