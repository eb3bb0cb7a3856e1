"""One segment of one request: the consecutive stages of one role, cut at each denoising step."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TypeAlias

import torch

from triptych.components import lora
from triptych.components.hollow import running_stage
from triptych.components.interruption import interruptible
from triptych.components.lora import Lora, of_component
from triptych.runtime import streams
from triptych.runtime.meeting import Meeting
from triptych.stages.base import Stage
from triptych.stages.denoising import Denoising, Forward
from triptych.stages.graph import Recipe, live_after, route_of
from triptych.state import State, View, check_no_meta

OnStep = Callable[[str, int, int], None]
"""Called with a stage's name, the steps done and the steps in all; raises `Cancelled` to stop the request."""


@dataclass(frozen=True)
class Turn:
    """A denoising step that waits for its forwards to be run.

    Attributes:
        stage: the stage whose `predict` runs them.
        forwards: one a guidance branch.
        exact: whether each must be run by itself.
        left: the steps from this one to the end of the loop.
    """

    stage: Denoising
    forwards: list[Forward]
    exact: bool
    left: int

    def predict(self) -> list[torch.Tensor]:
        """Run the forwards of this turn alone."""
        with running(self.stage.name):
            return self.stage.predict(self.forwards, exact=self.exact)


Segment: TypeAlias = Generator[Turn, list[torch.Tensor], None]


def run_segment(
    recipe: Recipe,
    stages: Sequence[Stage],
    state: State,
    device: torch.device,
    on_step: OnStep | None,
    check: Callable[[], None] | None = None,
) -> Segment:
    """Run the state's next segment, in place.

    Yields a turn for each denoising step and takes its predictions. Between two turns, segments of other states may run
    in the same thread.

    Args:
        check: called between two parts of an autoencoder's work; what it raises ends the segment.
    """
    _, names = route_of(recipe, state.task)[state.position]
    by_name = {stage.name: stage for stage in stages}
    state.to(device)
    for name in names:
        stage = by_name[name]

        def report(step: int, steps: int, name: str = name) -> None:
            if on_step is not None:
                on_step(name, step, steps)

        loras = lora.read(state.fields.get("lora"))
        view = View(state.fields, name, stage.reads, stage.writes, report)
        began = time.perf_counter()
        if isinstance(stage, Denoising):
            yield from _turns(stage, view, loras)
        else:
            with running(name), interruptible(check):
                stage.adapt(loras)
                stage.run(view)
        streams.wait(device)  # so that each stage is told what it took, and not what the next waited for
        state.timings[name] = time.perf_counter() - began
        check_no_meta(state.fields, stage.writes, name)
        state.keep(live_after(recipe, state.task, name))
    state.position += 1


def run_together(
    recipe: Recipe,
    stages: Sequence[Stage],
    states: Sequence[State],
    device: torch.device,
    checks: Sequence[Callable[[], None]],
    meeting: Meeting,
) -> list[Exception | None]:
    """Run the next segments of several states, in place: all of the same stages, with the same LoRAs.

    Where a stage is row-wise their calls of its models are shared. Returns what went wrong with each.

    Args:
        checks: raise between two stages if a state is not to go on.
    """
    _, names = route_of(recipe, states[0].task)[states[0].position]
    by_name = {stage.name: stage for stage in stages}
    errors: dict[int, Exception] = {}

    def part(k: int, stage: Stage) -> None:
        checks[k]()
        state = states[k]
        state.to(device)
        with running(stage.name), interruptible(checks[k]):
            stage.adapt(lora.read(state.fields.get("lora")))
            stage.run(View(state.fields, stage.name, stage.reads, stage.writes))
        check_no_meta(state.fields, stage.writes, stage.name)
        state.keep(live_after(recipe, state.task, stage.name))

    for name in names:
        stage = by_name[name]
        going = [k for k in range(len(states)) if k not in errors]
        modules = [module for each in sorted(stage.row_wise) if (module := getattr(stage, each)) is not None]
        for k, guest in zip(going, meeting.run([partial(part, k, stage) for k in going], modules)):
            states[k].timings[name] = guest.seconds
            if guest.error is not None:
                errors[k] = guest.error
    for k in range(len(states)):
        states[k].position += k not in errors
    return [errors.get(k) for k in range(len(states))]


def finish(segment: Segment) -> None:
    """Run a segment to its end, each turn by itself."""
    try:
        turn = next(segment)
        while True:
            turn = segment.send(turn.predict())
    except StopIteration:
        return


def _turns(stage: Denoising, view: View, loras: Sequence[Lora]) -> Segment:
    loop = stage.steps(view)
    prediction: list[torch.Tensor] | None = None
    done = 0
    while True:
        with running(stage.name):
            stage.adapt(loras)
            try:
                forwards = next(loop) if prediction is None else loop.send(prediction)
            except StopIteration:
                return
            for each in forwards:
                each.loras = (*of_component(each.component, loras), *each.loras)
        prediction = yield Turn(stage, forwards, view.exact, len(view.timesteps) - done)
        done += 1


@contextmanager
def running(stage: str) -> Iterator[None]:
    """Compute in the name of a stage: without gradients, and so that errors can name it."""
    token = running_stage.set(stage)
    try:
        with torch.no_grad():
            yield
    finally:
        running_stage.reset(token)
