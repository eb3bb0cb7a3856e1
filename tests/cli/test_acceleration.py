"""The options of "Speed and memory": what they ask for, and what they may not."""

import inspect
import re
from pathlib import Path
from typing import Any

import pytest

from triptych.cli import generate, run, serve
from triptych.cli.acceleration import OPTIONS
from triptych.components.acceleration import Acceleration
from triptych.roles import RoleType


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave the libraries' logging as it is."""
    monkeypatch.setattr(serve, "quieten_libraries", lambda **_: None)
    monkeypatch.setattr(serve, "quieten_libraries_to_come", lambda: None)
    monkeypatch.setattr(generate, "quieten_libraries", lambda **_: None)


def test_each_role_gets_what_its_options_ask_for(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(serve, "listen", lambda build, *_, **__: build())
    monkeypatch.setattr(
        "triptych.engine.local.LocalEngine", lambda *_, **options: asked.append(options.get("acceleration"))
    )
    options = "--denoiser-attention sage --denoiser-compile --denoiser-cache first_block:0.1 --denoiser-offload group"
    options += " --denoiser-quantization fp8 --encoder-quantization fp8 --encoder-offload group"
    assert run(["serve", *options.split(), "--decoder-tiling", "--decoder-compile"]) == 0
    assert run(["serve", "--denoiser-ulysses", "2", "--denoiser-ring", "3", "--denoiser-cfg-parallel"]) == 0
    assert run(["serve"]) == 0
    kept = {"quantization": "fp8", "offload": "group"}
    assert asked == [
        {
            RoleType.DENOISER: Acceleration(attention="sage", compile=True, cache="first_block:0.1", **kept),
            RoleType.ENCODER: Acceleration(**kept),
            RoleType.DECODER: Acceleration(tiling=True, compile=True),
        },
        {RoleType.DENOISER: Acceleration(ulysses=2, ring=3, cfg_parallel=True)},
        None,
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--denoiser-cache firstblock", "--denoiser-cache firstblock: first_block, .* did you mean 'first_block'?"),
        ("--encoder-quantization int3", "--encoder-quantization int3: fp8 or int8 is accepted"),
        ("--denoiser-ring 0", "--denoiser-ring 0: 1 or more ranks are accepted"),
        ("--denoiser-cache taylorseer --denoiser-ring 2", "the denoiser's options: cache='taylorseer' with 2 ranks"),
        ("--denoiser-attention flahs", "denoiser: attention='flahs': .* did you mean 'flash'?"),
        ("--denoiser-offload group --device cpu", "denoiser: offload='group': .* runs on the CPU"),
        ("--denoiser-quantization fp8 --exact", "--exact True: the denoiser runs with quantization"),
        ("--denoiser-quantization fp8 --param exact=true", "--param exact True: the denoiser runs with quantization"),
    ],
)
def test_what_cannot_be_is_told_in_one_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, options: str, message: str
) -> None:
    assert run(["generate", "a red heart", "-q", "-o", str(tmp_path / "a.png"), *options.split()]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(message, line), line


def test_a_service_has_settled_its_own_acceleration(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["generate", "a red heart", "--server", "http://127.0.0.1:9", "--denoiser-compile"]) == 2
    assert "--denoiser-compile is the service's to choose" in capsys.readouterr().err


@pytest.mark.parametrize("split", [[], pytest.param(["--split"], marks=pytest.mark.slow)])  # three more processes
def test_a_picture_is_generated_with_them_whole_and_split(tmp_path: Path, split: list[str]) -> None:
    from PIL import Image, ImageChops

    ask = ["generate", "a red heart", "-q", "--seed", "7", "--steps", "6", "--device", "cpu"]
    plain, faster = tmp_path / "plain.png", tmp_path / "faster.png"
    assert run([*ask, "-o", str(plain)]) == 0
    assert run([*ask, "-o", str(faster), "--denoiser-cache", "taylorseer:2", "--no-exact", *split]) == 0
    difference = ImageChops.difference(Image.open(plain), Image.open(faster))
    assert difference.getbbox() is not None


def test_without_asking_for_an_exact_picture_there_is_none_where_there_cannot_be(tmp_path: Path) -> None:
    ask = ["generate", "a red heart", "-q", "--steps", "1", "--device", "cpu", "-o", str(tmp_path / "a.png")]
    assert run([*ask, "--denoiser-quantization", "fp8"]) == 0


def test_every_option_is_in_the_help_under_one_heading(capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("serve", "generate"):
        run([command, "--help"])
        told = capsys.readouterr().out
        panel = told.partition("Speed and memory")[2]
        for option in OPTIONS:
            assert option.flag in panel
    assert "acceleration" not in inspect.signature(serve.serve).parameters
