"""Adapters: the LoRAs that a process's components hold, loaded once and on only for the requests that ask."""

from __future__ import annotations

import logging
import time
import warnings
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from types import SimpleNamespace
from typing import Any

from triptych.components import lora_files
from triptych.components.hollow import is_hollow
from triptych.components.lora import MOST, Lora, check_peft, loadable, of_component
from triptych.components.repository import Repository
from triptych.errors import ComponentFileError

log = logging.getLogger(__name__)


class Adapters:
    """The components of a model that LoRAs can change. Each belongs to one role, so that one thread at a time uses it.

    Args:
        components: the model's, by name; those that the pipeline's loader cannot change are left alone.
        most: adapters that a component holds; the least recently used go first.
    """

    def __init__(
        self, oracle: type[Any], repository: Repository, components: Mapping[str, Any], most: int = MOST
    ) -> None:
        self._by_name = {
            name: _Adapted(oracle, repository, name, components[name], most)
            for name in loadable(oracle)
            if name in components and not is_hollow(components[name])
        }

    def use(self, components: Iterable[str], loras: Sequence[Lora]) -> None:
        """Let components compute with these LoRAs, as far as those change them, and with no others.

        Raises:
            UsageError: PEFT, which makes a LoRA's layers, is not installed.
            ComponentFileError: a file is missing, is another one than was admitted, or does not fit.
        """
        for name in components:
            if (adapted := self._by_name.get(name)) is not None:
                adapted.use(of_component(name, loras))

    def load(self, component: str, loras: Sequence[Lora]) -> None:
        """Load what LoRAs change in a component without letting it compute with them, so that problems come early.

        Raises:
            UsageError, ComponentFileError: as `use`.
        """
        if (adapted := self._by_name.get(component)) is not None:
            adapted.load(of_component(component, loras))

    def active(self, components: Iterable[str]) -> tuple[tuple[str, float], ...]:
        """Return the adapters, and their scales, that components compute with."""
        return tuple(each for name in components if name in self._by_name for each in self._by_name[name].active or ())

    def held(self) -> dict[str, list[str]]:
        """Return the adapters of each component, the least recently used first."""
        return {name: list(adapted.held) for name, adapted in self._by_name.items()}


class _Adapted:
    """One component, its adapters, and which of them are on."""

    def __init__(self, oracle: type[Any], repository: Repository, name: str, module: Any, most: int) -> None:
        self.oracle = oracle
        self.repository = repository
        self.name = name
        self.module = module
        self.most = most
        self.held: OrderedDict[str, None] = OrderedDict()
        self.active: tuple[tuple[str, float], ...] | None = ()  # None: not known, after something went wrong
        self._changed = False  # whether it has such layers, be it that all their adapters have gone again

    def use(self, loras: Sequence[Lora]) -> None:
        scales: dict[str, float] = {}
        for each in loras:  # the same one may be a request's and a stage's
            scales[each.adapter] = scales.get(each.adapter, 0.0) + each.scale
        wanted = tuple(scales.items())
        if wanted != self.active:
            self.load(loras)
            self._switch(wanted)

    def load(self, loras: Sequence[Lora]) -> None:
        """Give the component the layers of LoRAs that it has not; whatever is on stays on."""
        before = self.active
        missing = [each for each in loras if each.adapter not in self.held]
        if missing:
            self.active = None
            try:
                for each in missing:
                    self._make_room(keep={other.adapter for other in loras})
                    self._load(each)
            finally:
                self._switch(tuple(each for each in before or () if each[0] in self.held))
        for each in loras:
            self.held.move_to_end(each.adapter)

    def _switch(self, wanted: tuple[tuple[str, float], ...]) -> None:
        from diffusers.utils import set_adapter_layers, set_weights_and_activate_adapters

        self.active = None
        if wanted:
            set_weights_and_activate_adapters(self.module, [name for name, _ in wanted], [scale for _, scale in wanted])
        if self._changed:
            set_adapter_layers(self.module, enabled=bool(wanted))
        self.active = wanted

    def _make_room(self, keep: set[str]) -> None:
        while len(self.held) >= self.most:
            oldest = next((name for name in self.held if name not in keep), None)
            if oldest is None:
                return
            del self.held[oldest]
            self._delete(oldest)
            log.info("%s: let go of adapter %s", self.name, oldest)

    def _delete(self, adapter: str) -> None:
        from diffusers.utils import delete_adapter_layers

        if hasattr(self.module, "delete_adapters"):  # a model of diffusers; it looks after offloading too
            self.module.delete_adapters(adapter)
        else:
            delete_adapter_layers(self.module, adapter)

    def _load(self, lora: Lora) -> None:
        from triptych.components.blueprint import building
        from triptych.components.context_parallel import undivided

        check_peft()
        began = time.perf_counter()
        path = lora.place.local(self.repository)
        if lora_files.fingerprint(lora.place, self.repository) != lora.fingerprint:
            problem = "is another file than the request was checked with: every role needs the same under this path"
            raise ComponentFileError(str(path), problem)
        options: dict[str, Any] = {"load_into_transformer_2": True} if self.name == "transformer_2" else {}
        self._changed = True
        _leave_unsaid()
        with building, undivided(self.module):
            try:
                _loader(self.oracle, self.name, self.module).load_lora_weights(
                    str(path.parent),
                    weight_name=path.name,
                    adapter_name=lora.adapter,
                    use_safetensors=True,  # or diffusers would go on to pickles
                    local_files_only=True,
                    **options,
                )
            except Exception as error:  # diffusers, PEFT and safetensors raise anything on files that do not fit
                self._delete(lora.adapter)
                problem = f"is no LoRA that fits the {self.name} ({type(error).__name__}: {error})"
                raise ComponentFileError(lora.file, problem) from error
        self.held[lora.adapter] = None
        log.info("%s: loaded for the %s in %.2f s", lora.file, self.name, time.perf_counter() - began)


