"""Hollow modules: the real class and configuration, no weights, and a clear error when they are run."""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from typing import TYPE_CHECKING, NoReturn

from triptych.errors import HollowComponentError

if TYPE_CHECKING:
    import torch

running_stage: ContextVar[str | None] = ContextVar("running_stage", default=None)
"""The stage that is running in this context, for error messages."""

_RUNNERS = ("forward", "encode", "decode", "generate")


def settle(module: torch.nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """Make a module report the device and dtype it works with, whatever its meta parameters say.

    The libraries read a module's device off its first parameter. With half of the parameters left on the meta device
    that is an accident, and a helper that asks for it would quietly make meta tensors.
    """
    cls = type(module)
    namespace = {
        "device": property(lambda self: device),
        "dtype": property(lambda self: dtype),
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
        "__doc__": cls.__doc__,
    }
    module.__class__ = type(cls.__name__, (cls,), namespace)


def hollow_out(module: torch.nn.Module, component: str, role: str) -> None:
    """Move a module to the meta device and let everything that would run it raise `HollowComponentError`."""
    module.to("meta")
    raiser = _raiser(component, role, None)
    for name in _RUNNERS:
        if callable(getattr(module, name, None)):
            setattr(module, name, raiser)
    for name, part in module.named_children():
        part.register_forward_pre_hook(_raiser(component, role, name))


def guard_part(part: torch.nn.Module, component: str, role: str, path: str) -> None:
    """Move an unused submodule to the meta device and let running it raise `HollowComponentError`."""
    part.to("meta")
    part.register_forward_pre_hook(_raiser(component, role, path))
    part.triptych_unused = True  # type: ignore[assignment]


def is_unused(part: torch.nn.Module) -> bool:
    """Return whether a submodule was cut away by `guard_part`."""
    return "triptych_unused" in vars(part)


def is_hollow(module: object) -> bool:
    """Return whether a module was hollowed out: none of its weights are here."""
    import torch

    return isinstance(module, torch.nn.Module) and "forward" in vars(module)


def _raiser(component: str, role: str, part: str | None) -> Callable[..., NoReturn]:
    def run(*_: object, **__: object) -> NoReturn:
        raise HollowComponentError(component, role, running_stage.get(), part)

    return run
