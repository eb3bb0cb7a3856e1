"""`triptych serve`: which engine the options ask for, and what they may not ask for together."""

import socket
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from triptych.cli import run, serve
from triptych.roles import RoleType


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave the libraries' logging as it is."""
    monkeypatch.setattr(serve, "quieten_libraries", lambda **_: None)
    monkeypatch.setattr(serve, "quieten_libraries_to_come", lambda: None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--engine", "abacus"], "--engine 'abacus': local or ray is accepted"),
        (["--engine", "local", "--pools", "denoiser=2"], "--pools needs Ray, and --engine local was asked for"),
        (["--engine", "local", "--address", "here:1"], "--address needs Ray"),
        (["--engine", "local", "--disagg-role", "server"], "--disagg-role needs Ray"),
        (["--engine", "local", "--denoiser-gpus", "2"], "--denoiser-gpus needs Ray"),
        (["--engine", "local", "--encoder-gpus", "0.5"], "--encoder-gpus needs Ray"),
        (["--disagg-role", "denoiser", "--address", "here:1", "--decoder-gpus", "1"], "this command adds no decoder"),
        (["--disagg-role", "encoder", "--address", "here:1", "--denoiser-gpus", "2"], "this command adds no denoiser"),
        (["--engine", "local", "--transport", "nixl"], "--transport needs Ray"),
        (["--disagg-role", "encoder", "--address", "here:1", "--transport", "nixl"], "uses the service's"),
        (["--denoiser-ulysses", "2"], "ranks are processes of their own; serve with --pools"),
        (
            ["--engine", "ray", "--denoiser", "cuda:0"],
            "--denoiser is for --engine local, and --engine ray asks for Ray",
        ),
        (["--pools", "denoiser=2", "--encoder", "cpu"], "--encoder is for --engine local, and --pools asks for Ray"),
        (["--pools", "denoiser=2", "--slots", "denoiser=2"], "--slots is for --engine local"),
        (["--disagg-role", "denoisr", "--address", "here:1"], "unknown role 'denoisr'; did you mean 'denoiser'?"),
        (["--disagg-role", "denoiser"], "name the cluster to join by --address"),
        (["--disagg-role", "monolithic", "--address", "here:1"], "--pools monolithic=1"),
        (
            ["--disagg-role", "server", "--address", "here:1", "--pools", "denoiser=1"],
            "--pools belongs to the command that starts the cluster",
        ),
        (["--threads", "many"], "--threads"),
        (["--threads", "encoder=0"], "role=number is accepted"),
        (["--threads", "encoder=1", "--engine", "ray"], "one number of at least 1 is accepted"),
        (["--slots", "denoiser=1,denoiser=2"], "'denoiser' is given twice"),
        (["--slots", "server=2"], "--slots 'server=2': role=number is accepted"),
        (["--dtype", "vae=float32,vae=float16"], "'vae' is given twice"),
        (["--port", "70000"], "--port"),
        (["--max-waiting", "0"], "--max-waiting"),
        (["--policy", "random"], "policy='random': one of predicted, round_robin, max_free_slots is accepted"),
        (["--denoiser", "abacus", "--dtype", "float32"], "device='abacus'"),
        (["--host", "256.0.0.1"], "cannot listen on 256.0.0.1"),
        (["--host", "gpu..local"], "cannot listen on gpu..local"),
        (["--host", f"{'x' * 64}.local"], "cannot listen on xxx"),
    ],
)
def test_what_cannot_be_is_told_in_one_line(
    capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    port = [] if "--port" in options else ["--port", "0"]
    assert run(["serve", *port, *options]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert len(captured.err.splitlines()) == 1
    assert captured.out == ""


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where folders of state lie."""
    monkeypatch.setenv("TRIPTYCH_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_a_model_that_is_missing_is_exit_code_3_and_leaves_no_folder(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, cache: Path
) -> None:
    (tmp_path / "empty").mkdir()
    assert run(["serve", "--port", "0", str(tmp_path / "empty")]) == 3
    assert "model_index.json" in capsys.readouterr().err
    assert run(["serve", "--port", "0", ""]) == 3
    assert "an empty name is neither a folder nor a hub id" in capsys.readouterr().err
    assert list((cache / "state").iterdir()) == []


def test_a_port_that_is_taken_is_exit_code_2_and_leaves_no_folder(
    capsys: pytest.CaptureFixture[str], cache: Path
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert run(["serve", "--port", str(port)]) == 2
        assert f"cannot listen on 127.0.0.1, port {port}" in capsys.readouterr().err
    assert list((cache / "state").iterdir()) == []


def test_a_folder_that_was_there_stays_though_the_server_cannot_start(tmp_path: Path) -> None:
    (tmp_path / "state").mkdir()
    assert run(["serve", "--port", "0", "--state-dir", str(tmp_path / "state"), str(tmp_path)]) == 3
    assert (tmp_path / "state" / "jobs.sqlite3").exists()


@pytest.fixture
def engines(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, tuple[Any, ...], dict[str, Any]]]:
    """What each engine was asked for, instead of being made."""
    asked: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []

    def stand_in(name: str) -> Any:
        return lambda *args, **options: asked.append((name, args, options))

    monkeypatch.setattr(serve, "listen", lambda build, *_, **__: build())
    monkeypatch.setattr("triptych.engine.local.LocalEngine", stand_in("local"))
    monkeypatch.setattr("triptych.engine.ray_cluster.begin_connecting", lambda address: f"connecting to {address}")
    monkeypatch.setitem(sys.modules, "triptych.engine.ray", SimpleNamespace(RayEngine=stand_in("ray")))
    monkeypatch.setitem(sys.modules, "triptych.engine.ray_join", SimpleNamespace(join=stand_in("join")))
    return asked


PLAIN = {"dtype": "auto", "tasks": None, "revision": None, "variant": None, "batching": True}
ROUTING = {"policy": "predicted", "max_waiting": 256, "warm_up": True}


def test_without_options_everything_is_in_this_process(engines: Any) -> None:
    assert run(["serve", "model"]) == 0
    assert engines == [("local", ("model",), {**PLAIN, **ROUTING, "slots": None})]


@pytest.mark.parametrize("option", ["--state-dir", "--lora-dir", "--ssl-certfile", "--ssl-keyfile"])
def test_an_empty_path_is_not_the_folder_one_is_in(
    engines: Any, capsys: pytest.CaptureFixture[str], option: str
) -> None:
    assert run(["serve", "model", "--ssl-certfile", "a.pem", option, ""]) == 2
    assert f"Invalid value for '{option}': a path is accepted, and this is empty" in capsys.readouterr().err
    assert engines == []


@pytest.mark.parametrize("option", ["--drain", "--encoder-gpus", "--denoiser-gpus", "--decoder-gpus"])
@pytest.mark.parametrize("value", ["inf", "nan"])
def test_numbers_are_finite(engines: Any, capsys: pytest.CaptureFixture[str], option: str, value: str) -> None:
    assert run(["serve", "model", option, value]) == 2
    assert f"Invalid value for '{option}'" in capsys.readouterr().err
    assert engines == []


def test_devices_threads_and_switches_reach_the_local_engine(engines: Any) -> None:
    options = ["--encoder", "cpu", "--denoiser", "cuda:0,cuda:1", "--threads", "denoiser=3", "--slots", "denoiser=8"]
    options += ["--no-prompt-cache", "--no-batching", "--no-warm-up", "--max-waiting", "9", "--policy", "round_robin"]
    assert run(["serve", "model", *options, "--tasks", "edit", "--dtype", "float32"]) == 0
    ((_, _, given),) = engines
    assert (given["encoder"], given["denoiser"]) == ("cpu", "cuda:0,cuda:1")
    assert "decoder" not in given
    assert (given["threads"], given["slots"]) == ({RoleType.DENOISER: 3}, {RoleType.DENOISER: 8})
    assert (given["prompt_cache"], given["batching"], given["warm_up"]) == (0, False, False)
    assert (given["max_waiting"], given["policy"]) == (9, "round_robin")
    assert (given["tasks"], given["dtype"]) == (["edit"], "float32")


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--engine", "ray"], {"address": None}),
        (["--pools", "denoiser=2", "--threads", "2"], {"address": None, "pools": "denoiser=2", "threads": 2}),
        (["--address", "here:1"], {"address": "here:1"}),
        (["--denoiser-gpus", "2"], {"address": None, "gpus": {RoleType.DENOISER: 2}}),
        (
            ["--encoder-gpus", "0.2", "--decoder-gpus", "0"],
            {"address": None, "gpus": {RoleType.ENCODER: 0.2, RoleType.DECODER: 0}},
        ),
        (
            ["--pools", "denoiser=2", "--transport", "nixl"],
            {"address": None, "pools": "denoiser=2", "transport": "nixl"},
        ),
        (["--disagg-role", "server", "--address", "here:1"], {"address": "here:1", "pools": None}),
    ],
)
def test_pools_address_and_role_imply_ray(engines: Any, options: list[str], expected: dict[str, Any]) -> None:
    assert run(["serve", "model", *options]) == 0
    connecting = {"connecting": f"connecting to {expected['address']}"}
    assert engines == [("ray", ("model",), {**PLAIN, **ROUTING, **connecting, **expected})]


def test_a_router_without_pools_has_to_be_told_of_those_that_it_joins(
    engines: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["serve", "model", "--disagg-role", "server"]) == 2
    assert "--disagg-role server: name the cluster to join by --address" in capsys.readouterr().err
    assert engines == []


def test_a_role_joins_a_cluster_and_serves_no_http(engines: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["serve", "model", "--disagg-role", "denoising", "--address", "here:1", "--no-prompt-cache"]) == 0
    ((name, args, options),) = engines
    assert (name, args) == ("join", ("model", RoleType.DENOISER, "here:1"))
    options.pop("on_ready")({"name": "denoiser-1", "loaded_bytes": 17_900_000})
    assert options == {**PLAIN, "prompt_cache": 0}
    assert capsys.readouterr().out == "Triptych has joined the service at here:1 (denoiser-1; 17.9 MB loaded)\n"


@pytest.mark.parametrize(
    "options",
    [
        ["--host", "127.0.0.1"],
        ["--port", "8000"],  # though it is the default
        ["--drain", "5"],
        ["--api-key", "secret"],
        ["--insecure"],
        ["--cors-origin", "https://example.org"],
        ["--ssl-certfile", "cert.pem"],
        ["--lora-dir", "."],
        ["--max-prompt", "9"],
        ["--state-dir", "state"],
        ["--no-state"],
        ["--policy", "round_robin"],
        ["--max-waiting", "9"],
        ["--no-warm-up"],
    ],
    ids=lambda options: options[0],
)
def test_a_role_that_joins_is_given_no_option_that_it_would_not_heed(
    engines: Any, capsys: pytest.CaptureFixture[str], options: list[str]
) -> None:
    assert run(["serve", "model", "--disagg-role", "denoiser", "--address", "here:1", *options]) == 2
    told = capsys.readouterr().err
    assert options[0] in told.partition(": for the command that listens")[0]
    assert "leave it out of --disagg-role denoiser" in told and "secret" not in told
    assert engines == []


def test_a_key_in_the_environment_keeps_no_role_from_joining(engines: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRIPTYCH_API_KEY", "secret")
    assert run(["serve", "model", "--disagg-role", "denoiser", "--address", "here:1"]) == 0
    assert [name for name, _, _ in engines] == ["join"]


def test_folders_with_loras_reach_the_server_and_have_to_exist(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    given: dict[str, Any] = {}
    monkeypatch.setattr(serve, "listen", lambda *_, **options: given.update(options))
    folders = [tmp_path / "one", tmp_path / "two"]
    for folder in folders:
        folder.mkdir()
    assert run(["serve", "model", *(text for each in folders for text in ("--lora-dir", str(each)))]) == 0
    assert given["lora_folders"] == tuple(folders)
    assert run(["serve", "model", "--lora-dir", str(tmp_path / "three")]) == 2
    assert "--lora-dir" in (told := capsys.readouterr().err) and "there is no such folder" in told
