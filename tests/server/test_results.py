"""Results: the files that outputs can be had as, and how long they are kept."""

import errno
import fcntl
import io
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from subprocess import PIPE
from typing import Any

import pytest
from PIL import Image
from serving import LONG, PROMPT, QUICK, Caller, engine

import triptych
from triptych import embedded
from triptych.errors import ParameterError, UsageError
from triptych.result import Result
from triptych.server import formats
from triptych.server import spool as spool_module
from triptych.server.limits import Limits
from triptych.server.problems import Refusal
from triptych.server.spool import Spool, SpoolError


def files(spool: Spool) -> list[Path]:
    return sorted(path for path in Path(spool._temporary.name).rglob("*") if path.is_file())


def test_an_exact_result_is_the_file_that_the_python_interface_writes(caller: Caller, tmp_path: Path) -> None:
    parameters = {**PROMPT, "num_inference_steps": 2, "num_images_per_prompt": 2, "exact": True}
    request = caller.submit(parameters)
    assert caller.wait(request)["outputs"] == 2
    result = triptych.load(embedded.path(), device="cpu").generate(**parameters)
    for suffix in ("png", "jpg", "webp"):
        for k, path in enumerate(result.save(tmp_path / f"fox.{suffix}")):
            response = caller.get(request["links"]["result"], params={"format": suffix, "index": k})
            assert response.content == path.read_bytes(), suffix


@pytest.mark.parametrize(
    ("query", "accept", "media_type", "format"),
    [
        ({}, "*/*", "image/png", "PNG"),
        ({}, "image/webp", "image/webp", "WEBP"),
        ({}, "image/png;q=0.1, image/jpeg", "image/jpeg", "JPEG"),
        ({"format": "JPEG"}, "image/png", "image/jpeg", "JPEG"),
    ],
)
def test_the_format_is_the_query_s_or_else_the_one_accepted(
    caller: Caller, query: dict[str, str], accept: str, media_type: str, format: str
) -> None:
    request = caller.submit(QUICK)
    caller.wait(request)
    response = caller.get(request["links"]["result"], params=query, headers={"Accept": accept})
    assert response.headers["content-type"] == media_type
    with Image.open(io.BytesIO(response.content)) as image:
        assert (image.format, image.size) == (format, (64, 64))


def test_results_that_are_not_there_are_told_apart(caller: Caller) -> None:
    request = caller.submit(QUICK)
    caller.wait(request)
    link = request["links"]["result"]
    for query, status, field in (
        ({"index": "1"}, 400, "index"),
        ({"index": "-1"}, 400, "index"),
        ({"index": "first"}, 400, "index"),
        ({"format": "mp4"}, 400, "format"),
    ):
        response = caller.get(link, params=query)
        assert (response.status_code, response.json()["error"]["field"]) == (status, field)
    response = caller.get(link, headers={"Accept": "video/mp4"})
    assert (response.status_code, response.json()["error"]["code"]) == (406, "not_acceptable")
    running = caller.submit(LONG)
    response = caller.get(running["links"]["result"])
    assert (response.status_code, response.json()["error"]["code"]) == (409, "not_done")
    caller.post(running["links"]["cancel"])
    response = caller.get(running["links"]["result"])
    assert (response.status_code, response.json()["error"]["code"]) == (410, "cancelled")


def test_finished_requests_beyond_the_count_are_forgotten_oldest_first(serve: Callable[..., Caller]) -> None:
    caller = serve(Limits(kept=2))
    requests = []
    for _ in range(4):  # one after another: those that wait together may end in any order
        requests.append(caller.submit(QUICK))
        caller.wait(requests[-1])
    end = time.monotonic() + 10
    while len(files(caller.service.records.spool)) > 2 and time.monotonic() < end:
        time.sleep(0.02)
    assert [caller.get(each["links"]["self"]).status_code for each in requests] == [404, 404, 200, 200]
    assert len(files(caller.service.records.spool)) == 2


def test_results_beyond_the_bytes_are_forgotten_oldest_first(serve: Callable[..., Caller]) -> None:
    one = 64 * 64 * 3  # bytes of a picture, and some of what goes with it
    caller = serve(Limits(kept_bytes=3 * one))
    requests = []
    for _ in range(4):
        requests.append(caller.submit(QUICK))
        caller.wait(requests[-1])
    assert [caller.get(each["links"]["self"]).status_code for each in requests] == [404, 404, 200, 200]
    assert caller.service.records.spool.nbytes <= 3 * one
    time.sleep(0.2)
    spool = caller.service.records.spool
    assert sum(path.stat().st_size for path in files(spool)) == spool.nbytes


def test_a_result_that_is_larger_than_all_that_is_kept_fails_its_request(serve: Callable[..., Caller]) -> None:
    caller = serve(Limits(kept_bytes=1000))
    failed = caller.wait(caller.submit(QUICK))
    assert failed["status"] == "failed"
    assert "larger than the 1000 kept" in failed["error"]["message"]
    assert files(caller.service.records.spool) == []


