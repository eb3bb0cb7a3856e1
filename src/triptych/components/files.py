"""Where a repository's files are: a local folder or the hub. Reads names, small files and byte ranges."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

from triptych.errors import ComponentFileError, ModelError


class Files(Protocol):
    """The files of one repository. Names are relative, with `/`."""

    name: str
    revision: str | None
    """The commit the files belong to, where there is one."""

    def list(self) -> dict[str, int]:
        """Return every file's name and its size in bytes."""
        ...

    def read(self, name: str, start: int = 0, stop: int | None = None) -> bytes:
        """Return the bytes `start:stop` of a file."""
        ...

    def local(self, names: Iterable[str]) -> Path:
        """Make the named files present on this machine; return the folder they are in."""
        ...


class FolderFiles:
    """The files of a local folder."""

    revision = None

    def __init__(self, root: Path) -> None:
        self.root = root
        self.name = str(root)

    def list(self) -> dict[str, int]:
        found: dict[str, int] = {}
        for folder, _, names in os.walk(self.root):
            relative = Path(folder).relative_to(self.root)
            for name in names:
                path = Path(folder, name)
                if path.is_file():
                    found[(relative / name).as_posix()] = path.stat().st_size
        return found

    def read(self, name: str, start: int = 0, stop: int | None = None) -> bytes:
        try:
            with open(self.root / name, "rb") as file:
                file.seek(start)
                return file.read() if stop is None else file.read(stop - start)
        except OSError as error:
            raise ComponentFileError(name, f"cannot be read: {error.strerror}") from error

    def local(self, names: Iterable[str]) -> Path:
        return self.root


class HubFiles:
    """The files of a repository on the hub, at one revision. Only what is asked for is downloaded."""

    def __init__(self, repo_id: str, revision: str | None) -> None:
        from huggingface_hub import HfApi
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

        self.name = repo_id
        self._sizes: dict[str, int]
        try:
            info = HfApi().model_info(repo_id, revision=revision, files_metadata=True)
        except HFValidationError as error:
            raise ModelError(
                f"{repo_id!r} is neither a folder nor a hub id (owner/name); is the path misspelled?"
            ) from error
        except OfflineModeIsEnabled:
            self._from_cache(revision)
        except (HfHubHTTPError, OSError) as error:
            try:
                self._from_cache(revision)
            except ModelError:
                raise ModelError(f"{repo_id!r} is not a folder, and the hub answered: {error}") from error
        else:
            self.revision: str | None = info.sha
            self._sizes = {file.rfilename: file.size or 0 for file in info.siblings or ()}

    def _from_cache(self, revision: str | None) -> None:
        """List what an earlier download left in the hub's cache."""
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import LocalEntryNotFoundError

        try:
            folder = Path(snapshot_download(self.name, revision=revision, local_files_only=True))
        except LocalEntryNotFoundError as error:
            raise ModelError(f"{self.name!r} is not a folder, not in the hub's cache, and the hub is offline") from error
        self._sizes = FolderFiles(folder).list()
        self.revision = folder.name

    def list(self) -> dict[str, int]:
        return self._sizes

    def read(self, name: str, start: int = 0, stop: int | None = None) -> bytes:
        from huggingface_hub import HfFileSystem, try_to_load_from_cache

        cached = try_to_load_from_cache(self.name, name, revision=self.revision)
        if isinstance(cached, str):
            return FolderFiles(Path(cached).parent).read(Path(cached).name, start, stop)
        if start == 0 and stop is None:
            return FolderFiles(self.local([name])).read(name)
        path = f"{self.name}@{self.revision}/{name}"
        try:
            return bytes(HfFileSystem().cat_file(path, start=start, end=stop))
        except (OSError, ValueError) as error:
            raise ComponentFileError(name, f"cannot be read from the hub: {error}") from error

    def local(self, names: Iterable[str]) -> Path:
        from huggingface_hub import snapshot_download

        wanted = sorted(set(names))
        return Path(snapshot_download(self.name, revision=self.revision, allow_patterns=wanted))


def open_files(source: str | Path, revision: str | None = None) -> Files:
    """Return the files of a local folder if `source` is one, else of the hub repository of that id.

    Raises:
        ModelError: neither exists.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        return FolderFiles(path)
    if path.exists():
        raise ModelError(f"{source} is a file; a model is a folder with a model_index.json, or a hub id (owner/name)")
    if not isinstance(source, str) or str(source).startswith((".", "/", "~")):
        raise ModelError(f"{source}: no such folder")
    return HubFiles(source, revision)
