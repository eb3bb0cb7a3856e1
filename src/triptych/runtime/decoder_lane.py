"""The decoder's lane: it decodes, and learns from that what previews are made with."""

from __future__ import annotations

import logging
import threading
from collections.abc import Generator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch

from triptych.errors import Cancelled
from triptych.runtime import streams
from triptych.runtime.crew import Crew
from triptych.runtime.lanes import Lane, Work
from triptych.runtime.model import Model
from triptych.runtime.palette import ENOUGH, Palette
from triptych.runtime.preview import Projection
from triptych.runtime.segment import finish
from triptych.runtime.turns import Turns
from triptych.state import State

log = logging.getLogger(__name__)


@dataclass(eq=False)
class _Fit(Work):
    """The fitting of a projection to random latents, which takes its turns between requests."""

    progress: Generator[None, None, None] | None = None


class DecoderLane(Lane):
    """A lane that keeps a palette, and remembers the smallest state it was given until that has something to go by."""

    def __init__(
        self,
        model: Model,
        name: str,
        *,
        threads: int | None = None,
        exclusive: AbstractContextManager[object] | None = None,
        rows: int | None = None,
        turns: Turns | None = None,
        crew: Crew | None = None,
    ) -> None:
        self._sample: State | None = None
        self._palette: Palette | None = Palette(model.fingerprint)  # None where the model's colours cannot be learned
        self._latents: dict[Work, torch.Tensor] = {}  # of what is being decoded
        self._fitted: threading.Event | None = None  # None until somebody has asked
        self._asking = threading.Lock()
        super().__init__(model, name, threads=threads, exclusive=exclusive, rows=rows, turns=turns, crew=crew)

    def projection(self, timeout: float) -> Projection | None:
        """Return what previews are made with, as good as it is now; asked for the first time, it is fitted.

        None where nothing was decoded yet, the model does not allow it, or it takes longer than `timeout` seconds: then
        it may be there later.
        """
        palette = self._palette
        with self._asking:
            if palette is not None and palette.projection is None and self._fitted is None and self._sample is not None:
                self._fitted = self._fit(palette, self._sample)
        if palette is not None and palette.projection is None and self._fitted is not None:
            self._fitted.wait(timeout)
        return None if palette is None else palette.projection

    def _fit(self, palette: Palette, sample: State) -> threading.Event:
        ended = threading.Event()
        fitting = _Fit(sample, lambda _: ended.set())
        fitting.progress = palette.draw(sample, lambda state: finish(self.model.segment(state)))
        self.put(fitting)
        return ended

    def _run(self, work: Work) -> None:
        if not isinstance(work, _Fit):
            self._remember(work)
            super()._run(work)
            return
        try:
            if self._closing:
                raise Cancelled("the lane is closed")
            assert work.progress is not None
            with self._exclusively():
                next(work.progress)
            self.put(work)
        except StopIteration:
            self._sample = None
            work.done(work.state)
        except Exception as error:  # noqa: BLE001 (previews are never worth more than a warning)
            if streams.lacks_memory(error):  # others may have it for now: whoever asks next has it tried again
                log.warning("%s: there is no memory now to learn what previews look like: %s", self.name, error)
                self._fitted = None
            else:
                log.warning("%s: there are no previews of this model: %s", self.name, error)
                self._palette = self._sample = None
            work.done(error)

    def _run_together(self, works: list[Work]) -> None:
        for work in works:
            self._remember(work)
        super()._run_together(works)

    def _settle(self, work: Work, outcome: State | Exception) -> None:
        latents = self._latents.pop(work, None)
        super()._settle(work, outcome)
        if latents is not None and self._palette is not None and isinstance(outcome, State):
            try:  # now that whoever waits for the picture has it
                self._palette.see(latents, outcome.fields)
            except Exception as error:  # noqa: BLE001 (previews are never worth more than a line in the log)
                log.debug("%s: previews learn nothing of a picture: %s", self.name, error)

    def _kind(self, work: Work) -> object | None:
        return None if isinstance(work, _Fit) else super()._kind(work)

    def _remember(self, work: Work) -> None:
        """Keep the latents of a state that leads to pictures, and a copy of it if it is the smallest so far."""
        palette, state = self._palette, work.state
        if palette is None or state.position != len(state.route) - 1:
            return
        latents = state.fields.get("latents")
        if palette.seen < ENOUGH and isinstance(latents, torch.Tensor):
            self._latents[work] = latents
        if palette.projection is not None or self._fitted is not None:
            return
        if self._sample is None or _size(state.fields) < _size(self._sample.fields):
            try:
                self._sample = State.from_bytes(bytes(state.to_bytes()))  # not a view of what the sender may want back
            except Exception as error:  # noqa: BLE001 (previews are never worth more than a warning)
                log.warning("%s: a state cannot be kept for previews: %s", self.name, error)


def _size(fields: dict[str, Any]) -> int:
    latents = fields.get("latents")
    return 0 if latents is None or not hasattr(latents, "numel") else int(latents.numel())
