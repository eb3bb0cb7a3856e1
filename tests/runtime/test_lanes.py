"""Lanes: requests of many kinds on one model come out as they would alone, and none harms another."""

import threading
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import triptych
from triptych.components.acceleration import Acceleration
from triptych.errors import Cancelled, DeadlineExceeded
from triptych.roles import RoleType
from triptych.runtime import budget, lanes, step_lane, streams
from triptych.runtime.lanes import Lane, Work
from triptych.runtime.model import Model
from triptych.runtime.step_lane import StepLane
from triptych.runtime.turns import Turns
from triptych.stages.denoising import Denoising
from triptych.state import State

ASK: dict[str, Any] = {
    "prompt": "a red fox", "seed": 7, "height": 64, "width": 48, "num_inference_steps": 4, "output_type": "pt",
    "max_sequence_length": 24, "exact": False,
}  # fmt: skip
LARGE = 10**9
"""A budget that no forward reaches."""


@pytest.fixture(scope="module")
def model(tiny_repo: Callable[..., Path]) -> Model:
    return triptych.load(tiny_repo("flux2_klein"), device="cpu")


@pytest.fixture
def lane(model: Model) -> Iterator[StepLane]:
    lane = StepLane(model, "test", threads=1, budget=LARGE)
    yield lane
    lane.close()


class Forwards:
    """Counts a transformer's forwards and their rows; holds them up while `closed`."""

    def __init__(self, model: Model) -> None:
        self.rows: list[int] = []
        self.open = threading.Event()
        self.open.set()
        self.entered = threading.Event()
        self._hook = model.components["transformer"].register_forward_pre_hook(self._before, with_kwargs=True)

    def _before(self, _: Any, args: Any, kwargs: dict[str, Any]) -> None:
        self.rows.append(len(kwargs["hidden_states"]))
        self.entered.set()
        assert self.open.wait(20)

    def remove(self) -> None:
        self.open.set()
        self._hook.remove()


@pytest.fixture
def forwards(model: Model) -> Iterator[Forwards]:
    counted = Forwards(model)
    yield counted
    counted.remove()


def encoded(model: Model, **changes: Any) -> State:
    """A state that waits for the denoiser."""
    state = model.admit(triptych.Request(**{**ASK, **changes}))
    for _ in model.segment(state):
        raise AssertionError("encoding has no denoising loop")
    return state


class Outcomes:
    """Collects what lanes tell of works, and waits for all of it."""

    def __init__(self) -> None:
        self.of: dict[str, Any] = {}
        self.order: list[str] = []
        self._changed = threading.Condition()

    def put(self, lane: Lane, name: str, state: State, **options: Any) -> Work:
        def done(outcome: Any) -> None:
            with self._changed:
                self.of[name] = outcome
                self.order.append(name)
                self._changed.notify_all()

        work = Work(state, done, **options)
        lane.put(work)
        return work

    def wait(self, count: int) -> dict[str, Any]:
        with self._changed:
            assert self._changed.wait_for(lambda: len(self.of) >= count, 30), f"only {self.order} ended"
        return self.of


def alone(model: Model, state: State) -> torch.Tensor:
    latents: torch.Tensor = model.run(state).fields["images"]
    return latents


MIXED: dict[str, dict[str, Any]] = {
    "plain": {},
    "longer": {"num_inference_steps": 7, "seed": 8, "prompt": "two hens"},
    "larger": {"height": 80, "width": 64, "seed": 9},
    "turned": {"height": 48, "width": 64, "seed": 10},  # as many tokens as `plain`, at other positions
    "two": {"num_images_per_prompt": 2, "seed": 11},
    "unguided": {"guidance_scale": 1.0, "seed": 12},
}


def test_exact_requests_on_one_lane_equal_single_runs_to_the_bit(model: Model, lane: StepLane) -> None:
    states = {name: encoded(model, exact=True, **changes) for name, changes in MIXED.items()}
    outcomes = Outcomes()
    for name, state in states.items():
        outcomes.put(lane, name, state.copy())
    for name, state in outcomes.wait(len(states)).items():
        expected = model.run(states[name])
        finished = model.run(state)
        assert torch.equal(finished.result.images, expected.result.images), name


