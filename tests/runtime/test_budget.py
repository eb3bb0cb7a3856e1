"""The batch budget: measured once, kept on disk, and tried out before it is relied on."""

import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import triptych
from triptych.runtime import budget
from triptych.runtime.model import Model
from triptych.runtime.segment import Turn
from triptych.stages.denoising import Denoising, Forward


@pytest.fixture(scope="module")
def model(tiny_repo: Callable[..., Path]) -> Model:
    return triptych.load(tiny_repo("flux2_klein"), device="cpu")


@pytest.fixture(scope="module")
def turn(model: Model) -> Turn:
    state = model.admit(
        triptych.Request(prompt="a red fox", height=64, width=48, num_inference_steps=1, max_sequence_length=24)
    )
    assert list(model.segment(state)) == []  # the encoder's: no forwards
    return next(model.segment(state))


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TRIPTYCH_CACHE", str(tmp_path))
    return tmp_path / "budgets.json"


def most_rows(monkeypatch: pytest.MonkeyPatch, stage: Denoising, most: int) -> list[int]:
    """Let a stage's forwards of more rows run out of memory; returns the rows of those that were tried."""
    tried: list[int] = []
    call = stage.call

    def limited(forward: Forward) -> torch.Tensor:
        tried.append(forward.rows(stage.shared))
        if tried[-1] > most:
            raise torch.OutOfMemoryError("no more")
        return call(forward)

    monkeypatch.setattr(stage, "call", limited)
    return tried


def test_a_budget_is_measured_by_doubling_and_is_a_multiple_of_one_request(turn: Turn) -> None:
    sample = turn.forwards[0]
    measured = budget.measure(turn.stage, sample, lambda: False)
    assert measured is not None
    copies = measured / sample.size
    assert copies in (1, 2, 4, 8, 16, 32, 64)


def test_a_busy_moment_does_not_end_the_measuring(turn: Turn, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every forward takes as long whatever its rows, but for a while when the machine has other things to do."""
    calls: list[int] = []

    def predict(forwards: list[Forward], *, exact: bool) -> list[torch.Tensor]:
        calls.append(len(forwards))
        time.sleep(0.2 if 4 <= len(calls) < 10 and len(forwards) > 1 else 0.005)
        return []

    monkeypatch.setattr(turn.stage, "predict", predict)
    monkeypatch.setattr(budget, "MOST_ROWS", 16)
    sample = turn.forwards[0]
    assert budget.measure(turn.stage, sample, lambda: False) == 16 * sample.size


def test_a_forward_that_takes_too_long_is_not_taken_for_a_gain(turn: Turn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budget, "LONGEST", 0.15)
    monkeypatch.setattr(
        turn.stage, "predict", lambda forwards, *, exact: time.sleep(0.05 if len(forwards) == 1 else 0.3)
    )
    sample = turn.forwards[0]
    assert budget.measure(turn.stage, sample, lambda: False) == sample.size


def test_a_forward_that_would_take_too_long_is_not_tried(turn: Turn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budget, "LONGEST", 0.3)
    tried: list[int] = []

    def predict(forwards: list[Forward], *, exact: bool) -> list[torch.Tensor]:
        tried.append(len(forwards))
        time.sleep(0.04 * len(forwards) ** 0.5)
        return []

    monkeypatch.setattr(turn.stage, "predict", predict)
    sample = turn.forwards[0]
    assert budget.measure(turn.stage, sample, lambda: False) == max(tried) * sample.size
    assert max(tried) == 16, "that took 0.16 s, and at what each of them took 32 would take 0.32"


def test_measuring_ends_where_memory_does(turn: Turn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budget, "GAIN", 0.0)  # else noise might end it before
    tried = most_rows(monkeypatch, turn.stage, 4)
    assert budget.measure(turn.stage, turn.forwards[0], lambda: False) == 4 * turn.forwards[0].size
    assert max(tried) == 8


def test_measuring_gives_way_to_requests(turn: Turn) -> None:
    assert budget.measure(turn.stage, turn.forwards[0], lambda: True) is None


def test_a_remembered_budget_is_tried_once_at_its_full_size(turn: Turn, monkeypatch: pytest.MonkeyPatch) -> None:
    tried = most_rows(monkeypatch, turn.stage, 100)
    sample = turn.forwards[0]
    assert budget.rehearse(turn.stage, sample, 6 * sample.size) == 6 * sample.size
    assert tried == [6]


def test_a_remembered_budget_shrinks_to_what_memory_holds_now(
    turn: Turn, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tried = most_rows(monkeypatch, turn.stage, 3)
    sample = turn.forwards[0]
    assert budget.rehearse(turn.stage, sample, 8 * sample.size) == 2 * sample.size
    assert tried == [8, 4, 2]
    assert "8 requests in one forward do not fit" in caplog.text


def test_a_budget_outlives_the_process(cache: Path) -> None:
    name = budget.key("a1b2", torch.device("cpu"), torch.float32, 2)
    assert budget.recall(name) is None
    budget.remember(name, 4096)
    budget.remember("another", 7)
    assert json.loads(cache.read_text()) == {"a1b2/cpu x2/float32": 4096, "another": 7}
    assert budget.recall(name) == 4096


@pytest.mark.parametrize("device", ["cpu", "mps", "xpu"])
def test_every_kind_of_device_has_a_key(device: str) -> None:
    name = budget.key("a1b2", torch.device(device), torch.float32, 2)
    assert name.startswith(f"a1b2/{device}") and name.endswith("/float32")


@pytest.mark.parametrize("content", ["", "[]", '{"x": "many"}', '{"x": -1}'])
def test_a_broken_file_of_budgets_is_measured_anew(cache: Path, content: str) -> None:
    cache.write_text(content)
    assert budget.recall("x") is None
    budget.remember("x", 5)
    assert budget.recall("x") == 5


def test_a_folder_that_cannot_be_written_is_warned_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TRIPTYCH_CACHE", str(tmp_path / "file"))
    budget.remember("x", 5)
    assert "cannot be kept" in caplog.text
