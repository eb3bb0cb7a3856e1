"""Where a repository's files are: a local folder or the hub. Reads names, small files and byte ranges."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from triptych.errors import ComponentFileError, ModelError

_INDEX = "model_index.json"


class Files(Protocol):
    """The files of one repository. Names are relative, with `/`."""

    name: str
    revision: str | None
    """The commit the files belong to, where there is one."""

    def list(self) -> dict[str, int]:
        """Return every file's name and its size in bytes."""
        ...

    def read(self, name: str, start: int = 0, stop: int | None = None) -> bytes:
        """Return the bytes `start:stop` of a file, or as many of them as there are."""
        ...

    def local(self, names: Iterable[str]) -> Path:
        """Make the named files present on this machine; return the folder they are in."""
        ...


class FolderFiles:
    """The files of a local folder and of the folders in it (no deeper: it may be any folder of a large disk)."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.name = str(root)
        self.revision: str | None = None

    def list(self) -> dict[str, int]:
        found = (path for pattern in ("*", "*/*") for path in self.root.glob(pattern))
        return {path.relative_to(self.root).as_posix(): path.stat().st_size for path in found if path.is_file()}

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
    """The files of a repository on the hub, at one commit. Only what is asked for is downloaded."""

    def __init__(self, repo_id: str, revision: str | None) -> None:
        from huggingface_hub import HfApi, hf_hub_download
        from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError, RevisionNotFoundError

        self.name = repo_id
        self.revision: str | None
        self._sizes: dict[str, int]
        try:
            info = HfApi().model_info(repo_id, revision=revision, files_metadata=True)
        except HFValidationError as error:
            raise ModelError(f"{repo_id!r} is neither a folder nor a hub id (owner/name)") from error
        except (RepositoryNotFoundError, RevisionNotFoundError) as error:  # or no access to it
            raise ModelError(
                f"{_what(repo_id, revision)} is not a folder, and the hub says: {_reason(error)}"
            ) from error
        except Exception as error:  # offline, unreachable or failing: whatever the client's own HTTP library raises
            folder = self._cached(revision)
            if folder is None:
                problem = "is not a folder and not in the hub's cache, and the hub cannot be reached"
                raise ModelError(f"{_what(repo_id, revision)} {problem}: {_reason(error)}") from error
            self.revision = folder.name
            found = (path for path in folder.rglob("*") if path.is_file())
            self._sizes = {path.relative_to(folder).as_posix(): path.stat().st_size for path in found}
        else:
            self.revision = info.sha
            self._sizes = {file.rfilename: file.size or 0 for file in info.siblings or ()}
            if _INDEX in self._sizes:  # asked for by branch, so that the cache knows the branch's commit when offline
                with _hub_errors(_INDEX):
                    hf_hub_download(repo_id, _INDEX, revision=revision)

    def _cached(self, revision: str | None) -> Path | None:
        """Return the folder of what earlier downloads left in the hub's cache."""
        from huggingface_hub import snapshot_download
        from huggingface_hub.constants import HF_HUB_CACHE
        from huggingface_hub.errors import LocalEntryNotFoundError
        from huggingface_hub.file_download import repo_folder_name

        try:  # for one file: asking for all fails where only one role's were downloaded
            return Path(snapshot_download(self.name, revision=revision, local_files_only=True, allow_patterns=_INDEX))
        except LocalEntryNotFoundError:
            if revision is not None:
                return None
        # The cache knows no branch of what was only ever asked for by commit, such as a LoRA: then the newest is meant.
        snapshots = Path(HF_HUB_CACHE) / repo_folder_name(repo_id=self.name, repo_type="model") / "snapshots"
        found = [each for each in snapshots.glob("*") if not (each / _INDEX).exists()]
        return max(found, key=lambda each: each.stat().st_mtime, default=None)

    def list(self) -> dict[str, int]:
        return self._sizes

    def read(self, name: str, start: int = 0, stop: int | None = None) -> bytes:
        from huggingface_hub import try_to_load_from_cache

        cached = try_to_load_from_cache(self.name, name, revision=self.revision)
        if isinstance(cached, str):
            return FolderFiles(Path(cached).parent).read(Path(cached).name, start, stop)
        if stop is None:
            return FolderFiles(self.local([name])).read(name, start)
        with _hub_errors(name):
            return self._range(name, start, min(stop, self._sizes[name]))

    def _range(self, name: str, start: int, stop: int) -> bytes:
        from huggingface_hub import get_session, hf_hub_url
        from huggingface_hub.utils import build_hf_headers, hf_raise_for_status  # type: ignore[attr-defined]

        if start >= stop:
            return b""
        url = hf_hub_url(self.name, name, revision=self.revision)
        headers = {**build_hf_headers(), "Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}
        with get_session().stream("GET", url, headers=headers, follow_redirects=True) as answer:
            hf_raise_for_status(answer)
            if answer.status_code != 206:  # the whole file, perhaps gigabytes of it: do not read it
                raise OSError(f"the server does not serve byte ranges (status {answer.status_code})")
            return bytes(answer.read())

    def local(self, names: Iterable[str]) -> Path:
        from huggingface_hub import snapshot_download

        patterns = [re.sub(r"([*?[])", r"[\1]", name) for name in sorted(set(names))]
        with _hub_errors(", ".join(patterns)):
            return Path(snapshot_download(self.name, revision=self.revision, allow_patterns=patterns))


@contextmanager
def _hub_errors(name: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # the client, its HTTP library and the disk: each has its own
        raise ComponentFileError(name, f"cannot be brought from the hub: {_reason(error)}") from error


def _what(repo_id: str, revision: str | None) -> str:
    return repr(repo_id) if revision is None else f"{repo_id!r} at revision {revision!r}"


def _reason(error: Exception) -> str:
    from huggingface_hub.errors import GatedRepoError

    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if isinstance(error, GatedRepoError):  # what to do comes last there
        lines.append("Then log in (`hf auth login`), or set HF_TOKEN.")
        return f"{type(error).__name__}: {' '.join(lines)}"
    return f"{type(error).__name__}: {' '.join(lines[:2])}"


def open_files(source: str | Path, revision: str | None = None) -> Files:
    """Return the files of a local folder if `source` is one, else of the hub repository of that id.

    Raises:
        ModelError: neither exists.
    """
    if source == "":  # as a path, the folder that the process works in
        raise ModelError("an empty name is neither a folder nor a hub id (owner/name)")
    try:
        path = Path(source).expanduser()
        is_folder, exists = path.is_dir(), path.exists()
    except (OSError, ValueError, RuntimeError) as error:  # too long, a NUL byte, the home of an unknown user
        raise ModelError(f"{source!r} is neither a folder nor a hub id (owner/name): {error}") from error
    if is_folder:
        return FolderFiles(path)
    if exists:
        raise ModelError(f"{source} is a file; a model is a folder with a model_index.json, or a hub id (owner/name)")
    if isinstance(source, Path) or source.startswith((".", "/", "~")):
        raise ModelError(f"{source}: no such folder")
    return HubFiles(source, revision)
