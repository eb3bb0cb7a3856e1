"""The denoising loop, in five steps that a scheduler of requests can drive one at a time."""

from __future__ import annotations

import inspect
from abc import abstractmethod
from collections.abc import Collection, Generator, Hashable, MutableMapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from triptych.components.lora import Lora
from triptych.components.step_cache import Memory, is_cached, remembering
from triptych.roles import RoleType
from triptych.stages.base import Stage
from triptych.stages.likeness import likeness
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
        loras: what the model computes it with; those without the same cannot share it.
        memory: what step caches remember of the request; None to pass them by.
        form: what `Denoising.form` told of it.
    """

    component: str
    branch: str
    inputs: dict[str, Any]
    cache: dict[str, Any] = field(default_factory=dict)
    loras: tuple[Lora, ...] = ()
    memory: Memory | None = None
    form: Hashable = field(default=None, init=False, repr=False)

    def rows(self, shared: Collection[str] = ()) -> int:
        """Return how many rows it has: one for each output."""
        import torch

        return next(
            len(value)
            for name, value in self.inputs.items()
            if name not in shared and isinstance(value, torch.Tensor) and value.ndim > 1
        )

    @cached_property
    def size(self) -> int:
        """Elements of its latents, the first input: what a forward's time grows with."""
        latents = next(iter(self.inputs.values()))
        entries = latents if isinstance(latents, list) else [latents]
        return sum(int(each.numel()) for each in entries)


class Spread(Protocol):
    """Runs a stage's forwards with the help of other processes, each of which holds the same models.

    Attributes:
        apart: whether every forward is run by itself; else only different guidance branches may not share one.
    """

    apart: bool

    def __call__(self, stage: Denoising, forwards: Sequence[Forward]) -> list[torch.Tensor]:
        """Run forwards that do not depend on each other; returns their predictions in order."""


