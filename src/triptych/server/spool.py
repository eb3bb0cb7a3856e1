"""The spool: results on disk, each in a folder of its own, until they are fetched, too old or too many."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from triptych.errors import TriptychError, UsageError
from triptych.result import Result, numbered
from triptych.server.jobs import is_ours

_RESULT, _THUMBNAIL = "result.safetensors", "thumbnail.webp"
_THUMBNAIL_SIDE = 512
"""Pixels of its longer side, at most."""
_PREFIX = "triptych-results-"
_YOUNG = 60.0
"""Seconds; a temporary folder that is younger may be one that its process has not locked yet."""


class SpoolError(TriptychError):
    """A result cannot be kept."""


class Spool:
    """Keeps results as they came out of the engine, and the files that were made of them.

    Attributes:
        quota: bytes; a result that is larger than it by itself is not kept.
        lasting: a folder for the results that are to outlive the process; what is there already is held.
        nbytes: held now. Whoever uses the spool drops results until it is within the quota.
    """

    def __init__(self, quota: int, lasting: Path | None = None) -> None:
        self.quota = quota
        self.lasting = lasting
        _sweep(Path(tempfile.gettempdir()))
        self._temporary = TemporaryDirectory(prefix=_PREFIX)
        self._mine: int | None = os.open(self._temporary.name, os.O_RDONLY)
        with suppress(OSError):  # where files cannot be locked, nothing is swept either
            fcntl.flock(self._mine, fcntl.LOCK_EX)
        self._lasting: set[str] = set()
        self._sizes: dict[str, int] = {}
        self._making: dict[str, dict[str, threading.Lock]] = {}  # of each result, by the suffix of what is made of it
        self._lock = threading.Lock()
        for folder in () if lasting is None else lasting.iterdir():
            if is_ours(folder.name):
                self._lasting.add(folder.name)
                self._sizes[folder.name] = sum(each.stat().st_size for each in folder.iterdir())
        self.nbytes = sum(self._sizes.values())

    def put(self, name: str, result: Result, *, lasting: bool = False) -> None:
        """Keep a result.

        Raises:
            SpoolError: it is too large.
            WireError: it holds what cannot be written.
            OSError: the disk is full.
        """
        from triptych import wire

        data = wire.pack(vars(result), {})
        self._check(len(data))
        with self._filling(name, lasting=lasting, to_disk=lasting and result.frames is not None) as folder:
            (folder / _RESULT).write_bytes(data)

    def put_files(self, name: str, suffix: str, files: Sequence[bytes], *, lasting: bool = False) -> None:
        """Keep a result as the files that will be asked for, in this format only.

        Raises:
            SpoolError: it is too large.
            OSError: the disk is full.
        """
        self._check(sum(map(len, files)))
        with self._filling(name, lasting=lasting) as folder:
            for path, file in zip(numbered(folder / f"output{suffix}", len(files)), files):
                path.write_bytes(file)

    def put_video(self, name: str, result: Result, *, lasting: bool) -> None:
        """Keep a result of one video as the files that are asked for: an MP4 and a small picture of its first frame.

        The frames themselves are not kept: they are some fifty times as large.

        Raises:
            SpoolError: it is too large.
            UsageError: it is not one video.
            OSError: the disk is full.
        """
        with self._filling(name, lasting=lasting, to_disk=lasting) as folder:
            if len(result.save(folder / "output.mp4")) != 1:
                raise UsageError("one video is kept, not several")
            _save_thumbnail(result, folder / _THUMBNAIL)

    @contextmanager
    def _filling(self, name: str, *, lasting: bool, to_disk: bool = False) -> Iterator[Path]:
        """Yield a folder for a result's files, which is in its place, and counted, once they are all there.

        With `to_disk` it is there even after a power failure: the job store says so of videos.

        Raises:
            SpoolError: they are too large.
            OSError: the disk is full.
        """
        if lasting:
            self._lasting.add(name)
        folder = self._folder(name)
        partial = folder.with_name(f".{name}.partial")
        for left_behind in (folder, partial):  # by a process that died, of this very request
            shutil.rmtree(left_behind, ignore_errors=True)
        partial.mkdir()
        try:
            yield partial
            size = sum(each.stat().st_size for each in partial.iterdir())
            self._check(size)
            for each in (*partial.iterdir(), partial) if to_disk else ():
                _to_disk(each)
            os.replace(partial, folder)
            if to_disk:
                _to_disk(folder.parent)
        except BaseException:
            for unfinished in (partial, folder):
                shutil.rmtree(unfinished, ignore_errors=True)
            raise
        with self._lock:
            self._sizes[name] = size
            self.nbytes += size

    def _check(self, size: int) -> None:
        if size > self.quota:
            raise SpoolError(f"the result of {size} bytes is larger than the {self.quota} kept of all results")

    def thumbnail(self, name: str) -> Path:
        """Return the small picture of a video.

        Raises:
            FileNotFoundError: the result was dropped.
        """
        path = self._folder(name) / _THUMBNAIL
        if not path.exists():
            raise FileNotFoundError(name)
        return path

    def file(self, name: str, index: int, count: int, suffix: str) -> Path:
        """Return one of a result's `count` outputs as a file of the suffix's format; made when first asked for.

        Raises:
            FileNotFoundError: the result was dropped.
            UsageError: it cannot be saved so.
        """
        from triptych import wire

        folder = self._folder(name)
        paths = numbered(folder / f"output{suffix}", count)
        with self._lock:
            if name not in self._sizes:
                raise FileNotFoundError(name)
            making = self._making.setdefault(name, {}).setdefault(suffix, threading.Lock())
        with making:  # those who ask at the same time wait for the one that makes it
            if not all(each.exists() for each in paths):
                fields: dict[str, Any] = wire.unpack((folder / _RESULT).read_bytes())[0]
                try:
                    Result(**fields).save(folder / f"output{suffix}")
                except UsageError:
                    if name in self._sizes:
                        raise
                    raise FileNotFoundError(name) from None  # dropped in the meantime: its folder is not there any more
                self._count(name, sum(each.stat().st_size for each in paths))
        return paths[index]

    def release(self, name: str) -> None:
        """Count a result no longer, because it is about to be erased; never waits for the disk."""
        with self._lock:
            self.nbytes -= self._sizes.pop(name, 0)
            self._making.pop(name, None)

    def erase(self, name: str) -> None:
        """Remove the files of a result; a second time too, where they came to be after the first."""
        for parent in (Path(self._temporary.name), self.lasting):
            if parent is not None:
                shutil.rmtree(parent / name, ignore_errors=True)
        self._lasting.discard(name)

    def close(self) -> None:
        """Forget all of them but the lasting ones."""
        if self._mine is not None:
            self._temporary.cleanup()
            os.close(self._mine)
            self._mine = None

    def _count(self, name: str, size: int) -> None:
        with self._lock:
            if name in self._sizes:
                self._sizes[name] += size
                self.nbytes += size
                return
        self.erase(name)  # it was dropped while the files were made
        raise FileNotFoundError(name)

    def _folder(self, name: str) -> Path:
        return (self.lasting if name in self._lasting and self.lasting else Path(self._temporary.name)) / name


def _sweep(parent: Path) -> None:
    """Remove what spools of processes left behind that were killed: nobody has locked their folders any more."""
    for folder in parent.glob(f"{_PREFIX}*"):
        try:
            opened = os.open(folder, os.O_RDONLY | os.O_NOFOLLOW | os.O_DIRECTORY)
        except OSError:
            continue  # somebody else's, or gone already
        try:
            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if time.time() > os.fstat(opened).st_mtime + _YOUNG:
                shutil.rmtree(folder, ignore_errors=True)
        except OSError:
            pass  # it is being used, or nobody can tell
        finally:
            os.close(opened)


def _save_thumbnail(result: Result, path: Path) -> None:
    """Save the first frame of a video, made smaller."""
    from PIL import Image

    frames: Any = result.frames
    Result(seed=result.seed, images=frames[0][:1]).save(path)
    with Image.open(path) as image:
        image.thumbnail((_THUMBNAIL_SIDE, _THUMBNAIL_SIDE))
        image.save(path, "WEBP", quality=85)


def _to_disk(path: Path) -> None:
    """Have what was written survive a power failure."""
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)
