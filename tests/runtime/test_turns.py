"""Turns: lanes compute side by side until that is seen to hold them up, then one by one, and try again later."""

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import triptych
from triptych import Request
from triptych.engine.local import LanesReplica, LocalEngine
from triptych.runtime import turns
from triptych.runtime.turns import RECHECK, WAITS, WINDOW, Turns

CORES, BUSY = 1.1, 2 * WAITS
"""What lanes use that hold each other up: about one core, with many waits a second."""


class Process:
    """A process whose threads use so many cores, and wait so many times a second."""

    def __init__(self, cores: float, waits: float) -> None:
        self.now, self.cores, self.waits = 0.0, cores, waits

    def __call__(self) -> tuple[float, float, float]:
        return self.now, self.cores * self.now, self.waits * self.now


def overlap(turns: Turns, process: Process, seconds: float) -> None:
    """Let two compute side by side for so long, in portions of a tenth of a second, or until they are to go one by one."""
    with turns.turn():
        for _ in range(round(seconds * 10)):
            if turns.one_by_one:
                return
            with turns.turn():
                process.now += 0.1


@pytest.mark.parametrize(
    ("cores", "waits", "apart"),
    [(CORES, BUSY, True), (1.9, BUSY, False), (CORES, WAITS / 2, False)],
    ids=["held up", "two cores in use", "few waits"],
)
def test_lanes_that_hold_each_other_up_go_one_by_one(
    cores: float, waits: float, apart: bool, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    process = Process(cores, waits)
    turns = Turns(process)
    overlap(turns, process, 0.8 * WINDOW)
    assert not turns.one_by_one, "it is too early to tell"
    overlap(turns, process, 0.5 * WINDOW)
    assert turns.one_by_one is apart
    assert ("take turns" in caplog.text) is apart


def test_one_lane_by_itself_is_not_judged() -> None:
    process = Process(1.0, BUSY)
    turns = Turns(process)
    for _ in range(100):
        with turns.turn():
            process.now += 0.1
    assert not turns.one_by_one


def test_what_one_did_by_itself_does_not_count_against_the_two() -> None:
    process = Process(CORES, BUSY)
    turns = Turns(process)
    with turns.turn():
        process.now += 2 * WINDOW
        overlap(turns, process, 0.5 * WINDOW)
    assert not turns.one_by_one, "half a window side by side is too early to tell"


def test_one_by_one_they_take_turns_in_order_and_side_by_side_is_tried_again() -> None:
    process = Process(CORES, BUSY)
    turns = Turns(process)
    overlap(turns, process, 2 * WINDOW)
    order: list[str] = []

    def compute(name: str) -> None:
        with turns.turn():
            order.append(f"{name} in")
            time.sleep(0.01)
            order.append(f"{name} out")

    threads = []
    with turns.turn():
        for name in "abc":
            threads.append(threading.Thread(target=compute, args=(name,)))
            threads[-1].start()
            while len(turns._waiting) < len(threads):
                time.sleep(1e-3)
        assert order == []
    for thread in threads:
        thread.join(10)
    assert order == ["a in", "a out", "b in", "b out", "c in", "c out"]
    with turns.turn():
        late = [threading.Thread(target=compute, args=(name,)) for name in "de"]
        for thread in late:
            thread.start()
        while len(turns._waiting) < 2:
            time.sleep(1e-3)
        process.now += RECHECK
    for thread in late:
        thread.join(10)
    assert order[-4:-2] in (["d in", "e in"], ["e in", "d in"]), "both are let in together"


def test_a_turn_that_fails_is_over() -> None:
    process = Process(CORES, BUSY)
    turns = Turns(process)
    overlap(turns, process, 2 * WINDOW)
    with pytest.raises(RuntimeError, match="no"), turns.turn():
        raise RuntimeError("no")
    with turns.turn():
        assert turns.one_by_one


def test_an_engine_whose_lanes_go_one_by_one_makes_the_same_pictures(
    tiny_repo: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    process = Process(CORES, BUSY)
    monkeypatch.setattr(
        turns, "_usage", lambda: (time.monotonic(), process.cores * time.monotonic(), time.time() * BUSY)
    )
    monkeypatch.setattr(turns, "WINDOW", 0.0)
    ask: dict[str, Any] = {
        "prompt": "a red fox", "height": 64, "width": 48, "num_inference_steps": 3, "output_type": "pt",
        "max_sequence_length": 24, "exact": True,
    }  # fmt: skip
    whole = triptych.load(tiny_repo("flux2_klein"), device="cpu", dtype="float32")
    devices = dict.fromkeys(("encoder", "denoiser", "decoder"), "cpu")
    with LocalEngine(tiny_repo("flux2_klein"), dtype="float32", warm_up=False, **devices) as engine:
        jobs = [engine.submit(Request(**ask, seed=seed)) for seed in range(12)]
        pictures = [job.result(60).images for job in jobs]
        (replica,) = engine.router.replicas
        assert isinstance(replica, LanesReplica)
        assert replica.turns.one_by_one
    for seed, picture in enumerate(pictures):
        assert torch.equal(picture, whole.generate(**ask, seed=seed).images)
