"""The denoising loop, in five steps that a scheduler of requests can drive one at a time."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from triptych.roles import RoleType
from triptych.stages.base import Stage
from triptych.state import View

if TYPE_CHECKING:
    import torch


@dataclass
class Forward:
    """One call of a denoising model: one guidance branch of one request at one step.

    Attributes:
        component: the model's name.
        branch: the guidance branch (`cond`, `uncond`), which keeps step caches apart.
        inputs: its keyword arguments. Tensors have one row per output, lists one entry.
        cache: further arguments of the model's `cache_context`.
    """

    component: str
    branch: str
    inputs: dict[str, Any]
    cache: dict[str, Any] = field(default_factory=dict)


class Denoising(Stage):
    """Base of denoising stages: `run` is `begin`, then `model_inputs`, `predict` and `advance` per step, then `finish`.

    Schedulers are stateful, so `begin` makes one for each request.

    Attributes:
        shared: inputs that are the same for every row of a batch and are passed once.
    """

    role = RoleType.DENOISER
    shared: ClassVar[frozenset[str]] = frozenset()

    @abstractmethod
    def begin(self, state: View) -> None:
        """Draw the noise, make the scheduler and set `timesteps`."""

    @abstractmethod
    def model_inputs(self, state: View, i: int) -> list[Forward]:
        """Return step i's forwards, one a guidance branch, in the oracle's order."""

    @abstractmethod
    def advance(self, state: View, i: int, prediction: Sequence[torch.Tensor]) -> None:
        """Combine the branches and take the scheduler's step."""

    def finish(self, state: View) -> None:
        """Bring `latents` into the form that the next stage reads; nothing to do where they have it."""

    def predict(self, inputs: Sequence[Forward], *, exact: bool = True) -> list[torch.Tensor]:
        """Run the forwards: each by itself, or joined into one where `exact` is False and their shapes allow it."""
        if exact or len(inputs) == 1:
            return [self._forward(each) for each in inputs]
        aligned = self.align(inputs)
        if any(shapes(each) != shapes(aligned[0]) for each in aligned):
            return [self._forward(each) for each in inputs]
        return self._forward_joined(aligned)

    def align(self, inputs: Sequence[Forward]) -> Sequence[Forward]:
        """Bring forwards to one shape, so that they can be rows of one; as they are where the model has no mask."""
        return inputs

    def run(self, state: View) -> None:
        self.begin(state)
        steps = len(state.timesteps)
        for i in range(steps):
            prediction = self.predict(self.model_inputs(state, i), exact=state.exact)
            self.advance(state, i, prediction)
            state.report_step(i + 1, steps)
        self.finish(state)

    def new_scheduler(self) -> Any:
        """Return a scheduler of the model's own kind and configuration, for one request."""
        return type(self.scheduler).from_config(self.scheduler.config)

    def _forward(self, forward: Forward) -> torch.Tensor:
        model = getattr(self, forward.component)
        caching = getattr(model, "cache_context", None)
        with caching(forward.branch, **forward.cache) if caching else nullcontext():
            prediction: torch.Tensor = model(**forward.inputs, return_dict=False)[0]
        return prediction

    def _forward_joined(self, inputs: Sequence[Forward]) -> list[torch.Tensor]:
        """Run the branches as rows of one forward."""
        import torch

        joined = {name: self._join(name, [each.inputs[name] for each in inputs]) for name in inputs[0].inputs}
        first = inputs[0]
        prediction = self._forward(Forward(first.component, "joined", joined, first.cache))
        return list(torch.chunk(prediction, len(inputs)))

    def _join(self, name: str, values: list[Any]) -> Any:
        """Join one input of several branches: rows one after another, or the value they all share."""
        import torch

        if name in self.shared:
            return values[0]
        if isinstance(values[0], list):
            return [entry for value in values for entry in value]
        return torch.cat(values) if isinstance(values[0], torch.Tensor) else values[0]


def shapes(forward: Forward) -> tuple[str, dict[str, tuple[int, ...] | None]]:
    """Return what two forwards must have in common to be rows of one: the model, and the shape of every input."""
    inputs = {name: getattr(value, "shape", None) for name, value in forward.inputs.items()}
    return forward.component, {name: shape if shape is None else tuple(shape) for name, shape in inputs.items()}
