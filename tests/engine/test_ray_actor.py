"""What a replica's process does with tickets, whichever way their states come."""

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import triptych
import triptych.engine  # before ray: it asks for Ray's authentication
from triptych.engine import attempt
from triptych.engine.attempt import REMEMBERED
from triptych.engine.couriers import Couriers
from triptych.engine.inbox import Order, send
from triptych.engine.ray_actor import ReplicaActor
from triptych.errors import WireError, from_text
from triptych.runtime import streams
from triptych.runtime.segment import finish
from triptych.state import State

ASK: dict[str, Any] = {
    "prompt": "a red fox", "seed": 7, "height": 64, "width": 48, "num_inference_steps": 3, "output_type": "pt",
    "max_sequence_length": 24, "exact": True,
}  # fmt: skip


@pytest.fixture(scope="module")
def whole(tiny_repo: Callable[..., Path]) -> triptych.Model:
    return triptych.load(tiny_repo("flux2_klein"), device="cpu")


@pytest.fixture(scope="module")
def actors(tiny_repo: Callable[..., Path]) -> Iterator[dict[str, ReplicaActor]]:
    repository = str(tiny_repo("flux2_klein"))
    made = {
        role: ReplicaActor(role, repository, role, {"device": "cpu"}, threads=1)
        for role in ("encoder", "denoiser", "decoder")
    }
    yield made
    for each in made.values():
        each._inbox.close()
        each._replica.close()


@pytest.fixture
def request_bytes(whole: triptych.Model) -> np.ndarray:
    return np.frombuffer(whole.admit(triptych.Request(**ASK)).to_bytes(), np.uint8)


def order(actor: ReplicaActor, ticket: str, then: Order | None = None) -> Order:
    return Order(ticket, inbox=actor._inbox.address, then=then)


