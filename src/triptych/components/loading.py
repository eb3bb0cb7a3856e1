"""Load a component: exactly the weights that are needed, one tensor at a time, or whole where that cannot be done."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from triptych.components.blueprint import (
    Blueprint,
    Slot,
    building,
    component_class,
    draw,
    draw_hollow,
    has_weights,
)
from triptych.components.cutting import CannotLoadByKey
from triptych.components.dtypes import EIGHT_BITS, HEADER_NAMES, resolve_dtype
from triptych.components.headers import TensorInfo
from triptych.components.need import Need
from triptych.components.repository import Repository
from triptych.errors import ComponentFileError, ModelError

log = logging.getLogger(__name__)

MAPPED_AT_ONCE = 32 * 2**20
"""Bytes of a file that are mapped beside the copies made of them; then the file is opened anew."""


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
        if cls.__name__ == "AutoTokenizer":
            wanted = repository.entry(name).class_name
            log.warning("%s needs libraries that are not installed: only the tokenizer of %s is loaded", wanted, name)
        return Loaded(_from_pretrained(_without_videos(cls, name), repository, name), 0)

    def dtype() -> torch.dtype:
        found: torch.dtype = getattr(torch, resolve_dtype(repository, name, dtypes))
        return found

    if not need.weights:
        return Loaded(draw_hollow(repository, name, dtype=dtype, device=device, role=role), 0)
    if not repository.weight_files(name) and not repository.unsafe_weight_files(name):
        raise ComponentFileError(f"{name}/", f"has no weight file{repository.variants_hint(name)}")
    try:
        blueprint = draw(repository, name, need, dtype=dtype(), device=device, role=role)
        fill(blueprint, repository, name, device)
    except CannotLoadByKey as reason:
        log.warning("%s of %s is loaded whole by %s: %s", name, repository.name, cls.__name__, reason)
        return _load_whole(cls, repository, name, device, dtype())
    small = {each for slot in blueprint.slots if slot.source and (each := slot.source.dtype) in EIGHT_BITS}
    if small and dtypes.get(name, dtypes["default"]).startswith("auto"):
        log.warning(
            "%s of %s is stored as %s, which is nothing to compute in: it is loaded as %s, in more memory, unless a dtype "
            "is named",
            name,
            repository.name,
            " and ".join(sorted(HEADER_NAMES[each] for each in small)),
            str(dtype()).removeprefix("torch."),
        )
    _read_generation_settings(blueprint.module, repository, name)
    return Loaded(blueprint.module, blueprint.nbytes)


def fill(blueprint: Blueprint, repository: Repository, component: str, device: torch.device) -> None:
    """Read a blueprint's weights, file by file.

    Weights that need no cast stay mapped from the file: they cost memory once for all processes of a machine. Of a
    file whose weights are cast or moved, no more than `MAPPED_AT_ONCE` is held beside the copies.

    Raises:
        ComponentFileError: a weight file is missing or truncated.
        CannotLoadByKey: what the module has once, the checkpoint has several times and not alike.
    """
    from safetensors import SafetensorError, safe_open

    by_file: dict[str, list[tuple[Slot, TensorInfo]]] = defaultdict(list)
    for slot in blueprint.slots:
        assert slot.source is not None, slot.names
        by_file[slot.source.file].append((slot, slot.source))
    names = {*by_file, *(copy.file for slot in blueprint.slots for copy in slot.copies)}
    repository.check_complete(component, names)
    folder = repository.local(component, weights=sorted(names)).parent
    for slot in blueprint.slots:
        _check_copies(slot, folder)
    for name, sources in by_file.items():
        try:
            for batch in _batches(sorted(sources, key=lambda each: each[1].start), device):
                with safe_open(folder / name, framework="pt") as file:
                    for slot, source in batch:
                        slot.fill(file.get_tensor(source.key).to(device=device, dtype=slot.dtype))
        except (SafetensorError, OSError) as error:
            raise ComponentFileError(name, f"cannot be read: {error}") from error
    for part in blueprint.module.modules():  # buffers that no checkpoint holds
        for key, buffer in part._buffers.items():
            if buffer is not None and not buffer.is_meta:
                part._buffers[key] = buffer.to(device)


def _check_copies(slot: Slot, folder: Path) -> None:
    """Check that all that a checkpoint has for a weight is the same; else transformers unties what its class ties.

    Raises:
        ComponentFileError: a weight file is missing or damaged.
        CannotLoadByKey: it is not the same.
    """
    from safetensors import SafetensorError, safe_open

    def read(info: TensorInfo) -> torch.Tensor:
        try:
            with safe_open(folder / info.file, framework="pt") as file:
                tensor: torch.Tensor = file.get_tensor(info.key)
                return tensor
        except (SafetensorError, OSError) as error:
            raise ComponentFileError(info.file, f"cannot be read: {error}") from error

    for copy in slot.copies:
        assert slot.source is not None, slot.names
        if copy.dtype != slot.source.dtype or not torch.equal(read(copy), read(slot.source)):
            problem = "which should be one weight, have different values"
            raise CannotLoadByKey(f"{copy.key!r} and {slot.source.key!r} of its checkpoint, {problem}")


def _without_videos(cls: type[Any], name: str) -> type[Any]:
    """Return a processor's class, less its part for videos where this machine cannot have that: it needs torchvision."""
    from transformers import ProcessorMixin
    from transformers.utils import is_torchvision_available

    if not issubclass(cls, ProcessorMixin) or is_torchvision_available():
        return cls
    parts = [part for part in cls.get_attributes() if part != "video_processor"]
    if len(parts) == len(cls.get_attributes()):
        return cls
    log.warning("%s is loaded without its part for videos: torchvision is not installed", name)
    members = {"get_attributes": classmethod(lambda _: parts), "__module__": cls.__module__, "__doc__": cls.__doc__}
    return type(cls.__name__, (cls,), members)


