"""A model repository in the diffusers layout: its index, configurations and weight files. Opens no weights."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path, PurePosixPath

from triptych.components.files import Files, open_files
from triptych.components.headers import TensorInfo, read_header
from triptych.errors import ComponentFileError, ModelError, did_you_mean

log = logging.getLogger(__name__)

INDEX = "model_index.json"
_CONFIGS = (
    "config.json", "scheduler_config.json", "preprocessor_config.json", "processor_config.json", "tokenizer_config.json",
    "guider_config.json",
)  # fmt: skip
_STEMS = ("diffusion_pytorch_model", "model")
_UNSAFE = (".bin", ".pt", ".pth", ".ckpt", ".msgpack", ".h5", ".onnx", ".gguf")


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
    _headers: dict[str, tuple[dict[str, TensorInfo], int]] = field(default_factory=dict, repr=False)

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
        folders = {name.partition("/")[0] for name in sizes if "/" in name}
        components: dict[str, Entry] = {}
        options: dict[str, object] = {}
        for name, value in index.items():
            if name.startswith("_"):
                continue
            match value:
                case [str(library), str(class_name)]:
                    components[name] = Entry(name, library, class_name)
                case [None, None]:
                    pass
                case _ if name in folders or (
                    isinstance(value, list) and value[:1] in (["diffusers"], ["transformers"])
                ):
                    raise ComponentFileError(INDEX, f"entry {name!r} should be [library, class], not {value!r}")
                case _:
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
            ModelError: the repository has no such component.
        """
        if component not in self.components:
            raise ModelError(
                f"{self.name} has no component {component!r}{did_you_mean(component, self.components)}. "
                f"Its {INDEX} lists: {', '.join(self.components)}"
            )
        return self.components[component]

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
        for variant in dict.fromkeys((f".{self.variant}" if self.variant else "", "")):
            for stem in _STEMS:
                single = f"{component}/{stem}{variant}.safetensors"
                index = f"{component}/{stem}.safetensors.index{variant}.json"
                if single not in self._sizes and index not in self._sizes:
                    continue
                if self.variant and not variant:
                    log.warning(
                        "%s has no %r files for %s: its plain ones are used", self.name, self.variant, component
                    )
                # Where there are both, diffusers takes the shards and transformers the single file.
                if index in self._sizes and (stem == _STEMS[0] or single not in self._sizes):
                    return self._shards(component, index)
                return [single]
        return []

    def variants_hint(self, component: str) -> str:
        """Return what to add to the complaint that a component has no weight file, if it has some of a variant."""
        stems = "|".join(_STEMS)
        names = self._others(component, ".safetensors")
        found = {match[1] for name in names if (match := re.search(rf"/(?:{stems})\.([^.-]+)[^/]*$", name))}
        found -= {"safetensors"}
        return f", except in variant {' or '.join(map(repr, sorted(found)))} (pass variant=)" if found else ""

    def unsafe_weight_files(self, component: str) -> list[str]:
        """Return the weight files of a component that are not safetensors."""
        return [name for suffix in _UNSAFE for name in self._others(component, suffix)]

    def tensors(self, component: str) -> dict[str, TensorInfo]:
        """Return the tensors of a component's safetensors files, by key, from the headers alone.

        Raises:
            ComponentFileError: a file is missing or its header is broken.
        """
        found: dict[str, TensorInfo] = {}
        for name in self.weight_files(component):
            found |= self._header(name)[0]
        return found

    def loras(self) -> list[str]:
        """Return the safetensors files beside the components that have `lora` in their names."""
        paths = [PurePosixPath(name) for name in self._sizes]
        return [
            str(path)
            for path in paths
            if path.suffix == ".safetensors" and "lora" in path.stem.lower() and path.parts[0] not in self.components
        ]

    def header(self, name: str) -> dict[str, TensorInfo]:
        """Return the tensors of a safetensors file, by key, from its header alone.

        Raises:
            ComponentFileError: it is no such file, or its header is broken.
        """
        return self._header(name)[0]

    def has_tokenizer(self, component: str) -> bool:
        """Return whether a tokenizer lies in a component's folder, by itself or as part of a processor."""
        return f"{component}/tokenizer_config.json" in self._sizes

    def stored_bytes(self, component: str) -> int:
        """Return the bytes of a component's files that hold weights in the chosen variant, as far as they are here."""
        try:
            names = self.weight_files(component) or self.unsafe_weight_files(component)
        except ComponentFileError:
            names = self._others(component, ".safetensors")
        return sum(self._sizes[name] for name in names)

    def check_complete(self, component: str, names: Iterable[str] | None = None) -> None:
        """Check that weight files of a component (by default all) are as long as their headers say.

        Raises:
            ComponentFileError: one is not.
        """
        for name in self.weight_files(component) if names is None else names:
            _, size = self._header(name)
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
        """A short hash of index, configurations and weight sizes (from the hub: of the commit), to tell models apart."""
        import xxhash

        if self.files.revision:
            return xxhash.xxh3_64(self.files.revision.encode()).hexdigest()
        names = [INDEX, *(f"{component}/{config}" for component in sorted(self.components) for config in _CONFIGS)]
        configs = {name: _object(self.files, name) for name in names if name in self._sizes}
        weights = {name: size for name, size in self._sizes.items() if name.endswith((".safetensors", *_UNSAFE))}
        return xxhash.xxh3_64(json.dumps([configs, weights], sort_keys=True).encode()).hexdigest()

    def _header(self, name: str) -> tuple[dict[str, TensorInfo], int]:
        if name not in self._headers:
            self._headers[name] = read_header(self.files, name)
        return self._headers[name]

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
