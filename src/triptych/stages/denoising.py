"""The denoising loop, in five steps that a scheduler of requests can drive one at a time."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Collection, Generator, Sequence
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
        inputs: its keyword arguments, the latents first. Tensors have one row per output, lists one entry.
        cache: further arguments of the model's `cache_context`.
    """

    component: str
    branch: str
    inputs: dict[str, Any]
    cache: dict[str, Any] = field(default_factory=dict)

    def rows(self, shared: Collection[str] = ()) -> int:
        """Return how many rows it has: one for each output."""
        import torch

        return next(
            len(value)
            for name, value in self.inputs.items()
            if name not in shared and isinstance(value, torch.Tensor) and value.ndim > 1
        )

    @property
    def size(self) -> int:
        """Elements of its latents, the first input: what a forward's time grows with."""
        latents = next(iter(self.inputs.values()))
        entries = latents if isinstance(latents, list) else [latents]
        return sum(int(each.numel()) for each in entries)


class Denoising(Stage):
    """Base of denoising stages: `run` is `begin`, then `model_inputs`, `predict` and `advance` per step, then `finish`.

    Schedulers are stateful, so `begin` makes one for each request.

    Attributes:
        shared: inputs that are the same for every row of a batch and are passed once.
        ragged: inputs that `align` brings to one shape.
    """

    role = RoleType.DENOISER
    shared: ClassVar[frozenset[str]] = frozenset()
    ragged: ClassVar[frozenset[str]] = frozenset()

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

    def steps(self, state: View) -> Generator[list[Forward], list[torch.Tensor], None]:
        """Yield each step's forwards and take their predictions: the loop, for whoever runs the model."""
        self.begin(state)
        steps = len(state.timesteps)
        for i in range(steps):
            prediction = yield self.model_inputs(state, i)
            self.advance(state, i, prediction)
            state.report_step(i + 1, steps)
        self.finish(state)

    def run(self, state: View) -> None:
        loop = self.steps(state)
        try:
            inputs = next(loop)
            while True:
                inputs = loop.send(self.predict(inputs, exact=state.exact))
        except StopIteration:
            return

    def predict(
        self, inputs: Sequence[Forward], *, exact: bool = True, budget: int | None = None
    ) -> list[torch.Tensor]:
        """Run forwards, of one request or of several, and return their predictions in order.

        Each runs by itself where `exact`; else those that can be rows of one forward are.

        Args:
            budget: the elements of `Forward.size` that one forward may have; a single one may have more.
        """
        if exact:
            return [self.call(each) for each in inputs]
        predictions: dict[int, torch.Tensor] = {}
        for group in self.groups(inputs, budget):
            joined = self._call_joined([inputs[k] for k in group])
            predictions.update(zip(group, joined))
        return [predictions[k] for k in range(len(inputs))]

    def groups(self, inputs: Sequence[Forward], budget: int | None = None) -> list[list[int]]:
        """Return which forwards share one, by their positions."""
        groups: list[list[int]] = []
        for k, forward in enumerate(inputs):
            for group in groups:
                size = sum(inputs[other].size for other in group) + forward.size
                if (budget is None or size <= budget) and self.can_join(inputs[group[0]], forward):
                    group.append(k)
                    break
            else:
                groups.append([k])
        return groups

    def can_join(self, one: Forward, other: Forward) -> bool:
        """Return whether two forwards can be rows of one: the same model, and inputs that fit together."""
        return (
            one.component == other.component
            and one.inputs.keys() == other.inputs.keys()
            and all(self.fits(name, value, other.inputs[name]) for name, value in one.inputs.items())
        )

    def fits(self, name: str, one: Any, other: Any) -> bool:
        """Return whether two forwards' values of one input can be joined."""
        import torch

        if name in self.ragged:
            return True
        if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
            if name in self.shared:
                return one is other or (one.shape == other.shape and torch.equal(one, other))
            return one.shape[1:] == other.shape[1:] and one.dtype == other.dtype
        if isinstance(one, list) and isinstance(other, list):
            # One entry a row: tensors of any length, for the model to join; all else is read off the first row.
            first, second = one[:1], other[:1]
            return isinstance(first[0], torch.Tensor) is isinstance(second[0], torch.Tensor) and (
                isinstance(first[0], torch.Tensor) or first == second
            )
        return type(one) is type(other) and bool(one == other)

    def align(self, inputs: Sequence[Forward]) -> Sequence[Forward]:
        """Bring the `ragged` inputs of forwards to one shape, so that they can be rows of one."""
        return inputs

    def new_scheduler(self) -> Any:
        """Return a scheduler of the model's own kind and configuration, for one request."""
        return type(self.scheduler).from_config(self.scheduler.config)

    def call(self, forward: Forward) -> torch.Tensor:
        """Run one forward; returns the prediction, with a row for each output."""
        model = getattr(self, forward.component)
        caching = getattr(model, "cache_context", None)
        with caching(forward.branch, **forward.cache) if caching else nullcontext():
            prediction: torch.Tensor = model(**forward.inputs, return_dict=False)[0]
        return prediction

    def _call_joined(self, inputs: Sequence[Forward]) -> Sequence[torch.Tensor]:
        """Run forwards as rows of one."""
        import torch

        if len(inputs) == 1:
            return [self.call(inputs[0])]
        rows = [each.rows(self.shared) for each in inputs]
        inputs = self.align(inputs)
        first = inputs[0]
        joined = {name: self.join(name, [each.inputs[name] for each in inputs]) for name in first.inputs}
        return torch.split(self.call(Forward(first.component, "joined", joined, first.cache)), rows)

    def join(self, name: str, values: list[Any]) -> Any:
        """Join one input of several forwards: rows one after another, or the value they all share."""
        import torch

        if name in self.shared:
            return values[0]
        if isinstance(values[0], list):
            return [entry for value in values for entry in value]
        return torch.cat(values) if isinstance(values[0], torch.Tensor) else values[0]
