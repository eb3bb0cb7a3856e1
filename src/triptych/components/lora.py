"""LoRAs that a request names: checked by their headers, before any weight is touched."""

from __future__ import annotations

import logging
import math
import threading
from collections import OrderedDict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from triptych.components import lora_files
from triptych.components.headers import TensorInfo
from triptych.components.lora_files import Place
from triptych.components.repository import Repository
from triptych.errors import ComponentFileError, ParameterError, UsageError, did_you_mean

log = logging.getLogger(__name__)

MOST = 8
"""LoRAs of one request, and adapters that a component holds at a time."""

_SECOND = "transformer_2"
"""The component that diffusers loads a LoRA into only where told to: Wan 2.2's transformer of the late steps."""
_KEYS = ("path", "scale", "component")
_ACCEPTED = 'a list of {"path": ..., "scale": 1.0} is accepted'
_HEAVIEST = 1e6  # beyond it no scale has a meaning
_REMEMBERED = 64
"""Files of which is known what they change."""


@dataclass(frozen=True)
class Lora:
    """One LoRA of an admitted request.

    Attributes:
        source, revision, file: where it is, see `Place`.
        scale: its weight.
        components: what it changes.
        fingerprint: of the file; a role that finds another file there refuses it.
    """

    source: str
    revision: str | None
    file: str
    scale: float
    components: tuple[str, ...]
    fingerprint: str

    @property
    def place(self) -> Place:
        """Where its file is."""
        return Place(self.source, self.revision, self.file)

    @property
    def adapter(self) -> str:
        """What the libraries call it: no dot may be in it."""
        return f"lora_{self.fingerprint}{'_second' if self.components == (_SECOND,) else ''}"

    def to_field(self) -> dict[str, Any]:
        """Return it as plain values, for the state."""
        return {**asdict(self), "components": list(self.components)}

    @classmethod
    def from_field(cls, value: Mapping[str, Any]) -> Lora:
        """Return what `to_field` was made of."""
        return cls(**{**value, "components": tuple(value["components"])})


def loadable(oracle: type[Any]) -> tuple[str, ...]:
    """Return the components that a pipeline's loader can change; none where it has no loader."""
    return tuple(getattr(oracle, "_lora_loadable_modules", ())) if hasattr(oracle, "load_lora_weights") else ()


def check_peft() -> None:
    """Check that what makes a LoRA's layers is installed.

    Raises:
        UsageError: it is not.
    """
    from diffusers.utils import MIN_PEFT_VERSION, USE_PEFT_BACKEND

    if not USE_PEFT_BACKEND:
        needed = f"a LoRA needs PEFT {MIN_PEFT_VERSION} or newer, which is not installed"
        raise UsageError(f'{needed}; to get it, wherever a role runs: pip install "triptych[lora]"')


