"""How a state's tensors go from one process's device to another's without passing through either's main memory.

Ray's direct transport over NIXL: RDMA between machines, CUDA's IPC or the network's driver on one, and plain memory
where there is no card. The tensors stay where they were made, and belong to that process, until the state is no longer
needed; what else a state has travels beside them in its wire form.
"""

from __future__ import annotations

import importlib.util
import threading
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeAlias

import ray
import torch
from ray.exceptions import RayError
from torch.utils._pytree import tree_leaves, tree_map

from triptych.errors import UsageError, WireError
from triptych.state import State

if TYPE_CHECKING:
    from ray import ObjectRef

Placed: TypeAlias = "list[ObjectRef[Any]]"
"""A state that lies on its maker's device. In a list, because Ray would fetch a bare reference for whoever gets it."""

PATIENCE = 30.0
"""Seconds that fetching may take."""
ENVIRONMENT = {"RAY_NIXL_REMOTE_AGENT_CACHE_MAXSIZE": "0"}
"""What a process has to be started with: Ray would take an actor that was started anew for the one that died."""

_fetching = threading.Lock()
"""Held while a state is fetched: Ray lets go of the process it came from then, and of all that comes from there."""


def check_nixl() -> None:
    """Check that this process can take part.

    Raises:
        UsageError: NIXL is not installed.
    """
    if importlib.util.find_spec("nixl") is None:
        raise UsageError("transport='nixl': NIXL is not installed here; to get it: pip install nixl")


def place(state: State, device: torch.device) -> Placed | None:
    """Leave a state where it is, for another process to `fetch`; None where it has no tensors on the device."""
    tensors = {
        name: tree_map(torch.Tensor.contiguous, value)
        for name, value in state.fields.items()
        if (leaves := tree_leaves(value))
        and all(isinstance(each, torch.Tensor) and each.device.type == device.type for each in leaves)
    }
    if not tensors:
        return None
    others = {name: value for name, value in state.fields.items() if name not in tensors}
    rest = replace(state, fields={**others, _SUMS: {name: _sums(value) for name, value in tensors.items()}})
    return [ray.put({"rest": bytes(rest.to_bytes()), "tensors": tensors}, _tensor_transport="nixl")]


def fetch(placed: Placed) -> State:
    """Return a state that another process has placed, with its tensors on this process's device.

    Raises:
        WireError: that process has died, or what came is not what it placed.
    """
    try:
        with _fetching:
            got = ray.get(placed[0], timeout=PATIENCE)
    except RayError as error:
        raise WireError(f"the hand-over was lost: {error}") from error
    state = State.from_bytes(got["rest"])
    sums = state.fields.pop(_SUMS)
    for name, value in got["tensors"].items():
        if (came := _sums(value)) != sums[name]:
            raise WireError(f"checksum mismatch in field {name!r}: {sums[name]} was placed, {came} came")
        state.fields[name] = value
    return state


_SUMS = "_sums"


def _sums(value: Any) -> list[int]:
    """Return a checksum of each tensor, computed where it lies.

    The sum of its bytes as 64-bit words, each times an odd number of its own, modulo 2^64: multiplying by an odd number
    loses no bit, so that no change to a single word is missed.
    """
    return [_sum(each) for each in tree_leaves(value)]


def _sum(tensor: torch.Tensor) -> int:
    data = tensor.detach().reshape(-1).view(torch.uint8)
    data = data.clone() if data.storage_offset() % 8 else data
    even = len(data) // 8 * 8
    words = data[:even].view(torch.int64) if even else data[:0].to(torch.int64)
    words = torch.cat([words, data[even:].to(torch.int64)])
    return int((words * (2 * torch.arange(len(words), device=words.device) + 1)).sum())
