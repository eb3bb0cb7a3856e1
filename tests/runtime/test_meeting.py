"""Meetings: parts of several requests run side by side, share calls of a model, and do not harm each other."""

import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextvars import ContextVar

import pytest
import torch

from triptych.components import interruption
from triptych.runtime import pace
from triptych.runtime.meeting import Meeting
from triptych.runtime.pace import LONGEST

CPU = torch.device("cpu")


class Model(torch.nn.Linear):
    """A row-wise model that notes the rows of its calls."""

    def __init__(self) -> None:
        super().__init__(3, 2)
        self.rows: list[int] = []

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        self.rows.append(len(input))
        if (input == 13).any():
            raise ValueError("13 is not accepted")
        return super().forward(input.to(self.weight.dtype))


def compute(seconds: float) -> None:
    """Keep a core busy."""
    until = time.thread_time() + seconds
    while time.thread_time() < until:
        pass


@pytest.fixture
def model() -> Model:
    return Model()


@pytest.fixture
def meeting() -> Iterator[Meeting]:
    made = Meeting(CPU, rows=8)
    yield made
    made.close()


class Asking:
    """A part that calls a model once for each of its inputs."""

    def __init__(self, model: torch.nn.Module, *inputs: torch.Tensor) -> None:
        self.model, self.inputs = model, inputs
        self.got: list[torch.Tensor] = []

    def __call__(self) -> None:
        with torch.no_grad():
            for each in self.inputs:
                self.got.append(self.model(each))


def test_parts_share_calls_and_get_their_own_rows(model: Model, meeting: Meeting) -> None:
    inputs = [torch.randn(n, 3) for n in (1, 2, 1)]
    parts = [Asking(model, each, each + 1) for each in inputs]
    guests = meeting.run(parts, [model])
    assert model.rows == [4, 4]
    assert [guest.error for guest in guests] == [None] * 3
    for part, each in zip(parts, inputs):
        for got, given in zip(part.got, (each, each + 1)):
            torch.testing.assert_close(got, model(given).detach())


def test_parts_with_fewer_calls_do_not_hold_up_the_others(model: Model, meeting: Meeting) -> None:
    inputs = [torch.randn(1, 3) for _ in range(6)]
    parts = [Asking(model), Asking(model, inputs[0]), Asking(model, *inputs[1:4]), Asking(model, *inputs[4:])]
    meeting.run(parts, [model])
    assert model.rows == [3, 2, 1]
    assert [len(part.got) for part in parts] == [0, 1, 3, 2]


def test_many_parts_may_meet(model: Model, meeting: Meeting) -> None:
    for many in (3, 40):
        meeting.run([Asking(model, torch.randn(1, 3)) for _ in range(many)], [model])
    assert model.rows == [3, 8, 8, 8, 8, 8]


def test_only_the_part_whose_call_is_at_fault_fails(
    model: Model, meeting: Meeting, caplog: pytest.LogCaptureFixture
) -> None:
    parts = [Asking(model, torch.full((1, 3), value)) for value in (1.0, 13.0, 2.0)]
    good, bad, also_good = meeting.run(parts, [model])
    assert isinstance(bad.error, ValueError) and good.error is None and also_good.error is None
    assert model.rows == [3, 1, 1, 1]
    assert "run apart" in caplog.text


def test_calls_of_the_same_content_fail_each_by_itself(model: Model, meeting: Meeting) -> None:
    one, other = meeting.run([Asking(model, torch.full((1, 3), 13)) for _ in range(2)], [model])
    assert isinstance(one.error, ValueError) and isinstance(other.error, ValueError)
    assert one.error is not other.error
    assert model.rows == [1, 1]


def test_a_part_that_fails_by_itself_fails_alone(model: Model, meeting: Meeting) -> None:
    def failing() -> None:
        model(torch.zeros(1, 3))
        raise KeyError("mine")

    asking = Asking(model, torch.zeros(1, 3), torch.ones(1, 3))
    failed, fine = meeting.run([failing, asking], [model])
    assert isinstance(failed.error, KeyError) and fine.error is None
    assert len(asking.got) == 2


