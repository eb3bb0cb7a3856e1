"""The decoder's lane: it decodes, and once somebody wants previews it fits what they are made with."""

from __future__ import annotations

import logging
import threading
from collections.abc import Generator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from triptych.errors import Cancelled, WireError
from triptych.runtime import preview
from triptych.runtime.lanes import Lane, Work
from triptych.runtime.model import Model
from triptych.runtime.preview import Projection
from triptych.runtime.segment import finish
from triptych.state import State

log = logging.getLogger(__name__)


@dataclass(eq=False)
class _Fit(Work):
    """The fitting of a projection, which takes its turns between requests."""

    progress: Generator[None, None, Projection] | None = None


class DecoderLane(Lane):
    """A lane that remembers the smallest state it was given until it has fitted a projection to such."""

    def __init__(
        self,
        model: Model,
        name: str,
        *,
        threads: int | None = None,
        exclusive: AbstractContextManager[object] | None = None,
    ) -> None:
        self._sample: State | None = None
        self._projection: Projection | None = None
        self._fitted: threading.Event | None = None  # None until somebody has asked
        self._asking = threading.Lock()
        super().__init__(model, name, threads=threads, exclusive=exclusive)

    def projection(self, timeout: float) -> Projection | None:
        """Return what previews are made with, from the disk or fitted now, between requests.

        None where nothing was decoded yet, the model does not allow it, or it takes longer than `timeout` seconds: then
        it may be there later.
        """
        with self._asking:
            if self._fitted is None and self._projection is None:
                self._projection = preview.recall(self.model.fingerprint)
                if self._projection is None and self._sample is not None:
                    self._fitted = self._fit(self._sample)
        if self._projection is None and self._fitted is not None:
            self._fitted.wait(timeout)
        return self._projection

    def _fit(self, sample: State) -> threading.Event:
        ended = threading.Event()
        fitting = _Fit(sample, lambda _: ended.set())
        fitting.progress = preview.fit(sample, lambda state: finish(self.model.segment(state)))
        self.put(fitting)
        return ended

    def _run(self, work: Work) -> None:
        if not isinstance(work, _Fit):
            if self._projection is None:
                self._remember(work.state)
            super()._run(work)
            return
        try:
            if self._closing:
                raise Cancelled("the lane is closed")
            assert work.progress is not None
            with self.exclusive:
                next(work.progress)
            self.put(work)
        except StopIteration as end:
            self._projection, self._sample = end.value, None
            preview.remember(self.model.fingerprint, end.value)
            work.done(work.state)
        except Exception as error:  # noqa: BLE001 (previews are never worth more than a warning)
            log.warning("%s: there are no previews of this model: %s", self.name, error)
            work.done(error)

    def _remember(self, state: State) -> None:
        """Keep a copy of a state that leads to pictures, if it is the smallest so far."""
        if state.position != len(state.route) - 1 or self._fitted is not None:
            return
        if self._sample is None or _size(state.fields) < _size(self._sample.fields):
            try:
                self._sample = State.from_bytes(bytes(state.to_bytes()))  # not a view of what the sender may want back
            except WireError as error:
                log.warning("%s: a state cannot be kept for previews: %s", self.name, error)


def _size(fields: dict[str, Any]) -> int:
    latents = fields.get("latents")
    return 0 if latents is None or not hasattr(latents, "numel") else int(latents.numel())