class LoraDesk:
    """Admits the LoRAs of requests to one model, and remembers what it has seen of files that did not change."""

    def __init__(self, oracle: type[Any], repository: Repository) -> None:
        self.oracle = oracle
        self.repository = repository
        self.loadable = tuple(name for name in loadable(oracle) if name in repository.components)
        self._seen: OrderedDict[object, tuple[tuple[str, ...], str]] = OrderedDict()
        self._lock = threading.Lock()  # a server admits several requests at a time

    def settle(self, value: object, folders: Sequence[Path] | None) -> list[dict[str, Any]]:
        """Return the LoRAs that a request's `lora` names, as plain values for its state.

        Args:
            folders: where files may be, beside the model's own folder; None for anywhere, and for hub ids.

        Raises:
            ParameterError: one is not accepted.
            UsageError: PEFT is not installed.
        """
        if not value:
            return []
        if not isinstance(value, (list, tuple)) or not all(isinstance(each, Mapping) for each in value):
            raise ParameterError("lora", value, _ACCEPTED)
        if len(value) > MOST:
            raise ParameterError("lora", f"{len(value)} LoRAs", f"at most {MOST} are accepted")
        found = [self._settle(each, folders) for each in value]
        for number, one in enumerate(found):
            if any(one.adapter == other.adapter for other in found[:number]):
                raise ParameterError("lora", str(value[number]["path"]), "it is named twice: add up its scales")
        return [each.to_field() for each in found]

    def _settle(self, given: Mapping[str, Any], folders: Sequence[Path] | None) -> Lora:
        for key in given:
            if key not in _KEYS:
                raise ParameterError("lora", dict(given), f"{_ACCEPTED}{did_you_mean(str(key), _KEYS)}")
        path, scale, component = given.get("path"), given.get("scale"), given.get("component")
        scale = 1.0 if scale is None else scale
        if not isinstance(path, (str, Path)) or not str(path):
            raise ParameterError("lora", path, f"the path of a file is missing: {_ACCEPTED}")
        if isinstance(scale, bool) or not isinstance(scale, (int, float)) or not abs(scale) < _HEAVIEST:
            raise ParameterError("lora", scale, f"a number is accepted as the scale of {str(path)!r}")
        if component is not None and (component not in self.loadable or component not in ("transformer", _SECOND)):
            choices = [name for name in self.loadable if name in ("transformer", _SECOND)]
            accepted = f"the component that {str(path)!r} is loaded into is one of {', '.join(choices)}"
            raise ParameterError("lora", component, f"{accepted}{did_you_mean(str(component), choices)}")
        place = lora_files.find(str(path), self.repository, folders)
        return self.admit(place, float(scale), second=component == _SECOND, told=str(path))

    def admit(self, place: Place, scale: float, *, second: bool = False, field: str = "lora", told: str) -> Lora:
        """Check a file by its header, and return the LoRA that it is.

        Args:
            second: whether it is to be loaded into the second transformer.
            field, told: the parameter and the value that an error names.

        Raises:
            ParameterError: it is no LoRA that fits the model.
            UsageError: PEFT is not installed.
        """
        check_peft()
        try:
            path = place.local(self.repository) if place.files(self.repository).revision is None else None
            stat = None if path is None else path.stat()
            key = (place, second, None if stat is None else (stat.st_mtime_ns, stat.st_size))
            seen = self._seen.get(key)
            if seen is None:
                header, _ = lora_files.tensors(place, self.repository)
                changed = self._changes(header, _SECOND if second else None)
                seen = changed, lora_files.fingerprint(place, self.repository)
                with self._lock:
                    self._seen[key] = seen
                    if len(self._seen) > _REMEMBERED:
                        self._seen.popitem(last=False)
        except _Unfit as reason:
            raise ParameterError(field, told, str(reason)) from None
        except (ComponentFileError, OSError) as error:
            raise ParameterError(field, told, f"the file cannot be used: {error}") from None
        return Lora(place.source, place.revision, place.file, scale, *seen)

    def _changes(self, header: Mapping[str, TensorInfo], target: str | None) -> tuple[str, ...]:
        """Return the components that a file changes.

        Raises:
            _Unfit: it is no LoRA, or does not fit.
        """
        layers = self._layers(header)
        whole = f"a LoRA of {self.repository.family}'s {' or '.join(self.loadable)} is accepted"
        if not layers or (odd := next((key for key in layers if "lora" not in key), None)) is not None:
            what = f"this file has the tensor {odd!r}" if layers else "this file has no tensors"
            raise _Unfit(f"{whole}; {what}, which is none")
        by_component = {name: _of(name, layers) for name in self.loadable if name != _SECOND}
        changed = {name: mine for name, mine in by_component.items() if mine}
        if not changed or (target is not None and "transformer" not in changed):
            raise _Unfit(f"{whole}; this file changes {next(iter(layers))!r}")
        if ignored := len(layers) - sum(map(len, changed.values())):
            log.warning("of a LoRA %d tensors are ignored: they are of no component that it can change", ignored)
        if target is not None:
            changed = {target: changed["transformer"]}
        for name, mine in changed.items():
            self._check_shapes(name, mine)
        return tuple(changed)

    def _layers(self, header: Mapping[str, TensorInfo]) -> dict[str, tuple[int, ...]]:
        """Return a file's tensors under diffusers' names, with their shapes: converted by the pipeline's own loader."""
        import torch
        from torch.overrides import TorchFunctionMode

        class Unread(TorchFunctionMode):
            """Lets a conversion ask what tensors hold that have none: it is one, and no condition on it is met."""

            def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                if function in (torch.Tensor.item, torch.Tensor.__bool__) and args[0].is_meta:
                    return 1.0 if function is torch.Tensor.item else False
                return function(*args, **kwargs or {})

        try:
            # Those of one element, such as alphas, are read by the conversion; the others have shapes only.
            blank = {
                key: torch.ones(each.shape) if math.prod(each.shape) == 1 else torch.empty(each.shape, device="meta")
                for key, each in header.items()
            }
            with Unread():  # Kohya's: whether a block of zeros may be left out, and the alpha that a file has not
                converted: Mapping[str, torch.Tensor] = self.oracle.lora_state_dict(blank)
        except Exception as error:  # noqa: BLE001 (diffusers raises anything on layouts that it does not know)
            problem = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            raise _Unfit(
                f"this file is no LoRA that diffusers knows for {self.repository.family} ({problem})"
            ) from None
        return {key: tuple(each.shape) for key, each in converted.items()}

    def _check_shapes(self, component: str, layers: Mapping[str, tuple[int, ...]]) -> None:
        """Compare a LoRA's layers with those of a component, by its weights' headers, as far as they have those names.

        Raises:
            _Unfit: a layer has another size, or none is there.
        """
        try:
            stored = self.repository.tensors(component)
        except ComponentFileError:  # its weights are where the role that runs it is, which finds out what does not fit
            return
        # Quantised weights lie there in other shapes.
        weights = {key: each.shape for key, each in stored.items() if each.dtype.startswith(("F", "BF"))}
        names = {key.rpartition(".lora_")[0] for key in layers if ".lora_A." in key or ".lora_B." in key}
        known = {name: shape for name in names if (shape := weights.get(f"{name}.weight")) is not None}
        pads = hasattr(self.oracle, "_maybe_expand_lora_state_dict")  # a narrower LoRA is filled up with zeros
        for name, shape in sorted(known.items()):
            down, up = (layers.get(f"{name}.lora_{side}.weight") for side in "AB")
            if down is None or up is None:
                raise _Unfit(f"this file has only one half of the layer {name!r} of the {component}")
            if min(map(len, (shape, down, up))) < 2:
                raise _Unfit(f"this file does not fit the {component}: {name!r} is no layer that a LoRA can change")
            narrower = pads and len(shape) == 2 and down[1:] < shape[1:]
            if down[1] != shape[1] and not narrower or up[0] != shape[0]:
                sizes = f"{down[1]} to {up[0]}, of the model {shape[1]} to {shape[0]}"
                raise _Unfit(f"this file does not fit the {component}: its layer {name!r} goes from {sizes}")
            if down[0] != up[1]:
                raise _Unfit(
                    f"this file is broken: layer {name!r} has rank {down[0]} on one side, {up[1]} on the other"
                )
        if component.startswith("transformer") and stored and names:
            missing = sorted(name for name in names if f"{name}.weight" not in stored)
            if len(missing) == len(names):
                raise _Unfit(f"this file does not fit the {component}, which has no layer {missing[0]!r}")
            if missing:
                log.warning("a LoRA names %d layers that the %s has not: %s", len(missing), component, missing[0])


class _Unfit(Exception):
    """A file is no LoRA of the model; the message says why."""


def _of(component: str, layers: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    prefix = f"{component}."
    return {key.removeprefix(prefix): shape for key, shape in layers.items() if key.startswith(prefix)}


def read(value: Iterable[Mapping[str, Any]] | None) -> tuple[Lora, ...]:
    """Return the LoRAs of a state's field."""
    return tuple(Lora.from_field(each) for each in value or ())


def of_component(component: str, loras: Collection[Lora]) -> tuple[Lora, ...]:
    """Return those that change a component, in order."""
    return tuple(each for each in loras if component in each.components)
