"""The job store: requests that outlive the server's process, in one folder on disk.

SQLite says what there is and how it stands; what a request was given lies beside it as the JSON that was submitted, its
pictures included, and what came of it under `results`. A file is complete before the row that speaks of it is written,
so whatever moment the process dies in, the folder can be read.

Videos, minutes of work each, outlive the machine's end too: their acceptance and their end wait for the disk. That would
take a picture's request some 20 ms, a twentieth of a small one: theirs are left to the system to write, which it does
however the process ends.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import re
import shutil
import sqlite3
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from triptych.errors import TriptychError, UsageError

log = logging.getLogger(__name__)

_VERSION = 1
"""Of the table; a folder with another one is left alone."""
_SIBLINGS = 16
"""Servers of one model that find a default folder of their own."""
_DATABASE, _LOCK = "jobs.sqlite3", "lock"
_OURS = re.compile(r"\.?(req|video|image)_[0-9a-f]{24,32}(\.json)?(\.partial)?")
"""What lies under `inputs` and `results`: it has a request's id for its name, complete or not."""

_TABLE = """
CREATE TABLE jobs (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    id TEXT UNIQUE NOT NULL,
    model TEXT NOT NULL,
    makes TEXT NOT NULL,
    seed TEXT NOT NULL,
    created REAL NOT NULL,
    told TEXT NOT NULL,
    status TEXT NOT NULL,
    interruptions INTEGER NOT NULL DEFAULT 0,
    ended REAL,
    outputs INTEGER NOT NULL DEFAULT 0,
    timings TEXT NOT NULL DEFAULT '{}',
    error TEXT
)
"""


@dataclass(frozen=True)
class StoredJob:
    """A request as the store knows it.

    Attributes:
        id: names it.
        model: the fingerprint of the model that it was accepted for.
        makes: `images` or `videos`.
        seed: drawn or given; as text on disk, because SQLite's integers end at 2**63.
        created: seconds since the epoch.
        told: what the interface that took it on remembers of it, as JSON values.
        status: `queued`, `running`, `done`, `failed` or `cancelled`.
        interruptions: how often the server's process died while it ran.
        ended: seconds since the epoch.
        outputs: how many results there are.
        timings: seconds of each stage.
        error: why there is no result: `status`, `code`, `message` and `details` of a problem.
    """

    id: str
    model: str
    makes: str
    seed: int
    created: float
    told: Mapping[str, Any] = field(default_factory=dict)
    status: str = "queued"
    interruptions: int = 0
    ended: float | None = None
    outputs: int = 0
    timings: Mapping[str, float] = field(default_factory=dict)
    error: Mapping[str, Any] | None = None

    @property
    def precious(self) -> bool:
        """Whether it is to outlive the machine's end, not only the process's."""
        return self.makes == "videos"


