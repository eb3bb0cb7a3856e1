"""Step caches of diffusers on a model that many requests use: what they remember is each request's own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from triptych.errors import UsageError

_PLACE = "triptych_step_cache"
"""The attribute of a module that holds its cache."""


class Memory:
    """What step caches remember of one request. It is gone when the request is: nothing else refers to it."""

    def __init__(self) -> None:
        self.states: dict[StepCache, list[dict[str, Any]]] = {}


class StepCache:
    """A step cache that is switched on for a module.

    diffusers keeps what a cache remembers in the module, by guidance branch; requests that take turns would read each
    other's. Here every request brings a memory of its own, which is in the module only while its forward runs.

    Args:
        config: diffusers' configuration of the cache.

    Raises:
        UsageError: diffusers cannot cache this kind of model.
    """

    def __init__(self, module: Any, config: Any) -> None:
        from diffusers.hooks.hooks import StateManager

        if not hasattr(module, "enable_cache"):
            raise UsageError(f"{type(module).__name__} has no step caches in diffusers")
        what = f"diffusers' {type(config).__name__} does not fit {type(module).__name__}"
        before = {id(hook) for hook in _hooks(module)}
        try:
            module.enable_cache(config)
        except (ValueError, IndexError) as error:
            raise UsageError(f"{what}: its blocks are none that diffusers knows") from error
        self._hooks = [hook for hook in _hooks(module) if id(hook) not in before]
        found = {
            id(each): each for hook in self._hooks for each in vars(hook).values() if isinstance(each, StateManager)
        }
        self._managers = list(found.values())
        if not self._managers:
            raise UsageError(f"{what}: it finds nothing in it to remember")
        # FLUX.2's first blocks return text and picture apart and its last ones joined: one less the other is nothing.
        blocks = [hook._metadata for hook in self._hooks if hasattr(hook, "_metadata")]
        if len({block.return_encoder_hidden_states_index is None for block in blocks}) > 1:
            raise UsageError(f"{what}: its first block returns other things than its last")
        setattr(module, _PLACE, self)

    @contextmanager
    def holding(self, memory: Memory) -> Iterator[None]:
        """Let the module remember what `memory` holds, and nothing after it."""
        states = memory.states.setdefault(self, [{} for _ in self._managers])
        for manager, state in zip(self._managers, states):
            manager._state_cache = state
        try:
            yield
        finally:
            for manager in self._managers:
                manager._state_cache = {}

    @contextmanager
    def bypassed(self) -> Iterator[None]:
        """Let the module run as if it had no cache."""
        references = [hook.fn_ref for hook in self._hooks if hook.fn_ref.original_forward is not None]
        caching = [reference.forward for reference in references]
        for reference in references:
            reference.forward = reference.original_forward
        try:
            yield
        finally:
            for reference, forward in zip(references, caching):
                reference.forward = forward


@contextmanager
def remembering(module: Any, memory: Memory | None) -> Iterator[None]:
    """Run a module with what one request's step cache remembers; with None past the cache, if it has one."""
    cache: StepCache | None = vars(module).get(_PLACE)
    if cache is None:
        yield
        return
    with cache.bypassed() if memory is None else cache.holding(memory):
        yield


def is_cached(module: Any) -> bool:
    """Return whether a step cache is switched on for a module."""
    return _PLACE in getattr(module, "__dict__", ())


def _hooks(module: Any) -> list[Any]:
    """List the hooks that diffusers has put on a module and its parts."""
    registries = (getattr(part, "_diffusers_hook", None) for part in module.modules())
    return [hook for registry in registries if registry is not None for hook in registry.hooks.values()]
