"""`triptych top`: a picture of a running service."""

import io
from typing import Any

import pytest
from rich.console import Console
from serving import LONG, Caller, running

from triptych.cli import run, top
from triptych.components.dtypes import emulated


def shown(status: dict[str, Any]) -> str:
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(top.frame(status))
    return console.export_text()


def test_one_frame_shows_the_model_its_replicas_and_its_requests(
    caller: Caller, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    request = caller.submit(LONG)
    caller.until(request, running)
    assert run(["top", caller.url, "--once"]) == 0
    frame = capsys.readouterr().out
    caller.delete(request["links"]["self"])
    assert "emoji-64  Flux2KleinPipeline  ready" in frame
    assert "1 requests on their way" in frame
    assert "monolithic-0" in frame and ("47.3 MB" if "float16" in emulated() else "23.6 MB") in frame
    (denoiser,) = [line for line in frame.splitlines() if "1/16" in line]
    assert "denoiser" in denoiser
    (row,) = [line for line in frame.splitlines() if request["id"] in line]
    assert "denoiser" in row and "/900" in row


def test_a_service_that_is_still_loading_is_shown_as_not_ready(caller: Caller) -> None:
    caller.service.engine, engine = None, caller.service.engine
    frame = shown(caller.get("/v1/status").json())
    caller.service.engine = engine
    assert "no model yet" in frame and "not ready" in frame


def test_what_other_engines_tell_of_their_replicas_is_shown_and_what_they_do_not_tell_is_not_missed() -> None:
    replica = {"name": "denoiser-1", "roles": ["denoiser"], "state": "starting", "host": "east"}
    draining = {"name": "denoiser-2", "roles": ["denoiser"], "draining": True, "budget": 0, "backlog": 2.5}
    frame = shown({"model": "m", "ready": True, "waiting": {"denoiser": 3}, "replicas": [replica, draining]})
    assert "denoiser-1 starting" in frame and "east" in frame
    assert "denoiser-2 draining" in frame and "2.5 s" in frame and "off" in frame
    assert "waiting for: denoiser 3" in frame


@pytest.mark.parametrize("terminal", ["0", "1"])
def test_a_live_view_goes_on_until_ctrl_c_through_a_service_that_is_away_for_a_moment(
    caller: Caller, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, terminal: str
) -> None:
    monkeypatch.setenv("TTY_COMPATIBLE", terminal)
    monkeypatch.setenv("TERM", "xterm")
    naps = 0

    def sleep(_: float) -> None:
        nonlocal naps
        naps += 1
        monkeypatch.setattr("triptych.cli.client.Client.get", away if naps == 1 else get)
        if naps == 3:
            raise KeyboardInterrupt

    from triptych.cli.client import Client, ServiceError

    get = Client.get

    def away(*_: Any) -> Any:
        raise ServiceError("it is away")

    monkeypatch.setattr(top.time, "sleep", sleep)
    assert run(["top", caller.url]) == 130
    assert naps == 3
    shown = capsys.readouterr().out
    assert "emoji-64" in shown and "it is away" in shown
    assert ("\033[?1049h" in shown) == (terminal == "1")  # the terminal's other screen


@pytest.mark.parametrize("terminal", [{}, {"TTY_COMPATIBLE": "1", "TERM": "dumb"}], ids=["pipe", "dumb"])
def test_where_nothing_can_be_drawn_over_every_frame_is_printed_when_it_comes(
    caller: Caller, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, terminal: dict[str, str]
) -> None:
    printed: list[str] = []

    def sleep(seconds: float) -> None:
        assert seconds == 0.5
        printed.append(capsys.readouterr().out)
        if len(printed) == 3:
            raise KeyboardInterrupt

    for name, value in terminal.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(top.time, "sleep", sleep)
    assert run(["top", caller.url, "--interval", "0.5"]) == 130
    assert all("emoji-64" in each for each in printed)


@pytest.mark.parametrize("interval", ["inf", "nan"])
def test_an_interval_is_finite(caller: Caller, capsys: pytest.CaptureFixture[str], interval: str) -> None:
    assert run(["top", caller.url, "--interval", interval]) == 2
    assert "--interval" in capsys.readouterr().err


def test_an_address_where_nobody_serves_is_told_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["top", "127.0.0.1:1"]) == 4
    assert "cannot be reached" in capsys.readouterr().err