def test_mixed_requests_share_forwards_and_stay_within_the_tolerance(
    model: Model, lane: StepLane, forwards: Forwards
) -> None:
    states = {name: encoded(model, **changes) for name, changes in MIXED.items()}
    expected = {name: model.run(replaced_exact(state)).result.images for name, state in states.items()}
    forwards.rows.clear()
    forwards.open.clear()
    outcomes = Outcomes()
    outcomes.put(lane, "plain", states["plain"].copy())
    assert forwards.entered.wait(10)  # the others arrive while the first is under way, and join it at its second step
    for name, state in states.items():
        if name != "plain":
            outcomes.put(lane, name, state.copy())
    forwards.open.set()
    finished = outcomes.wait(len(states))
    assert max(forwards.rows) >= 5, f"rows of the forwards: {forwards.rows}"
    for name, state in finished.items():
        worst = (model.run(state).result.images - expected[name]).abs().max().item()
        assert worst <= 1e-4, f"{name} differs by {worst}"


def replaced_exact(state: State) -> State:
    copy = state.copy()
    copy.fields["exact"] = True
    return copy


def test_sizes_with_as_many_tokens_do_not_share_positions(model: Model, lane: StepLane, forwards: Forwards) -> None:
    outcomes = Outcomes()
    forwards.open.clear()
    outcomes.put(lane, "plain", encoded(model, num_inference_steps=2))
    outcomes.put(lane, "turned", encoded(model, num_inference_steps=2, height=48, width=64))
    forwards.open.set()
    outcomes.wait(2)
    assert set(forwards.rows) == {2}, "guidance branches share a forward, the two requests do not"


def test_the_budget_bounds_a_forward(model: Model, forwards: Forwards) -> None:
    states = [encoded(model, seed=seed) for seed in range(4)]
    turn = next(model.segment(states[0].copy()))
    lane = StepLane(model, "test", threads=1, budget=sum(forward.size for forward in turn.forwards) * 2)
    outcomes = Outcomes()
    forwards.open.clear()
    for number, state in enumerate(states):
        outcomes.put(lane, str(number), state)
    forwards.open.set()
    outcomes.wait(4)
    lane.close()
    assert max(forwards.rows) == 4, "two requests of two guidance branches each"


def test_a_short_request_overtakes_a_long_one(model: Model, forwards: Forwards) -> None:
    lane = StepLane(model, "test", threads=1, budget=0)
    outcomes = Outcomes()
    outcomes.put(lane, "long", encoded(model, num_inference_steps=40))
    assert forwards.entered.wait(10)
    outcomes.put(lane, "short", encoded(model, num_inference_steps=2))
    outcomes.wait(2)
    lane.close()
    assert outcomes.order == ["short", "long"]


def test_a_request_that_cannot_meet_its_deadline_holds_up_no_others(model: Model, forwards: Forwards) -> None:
    lane, outcomes = StepLane(model, "test", threads=1, budget=0), Outcomes()
    hopeless, short = encoded(model, num_inference_steps=8000), encoded(model, num_inference_steps=2)
    deadline = time.monotonic() + 3
    outcomes.put(lane, "hopeless", hopeless, deadline=deadline)
    while len(forwards.rows) < 10:
        time.sleep(0.01)
    outcomes.put(lane, "short", short)
    outcomes.wait(1)
    ended = time.monotonic()
    outcomes.wait(2)
    lane.close()
    assert outcomes.order == ["short", "hopeless"]
    assert ended < deadline - 1
    assert isinstance(outcomes.of["hopeless"], DeadlineExceeded)


@pytest.mark.parametrize(
    ("seconds_each", "seconds_left", "first"),
    [(1.0, 99.0, False), (1.0, 101.0, True), (1.0, 119.0, True), (1.0, 121.0, False), (0.0, 1.0, False)],
)
def test_a_request_goes_first_as_long_as_it_can_just_meet_its_deadline(
    lane: StepLane, seconds_each: float, seconds_left: float, first: bool
) -> None:
    now = time.monotonic()
    lane._seconds_each = seconds_each
    urgent = lane._urgency(runner(100, now, deadline=now + seconds_left), now)
    assert (urgent < lane._urgency(runner(1, now), now)) == first


