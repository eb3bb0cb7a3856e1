"""The pools of a service: what the register knows, and what a router that keeps them does."""

import math
import os
import queue
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import triptych
import triptych.engine  # before ray: it asks for Ray's authentication

import ray  # isort: skip
from ray.exceptions import GetTimeoutError, RayTaskError

from triptych.engine import ray_join, ray_pools, ray_register
from triptych.engine.inbox import Answer, Order
from triptych.engine.job import Job
from triptych.engine.pools import parse_pools
from triptych.engine.ray import RayEngine
from triptych.engine.ray_cluster import RUNS, connect, start_replica
from triptych.engine.ray_hearing import Hearing
from triptych.engine.ray_pools import SCALE_AFTER, PoolKeeper
from triptych.engine.ray_register import NAMESPACE, REGISTER, SILENT, Register
from triptych.engine.ray_replica import RayReplica
from triptych.engine.replica import Handover, Ticket
from triptych.engine.router import Router
from triptych.errors import ModelError, ReplicaLost, ReplicaRefusedError
from triptych.roles import RoleType

IDENTITY = {"fingerprint": "one"}


class Keeper(PoolKeeper):
    """A router's keeper as an engine has one, but it looks when the test says so."""

    def __init__(self, identity: dict[str, str] = IDENTITY) -> None:
        self.router = Router(lambda handover: handover.payload)
        self._happened: queue.SimpleQueue[tuple[Any, ...]] = queue.SimpleQueue()
        super().__init__(self.router, identity, None, lambda *it: self._happened.put(it))

    def serve(self, pools: str, gpus: dict[RoleType, float] | None = None) -> None:
        """Declare pools of a model that is not there."""
        options: dict[str, Any] = {"acceleration": {}, "device": "cpu"}
        self.declare(parse_pools(pools), gpus or {}, source="/nowhere", options=options, threads=1)

    def look(self) -> None:
        self.pulse()
        while not self._happened.empty():
            _, replica, future, *details = self._happened.get()
            replica.hear(self.router, future, *details)


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        root = str(Path(triptych.__file__).parents[1])  # workers import this test's `triptych`, wherever it lies
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH")))))
        connect(None)
        yield
        ray.shutdown()


@pytest.fixture
def enter(cluster: None) -> Iterator[Callable[..., Keeper]]:
    """`enter() -> Keeper`: of a router more in a service that ends with the test."""
    entered = list[Keeper]()

    def make(**identity: str) -> Keeper:
        entered.append(Keeper(identity or IDENTITY))
        return entered[-1]

    yield make
    for each in entered:
        each.leave()
    ray.kill(ray.get_actor(REGISTER, namespace=NAMESPACE))
    while REGISTER in {each["name"] for each in ray.util.list_named_actors(all_namespaces=True)}:
        time.sleep(0.05)


def replica(name: str = "one") -> RayReplica:
    return RayReplica(name, "denoiser", None, None, lambda *_: None)


def register_of(target: int, *members: str) -> Register:
    register = Register(orphaned=math.inf)
    register.enter("a router", IDENTITY)
    register.declare({"denoiser": {"least": 1, "most": 4, "target": target, "arguments": {}}})
    for name in members:
        register.add(name, "denoiser")
    return register


def told(register: Register) -> dict[str, Any]:
    register.enter("a router", IDENTITY)
    known = register.pulse("a router", {})
    assert known is not None
    return known


def test_a_pool_shrinks_by_each_replica_that_is_drained_and_only_once() -> None:
    register = register_of(3, "a", "b", "c")
    for name in ("a", "a", "b", "nobody"):
        register.drain(name, shrink=True)
    assert told(register)["pools"]["denoiser"] | {"arguments": None} == {
        "least": 1, "most": 4, "target": 1, "arguments": None,
    }  # fmt: skip
    assert [name for name, member in register.members().items() if member["draining"]] == ["a", "b"]


@pytest.mark.parametrize(("before", "after"), [((1, 4, 3), (1, 4, 2)), ((1, 4, 1), (0, 4, 0)), ((2, 2, 2), (1, 1, 1))])
def test_a_pool_that_shrinks_by_a_replica_may_grow_again_if_it_might_before(
    before: tuple[int, ...], after: tuple[int, ...]
) -> None:
    register, bounds = Register(orphaned=math.inf), ("least", "most", "target")
    register.enter("a router", IDENTITY)
    register.declare({"denoiser": {**dict(zip(bounds, before)), "arguments": {}}})
    register.add("a", "denoiser")
    register.drain("a", shrink=True)
    pool = told(register)["pools"]["denoiser"]
    assert tuple(pool[each] for each in bounds) == after


