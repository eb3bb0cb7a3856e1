"""Crews: who drives which lane, and that none is ever left with something to do."""

import random
import threading
from collections import deque
from collections.abc import Callable, Iterator

import pytest

from triptych.runtime.crew import Crew


class Desk:
    """A lane of plain calls."""

    def __init__(self, crew: Crew) -> None:
        self._crew = crew
        self._calls: deque[Callable[[], object]] = deque()
        self.drivers: list[int] = []
        self._driven = threading.Lock()

    @property
    def has_work(self) -> bool:
        return bool(self._calls)

    def put(self, call: Callable[[], object]) -> None:
        self._calls.append(call)
        self._crew.wake(self)

    def work(self) -> None:
        assert self._driven.acquire(blocking=False), "two threads drive it"
        self.drivers.append(threading.get_ident())
        self._calls.popleft()()
        self._driven.release()


@pytest.fixture
def crew() -> Iterator[Crew]:
    crew = Crew(3, "test", lambda: None)
    yield crew
    crew.close()
    assert not [each for each in threading.enumerate() if each.name.startswith("test-")]


def test_a_lane_that_ends_hands_its_thread_on(crew: Crew) -> None:
    first, second, third, done = Desk(crew), Desk(crew), Desk(crew), threading.Semaphore(0)
    for _ in range(5):  # the next time, too
        first.put(lambda: second.put(lambda: third.put(done.release)))
        assert done.acquire(timeout=10)
        crew.rest(third)
    assert len({*first.drivers, *second.drivers, *third.drivers}) == 1


def test_a_lane_that_is_not_done_keeps_its_thread_and_holds_nobody_up(crew: Crew) -> None:
    first, second, handed = Desk(crew), Desk(crew), threading.Event()
    went_on: list[bool] = []

    def hand_over() -> None:
        first.put(lambda: None)  # something is left
        second.put(handed.set)
        went_on.append(handed.wait(10))

    first.put(hand_over)
    crew.rest(first)
    assert went_on == [True]
    assert set(first.drivers).isdisjoint(second.drivers)


def test_a_lane_that_was_offered_is_handed_to_another_thread_where_the_own_one_gets_more(crew: Crew) -> None:
    first, second, handed = Desk(crew), Desk(crew), threading.Event()
    went_on: list[bool] = []

    def hand_over() -> None:
        second.put(handed.set)
        first.put(lambda: went_on.append(handed.wait(10)))  # after it had nothing left

    first.put(hand_over)
    crew.rest(first)
    assert went_on == [True]


def test_a_lane_that_hands_to_two_has_only_one_of_them_wait(crew: Crew) -> None:
    first, second, third, met = Desk(crew), Desk(crew), Desk(crew), threading.Barrier(2)

    def hand_over() -> None:
        second.put(lambda: met.wait(10))
        third.put(lambda: met.wait(10))

    first.put(hand_over)
    for lane in (first, second, third):
        crew.rest(lane)
    assert not met.broken and set(second.drivers).isdisjoint(third.drivers)


def test_whatever_lanes_hand_each_other_is_done(crew: Crew) -> None:
    lanes, chance, done = [Desk(crew) for _ in range(3)], random.Random(0), threading.Semaphore(0)

    def pass_on(hops: int) -> None:
        if hops:
            chance.choice(lanes).put(lambda: pass_on(hops - 1))
        else:
            done.release()

    for _ in range(300):
        chance.choice(lanes).put(lambda: pass_on(20))
    assert all(done.acquire(timeout=20) for _ in range(300))
    for lane in lanes:
        crew.rest(lane)
        assert not lane.has_work