def segments(actor: ReplicaActor, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The segments that an actor is given to run from now on."""
    seen: list[Any] = []
    for lane in actor._replica.lanes.values():
        put = lane.put
        monkeypatch.setattr(lane, "put", lambda work, put=put: (seen.append(work), put(work)))
    return seen


def test_a_state_that_comes_straight_is_computed_before_the_router_asks(
    actors: dict[str, ReplicaActor], request_bytes: np.ndarray
) -> None:
    encoder = actors["encoder"]
    assert send(order(encoder, "one"), request_bytes.data)
    attempt = encoder._attempts.open("one")
    attempt.answer.result(10)
    outcome, after = encoder.run(order(encoder, "one"), None)
    assert outcome["turns"] == ["denoiser", "decoder"]
    assert State.from_bytes(after.data).next_role == "denoiser"
    assert len(encoder._attempts.all()) == 0
    assert encoder.busy() == 0


def test_the_many_threads_that_bring_states_start_no_others_to_compute_with(
    actors: dict[str, ReplicaActor], request_bytes: np.ndarray
) -> None:
    encoder, before = actors["encoder"], torch.get_num_threads()
    with ThreadPoolExecutor(1) as brings:
        assert encoder._replica.model is not None  # it has loaded
        torch.set_num_threads(2)  # what a thread takes over that was given no number
        try:
            outcome, _ = brings.submit(encoder.run, order(encoder, "brought"), request_bytes).result(10)
            assert "error" not in outcome
            assert brings.submit(torch.get_num_threads).result(10) == 1
        finally:
            torch.set_num_threads(before)


def test_a_state_that_comes_both_ways_is_computed_once(
    actors: dict[str, ReplicaActor], request_bytes: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = actors["encoder"]
    seen = segments(encoder, monkeypatch)
    send(order(encoder, "both"), request_bytes.data)
    assert encoder.run(order(encoder, "both"), request_bytes)[0]["turns"]
    assert not send(order(encoder, "both"), request_bytes.data), "and one that is late is refused"
    encoder.hand(order(encoder, "both"), request_bytes)
    assert len(seen) == 1
    assert len(encoder._attempts.all()) == 0


def test_a_chain_of_orders_ends_with_the_result_where_it_is_waited_for(
    actors: dict[str, ReplicaActor], request_bytes: np.ndarray, whole: triptych.Model
) -> None:
    from triptych.engine.inbox import Inbox

    came = threading.Event()
    results: list[Any] = []
    router = Inbox(lambda told, data: lambda: (results.append((told.ticket, bytes(data))), came.set()))
    last = Order("result", inbox=router.address)
    chain = order(actors["decoder"], "c", last)
    chain = order(actors["denoiser"], "d", chain)
    chain = order(actors["encoder"], "e", chain)
    outcome, after = actors["encoder"].run(chain, request_bytes)
    assert outcome["handed"]
    assert came.wait(30)
    router.close()
    ((ticket, data),) = results
    assert ticket == "result"
    expected = whole.generate(**ASK).images
    assert torch.equal(State.from_bytes(data).result.images, expected)
    for role, name in (("denoiser", "d"), ("decoder", "c")):
        answered, bytes_after = actors[role].run(Order(name), None)
        assert answered["handed"]
        assert len(bytes_after), "the hand-over is kept for who has to do the next segment again"
    assert State.from_bytes(after.data).next_role == "denoiser"


def test_what_is_taken_back_before_its_state_comes_is_not_computed(
    actors: dict[str, ReplicaActor], request_bytes: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = actors["encoder"]
    seen = segments(encoder, monkeypatch)
    encoder.cancel("early")
    assert encoder.run(order(encoder, "early"), request_bytes)[0]["error"][0] == "Cancelled"
    answers: list[Any] = []
    waiting = threading.Thread(target=lambda: answers.append(encoder.run(order(encoder, "late"), None)))
    waiting.start()
    while encoder.busy() == 0:
        pass
    encoder.cancel("late")
    encoder.cancel("late")
    waiting.join(10)
    assert answers[0][0]["error"][0] == "Cancelled"
    assert not send(order(encoder, "late"), request_bytes.data)
    assert seen == []
    assert len(encoder._attempts.all()) == 0


def test_a_ticket_whose_state_does_not_come_ends_when_its_router_has_been_silent_for_long(
    actors: dict[str, ReplicaActor], request_bytes: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = actors["encoder"]
    monkeypatch.setattr(attempt, "FORGOTTEN", 1.0)
    monkeypatch.setitem(vars(encoder), "_process", {})  # Ray tells of it, and is not here
    answers: dict[str, Any] = {}

    def wait(ticket: str) -> None:
        answers[ticket] = encoder.run(order(encoder, ticket), None)[0]

    waiting = [threading.Thread(target=wait, args=(ticket,)) for ticket in ("wanted", "forgotten")]
    for each in waiting:
        each.start()
    try:
        deadline = time.monotonic() + 2.5
        while time.monotonic() < deadline:
            encoder.beat(["wanted", "unheard of"])
            time.sleep(0.05)
        assert answers.keys() == {"forgotten"}
        assert answers["forgotten"]["error"][0] == "WireError", "it is tried again where the router is alive after all"
        assert encoder.busy() == 1
        assert not send(order(encoder, "forgotten"), request_bytes.data), "and one that is late is refused"
    finally:
        for ticket in ("wanted", "forgotten"):
            encoder.cancel(ticket)
        for each in waiting:
            each.join(10)


def test_a_segment_that_has_begun_is_not_given_up_however_silent_its_router_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attempt, "FORGOTTEN", -1.0)
    begun, never = attempt.Attempt(), attempt.Attempt()
    assert begun.begin(Order("begun"))
    for each in (begun, never):
        each._give_up()
    assert not begun.answer.done()
    assert never.wait()[0]["error"][0] == "WireError"
    assert not never.begin(Order("never"))


def test_answers_that_nobody_asks_for_are_not_kept_for_ever(actors: dict[str, ReplicaActor]) -> None:
    encoder = actors["encoder"]
    for number in range(REMEMBERED + 20):
        encoder.hand(order(encoder, f"orphan-{number}"), np.zeros(8, np.uint8))
    assert len(encoder._attempts.all()) <= REMEMBERED + 1


def test_a_damaged_state_is_answered_with_its_error(actors: dict[str, ReplicaActor], request_bytes: np.ndarray) -> None:
    encoder = actors["encoder"]
    damaged = request_bytes.copy()
    damaged[-1] ^= 1
    outcome, after = encoder.run(order(encoder, "damaged"), damaged)
    assert outcome["error"][0] == "WireError"
    assert len(after) == 0


@pytest.mark.skipif(not hasattr(torch, "AcceleratorError"), reason="PyTorch before 2.8 does not tell such errors apart")
def test_a_process_whose_device_has_failed_ends(
    actors: dict[str, ReplicaActor], request_bytes: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended: list[int] = []
    works = True
    monkeypatch.setattr("os._exit", ended.append)
    monkeypatch.setattr(streams, "answers", lambda device: works)
    encoder = actors["encoder"]

    def fail(*_: Any) -> None:
        raise error

    hook = encoder._replica.model.components["text_encoder"].register_forward_pre_hook(fail)
    try:
        told = torch.AcceleratorError("an illegal address")
        for number, (error, works) in enumerate([(RuntimeError("no such shape"), False), (told, True), (told, False)]):
            assert "error" in encoder.run(order(encoder, f"failed {number}"), request_bytes)[0]
            assert len(ended) == (number == 2)
    finally:
        hook.remove()


def test_a_state_that_cannot_be_carried_is_not_taken_for_one_that_came_damaged(
    actors: dict[str, ReplicaActor], request_bytes: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(state: State) -> memoryview:
        raise WireError("prompt_embeds: a complex256 cannot be carried")

    encoder = actors["encoder"]
    monkeypatch.setattr(State, "to_bytes", fail)
    outcome, _ = encoder.run(order(encoder, "odd"), request_bytes)
    error = from_text(*outcome["error"])
    assert "prompt_embeds" in str(error) and not isinstance(error, WireError)


def test_large_states_are_not_written_by_the_thread_that_drives_the_lane(
    actors: dict[str, ReplicaActor], whole: triptych.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    writers: dict[str, str] = {}
    written = Couriers._written

    def note(self: Couriers, state: State) -> Any:
        writers[state.fields["output_type"]] = threading.current_thread().name
        return written(self, state)

    monkeypatch.setattr(Couriers, "_written", note)
    decoder = actors["decoder"]
    for kind, size in (("pt", 64), ("pil", 160)):
        state = whole.admit(triptych.Request(**{**ASK, "output_type": kind, "height": size, "width": size}))
        for role in ("encoder", "denoiser"):
            finish(actors[role]._replica.model.segment(state))
        outcome, _ = decoder.run(order(decoder, kind), np.frombuffer(bytes(state.to_bytes()), np.uint8))
        assert outcome["turns"] == []
    assert "courier" in writers["pil"] and "courier" not in writers["pt"]