def _read_generation_settings(module: torch.nn.Module, repository: Repository, name: str) -> None:
    """Give a model that writes text the checkpoint's own settings for that, as `from_pretrained` does."""
    from transformers import GenerationConfig, PreTrainedModel

    if isinstance(module, PreTrainedModel) and module.can_generate():
        folder = repository.local(name, weights=[])
        if (folder / "generation_config.json").is_file():
            module.generation_config = GenerationConfig.from_pretrained(str(folder))


def _batches(sources: list[tuple[Slot, TensorInfo]], device: torch.device) -> Iterator[list[tuple[Slot, TensorInfo]]]:
    """Cut a file's weights into those to read from one mapping: all that stay mapped, and so many that do not."""
    batch: list[tuple[Slot, TensorInfo]] = []
    copied = 0
    for slot, source in sources:
        batch.append((slot, source))
        stays = device.type == "cpu" and HEADER_NAMES.get(source.dtype) == str(slot.dtype).removeprefix("torch.")
        copied += 0 if stays else source.nbytes
        if copied >= MAPPED_AT_ONCE:
            yield batch
            batch, copied = [], 0
    if batch:
        yield batch


def _load_whole(cls: type[Any], repository: Repository, name: str, device: torch.device, dtype: torch.dtype) -> Loaded:
    """Load a component through its library.

    Raises:
        ModelError: the library could not, or some weights are missing (which it would make up).
    """
    for file in repository.unsafe_weight_files(name) if not repository.weight_files(name) else ():
        log.warning("%s is a pickle: it is read by torch.load(weights_only=True), which runs no code of it", file)
    options: dict[str, object] = {"dtype": dtype, "output_loading_info": True}
    if "quantization_config" in repository.config(name):
        # Where its weights are to be, a quantiser has to know before it makes them; else it decides that by itself.
        options["device_map"] = {"": device}
    with building:
        module, info = _from_pretrained(cls, repository, name, **options)
    for problem in ("missing_keys", "mismatched_keys"):
        if keys := sorted(map(str, info.get(problem, ()))):
            raise ComponentFileError(
                f"{name}/", f"{problem.replace('_', ' ')} of {cls.__name__}: {', '.join(keys[:3])}"
            )
    if getattr(module, "hf_quantizer", None) is None:
        module = module.to(device)
    return Loaded(module.eval(), sum(tensor.nbytes for tensor in [*module.parameters(), *module.buffers()]))


def _from_pretrained(cls: type[Any], repository: Repository, name: str, **options: object) -> Any:
    """Load a component through its own library; without `options`, one that has no weights.

    Raises:
        ModelError: the library could not.
    """
    weights = repository.weight_files(name) or repository.unsafe_weight_files(name) if options else []
    if repository.variant and any(f".{repository.variant}." in file for file in weights):
        options["variant"] = repository.variant
    folder = repository.local(name, weights=weights)
    if not folder.is_dir():
        raise ComponentFileError(f"{name}/", f"is missing from {repository.name}")
    if cls.__module__.startswith("transformers."):
        options["trust_remote_code"] = False  # else it asks on the terminal whether to run what the repository brings
    try:
        return cls.from_pretrained(str(folder), **options)
    except Exception as error:  # libraries, and tokenizers written in Rust, raise anything on damaged files
        problem = f"{cls.__name__} could not be loaded ({type(error).__name__}: {error})"
        raise ModelError(f"component {name!r} of {repository.name}: {problem}") from error