class JobStore:
    """Keeps jobs in a folder that no other process uses meanwhile. Blocks on the disk: not for the event loop's thread.

    Attributes:
        folder: where all of it lies; only its owner may read what is in it.
        results: where the results' folders lie.

    Raises:
        UsageError: the folder cannot be used, or has files of somebody else's in the place of ours.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.results, self._inputs = folder / "results", folder / "inputs"
        self._new = not os.path.lexists(folder)
        try:
            if not (folder / _DATABASE).exists():
                self._check_free()
            for each in (folder, self.results, self._inputs):
                each.mkdir(mode=0o700, parents=True, exist_ok=True)
            (folder / _DATABASE).touch(mode=0o600)  # SQLite would let others read it; its journal takes the mode over
            self._owner = _lock(folder)
        except OSError as error:
            raise UsageError(f"--state-dir {folder}: {error.strerror or error}") from None
        self._lock = threading.Lock()
        self._open = True
        self._submitted: dict[str, int] = {}  # bytes of each submission that is kept
        try:
            self._database = self._connect()
        except BaseException:
            self._owner.close()
            raise
        self._sweep()

    def _check_free(self) -> None:
        for each in (self.results, self._inputs):
            for path in each.iterdir() if each.is_dir() else ():
                if not is_ours(path.name):
                    words = f"it is in use already: {path} is not of Triptych's making; choose an empty folder"
                    raise UsageError(f"--state-dir {self.folder}: {words}")

    def _connect(self) -> sqlite3.Connection:
        path = self.folder / _DATABASE
        try:
            database = sqlite3.connect(path, check_same_thread=False)
            database.row_factory = sqlite3.Row
            database.execute("PRAGMA journal_mode = WAL")
            version = database.execute("PRAGMA user_version").fetchone()[0]
            if version == 0:
                with database:
                    database.execute(_TABLE)
                    database.execute(f"PRAGMA user_version = {_VERSION}")
        except sqlite3.Error as error:
            raise UsageError(f"{path}: {error}; move it away to begin anew") from None
        if version not in (0, _VERSION):
            database.close()
            raise UsageError(f"{path} is of version {version}, and this Triptych reads version {_VERSION}")
        return database

    def _sweep(self) -> None:
        """Remove our files that no row speaks of: their process died before it wrote one, or after it was removed."""
        jobs = {job.id: job for job in self.all()}
        for path in self._inputs.iterdir():
            if path.stem in jobs and jobs[path.stem].ended is None:
                self._submitted[path.stem] = path.stat().st_size
            elif is_ours(path.name):
                path.unlink(missing_ok=True)
        for path in self.results.iterdir():
            if is_ours(path.name) and (path.name not in jobs or jobs[path.name].status != "done"):
                shutil.rmtree(path, ignore_errors=True)

    def add(self, job: StoredJob, submission: bytes | None) -> None:
        """Keep a job that has just been accepted, and what was submitted; or one that has ended, and nothing of that.

        Raises:
            StoreClosedError: it is not kept, and nothing is left of it.
            OSError, sqlite3.Error: the disk is full.
        """
        values = (job.id, job.model, job.makes, str(job.seed), job.created, json.dumps(job.told), job.status)
        try:
            if submission is not None:
                self._submitted[job.id] = len(submission)
                write_atomically(self._input(job.id), submission, to_disk=job.precious)
            written = self._write(
                "INSERT INTO jobs (id, model, makes, seed, created, told, status, ended, outputs, timings) "
                "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                *(*values, job.ended, job.outputs, json.dumps(dict(job.timings))),
                to_disk=job.precious,
            )
            if not written:
                raise StoreClosedError("the server is shutting down: nothing more is kept")
        except BaseException:
            self._drop_input(job.id)
            raise

    def submission(self, name: str) -> bytes:
        """Return what was submitted.

        Raises:
            OSError: it is not there: the job has ended.
        """
        return self._input(name).read_bytes()

    def submitted_bytes(self) -> int:
        """Return how much is kept of jobs that have not ended."""
        return sum(list(self._submitted.values()))

    def started(self, name: str) -> None:
        """Note that a job runs."""
        self._write("UPDATE jobs SET status = 'running' WHERE id = ? AND status = 'queued'", name)

    def ended(
        self,
        name: str,
        status: str,
        *,
        outputs: int = 0,
        timings: Mapping[str, float] | None = None,
        error: Mapping[str, Any] | None = None,
        when: float | None = None,
        precious: bool = True,
    ) -> None:
        """Note how a job ended, unless that was noted before; its result, if there is one, must be on disk already."""
        told = None if error is None else json.dumps(error, default=str)
        written = self._write(
            "UPDATE jobs SET status = ?, ended = ?, outputs = ?, timings = ?, error = ? WHERE id = ? AND ended IS NULL",
            *(status, when or time.time(), outputs, json.dumps(dict(timings or {})), told, name),
            to_disk=precious,
        )
        if written:
            self._drop_input(name)

    def interrupted(self, name: str) -> int:
        """Note that the process died while a job ran; returns how often that has happened. It is queued again."""
        statement = "UPDATE jobs SET status = 'queued', interruptions = interruptions + 1 WHERE id = ?"
        self._write(statement, name, to_disk=True)
        return next((job.interruptions for job in self.all() if job.id == name), 0)

    def forget(self, name: str) -> None:
        """Remove a job, whatever its status; its result is removed by the spool."""
        if self._write("DELETE FROM jobs WHERE id = ?", name):
            self._drop_input(name)

    def all(self) -> list[StoredJob]:
        """Return all jobs in the order of their arrival."""
        with self._lock:
            rows = self._database.execute("SELECT * FROM jobs ORDER BY number").fetchall() if self._open else []
        return [_job(row) for row in rows]

    def close(self, *, unused: bool = False) -> None:
        """Leave everything to the next process: jobs that run are queued, and what happens from now on is not noted.

        Args:
            unused: nothing has been kept, so the folder goes if this process has made it.
        """
        try:
            self._write("UPDATE jobs SET status = 'queued' WHERE status = 'running'", to_disk=True)
        except (OSError, sqlite3.Error) as error:  # whatever the disk is like, the server stops as it should
            log.error("%s: to the next server, what runs now will have been interrupted: %s", self.folder, error)
        with self._lock:
            if self._open:
                self._open = False
                self._database.close()
                if unused and self._new:
                    self._remove()
                self._owner.close()

    def _remove(self) -> None:
        """Remove the folder, as far as nothing has come into it; while it is ours, so that no other server takes it."""
        with suppress(OSError):
            self.results.rmdir()
            self._inputs.rmdir()
            (self.folder / _DATABASE).unlink()
            (self.folder / _LOCK).unlink()
            self.folder.rmdir()

    @property
    def closed(self) -> bool:
        """Whether what has not ended is left to the next process."""
        return not self._open

    def _write(self, statement: str, *values: object, to_disk: bool = False) -> bool:
        """Change the table; returns once the change survives the process, or with `to_disk` the machine.

        False where the store is closed: then nothing is changed.
        """
        with self._lock:
            if self._open:
                self._database.execute(f"PRAGMA synchronous = {'FULL' if to_disk else 'NORMAL'}")
                with self._database:
                    self._database.execute(statement, values)
            return self._open

    def _drop_input(self, name: str) -> None:
        self._submitted.pop(name, None)
        self._input(name).unlink(missing_ok=True)

    def _input(self, name: str) -> Path:
        return self._inputs / f"{name}.json"


def is_ours(name: str) -> bool:
    """Return whether something in a store's folders was put there by a server: nothing else is counted or removed."""
    return _OURS.fullmatch(name) is not None