def test_a_part_that_panics_fails_alone(model: Model, meeting: Meeting) -> None:
    class Panic(BaseException):
        pass

    def panicking() -> None:
        raise Panic("index out of bounds")

    asking = Asking(model, torch.zeros(1, 3))
    failed, fine = meeting.run([panicking, asking], [model])
    assert isinstance(failed.error, RuntimeError) and str(failed.error) == "Panic: index out of bounds"
    assert fine.error is None and len(asking.got) == 1


def test_parts_that_can_not_all_have_a_thread_fail_and_leave_none_waiting(
    model: Model, meeting: Meeting, monkeypatch: pytest.MonkeyPatch
) -> None:
    start, before = threading.Thread.start, threading.active_count()

    def scarce(thread: threading.Thread) -> None:
        if threading.active_count() > before:
            raise RuntimeError("can't start new thread")
        start(thread)

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", scarce)
        with pytest.raises(RuntimeError, match="can't start new thread"):
            meeting.run([Asking(model, torch.zeros(1, 3)) for _ in range(2)], [model])
    deadline = time.monotonic() + 10
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() == before
    asking = Asking(model, torch.zeros(1, 3))
    meeting.run([asking, Asking(model, torch.ones(1, 3))], [model])
    assert len(asking.got) == 1


def test_the_same_tokens_are_computed_once_and_given_as_copies(model: Model, meeting: Meeting) -> None:
    tokens = torch.tensor([[1, 2, 3]])
    parts = [Asking(model, tokens.clone()), Asking(model, tokens.clone()), Asking(model, tokens + 1)]
    meeting.run(parts, [model])
    assert model.rows == [2]
    first, same, other = (part.got[0] for part in parts)
    assert torch.equal(first, same) and not torch.equal(first, other)
    first.zero_()
    assert same.any()


def test_the_module_is_left_as_it_was_and_others_pass_meanwhile(model: Model, meeting: Meeting) -> None:
    passed: list[torch.Tensor] = []

    def part() -> None:
        elsewhere = threading.Thread(target=lambda: passed.append(model(torch.zeros(5, 3))))
        elsewhere.start()
        elsewhere.join(10)
        model(torch.zeros(1, 3))

    meeting.run([part, Asking(model, torch.ones(1, 3))], [model])
    assert "forward" not in vars(model)
    assert model.rows == [5, 2] and len(passed) == 1


def test_hooks_run_once_for_each_request(model: Model, meeting: Meeting) -> None:
    seen: list[int] = []
    model.register_forward_hook(lambda _, args, output: seen.append(len(output)))
    meeting.run([Asking(model, torch.randn(n, 3)) for n in (1, 2)], [model])
    assert sorted(seen) == [1, 2] and model.rows == [3]


def test_parts_keep_the_context_they_were_made_in_and_do_not_share_it(model: Model, meeting: Meeting) -> None:
    name: ContextVar[str] = ContextVar("name")
    name.set("mine")
    seen: list[str] = []

    def part(own: str) -> Callable[[], None]:
        def run() -> None:
            seen.append(name.get())
            name.set(own)
            model(torch.zeros(1, 3))
            seen.append(name.get())

        return run

    meeting.run([part("a"), part("b")], [model])
    assert seen == ["mine", "mine", "a", "b"] and name.get() == "mine"


def test_a_module_may_call_another_that_is_shared_too(model: Model, meeting: Meeting) -> None:
    class Outer(Model):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            self.rows.append(len(input))
            return torch.as_tensor(model(input))

    outer = Outer()
    parts = [Asking(outer, torch.zeros(1, 3)), Asking(outer, torch.ones(1, 3)), Asking(model, torch.ones(1, 3))]
    meeting.run(parts, [outer, model])
    assert outer.rows == [2] and sorted(model.rows) == [1, 2]


def test_no_thread_is_left_waiting_when_a_meeting_breaks_off(model: Model, meeting: Meeting) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    def stubborn() -> None:
        for _ in range(2):
            try:
                model(torch.zeros(1, 3))
            except BaseException as error:  # noqa: BLE001 (as a library might)
                seen.append(type(error))

    seen: list[type[BaseException]] = []
    model.forward = interrupt  # type: ignore[method-assign, assignment]
    with pytest.raises(KeyboardInterrupt):
        meeting.run([stubborn, stubborn, Asking(model, torch.zeros(1, 3))], [model])
    assert seen == [KeyboardInterrupt] * 4
    meeting.close()  # waits for the threads