@pytest.mark.parametrize(("least", "most", "target"), [(1, 4, 3), (1, 2, 2), (4, 6, 4)])
def test_a_router_that_declares_a_known_pool_leaves_it_the_replicas_that_its_bounds_allow(
    least: int, most: int, target: int
) -> None:
    register = register_of(1)
    register.scale("denoiser", 3)
    register.declare({"denoiser": {"least": least, "most": most, "target": least, "arguments": {"threads": 1}}})
    pool = told(register)["pools"]["denoiser"]
    assert pool == {"least": least, "most": most, "target": target, "arguments": {"threads": 1}}


def test_a_pool_does_not_shrink_by_what_is_surplus_or_joined_from_outside() -> None:
    register = register_of(2, "a", "surplus")
    register.add("joined", "denoiser", joined=True)
    register.drain("surplus")
    register.drain("surplus", shrink=True)
    register.drain("joined", shrink=True)
    assert told(register)["pools"]["denoiser"]["target"] == 2


def test_a_pool_that_was_set_for_good_is_not_scaled_by_who_did_not_know_it_yet() -> None:
    register = register_of(2)
    register.scale("denoiser", 2)
    register.scale("denoiser", 1, fixed=False)
    assert told(register)["pools"]["denoiser"]["target"] == 2


def test_the_register_counts_the_work_of_all_routers_that_are_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    register = register_of(1)
    for router in "ab":
        register.enter(router, IDENTITY)
    register.pulse("a", {"denoiser": (1, 2.0)})
    known = register.pulse("b", {"denoiser": (2, 3.0), "gone": (1, 1.0)})
    assert known is not None
    assert known["work"] == {"denoiser": (3, 5.0)}
    monkeypatch.setattr("triptych.engine.ray_register.SILENT", -1.0)
    assert register.pulse("a", {}) is None, "it was silent, and has to enter again"


def test_replicas_that_reserve_most_gpus_are_started_first(enter: Callable[..., Keeper]) -> None:
    # Encoders that lie on one GPU each leave room on neither for a denoiser of 0.6.
    keeper = enter()
    keeper.serve("encoder=2,denoiser=2,decoder=1", {RoleType.ENCODER: 0.4, RoleType.DENOISER: 0.6})
    keeper.pulse()
    assert [each.pool for each in keeper.replicas.values()] == ["denoiser", "denoiser", "encoder", "encoder", "decoder"]


@pytest.mark.parametrize("fault", ["failed", "loading"])
def test_a_pool_that_shrinks_gives_up_what_does_not_serve(enter: Callable[..., Keeper], fault: str) -> None:
    keeper = enter()
    keeper.serve("denoiser=1")
    serving, other = replica("serving"), replica("other")
    serving.state = "ready"
    if fault == "failed":
        other.failure, other.failed = RuntimeError("out of memory"), time.monotonic()
    for each in (serving, other):
        each.asked = time.monotonic()
        keeper.replicas[each.name] = each
        ray.get(keeper._register.add.remote(each.name, "denoiser"))
    keeper.pulse()
    members = ray.get(keeper._register.members.remote())
    keeper.replicas.clear()  # there is nothing to end
    assert {name: member["draining"] for name, member in members.items()} == {"serving": False, "other": True}


def test_a_replica_that_is_drained_twice_while_it_finishes_shrinks_its_pool_once(enter: Callable[..., Keeper]) -> None:
    keeper = enter()
    keeper.serve("denoiser=2")
    for each in (replica("one"), replica("two")):
        each.state, each.asked = "ready", time.monotonic()
        keeper.replicas[each.name] = each
        ray.get(keeper._register.add.remote(each.name, "denoiser"))
    for _ in range(2):
        keeper.pulse()
        keeper.drain("one")
        assert keeper.replicas["one"].draining
    keeper.pulse()
    kept = [each.name for each in keeper.replicas.values() if not each.draining]
    keeper.replicas.clear()  # there is nothing to end
    assert kept == ["two"]
    assert keeper.pools["denoiser"]["target"] == 1


def test_a_replica_that_cannot_start_is_replaced_ever_later(
    enter: Callable[..., Keeper], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_pools, "REPLACE", 0.5)
    keeper = enter()
    keeper.serve("denoiser=1")
    met, replaced_after = list[RayReplica](), list[float]()
    deadline = time.monotonic() + 50
    while len(replaced_after) < 2:
        assert time.monotonic() < deadline
        keeper.look()
        (now,) = keeper.replicas.values()
        if now not in met:
            if met:
                assert met[-1].failed is not None
                assert "/nowhere" in str(met[-1].failure)
                replaced_after.append(time.monotonic() - met[-1].failed)
            met.append(now)
        time.sleep(0.05)
    assert replaced_after[0] > 0.5 and replaced_after[1] > 1.0
    assert set(ray.get(keeper._register.members.remote())) == {met[-1].name}