@pytest.mark.parametrize(
    ("joined", "served", "first"),
    [(67.0, 67.0, "short"), (67.0, 66.9, "short"), (67.0, 70.0, "short"), (67.0, 0.0, "long"), (130.0, 67.0, "long")],
)
def test_only_waiting_brings_a_request_forward_and_not_what_it_was_served(
    lane: StepLane, joined: float, served: float, first: str
) -> None:
    """A long one with 33 s to go, and a short one of 4 s that has just come."""
    now = time.monotonic()
    lane._seconds_each = 1.0
    queue = {"long": runner(33, now - joined, served=served), "short": runner(4, now)}
    assert min(queue, key=lambda name: lane._urgency(queue[name], now)) == first


def runner(steps: int, joined: float, *, served: float = 0.0, deadline: float | None = None) -> Any:
    """A request with so many steps left."""
    work = SimpleNamespace(deadline=deadline, seconds=0.0)
    return SimpleNamespace(turn=SimpleNamespace(left=steps), size=1, joined=joined, served=served, work=work)


def test_a_forward_that_two_share_serves_both_for_as_long_as_it_takes(lane: StepLane) -> None:
    both = [runner(10, 0.0), runner(10, 0.0)]
    lane._timed.append((SimpleNamespace(seconds=3.0), [(both[0], 1), (both[1], 2)]))  # type: ignore[arg-type]
    lane._account()
    assert [each.served for each in both] == [3.0, 3.0]
    assert [each.work.seconds for each in both] == [1.0, 2.0]


def test_a_cancelled_request_stops_before_its_next_step(model: Model, lane: StepLane, forwards: Forwards) -> None:
    outcomes = Outcomes()
    forwards.open.clear()
    work = outcomes.put(lane, "gone", encoded(model, num_inference_steps=50))
    assert forwards.entered.wait(10)
    work.cancel()
    forwards.open.set()
    assert isinstance(outcomes.wait(1)["gone"], Cancelled)
    assert len(forwards.rows) == 1


def test_a_request_past_its_deadline_stops(model: Model, lane: StepLane) -> None:
    outcomes = Outcomes()
    outcomes.put(lane, "late", encoded(model), deadline=time.monotonic() - 1)
    outcomes.put(lane, "soon", encoded(model, num_inference_steps=2000), deadline=time.monotonic() + 0.3)
    ended = outcomes.wait(2)
    assert isinstance(ended["late"], DeadlineExceeded)
    assert isinstance(ended["soon"], DeadlineExceeded)


class Panic(BaseException):
    """What a library written in Rust raises where it should not: no `Exception`."""


@pytest.mark.parametrize("kind", [Lane, StepLane])
def test_a_library_s_panic_ends_its_request_and_not_the_lane(
    model: Model, kind: type[Lane], monkeypatch: pytest.MonkeyPatch
) -> None:
    def panic(*_: Any) -> Any:
        raise Panic("index out of bounds")

    lane, outcomes = kind(model, "test", threads=1), Outcomes()
    states = [encoded(model), encoded(model)]
    with monkeypatch.context() as patch:
        patch.setattr(model, "segment", panic)
        outcomes.put(lane, "first", states[0])
        error = outcomes.wait(1)["first"]
    assert isinstance(error, RuntimeError) and str(error) == "Panic: index out of bounds"
    outcomes.put(lane, "second", states[1])
    assert isinstance(outcomes.wait(2)["second"], State)
    lane.close()


