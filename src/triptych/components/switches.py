"""Switching accelerations on: each through diffusers' or PyTorch's own means, and refused where it cannot be."""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from triptych.components.acceleration import Acceleration, parse_cache
from triptych.components.hollow import is_hollow, settle, unused_aside
from triptych.components.step_cache import StepCache
from triptych.errors import UsageError, did_you_mean
from triptych.roles import RoleType


def accelerate(
    role: RoleType, modules: Mapping[str, Any], asked: Acceleration, device: torch.device | None, *, must: bool = True
) -> dict[str, list[str]]:
    """Switch on what is asked for in the modules that have it; returns the names of those changed, by switch.

    On hollow modules this is a rehearsal: what would be refused is refused, before any weight is read.

    Args:
        modules: the components of the role, by name.
        device: where they run; None where that is not known yet, and not checked. The weights of modules to offload are
            expected on the CPU.
        must: whether each switch must fit one of the modules; it need not where the role's others are elsewhere.

    Raises:
        UsageError: none of the modules can have what is asked, or this machine cannot.
    """
    changed: dict[str, list[str]] = {}
    for switch, turn_on in _SWITCHES.items():
        value = getattr(asked, switch)
        if not value:
            continue
        refusals: list[str] = []
        for name, module in modules.items():
            try:
                turn_on(module, value, device)
                changed.setdefault(switch, []).append(name)
            except UsageError as error:
                refusals.append(f"{name}: {error}")
        if must and switch not in changed:
            why = refusals[0] if refusals else "this model has no component of that role"
            raise UsageError(f"{role}: {switch}{'' if value is True else f'={value!r}'}: {why}")
    return changed


def _quantize(module: Any, kind: str, device: torch.device | None) -> None:
    if kind == "int8":
        _to_integers(module)
    else:
        _to_small_floats(module, device)


def _to_integers(module: Any) -> None:
    """Keep the weights of linear layers as 8-bit integers; activations stay as they are."""
    if importlib.util.find_spec("torchao") is None:
        raise UsageError('torchao is not installed; to get it: pip install "triptych[torchao]"')
    if is_hollow(module):
        return
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantize_(module, Int8WeightOnlyConfig())


def _to_small_floats(module: Any, device: torch.device | None) -> None:
    """Keep the weights of linear, convolution and embedding layers as 8-bit floats, cast up while their layer runs."""
    from diffusers.hooks.layerwise_casting import DEFAULT_SKIP_MODULES_PATTERN, apply_layerwise_casting

    dtype: torch.dtype = module.dtype
    if hasattr(module, "enable_layerwise_casting"):
        module.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=dtype)
    else:  # a transformers model; what it keeps in float32 it also asks for its dtype
        kept = (*(module._keep_in_fp32_modules or ()), *(module._keep_in_fp32_modules_strict or ()))
        apply_layerwise_casting(module, torch.float8_e4m3fn, dtype, (*DEFAULT_SKIP_MODULES_PATTERN, *kept))
    settle(module, module.device if device is None else device, lambda: dtype)


def _set_attention(module: Any, backend: str, device: torch.device | None) -> None:
    from diffusers.models import attention_dispatch as dispatch

    known = [each.value for each in dispatch.AttentionBackendName]
    if backend not in known:
        raise UsageError(f"diffusers knows {', '.join(known)}{did_you_mean(backend, known)}")
    if not hasattr(module, "set_attention_backend") or not any(
        hasattr(getattr(part, "processor", None), "_attention_backend") for part in module.modules()
    ):
        raise UsageError(f"the attention of {type(module).__name__} does not go through diffusers' dispatcher")
    try:
        # Inside, because diffusers would make it the kernel of every other model in this process, too.
        with dispatch.attention_backend(backend):
            module.set_attention_backend(backend)
        if device is not None:
            sample = torch.zeros(1, 16, 2, 64, device=device, dtype=module.dtype)
            dispatch.dispatch_attention_fn(sample, sample, sample, backend=dispatch.AttentionBackendName(backend))
    except Exception as error:  # a package that is missing, or whatever a kernel says of a device or a dtype
        where = "" if device is None else f" on {device} in {module.dtype}"
        problem = " ".join(str(error).split())
        raise UsageError(f"it does not run here{where}: {problem or type(error).__name__}") from error


def _cache(module: Any, text: str, device: torch.device | None) -> None:
    from diffusers import FirstBlockCacheConfig, TaylorSeerCacheConfig

    name, number = parse_cache(text)
    config = (
        FirstBlockCacheConfig(threshold=number)
        if name == "first_block"
        else TaylorSeerCacheConfig(cache_interval=int(number))
    )
    StepCache(module, config)


def _compile(module: Any, _: bool, device: torch.device | None) -> None:
    _check_compiler(device)
    if is_hollow(module):
        return
    if getattr(module, "_repeated_blocks", None):
        module.compile_repeated_blocks()
    elif callable(getattr(module, "decode", None)):  # an autoencoder is not run by calling it
        module.decoder.compile()
    else:
        module.compile()


def is_compiled(module: torch.nn.Module) -> bool:
    """Return whether a module, or a part of it, is compiled, so that a first call of a new shape takes long."""
    return any(part._compiled_call_impl is not None for part in module.modules())


def _check_compiler(device: torch.device | None) -> None:
    """Check that torch.compile has what it makes its kernels with.

    Raises:
        UsageError: it has not.
    """
    compiler = os.environ.get("CXX") or "g++"
    if shutil.which(compiler) is None and (os.environ.get("CXX") or shutil.which("clang++") is None):
        raise UsageError(
            f"torch.compile needs a C++ compiler, and {compiler!r} is not there; install g++, or name it in CXX"
        )
    if device is not None and device.type == "cuda" and importlib.util.find_spec("triton") is None:
        raise UsageError("torch.compile needs Triton for a GPU, which is not installed: pip install triton")


def _tile(module: Any, _: bool, device: torch.device | None) -> None:
    try:
        module.enable_tiling()
    except (AttributeError, NotImplementedError) as error:  # autoencoders of sound have the method, and nothing in it
        raise UsageError(f"{type(module).__name__} cannot work in tiles") from error


def _offload(module: Any, _: str, device: torch.device | None) -> None:
    """Keep the weights in the host's memory; each layer's come to the device when it runs."""
    from diffusers.hooks import apply_group_offloading

    if not getattr(module, "_supports_group_offloading", True):
        raise UsageError(f"{type(module).__name__} cannot be offloaded in groups")
    if device is None:
        return
    _needs_accelerator(device)
    if is_hollow(module):
        return
    dtype: torch.dtype = module.dtype
    with unused_aside(module), on_card(device):
        apply_group_offloading(
            module,
            onload_device=device,
            offload_device=torch.device("cpu"),
            offload_type="leaf_level",
            use_stream=device.type == "cuda",
        )
    settle(module, device, lambda: dtype)


def on_card(device: torch.device) -> AbstractContextManager[object]:
    """Let this thread be on a device's card for a while.

    diffusers makes the stream that brings weights, and waits for computations, on the card that its thread is on, wherever
    the weights are to go.
    """
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _needs_accelerator(device: torch.device) -> None:
    if device.type == "cpu":
        raise UsageError("it brings weights from the host's memory to an accelerator, and this role runs on the CPU")


_SWITCHES: dict[str, Callable[[Any, Any, torch.device | None], None]] = {
    "quantization": _quantize,
    "attention": _set_attention,
    "cache": _cache,
    "tiling": _tile,
    "compile": _compile,
    "offload": _offload,
}
"""In the order in which they are switched on: what moves weights comes last."""