def test_finished_requests_are_forgotten_in_time(serve: Callable[..., Caller], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("triptych.server.app._TRIM", 0.05)
    caller = serve(Limits(kept_seconds=0.5))
    request = caller.submit(QUICK)
    caller.until(request, lambda status: "error" in status and "id" not in status)  # nobody asks for it, or for others
    end = time.monotonic() + 10
    while files(caller.service.records.spool) and time.monotonic() < end:
        time.sleep(0.02)
    assert files(caller.service.records.spool) == []
    assert caller.service.records.spool.nbytes == 0


def test_a_result_is_on_disk_and_not_in_memory(caller: Caller) -> None:
    request = caller.submit(QUICK)
    caller.wait(request)
    record = caller.service.records.get(request["id"])
    assert record.job is None
    assert not any(isinstance(value, (Result, Image.Image)) for value in vars(record).values())
    assert len(engine().router) == 0


def video(**more: Any) -> Result:
    frames = [Image.new("RGB", (16, 16), (k * 20, 0, 0)) for k in range(4)]
    return Result(
        seed=1, frames=[frames, frames], fps=8.0, parameters={"prompt": "a fox", "output_type": "pil"}, **more
    )


@pytest.mark.parametrize("suffix", [".mp4", ".gif", ".webp"])
def test_videos_come_out_of_the_spool_as_they_would_be_saved(tmp_path: Path, suffix: str) -> None:
    spool = Spool(10**9)
    spool.put("req_1", video())
    expected = video().save(tmp_path / f"fox{suffix}")
    for k in range(2):
        assert spool.file("req_1", k, 2, suffix).read_bytes() == expected[k].read_bytes()
    assert spool.nbytes == sum(path.stat().st_size for path in files(spool))
    spool.close()


def test_a_file_that_several_ask_for_at_once_is_made_and_counted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    spool = Spool(10**9)
    spool.put("req_1", video())
    made: list[Path] = []
    save = Result.save

    def slowly(self: Result, path: Path) -> list[Path]:
        made.append(path)
        time.sleep(0.2)
        return save(self, path)

    monkeypatch.setattr(Result, "save", slowly)
    with ThreadPoolExecutor(4) as threads:
        work = [threads.submit(spool.file, "req_1", k % 2, 2, (".gif", ".webp")[k // 4]) for k in range(8)]
        assert len({each.result() for each in work}) == 4
    assert sorted(path.suffix for path in made) == [".gif", ".webp"]
    assert spool.nbytes == sum(path.stat().st_size for path in files(spool))
    spool.close()


def test_a_dropped_result_cannot_be_had_and_leaves_nothing() -> None:
    spool = Spool(10**9)
    spool.put("req_1", video())
    spool.release("req_1")
    spool.erase("req_1")
    with pytest.raises(FileNotFoundError):
        spool.file("req_1", 0, 2, ".mp4")
    assert (files(spool), spool.nbytes) == ([], 0)
    with pytest.raises(SpoolError):
        Spool(100).put("req_2", video())
    spool.close()


KILLED = """
import os, pathlib, signal, sys
from triptych.server.spool import Spool
spool = Spool(10**9)
pathlib.Path(spool._temporary.name, "req_1").mkdir()
print(spool._temporary.name, flush=True)
sys.stdin.read(1)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_a_killed_process_left_is_removed_by_the_next_one_and_nothing_else(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)  # which is asked for anew
    with subprocess.Popen([sys.executable, "-c", KILLED], stdin=PIPE, stdout=PIPE, text=True) as process:
        assert process.stdin is not None and process.stdout is not None
        theirs = Path(process.stdout.readline().strip())
        monkeypatch.setattr(spool_module, "_YOUNG", -1.0)
        Spool(10**9).close()
        assert (theirs / "req_1").is_dir(), "it lives"
        process.stdin.write("x")
    monkeypatch.setattr(spool_module, "_YOUNG", 60.0)
    Spool(10**9).close()
    assert theirs.is_dir(), "another one may be about to lock it"
    monkeypatch.setattr(spool_module, "_YOUNG", -1.0)
    other = Spool(10**9)
    assert not theirs.exists()
    other.close()
    other.close()  # a second time is nothing


def test_where_files_cannot_be_locked_nothing_is_swept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def unknown(*_: Any) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(spool_module, "_YOUNG", -1.0)
    (tmp_path / "triptych-results-1").mkdir()
    monkeypatch.setattr(fcntl, "flock", unknown)
    Spool(10**9).close()
    assert [each.name for each in tmp_path.iterdir()] == ["triptych-results-1"]


def test_a_result_that_is_dropped_while_its_file_is_made_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    spool = Spool(10**9)
    spool.put("req_1", video())
    save = Result.save

    def dropped_meanwhile(self: Result, path: Path) -> list[Path]:
        written = save(self, path)
        spool.release("req_1")
        return written

    monkeypatch.setattr(Result, "save", dropped_meanwhile)
    with pytest.raises(FileNotFoundError):
        spool.file("req_1", 0, 2, ".gif")
    assert (files(spool), spool.nbytes) == ([], 0)
    spool.close()


def test_a_result_that_is_dropped_before_its_file_is_made_was_dropped_and_not_saved_wrongly(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    spool = Spool(10**9)
    spool.put("req_1", video())
    save = Result.save

    def dropped_before(self: Result, path: Path) -> list[Path]:
        spool.release("req_1")
        spool.erase("req_1")
        return save(self, path)

    with pytest.raises(UsageError, match=r"cannot be saved with the suffix '\.png'"):
        spool.file("req_1", 0, 2, ".png")
    monkeypatch.setattr(Result, "save", dropped_before)
    with pytest.raises(FileNotFoundError):
        spool.file("req_1", 0, 2, ".gif")
    assert (files(spool), spool.nbytes) == ([], 0)
    spool.close()


def test_a_lasting_result_that_is_dropped_while_it_is_written_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spool = Spool(10**9, tmp_path)
    save = Result.save

    def dropped_meanwhile(self: Result, path: Path) -> list[Path]:
        spool.release("video_1")
        spool.erase("video_1")
        return save(self, path)

    monkeypatch.setattr(Result, "save", dropped_meanwhile)
    one = Result(seed=1, frames=video().frames[:1], fps=8.0)  # type: ignore[index]
    spool.put_video("video_1", one, lasting=True)
    spool.release("video_1")  # as whoever asked for it finds that nobody does any more
    spool.erase("video_1")
    assert (list(tmp_path.iterdir()), files(spool), spool.nbytes) == ([], [], 0)
    spool.close()


def test_videos_that_last_are_on_disk_before_they_are_told_of_and_nothing_else_waits_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[str] = []
    fsync = os.fsync

    def note(opened: int) -> None:
        synced.append(str(Path(f"/proc/self/fd/{opened}").readlink().relative_to(tmp_path)))
        fsync(opened)

    monkeypatch.setattr(os, "fsync", note)
    spool = Spool(10**9, tmp_path)
    one = Result(seed=1, frames=video().frames[:1], fps=8.0)  # type: ignore[index]
    spool.put("req_1", one, lasting=True)
    assert synced == [".req_1.partial/result.safetensors", ".req_1.partial", "."]
    synced.clear()
    spool.put_video("video_1", one, lasting=True)
    files_of_it = {f".video_1.partial/{name}" for name in ("output.mp4", "thumbnail.webp")}
    assert (set(synced[:2]), synced[2:]) == (files_of_it, [".video_1.partial", "."])
    synced.clear()
    spool.put("req_2", one)
    spool.put_video("video_2", one, lasting=False)
    spool.put("req_3", Result(seed=1, images=[Image.new("RGB", (8, 8))]), lasting=True)
    assert synced == []
    spool.close()


@pytest.mark.parametrize(
    ("makes", "accept", "expected"),
    [
        ("images", None, "png"),
        ("images", "", "png"),
        ("images", "text/html, image/*;q=0.5", "png"),
        ("images", "image/png;q=0, */*", "jpeg"),
        ("images", "image/webp;q=0.9, image/jpeg;q=0.8", "webp"),
        ("images", "image/png;q=high, image/jpeg;q=0.1", "jpeg"),
        ("videos", "*/*", "mp4"),
        ("videos", "image/*", "webp"),
        ("videos", "image/gif", "gif"),
        ("videos", "text/html,image/webp,*/*;q=0.8", "mp4"),
        ("videos", "text/html,image/webp", "webp"),
    ],
)
def test_the_format_accepted_best_is_taken(makes: str, accept: str | None, expected: str) -> None:
    assert formats.accepted(makes, accept).name == expected


def test_a_format_that_there_is_not_is_refused() -> None:
    with pytest.raises(Refusal):
        formats.accepted("videos", "text/html")
    with pytest.raises(ParameterError, match="mp4, webp, gif"):
        formats.named("videos", "png")


def test_the_count_of_a_result_is_the_number_of_files_saved(tmp_path: Path) -> None:
    picture = Image.new("RGB", (8, 8))
    layered = Result(seed=1, images=[[picture, picture], [picture, picture]])  # type: ignore[list-item]
    for result, count in ((video(), 2), (Result(seed=1, images=[picture]), 1), (layered, 4), (Result(seed=1), 0)):
        assert result.count == count
        if count:
            suffix = ".png" if result.images else ".gif"
            assert len(result.save(tmp_path / f"out{suffix}")) == count
