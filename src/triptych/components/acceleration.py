"""What makes a role's models faster or smaller: plain values, so that they travel to other processes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, TypeAlias

from triptych.errors import ParameterError, UnknownParameterError, UsageError, did_you_mean
from triptych.roles import WORKERS, RoleType

CACHES = {"first_block": 0.05, "taylorseer": 5.0}
"""The step caches, and what follows the colon where nothing does: diffusers' own defaults."""
QUANTIZATIONS = ("fp8", "int8")
OFFLOADS = ("group",)


@dataclass(frozen=True)
class Acceleration:
    """How the models of one role are sped up or made to fit. All of it is off unless asked for.

    Attributes:
        attention: the kernel of attention, by diffusers' name (`flash`, `sage`, `_native_cudnn`, ...).
        compile: compile the model's repeated blocks, or all of it where it has none, with `torch.compile`.
        offload: `group` keeps the weights in the host's memory and brings each layer in when it is its turn.
        cache: a step cache, which leaves out work whose result would be nearly the last step's: `first_block:SHARE`,
            the change of the first block's effect up to which the other blocks are left out; `taylorseer:STEPS`, the
            steps from one full forward to the next.
        quantization: how the weights are kept: `fp8` as 8-bit floats that are cast up while their layer runs; `int8` as
            8-bit integers with a scale for each row, by torchao.
        tiling: the autoencoder works on one tile of a large picture at a time.
        ulysses: ranks of one replica that share a sequence by attention heads.
        ring: ranks of one replica that share a sequence by passing keys and values around.
        cfg_parallel: two ranks of one replica, one for each guidance branch.

    Raises:
        ParameterError: a value is not accepted.
        UsageError: two of them exclude each other.
    """

    attention: str | None = None
    compile: bool = False
    offload: str | None = None
    cache: str | None = None
    quantization: str | None = None
    tiling: bool = False
    ulysses: int = 1
    ring: int = 1
    cfg_parallel: bool = False

    def __post_init__(self) -> None:
        for name in ("compile", "tiling", "cfg_parallel"):
            if not isinstance(getattr(self, name), bool):
                raise ParameterError(name, getattr(self, name), "True or False is accepted")
        for name in ("attention", "offload", "cache", "quantization"):
            if not isinstance(getattr(self, name), (str, type(None))):
                raise ParameterError(name, getattr(self, name), "a text or None is accepted")
        for name, known in (("offload", OFFLOADS), ("quantization", QUANTIZATIONS)):
            value = getattr(self, name)
            if value is not None and value not in known:
                raise ParameterError(name, value, f"{' or '.join(known)} is accepted{did_you_mean(value, known)}")
        if self.cache is not None:
            parse_cache(self.cache)
        if self.quantization == "int8" and self.offload is not None:
            raise UsageError(f"quantization='int8' with offload={self.offload!r}: choose one of them, or fp8")
        for name in ("ulysses", "ring"):
            if type(getattr(self, name)) is not int or getattr(self, name) < 1:
                raise ParameterError(name, getattr(self, name), "1 or more ranks are accepted, a whole number")
        if self.cache is not None and self.ranks > 1:
            raise UsageError(
                f"cache={self.cache!r} with {self.ranks} ranks: each would leave out other steps; choose one of them"
            )

    def __bool__(self) -> bool:
        return self != Acceleration()

    @property
    def ranks(self) -> int:
        """How many processes one replica takes."""
        return self.ulysses * self.ring * (2 if self.cfg_parallel else 1)

    @property
    def inexact(self) -> tuple[str, ...]:
        """What is on that changes numbers and cannot be left out for one request.

        A cache is not among them: an exact request passes it by. Nor are another attention kernel and tiles: there
        `exact` means what diffusers' pipeline gives with the same switch.
        """
        shared = tuple(name for name in ("ulysses", "ring") if getattr(self, name) > 1)
        return (*(name for name in ("compile", "quantization") if getattr(self, name)), *shared)

    @property
    def numbers(self) -> Acceleration:
        """What of it changes numbers, and so has to be the same in all replicas of a service."""
        return replace(self, offload=None, ulysses=1, ring=1, cfg_parallel=False)

    def __str__(self) -> str:
        """Return what is on, as in `compile, cache=first_block`."""
        defaults = Acceleration()
        told = {each.name: getattr(self, each.name) for each in fields(self)}
        changed = {name: value for name, value in told.items() if value != getattr(defaults, name)}
        return ", ".join(name if value is True else f"{name}={value}" for name, value in changed.items())


AccelerationSpec: TypeAlias = (
    Acceleration | Mapping[RoleType, Acceleration] | Mapping[str, Acceleration | Mapping[str, Any]] | None
)
"""One role's, where there is only one; or each role's, its name in text and its values in a mapping if need be."""


def parse_acceleration(spec: AccelerationSpec, roles: Iterable[RoleType] = WORKERS) -> dict[RoleType, Acceleration]:
    """Return what each role is to be accelerated by; roles without any are left out.

    Args:
        roles: those that an `Acceleration` by itself may be for.

    Raises:
        UsageError: a role or a value does not exist, or it does not say which role is meant.
    """
    if spec is None:
        return {}
    if isinstance(spec, Acceleration):
        if len(only := list(roles)) != 1:
            raise UsageError("acceleration: say for which role, as in {'denoiser': Acceleration(...)}")
        spec = {only[0]: spec}
    if not isinstance(spec, Mapping):
        raise ParameterError("acceleration", spec, "an Acceleration or a mapping is accepted, as {'denoiser': {...}}")
    parsed: dict[RoleType, Acceleration] = {}
    for name, each in spec.items():
        role = RoleType(name)
        if role not in WORKERS:
            accepted = ", ".join(worker.value for worker in WORKERS)
            raise ParameterError("acceleration", role.value, f"one of the roles {accepted} is accepted")
        if not isinstance(each, (Acceleration, Mapping)):
            raise ParameterError(
                "acceleration", {role.value: each}, "an Acceleration or a mapping is accepted for a role"
            )
        if not isinstance(each, Acceleration):
            known = [field.name for field in fields(Acceleration)]
            for key in each:
                if key not in known:
                    raise UnknownParameterError(key, "Acceleration", known)
            each = Acceleration(**each)
        if each:
            parsed[role] = each
    return parsed


def to_plain(accelerations: Mapping[RoleType, Acceleration]) -> dict[str, dict[str, Any]]:
    """Return accelerations as `parse_acceleration` takes them, of types that JSON has."""
    return {role.value: asdict(each) for role, each in accelerations.items()}


def parse_cache(text: str) -> tuple[str, float]:
    """Return the name of a step cache and the number after the colon, or its default.

    Raises:
        ParameterError: there is no such cache, or the number makes no sense for it.
    """
    name, colon, number = text.partition(":")
    if name not in CACHES:
        accepted = "first_block, first_block:SHARE, taylorseer or taylorseer:STEPS is accepted"
        raise ParameterError("cache", text, f"{accepted}{did_you_mean(name, CACHES)}")
    try:
        value = float(number) if colon else CACHES[name]
    except ValueError:
        value = -1.0
    if name == "first_block" and not 0 < value < 1:
        raise ParameterError("cache", text, "a share between 0 and 1 is accepted, as in first_block:0.05")
    if name == "taylorseer" and not (value >= 2 and value.is_integer()):
        raise ParameterError("cache", text, "a whole number of steps from 2 on is accepted, as in taylorseer:5")
    return name, value
