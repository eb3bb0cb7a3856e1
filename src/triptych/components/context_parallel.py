"""Context parallelism: several processes share each sequence of a model's tokens, through diffusers."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from triptych.components.acceleration import Acceleration
from triptych.errors import ParameterError

_WITHOUT_SUMS = ("native", "_native_npu")
"""Attention kernels of diffusers that do not give the log-sum-exp of each row, which ring attention joins parts by."""
_HEADS = ("attention_heads", "kv_heads", "key_value_heads")
"""How the parameters of models that say how many heads there are end."""


def check_context_parallel(cls: type[Any], config: Mapping[str, object], asked: Acceleration, *, on_gpu: bool) -> None:
    """Check that a model can share its sequences as asked, by its class and configuration alone.

    Raises:
        ParameterError: diffusers has no plan for it, its heads cannot be divided, or its attention cannot be.
    """
    from diffusers.models.attention_dispatch import _AttentionBackendRegistry as registry

    field, degree = ("ulysses", asked.ulysses) if asked.ulysses > 1 else ("ring", asked.ring)
    if (reason := _not_divided(cls, config)) is not None:
        raise ParameterError(field, degree, f"{reason}; 1 is accepted, and cfg_parallel or more replicas")
    for name, parameter in inspect.signature(cls.__init__).parameters.items():
        heads = config.get(name, parameter.default)
        if name.endswith(_HEADS) and isinstance(heads, int) and heads % asked.ulysses:
            raise ParameterError(
                "ulysses", asked.ulysses, f"{cls.__name__} has {name}={heads}: a divisor of that is accepted"
            )
    backend = asked.attention or registry.get_active_backend()[0].value
    able = sorted(registry._supports_context_parallel)
    if backend not in able:
        raise ParameterError("attention", backend, f"with {field}={degree}, {', '.join(able)} are accepted")
    if asked.ring > 1 and backend in _WITHOUT_SUMS:
        others = ", ".join(name for name in able if name not in _WITHOUT_SUMS)
        raise ParameterError(
            "ring",
            asked.ring,
            f"attention={backend!r} cannot be computed in parts; with one of {others} it is accepted",
        )
    if asked.ring > 1 and not on_gpu:
        raise ParameterError("ring", asked.ring, "attention in parts needs kernels of a GPU, and there is none here")


def _not_divided(cls: type[Any], config: Mapping[str, object]) -> str | None:
    """Return why diffusers has no plan that divides a model; None where it has one."""
    plan = getattr(cls, "_cp_plan", None)
    if not plan:
        return f"diffusers cannot divide {cls.__name__}"
    if "rope" in plan and (kind := config.get("rope_type", "interleaved")) != "interleaved":
        return f"diffusers divides {cls.__name__} with rope_type='interleaved', and this one has {kind!r}"
    planned = 1 + max((int(part) for name in plan for part in name.split(".") if part.isdecimal()), default=0)
    layers = config.get("num_layers")
    if isinstance(layers, int) and layers < planned:
        return f"diffusers divides {cls.__name__} of {planned} layers, and this one has {layers}"
    return None


def share_sequences(models: Iterable[Any], asked: Acceleration, device: torch.device) -> None:
    """Let models share their sequences with the other processes of this `torch.distributed` world, which do the same."""
    from diffusers import ContextParallelConfig
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh(device.type, (asked.ring, asked.ulysses), mesh_dim_names=("ring", "ulysses"))
    for model in models:
        config = ContextParallelConfig(
            ulysses_degree=asked.ulysses,
            ring_degree=asked.ring,
            # Sequences of any length; diffusers has it for one of the two by itself only.
            ulysses_anything=asked.ring == 1,
            ring_anything=asked.ulysses == 1,
            mesh=mesh,
        )
        if device.type == "cpu":
            _enable_on_cpu(model, config)
        else:
            model.enable_parallelism(config=config)
    # Now rather than in the first request: the processes' first words to each other are the slow ones.
    torch.distributed.all_reduce(torch.zeros(1, device=device))


def _enable_on_cpu(model: Any, config: Any) -> None:
    """Do what `enable_parallelism` does (diffusers 0.42), which divides by the number of accelerators."""
    from diffusers import ParallelConfig
    from diffusers.hooks.context_parallel import apply_context_parallel

    whole = ParallelConfig(context_parallel_config=config)
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    whole.setup(rank, world, torch.device("cpu"), mesh=config.mesh)
    model._parallel_config = whole
    for part in model.modules():
        processor: Any = getattr(part, "processor", None)
        if hasattr(processor, "_parallel_config"):
            processor._parallel_config = whole
    apply_context_parallel(model, config, model._cp_plan)


@contextmanager
def undivided(model: Any) -> Iterator[None]:
    """Take away the hooks that divide a model's sequences, if it has them, while a library replaces layers of it.

    A LoRA's layer is put around the model's own. A hook that stayed inside would gather what that gives, and not what
    is added to it.
    """
    whole = getattr(model, "_parallel_config", None)
    if whole is None or whole.context_parallel_config is None:
        yield
        return
    from diffusers.hooks.context_parallel import apply_context_parallel, remove_context_parallel

    remove_context_parallel(model, model._cp_plan)
    try:
        yield
    finally:
        apply_context_parallel(model, whole.context_parallel_config, model._cp_plan)


def check_inputs(inputs: Mapping[str, Any], ranks: int, *, on_gpu: bool) -> None:
    """Check that ranks can share the inputs of one forward, as far as these tell.

    Raises:
        ParameterError: a length is not divisible that has to be.
    """
    for name, value in inputs.items():
        if not isinstance(value, torch.Tensor):
            continue
        # diffusers pads each rank's part of a mask at its own end, and cuts the whole at its end only: tokens would be
        # masked by others' entries.
        if "mask" in name and value.shape[-1] % ranks:
            raise ParameterError(name, f"{value.shape[-1]} entries", f"with {ranks} ranks, a multiple is accepted")
        # gloo gathers parts of one size only.
        if name == "hidden_states" and value.ndim == 3 and not on_gpu and value.shape[1] % ranks:
            raise ParameterError(
                name, f"{value.shape[1]} tokens", f"on CPUs, with {ranks} ranks, a multiple is accepted: another size"
            )