def test_a_request_that_fails_leaves_those_beside_it_alone(model: Model, lane: StepLane, forwards: Forwards) -> None:
    good, bad = encoded(model), encoded(model, seed=8)
    expected = model.run(replaced_exact(good)).result.images
    bad.fields["prompt_embeds"] = bad.fields["prompt_embeds"][..., :-1]
    outcomes = Outcomes()
    forwards.open.clear()
    outcomes.put(lane, "good", good)
    outcomes.put(lane, "bad", bad)
    forwards.open.set()
    ended = outcomes.wait(2)
    assert isinstance(ended["bad"], Exception)
    assert (model.run(ended["good"]).result.images - expected).abs().max() <= 1e-4


@pytest.mark.parametrize("budget", [None, 0])
def test_a_request_whose_own_branches_do_not_fit_together_runs_them_apart(
    model: Model, forwards: Forwards, budget: int | None
) -> None:
    def fail(_: Any, args: Any, kwargs: dict[str, Any]) -> None:
        if len(kwargs["hidden_states"]) > 1:
            raise torch.OutOfMemoryError("no room")

    hook = model.components["transformer"].register_forward_pre_hook(fail, with_kwargs=True)
    lane, outcomes = StepLane(model, "test", threads=1, budget=budget), Outcomes()
    forwards.open.set()
    try:
        outcomes.put(lane, "one", encoded(model))
        assert isinstance(outcomes.wait(1)["one"], State)
    finally:
        hook.remove()
        lane.close()


def test_forwards_for_which_memory_does_not_suffice_are_not_shared_again(model: Model, forwards: Forwards) -> None:
    held: list[weakref.ref[torch.Tensor]] = []
    alive: list[bool] = []

    def fail(_: Any, args: Any, kwargs: dict[str, Any]) -> None:
        if len(kwargs["hidden_states"]) > 2:
            joined = kwargs["hidden_states"]
            held.append(weakref.ref(joined))
            raise torch.OutOfMemoryError("no room")
        alive.extend(each() is not None for each in held)

    hook = model.components["transformer"].register_forward_pre_hook(fail, with_kwargs=True)
    lane, outcomes = StepLane(model, "test", threads=1, budget=LARGE), Outcomes()
    forwards.open.clear()
    try:
        outcomes.put(lane, "0", encoded(model))
        assert forwards.entered.wait(10)
        for name in ("1", "2"):
            outcomes.put(lane, name, encoded(model))
        forwards.open.set()
        assert all(isinstance(each, State) for each in outcomes.wait(3).values())
    finally:
        hook.remove()
        lane.close()
    assert sum(rows > 2 for rows in forwards.rows) == 1, "found out once"
    assert alive and not any(alive), "what failed is gone before its requests run apart"


def test_a_lack_of_memory_lets_nobody_share_who_did_not_before(model: Model, forwards: Forwards) -> None:
    def fail(_: Any, args: Any, kwargs: dict[str, Any]) -> None:
        if len(kwargs["hidden_states"]) > 1:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    hook = model.components["transformer"].register_forward_pre_hook(fail, with_kwargs=True)
    lane, outcomes = StepLane(model, "test", threads=1, budget=0), Outcomes()
    try:
        outcomes.put(lane, "large", encoded(model))
        outcomes.wait(1)
        assert lane.budget, "its own branches are to run apart"
        forwards.rows.clear()
        forwards.open.clear()
        forwards.entered.clear()
        with lane._arriving:
            for name in ("one", "other"):
                outcomes.put(lane, name, encoded(model, guidance_scale=1.0, height=32, width=32))
        forwards.open.set()
        outcomes.wait(3)
    finally:
        hook.remove()
        lane.close()
    assert set(forwards.rows) == {1}
    assert all(isinstance(each, State) for each in outcomes.of.values())


def test_a_while_after_memory_did_not_suffice_as_much_is_shared_as_before(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: Any, args: Any, kwargs: dict[str, Any]) -> None:
        if len(kwargs["hidden_states"]) > 1:
            raise torch.OutOfMemoryError("another lane has it")

    hook = model.components["transformer"].register_forward_pre_hook(fail, with_kwargs=True)
    lane, outcomes = StepLane(model, "test", threads=1, budget=LARGE), Outcomes()
    try:
        outcomes.put(lane, "0", encoded(model))
        outcomes.wait(1)
        assert lane.budget is not None and lane.budget < LARGE
        hook.remove()
        monkeypatch.setattr(step_lane.time, "monotonic", lambda now=time.monotonic: now() + step_lane.SHRUNK)
        outcomes.put(lane, "1", encoded(model))
        outcomes.wait(2)
        assert lane.budget == LARGE
    finally:
        hook.remove()
        lane.close()


