"""A component drawn from its configuration and cut to what is needed: what `plan` counts and `load` fills."""

from __future__ import annotations

import importlib
import re
import threading
from collections.abc import Callable, Container, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

import torch

from triptych.components.cutting import CannotLoadByKey, cut, is_transformers_model
from triptych.components.headers import TensorInfo
from triptych.components.hollow import hollow_out, settle, used_modules
from triptych.components.need import Need
from triptych.components.repository import Repository
from triptych.errors import ComponentFileError, ModelError, did_you_mean

__all__ = ["Blueprint", "CannotLoadByKey", "Slot", "building", "component_class", "draw", "draw_hollow", "has_weights"]

LIBRARIES = ("diffusers", "transformers")
"""The libraries whose classes a repository may name. Code that ships inside a repository is never run."""

building = threading.RLock()
"""Held while a library builds modules: for that it changes the process's default dtype and how modules take parameters."""


_AUTO_MODEL = re.compile(r"Auto(Model|Backbone)")
"""Classes of transformers that stand for any model."""


@dataclass
class Slot:
    """One weight of a module: where it goes (tied weights go to several places) and what it becomes.

    Attributes:
        source: the tensor of the checkpoint that it is loaded from.
        copies: others that the checkpoint has for it: of tied weights, or under a name of older ones.
    """

    places: list[tuple[torch.nn.Module, str]]
    names: list[str]
    tensor: torch.Tensor
    dtype: torch.dtype
    source: TensorInfo | None = None
    copies: list[TensorInfo] = field(default_factory=list)

    @property
    def nbytes(self) -> int:
        return self.tensor.numel() * self.dtype.itemsize

    def fill(self, value: torch.Tensor) -> None:
        """Put the loaded weight into its places."""
        if isinstance(self.tensor, torch.nn.Parameter):
            # As the class has it, and so its library: PyTorch picks the form of a product by it, with or without gradients.
            parameter = torch.nn.Parameter(value, requires_grad=self.tensor.requires_grad)
            for module, name in self.places:
                module._parameters[name] = parameter
        else:
            for module, name in self.places:
                module._buffers[name] = value


@dataclass
class Blueprint:
    """A module without its weights, and the slots for those that are needed."""

    module: torch.nn.Module
    slots: list[Slot]

    @property
    def nbytes(self) -> int:
        """Bytes of the needed weights once loaded."""
        return sum(slot.nbytes for slot in self.slots)


def component_class(repository: Repository, component: str) -> type[Any]:
    """Import the class of a component.

    Raises:
        ModelError: the installed library has no such class, or the library is not a trusted one.
    """
    entry = repository.entry(component)
    what = f"component {component!r} of {repository.name}"
    library = importlib.import_module(_trusted(entry.library, what))
    cls = getattr(library, entry.class_name, None)
    if not isinstance(cls, type):
        hint = did_you_mean(entry.class_name, dir(library))
        version = getattr(library, "__version__", "")
        problem = f"which the installed {entry.library} {version} does not have{hint}"
        raise ModelError(f"{what} is a {entry.class_name!r}, {problem}")
    if getattr(cls, "is_dummy", False):  # stands for a class whose own libraries are not installed
        if entry.class_name.endswith("Processor") and repository.has_tokenizer(component):
            tokenizer: type[Any] = library.AutoTokenizer
            return tokenizer
        missing = ", ".join(getattr(cls, "_backends", ()))
        raise ModelError(f"{what} is a {entry.library}.{entry.class_name}, which needs {missing} to be installed")
    if entry.library == "transformers" and _AUTO_MODEL.match(entry.class_name):
        problem = (
            "which says of any model that it is one: name the class instead, as `architectures` of its config.json does"
        )
        raise ModelError(f"{what} is a {entry.class_name!r}, {problem}")
    if not hasattr(cls, "from_pretrained"):
        raise ModelError(f"{what} is a {entry.library}.{entry.class_name}, which is nothing that can be loaded")
    return cls


