"""The spool: results on disk, each in a folder of its own, until they are fetched, too old or too many."""

from __future__ import annotations

import shutil
import threading
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from triptych.errors import TriptychError
from triptych.result import Result, numbered

_RESULT = "result.safetensors"


class SpoolError(TriptychError):
    """A result cannot be kept."""


class Spool:
    """Keeps results as they came out of the engine, and the files that were made of them.

    Attributes:
        quota: bytes; a result that is larger than it by itself is not kept.
        nbytes: held now. Whoever uses the spool drops results until it is within the quota.
    """

    def __init__(self, quota: int) -> None:
        self.quota = quota
        self._temporary = TemporaryDirectory(prefix="triptych-results-")
        self.nbytes = 0
        self._sizes: dict[str, int] = {}
        self._lock = threading.Lock()

    def put(self, name: str, result: Result) -> None:
        """Keep a result.

        Raises:
            SpoolError: it is too large.
            WireError: it holds what cannot be written.
            OSError: the disk is full.
        """
        from triptych import wire

        data = wire.pack(vars(result), {})
        if len(data) > self.quota:
            raise SpoolError(f"the result of {len(data)} bytes is larger than the {self.quota} kept of all results")
        folder = self._folder(name)
        folder.mkdir()
        try:
            (folder / _RESULT).write_bytes(data)
        except OSError:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        with self._lock:
            self._sizes[name] = len(data)
            self.nbytes += len(data)

    def file(self, name: str, index: int, count: int, suffix: str) -> Path:
        """Return one of a result's `count` outputs as a file of the suffix's format; made when first asked for.

        Raises:
            FileNotFoundError: the result was dropped.
            UsageError: it cannot be saved so.
        """
        from triptych import wire

        folder = self._folder(name)
        paths = numbered(folder / f"output{suffix}", count)
        if not all(each.exists() for each in paths):
            fields: dict[str, Any] = wire.unpack((folder / _RESULT).read_bytes())[0]
            Result(**fields).save(folder / f"output{suffix}")
            self._count(name, sum(each.stat().st_size for each in paths))
        return paths[index]

    def release(self, name: str) -> None:
        """Count a result no longer, because it is about to be erased; never waits for the disk."""
        with self._lock:
            self.nbytes -= self._sizes.pop(name, 0)

    def erase(self, name: str) -> None:
        """Remove the files of a result."""
        shutil.rmtree(self._folder(name), ignore_errors=True)

    def close(self) -> None:
        """Forget all of them."""
        self._temporary.cleanup()

    def _count(self, name: str, size: int) -> None:
        with self._lock:
            if name in self._sizes:
                self._sizes[name] += size
                self.nbytes += size
                return
        self.erase(name)  # it was dropped while the files were made
        raise FileNotFoundError(name)

    def _folder(self, name: str) -> Path:
        return Path(self._temporary.name, name)
