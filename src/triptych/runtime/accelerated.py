"""What of a model is accelerated: checked before its weights are read, switched on once they are there."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch

from triptych.components.acceleration import Acceleration
from triptych.components.blueprint import component_class, draw_hollow, has_weights
from triptych.components.dtypes import resolve_dtype
from triptych.components.need import Need
from triptych.components.repository import Repository
from triptych.components.switches import accelerate
from triptych.errors import ParameterError, UsageError
from triptych.pipelines.base import Family
from triptych.roles import WORKERS, RoleType, get_module_role
from triptych.runtime.ranks import check_ranks

log = logging.getLogger(__name__)


class Accelerated:
    """The accelerations of a model's roles, and the components that each is for.

    A component is accelerated as its own role says (`get_module_role`), in whatever process it is loaded: a picture that
    is encoded by an autoencoder in tiles is so whether the encoder is a process of its own or not.

    Args:
        needs: what this process loads; a server rehearses what all roles load.
        roles: the roles of this process; none for a server.
        device: where this process computes.
        dtypes: as `parse_dtype` returns them.

    Raises:
        UsageError: the model or the machine cannot be accelerated like that.
    """

    def __init__(
        self,
        family: Family,
        roles: Collection[RoleType],
        needs: Mapping[str, Need],
        asked: Mapping[RoleType, Acceleration],
        tasks: Collection[str],
        device: torch.device,
        dtypes: Mapping[str, str],
    ) -> None:
        self.asked = dict(asked)
        self._device = device
        if not asked:
            return
        mine = needs if roles else family.needs(WORKERS, tasks)
        repository = family.repository
        for role, names in self._components(mine, roles, family).items():
            hollow = {
                name: draw_hollow(repository, name, dtype=_dtype(repository, name, dtypes), device=device, role="none")
                for name in names
            }
            _check_ranks(family, role, names, self.asked[role], whole=not roles)
            accelerate(role, hollow, self.asked[role], device if roles else None, must=role in roles or not roles)
        self._roles = frozenset(roles)
        self._names = self._components(needs, roles, family) if roles else {}

    def is_offloaded(self, name: str) -> bool:
        """Return whether a component's weights stay in the host's memory."""
        role = get_module_role(name)
        return role in self.asked and self.asked[role].offload is not None

    def switch_on(self, components: Mapping[str, Any]) -> dict[str, int]:
        """Accelerate the loaded components; returns the bytes of weights that those hold now which hold others."""
        sizes: dict[str, int] = {}
        for role, names in self._names.items() if self.asked else ():
            modules = {name: components[name] for name in names}
            changed = accelerate(role, modules, self.asked[role], self._device, must=role in self._roles)
            for switch, what in changed.items():
                log.info("role %s: %s of %s", role, switch, ", ".join(what))
            sizes |= {name: _bytes_of(components[name]) for name in changed.get("quantization", ())}
        return sizes

    def check(self, fields: Mapping[str, Any], roles: Collection[RoleType] | None = None) -> None:
        """Check that a request, its LoRAs settled, asks for nothing that the accelerations rule out.

        Args:
            roles: those that are asked; None for all of them.

        Raises:
            ParameterError: it is to be exact, and a role computes something else than diffusers' pipeline does; or it
                brings a LoRA, and the weights that it changes are not where or what they would have to be.
        """
        for role, each in self.asked.items():
            if roles is not None and role not in roles:
                continue
            if fields.get("exact") and each.inexact:
                names = " and ".join(each.inexact)
                problem = f"the {role} runs with {names}, which changes numbers: only exact=False is accepted"
                raise ParameterError("exact", True, problem)
            if (kept := each.quantization or each.offload) is None:
                continue
            problem = f"none is accepted where the {role}'s weights are kept as {kept}"
            second = fields.get("stage_2_lora")  # settled only where there is a second stage
            settled = {
                "lora": fields.get("lora") or (),
                "stage_2_lora": [second] if isinstance(second, Mapping) else (),
            }
            for field, loras in settled.items():
                for lora in loras:
                    if role in map(get_module_role, lora["components"]):
                        raise ParameterError(field, lora["file"], problem)

    def _components(
        self, needs: Mapping[str, Need], roles: Collection[RoleType], family: Family
    ) -> dict[RoleType, list[str]]:
        """Return the components with weights that each acceleration is for; those of other roles if they are here."""
        found: dict[RoleType, list[str]] = {role: [] for role in self.asked if role in roles or not roles}
        for name, need in needs.items():
            role = get_module_role(name)
            if role in self.asked and need.weights and has_weights(component_class(family.repository, name)):
                found.setdefault(role, []).append(name)
        return found


def _check_ranks(family: Family, role: RoleType, names: list[str], asked: Acceleration, *, whole: bool) -> None:
    """Check several ranks, which an engine gives its replicas: a process that loads is one by itself.

    Args:
        whole: whether this process loads nothing, and speaks for the whole service.

    Raises:
        UsageError: the role or the model cannot have them, or they are asked of one process.
    """
    if asked.ranks == 1:
        return
    if role is not RoleType.DENOISER:
        raise UsageError(f"{role}: {asked}: several ranks are for the denoiser only")
    check_ranks(family, names, asked)
    if not whole:
        raise UsageError(f"{role}: {asked}: ranks are processes of their own; serve with --pools denoiser=1,...")


def _dtype(repository: Repository, name: str, dtypes: Mapping[str, str]) -> Callable[[], torch.dtype]:
    return lambda: getattr(torch, resolve_dtype(repository, name, dtypes))


def _bytes_of(module: torch.nn.Module) -> int:
    return sum(_nbytes(tensor) for tensor in [*module.parameters(), *module.buffers()] if not tensor.is_meta)


def _nbytes(tensor: Any) -> int:
    """Return a tensor's bytes; torchao's report those of the values that they stand for."""
    if not hasattr(tensor, "__tensor_flatten__"):
        return int(tensor.nbytes)
    parts, _ = tensor.__tensor_flatten__()
    return sum(_nbytes(getattr(tensor, part)) for part in parts)