def _trusted(library: str, what: str) -> str:
    """Return the module to import for a library of the index: one of ours, or a folder of diffusers' pipelines."""
    if library in LIBRARIES:
        return library
    if re.fullmatch(r"[a-z]\w*", library) and find_spec(f"diffusers.pipelines.{library}"):
        return f"diffusers.pipelines.{library}"
    trusted = " and ".join(LIBRARIES)
    raise ModelError(
        f"{what} is a class of {library!r}; only classes of {trusted} are loaded, never code that comes with a model"
    )


def has_weights(cls: type[Any]) -> bool:
    """Return whether a component's class is a neural network; tokenizers, processors and schedulers are not."""
    return issubclass(cls, torch.nn.Module)


def draw(
    repository: Repository, component: str, need: Need, *, dtype: torch.dtype, device: torch.device, role: str
) -> Blueprint:
    """Build a component's real class without weights and cut away what `need` does not use.

    Parameters are on the meta device; buffers that no checkpoint holds are computed, in the precision that
    `from_pretrained` computes them in. What is cut away raises `HollowComponentError` when run.

    Raises:
        ComponentFileError: the configuration is missing or does not fit the class or the weights.
        RecipeError: `need` names a submodule that the class does not have.
        CannotLoadByKey: the checkpoint does not hold the weights one by one (quantised, merged or not safetensors).
    """
    config = repository.config(component)
    if "quantization_config" in config:
        raise CannotLoadByKey("its checkpoint is quantised")
    if not repository.weight_files(component) and (unsafe := repository.unsafe_weight_files(component)):
        raise CannotLoadByKey(f"it has no safetensors file, only {', '.join(unsafe[:3])}")
    module = _construct(repository, component, config, dtype)
    if not need.is_full:
        cut(module, need, component, role)
        settle(module, device, lambda: dtype)
    slots = _slots(module, dtype)
    if repository.weight_files(component):
        _find_sources(slots, module, repository.tensors(component))
    return Blueprint(module, slots)


def draw_hollow(
    repository: Repository, component: str, *, dtype: Callable[[], torch.dtype], device: torch.device, role: str
) -> torch.nn.Module:
    """Build a component's real class from its real configuration, at zero bytes; running it raises.

    Args:
        dtype: called when somebody asks the module for it, because it may take reading a header.

    Raises:
        ComponentFileError: the configuration is missing or does not fit the class.
    """
    module = _construct(repository, component, repository.config(component), torch.float32)
    hollow_out(module, component, role, device=device, dtype=dtype)
    return module


def _construct(
    repository: Repository, component: str, config: dict[str, object], dtype: torch.dtype
) -> torch.nn.Module:
    cls = component_class(repository, component)
    try:
        with building:
            with _no_weights(dtype):
                if is_transformers_model(cls):
                    settings = cls.config_class.from_dict(_own_settings(cls, config))
                    for each in (settings, *(getattr(settings, name) for name in settings.sub_configs)):
                        if each is not None:
                            each.dtype = dtype
                    module = cls(settings)
                else:
                    module = cls.from_config(config)
            if is_transformers_model(type(module)):
                module.tie_weights()
    except Exception as error:  # whatever the class's own code does with values that make no sense
        problem = f"does not fit {cls.__name__} ({type(error).__name__}: {error})"
        raise ComponentFileError(f"{component}/config.json", problem) from error
    return module.eval()  # type: ignore[no-any-return]


def _own_settings(cls: type[Any], config: dict[str, Any]) -> dict[str, Any]:
    """Return a model's part of a configuration, which may be that of a whole it is a part of, as `from_pretrained` does."""
    kind, part = cls.config_class.model_type, config.get(cls.config_class.base_config_key)
    whole = config.get("model_type") not in (None, kind)
    return part if whole and isinstance(part, dict) and part.get("model_type", kind) == kind else config