def test_a_replica_that_another_router_has_given_up_is_replaced(
    enter: Callable[..., Keeper], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_pools, "REPLACE", 0.0)
    keeper = enter()
    keeper.serve("denoiser=1")
    keeper.look()
    (first,) = keeper.replicas.values()
    ray.kill(first.actor, no_restart=True)
    deadline = time.monotonic() + 20
    while first in keeper.replicas.values():
        assert time.monotonic() < deadline
        keeper.look()
        time.sleep(0.05)
    assert first.failure is None
    assert len(keeper.replicas) == 1


def test_a_replica_that_was_just_started_outlives_a_register_that_is_started_anew(
    enter: Callable[..., Keeper],
) -> None:
    keeper = enter()
    keeper.serve("denoiser=1")
    keeper.pulse()
    (first,) = keeper.replicas
    ray.kill(keeper._register, no_restart=False)
    deadline = time.monotonic() + 20
    while ray.get(keeper._register.identity.remote()) is not None:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    keeper.pulse()
    assert set(keeper.replicas) == set(ray.get(keeper._register.members.remote())) == {first}


def test_a_replica_is_known_before_it_is_started_and_not_any_more_where_that_fails(
    enter: Callable[..., Keeper], monkeypatch: pytest.MonkeyPatch
) -> None:
    keeper = enter()
    keeper.serve("denoiser=1")
    known: list[set[str]] = []

    def fail(name: str, **_: Any) -> None:
        known.append(set(ray.get(keeper._register.members.remote())))
        assert known == [{name}]
        raise OSError("no process left")

    monkeypatch.setattr(ray_pools, "start_replica", fail)
    with pytest.raises(OSError, match="no process left"):
        keeper.pulse()
    assert len(known) == 1
    assert ray.get(keeper._register.members.remote()) == {} == keeper.replicas


def test_replicas_that_a_register_has_never_heard_of_end_with_the_rest_when_no_router_comes(cluster: None) -> None:
    class Nobody:
        pass

    def left() -> set[str]:
        return {each["name"] for each in ray.util.list_named_actors(all_namespaces=True)}

    remote: Any = ray.remote
    names = {"denoiser-lost", "joined-denoiser-mine"}
    kept = [
        remote(num_cpus=0)(Nobody).options(name=name, namespace=NAMESPACE, lifetime="detached").remote()
        for name in names
    ]
    register = remote(num_cpus=0)(Register).options(name=REGISTER, namespace=NAMESPACE).remote(orphaned=1)
    deadline = time.monotonic() + 20
    while "denoiser-lost" in left() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert left() == {"joined-denoiser-mine", REGISTER}
    for each in (*kept, register):
        ray.kill(each)
    while left():
        time.sleep(0.05)


def test_a_pool_without_a_replica_grows_by_any_work(enter: Callable[..., Keeper]) -> None:
    keeper = enter()
    keeper.serve("denoiser=0..1")
    keeper.router.costs.learn(RoleType.DENOISER, 1.0, SCALE_AFTER / 100)
    keeper.pulse()
    assert keeper.replicas == {}
    keeper.router.submit(Job(), Handover(RoleType.DENOISER, None), {})
    keeper.pulse()
    keeper.pulse()
    assert len(keeper.replicas) == 1


def test_a_pool_does_not_give_back_a_replica_that_loads_while_requests_wait_for_it(
    enter: Callable[..., Keeper], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_pools, "IDLE", 0.2)
    keeper = enter()
    keeper.serve("denoiser=0..1")
    keeper.pulse()
    job = Job()
    keeper.router.submit(job, Handover(RoleType.DENOISER, None), {})
    keeper.pulse()
    (first,) = keeper.replicas.values()
    for _ in range(4):
        time.sleep(0.3)
        keeper.pulse()
        assert list(keeper.replicas.values()) == [first] and not first.draining
    job.cancel()
    keeper.pulse()  # which tells that there is no work any more
    assert first.draining


def test_a_pool_without_a_replica_remembers_how_many_could_not_start(enter: Callable[..., Keeper]) -> None:
    keeper = enter()
    keeper.serve("denoiser=0..1")
    keeper.pulse()
    keeper._failures["denoiser"] = 2
    keeper.pulse()
    assert keeper._failures["denoiser"] == 2
    mine = replica()
    mine.state, mine.asked = "ready", time.monotonic()
    keeper.replicas[mine.name] = mine
    ray.get(keeper._register.add.remote(mine.name, "denoiser"))
    keeper.pulse()
    keeper.replicas.clear()  # there is nothing to end
    assert keeper._failures["denoiser"] == 0


