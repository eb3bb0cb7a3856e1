"""Serving from start to stop, as `triptych serve` does it: a process, its signals and its exit code."""

import logging
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from serving import LONG, QUICK, Caller, idle, level, running

import triptych
from triptych.cli.console import logging_to, stderr_console
from triptych.cli.leaving import in_order
from triptych.errors import UsageError
from triptych.server.front import Front, listen
from triptych.server.jobs import JobStore
from triptych.server.limits import Limits
from triptych.server.serve import Stop, drain
from triptych.server.serve import serve as serve_over_http
from triptych.server.spool import Spool


@contextmanager
def process(tmp_path: Path, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """`triptych serve` on a free port."""
    variables = {"PYTHONPATH": str(Path(triptych.__file__).parents[1]), "TMPDIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    started = subprocess.Popen(
        [sys.executable, "-m", "triptych", "serve", "--port", "0", "--encoder", "cpu", "--denoiser", "cpu"]
        + ["--decoder", "cpu", "--dtype", "float32", "--no-warm-up", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **variables, "TRIPTYCH_CACHE": str(tmp_path)},
    )
    try:
        yield started
    finally:
        started.kill()
        started.communicate()


def ready(started: subprocess.Popen[str]) -> str:
    """Wait for the line that says where it serves; returns the URL."""
    assert started.stdout is not None
    line = started.stdout.readline()
    found = re.fullmatch(r"Triptych serves emoji-64 on (http://127\.0\.0\.1:\d+) \(.*47\.3 MB loaded\)\n", line)
    assert found, (line, started.stderr.read() if started.stderr else "")
    return found[1]


def test_a_term_signal_finishes_what_runs_and_takes_nothing_new(tmp_path: Path) -> None:
    with process(tmp_path) as started:
        with httpx.Client(base_url=ready(started), timeout=30) as caller:
            assert caller.get("/ready").status_code == 200
            assert caller.get("/v1/status", headers={"Host": "evil.example"}).status_code == 403
            assert len(level(tmp_path)) == 1
            steps = {**QUICK, "num_inference_steps": 8}
            request = caller.post("/v1/requests", json={"parameters": steps}).json()
            started.send_signal(signal.SIGTERM)
            end = time.monotonic() + 10
            while (refusal := caller.get("/ready")).status_code == 200:
                assert time.monotonic() < end
            assert refusal.json()["error"]["message"] == "the server is shutting down"
            refusal = caller.post("/v1/requests", json={"parameters": QUICK})
            assert (refusal.status_code, "Retry-After" in refusal.headers) == (503, True)
            while caller.get(request["links"]["self"]).json()["status"] != "done":
                time.sleep(0.02)
            assert caller.get(request["links"]["result"]).content.startswith(b"\x89PNG")
        began = time.monotonic()
        assert started.wait(timeout=20) == 0
        assert time.monotonic() - began < 4  # nobody is waited for once the result is fetched
        assert started.stderr is not None
        assert (
            started.stderr.read() == "warning: finishing 1 requests, for 30 s at most; a second signal stops at once\n"
        )
    assert level(tmp_path) == set()


@pytest.mark.parametrize(
    ("options", "last", "words"),
    [
        (["--no-state"], "cancelled", "they are cancelled"),
        ([], "step", "the next server of this model runs them"),  # the stream breaks off, to be taken up again
    ],
)
def test_a_second_signal_stops_at_once_and_readers_learn_of_it(
    tmp_path: Path, options: list[str], last: str, words: str
) -> None:
    with process(tmp_path, *options) as started:
        with httpx.Client(base_url=ready(started), timeout=30) as caller:
            request = caller.post("/v1/requests", json={"parameters": LONG}).json()
            with caller.stream("GET", request["links"]["events"]) as response:
                lines = response.iter_lines()
                assert any(line == "event: step" for line in lines)
                started.send_signal(signal.SIGINT)
                time.sleep(0.5)
                assert started.poll() is None
                started.send_signal(signal.SIGINT)
                kinds = [line.removeprefix("event: ") for line in lines if line.startswith("event: ")]
                assert kinds[-1] == last
        assert started.wait(timeout=20) == 0
        assert started.stderr is not None
        assert started.stderr.read().splitlines()[1:] == [f"warning: 1 requests had not finished: {words}"]
    assert level(tmp_path) == set()


def test_signals_while_an_idle_server_closes_break_nothing_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Idle:
        def close(self, timeout: float) -> None:
            pass

    closed: list[str] = []

    def signalled(owner: type, name: str) -> None:
        close = getattr(owner, name)

        def then(*args: Any, **options: Any) -> None:
            signal.raise_signal(signal.SIGTERM)
            closed.append(owner.__name__)
            close(*args, **options)

        monkeypatch.setattr(owner, name, then)

    for owner, name in ((JobStore, "close"), (Idle, "close"), (Front, "__exit__"), (Spool, "close")):
        signalled(owner, name)
    with in_order() as came:  # as the command line has it
        serve_over_http(
            Idle,  # type: ignore[arg-type]
            lambda *_: signal.raise_signal(signal.SIGTERM),
            host="127.0.0.1",
            port=0,
            store=JobStore(tmp_path),
        )
    assert (closed, came) == (["JobStore", "Idle", "Front", "Spool", "JobStore"], [])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_after_the_end_of_serving_does_not_become_the_exit_code(tmp_path: Path, number: int) -> None:
    with process(tmp_path) as started:
        ready(started)
        started.send_signal(number)
        end = time.monotonic() + 20
        while level(tmp_path):  # the last that goes
            assert time.monotonic() < end
            time.sleep(0.01)
        time.sleep(0.5)  # the interpreter ends, which takes longer than this where it matters
        started.send_signal(number)
        assert started.wait(timeout=20) == 0


def test_draining_waits_for_results_to_be_fetched_but_not_for_ever(serve: Callable[..., Caller]) -> None:
    caller = serve(Limits(linger=0.7))
    request = caller.submit(QUICK)
    ended = threading.Event()

    def run() -> None:
        drain(caller.service, 60, Stop())
        ended.set()

    threading.Thread(target=run, daemon=True).start()
    caller.wait(request)
    assert not ended.wait(0.3)
    assert ended.wait(5)
    assert not caller.service.records.get(request["id"]).fetched


@pytest.mark.parametrize("channel", [os.openpty, os.pipe])  # the pipe is one to `tee`, which goes with its terminal
def test_draining_waits_though_the_terminal_that_would_be_told_of_it_is_gone(
    serve: Callable[..., Caller], channel: Callable[[], tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    caller = serve(Limits(linger=0))
    request = caller.submit({**QUICK, "num_inference_steps": 12})
    near, far = channel()
    os.close(near)
    stderr = os.fdopen(far, "w", buffering=1)  # as Python's own: by lines
    monkeypatch.setattr(sys, "stderr", stderr)
    with logging_to(stderr_console(), verbose=False):
        drain(caller.service, 60, Stop())
        logging.getLogger("triptych.server").warning("requests had not finished")  # as the server's last words are
    assert caller.status(request)["status"] == "done"
    with pytest.raises(OSError):
        stderr.close()  # what it holds cannot be written


def test_draining_is_bounded(serve: Callable[..., Caller]) -> None:
    caller = serve()
    caller.until(caller.submit(LONG), running)
    began = time.monotonic()
    drain(caller.service, 0.3, Stop())
    assert 0.25 < time.monotonic() - began < 3
    assert caller.service.cancel_all() == 1
    assert idle()
    assert caller.service.records.unsettled() is False


def test_a_server_that_is_to_stop_waits_for_what_is_being_fetched(
    serve: Callable[..., Caller], monkeypatch: pytest.MonkeyPatch
) -> None:
    caller = serve(Limits(linger=0))
    request = caller.submit(QUICK)
    caller.wait(request)
    entered, go_on = threading.Event(), threading.Event()
    make = caller.service.records.spool.file

    def slowly(*asked: Any) -> Path:
        entered.set()
        assert go_on.wait(30)
        return make(*asked)

    monkeypatch.setattr(caller.service.records.spool, "file", slowly)
    with ThreadPoolExecutor(2) as threads:
        answer = threads.submit(caller.get, request["links"]["result"])
        assert entered.wait(30)
        drained = threads.submit(drain, caller.service, 60, Stop())
        time.sleep(0.3)
        assert not drained.done()
        go_on.set()
        assert answer.result().content.startswith(b"\x89PNG")
        drained.result(10)
    assert caller.service.records.fetches == 0


def test_a_port_that_is_taken_is_told_before_anything_is_loaded() -> None:
    taken = listen("127.0.0.1", 0)
    taken.listen()
    port = taken.getsockname()[1]
    with pytest.raises(UsageError, match=f"cannot listen on 127.0.0.1, port {port}: "):
        listen("127.0.0.1", port)
    with pytest.raises(UsageError, match="cannot listen on no.such.host.invalid"):
        listen("no.such.host.invalid", 1)
    taken.close()


def test_a_front_tells_where_it_can_be_reached() -> None:
    from triptych.server.app import create_app
    from triptych.server.service import Service

    service = Service()
    for host, shown in (("127.0.0.1", "http://127.0.0.1:"), ("0.0.0.0", "http://127.0.0.1:")):
        with Front(create_app(service), host, 0) as front:
            assert front.url.startswith(shown)
            assert httpx.get(f"{front.url}/health").status_code == 200
        assert not front.alive
    service.records.spool.close()
