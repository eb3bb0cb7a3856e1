"""Where a LoRA's file is: beside the model's components, in a folder of this machine, or on the hub. Only safetensors."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import xxhash

from triptych.components.files import Files, FolderFiles, HubFiles
from triptych.components.headers import TensorInfo, read_header
from triptych.components.repository import Repository
from triptych.errors import ComponentFileError, ModelError, ParameterError, did_you_mean

SUFFIX = ".safetensors"
USUAL = "pytorch_lora_weights.safetensors"
"""What diffusers calls the file that it writes into a folder."""

_HUB = re.compile(r"([\w-][\w.-]*/[\w-][\w.-]*)(?:/(.+\.safetensors))?")
_BLOCK = 2**20
"""Bytes of a file that are hashed at a time."""
_TOLD = 8
"""Names that an error lists."""


@dataclass(frozen=True)
class Place:
    """Where one file is.

    Attributes:
        source: a folder, a hub id, or "" for the model's own repository.
        revision: the commit, of a hub id.
        file: the file's name there.
    """

    source: str
    revision: str | None
    file: str

    def files(self, repository: Repository) -> Files:
        """Return the files it is among."""
        if not self.source:
            return repository.files
        return FolderFiles(Path(self.source)) if self.revision is None else _hub(self.source, self.revision)

    def local(self, repository: Repository) -> Path:
        """Return the file's path on this machine; one on the hub is downloaded first.

        Raises:
            ComponentFileError: it is not here.
        """
        path = self.files(repository).local([self.file]) / self.file
        if not path.is_file():
            raise ComponentFileError(str(path), "there is no such file here: every role needs it under the same path")
        return path


def find(path: str, repository: Repository, folders: Sequence[Path] | None) -> Place:
    """Return the place that a request's `path` names.

    Args:
        folders: the only folders, beside the model's own, in which files may be named; None for any file, folder or
            hub id.

    Raises:
        ParameterError: there is none, or it may not be named.
    """
    if path in repository.loras():
        return Place("", None, path)
    if folders is not None:
        return _find_listed(path, repository, folders)
    if (place := _find_here(path)) is not None:
        return place
    hub = _HUB.fullmatch(path)
    if hub is not None and not hub[1].endswith(SUFFIX) and not Path(hub[1].partition("/")[0]).exists():
        return _find_on_hub(path, hub[1], hub[2])
    names = [*repository.loras(), *(str(each) for each in _siblings(path))]
    raise _missing(path, "a safetensors file, a folder with one, or a hub id", names)


def fingerprint(place: Place, repository: Repository) -> str:
    """Return what tells a file from others: a hash of its content, or of its commit.

    Raises:
        ComponentFileError: it cannot be read.
    """
    files = place.files(repository)
    if files.revision is not None:
        return xxhash.xxh3_64_hexdigest(f"{files.revision} {place.file}".encode())
    path = place.local(repository)
    try:
        stat = path.stat()
        return _hash(path, stat.st_mtime_ns, stat.st_size)
    except OSError as error:
        raise ComponentFileError(str(path), f"cannot be read: {error.strerror}") from error


def tensors(place: Place, repository: Repository) -> tuple[dict[str, TensorInfo], int]:
    """Return the tensors of a file by key, and its size in bytes, from its header alone.

    Raises:
        ComponentFileError: it is missing, damaged or no safetensors file.
    """
    files = place.files(repository)
    found, size = read_header(files, place.file)
    if len(files.read(place.file, size - 1, size + 1)) != 1:
        raise ComponentFileError(place.file, f"is truncated or damaged: it should have {size} bytes")
    return found, size


def _find_listed(path: str, repository: Repository, folders: Iterable[Path]) -> Place:
    """Find a file by comparing with what is there: no path that was sent is ever opened."""
    known: dict[str, Place] = {}
    for folder in folders:
        for pattern in (f"*{SUFFIX}", f"*/*{SUFFIX}", f"*/*/*{SUFFIX}"):
            for found in sorted(folder.glob(pattern)):
                place = Place(str(found.parent.resolve()), None, found.name)
                known.setdefault(found.relative_to(folder).as_posix(), place)
                known.setdefault(str(found), place)
    if path in known:
        return known[path]
    names = [*repository.loras(), *(name for name in known if not Path(name).is_absolute())]
    raise _missing(path, "a safetensors file in the model's folder or in one that the server was given", names)


def _find_here(path: str) -> Place | None:
    try:
        here = Path(path).expanduser()
        is_file, is_folder = here.is_file(), here.is_dir()
    except (OSError, ValueError, RuntimeError) as error:  # too long, a NUL byte, the home of an unknown user
        raise ParameterError("lora", path, f"this is no path: {error}") from None
    if is_file:
        if here.suffix != SUFFIX:
            raise ParameterError("lora", path, "only safetensors files are read: pickles may run code")
        return Place(str(here.parent.resolve()), None, here.name)
    if not is_folder:
        return None
    return Place(str(here.resolve()), None, _the_one(path, [each.name for each in sorted(here.glob(f"*{SUFFIX}"))]))


@lru_cache(maxsize=64)
def _find_on_hub(path: str, repo_id: str, file: str | None) -> Place:
    """Find a file on the hub; the commit that it was found at is kept to, also where the hub cannot be reached later."""
    try:
        files = HubFiles(repo_id, None)
        names = [name for name in files.list() if name.endswith(SUFFIX)]
    except ModelError as error:
        raise ParameterError("lora", path, f"there is no such file or folder here, and of the hub: {error}") from None
    if file is not None and file not in names:
        raise _missing(path, f"a safetensors file of {repo_id}", [f"{repo_id}/{name}" for name in names])
    name = file or _the_one(path, [name for name in names if "/" not in name])
    return Place(repo_id, files.revision, name)


def _the_one(path: str, names: Sequence[str]) -> str:
    """Return the file of a folder that is meant where none is named."""
    if USUAL in names:
        return USUAL
    if len(names) == 1:
        return names[0]
    has = f"it has {_list(names)}: name one of them" if names else "it has no safetensors file"
    raise ParameterError("lora", path, f"a folder with one safetensors file is accepted; {has}")


def _siblings(path: str) -> list[Path]:
    folder = Path(path).expanduser().parent
    return sorted(folder.glob(f"*{SUFFIX}"))[:100] if folder.is_dir() else []


def _missing(path: str, accepted: str, names: Sequence[str]) -> ParameterError:
    there = f"there is {_list(names)}" if names else "there is none"
    return ParameterError("lora", path, f"{accepted} is accepted; {there}{did_you_mean(path, names)}")


def _list(names: Sequence[str]) -> str:
    more = f" and {len(names) - _TOLD} more" if len(names) > _TOLD else ""
    return ", ".join(names[:_TOLD]) + more


@lru_cache(maxsize=64)
def _hash(path: Path, changed: int, size: int) -> str:
    """Return a hash of a whole file; it is read again once it has changed."""
    digest = xxhash.xxh3_64()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


@lru_cache(maxsize=64)
def _hub(repo_id: str, revision: str) -> HubFiles:
    return HubFiles(repo_id, revision)
