"""A model repository in the diffusers layout: its index, configurations and weight files. Opens no weights."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path, PurePosixPath

from triptych.components.files import Files, open_files
from triptych.components.headers import TensorInfo, read_header
from triptych.errors import ComponentFileError, ModelError, did_you_mean

log = logging.getLogger(__name__)

INDEX = "model_index.json"
_CONFIGS = ("config.json", "scheduler_config.json", "preprocessor_config.json", "tokenizer_config.json")
_STEMS = ("diffusion_pytorch_model", "model")
_UNSAFE = (".bin", ".pt", ".pth", ".ckpt", ".msgpack", ".h5", ".onnx", ".gguf")
LIBRARIES = ("diffusers", "transformers")
"""The libraries whose classes a repository may name. Code that ships inside a repository is never run."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One component as `model_index.json` lists it."""

    name: str
    library: str
    class_name: str


@dataclass
class Repository:
    """One model repository, at one revision.

    Attributes:
        family: the pipeline class of `model_index.json`.
        components: the components it has, by name (absent optional ones are left out).
        options: the pipeline's own options (`is_distilled`, `boundary_ratio`, ...).
        defaults: better request defaults for this model, from `triptych.json`.
    """

    files: Files
    variant: str | None
    family: str
    components: dict[str, Entry]
    options: dict[str, object]
    defaults: dict[str, object]
    _sizes: dict[str, int] = field(repr=False)
    _tensors: dict[str, dict[str, TensorInfo]] = field(default_factory=dict, repr=False)

    @classmethod
    def open(cls, source: str | Path, *, revision: str | None = None, variant: str | None = None) -> Repository:
        """Open a local folder or a hub repository.

        Raises:
            ModelError: there is no such repository, or it is not in the diffusers layout.
            ComponentFileError: its index is broken.
        """
        files = open_files(source, revision)
        sizes = files.list()
        if INDEX not in sizes:
            raise ModelError(f"{files.name} has no {INDEX}: it is not a model in the diffusers layout")
        index = _object(files, INDEX)
        family = index.pop("_class_name", None)
        if not isinstance(family, str):
            raise ComponentFileError(INDEX, "names no pipeline class (`_class_name`)")
        components: dict[str, Entry] = {}
        options: dict[str, object] = {}
        for name, value in index.items():
            if name.startswith("_"):
                continue
            if isinstance(value, list) and len(value) == 2 and all(part is None or isinstance(part, str) for part in value):
                if value[0] is not None and value[1] is not None:
                    components[name] = Entry(name, value[0], value[1])
            elif isinstance(value, list) and len(value) == 2 and isinstance(value[1], (list, dict)):
                raise ComponentFileError(INDEX, f"entry {name!r} should be [library, class], not {value!r}")
            else:
                options[name] = value
        if not components:
            raise ComponentFileError(INDEX, "lists no components")
        defaults = _object(files, "triptych.json").get("defaults", {}) if "triptych.json" in sizes else {}
        if not isinstance(defaults, dict):
            raise ComponentFileError("triptych.json", "`defaults` should be an object of request parameters")
        return cls(files, variant, family, components, options, defaults, sizes)

    @property
    def name(self) -> str:
        return self.files.name

    def entry(self, component: str) -> Entry:
        """Return a component's entry in the index.

        Raises:
            ModelError: the repository has no such component, or its class comes from a library that is not trusted.
        """
        if component not in self.components:
            raise ModelError(
                f"{self.name} has no component {component!r}{did_you_mean(component, self.components)}. "
                f"Its {INDEX} lists: {', '.join(self.components)}"
            )
        entry = self.components[component]
        if entry.library not in LIBRARIES:
            raise ModelError(
                f"component {component!r} of {self.name} is a class of {entry.library!r}; only classes of "
                f"{' and '.join(LIBRARIES)} are loaded, never code that comes with a model"
            )
        return entry

    def config(self, component: str) -> dict[str, object]:
        """Return a component's configuration.

        Raises:
            ComponentFileError: it has none, or it is not a JSON object.
        """
        for name in _CONFIGS:
            if f"{component}/{name}" in self._sizes:
                return _object(self.files, f"{component}/{name}")
        raise ComponentFileError(f"{component}/config.json", f"is missing from {self.name}")

    def weight_files(self, component: str) -> list[str]:
        """Return the safetensors files of a component in the chosen variant, or none if it has no such file.

        A component without files of the variant gives its plain ones, as in diffusers; the log says so.

        Raises:
            ComponentFileError: a shard that the index names is missing.
        """
        transformers = component in self.components and self.components[component].library == "transformers"
        stems = reversed(_STEMS) if transformers else _STEMS
        candidates = [(stem, suffix) for suffix in {f".{self.variant}" if self.variant else "": 0, "": 0} for stem in stems]
        for stem, suffix in candidates:
            index = f"{component}/{stem}.safetensors.index{suffix}.json"
            single = f"{component}/{stem}{suffix}.safetensors"
            if (index in self._sizes or single in self._sizes) and self.variant and not suffix:
                log.warning("%s has no %r files for %s: its plain ones are used", self.name, self.variant, component)
            if index in self._sizes:
                return self._shards(component, index)
            if single in self._sizes:
                return [single]
        return []

    def unsafe_weight_files(self, component: str) -> list[str]:
        """Return the weight files of a component that are not safetensors."""
        return [name for suffix in _UNSAFE for name in self._others(component, suffix)]

    def tensors(self, component: str) -> dict[str, TensorInfo]:
        """Return the tensors of a component's safetensors files, by key, from the headers alone.

        Raises:
            ComponentFileError: a file is missing or its header is broken.
        """
        if component not in self._tensors:
            found: dict[str, TensorInfo] = {}
            for name in self.weight_files(component):
                found |= read_header(self.files, name)[0]
            self._tensors[component] = found
        return self._tensors[component]

    def check_complete(self, component: str, names: Iterable[str] | None = None) -> None:
        """Check that weight files of a component (by default all) are as long as their headers say.

        Raises:
            ComponentFileError: one is not.
        """
        for name in self.weight_files(component) if names is None else names:
            _, size = read_header(self.files, name)
            if self._sizes[name] != size:
                raise ComponentFileError(name, f"is truncated or damaged: {self._sizes[name]} bytes instead of {size}")

    def local(self, component: str, *, weights: list[str] | None = None) -> Path:
        """Make a component's files present on this machine and return its folder.

        Args:
            weights: the weight files to bring; None for all of the chosen variant.
        """
        wanted = self.weight_files(component) or self.unsafe_weight_files(component) if weights is None else weights
        small = [
            name
            for name in self._sizes
            if PurePosixPath(name).parts[0] == component and not name.endswith((".safetensors", *_UNSAFE))
        ]
        return self.files.local([*small, *wanted]) / component

    @cached_property
    def fingerprint(self) -> str:
        """A short hash of index, configurations and weight sizes: equal on every machine that has the same model."""
        import xxhash

        digest = xxhash.xxh3_64()
        for name in (INDEX, *sorted(self._configs())):
            digest.update(json.dumps([name, _object(self.files, name)], sort_keys=True).encode())
        if self.files.revision:
            digest.update(self.files.revision.encode())
        else:
            sizes = {name: size for name, size in self._sizes.items() if name.endswith((".safetensors", *_UNSAFE))}
            digest.update(json.dumps(sizes, sort_keys=True).encode())
        return digest.hexdigest()

    def _configs(self) -> list[str]:
        names = (f"{component}/{config}" for component in self.components for config in _CONFIGS)
        return [name for name in names if name in self._sizes]

    def _others(self, component: str, suffix: str) -> list[str]:
        return [name for name in self._sizes if name.startswith(f"{component}/") and name.endswith(suffix)]

    def _shards(self, component: str, index: str) -> list[str]:
        weight_map = _object(self.files, index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ComponentFileError(index, "has no `weight_map`")
        shards = sorted({f"{component}/{shard}" for shard in weight_map.values()})
        for shard in shards:
            if shard not in self._sizes:
                raise ComponentFileError(shard, f"is missing, but {index} names it")
        return shards


def _object(files: Files, name: str) -> dict[str, object]:
    """Read a JSON object."""
    try:
        value = json.loads(files.read(name))
    except (ValueError, RecursionError) as error:
        raise ComponentFileError(name, f"is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ComponentFileError(name, f"should hold a JSON object, not a {type(value).__name__}")
    return value

