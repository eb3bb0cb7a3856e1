"""`triptych bench`: tables and figures of a model, and of a running service."""

import json
from pathlib import Path

import pytest
from serving import Caller, idle

from triptych.cli import run

QUICK = ["--steps", "1", "--requests", "3", "--clients", "2"]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")


def test_a_running_service_is_measured_and_keeps_nothing_of_it(
    caller: Caller, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["bench", "load", "--server", caller.url, *QUICK, "-o", "load.json"]) == 0
    captured = capsys.readouterr()
    header, _, row, *_ = [line for line in captured.out.splitlines() if line.strip()]
    assert header.split() == ["clients", "requests", "requests/s", "p50", "p90", "p99", "text_encoding",
                              "flux2_denoising", "decoding"]  # fmt: skip
    assert row.split()[:2] == ["2", "3"]
    assert "3/3" in captured.err
    (load,) = json.loads(Path("load.json").read_text())["loads"]
    assert (load["clients"], load["requests"]) == (2, 3)
    assert load["requests/s"] > 0
    assert idle()


def test_a_model_is_measured_alone_and_busy_and_told_whether_to_split(capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        run(["bench", "split", *QUICK, "--device", "cpu", "--dtype", "float32", "--size", "64x64", "-o", "split.json"])
        == 0
    )
    captured = capsys.readouterr()
    figures = json.loads(Path("split.json").read_text())
    assert [load["clients"] for load in figures["loads"]] == [1, 2]
    assert figures["verdict"] in " ".join(captured.err.split())
    assert "2 clients get" in figures["verdict"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["paint"], "'paint' is not one of"),
        (["load", "--server", "http://127.0.0.1:9", "--dtype", "float32"], "--dtype is the service's to choose"),
        (["load", "emoji", "--server", "http://127.0.0.1:9"], "the model is the service's to choose"),
        (["load", "--device", "cpu,cpu"], "one is accepted, or three"),
        (["load", "--size", "64"], "width and height"),
        (["load", "-o", "nowhere/load.json"], "there is no folder 'nowhere'"),
        (["load", "--param", "steps"], "name=value"),
        (["split", "--steps", "0", "--device", "cpu"], "num_inference_steps"),
    ],
)
def test_what_cannot_be_measured_is_refused(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["bench", *arguments]) == 2
    assert message in capsys.readouterr().err
