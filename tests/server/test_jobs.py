"""The job store: what is in it after whatever happened."""

import json
import os
import sqlite3
import stat
from pathlib import Path

import pytest

from triptych.errors import UsageError
from triptych.server import jobs
from triptych.server.jobs import (
    JobStore,
    StoreClosedError,
    StoredJob,
    default_folder,
    open_default,
    write_atomically,
)
from triptych.server.spool import Spool

BODY = json.dumps({"parameters": {"prompt": "a fox"}}).encode()


def job(name: str = "video_1", seed: int = 2**64 - 1) -> StoredJob:
    return StoredJob(name, "fingerprint", "videos", seed, 1000.5, {"object": "video", "prompt": "a fox"})


def test_what_is_added_is_there_after_reopening(tmp_path: Path) -> None:
    store = JobStore(tmp_path / "state")
    store.add(job(), BODY)
    store.add(job("video_2"), BODY)
    store.close()
    store = JobStore(tmp_path / "state")
    assert store.all() == [job(), job("video_2")]
    assert store.submission("video_1") == BODY
    assert store.submitted_bytes() == 2 * len(BODY)
    store.close()


def test_a_job_ends_once_and_its_submission_goes(tmp_path: Path) -> None:
    store = JobStore(tmp_path)
    store.add(job(), BODY)
    store.started("video_1")
    assert store.all()[0].status == "running"
    store.ended("video_1", "done", outputs=1, timings={"decoding": 0.5})
    store.ended("video_1", "cancelled")
    store.started("video_1")
    (kept,) = store.all()
    assert (kept.status, kept.outputs, kept.timings) == ("done", 1, {"decoding": 0.5})
    assert kept.ended is not None
    assert store.submitted_bytes() == 0
    with pytest.raises(OSError):
        store.submission("video_1")
    store.close()


def test_a_closed_store_leaves_running_jobs_queued_and_notes_nothing_more(tmp_path: Path) -> None:
    store = JobStore(tmp_path)
    store.add(job(), BODY)
    store.started("video_1")
    store.close()
    store.ended("video_1", "cancelled")
    store.forget("video_1")
    store.close()
    store = JobStore(tmp_path)
    (kept,) = store.all()
    assert (kept.status, kept.ended, kept.interruptions) == ("queued", None, 0)
    assert store.submission("video_1") == BODY
    store.close()


def test_a_closed_store_takes_nothing_on_and_nothing_is_left_of_it(tmp_path: Path) -> None:
    store = JobStore(tmp_path)
    store.close()
    with pytest.raises(StoreClosedError):
        store.add(job(), BODY)
    assert list((tmp_path / "inputs").iterdir()) == []
    assert store.submitted_bytes() == 0
    store = JobStore(tmp_path)
    assert store.all() == []
    store.close()


def test_a_store_is_closed_though_the_disk_is_full(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = JobStore(tmp_path)
    store.add(job(), BODY)
    store.started("video_1")
    words = "SELECT RAISE(ABORT, 'database or disk is full')"
    store._database.execute(f"CREATE TEMP TRIGGER full BEFORE UPDATE ON jobs BEGIN {words}; END")
    store.close()
    assert "database or disk is full" in caplog.text
    assert store.closed
    store = JobStore(tmp_path)
    assert [each.status for each in store.all()] == ["running"]
    store.close()


def test_interruptions_are_counted_and_queue_a_job_again(tmp_path: Path) -> None:
    store = JobStore(tmp_path)
    store.add(job(), BODY)
    for count in (1, 2):
        store.started("video_1")
        assert store.interrupted("video_1") == count
        assert store.all()[0].status == "queued"
    store.close()


def test_files_that_no_row_speaks_of_are_swept_away(tmp_path: Path) -> None:
    store = JobStore(tmp_path)
    done, failed, queued, *lost = (f"video_{k:024x}" for k in range(6))
    for name in (done, failed, queued):
        store.add(job(name), BODY)
        (store.results / name).mkdir()
    store.ended(done, "done", outputs=1)
    store.ended(failed, "failed", error={"status": 500, "code": "internal", "message": "no"})
    (store.results / f".{lost[0]}.partial").mkdir()
    (store.results / f"image_{0:032x}").mkdir()
    (tmp_path / "inputs" / f"{lost[1]}.json").write_bytes(BODY)
    (tmp_path / "inputs" / f".{lost[2]}.json.partial").write_bytes(BODY[:3])
    store.close()
    store = JobStore(tmp_path)
    assert [path.name for path in store.results.iterdir()] == [done]
    assert [path.name for path in (tmp_path / "inputs").iterdir()] == [f"{queued}.json"]
    assert store.all()[1].error == {"status": 500, "code": "internal", "message": "no"}
    store.close()


FOREIGN = ["results/book/one.txt", "results/notes.txt", "results/req_1/cat.png", "inputs/a/b.csv", "inputs/a.json"]


def put(folder: Path, foreign: list[str]) -> None:
    for name in foreign:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("years of work")


def test_what_others_put_into_a_folder_is_neither_removed_nor_counted(tmp_path: Path) -> None:
    JobStore(tmp_path).close()
    put(tmp_path, FOREIGN)
    store = JobStore(tmp_path)
    spool = Spool(10**9, store.results)
    assert (store.submitted_bytes(), spool.nbytes) == (0, 0)
    assert {(tmp_path / name).read_text() for name in FOREIGN} == {"years of work"}
    spool.close()
    store.close()


@pytest.mark.parametrize("name", FOREIGN)
def test_a_folder_of_others_is_refused_and_left_as_it_is(tmp_path: Path, name: str) -> None:
    put(tmp_path, [name])
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UsageError, match=f"--state-dir {tmp_path}: .*choose an empty folder"):
        JobStore(tmp_path)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_folder_has_one_server(tmp_path: Path) -> None:
    store = JobStore(tmp_path)
    with pytest.raises(UsageError, match="another server uses this folder"):
        JobStore(tmp_path)
    store.close()
    JobStore(tmp_path).close()