@pytest.mark.parametrize(
    ("requests", "seconds", "target"), [(1, 600.0, 1), (2, 600.0, 2), (16, SCALE_AFTER / 32, 1), (16, 1.0, 2)]
)
def test_a_pool_grows_where_it_holds_much_work_in_more_requests_than_it_has_replicas(
    enter: Callable[..., Keeper], requests: int, seconds: float, target: int
) -> None:
    keeper = enter()
    keeper.serve("denoiser=1..4")
    mine = replica()
    mine.state, mine.asked = "ready", time.monotonic()
    for _ in range(requests):
        job, handover = Job(), Handover(RoleType.DENOISER, None)
        mine.tickets.append(Ticket(job, RoleType.DENOISER, handover, 1.0, seconds, False, lambda *_: None))
    keeper.replicas[mine.name] = mine
    ray.get(keeper._register.add.remote(mine.name, "denoiser"))
    for _ in range(3):
        keeper.pulse()
    del keeper.replicas[mine.name]  # there is nothing to end
    assert keeper.pools["denoiser"]["target"] == target


def test_a_request_of_which_a_pool_holds_two_segments_is_one(enter: Callable[..., Keeper]) -> None:
    keeper = enter()
    keeper.serve("denoiser=1..4")
    job, mine = Job(), replica()
    mine.state, mine.asked = "ready", time.monotonic()
    for _ in range(2):
        handover = Handover(RoleType.DENOISER, None)
        mine.tickets.append(Ticket(job, RoleType.DENOISER, handover, 1.0, 600.0, False, lambda *_: None))
    keeper.replicas[mine.name] = mine
    ray.get(keeper._register.add.remote(mine.name, "denoiser"))
    for _ in range(2):
        keeper.pulse()
    keeper.replicas.clear()  # there is nothing to end
    assert keeper._work == {"denoiser": (1, 1200.0)}
    assert keeper.pools["denoiser"]["target"] == 1


def test_the_last_router_takes_even_those_replicas_with_it_that_it_has_not_met(enter: Callable[..., Keeper]) -> None:
    keeper, other = enter(), enter()
    keeper.serve("denoiser=1")
    other.pulse()
    keeper.pulse()
    (name,) = keeper.replicas
    keeper.leave()
    assert other.replicas == {}
    assert ray.get_actor(name, namespace=NAMESPACE) is not None, "the other one has it still"
    other.leave()
    deadline = time.monotonic() + 20
    while name in {each["name"] for each in ray.util.list_named_actors(all_namespaces=True)}:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_replica_that_is_ready_just_when_it_is_struck_out_is_given_nothing(enter: Callable[..., Keeper]) -> None:
    keeper = enter()
    keeper.serve("denoiser=1")
    keeper.pulse()
    (mine,) = keeper.replicas.values()
    mine.told.update(loaded_bytes=0, device="cpu", niceness=0)
    keeper.drain(mine.name)
    keeper.pulse()
    assert keeper.replicas == {}
    mine._let_in(keeper.router)  # by the thread that has seen a moment ago that it is there
    assert keeper.router.replicas == [mine]
    keeper.pulse()
    assert keeper.router.replicas == []


def test_a_replica_is_not_silent_because_nobody_has_time_to_hear_it(enter: Callable[..., Keeper]) -> None:
    keeper = enter()
    keeper.serve("denoiser=1")
    keeper.pulse()
    (mine,) = keeper.replicas.values()
    mine.state = "ready"
    mine.ask()
    deadline = time.monotonic() + 60
    while keeper._happened.empty():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert mine.asked is not None, "nobody has heard it yet"
    assert mine.silent == 0 and not mine.hangs()


def test_a_replica_that_joined_outlasts_a_register_that_has_forgotten_it(
    cluster: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_join, "FORGOTTEN", 20)
    monkeypatch.setattr(ray_join, "LOOK", 0.1)
    register = ray.remote(num_cpus=0)(Register).remote()
    stays = threading.Thread(target=ray_join._stay, args=(register, None, "mine"), daemon=True)
    stays.start()
    time.sleep(1)
    ray.get(register.add.remote("mine", "denoiser", joined=True))
    time.sleep(2)
    assert stays.is_alive(), "it is known again"
    ray.get(register.remove.remote("mine"))
    stays.join(20)
    assert not stays.is_alive(), "its service is gone"
    ray.kill(register)