def test_a_compiled_module_is_left_alone(model: Model, meeting: Meeting) -> None:
    model._compiled_call_impl = model._call_impl
    meeting.run([Asking(model, torch.zeros(1, 3)), Asking(model, torch.ones(1, 3))], [model])
    assert model.rows == [1, 1]


def test_it_learns_that_calls_gain_nothing(model: Model) -> None:
    class Bound(Model):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            compute(2e-3 * len(input) ** 1.5)
            return super().forward(input)

    bound, meeting = Bound(), Meeting(CPU)
    for _ in range(5):
        meeting.recount()
        meeting.run([Asking(bound, torch.randn(1, 3)) for _ in range(4)], [bound])
    assert meeting.worth == 1
    assert bound.rows[-4:] == [1] * 4
    meeting.close()


def test_it_learns_that_calls_gain(model: Model) -> None:
    class Waiting(Model):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            compute(2e-3)
            return super().forward(input)

    waiting, meeting = Waiting(), Meeting(CPU)
    for _ in range(12):
        meeting.run([Asking(waiting, torch.randn(1, 3)) for _ in range(8)], [waiting])
    assert meeting.worth is not None and meeting.worth >= 8
    assert waiting.rows[-1] == 8
    meeting.close()


def test_seconds_are_split_by_rows(meeting: Meeting) -> None:
    class Slow(Model):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            threading.Event().wait(LONGEST / 2)
            return super().forward(input)

    slow = Slow()
    small, large = meeting.run([Asking(slow, torch.randn(n, 3)) for n in (1, 3)], [slow])
    assert small.seconds == pytest.approx(LONGEST / 8, rel=0.4)
    assert large.seconds == pytest.approx(3 * LONGEST / 8, rel=0.4)


def rehearse_all(meeting: Meeting) -> None:
    for _ in range(100):
        if not meeting.eager:
            return
        meeting.rehearse()
    raise AssertionError("it does not come to an end")


class Overhead(Model):
    """A model whose calls take the same time whatever their rows."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        compute(0.005)
        return super().forward(input)


def test_a_new_kind_of_call_is_tried_with_more_rows_when_there_is_nothing_else_to_do() -> None:
    model, meeting = Overhead(), Meeting(CPU)
    meeting.run([Asking(model, torch.randn(1, 3)) for _ in range(2)], [model])
    assert meeting.eager
    before = len(model.rows)
    rehearse_all(meeting)
    assert max(model.rows[before:]) == 16, "memory has been at its highest"
    meeting.recount()
    meeting.run([Asking(model, torch.randn(1, 3)) for _ in range(16)], [model])
    assert model.rows[-1] == 16, "no request has to be a trial"
    assert meeting.worth == 16
    assert not meeting.eager
    meeting.close()


class Computing(Model):
    """A model whose calls take as long for each row."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        compute(0.02 * len(input))
        return super().forward(input)


def test_the_calls_that_take_most_of_the_time_tell_how_many_parts_are_worth_it() -> None:
    """As with a large and a tiny text encoder: nobody is to wait for the large one because of the tiny one's gain."""
    long, short, meeting = Computing(), Overhead(), Meeting(CPU)

    def both() -> None:
        for _ in range(2):
            Asking(short, torch.randn(1, 3))()
        Asking(long, torch.randn(1, 3))()

    meeting.run([both, both], [long, short])
    rehearse_all(meeting)
    meeting.recount()
    meeting.run([both, both], [long, short])
    assert meeting.worth == 1
    meeting.recount()
    assert meeting.worth is None
    meeting.run([Asking(short, torch.randn(1, 3))], [long, short])
    assert meeting.worth == 16, "by itself it gains"
    meeting.close()