_WIDENING = "_maybe_expand_transformer_param_shape_or_error_"
"""The method of FLUX.1's loader that makes a model's layers wider, for LoRAs that are: the model is others', too."""


@cache
def _leave_unsaid() -> None:
    """Silence PEFT's warnings of what is meant here: several adapters, and that one in use is deleted."""
    for message in ("Already found a `peft_config` attribute", "Adapter .* was active which is now deleted"):
        warnings.filterwarnings("ignore", message=message, category=UserWarning)


def _loader(oracle: type[Any], component: str, module: Any) -> Any:
    """Return a pipeline of the oracle's class that loads LoRAs into one component and leaves the others alone.

    Its own `load_lora_weights` runs, with all that it does to a file; the rest of the pipeline is in other processes.
    """
    prefix = "transformer." if component == "transformer_2" else f"{component}."
    absent = SimpleNamespace(config=SimpleNamespace(image_dim=None))  # what Wan's loader asks of a transformer

    def mine(cls: Any, *args: Any, **kwargs: Any) -> Any:
        loaded = oracle.lora_state_dict.__func__(cls, *args, **kwargs)
        weights, *rest = loaded if isinstance(loaded, tuple) else (loaded,)
        kept = {key: value for key, value in weights.items() if key.startswith(prefix)}
        return (kept, *rest) if isinstance(loaded, tuple) else kept

    def only_present(method: str, argument: str) -> Any:
        load = getattr(oracle, method).__func__

        def into(cls: Any, *args: Any, **kwargs: Any) -> None:
            if kwargs[argument] is module:
                load(cls, *args, **kwargs)

        return classmethod(into)

    methods = {"load_lora_into_transformer": "transformer", "load_lora_into_text_encoder": "text_encoder"}
    members: dict[str, Any] = {
        name: only_present(name, argument) for name, argument in methods.items() if hasattr(oracle, name)
    }
    members["lora_state_dict"] = classmethod(mine)
    if hasattr(oracle, _WIDENING):
        members[_WIDENING] = classmethod(lambda *_, **__: False)
    members["components"] = property(lambda self: {component: module})
    pipeline: Any = object.__new__(type(oracle.__name__, (oracle,), members))
    for name in loadable(oracle):
        object.__setattr__(pipeline, name, module if name == component else absent)
    return pipeline