class Joined:
    """Stands in for the actor of a replica that joins; how it was ended is in `killed`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, register: Any, *busy: int) -> None:
        self._busy = list(busy)  # what it tells at each look; the last for good
        self.looks = 0
        self.killed = False
        self.busy = SimpleNamespace(remote=self._look)
        for name, value in {
            "LOOK": 0.1,
            "connect": lambda address: None,
            "find_register": lambda: register,
            "start_replica": lambda *args, **options: self,
            "_wait_until_loaded": lambda actor: {},
        }.items():
            monkeypatch.setattr(ray_join, name, value)
        monkeypatch.setattr(ray, "kill", lambda actor: setattr(self, "killed", True))

    def _look(self) -> Any:
        self.looks += 1
        return ray.put(self._busy.pop(0) if len(self._busy) > 1 else self._busy[0])


@pytest.fixture
def register(cluster: None) -> Iterator[Any]:
    register = ray.remote(num_cpus=0)(Register).remote()
    kill = ray.kill
    yield register
    kill(register)


def test_a_replica_that_was_drained_finishes_what_it_has_however_long_that_takes(
    register: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    actor = Joined(monkeypatch, register, *[1] * 20, 0)
    monkeypatch.setattr(ray_join, "DRAIN", 0.5)
    joins = threading.Thread(target=ray_join.join, args=("/nowhere", "denoiser", "here:1"), daemon=True)
    joins.start()
    while not (members := ray.get(register.members.remote())):
        assert joins.is_alive()
        time.sleep(0.05)
    ray.get([register.drain.remote(name) for name in members])
    joins.join(30)
    assert not joins.is_alive() and actor.killed
    assert actor.looks > 20
    assert ray.get(register.members.remote()) == {}


def test_a_replica_that_is_interrupted_has_a_while_to_finish_what_it_has(
    register: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: Any) -> bool:
        raise KeyboardInterrupt

    actor = Joined(monkeypatch, register, 1)
    monkeypatch.setattr(ray_join, "DRAIN", 0.5)
    monkeypatch.setattr(ray_join, "_stay", interrupt)
    with pytest.raises(KeyboardInterrupt):
        ray_join.join("/nowhere", "denoiser", "here:1")
    assert actor.killed
    assert 3 <= actor.looks <= 6


def test_a_replica_has_finished_when_it_is_quiet_for_some_looks_in_a_row(
    register: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    actor = Joined(monkeypatch, register, 1, 0, 0, 1, 0)
    ray_join._leave(register, actor, "mine")
    assert actor.killed
    assert actor.looks == 4 + ray_join.QUIET


def test_requests_that_wait_at_another_router_make_a_pool_grow(enter: Callable[..., Keeper]) -> None:
    keeper, other = enter(), enter()
    keeper.serve("denoiser=0..1")
    other.router.costs.learn(RoleType.DENOISER, 1.0, 2 * SCALE_AFTER)
    keeper.pulse()
    other.pulse()
    other.router.submit(Job(), Handover(RoleType.DENOISER, None), {})
    keeper.pulse()
    assert keeper.replicas == {}
    other.pulse()
    keeper.pulse()
    assert len(keeper.replicas) == 1


def test_a_replica_shows_that_it_is_alive_however_many_segments_wait_in_it(cluster: None) -> None:
    actor = start_replica("full", "/nowhere", "denoiser", {"device": "cpu"}, threads=1, gpus=0, here=True)
    with pytest.raises(RayTaskError, match="/nowhere"):  # there is nothing to load, and nothing loads any more
        ray.get(actor.describe.remote(), timeout=60)
    tickets = [f"ticket {number}" for number in range(RUNS + 10)]
    runs = [actor.run.options(num_returns=2).remote(Order(ticket), None)[0] for ticket in tickets]
    deadline = time.monotonic() + 30
    while ray.get(actor.busy.remote(), timeout=10) < RUNS:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    ray.get(actor.hand.remote(Order(tickets[0]), np.zeros(8, np.uint8)), timeout=10)
    ray.get([actor.cancel.remote(ticket) for ticket in tickets], timeout=10)
    kinds = [outcome["error"][0] for outcome in ray.get(runs, timeout=10)]
    ray.kill(actor)
    assert kinds[0] == "WireError", "its state came, and was none"
    assert set(kinds[1:]) == {"Cancelled"}


def test_a_replica_with_work_of_another_router_is_not_idle() -> None:
    mine = replica()
    beat: dict[str, Any] = {"replica": {"slots": {}, "busy": 0}, "progress": {}, "previews": {}}
    mine.busy = 0.0
    mine._note(beat)
    assert mine.busy == 0.0
    beat["replica"]["busy"] = 1
    mine._note(beat)
    assert time.monotonic() - mine.busy < 5


def test_a_router_that_was_silent_while_the_service_ended_begins_it_again(enter: Callable[..., Keeper]) -> None:
    first, second = enter(), enter()
    first.serve("denoiser=0..1")
    first.pulse()
    second.pulse()
    pools = second.pools
    time.sleep(SILENT + 0.5)
    first.leave()
    assert ray.get(second._register.identity.remote()) is None
    second.pulse()
    assert ray.get(second._register.identity.remote()) == IDENTITY
    assert second.pools == pools != {}
    third = enter()
    third.pulse()
    assert third.pools == pools


def test_a_router_that_was_silent_takes_no_part_in_the_service_of_another_model(enter: Callable[..., Keeper]) -> None:
    first = enter()
    first.pulse()
    time.sleep(SILENT + 0.5)
    other = enter(fingerprint="two")
    with pytest.raises(ReplicaRefusedError, match="its fingerprint is 'one', the service's 'two'"):
        first.pulse()
    other.pulse()
    assert ray.get(other._register.identity.remote()) == {"fingerprint": "two"}


def test_how_long_a_replica_is_silent_can_be_read_while_its_answer_comes() -> None:
    class Answered(RayReplica):
        """Its answer comes as soon as it was looked whether it had."""

        read = 0

        @property  # type: ignore[override]
        def asked(self) -> float | None:
            self.read += 1
            return 1.0 if self.read == 1 else None

        @asked.setter
        def asked(self, value: float | None) -> None:
            pass

    mine = Answered("one", "denoiser", None, None, lambda *_: None)
    assert mine.silent > 0


@contextmanager
def silent(register: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The register's process is stopped meanwhile."""
    for name in ("_PATIENCE", "_BRIEF"):
        monkeypatch.setattr(ray_pools, name, 1.0)
    pid = ray.get(register.__ray_call__.remote(lambda _: os.getpid()))
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def test_replicas_are_looked_after_while_the_register_is_silent(
    enter: Callable[..., Keeper], monkeypatch: pytest.MonkeyPatch
) -> None:
    keeper = enter()
    keeper.serve("denoiser=2")
    keeper.pulse()
    broken, other = keeper.replicas.values()
    monkeypatch.setattr(broken, "ask", lambda: 1 / 0)
    broken.asked = other.asked = None
    with silent(keeper._register, monkeypatch), pytest.raises(GetTimeoutError):
        keeper.pulse()
    assert other.asked is not None