def test_only_its_owner_may_read_a_folder(tmp_path: Path) -> None:
    JobStore(tmp_path / "state").close()
    assert stat.S_IMODE((tmp_path / "state").stat().st_mode) == 0o700


def test_only_its_owner_may_read_what_is_in_a_folder_that_others_may_enter(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    umask = os.umask(0o022)
    try:
        store = JobStore(tmp_path)
        store.add(job(), BODY)
    finally:
        os.umask(umask)
    private = [tmp_path / "results", tmp_path / "inputs", *tmp_path.glob("jobs.sqlite3*")]
    assert len(private) == 5  # SQLite's journal and its index are two
    assert {stat.S_IMODE(path.stat().st_mode) & 0o077 for path in private} == {0}
    store.close()


def test_a_folder_that_cannot_be_used_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="--state-dir"):
        JobStore(tmp_path / "file")
    (tmp_path / "jobs.sqlite3").write_bytes(b"no database at all" * 100)
    with pytest.raises(UsageError, match="move it away to begin anew"):
        JobStore(tmp_path)
    (tmp_path / "jobs.sqlite3").unlink()
    with sqlite3.connect(tmp_path / "jobs.sqlite3") as database:
        database.execute("PRAGMA user_version = 99")
    with pytest.raises(UsageError, match="is of version 99"):
        JobStore(tmp_path)


def test_every_model_has_a_folder_and_every_server_of_it_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv("TRIPTYCH_CACHE", raising=False)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    first, second = open_default("maker/model-1"), open_default("maker/model-1")
    assert first is not None and second is not None
    assert (first.folder, second.folder.name) == (default_folder("maker/model-1"), f"{first.folder.name}-2")
    assert first.folder.parent == tmp_path / "triptych" and first.folder.name.startswith("model-1-")
    assert default_folder("other/model-1") != first.folder
    first.close()
    second.close()
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "file"))
    assert open_default("maker/model-1") is None
    assert "nothing is kept beyond this process" in caplog.text


def test_a_model_on_this_machine_is_known_by_where_it_lies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = tmp_path / "one" / "model", tmp_path / "other" / "model"
    for folder in (one, other):
        folder.mkdir(parents=True)
    (tmp_path / "link").symlink_to(one)
    monkeypatch.chdir(one)
    expected = default_folder(".")
    assert expected.name.startswith("model-")
    assert {default_folder(each) for each in (str(one), f"{one}/", str(tmp_path / "link"))} == {expected}
    monkeypatch.chdir(one.parent)
    assert {default_folder(each) for each in ("model", "./model", "../one/model")} == {expected}
    monkeypatch.chdir(other)
    assert default_folder(".") != expected


def test_a_model_s_path_need_not_be_utf_8() -> None:
    folder = default_folder(os.fsdecode(b"/models/caf\xe9"))
    assert folder.name.startswith("caf-") and folder != default_folder(os.fsdecode(b"/models/caf\xe8"))


def test_a_folder_made_for_nothing_goes_again(tmp_path: Path) -> None:
    JobStore(tmp_path / "new").close(unused=True)
    assert list(tmp_path.iterdir()) == []
    store = JobStore(tmp_path / "used")
    put(tmp_path / "used", ["results/notes.txt"])
    store.close(unused=True)
    assert (tmp_path / "used" / "jobs.sqlite3").exists()
    JobStore(tmp_path / "used").close(unused=True)
    assert (tmp_path / "used" / "jobs.sqlite3").exists()


def test_a_file_is_written_in_full_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_atomically(tmp_path / "file", b"before")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(jobs.os, "fsync", full)
    with pytest.raises(OSError):
        write_atomically(tmp_path / "file", b"after")
    assert (tmp_path / "file").read_bytes() == b"before"
    assert len(list(tmp_path.iterdir())) == 1