def test_a_shared_forward_that_fails_after_it_was_asked_for_is_run_apart(
    model: Model, forwards: Forwards, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a device, which tells late."""
    lane, outcomes, failed = StepLane(model, "test", threads=1, budget=LARGE), Outcomes(), list[int]()

    class Late(streams.Stopwatch):
        def stop(self) -> None:
            super().stop()
            if forwards.rows[-1] > 2 and not failed:
                failed.append(forwards.rows[-1])
                raise RuntimeError("an illegal address")

    monkeypatch.setattr(streams, "Stopwatch", Late)
    forwards.open.clear()
    outcomes.put(lane, "0", encoded(model))
    assert forwards.entered.wait(10)
    outcomes.put(lane, "1", encoded(model))
    forwards.open.set()
    assert all(isinstance(each, State) for each in outcomes.wait(2).values())
    lane.close()
    again = forwards.rows.index(failed[0]) + 1
    assert forwards.rows[again : again + 2] == [2, 2]


@pytest.mark.parametrize("budget", [None, LARGE])
def test_inputs_that_cannot_be_read_are_the_end_of_their_request_alone(
    model: Model, budget: int | None, forwards: Forwards, monkeypatch: pytest.MonkeyPatch
) -> None:
    lane, outcomes = StepLane(model, "test", threads=1, budget=budget), Outcomes()
    (stage,) = [each for each in model.stages if isinstance(each, Denoising)]
    form_of = type(stage).form_of

    def odd(self: Denoising, name: str, value: Any) -> Any:
        if isinstance(value, torch.Tensor) and value.shape[-1] == 3:
            raise IndexError("no entries")
        return form_of(self, name, value)

    monkeypatch.setattr(type(stage), "form_of", odd)
    good, bad = encoded(model), encoded(model, seed=8)
    bad.fields["prompt_embeds"] = bad.fields["prompt_embeds"][..., :3]
    forwards.open.clear()
    outcomes.put(lane, "good", good)
    outcomes.put(lane, "bad", bad)
    forwards.open.set()
    ended = outcomes.wait(2)
    assert isinstance(ended["bad"], IndexError) and isinstance(ended["good"], State)
    outcomes.put(lane, "later", encoded(model))
    assert isinstance(outcomes.wait(3)["later"], State)
    lane.close()


def test_a_defect_of_the_lane_ends_the_requests_it_has_and_not_the_lane(
    model: Model, lane: StepLane, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    outcomes = Outcomes()
    monkeypatch.setattr(lane, "_choose", lambda: list[Any]().pop())
    outcomes.put(lane, "first", encoded(model))
    assert isinstance(outcomes.wait(1)["first"], IndexError)
    monkeypatch.undo()
    outcomes.put(lane, "second", encoded(model))
    assert isinstance(outcomes.wait(2)["second"], State)
    assert "an error outside any request" in caplog.text


class Stubborn:
    """A segment that cannot be closed."""

    def __init__(self, segment: Any) -> None:
        self._segment = segment

    def __next__(self) -> Any:
        return next(self._segment)

    def send(self, prediction: Any) -> Any:
        return self._segment.send(prediction)

    def close(self) -> None:
        raise KeyError("what it had open")


@pytest.mark.parametrize("defect", [True, False])
def test_a_request_that_cannot_be_closed_is_told_of_its_end_and_ends_no_lane(
    model: Model, lane: StepLane, monkeypatch: pytest.MonkeyPatch, forwards: Forwards, defect: bool
) -> None:
    outcomes, state, segment = Outcomes(), encoded(model, num_inference_steps=50), model.segment
    forwards.open.clear()
    monkeypatch.setattr(model, "segment", lambda *arguments: Stubborn(segment(*arguments)))
    work = outcomes.put(lane, "stubborn", state)
    assert forwards.entered.wait(10)
    monkeypatch.undo()
    if defect:
        monkeypatch.setattr(lane, "_choose", lambda: list[Any]().pop())
    else:
        outcomes.put(lane, "beside", encoded(model))
        work.cancel()
    forwards.open.set()
    assert isinstance(outcomes.wait(1)["stubborn"], IndexError if defect else Cancelled)
    monkeypatch.undo()
    if not defect:
        assert isinstance(outcomes.wait(2)["beside"], State)
    outcomes.put(lane, "later", encoded(model))
    assert isinstance(outcomes.wait(2 if defect else 3)["later"], State)


def test_a_defect_of_the_lane_while_requests_join_leaves_none_of_them_waiting(
    model: Model, lane: StepLane, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(error: BaseException) -> None:
        monkeypatch.undo()
        raise IndexError("pop from an empty list")

    outcomes = Outcomes()
    with lane._arriving:  # so that the lane takes them together
        monkeypatch.setattr(lanes, "_forget_frames", fail)
        outcomes.put(lane, "late", encoded(model), deadline=time.monotonic() - 1)
        outcomes.put(lane, "beside", encoded(model))
    ended = outcomes.wait(2)
    assert isinstance(ended["late"], IndexError) and isinstance(ended["beside"], IndexError)
    outcomes.put(lane, "later", encoded(model))
    assert isinstance(outcomes.wait(3)["later"], State)


def test_a_state_that_a_lane_cannot_place_is_told_of_its_end(model: Model) -> None:
    lane, outcomes = Lane(model, "test", threads=1), Outcomes()
    odd, good = (model.admit(triptych.Request(**ASK)) for _ in range(2))
    odd.route, odd.position = odd.route * 2, len(odd.route)  # more segments than the model has
    outcomes.put(lane, "odd", odd)
    outcomes.put(lane, "good", good)
    ended = outcomes.wait(2)
    lane.close()
    assert isinstance(ended["odd"], IndexError) and isinstance(ended["good"], State)


def test_who_fails_to_hear_of_an_end_does_not_keep_others_from_theirs(model: Model, lane: StepLane) -> None:
    def fail(_: Any) -> None:
        raise KeyError("nobody of that name")

    lane.put(Work(encoded(model), fail))
    outcomes = Outcomes()
    outcomes.put(lane, "second", encoded(model))
    assert isinstance(outcomes.wait(1)["second"], State)


def test_an_error_keeps_no_frames_of_those_it_came_from(model: Model, lane: StepLane) -> None:
    def fail(*_: Any) -> None:
        try:
            raise ValueError("first")
        except ValueError:
            raise RuntimeError("then")

    hook = model.components["transformer"].register_forward_pre_hook(fail)
    outcomes = Outcomes()
    outcomes.put(lane, "bad", encoded(model))
    error = outcomes.wait(1)["bad"]
    hook.remove()
    assert isinstance(error, RuntimeError) and isinstance(error.__context__, ValueError)
    assert error.__traceback__ is error.__context__.__traceback__ is None


def test_what_fails_while_the_budget_is_measured_ends_neither_the_lane_nor_a_request(
    model: Model, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TRIPTYCH_CACHE", str(tmp_path))

    def fail(_: Any, args: Any, kwargs: dict[str, Any]) -> None:
        if len(kwargs["hidden_states"]) > 1:
            raise RuntimeError("an illegal address")

    hook = model.components["transformer"].register_forward_pre_hook(fail, with_kwargs=True)
    lane, outcomes = StepLane(model, "test", threads=1), Outcomes()
    try:
        for count in (1, 2):  # the budget is measured between the two
            outcomes.put(lane, str(count), encoded(model, guidance_scale=1.0))
            assert isinstance(outcomes.wait(count)[str(count)], State)
            deadline = time.monotonic() + 20
            while lane.budget is None and time.monotonic() < deadline:
                time.sleep(0.01)
            assert lane.budget == 0
    finally:
        hook.remove()
    lane.close()


def test_a_lane_that_is_never_idle_measures_its_budget_beside_its_requests(
    model: Model, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, forwards: Forwards
) -> None:
    monkeypatch.setenv("TRIPTYCH_CACHE", str(tmp_path))
    monkeypatch.setattr(step_lane, "PATIENCE", 0.0)
    lane, outcomes = StepLane(model, "test", threads=1), Outcomes()
    states = [encoded(model, seed=seed, num_inference_steps=3) for seed in range(2)]
    expected = [alone(model, state.copy()) for state in states]
    forwards.rows.clear()
    outcomes.put(lane, "0", states[0])
    outcomes.put(lane, "1", states[1])
    ended = outcomes.wait(2)
    lane.close()
    assert max(forwards.rows) > 4, "measured by forwards of more rows than both requests have"
    assert lane.budget is not None and budget.recall(lane._budget_key(next(model.segment(encoded(model))).forwards[0]))
    for name, pixels in zip(("0", "1"), expected):
        assert (model.run(ended[name]).result.images - pixels).abs().max() <= 1e-4


def test_a_budget_does_not_hold_for_weights_that_are_offloaded(model: Model) -> None:
    lane = StepLane(model, "test", threads=1, budget=0)
    sample = next(model.segment(encoded(model))).forwards[0]
    plain = lane._budget_key(sample)
    model.accelerated.asked[RoleType.DENOISER] = Acceleration(offload="group")
    try:
        assert lane._budget_key(sample) not in plain
    finally:
        del model.accelerated.asked[RoleType.DENOISER]
    assert lane._budget_key(sample) == plain
    lane.close()


def test_a_budget_is_not_measured_beside_what_another_lane_computes_where_they_take_turns(
    model: Model, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TRIPTYCH_CACHE", str(tmp_path))
    turns = Turns()
    computing: list[int] = []
    monkeypatch.setattr(budget, "measure", lambda *_: computing.append(turns._computing) or 1)
    lane, outcomes = StepLane(model, "test", threads=1, turns=turns), Outcomes()
    outcomes.put(lane, "one", encoded(model, num_inference_steps=1))
    outcomes.wait(1)
    deadline = time.monotonic() + 10
    while not computing and time.monotonic() < deadline:
        time.sleep(0.01)
    lane.close()
    assert computing == [1], "it has its turn"


def test_a_budget_of_an_earlier_start_holds_from_the_first_request_on(
    model: Model, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, forwards: Forwards
) -> None:
    monkeypatch.setenv("TRIPTYCH_CACHE", str(tmp_path))
    lane, outcomes = StepLane(model, "test", threads=1), Outcomes()
    sample = next(model.segment(encoded(model))).forwards[0]
    budget.remember(lane._budget_key(sample), 8 * sample.size)
    outcomes.put(lane, "first", encoded(model))
    outcomes.wait(1)
    assert lane.budget == 8 * sample.size
    assert forwards.rows == [2, 8, 2, 2, 2], "the largest that there may be comes after its first step"
    lane.close()


def test_seconds_that_a_device_tells_late_are_shared_among_those_they_were_spent_on(
    model: Model, lane: StepLane, monkeypatch: pytest.MonkeyPatch
) -> None:
    state, waited = encoded(model, num_inference_steps=4), []

    class Late(streams.Stopwatch):
        """A device that is done only when it is waited for."""

        @property
        def seconds(self) -> float | None:
            return 3.0 if waited else None

    monkeypatch.setattr(streams, "Stopwatch", Late)
    monkeypatch.setattr(streams, "wait", lambda _: waited.append(True))
    outcomes = Outcomes()
    work = outcomes.put(lane, "only", state)
    outcomes.wait(1)
    assert work.seconds == 4 * 3.0


def test_a_lane_that_is_closed_finishes_what_it_has(model: Model) -> None:
    lane = StepLane(model, "test", threads=1, budget=LARGE)
    outcomes = Outcomes()
    for number in range(3):
        outcomes.put(lane, str(number), encoded(model))
    lane.close()
    assert len(outcomes.of) == 3