def test_a_kind_of_call_does_not_weigh_the_more_the_more_parts_meet_in_it() -> None:
    class Large(Overhead):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            compute(0.05)
            return super().forward(input)

    gains, short, meeting = Large(), Computing(), Meeting(CPU)

    def both() -> None:
        Asking(gains, torch.randn(1, 3))()
        Asking(short, torch.randn(1, 3))()

    meeting.run([both, both], [gains, short])
    rehearse_all(meeting)
    meeting.recount()
    meeting.run([both] * 6, [gains, short])
    assert meeting.worth == 16, "each waits for its own short call only"
    meeting.close()


def test_a_call_that_cannot_be_shared_is_worth_no_waiting_where_it_takes_most_of_the_time() -> None:
    class Scaled(torch.nn.Module):
        def forward(self, input: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
            compute(0.1)
            return input * scale

    scaled, short, meeting = Scaled(), Overhead(), Meeting(CPU)

    def both() -> None:
        scaled(short(torch.randn(1, 3)), torch.tensor(2.0))

    guests = meeting.run([both, both], [scaled, short])
    assert meeting.worth == 1
    assert all(guest.seconds >= 0.1 for guest in guests)
    meeting.close()


@pytest.mark.parametrize(("longest", "most"), [(LONGEST, 16), (0.05, 4)])
def test_where_more_rows_gain_nothing_the_most_are_tried_once_so_that_memory_is_at_its_highest(
    monkeypatch: pytest.MonkeyPatch, longest: float, most: int
) -> None:
    monkeypatch.setattr(pace, "LONGEST", longest)
    model, meeting = Computing(), Meeting(CPU)
    meeting.run([Asking(model, torch.randn(1, 3)) for _ in range(2)], [model])
    rehearse_all(meeting)
    assert (max(model.rows), model.rows.count(most)) == (most, 1)
    meeting.close()


@pytest.mark.parametrize("rows", [1, 3])
def test_what_is_known_to_take_too_long_is_not_tried_at_all(monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    monkeypatch.setattr(pace, "LONGEST", 0.01)
    model, meeting = Computing(), Meeting(CPU)
    meeting.run([Asking(model, torch.randn(rows, 3)) for _ in range(2)], [model])
    rehearse_all(meeting)
    assert model.rows == [rows, rows] and meeting.worth == 1
    meeting.close()


def test_a_kind_whose_first_call_only_warmed_up_is_tried_once_that_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    class Cold(Overhead):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            compute(0.0 if self.rows else 0.1)
            return super().forward(input)

    monkeypatch.setattr(pace, "LONGEST", 0.05)
    model, meeting = Cold(), Meeting(CPU)
    meeting.run([Asking(model, torch.randn(1, 3))], [model])
    assert not meeting.eager
    meeting.run([Asking(model, torch.randn(1, 3))], [model])
    rehearse_all(meeting)
    assert max(model.rows) == 16
    meeting.close()


class Picky(Computing):
    """A model that refuses 13 at once, and computes everything else."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return Model.forward(self, input) if (input == 13).any() else super().forward(input)


@pytest.mark.parametrize("values", [(13.0, 1.0), (1.0, 13.0)])
def test_a_call_that_failed_at_once_does_not_pass_for_a_fast_one(
    monkeypatch: pytest.MonkeyPatch, values: tuple[float, float]
) -> None:
    monkeypatch.setattr(pace, "LONGEST", 0.01)
    model, meeting = Picky(), Meeting(CPU)
    for _ in range(3):
        guests = meeting.run([Asking(model, torch.full((1, 3), value)) for value in values], [model])
        assert [guest.error is None for guest in guests] == [value == 1 for value in values]
        rehearse_all(meeting)
    assert max(model.rows) == 1, "neither a trial nor a shared call"
    meeting.close()


def test_a_call_that_failed_is_not_repeated_as_a_trial() -> None:
    model, meeting = Picky(), Meeting(CPU)
    meeting.run([Asking(model, torch.full((1, 3), 13.0))], [model])
    assert not meeting.eager
    meeting.run([Asking(model, torch.full((1, 3), 1.0))], [model])
    assert meeting.eager, "what did not fail may be"
    meeting.close()


def test_a_trial_of_one_request_s_rows_that_fails_ends_the_trials() -> None:
    class Breaking(Overhead):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            if self.rows:
                raise RuntimeError("it worked once")
            return super().forward(input)

    model, meeting = Breaking(), Meeting(CPU)
    meeting.run([Asking(model, torch.randn(1, 3))], [model])
    assert meeting.eager
    rehearse_all(meeting)
    meeting.close()


def test_a_trial_that_fails_ends_the_trials_and_harms_no_request(caplog: pytest.LogCaptureFixture) -> None:
    class Small(Overhead):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            if len(input) > 4:
                raise MemoryError("no room for more than four")
            return super().forward(input)

    model, meeting = Small(), Meeting(CPU)
    meeting.run([Asking(model, torch.randn(1, 3)) for _ in range(2)], [model])
    rehearse_all(meeting)
    guests = meeting.run([Asking(model, torch.randn(1, 3)) for _ in range(8)], [model])
    assert [guest.error for guest in guests] == [None] * 8
    assert model.rows[-2:] == [4, 4]
    meeting.close()


def test_a_trial_is_made_outside_of_the_request_whose_call_it_repeats() -> None:
    check: ContextVar[threading.Event | None] = ContextVar("check", default=None)
    cancelled = threading.Event()

    class Cancellable(Overhead):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            event = check.get()
            assert event is None or not event.is_set(), "its request was cancelled"
            return super().forward(input)

    model, meeting = Cancellable(), Meeting(CPU)

    def request() -> None:
        check.set(cancelled)
        model(torch.zeros(1, 3))

    meeting.run([request, Asking(model, torch.randn(1, 3))], [model])
    cancelled.set()
    rehearse_all(meeting)
    assert max(model.rows) == 16
    meeting.close()


def test_kinds_whose_rows_are_given_need_no_trials(model: Model, meeting: Meeting) -> None:
    meeting.run([Asking(model, torch.randn(1, 3)) for _ in range(2)], [model])
    assert not meeting.eager


@pytest.mark.parametrize("rows", range(1, 18))
@pytest.mark.parametrize("earlier", [(), (1,)])
def test_the_trials_of_calls_of_any_number_of_rows_come_to_an_end(rows: int, earlier: tuple[int, ...]) -> None:
    model, meeting = Overhead(), Meeting(CPU)
    try:
        for each in (rows, *earlier):
            meeting.run([Asking(model, torch.randn(each, 3))], [model])
        assert meeting.eager
        rehearse_all(meeting)
        assert max(model.rows) <= max(16, rows)
        if rows <= 8 and not earlier:
            assert max(model.rows) > 8, "as many as there may be were tried"
    finally:
        meeting.close()


def test_a_shared_call_that_fails_holds_nothing_while_its_calls_are_made_apart() -> None:
    held: list[weakref.ref[torch.Tensor]] = []
    alive: list[bool] = []

    class Hungry(Model):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            if len(input) > 1:
                large = torch.ones(1000)
                held.append(weakref.ref(large))
                raise torch.OutOfMemoryError("no room for two")
            alive.append(held[0]() is not None)
            return super().forward(input)

    model, meeting = Hungry(), Meeting(CPU, rows=8)
    guests = meeting.run([Asking(model, torch.randn(1, 3)) for _ in range(2)], [model])
    assert [guest.error for guest in guests] == [None] * 2
    assert alive == [False, False]
    meeting.close()


def test_the_end_of_one_request_does_not_interrupt_a_call_that_it_shares(model: Model, meeting: Meeting) -> None:
    """Its own part ends with it, the others have theirs from the same call."""
    cancelled = threading.Event()

    class Tiled(Model):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            cancelled.set()  # while it computes
            interruption._look()  # as between two tiles
            return super().forward(input)

    def check() -> None:
        if cancelled.is_set():
            raise RuntimeError("cancelled")

    tiled, other = Tiled(), Asking(model, torch.randn(1, 3))
    other.model = tiled

    def gone() -> None:
        with interruption.interruptible(check):
            tiled(torch.randn(1, 3))
            check()

    guests = meeting.run([gone, other], [tiled])
    assert tiled.rows == [2], "one call for both"
    assert str(guests[0].error) == "cancelled" and guests[1].error is None