def default_folder(source: str) -> Path:
    """Return the folder of a model's jobs: below `$TRIPTYCH_CACHE`, or where the system keeps users' state.

    Two models do not share one, since a job can only be run by the model that it was submitted to; a model on this
    machine is known by where it lies, however that is written. A second server of the same model gets the next folder.
    """
    local = os.path.expanduser(source)  # as the model is looked for
    source = os.path.realpath(local) if os.path.isdir(local) else source
    cache, state = os.environ.get("TRIPTYCH_CACHE"), os.environ.get("XDG_STATE_HOME")
    base = Path(cache, "state") if cache else Path(state or os.path.expanduser("~/.local/state"), "triptych")
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", source.rstrip("/").rpartition("/")[2])[:60] or "model"
    return base / f"{name}-{hashlib.sha256(os.fsencode(source)).hexdigest()[:8]}"


def open_default(source: str) -> JobStore | None:
    """Return the store of a model's default folder, or of the next one where another server has it.

    None, with a warning, where none can be had: nobody asked for this folder.
    """
    first = default_folder(source)
    for number in range(1, _SIBLINGS + 1):
        try:
            return JobStore(first if number == 1 else first.with_name(f"{first.name}-{number}"))
        except FolderTakenError:
            continue
        except UsageError as error:
            log.warning("nothing is kept beyond this process: %s", error)
            return None
    log.warning("nothing is kept beyond this process: %d servers of this model run already", _SIBLINGS)
    return None


class FolderTakenError(UsageError):
    """Another server uses the folder."""


class StoreClosedError(TriptychError):
    """What has come too late to be left to the next server: the store is closed."""


def write_atomically(path: Path, data: bytes, *, to_disk: bool = True) -> None:
    """Write a file so that it is there in full or not at all, with `to_disk` even after a power failure."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        with open(partial, "wb") as file:
            file.write(data)
            file.flush()
            if to_disk:
                os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise
    if not to_disk:
        return
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _lock(folder: Path) -> TextIO:
    """Take the folder for this process; the system gives it back when the process ends, however it ends."""
    file = open(folder / _LOCK, "a")  # noqa: SIM115 (held until the store is closed)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise FolderTakenError(f"--state-dir {folder}: another server uses this folder") from None
    except BaseException:
        file.close()
        raise
    return file


def _job(row: sqlite3.Row) -> StoredJob:
    plain = {key: value for key, value in dict(row).items() if key != "number"}
    told = {key: json.loads(plain[key]) for key in ("told", "timings")}
    error = None if plain["error"] is None else json.loads(plain["error"])
    return StoredJob(**{**plain, **told, "error": error, "seed": int(plain["seed"])})
