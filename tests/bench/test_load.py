"""Clients that keep a service busy, and what is said of what they measured."""

import signal
import threading
import time

import pytest

from triptych.bench.load import Load, closed_loop
from triptych.bench.verdict import verdict


def load(clients: int, seconds: list[float], stages: dict[str, float], wall: float) -> Load:
    count = len(seconds)
    ended = tuple(wall * (k + 1) / count for k in range(count))
    return Load(clients, tuple(seconds), ended, (stages,) * count)


def test_as_many_clients_ask_at_a_time_as_were_asked_for_and_every_request_once() -> None:
    asked: list[int] = []
    now, most = 0, 0
    lock = threading.Lock()

    def ask(number: int) -> dict[str, float]:
        nonlocal now, most
        with lock:
            asked.append(number)
            now, most = now + 1, max(most, now + 1)
        time.sleep(0.01)
        with lock:
            now -= 1
        return {"stage": 0.01}

    told: list[int] = []
    measured = closed_loop(ask, 20, 4, told.append)
    assert sorted(asked) == list(range(20))
    assert most == 4
    assert told == list(range(1, 21))
    assert len(measured.seconds) == len(measured.stages) == 20
    assert all(each >= 0.01 for each in measured.seconds)
    assert list(measured.ended) == sorted(measured.ended)


def test_the_first_failure_ends_the_load_and_is_raised() -> None:
    asked: list[int] = []

    def ask(number: int) -> dict[str, float]:
        asked.append(number)
        raise RuntimeError("no service")

    with pytest.raises(RuntimeError, match="no service"):
        closed_loop(ask, 1000, 2)
    assert len(asked) <= 2


def test_after_an_interrupt_no_request_is_begun() -> None:
    asked: list[int] = []

    def ask(number: int) -> dict[str, float]:
        asked.append(number)
        if number == 3:
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
        time.sleep(0.05)
        return {"stage": 0.05}

    with pytest.raises(KeyboardInterrupt):
        closed_loop(ask, 1000, 2)
    time.sleep(0.2)
    assert len(asked) < 10


def test_no_more_clients_are_told_of_than_there_were_requests() -> None:
    assert closed_loop(lambda _: {"stage": 0.0}, 3, 8).clients == 3


def test_figures_are_of_the_requests_measured() -> None:
    measured = load(2, [float(k) for k in range(1, 101)], {"a": 0.25, "b": 0.5}, wall=50.0)
    figures = measured.figures()
    assert figures["requests/s"] == 2.0
    assert figures["seconds"] == {"p50": 51.0, "p90": 91.0, "p99": 100.0}
    assert figures["stages"] == {"a": 0.25, "b": 0.5}


def test_the_rate_of_busy_clients_counts_neither_their_beginning_nor_their_end() -> None:
    ended = (5.0, 6.0, 6.5, 7.0, 7.5, 8.0, 20.0)
    busy = Load(2, (1.0,) * 7, ended, ({"a": 1.0},) * 7)
    assert busy.busy_rate == 4 / 2.0
    with pytest.raises(ValueError, match="2 requests are too few for 2 clients"):
        _ = Load(2, (1.0,) * 2, ended[:2], ({"a": 1.0},) * 2).busy_rate


@pytest.mark.parametrize(
    ("stages", "wall", "said"),
    [
        ({"encoding": 0.5, "denoising": 0.5}, 6.0, "Overlapping pays here"),
        ({"encoding": 0.4, "denoising": 0.6}, 10.0, "could give 1.67 x on devices of their own"),
        ({"encoding": 0.02, "denoising": 0.98}, 10.0, "leave it whole"),
    ],
)
def test_the_verdict_says_whether_it_pays_to_split_and_what_bounds_it(
    stages: dict[str, float], wall: float, said: str
) -> None:
    alone, many = load(1, [1.0] * 5, stages, 5.0), load(8, [2.0] * 10, stages, wall)
    words = verdict(alone, many)
    assert said in words
    assert f"{10 / wall:.2f} x" in words
