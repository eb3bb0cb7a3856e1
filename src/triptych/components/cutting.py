"""Cuts a module drawn without weights down to what a need uses."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator
from typing import Any

import torch

from triptych.components.hollow import guard_part, used_modules
from triptych.components.need import HEAD, VISION, Need
from triptych.errors import ComponentFileError, RecipeError

_OPTIONAL_PARTS = ("quant_conv", "post_quant_conv")
"""Parts that autoencoders have or have not, by configuration."""


class CannotLoadByKey(Exception):
    """A component cannot be loaded in part, or not tensor by tensor; the message says why."""


class Unread(torch.nn.Module):
    """Stands where a submodule is run whose result nobody reads; gives None."""

    def forward(self, *_: object, **__: object) -> None:
        return None


def cut(module: torch.nn.Module, need: Need, component: str, role: str) -> None:
    """Remove from a module what `need` does not use.

    Raises:
        RecipeError: the module has no such part.
        ComponentFileError: the configuration gives the model fewer layers than are read.
        CannotLoadByKey: it cannot be told which of its layers are used.
    """
    for part in sorted(need.unused):
        for path in _vision_paths(module) if part == VISION else _paths(module, part, component):
            guard_part(module.get_submodule(path), component, role, path)
    stack = _stack(module) if need.hidden_states is not None or HEAD in need.unread else None
    for part in sorted(need.unread - {HEAD}):
        for path in _paths(module, part, component):
            _replace(module, path, Unread())
    if stack is None:
        return
    if HEAD in need.unread:
        for path, after in _after(module, stack):
            if not _is_norm(after) and any(True for _ in after.parameters()):
                _replace(module, path, Unread())
    if need.hidden_states is not None:
        _cut_layers(module, stack, need.hidden_states, component)


def _paths(module: torch.nn.Module, part: str, component: str) -> list[str]:
    paths = fnmatch.filter((path for path, _ in module.named_modules()), part)
    if not paths and "*" not in part and part not in _OPTIONAL_PARTS:
        raise RecipeError(f"component {component!r} ({type(module).__name__}) has no part {part!r}")
    return paths


def _replace(module: torch.nn.Module, path: str, replacement: torch.nn.Module) -> None:
    owner, _, name = path.rpartition(".")
    setattr(module.get_submodule(owner), name, replacement)


def _vision_paths(module: Any) -> list[str]:
    """Return the paths of a vision-language model's vision tower and of what projects its output."""
    if not is_transformers_model(type(module)):
        return []
    tower = module.get_encoder(modality="image")
    if tower is module or tower is module.get_decoder():  # no tower, or nothing but a tower
        return []
    named = list(module.named_modules())
    return [path for path, part in named if part is tower or path.split(".")[-1] == "multi_modal_projector"]


def _stack(module: Any) -> str:
    """Return the path of the layers whose outputs are the model's hidden states, as its class itself declares them.

    Raises:
        CannotLoadByKey: its class does not, or there is more than one such stack.
    """
    if is_transformers_model(type(module)):
        reader = module.get_decoder()
        recorded = (getattr(reader, "_can_record_outputs", None) or {}).get("hidden_states", ())
        recorders = recorded if isinstance(recorded, (list, tuple)) else [recorded]
        kinds = tuple(kind for each in recorders if isinstance(kind := getattr(each, "target_class", each), type))
        inside = {id(part) for _, part in used_modules(reader)}
        stacks = [
            path
            for path, part in used_modules(module)
            if id(part) in inside and isinstance(part, torch.nn.ModuleList) and part and isinstance(part[0], kinds)
        ]
        if len(stacks) == 1:
            return stacks[0]
    raise CannotLoadByKey(f"{type(module).__name__} does not say which of its layers give its hidden states")


def _after(module: torch.nn.Module, stack: str) -> Iterator[tuple[str, torch.nn.Module]]:
    """List what follows a stack of layers, at every level above it, in the order in which it was registered."""
    names = stack.split(".")
    for depth, name in enumerate(names):
        prefix = names[:depth]
        children = list(module.get_submodule(".".join(prefix)).named_children())
        position = [child for child, _ in children].index(name)
        yield from ((".".join([*prefix, child]), part) for child, part in children[position + 1 :])


def _is_norm(module: torch.nn.Module) -> bool:
    return "norm" in type(module).__name__.lower()


def _cut_layers(module: torch.nn.Module, stack: str, read: frozenset[int], component: str) -> None:
    """Drop the layers above the last hidden state that is read, and the final norm where none of them passes it.

    With n layers, `hidden_states` has n + 1 entries: the embeddings, then each layer's output; the last is taken after
    the final norm by most classes. So entry n of a model that really has more layers needs n layers and no norm.
    """
    layers = module.get_submodule(stack)
    assert isinstance(layers, torch.nn.ModuleList)
    count = len(layers)
    for entry in read:
        if not -count - 1 <= entry <= count:
            problem = f"has {count} layers, so it has no hidden state {entry}; this family cannot use it"
            raise ComponentFileError(f"{component}/config.json", problem)
    last = max(1, *(entry if entry >= 0 else count + 1 + entry for entry in read))  # entry 0 is the first one's input
    if last == count:
        return
    norms = [path for path, part in _after(module, stack) if _is_norm(part)]
    _replace(module, stack, layers[:last])
    for path in norms:
        _replace(module, path, torch.nn.Identity())
    names = stack.split(".")
    above = (module.get_submodule(".".join(names[:depth])) for depth in range(len(names)))
    recorder: Any = [each for each in above if is_transformers_model(type(each))][-1]
    recorder.config.tie_last_hidden_states = False  # or entry `last` would be what the library takes for the result
    recorder.register_forward_hook(_keep_length(last, count))
    module.register_forward_hook(_only_hidden_states)


def is_transformers_model(cls: type[object]) -> bool:
    """Return whether a class is a model of transformers."""
    from transformers import PreTrainedModel  # it takes seconds: not before a component is drawn

    return issubclass(cls, PreTrainedModel)


def _has_names(output: object) -> bool:
    from transformers.utils import ModelOutput

    return isinstance(output, ModelOutput)


def _keep_length(last: int, count: int) -> Any:
    """Fill the entries of layers that are not there with None, so that entries counted from the end stay the same."""

    def pad(_: torch.nn.Module, __: object, output: Any) -> Any:
        missing = (None,) * (count - last)
        if _has_names(output):
            if output.get("hidden_states") is not None:
                output["hidden_states"] = (*output["hidden_states"], *missing)
            return output
        return tuple(
            (*each, *missing) if isinstance(each, tuple) and len(each) == last + 1 else each for each in output
        )

    return pad


def _only_hidden_states(_: torch.nn.Module, __: object, output: Any) -> Any:
    """Leave out of a model's output what would have come from layers that are not there."""
    if not _has_names(output):
        return output
    kept = ("hidden_states", "attentions", "cache", "past_key_values")  # the last is the name before transformers 5.24
    return type(output)(**{name: value for name, value in output.items() if name in kept})
