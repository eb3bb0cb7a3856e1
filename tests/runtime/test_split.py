"""A request with each role in a process of its own."""

import logging
import signal
from pathlib import Path

import psutil
import pytest
import torch
from conftest import TinyRepo

import triptych
from triptych.errors import UsageError
from triptych.runtime.split import RoleProcessError, RoleRaisedError, _follow, _process, run_split


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where temporary files of this test go; empty again after each."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    return folder


def admitted(repo: Path, **parameters: object) -> triptych.State:
    request = triptych.Request(prompt="a fox", seed=7, height=16, width=24, output_type="pt", **parameters)
    return triptych.load(repo, role="server", device="cpu").admit(request)


def children() -> list[psutil.Process]:
    return psutil.Process().children(recursive=True)


def test_it_makes_the_bits_of_a_whole_model_in_a_process_for_each_role(
    tiny_repo: TinyRepo, temporary: Path, caplog: pytest.LogCaptureFixture
) -> None:
    repo = tiny_repo("flux2_klein")
    steps: list[tuple[str, int, int]] = []
    loaded: list[str] = []
    processes: set[int] = set()
    others = children()

    def on_loaded(role: str, seconds: float) -> None:
        assert seconds > 0
        loaded.append(role)
        (child,) = (each for each in children() if each not in others)  # one after another
        processes.add(child.pid)

    with caplog.at_level(logging.INFO, logger="triptych"):
        state = run_split(
            repo,
            admitted(repo, num_inference_steps=2),
            device="cpu",
            dtype={"default": torch.float32, "text_encoder": "float32"},
            on_step=lambda *step: steps.append(step),
            on_loaded=on_loaded,
        )
    whole = triptych.load(repo, device="cpu").run(admitted(repo, num_inference_steps=2))
    assert torch.equal(state.result.images, whole.result.images)
    assert list(state.result.timings) == ["text_encoding", "flux2_denoising", "decoding"]
    assert steps == [("flux2_denoising", 1, 2), ("flux2_denoising", 2, 2)]
    assert loaded == ["encoder", "denoiser", "decoder"]
    assert len(processes) == 3
    told = [record.getMessage() for record in caplog.records if record.getMessage().startswith("role ")]
    assert [line.split()[1] for line in told if "server" not in line][:3] == loaded
    assert list(temporary.iterdir()) == []


def test_a_role_that_is_killed_is_named(tiny_repo: TinyRepo, temporary: Path) -> None:
    repo = tiny_repo("flux2_klein")

    others = children()

    def kill(role: str, seconds: float) -> None:
        (child,) = (each for each in children() if each not in others)
        child.kill()

    with pytest.raises(RoleProcessError, match="the process of the encoder was killed by SIGKILL") as caught:
        run_split(repo, admitted(repo), device="cpu", on_loaded=kill)
    assert (caught.value.role, caught.value.returncode) == ("encoder", -signal.SIGKILL)
    assert list(temporary.iterdir()) == []


def test_an_error_keeps_its_class_and_its_message(tiny_repo: TinyRepo) -> None:
    repo = tiny_repo("flux2_klein")
    with pytest.raises(UsageError, match="device='abacus' is not available here") as caught:
        run_split(repo, admitted(repo), device="abacus")
    assert "Traceback" in str(caught.value.__cause__)  # the child's


def test_an_error_nobody_foresaw_names_the_role(temporary: Path) -> None:
    job = {"log_level": logging.WARNING, "threads": -1}  # torch refuses so few
    raised = pytest.raises(RoleRaisedError, match="in the process of the decoder: RuntimeError: ")
    with _process(job, temporary / "stderr") as (process, last_words), raised:
        _follow(process, "decoder", last_words, None, None)


def test_a_process_that_ends_by_itself_gives_its_last_words(temporary: Path) -> None:
    with _process({}, temporary / "stderr") as (process, last_words):
        assert process.wait() == 1
        assert "KeyError" in last_words()
    message = str(RoleProcessError("decoder", 1, "KeyError: 'log_level'"))
    assert message == "the process of the decoder ended with exit status 1 (KeyError: 'log_level')"
