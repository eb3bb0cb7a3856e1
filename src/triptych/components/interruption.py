"""Stopping a model between two parts of its work: tiles of a picture, pieces of a video, tokens of a text."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch

_check: ContextVar[Callable[[], None] | None] = ContextVar("check", default=None)

_PARTS = ("encoder", "decoder")
"""What an autoencoder runs once for each tile or piece."""
_METHODS = ("encode", "decode")
"""What an autoencoder is called by."""


@contextmanager
def interruptible(check: Callable[[], None] | None) -> Iterator[None]:
    """Call `check` before each part of a model's work; what it raises ends the work."""
    token = _check.set(check)
    try:
        yield
    finally:
        _check.reset(token)


def watch(module: Any) -> None:
    """Let a module be stopped between the parts of its work, if it is an autoencoder or writes tokens."""
    parts = []
    if callable(getattr(module, "decode", None)):
        parts = [getattr(module, name, None) for name in _PARTS]
        if callable(clear := getattr(module, "clear_cache", None)):
            for name in _METHODS:
                setattr(module, name, _clearing(getattr(module, name), clear))
    elif callable(getattr(module, "generate", None)):
        parts = [module]
    for part in parts:
        if isinstance(part, torch.nn.Module):
            compiled = part._compiled_call_impl is not None
            hook: Any = torch.compiler.disable(_look) if compiled else _look  # type: ignore[no-untyped-call]
            part.register_forward_pre_hook(hook)


def _clearing(method: Callable[..., Any], clear: Callable[[], object]) -> Callable[..., Any]:
    """Let a method of an autoencoder leave nothing behind where it is stopped, or fails.

    Those of videos keep the features of a piece for the next, gigabytes of them, and clear that only at their end.
    """

    @functools.wraps(method)
    def run(*args: Any, **kwargs: Any) -> Any:
        try:
            return method(*args, **kwargs)
        except BaseException:
            clear()
            raise

    return run


def _look(*_: object) -> None:
    if (check := _check.get()) is not None:
        check()
