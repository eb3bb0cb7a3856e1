"""Pools: how many replicas of which roles a cluster is to have."""

from __future__ import annotations

import re
from dataclasses import dataclass

from triptych.errors import UsageError
from triptych.roles import RoleType, parse_roles, role_name


@dataclass(frozen=True)
class Pool:
    """Replicas of the same roles.

    Attributes:
        roles: what each of them runs.
        least, most: how many there may be; equal where the number is fixed.
    """

    roles: frozenset[RoleType]
    least: int
    most: int

    @property
    def name(self) -> str:
        return role_name(self.roles)


def parse_pools(text: str) -> list[Pool]:
    """Return the pools that `encoder=1,denoiser=1..4,decoder=1` names; `+` joins roles that share a replica.

    Raises:
        UsageError: it names none, one twice, or no number of replicas.
    """
    pools: dict[str, Pool] = {}
    for part in filter(None, (each.strip() for each in text.split(","))):
        name, _, count = part.partition("=")
        match = re.fullmatch(r"\s*(\d+)(?:\.\.(\d+))?\s*", count)
        if match is None:
            raise UsageError(f"pools: {part!r}: role=number or role=least..most is accepted, as in denoiser=1..4")
        least, most = int(match[1]), int(match[2] or match[1])
        if most < least or most == 0:
            raise UsageError(f"pools: {part!r}: the numbers must not fall, and the last must be at least 1")
        roles = parse_roles(name.strip())
        if not roles:
            raise UsageError(f"pools: {part!r}: a server runs nothing; name encoder, denoiser, decoder or monolithic")
        pool = Pool(roles, least, most)
        if pool.name in pools:
            raise UsageError(f"pools: {pool.name!r} is named twice")
        pools[pool.name] = pool
    if not pools:
        raise UsageError("pools: name at least one, as in encoder=1,denoiser=2,decoder=1")
    return list(pools.values())
