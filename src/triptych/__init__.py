"""Triptych serves diffusion models whole, or split into an encoder, a denoiser and a decoder, with the same pixels.

Nothing heavy is imported until it is used: `import triptych` costs a few milliseconds.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from triptych.components.acceleration import Acceleration
    from triptych.planning.plan import Plan, plan
    from triptych.request import Request
    from triptych.result import Result
    from triptych.roles import RoleType
    from triptych.runtime.model import Model, load
    from triptych.state import State

__version__ = "0.1.0"
__all__ = ["Acceleration", "Model", "Plan", "Request", "Result", "RoleType", "State", "load", "plan"]

_HOME = {
    "Acceleration": "components.acceleration",
    "Model": "runtime.model",
    "load": "runtime.model",
    "Plan": "planning.plan",
    "plan": "planning.plan",
    "Request": "request",
    "Result": "result",
    "RoleType": "roles",
    "State": "state",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
