"""What a replica's process does with tickets, whichever way their states come."""

import gc
import queue
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import triptych
import triptych.engine  # before ray: it asks for Ray's authentication
from triptych.engine import attempt, couriers
from triptych.engine.couriers import Couriers
from triptych.engine.inbox import Answer, Inbox, Order, send
from triptych.engine.ray_actor import ReplicaActor
from triptych.errors import WireError, from_text
from triptych.runtime import memory, streams
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


def test_a_replica_gathers_what_it_holds_once_it_is_ready(
    tiny_repo: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    ready: list[bool] = []
    gathered = threading.Event()
    monkeypatch.setattr(memory, "gather", lambda: (ready.append(actor._loaded.done()), gathered.set()))
    actor = ReplicaActor("denoiser", str(tiny_repo("flux2_klein")), "denoiser", {"device": "cpu"}, threads=1)
    assert gathered.wait(60)
    assert ready == [True], "nobody is to wait for it"
    actor._inbox.close()
    actor._replica.close()


def test_a_state_that_comes_straight_is_computed_before_the_router_asks(
    actors: dict[str, ReplicaActor], request_bytes: np.ndarray
) -> None:
    encoder = actors["encoder"]
    assert send(order(encoder, "one"), request_bytes.data)
    attempt = encoder._attempts.open("one")
    attempt.ended.result(10)
    outcome, after = encoder.run(order(encoder, "one"), None)
    assert outcome["turns"] == ("denoiser", "decoder")
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


def test_what_a_segment_held_is_gone_as_soon_as_its_end_was_told(
    actors: dict[str, ReplicaActor], request_bytes: np.ndarray
) -> None:
    encoder = actors["encoder"]
    held: list[weakref.ref[Any]] = []
    for lane in encoder._replica.lanes.values():
        put = lane.put
        lane.put = lambda work, put=put: (held.append(weakref.ref(work)), put(work))  # type: ignore[method-assign]
    gc.collect()
    gc.disable()
    try:
        encoder.run(order(encoder, "gone"), request_bytes)
        deadline = time.monotonic() + 10
        while held[0]() is not None and time.monotonic() < deadline:
            time.sleep(0.01)
        assert held[0]() is None, "its state would stay until Python looks for circles"
    finally:
        gc.enable()
        for lane in encoder._replica.lanes.values():
            del lane.put  # type: ignore[method-assign]


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


class Router:
    """Hears what replicas tell straight."""

    def __init__(self) -> None:
        self.heard: queue.SimpleQueue[tuple[Answer, bytes]] = queue.SimpleQueue()
        self.inbox = Inbox(Answer, lambda answer, data: lambda: self.heard.put((answer, bytes(data))))


@pytest.fixture
def router() -> Iterator[Router]:
    router = Router()
    yield router
    router.inbox.close()


def test_what_becomes_of_a_chain_of_orders_is_told_straight_and_the_result_comes_with_it(
    actors: dict[str, ReplicaActor], request_bytes: np.ndarray, whole: triptych.Model, router: Router
) -> None:
    chain = None
    for role in ("decoder", "denoiser", "encoder"):
        chain = replace(order(actors[role], role, chain), reply=router.inbox.address)
    assert chain is not None
    assert send(chain, request_bytes.data)
    told = [router.heard.get(timeout=30) for _ in actors]
    assert {answer.ticket: (answer.turns, answer.handed) for answer, _ in told} == {
        "encoder": (["denoiser", "decoder"], True), "denoiser": (["decoder"], True), "decoder": ([], False),
    }  # fmt: skip
    after = {answer.ticket: State.from_bytes(data) for answer, data in told}
    assert after["denoiser"].next_role == "decoder", "the hand-over is kept for who has to do the next segment again"
    assert torch.equal(after["decoder"].result.images, whole.generate(**ASK).images)
    deadline = time.monotonic() + 10
    while any(each._attempts.all() for each in actors.values()):
        assert time.monotonic() < deadline, "what is told is forgotten"


def test_what_cannot_be_told_straight_is_asked_for(
    actors: dict[str, ReplicaActor], request_bytes: np.ndarray, router: Router
) -> None:
    encoder = actors["encoder"]
    damaged = request_bytes.copy()
    damaged[-1] ^= 1
    assert send(replace(order(encoder, "flipped"), reply=router.inbox.address), damaged.data)
    answer, data = router.heard.get(timeout=10)
    assert (answer.ticket, answer.turns, data) == ("flipped", None, b"")
    assert encoder.run(Order("flipped"), None)[0]["error"][0] == "WireError"
    assert len(encoder._attempts.all()) == 0


def test_what_its_router_does_not_hear_is_kept_until_that_is_gone(
    actors: dict[str, ReplicaActor], request_bytes: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = actors["encoder"]
    monkeypatch.setitem(vars(encoder), "_process", {})  # Ray tells of it, and is not here
    for ticket in ("asked for", "left"):
        assert send(replace(order(encoder, ticket), reply="\0nobody"), request_bytes.data)
        encoder._attempts.open(ticket).ended.result(10)
    encoder.beat({"asked for": 0})
    assert len(encoder._attempts.all()) == 2
    monkeypatch.setattr(attempt, "FORGOTTEN", 0.1)
    time.sleep(0.2)
    encoder.beat({"asked for": 0})
    assert [ticket for ticket, _ in encoder._attempts.all()] == ["asked for"]
    assert encoder.run(Order("asked for"), None)[0]["turns"]


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
            encoder.beat({"wanted": 0, "unheard of": 0})
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
    assert not begun.ended.done()
    assert never.wait()[0]["error"][0] == "WireError"
    assert not never.begin(Order("never"))


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
    monkeypatch.setattr(couriers, "MODEST", 2**16)
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
        assert outcome["turns"] == ()
    assert "courier" in writers["pil"] and "courier" not in writers["pt"]


def test_a_sign_of_life_tells_the_previews_that_its_router_wants_and_has_not_had(
    actors: dict[str, ReplicaActor], monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = actors["encoder"]
    monkeypatch.setitem(vars(encoder), "_process", {})  # Ray tells of it, and is not here
    for ticket in ("mine", "another's"):
        encoder._attempts.open(ticket).previews += [(1, 3, b"one"), (2, 3, b"two")]
    assert encoder.beat({"mine": 0})["previews"] == {"mine": [(1, 3, b"one"), (2, 3, b"two")]}
    assert encoder.beat({"mine": 1})["previews"] == {"mine": [(2, 3, b"two")]}
    for ticket in ("mine", "another's"):
        encoder._attempts.close(ticket)
