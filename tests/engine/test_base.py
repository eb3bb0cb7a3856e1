"""What every engine does: whom it lets in, and how long it looks for what previews are made with."""

import time
from types import SimpleNamespace
from typing import Any

import pytest

from triptych.engine.base import Engine
from triptych.engine.local import LanesReplica, LocalEngine
from triptych.engine.replica import Handover
from triptych.engine.router import Router
from triptych.errors import OverloadedError
from triptych.request import Request
from triptych.result import Result
from triptych.roles import RoleType


class Slow(Engine):
    """An engine without replicas, whose decoders take all the time that they are given, and tell nothing.

    Attributes:
        asked: how many seconds they had each time, and whether they were to learn it.
    """

    def __init__(self, max_waiting: int = 256) -> None:
        self.front: Any = SimpleNamespace(admit=lambda request: SimpleNamespace(fields={}))
        self.router = Router(lambda handover: Result(seed=0), max_waiting=max_waiting)
        self.asked: list[tuple[float, bool]] = []

    def hand_in(self, state: Any) -> Handover:
        return Handover(RoleType.ENCODER, state)

    def find_projection(self, timeout: float, *, wait: bool = True) -> None:
        self.asked.append((timeout, wait))
        time.sleep(timeout)

    def close(self, timeout: float | None = None) -> None:
        pass


REQUEST = Request(prompt="a fox")


def test_a_request_that_was_taken_on_before_finds_room_where_others_do_not() -> None:
    engine = Slow(max_waiting=1)
    engine.submit(REQUEST)
    with pytest.raises(OverloadedError):
        engine.submit(REQUEST)
    engine.submit(REQUEST, admitted=True)
    assert len(engine.router) == 2
    with pytest.raises(OverloadedError):
        engine.submit(REQUEST)


def test_a_request_waits_for_what_previews_are_made_with_for_a_tenth_of_its_deadline() -> None:
    engine = Slow()
    began = time.monotonic()
    job = engine.submit(REQUEST, deadline=3.0, previews=1)
    assert time.monotonic() - began < 1.0
    assert job.deadline is not None and job.deadline - time.monotonic() > 2.0
    assert engine.asked == [(pytest.approx(0.3, abs=0.05), True)]


def test_what_is_known_already_is_asked_for_within_a_tenth_of_the_deadline_too() -> None:
    engine = Slow()
    engine._projection_sought = True
    engine.submit(REQUEST, deadline=1.0, previews=1)
    assert engine.asked == [(pytest.approx(0.1, abs=0.05), False)]


TIME = 0.4
"""Seconds that several decoders have together."""


def test_the_decoders_of_this_process_are_waited_for_together_no_longer_than_one() -> None:
    class Decoder(LanesReplica):
        def __init__(self) -> None:
            pass

        def projection(self, timeout: float) -> None:
            time.sleep(timeout)

    engine = LocalEngine.__new__(LocalEngine)
    engine.router = SimpleNamespace(replicas=[Decoder() for _ in range(3)])  # type: ignore[assignment]
    began = time.monotonic()
    assert engine.find_projection(TIME) is None
    assert TIME <= time.monotonic() - began < 2 * TIME
    began = time.monotonic()
    assert engine.find_projection(TIME, wait=False) is None
    assert time.monotonic() - began < TIME
