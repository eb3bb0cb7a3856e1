"""Load a component: exactly the weights that are needed, one tensor at a time, or whole where that cannot be done."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from triptych.components.blueprint import Blueprint, CannotLoadByKey, Slot, component_class, draw, has_weights
from triptych.components.dtypes import resolve_dtype
from triptych.components.need import Need
from triptych.components.repository import Repository
from triptych.errors import ComponentFileError, ModelError

log = logging.getLogger(__name__)


@dataclass
class Loaded:
    """A loaded component and the bytes of weights it holds."""

    component: Any
    nbytes: int


def load_component(
    repository: Repository, name: str, need: Need, *, device: torch.device, dtypes: Mapping[str, str], role: str
) -> Loaded:
    """Load as much of a component as `need` says.

    Where the checkpoint cannot be loaded in part (quantised, or not in safetensors), the whole component is loaded
    through its library, with a warning.

    Raises:
        ModelError: the component or a file of it is missing, damaged, or of a class that is not installed.
    """
    cls = component_class(repository, name)
    if not has_weights(cls):
        return Loaded(_from_pretrained(cls, repository, name, weights=[]), 0)
    dtype: torch.dtype = getattr(torch, resolve_dtype(repository, name, dtypes))
    try:
        blueprint = draw(repository, name, need, dtype=dtype, device=device, role=role)
        if need.weights:
            fill(blueprint, repository, name, device)
    except CannotLoadByKey as reason:
        if not need.is_full:
            log.warning("%s is loaded whole, not only %s: %s", name, need, reason)
        return _load_whole(cls, repository, name, device, dtype)
    return Loaded(blueprint.module, blueprint.nbytes)


def fill(blueprint: Blueprint, repository: Repository, component: str, device: torch.device) -> None:
    """Read a blueprint's weights, file by file, so that no more than one file's pages are held beside the copies.

    Weights that need no cast stay mapped from the file: they cost memory once for all processes of a machine.

    Raises:
        ComponentFileError: a weight file is missing or truncated.
    """
    from safetensors import SafetensorError, safe_open

    by_file: dict[str, list[Slot]] = defaultdict(list)
    for slot in blueprint.slots:
        if slot.source is None:
            raise ComponentFileError(f"{component}/", f"has no weight file in {repository.name}")
        by_file[slot.source.file].append(slot)
    repository.check_complete(component, by_file)
    folder = repository.local(component, weights=list(by_file))
    for name, slots in by_file.items():
        try:
            with safe_open(folder.parent / name, framework="pt") as file:
                for slot in slots:
                    assert slot.source is not None
                    slot.fill(file.get_tensor(slot.source.key).to(device=device, dtype=slot.dtype))
        except (SafetensorError, OSError) as error:
            raise ComponentFileError(name, f"cannot be read: {error}") from error


def _load_whole(
    cls: type[Any], repository: Repository, name: str, device: torch.device, dtype: torch.dtype
) -> Loaded:
    module = _from_pretrained(cls, repository, name, dtype=dtype)
    if not getattr(module, "hf_quantizer", None):
        module = module.to(device)
    module.eval()
    tensors = [*module.parameters(), *module.buffers()]
    return Loaded(module, sum(tensor.nbytes for tensor in tensors))


def _from_pretrained(
    cls: type[Any], repository: Repository, name: str, *, weights: list[str] | None = None, dtype: Any = None
) -> Any:
    """Load a component through its own library.

    Raises:
        ModelError: the library could not.
    """
    options: dict[str, object] = {}
    if dtype is not None:
        options["dtype"] = dtype
        if repository.variant and any(f".{repository.variant}." in file for file in repository.weight_files(name)):
            options["variant"] = repository.variant
    folder = repository.local(name, weights=weights)
    if not folder.is_dir():
        raise ComponentFileError(f"{name}/", f"is missing from {repository.name}")
    try:
        return cls.from_pretrained(str(folder), **options)
    except (OSError, ValueError, ImportError, KeyError, TypeError, RuntimeError) as error:
        problem = f"{cls.__name__} could not be loaded ({type(error).__name__}: {error})"
        raise ModelError(f"component {name!r} of {repository.name}: {problem}") from error
