"""Hollow modules: the real class and configuration, no weights, and a clear error when they are run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, NoReturn

from triptych.errors import HollowComponentError

if TYPE_CHECKING:
    import torch

running_stage: ContextVar[str | None] = ContextVar("running_stage", default=None)
"""The stage that is running in this context, for error messages."""

_RUNNERS = ("forward", "encode", "decode", "generate")


def settle(module: torch.nn.Module, device: torch.device, dtype: Callable[[], torch.dtype], **members: object) -> None:
    """Make a module report the device and dtype it works with, whatever its meta parameters say.

    The libraries read a module's device off its first parameter. With half of the parameters left on the meta device
    that is an accident, and a helper that asks for it would quietly make meta tensors. Both are properties of the
    class, so the module gets a subclass of its own, under the same name: transformers looks its classes up by it.

    Args:
        dtype: called when the dtype is asked for.
        members: more members of the subclass.
    """
    cls = type(module)
    namespace: dict[str, object] = {
        "device": property(lambda self: device),
        "dtype": property(lambda self: dtype()),
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
        "__doc__": cls.__doc__,
        **members,
    }
    module.__class__ = type(cls.__name__, (cls,), namespace)


def hollow_out(
    module: torch.nn.Module, component: str, role: str, *, device: torch.device, dtype: Callable[[], torch.dtype]
) -> None:
    """Move a module to the meta device and let everything that would run it raise `HollowComponentError`."""
    raiser = _raiser(component, role, None)
    runners = {name: raiser for name in _RUNNERS if callable(getattr(module, name, None))}
    for path, part in module.named_children():
        guard_part(part, component, role, path)
    module.to("meta")
    settle(module, device, dtype, triptych_hollow=True, **runners)


def guard_part(part: torch.nn.Module, component: str, role: str, path: str) -> None:
    """Move an unused submodule to the meta device and let running it, or a part of it, raise `HollowComponentError`."""
    part.to("meta")
    part.triptych_unused = True  # type: ignore[assignment]
    for name, each in part.named_modules(prefix=path):
        each.register_forward_pre_hook(_raiser(component, role, name))


def used_modules(module: torch.nn.Module, prefix: str = "") -> Iterator[tuple[str, torch.nn.Module]]:
    """List a module and its parts, each under every path it has, except those that were cut away by `guard_part`."""
    if "triptych_unused" in vars(module):
        return
    yield prefix, module
    for name, child in module._modules.items():
        if child is not None:
            yield from used_modules(child, f"{prefix}.{name}" if prefix else name)


@contextmanager
def unused_aside(module: torch.nn.Module) -> Iterator[None]:
    """Take away what `guard_part` cut off, while a library moves all weights that it finds: those are nowhere."""
    cut = [
        (owner, name, part)
        for owner in module.modules()
        for name, part in owner._modules.items()
        if part is not None and "triptych_unused" in vars(part)
    ]
    for owner, name, _ in cut:
        owner._modules[name] = None
    try:
        yield
    finally:
        for owner, name, part in cut:
            owner._modules[name] = part


def is_hollow(module: object) -> bool:
    """Return whether a module was hollowed out: none of its weights are here."""
    return getattr(type(module), "triptych_hollow", False) is True


def _raiser(component: str, role: str, part: str | None) -> Callable[..., Any]:
    def run(*_: object, **__: object) -> NoReturn:
        raise HollowComponentError(component, role, running_stage.get(), part)

    return run
