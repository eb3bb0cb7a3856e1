"""A component drawn from its configuration and cut to what is needed: what `plan` counts and `load` fills."""

from __future__ import annotations

import fnmatch
import importlib
import logging
from collections.abc import Container, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from triptych.components.headers import TensorInfo
from triptych.components.hollow import guard_part, hollow_out, is_unused, settle
from triptych.components.need import HEAD, VISION, Need
from triptych.components.repository import Repository
from triptych.errors import ComponentFileError, ModelError, RecipeError, did_you_mean

log = logging.getLogger(__name__)


_OPTIONAL_PARTS = ("quant_conv", "post_quant_conv")
"""Parts that autoencoders have or have not, by configuration."""


class CannotLoadByKey(Exception):
    """The checkpoint cannot be loaded tensor by tensor; the message says why."""


@dataclass
class Slot:
    """One weight of a module: where it goes (tied weights go to several places) and what it becomes."""

    places: list[tuple[torch.nn.Module, str]]
    names: list[str]
    tensor: torch.Tensor
    dtype: torch.dtype
    source: TensorInfo | None = None

    @property
    def nbytes(self) -> int:
        return self.tensor.numel() * self.dtype.itemsize

    def fill(self, value: torch.Tensor) -> None:
        """Put the loaded weight into its places."""
        if isinstance(self.tensor, torch.nn.Parameter):
            value = torch.nn.Parameter(value, requires_grad=False)
        for module, name in self.places:
            if isinstance(value, torch.nn.Parameter):
                module._parameters[name] = value
            else:
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
    library = importlib.import_module(entry.library)
    cls = getattr(library, entry.class_name, None)
    if not isinstance(cls, type):
        hint = did_you_mean(entry.class_name, dir(library))
        raise ModelError(
            f"component {component!r} of {repository.name} is a {entry.class_name!r}, which the installed "
            f"{entry.library} {getattr(library, '__version__', '')} does not have{hint}"
        )
    return cls


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
        ComponentFileError: the configuration is missing or does not fit the class.
        RecipeError: `need` names a submodule that the class does not have.
        CannotLoadByKey: the checkpoint does not hold the weights one by one (quantised, merged or not safetensors).
    """
    cls = component_class(repository, component)
    config = repository.config(component)
    module = _construct(cls, repository, component, config, dtype)
    if not need.is_full:
        settle(module, device, dtype)
    if not need.weights:
        hollow_out(module, component, role)
        return Blueprint(module, [])
    cut(module, need, component, role)
    if "quantization_config" in config:
        raise CannotLoadByKey("its checkpoint is quantised")
    if not repository.weight_files(component):
        if repository.unsafe_weight_files(component):
            raise CannotLoadByKey("it has no safetensors file")
        slots = _slots(module, dtype)
    else:
        slots = _sourced(_slots(module, dtype), module, repository.tensors(component), component)
    return Blueprint(module, slots)


def cut(module: torch.nn.Module, need: Need, component: str, role: str) -> None:
    """Remove from a module what `need` does not use.

    Raises:
        RecipeError: the module has no such part.
    """
    for part in need.unused:
        if part == HEAD:
            _cut_head(module)
        elif part == VISION:
            for path in _vision_paths(module):
                guard_part(module.get_submodule(path), component, role, path)
        elif paths := fnmatch.filter((path for path, _ in module.named_modules()), part):
            for path in paths:
                guard_part(module.get_submodule(path), component, role, path)
        elif part not in _OPTIONAL_PARTS:
            raise RecipeError(f"component {component!r} ({type(module).__name__}) has no part {part!r}")
    if need.hidden_states is not None:
        _cut_layers(module, need.hidden_states, component)


def _construct(
    cls: type[Any], repository: Repository, component: str, config: dict[str, object], dtype: torch.dtype
) -> torch.nn.Module:
    try:
        with _no_weights(dtype):
            if repository.entry(component).library == "diffusers":
                module = cls.from_config(config)
            else:
                module = cls(cls.config_class.from_dict(config))
    except (TypeError, ValueError, AttributeError, KeyError, AssertionError, RuntimeError) as error:
        problem = f"does not fit {cls.__name__} ({type(error).__name__}: {error})"
        raise ComponentFileError(f"{component}/config.json", problem) from error
    if _is_transformers(module):
        module.tie_weights()
    module.eval()
    module.requires_grad_(False)
    result: torch.nn.Module = module
    return result


@contextmanager
def _no_weights(dtype: torch.dtype) -> Iterator[None]:
    """Build modules as `from_pretrained` of the libraries does: no weights, buffers for real, this default dtype."""
    from accelerate import init_empty_weights
    from transformers.initialization import no_init_weights

    default = torch.get_default_dtype()
    with ExitStack() as stack:
        stack.callback(torch.set_default_dtype, default)
        torch.set_default_dtype(dtype)
        stack.enter_context(no_init_weights())
        stack.enter_context(init_empty_weights(include_buffers=False))
        yield


def _slots(module: torch.nn.Module, dtype: torch.dtype) -> list[Slot]:
    """List the weights that a checkpoint must hold; those of parts that were cut away are not among them."""
    idle = {id(tensor) for part in module.modules() if is_unused(part) for tensor in part.state_dict(keep_vars=True).values()}
    in_float32 = _kept_in_float32(module, dtype)
    slots: dict[int, Slot] = {}
    for path, owner in module.named_modules(remove_duplicate=False):
        for name, tensor in [*owner._parameters.items(), *owner._buffers.items()]:
            if tensor is None or id(tensor) in idle or name in owner._non_persistent_buffers_set:
                continue
            full = f"{path}.{name}" if path else name
            target = tensor.dtype
            if tensor.is_floating_point():
                target = torch.float32 if any(part in full.split(".") for part in in_float32) else dtype
            slot = slots.setdefault(id(tensor), Slot([], [], tensor, target))
            slot.places.append((owner, name))
            slot.names.append(full)
    return list(slots.values())


def _sourced(
    slots: list[Slot], module: torch.nn.Module, tensors: dict[str, TensorInfo], component: str
) -> list[Slot]:
    """Find every slot's tensor in the checkpoint, under the names the library itself would look for."""
    by_name = {name: slot for slot in slots for name in slot.names}
    rename = _Renamer(module, by_name) if _is_transformers(module) else str
    for key, info in tensors.items():
        slot = by_name.get(rename(key))
        if slot is not None:
            slot.source = info
            if tuple(slot.tensor.shape) != info.shape:
                problem = f"holds {key!r} as {list(info.shape)}, but its configuration says {list(slot.tensor.shape)}"
                raise ComponentFileError(info.file, problem)
    missing = [slot.names[0] for slot in slots if slot.source is None]
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise CannotLoadByKey(f"the checkpoint has no {', '.join(missing[:3])}{more}")
    return slots


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
        if converted is not None and name in self.needed:
            raise CannotLoadByKey(f"{key!r} is stored in another layout than it is used in")
        return str(name)


