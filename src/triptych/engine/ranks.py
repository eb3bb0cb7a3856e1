"""Replicas of several ranks on Ray: where there is room for them, and how their first process starts the others."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from triptych.components.acceleration import Acceleration
from triptych.engine.pools import Pool
from triptych.errors import ParameterError, UsageError
from triptych.pipelines.base import Family
from triptych.pipelines.registry import open_family
from triptych.roles import RoleType, parse_roles
from triptych.runtime.ranks import Ranks, check_ranks, denoisers, of_one_rank, visible_gpus

log = logging.getLogger(__name__)

Accelerations = Mapping[RoleType, Acceleration]

_CARD = 10_000
"""The units that Ray counts a GPU in."""


def gpus_of(roles: Collection[RoleType], asked: Mapping[RoleType, float], accelerations: Accelerations) -> float:
    """Return how many GPUs to reserve for a replica: what is asked for, or one for each rank if the cluster has any.

    Raises:
        ParameterError: there are more ranks than that, or a number that is no share of one GPU and no number of whole ones.
        UsageError: no machine of the cluster has so many, and the ranks of a replica are on one.
    """
    ranks, most = ranks_of(roles, accelerations), max(gpus_of_machines(), default=0)
    given = [asked[role] for role in roles if role in asked]
    for each in given:
        if not 0 <= each < math.inf or 1 < each != int(each):
            raise ParameterError("gpus", f"{each:g}", "a share of one GPU, or a whole number of them, is accepted")
    wanted = max(given, default=float(ranks if most else 0))
    if 0 < wanted < ranks > 1:
        raise ParameterError("gpus", f"{wanted:g}", f"{ranks} ranks need one each: {ranks} are accepted, or 0 for none")
    if ranks > 1 and most < wanted:
        raise UsageError(
            f"a replica of {ranks} ranks needs {wanted:g} GPUs on one machine, and the cluster's largest has {most}"
        )
    return wanted


def gpus_of_machines() -> list[int]:
    """Return how many GPUs each machine of the cluster has."""
    import ray

    nodes: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    return [int(node["Resources"].get("GPU", 0)) for node in nodes if node["Alive"]]


def check_machine(gpus: float) -> None:
    """Check that this machine has so many GPUs, for a replica that is to be here.

    Raises:
        UsageError: it has fewer; Ray would let the replica wait for good.
    """
    import ray

    mine = ray.get_runtime_context().get_node_id()
    nodes: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    there = next((node["Resources"].get("GPU", 0) for node in nodes if node["NodeID"] == mine), 0)
    if gpus > there:
        raise UsageError(f"the replica is to reserve {gpus:g} GPUs, and Ray knows of {there:g} on this machine")


def placed(
    roles: Collection[RoleType], asked: Mapping[RoleType, float], options: Mapping[str, Any]
) -> tuple[float, dict[str, Any]]:
    """Return the GPUs to reserve for a replica, and what it is to load: on its CPU, where none was asked for.

    Raises:
        ParameterError, UsageError: see `gpus_of`.
    """
    gpus = gpus_of(roles, asked, options["acceleration"])
    none = not gpus and any(asked.get(role) == 0 for role in roles)
    return gpus, {**options, **({"device": "cpu"} if none else {})}  # Ray hides no GPU from what reserves none


def check_room(
    pools: Iterable[Pool], asked: Mapping[RoleType, float], accelerations: Accelerations, *, growing: bool
) -> None:
    """Check that there are GPUs for all replicas that pools begin with: Ray lets those that lack one wait for good.

    Args:
        growing: whether machines may still join the cluster; then it only warns.

    Raises:
        UsageError: there are fewer, or none that has room for some replica's share.
    """
    machines = gpus_of_machines()
    each = {pool: gpus_of(pool.roles, asked, accelerations) for pool in pools}
    if _fit([gpus for pool, gpus in each.items() for _ in range(pool.least)], machines):
        return
    needed = {pool.name: pool.least * gpus for pool, gpus in each.items()}
    total, there = sum(needed.values()), sum(machines)
    crowded = ", but not for each on one card or machine" if total <= there else ""
    told = (
        f"the replicas reserve {total:g} GPUs ({', '.join(f'{name}: {n:g}' for name, n in needed.items())}), "
        f"and there are {there}{crowded}: let them share (--encoder-gpus 0.25, or encoder+decoder=1 in --pools), "
        "start fewer, or have all roles in one process (--engine local)"
    )
    if not growing:
        raise UsageError(told)
    log.warning("%s; those that lack one wait until a machine joins", told)


def _fit(replicas: Iterable[float], machines: Iterable[int]) -> bool:
    """Return whether replicas find their GPUs: a share on one card, several cards on one machine.

    The largest first, as they are started. Ray gives a share the fullest card with room for it, this the first one: that is
    all the same for the three sizes that there may be, one a role.
    """
    left = [[_CARD] * cards for cards in sorted(machines)]
    for units in sorted((round(gpus * _CARD) for gpus in replicas if gpus), reverse=True):
        many, share = (units // _CARD, _CARD) if units > _CARD else (1, units)
        for cards in left:
            room = [number for number, free in enumerate(cards) if free >= share][:many]
            if len(room) == many:
                break
        else:
            return False
        for number in room:
            cards[number] -= share
    return True


def ranks_of(roles: Collection[RoleType], accelerations: Accelerations) -> int:
    """Return how many processes a replica of these roles takes."""
    asked = accelerations.get(RoleType.DENOISER) if RoleType.DENOISER in roles else None
    return 1 if asked is None else asked.ranks


def check_place(
    family: Family, tasks: Collection[str], asked: Mapping[RoleType, float], accelerations: Accelerations
) -> None:
    """Check that a denoiser of several ranks, if that is asked for, can run on what this cluster has.

    Raises:
        ParameterError, UsageError: it cannot.
    """
    roles = {RoleType.DENOISER}
    if ranks_of(roles, accelerations) > 1:
        on_gpu = gpus_of(roles, asked, accelerations) > 0
        check_ranks(family, denoisers(family, tasks), accelerations[RoleType.DENOISER], on_gpu=on_gpu)


def with_ranks(
    source: str, roles: str, options: Mapping[str, Any], threads: int | None
) -> tuple[Ranks | None, dict[str, Any]]:
    """Start the other ranks of a replica, and return them, if it has any, with what this process is to load.

    The process ends when one of them is lost: Ray starts the replica anew, as a whole.

    Raises:
        UsageError: this process sees fewer GPUs than there are ranks, or they cannot do what is asked.
    """
    accelerations: dict[RoleType, Acceleration] = dict(options.get("acceleration") or {})
    asked = accelerations.get(RoleType.DENOISER, Acceleration())
    alone = {**accelerations, RoleType.DENOISER: of_one_rank(asked)}
    mine = {**options, "acceleration": {role: each for role, each in alone.items() if each}}
    if ranks_of(parse_roles(roles), accelerations) == 1:
        return None, mine
    gpus = None if options.get("device") == "cpu" else visible_gpus(asked.ranks)
    family = open_family(source, revision=options.get("revision"), variant=options.get("variant"))
    names = denoisers(family, family.select_tasks(options.get("tasks")))
    check_ranks(family, names, asked, on_gpu=gpus is not None)
    return Ranks(source, options, asked, gpus=gpus, threads=threads, on_lost=_end), mine


def _end(reason: str) -> None:
    """End this process at once: it may be waiting for the lost rank in the middle of a forward."""
    log.critical("this replica ends, and is started anew: %s", reason)
    os._exit(1)