class Denoising(Stage):
    """Base of denoising stages: `run` is `begin`, then `model_inputs`, `predict` and `advance` per step, then `finish`.

    Schedulers are stateful, so `begin` makes one for each request.

    Attributes:
        shared: inputs that are the same for every row of a batch and are passed once.
        ragged: inputs that `align` brings to one shape.
        spread: what runs the forwards where other processes help; None where this one is alone.
    """

    role = RoleType.DENOISER
    shared: ClassVar[frozenset[str]] = frozenset()
    ragged: ClassVar[frozenset[str]] = frozenset()
    spread: Spread | None = None

    @cached_property
    def transformer_dtype(self) -> torch.dtype:
        """The transformer's dtype. To ask the module itself is to walk through its parts: felt at every step."""
        dtype: torch.dtype = self.transformer.dtype
        return dtype

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
        memory = None if state.exact else Memory()
        for i in range(steps):
            forwards = self.model_inputs(state, i)
            for each in forwards:
                each.memory = memory
            prediction = yield forwards
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
        if exact or (self.spread is not None and self.spread.apart):
            return self._compute_all(inputs)
        groups = self.groups(inputs, budget)
        joined = self._compute_all([self._joined([inputs[k] for k in group]) for group in groups])
        predictions: dict[int, torch.Tensor] = {}
        for group, prediction in zip(groups, joined):
            predictions.update(zip(group, self._parted(prediction, [inputs[k] for k in group])))
        return [predictions[k] for k in range(len(inputs))]

    def groups(self, inputs: Sequence[Forward], budget: int | None = None) -> list[list[int]]:
        """Return which forwards share one, by their positions."""
        groups: list[list[int]] = []
        latest: dict[Hashable, list[int]] = {}
        for k, forward in enumerate(inputs):
            form = self.form(forward)
            group = latest.get(form)
            if group is None or (budget is not None and sum(inputs[n].size for n in (*group, k)) > budget):
                group = latest[form] = []
                groups.append(group)
            group.append(k)
        return groups

    def form(self, forward: Forward) -> Hashable:
        """Return what equals only for forwards that can be rows of one: of the same model, with inputs that fit.

        Those of a model with a step cache cannot: what the cache leaves out depends on all rows.
        """
        if forward.form is None:
            apart = id(forward) if is_cached(getattr(self, forward.component)) else None
            branch = None if self.spread is None else forward.branch
            inputs = frozenset((name, self.form_of(name, value)) for name, value in forward.inputs.items())
            forward.form = forward.component, apart, branch, forward.loras, inputs
        return forward.form

    def form_of(self, name: str, value: Any) -> Hashable:
        """Return what equals only for values of one input that can be joined."""
        import torch

        if name in self.ragged:
            return None
        if isinstance(value, torch.Tensor):
            return self._content(value) if name in self.shared else (value.shape[1:], value.dtype)
        if isinstance(value, list):
            # One entry a row: tensors of any length, for the model to join; all else is read off the first row.
            if isinstance(value[0], torch.Tensor):
                return list
            value = value[0]
        alike = likeness(value)
        return (type(value), id(value)) if alike is None else alike

    def _content(self, value: torch.Tensor) -> Hashable:
        """Return what equals only for equal tensors. Read once of each, because to read one is to wait for the device."""
        if (content := self._contents.get(value)) is None:
            content = self._contents[value] = likeness(value)
        return content

    @cached_property
    def _contents(self) -> MutableMapping[torch.Tensor, Hashable]:
        from torch.utils.weak import WeakTensorKeyDictionary

        return WeakTensorKeyDictionary()

    def align(self, inputs: Sequence[Forward]) -> Sequence[Forward]:
        """Bring the `ragged` inputs of forwards to one shape, so that they can be rows of one."""
        return inputs

    def new_scheduler(self) -> Any:
        """Return a scheduler of the model's own kind and configuration, for one request."""
        return type(self.scheduler).from_config(self.scheduler.config)

    def take_step(
        self,
        state: View,
        i: int,
        noise: torch.Tensor,
        *,
        scheduler: Any = None,
        latents: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return the latents, by default the state's, after step i of a scheduler, by default the state's.

        A scheduler that draws noise draws it from the request's generator, so that the seed decides. The oracles leave that
        to torch's global state, which everything else in a process draws from, too.
        """
        scheduler = state.scheduler if scheduler is None else scheduler
        latents = state.latents if latents is None else latents
        drawing = {"generator": state.generator} if self._scheduler_draws else {}
        stepped: torch.Tensor = scheduler.step(noise, state.timesteps[i], latents, **drawing, return_dict=False)[0]
        return stepped

    @cached_property
    def _scheduler_draws(self) -> bool:
        """Whether the model's kind of scheduler takes a generator for what it may draw."""
        return "generator" in inspect.signature(type(self.scheduler).step).parameters

    def call(self, forward: Forward) -> torch.Tensor:
        """Run one forward; returns the prediction, with a row for each output."""
        model = getattr(self, forward.component)
        caching = getattr(model, "cache_context", None)
        with caching(forward.branch, **forward.cache) if caching else nullcontext():
            prediction: torch.Tensor = model(**forward.inputs, return_dict=False)[0]
        return prediction

    def compute(self, forward: Forward) -> torch.Tensor:
        """Run one forward in this process, with its LoRAs, and with what its request's step caches remember."""
        if self.adapters is not None:
            self.adapters.use((forward.component,), forward.loras)
        with remembering(getattr(self, forward.component), forward.memory):
            return self.call(forward)

    def _compute_all(self, forwards: Sequence[Forward]) -> list[torch.Tensor]:
        """Run forwards, each by itself, here or wherever `spread` says."""
        return [self.compute(each) for each in forwards] if self.spread is None else self.spread(self, forwards)

    def _joined(self, inputs: Sequence[Forward]) -> Forward:
        """Return forwards as one that has the rows of all."""
        if len(inputs) == 1:
            return inputs[0]
        inputs = self.align(inputs)
        first = inputs[0]
        joined = {name: self.join(name, [each.inputs[name] for each in inputs]) for name in first.inputs}
        return Forward(first.component, "joined", joined, first.cache, first.loras)

    def _parted(self, prediction: torch.Tensor, inputs: Sequence[Forward]) -> Sequence[torch.Tensor]:
        """Return what a joined forward predicts for each that it was made of."""
        import torch

        if len(inputs) == 1:
            return [prediction]
        return torch.split(prediction, [each.rows(self.shared) for each in inputs])

    def join(self, name: str, values: list[Any]) -> Any:
        """Join one input of several forwards: rows one after another, or the value they all share."""
        import torch

        if name in self.shared:
            return values[0]
        if isinstance(values[0], list):
            return [entry for value in values for entry in value]
        return torch.cat(values) if isinstance(values[0], torch.Tensor) else values[0]