def _is_transformers(module: torch.nn.Module) -> bool:
    from transformers import PreTrainedModel

    return isinstance(module, PreTrainedModel)


def _kept_in_float32(module: torch.nn.Module, dtype: torch.dtype) -> set[str]:
    """Return the submodules whose weights stay float32 when the rest is cast, as the two libraries define it."""
    relaxed = set(getattr(module, "_keep_in_fp32_modules", None) or ())
    strict = set(getattr(module, "_keep_in_fp32_modules_strict", None) or ())
    if not _is_transformers(module):  # diffusers: whatever the dtype is
        return relaxed
    if dtype == torch.float16:
        return relaxed | strict
    return strict if dtype == torch.bfloat16 else set()


def _cut_head(module: Any) -> None:
    """Replace a language model's output head, so that its hidden states pass through unprojected."""
    head = module.get_output_embeddings() if hasattr(module, "get_output_embeddings") else None
    for name, child in module.named_children():
        if child is head:
            setattr(module, name, torch.nn.Identity())


def _vision_paths(module: Any) -> list[str]:
    """Return the paths of a model's vision tower and of what projects its output, if it has one."""
    tower = module.get_encoder(modality="image") if hasattr(module, "get_encoder") else module
    if tower is module:
        return []
    paths = [path for path, part in module.named_modules() if part is tower]
    paths += [path for path, _ in module.named_modules() if path.split(".")[-1] == "multi_modal_projector"]
    return paths


def _cut_layers(module: Any, read: frozenset[int], component: str) -> None:
    """Drop the layers above the last hidden state that is read, and the final norm where none of them passes it.

    With n layers, `hidden_states` has n + 1 entries: the embeddings, then each layer's output; the last is taken after
    the final norm. So entry n of a model that really has more layers needs n layers and no norm.
    """
    stack_owner, name, layers = _layer_stack(module, component)
    count = len(layers)
    for entry in read:
        if not -count - 1 <= entry <= count:
            problem = f"has {count} layers, so it has no hidden state {entry}; this family cannot use it"
            raise ComponentFileError(f"{component}/config.json", problem)
    last = max(entry if entry >= 0 else count + 1 + entry for entry in read)
    if last == count:
        return
    setattr(stack_owner, name, layers[:last])
    for norm in ("norm", "final_layer_norm", "post_layernorm", "final_layernorm"):
        for owner in (stack_owner, module):
            if isinstance(getattr(owner, norm, None), torch.nn.Module):
                setattr(owner, norm, torch.nn.Identity())


def _layer_stack(module: torch.nn.Module, component: str) -> tuple[torch.nn.Module, str, torch.nn.ModuleList]:
    """Find the longest stack of layers that is not part of something cut away."""
    found: list[tuple[int, torch.nn.Module, str, torch.nn.ModuleList]] = []

    def visit(owner: torch.nn.Module) -> None:
        for name, child in owner.named_children():
            if isinstance(child, torch.nn.ModuleList):
                found.append((len(child), owner, name, child))
            elif not is_unused(child):
                visit(child)

    visit(module)
    if not found:
        raise RecipeError(f"component {component!r} ({type(module).__name__}) has no stack of layers")
    _, owner, name, layers = max(found, key=lambda each: each[0])
    return owner, name, layers
