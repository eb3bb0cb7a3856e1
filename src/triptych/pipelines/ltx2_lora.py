"""The LoRA of LTX-2's second stage: a file of the repository that a request names, loaded once and on only when asked.

Oracle: `load_lora_weights(..., weight_name=...)` and `set_adapters` of diffusers' LTX-2 pipelines before the second call,
as their documentation does it. What a file changes in the transformer is loaded in the denoiser; what it changes in the
connectors, in the encoder, which then makes text for the second stage alone.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from triptych.components.repository import Repository
from triptych.errors import ComponentFileError, ParameterError, UsageError, did_you_mean

log = logging.getLogger(__name__)

PREFIXES = {
    "transformer": ("transformer.", "diffusion_model."),
    "connectors": ("connectors.", "text_embedding_projection."),
}
"""What the names of a component's layers begin with, in diffusers' files and in the published ones."""

_LOADING = threading.Lock()
"""Held while a LoRA's layers are built: for that, PEFT changes how any module of the process is made."""


def parameters() -> dict[str, object]:
    """Return the request parameters and their defaults: the file's name in the repository (none: ""), its weight."""
    return {"stage_2_lora": "", "stage_2_lora_scale": 1.0}


def check(given: Mapping[str, Any], repository: Repository) -> None:
    """Check the parameters, and by the file's header that it is a LoRA of this family.

    Raises:
        ParameterError: one is not accepted.
        ComponentFileError: the file is broken.
    """
    scale, name = given["stage_2_lora_scale"], given["stage_2_lora"]
    if isinstance(scale, bool) or not isinstance(scale, (int, float)) or not math.isfinite(scale):
        raise ParameterError("stage_2_lora_scale", scale, "a finite number is accepted")
    if name == "":
        return
    known = repository.loras()
    if name not in known:
        has = f"the repository has {', '.join(known)}" if known else "the repository has none"
        hint = did_you_mean(name, known) if isinstance(name, str) else ""
        accepted = f"a safetensors file beside the components, with `lora` in its name, is accepted; {has}{hint}"
        raise ParameterError("stage_2_lora", name, accepted)
    if not changes(repository, name, "transformer") or any("lora" not in key for key in repository.header(name)):
        raise ParameterError("stage_2_lora", name, "it holds no LoRA of LTX-2's transformer")


def changes(repository: Repository, name: str, component: str) -> bool:
    """Return whether a LoRA changes a component, by its header."""
    return any(key.startswith(PREFIXES[component]) for key in repository.header(name))


def load(repository: Repository, name: str, component: str, module: Any, helpers: Any) -> None:
    """Give a component the layers of a LoRA, switched off, unless it has them.

    Raises:
        UsageError: PEFT, which makes them, is not installed.
        ComponentFileError: the file cannot be read, or does not fit the component.
    """
    from diffusers.utils import MIN_PEFT_VERSION, USE_PEFT_BACKEND

    adapter = adapter_name(name)
    if adapter in getattr(module, "peft_config", {}):
        return
    if not USE_PEFT_BACKEND:
        needed = f"stage_2_lora needs PEFT {MIN_PEFT_VERSION} or newer, which is not installed"
        raise UsageError(f'{needed} where the {component} runs; to get it: pip install "triptych[lora]"')
    began = time.perf_counter()
    folder = repository.files.local([name])
    with _LOADING:
        try:
            weights, metadata = helpers.lora_state_dict(
                str(folder), weight_name=name, use_safetensors=True, local_files_only=True, return_lora_metadata=True
            )
            mine = {key: value for key, value in weights.items() if key.startswith(f"{component}.")}
            helpers.load_lora_into_transformer(
                mine, module, adapter_name=adapter, metadata=metadata, low_cpu_mem_usage=True, prefix=component
            )
        except Exception as error:  # diffusers, PEFT and safetensors raise anything on files that do not fit
            problem = f"is no LoRA that fits the {component} ({type(error).__name__}: {error})"
            raise ComponentFileError(name, problem) from error
        finally:
            module.disable_lora()
    megabytes = sum(value.nbytes for value in mine.values()) / 1e6
    log.info("%s: %.1f MB for the %s in %.2f s", name, megabytes, component, time.perf_counter() - began)


@contextmanager
def active(module: Any, name: str, scale: float) -> Iterator[None]:
    """Let a component that has a LoRA's layers compute with them."""
    module.set_adapters(adapter_name(name), scale)
    module.enable_lora()
    try:
        yield
    finally:
        module.disable_lora()


def adapter_name(file: str) -> str:
    """Return what diffusers calls the LoRA of a file: no dot may be in it."""
    import xxhash

    return f"stage_2_{xxhash.xxh3_64(file.encode()).hexdigest()}"
