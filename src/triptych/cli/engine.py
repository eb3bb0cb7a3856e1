"""Which engine the options of `triptych serve` ask for, and what they may not ask for together."""

from __future__ import annotations

from triptych.cli.options import by_role
from triptych.errors import UsageError
from triptych.roles import WORKERS, RoleType


def choose_engine(
    engine: str | None,
    devices: dict[str, str | None],
    slots: str | None,
    pools: str | None,
    address: str | None,
    disagg_role: str | None,
    gpus: dict[str, float | None],
    transport: str | None = None,
) -> bool:
    """Return whether the options ask for Ray.

    Raises:
        UsageError: they contradict each other.
    """
    if engine not in (None, "local", "ray"):
        raise UsageError(f"--engine {engine!r}: local or ray is accepted")
    of_ray: dict[str, object] = {
        "--pools": pools,
        "--address": address,
        "--disagg-role": disagg_role,
        **{f"--{role}-gpus": count for role, count in gpus.items()},
        "--transport": transport,
    }
    of_local = {**{f"--{role}": device for role, device in devices.items()}, "--slots": slots}
    ray = next((option for option, value in of_ray.items() if value is not None), None)
    local = next((option for option, value in of_local.items() if value is not None), None)
    if engine == "local" and ray:
        raise UsageError(
            f"{ray} needs Ray, and --engine local was asked for; on this process roles get devices: --denoiser cuda:0"
        )
    if (engine == "ray" or ray) and local:
        asked = "--engine ray" if engine == "ray" else ray
        raise UsageError(
            f"{local} is for --engine local, and {asked} asks for Ray, which places replicas itself: use --pools"
        )
    return engine == "ray" or ray is not None


def threads_of(text: str | None, *, on_ray: bool) -> int | dict[RoleType, int] | None:
    """Return what `--threads` asks for: a number for every process on Ray, one for each role's lane in this process.

    Raises:
        UsageError: it is neither.
    """
    if text is None:
        return None
    if text.strip().isdecimal() and int(text) > 0:
        return int(text) if on_ray else dict.fromkeys(WORKERS, int(text))
    if on_ray:
        raise UsageError(
            f"--threads {text!r}: on Ray, one number of at least 1 is accepted: the threads of every process"
        )
    return by_role("--threads", text)
