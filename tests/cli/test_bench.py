"""`triptych bench`: tables and figures of a model, and of a running service."""

import contextlib
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from rich.console import Console
from serving import Caller, engine, idle, settled

from triptych.bench.load import Load
from triptych.cli import bench, run
from triptych.cli.client import Client, ServiceError
from triptych.runtime.prompt_cache import PromptCache

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
    header, _, *rows = [line.split() for line in captured.out.splitlines() if line.strip()]
    assert header == ["clients", "2"]
    assert [row[0] for row in rows[:8]] == ["requests", "requests/s", "p50", "p90", "p99", "text_encoding",
                                            "flux2_denoising", "decoding"]  # fmt: skip
    assert rows[0] == ["requests", "3"]
    assert "3/3" in captured.err
    (load,) = json.loads(Path("load.json").read_text())["loads"]
    assert (load["clients"], load["requests"]) == (2, 3)
    assert load["requests/s"] > 0
    assert idle()


def test_every_request_to_a_service_has_a_prompt_of_its_own(caller: Caller, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    submit = engine().submit
    monkeypatch.setattr(engine(), "submit", lambda request, **more: seen.append(request) or submit(request, **more))
    assert run(["bench", "load", "--server", caller.url, "--prompt", "a red fox", *QUICK]) == 0
    prompts = [each.parameters["prompt"] for each in seen]
    assert len(set(prompts)) == len(prompts) == 4  # the first one warms up
    assert all(prompt.startswith("a red fox ") for prompt in prompts)


def test_a_picture_goes_to_the_service_with_every_request(caller: Caller, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    submit = engine().submit
    monkeypatch.setattr(engine(), "submit", lambda request, **more: seen.append(request) or submit(request, **more))
    picture = Image.new("RGB", (64, 64), "red")
    picture.save("picture.png")
    assert run(["bench", "load", "--server", caller.url, "--param", "image=@picture.png", *QUICK]) == 0
    assert [each.parameters["image"].tobytes() for each in seen] == [picture.tobytes()] * 4


def test_a_model_is_asked_by_as_many_clients_as_are_wanted(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--clients", "300", "--requests", "300", "--steps", "1", "--size", "32x32", "--device", "cpu"]
    assert run(["bench", "load", *options, "-o", "load.json"]) == 0
    assert json.loads(Path("load.json").read_text())["loads"][0]["clients"] == 300


def test_every_request_to_a_model_is_encoded(monkeypatch: pytest.MonkeyPatch) -> None:
    caches: list[PromptCache] = []
    remember = PromptCache.wrap
    monkeypatch.setattr(PromptCache, "wrap", lambda self, *more: caches.append(self) or remember(self, *more))
    assert run(["bench", "load", *QUICK, "--device", "cpu", "--size", "64x64"]) == 0
    assert sum(cache.hits for cache in caches) == 0


def test_stages_with_long_names_can_be_read_in_a_narrow_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    names = ("vision_language_encoding", "hunyuan_video15_denoising", "first_frame_conditioning", "decoding")
    load = Load(8, (1.0,) * 8, (1.0,) * 8, (dict.fromkeys(names, 0.123),) * 8)
    Console(width=80).print(bench._table([load, load]))
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert all([name, "0.123", "s", "0.123", "s"] in lines for name in names)


def test_an_interrupt_takes_back_what_many_clients_asked_for(caller: Caller) -> None:
    asked = {"prompt": "a fox", "num_inference_steps": 900, "seed": 1}

    def ask() -> None:
        with contextlib.suppress(ServiceError):
            service.ask(asked)

    with pytest.raises(KeyboardInterrupt), Client(caller.url) as client, bench._Service(client) as service:
        threads = [threading.Thread(target=ask) for _ in range(3)]
        for each in threads:
            each.start()
        while len(service._open) < 3:
            time.sleep(0.01)
        raise KeyboardInterrupt
    for each in threads:
        each.join(timeout=5)
        assert not each.is_alive()
    assert idle()
    assert settled(caller.service)


def test_an_interrupt_does_not_wait_for_a_slow_service_once_for_every_client(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    class Slow(BaseHTTPRequestHandler):
        def do_DELETE(self) -> None:
            asked.append(self.path)
            time.sleep(0.3)
            self.send_response(204)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            """Print nothing."""

    monkeypatch.setattr(bench, "_PATIENCE", 0.4)
    with ThreadingHTTPServer(("127.0.0.1", 0), Slow) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with Client(f"http://127.0.0.1:{server.server_port}") as client, bench._Service(client) as service:
            service._open += [{"links": {"self": f"/v1/requests/{k}"}} for k in range(20)]
            service._asking = 20
        server.shutdown()
    assert 1 <= len(asked) <= 2


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


def test_an_empty_name_is_not_the_model_that_ships(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["bench", "load", ""]) == 3
    assert "an empty name is neither a folder nor a hub id" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["paint"], "'paint' is not one of"),
        (["load", "--server", "http://127.0.0.1:9", "--dtype", "float32"], "--dtype is the service's to choose"),
        (["load", "emoji", "--server", "http://127.0.0.1:9"], "the model is the service's to choose"),
        (
            ["load", "--server", "http://127.0.0.1:9", "--param", "guidance_scale=NaN"],
            "guidance_scale=nan: finite numbers are accepted",
        ),
        (["load", "--device", "cpu,cpu"], "one is accepted, or three"),
        (["load", "--size", "64"], "width and height"),
        (["load", "-o", "nowhere/load.json"], "there is no folder 'nowhere'"),
        (["load", "-o", "."], "this is a folder"),
        (["load", "--param", "seed=7"], "--param seed: every request has a seed of its own"),
        (["load", "--steps", "4", "--param", "num_inference_steps=8"], "is given already, by --steps"),
        (["load", "--size", "64x64", "--param", "width=32"], "--param width: width is given already, by --size"),
        (["load", "--prompt", "a fox", "--param", "prompt=a cat"], "prompt is given already, by --prompt"),
        (["split", "--param", "exact=false"], "--param exact: split compares requests that run each by itself"),
        (["split", "--clients", "1"], "--clients 1: split compares one request after another"),
        (["split", "--requests", "1"], "--requests 1: split compares one request after another"),
        (["load", "--param", "steps"], "name=value"),
        (["split", "--steps", "0", "--device", "cpu"], "num_inference_steps"),
    ],
)
def test_what_cannot_be_measured_is_refused(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["bench", *arguments]) == 2
    assert message in capsys.readouterr().err