@contextmanager
def _no_weights(dtype: torch.dtype) -> Iterator[None]:
    """Build modules as `from_pretrained` of the libraries does: no weights, buffers for real, this default dtype."""
    from accelerate import init_empty_weights
    from transformers.initialization import no_init_weights

    with ExitStack() as stack:
        stack.callback(torch.set_default_dtype, torch.get_default_dtype())
        torch.set_default_dtype(dtype)
        stack.enter_context(no_init_weights())
        stack.enter_context(init_empty_weights(include_buffers=False))
        yield


def _slots(module: torch.nn.Module, dtype: torch.dtype) -> list[Slot]:
    """List the weights that a checkpoint must hold; those of parts that were cut away are not among them."""
    target = _dtypes(module, dtype)
    slots: dict[int, Slot] = {}
    for path, owner in used_modules(module):
        for name, tensor in [*owner._parameters.items(), *owner._buffers.items()]:
            if tensor is None or name in owner._non_persistent_buffers_set:
                continue
            full = f"{path}.{name}" if path else name
            slot = slots.setdefault(id(tensor), Slot([], [], tensor, target(full, tensor)))
            slot.places.append((owner, name))
            slot.names.append(full)
    return list(slots.values())


def _dtypes(module: Any, dtype: torch.dtype) -> Callable[[str, torch.Tensor], torch.dtype]:
    """Return what gives a weight's dtype once loaded, by name: as each library's `from_pretrained` does it."""
    if is_transformers_model(type(module)):
        from transformers.core_model_loading import build_glob_alternation

        plan = module._get_dtype_plan(dtype)  # names of submodules to float32
        kept = build_glob_alternation(list(plan))[0] if plan else None
        return lambda name, tensor: torch.float32 if kept is not None and kept.search(name) else tensor.dtype
    in_float32 = set(module._keep_in_fp32_modules or ())

    def target(name: str, tensor: torch.Tensor) -> torch.dtype:
        if not tensor.is_floating_point():
            return tensor.dtype
        return dtype if in_float32.isdisjoint(name.split(".")) else torch.float32

    return target


def _find_sources(slots: list[Slot], module: torch.nn.Module, tensors: dict[str, TensorInfo]) -> None:
    """Find every slot's tensor in the checkpoint, under the names the library itself would look for.

    Raises:
        ComponentFileError: a tensor has another shape than the configuration says.
        CannotLoadByKey: a tensor is not there under any name the library gives it when loading tensor by tensor.
    """
    by_name = {name: slot for slot in slots for name in slot.names}
    rename = _Renamer(module, by_name) if is_transformers_model(type(module)) else str
    for key, info in tensors.items():
        slot = by_name.get(rename(key))
        if slot is None:
            continue
        if tuple(slot.tensor.shape) != info.shape:
            problem = f"holds {key!r} as {list(info.shape)}, but its configuration says {list(slot.tensor.shape)}"
            raise ComponentFileError(info.file, problem)
        if slot.source is not None:
            slot.copies.append(slot.source)
        slot.source = info
    missing = [slot.names[0] for slot in slots if slot.source is None]
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise CannotLoadByKey(f"the checkpoint has no {', '.join(missing[:3])}{more}")


class _Renamer:
    """The names a transformers class gives to the keys of older or wrapped checkpoints, by the library's own rules."""

    def __init__(self, module: Any, needed: Container[str]) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming

        transforms = get_model_conversion_mapping(module)
        self.renamings = [each for each in transforms if isinstance(each, WeightRenaming)]
        self.converters = [each for each in transforms if isinstance(each, WeightConverter)]
        self.prefix = module.base_model_prefix
        self.known = module.state_dict(keep_vars=True)
        self.needed = needed

    def __call__(self, key: str) -> str:
        from transformers.core_model_loading import rename_source_key

        name, converted = rename_source_key(key, self.renamings, self.converters, self.prefix, self.known)
        if name not in self.known and key in self.known:
            name, converted = rename_source_key(key, [], [], self.prefix, self.known)
        if converted is not None and name in self.needed:
            raise CannotLoadByKey(f"{key!r} is stored in another layout than it is used in")
        return str(name)
