"""Parts of requests' work whose calls of models others may share."""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar, copy_context
from typing import Any

import torch

from triptych.runtime.rows import Call

_guest: ContextVar[Guest | None] = ContextVar("_guest", default=None)


def is_guest() -> bool:
    """Return whether what runs here is a part of a meeting, whose calls others may share."""
    return _guest.get() is not None


def as_exception(error: BaseException) -> Exception:
    """Return an error as one that is a request's end and no more: what a library written in Rust panics with is none."""
    return error if isinstance(error, Exception) else RuntimeError(f"{type(error).__name__}: {error}")


class Guest:
    """A part of one request's work, in a thread that is awake only from `resume` to its next call, or its end.

    Attributes:
        call: what it waits for; None where it has ended.
        ended: whether it has.
        seconds: what it took, its share of shared calls included.
    """

    def __init__(self, part: Callable[[], None], threads: ThreadPoolExecutor) -> None:
        self.call: Call | None = None
        self.ended = False
        self.seconds = 0.0
        self._go, self._back = threading.Lock(), threading.Lock()
        self._go.acquire()
        self._back.acquire()
        self._future: Future[None] = threads.submit(copy_context().run, self._live, part)

    def resume(self) -> None:
        """Let it go on; returns when it waits for a call or has ended."""
        began = time.perf_counter()
        self._go.release()
        self._back.acquire()
        self.seconds += time.perf_counter() - began

    def dismiss(self, error: BaseException) -> None:
        """Let it end: whatever it calls fails."""
        while not self.ended:
            if self.call is not None:
                self.call.fail(error)
            self.resume()

    def ask(self, call: Call) -> Any:
        """Wait, in its thread, for a call to be made; returns what came back."""
        self.call = call
        self._back.release()
        self._go.acquire()
        self.call = None
        assert call.answer is not None
        return call.answer()

    @property
    def error(self) -> Exception | None:
        """What ended it early."""
        error = self._future.exception()
        return None if error is None else as_exception(error)

    def _live(self, part: Callable[[], None]) -> None:
        _guest.set(self)
        self._go.acquire()
        try:
            part()
        finally:
            self.ended = True
            self._back.release()


@contextmanager
def calls_stop(modules: Iterable[torch.nn.Module]) -> Iterator[None]:
    """Let guests stop where they call one of the modules: an autoencoder's decoder, any other's forward.

    Calls from elsewhere pass.
    """
    stopped = []
    for module in modules:
        name = "decode" if callable(getattr(module, "decode", None)) else "forward"
        stopped.append((module, name, vars(module).get(name)))
        setattr(module, name, _stop(getattr(module, name), (id(module), name)))
    try:
        yield
    finally:
        for module, name, before in stopped:
            if before is None:
                delattr(module, name)
            else:
                setattr(module, name, before)


def _stop(function: Callable[..., Any], target: object) -> Callable[..., Any]:
    @functools.wraps(function)
    def waiting(*args: Any, **kwargs: Any) -> Any:
        guest = _guest.get()
        if guest is None:
            return function(*args, **kwargs)
        context = copy_context()
        context.run(_guest.set, None)  # what it calls in turn does not stop
        return guest.ask(Call(target, function, args, kwargs, context))

    return waiting