def test_a_register_that_is_slower_than_a_pulse_is_heard_all_the_same(
    enter: Callable[..., Keeper], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Slow(Register):
        def pulse(self, *told: Any) -> Any:
            time.sleep(1.5)
            return super().pulse(*told)

    keeper = enter()
    monkeypatch.setattr(ray_pools, "_BRIEF", 0.6)
    slow = ray.remote(num_cpus=0)(Slow).remote()
    ray.get(slow.enter.remote(keeper._name, IDENTITY))
    ray.get(slow.add.remote("joined", "denoiser", joined=True))
    monkeypatch.setattr(keeper, "_register", slow)
    for _ in range(2):
        with pytest.raises(GetTimeoutError):
            keeper.pulse()
    keeper.pulse()
    assert keeper._members.keys() == {"joined"}
    monkeypatch.undo()
    ray.kill(slow)


@pytest.mark.parametrize("alone", [True, False])
def test_a_router_that_leaves_while_the_register_is_silent_ends_the_replicas_if_it_is_the_only_one(
    enter: Callable[..., Keeper], monkeypatch: pytest.MonkeyPatch, alone: bool
) -> None:
    keeper = enter()
    if not alone:
        enter().pulse()
    keeper.serve("denoiser=1")
    keeper.pulse()
    (mine,) = keeper.replicas.values()
    with silent(keeper._register, monkeypatch):
        keeper.leave()
        time.sleep(SILENT + 1)
    assert mine.state == ("closed" if alone else "starting")
    left = ray.get(keeper._register.members.remote())
    assert left.keys() == (set() if alone else {mine.name}), "what it hears late is the same"


def test_pools_do_not_outlive_their_service() -> None:
    register = register_of(0)
    assert told(register)["pools"].keys() == {"denoiser"}
    register._now += int(SILENT)
    register.enter("another", {"fingerprint": "two"})
    known = register.pulse("another", {})
    assert known is not None and known["pools"] == {}


def test_a_register_that_was_stopped_does_not_take_its_routers_for_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    ended: list[str] = []
    late = 0.0
    clock = SimpleNamespace(monotonic=lambda: time.monotonic() + late, sleep=lambda seconds: time.sleep(seconds / 10))
    monkeypatch.setattr(ray_register, "time", clock)
    monkeypatch.setattr(ray_register, "end", ended.append)
    register = Register(orphaned=10)
    register.enter("a router", IDENTITY)
    register.add("one", "denoiser")
    late = 100.0
    time.sleep(0.5)
    assert ended == []
    deadline = time.monotonic() + 5
    while not ended:
        assert time.monotonic() < deadline, "and nobody is left, after all"
        time.sleep(0.05)


def test_a_replica_that_joined_stays_when_one_look_took_long(cluster: None, monkeypatch: pytest.MonkeyPatch) -> None:
    class Slow(Register):
        """Starts anew at the first look, and learns its members only after that."""

        def members(self) -> dict[str, dict[str, Any]]:
            known = super().members()
            if not known:
                time.sleep(2)
                self.add("mine", "denoiser", joined=True)
                return {}
            self.drain("mine")
            return known

    monkeypatch.setattr(ray_join, "FORGOTTEN", 10)
    monkeypatch.setattr(ray_join, "LOOK", 0.1)
    slow = ray.remote(num_cpus=0)(Slow).remote()
    assert ray_join._stay(slow, None, "mine"), "until it is drained"
    ray.kill(slow)


def test_a_replica_whose_service_ended_while_it_loaded_is_refused(
    enter: Callable[..., Keeper], monkeypatch: pytest.MonkeyPatch
) -> None:
    keeper = enter()
    keeper.pulse()

    def load(_: Any) -> dict[str, Any]:
        keeper.leave()
        enter(fingerprint="two").pulse()
        return {}

    monkeypatch.setattr(ray_join, "connect", lambda _: None)
    monkeypatch.setattr(ray_join, "_wait_until_loaded", load)
    with pytest.raises(ReplicaRefusedError, match="another one now"):
        ray_join.join("/nowhere", "denoiser", "here")


def test_a_pool_that_wakes_does_not_make_the_service_unready() -> None:
    engine = object.__new__(RayEngine)
    engine.router = Router(lambda handover: handover.payload)
    pool = {"least": 0, "most": 2, "target": 1}
    replica = SimpleNamespace(pool="denoiser", failed=None)
    keeper = SimpleNamespace(pools={"denoiser": pool}, replicas={"denoiser-1": replica})
    engine._keeper = keeper  # type: ignore[assignment]
    assert engine.served() == {RoleType.DENOISER}
    replica.failed = time.monotonic()
    assert engine.served() == set(), "it tried, and cannot"
    replica.failed = None
    pool["least"] = 1
    assert engine.served() == set()


def test_the_requests_of_a_router_that_has_no_part_in_the_service_any_more_end() -> None:
    engine = object.__new__(RayEngine)
    engine._closed = threading.Event()
    engine.router = Router(lambda handover: handover.payload)
    waiting = Job()
    engine.router.submit(waiting, Handover(RoleType.DENOISER, None), {})

    def pulse() -> None:
        engine._closed.set()
        raise ReplicaRefusedError("another model is served")

    engine._keeper = SimpleNamespace(pulse=pulse)  # type: ignore[assignment]
    engine._pulse()
    with pytest.raises(ReplicaLost, match="another model is served"):
        waiting.result(0)


class Process:
    """Stands in for Ray's handle of a replica: what it was asked, and what it fails at."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, tuple[Any, ...]]] = []
        self.fails = False

    def __getattr__(self, name: str) -> Any:
        def remote(*given: Any) -> Any:
            if self.fails and name == "run":
                raise OSError("no room")
            self.asked.append((name, given))
            answer: Any = SimpleNamespace(future=Future)
            return (answer, answer) if name == "run" else answer

        method = SimpleNamespace(remote=remote)
        return SimpleNamespace(remote=remote, options=lambda **_: method)


def given(mine: RayReplica) -> Ticket:
    """A ticket that the replica was given long ago."""
    ticket = Ticket(
        Job(), RoleType.DENOISER, Handover(RoleType.DENOISER, b"state"), 1.0, 1.0, False, lambda *_: None, mine
    )
    mine.tickets.append(ticket)
    return ticket


def test_a_ticket_that_cannot_be_asked_for_is_no_fault_of_its_replica(cluster: None) -> None:
    process = Process()
    mine = RayReplica("one", "denoiser", process, None, lambda *_: None)
    ticket = given(mine)
    process.fails = True
    with pytest.raises(OSError, match="no room"):
        mine.ask()
    assert [what for what, _ in process.asked] == ["beat"]
    process.fails = False
    mine.ask()
    assert [what for what, _ in process.asked] == ["beat", "beat", "run"], "and it is asked for again"
    assert ticket.asked


def told_ready(mine: RayReplica, made: Router) -> None:
    """Let a replica's sign of life be heard, which says that it has loaded."""
    mine.asked = asked = time.monotonic()
    beat: Future[Any] = Future()
    ready = {"slots": {}, "busy": 0, "loaded_bytes": 1, "device": "cpu", "niceness": 0}
    beat.set_result({"replica": ready, "progress": {}, "previews": {}})
    mine.hear(made, beat, asked)


def test_what_a_replica_computed_when_it_was_taken_to_be_lost_is_cancelled_there_before_it_serves_again() -> None:
    process, made = Process(), Router(lambda handover: handover.payload)
    mine = RayReplica("one", "denoiser", process, None, lambda *_: None)
    told_ready(mine, made)
    assert made.replicas == [mine] and process.asked == []
    made._jobs[(ticket := given(mine)).job] = {}
    mine.lose(made, "the network failed")
    assert made.replicas == []
    told_ready(mine, made)
    assert process.asked[0] == ("cancel", (ticket.name,))
    assert made.replicas == [mine]


@pytest.mark.parametrize("when", ["before it is let in", "while it is"])
def test_a_replica_that_is_lost_while_it_tells_that_it_is_ready_is_not_let_in(when: str) -> None:
    class Losing(Router):
        def add(self, replica: Any) -> None:
            if when == "while it is":
                replica.lose(self, "it died")
            super().add(replica)

    class Dying(RayReplica):
        def _note(self, beat: dict[str, Any]) -> None:
            super()._note(beat)
            if when == "before it is let in":
                self.lose(made, "it died")

    made = Losing(lambda handover: handover.payload)
    mine = Dying("one", "denoiser", Process(), None, lambda *_: None)
    told_ready(mine, made)
    assert made.replicas == [] and mine.state == "starting"


def test_a_process_of_another_user_is_reached_through_ray(cluster: None) -> None:
    mine = RayReplica("one", "denoiser", Process(), "here", lambda *_: None)
    mine.told = {"node": ray.get_runtime_context().get_node_id(), "inbox": "there", "user": os.getuid()}
    assert mine._hears and "user" not in mine.describe()
    mine.told["user"] += 1
    assert not mine._hears and not mine.is_gone()


def test_a_replica_is_told_how_many_previews_of_each_ticket_have_come(cluster: None) -> None:
    process = Process()
    mine = RayReplica("one", "denoiser", process, None, lambda *_: None)
    ticket = given(mine)
    ticket.asked, ticket.previews = True, 2
    mine.ask()
    ((what, (wanted, _)),) = process.asked
    assert (what, wanted) == ("beat", {ticket.name: 2})


def test_an_answer_that_is_to_be_fetched_is_asked_for_with_the_state_it_came_from(cluster: None) -> None:
    made = Router(lambda handover: handover.payload)
    hearing = Hearing(made)
    process = Process()
    mine = RayReplica("one", "denoiser", process, None, hearing.later)
    made.add(mine)
    ticket = given(mine)
    hearing._receive(Answer(ticket.name, "", None), memoryview(b""))()
    ((_, (order, payload)),) = process.asked
    assert (order.ticket, payload) == (ticket.name, b"state")
    hearing.inbox.close()


def test_an_engine_goes_on_as_long_as_every_role_has_a_replica_that_may_serve() -> None:
    engine = object.__new__(RayEngine)
    broken, ready = replica("broken"), replica("ready")
    broken.failure = OSError("no disk")
    engine._keeper = SimpleNamespace(replicas={"broken": broken, "ready": ready})  # type: ignore[assignment]
    engine.check_replicas()
    ready.failure = OSError("no card")
    with pytest.raises(ModelError, match="no disk"):
        engine.check_replicas()


@pytest.mark.parametrize("known", [True, False])
def test_decoders_are_asked_at_once_for_what_previews_are_made_with(cluster: None, known: bool) -> None:
    class Decoder:
        def __init__(self, takes: float) -> None:
            self._takes = takes

        def projection(self, timeout: float) -> Any:
            time.sleep(self._takes)
            return np.ones((4, 3), np.float32)

    actors = [ray.remote(num_cpus=0)(Decoder).remote(takes) for takes in (60, 0, 0 if known else 60)]
    for each in actors[1:]:
        ray.get(each.__ray_ready__.remote())
    ray.kill(actors[1])
    engine = object.__new__(RayEngine)
    decoders = {
        str(number): RayReplica(str(number), "decoder", each, None, lambda *_: None)
        for number, each in enumerate(actors)
    }
    for each in decoders.values():
        each.state = "ready"
    engine._keeper = SimpleNamespace(replicas=decoders)  # type: ignore[assignment]
    began = time.monotonic()
    assert (engine.find_projection(3.0) is not None) is known
    assert time.monotonic() - began < 4.5
    for each in (actors[0], actors[2]):
        ray.kill(each)
