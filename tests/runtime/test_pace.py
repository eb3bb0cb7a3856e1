"""How many rows a shared call has: learned from what calls took."""

from hypothesis import given
from hypothesis import strategies as st

from triptych.runtime.pace import GAIN, LONGEST, MOST_ROWS, RECHECK, TRIALS, Appetite, Pace


def learned(pace: Pace, overhead: float, each: float, calls: int = 40) -> Pace:
    """Make calls that take `overhead` seconds and `each` seconds a row."""
    for _ in range(calls):
        rows = pace.aim
        pace.note(rows, overhead + each * rows)
    return pace


def test_calls_that_are_mostly_overhead_are_shared_by_as_many_as_may() -> None:
    pace = learned(Pace(), overhead=1e-3, each=1e-6)
    assert pace.aim == pace.worth == MOST_ROWS


def test_calls_that_are_bound_by_computing_are_not_shared() -> None:
    pace = learned(Pace(), overhead=0, each=1e-3)
    assert pace.aim == pace.worth == 1


@given(overhead=st.floats(1e-6, 1e-2), each=st.floats(1e-6, 1e-2))
def test_the_last_doubling_was_worth_it_and_the_next_is_not(overhead: float, each: float) -> None:
    rows = learned(Pace(), overhead, each).aim
    a_row = {n: overhead / n + each for n in (rows / 2, rows, rows * 2)}
    if rows > 1:
        assert a_row[rows] * GAIN <= a_row[rows / 2] * (1 + 1e-9)
    if rows < MOST_ROWS and (overhead + each * rows) < LONGEST:
        assert a_row[rows * 2] * GAIN > a_row[rows] * (1 - 1e-9)


def test_one_slow_call_does_not_decide() -> None:
    pace = Pace()
    for rows in (1, 2):
        for k in range(TRIALS):
            pace.note(rows, 1e-3 if k else 10 * 1e-3)  # each number of rows warms up
    assert pace.aim == 4


def test_nothing_is_made_larger_that_takes_long() -> None:
    pace = learned(Pace(), overhead=LONGEST * 2, each=1e-3)
    assert pace.aim == 1


def test_a_call_that_took_too_long_is_not_asked_for_again() -> None:
    pace = Pace()
    pace.note(1, LONGEST * 1.1)
    assert pace.settled and pace.aim == pace.worth == pace.most == 1
    pace.note(1, LONGEST / 10)
    assert not pace.settled and pace.worth == 2, "the first one had only warmed up"


def test_before_anything_is_known_two_are_worth_a_trial() -> None:
    assert (Pace().aim, Pace().worth) == (1, 2)
    pictures_of_four_outputs = Pace()
    pictures_of_four_outputs.note(4, 1e-3)
    assert pictures_of_four_outputs.worth == 8


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_what_was_found_too_slow_is_tried_again_after_a_while() -> None:
    clock = Clock()
    pace = learned(Pace(clock=clock), overhead=0, each=1e-3)
    assert learned(pace, overhead=1e-3, each=1e-6).aim == 1
    for _ in range(3):
        clock.now += RECHECK * 1.1
        learned(pace, overhead=1e-3, each=1e-6)
    assert pace.aim >= 4


def test_what_failed_or_took_long_is_tried_again_after_a_while() -> None:
    clock = Clock()
    pace = Pace(limit=1, clock=clock)
    assert learned(pace, overhead=1e-3, each=1e-6).aim == 1
    clock.now += RECHECK * 1.1
    assert learned(pace, overhead=1e-3, each=1e-6).aim == 2


def test_the_memory_of_a_row_is_measured_anew_after_a_while() -> None:
    clock = Clock()
    pace = learned(Pace(bytes=1e9, clock=clock), overhead=1e-3, each=1e-6)
    assert pace.bytes == 1e9
    clock.now += RECHECK * 1.1
    pace.note(1, 1e-3)
    assert pace.bytes == 0, "another lane's may have been counted"


def test_a_kind_that_gained_nothing_is_tried_together_again_after_a_while() -> None:
    clock = Clock()
    appetite = Appetite(clock=clock)
    assert appetite.size == 2
    appetite.note(0, seconds=LONGEST / 2)
    assert appetite.size == 1
    clock.now += RECHECK * 1.1
    assert appetite.size == 2
    appetite.note(8, seconds=LONGEST)
    assert appetite.size == 8


def test_a_kind_that_takes_long_is_left_alone_for_longer() -> None:
    clock = Clock()
    appetite = Appetite(clock=clock)
    appetite.note(1, seconds=10 * LONGEST)
    clock.now += RECHECK * 9
    assert appetite.size == 1
    clock.now += RECHECK * 2
    assert appetite.size == 2
