"""The engine over Ray: processes that come, die, hang and go, and the same pixels all the while."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch

import triptych
import triptych.engine  # before ray: it asks for Ray's authentication

import ray  # isort: skip
from ray.exceptions import GetTimeoutError, ObjectLostError

from triptych.engine import ray_hearing, ray_pools, ray_replica
from triptych.engine.job import Job
from triptych.engine.pools import parse_pools
from triptych.engine.ray import RayEngine, RayReplica
from triptych.engine.ray_replica import GIVE_UP
from triptych.engine.replica import Handover, Ticket
from triptych.errors import Cancelled, ModelError, ReplicaRefusedError, UsageError, WireError
from triptych.request import Request
from triptych.roles import RoleType
from triptych.state import State

ASK: dict[str, Any] = {
    "prompt": "a red fox", "seed": 7, "height": 64, "width": 48, "num_inference_steps": 3, "output_type": "pt",
    "max_sequence_length": 24, "exact": True,
}  # fmt: skip


@pytest.fixture(scope="module")
def repository(tiny_repo: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shutil.copytree(tiny_repo("flux2_klein"), tmp_path_factory.mktemp("ours") / "flux2_klein")


@pytest.fixture(scope="module")
def engine(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayEngine]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRIPTYCH_CACHE", str(tmp_path_factory.mktemp("cache")))
        # Workers import this test's `triptych`, wherever it lies.
        root = str(Path(triptych.__file__).parents[1])
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH")))))
        patch.setenv("RAY_ADDRESS", "127.0.0.1:1")  # another cluster, which nobody asked for
        with RayEngine(repository, pools="encoder=1,denoiser=2,decoder=1", threads=1) as engine:
            yield engine


@pytest.fixture(scope="module")
def whole(repository: Path) -> triptych.Model:
    return triptych.load(repository, device="cpu")


def of(engine: RayEngine, pool: str) -> list[RayReplica]:
    return [each for each in engine.replicas if each.pool == pool]


def wait_until(condition: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.05)


def all_ready(engine: RayEngine) -> bool:
    return all(each.state == "ready" for each in engine.replicas)


def test_requests_over_three_processes_equal_the_whole_to_the_bit(engine: RayEngine, whole: triptych.Model) -> None:
    jobs = [engine.submit(Request(**{**ASK, "seed": seed})) for seed in range(6)]
    for seed, job in enumerate(jobs):
        assert torch.equal(job.result(60).images, whole.generate(**{**ASK, "seed": seed}).images)
    roles = [event.details["role"] for event in jobs[0].events() if event.kind == "started"]
    assert roles == ["encoder", "denoiser", "decoder"]
    assert len(engine.router) == 0


def test_results_that_are_kept_keep_no_descriptors(engine: RayEngine) -> None:
    ask = {**ASK, "height": 128, "width": 128, "num_inference_steps": 1}
    engine.generate(**ask)
    before = len(os.listdir("/proc/self/fd"))
    kept = [engine.generate(**{**ask, "seed": seed}) for seed in range(8)]
    assert len(os.listdir("/proc/self/fd")) < before + len(kept) / 2


def test_a_result_that_is_damaged_on_its_way_is_made_again_by_its_role_alone(
    engine: RayEngine, whole: triptych.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    damaged = iter([True])

    class Carried(State):
        @classmethod
        def from_bytes(cls, data: Any) -> State:
            if next(damaged, False):
                raise WireError("checksum mismatch")
            return State.from_bytes(data)

    monkeypatch.setattr(engine._hearing.inbox, "_receive", lambda order, data: None)  # results do not come straight
    monkeypatch.setattr(ray_replica, "LATE", 0.5)
    monkeypatch.setattr(ray_hearing, "State", Carried)
    job = engine.submit(Request(**ASK))
    assert torch.equal(job.result(60).images, whole.generate(**ASK).images)
    started = [event.details["role"] for event in job.events() if event.kind == "started"]
    assert started.count("decoder") == 2 and started.count("denoiser") == 1


def test_replicas_load_only_their_own_weights(engine: RayEngine, whole: triptych.Model) -> None:
    total = sum(whole.loaded_bytes.values())
    for replica in engine.replicas:
        assert 0 < replica.told["loaded_bytes"] < total


def test_replicas_do_not_give_way_to_whatever_else_runs(engine: RayEngine) -> None:
    wait_until(lambda: all_ready(engine))
    mine = os.getpriority(os.PRIO_PROCESS, 0)
    assert {os.getpriority(os.PRIO_PROCESS, each.told["pid"]) for each in engine.replicas} == {mine}


@pytest.mark.parametrize(
    "pool", ["denoiser", *(pytest.param(each, marks=pytest.mark.slow) for each in ("encoder", "decoder"))]
)
def test_a_killed_role_loses_no_request_and_comes_back(engine: RayEngine, whole: triptych.Model, pool: str) -> None:
    wait_until(lambda: all_ready(engine))
    jobs = [engine.submit(Request(**{**ASK, "seed": seed, "num_inference_steps": 30})) for seed in range(4)]
    victim = of(engine, pool)[0]
    losses, pid = victim.losses, victim.told["pid"]
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: victim.losses > losses, 10)
    for seed, job in enumerate(jobs):
        expected = whole.generate(**{**ASK, "seed": seed, "num_inference_steps": 30}).images
        assert torch.equal(job.result(120).images, expected)
    wait_until(lambda: victim.state == "ready")
    assert victim.told["pid"] != pid
    assert len(engine.router) == 0


def test_what_a_dead_process_told_says_nothing_of_the_next(engine: RayEngine, whole: triptych.Model) -> None:
    wait_until(lambda: all_ready(engine))
    (replica,) = of(engine, "decoder")
    late: Future[Any] = Future()
    late.set_result(ray.get(replica.actor.beat.remote()))
    asked, losses = time.monotonic(), replica.losses
    os.kill(replica.told["pid"], signal.SIGKILL)
    wait_until(lambda: replica.losses > losses, 10)
    engine._hearing.later("told", replica, late, asked)
    wait_until(lambda: replica.state == "ready")
    assert replica in engine.router.replicas
    assert torch.equal(engine.generate(**ASK).images, whole.generate(**ASK).images)


def test_a_role_that_hangs_is_found_and_replaced(engine: RayEngine, whole: triptych.Model) -> None:
    wait_until(lambda: all_ready(engine))
    victim = of(engine, "encoder")[0]
    losses = victim.losses
    os.kill(victim.told["pid"], signal.SIGSTOP)
    job = engine.submit(Request(**ASK))
    began = time.monotonic()
    wait_until(lambda: victim.losses > losses, 10)
    assert time.monotonic() - began < 8
    assert torch.equal(job.result(120).images, whole.generate(**ASK).images)
    assert [event.details["role"] for event in job.events() if event.kind == "retried"] == ["encoder"]


@pytest.fixture
def signs_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Signs of life do not wait for the end of loading: a quick one would otherwise never be seen to last."""
    monkeypatch.setattr(ray_replica, "LOOK", 0.0)


@pytest.mark.usefixtures("signs_at_once")
def test_a_process_that_is_stopped_while_it_loads_is_found_and_replaced(
    engine: RayEngine, whole: triptych.Model
) -> None:
    wait_until(lambda: all_ready(engine))
    (victim,) = of(engine, "decoder")
    losses, first = victim.losses, victim.told["pid"]
    os.kill(first, signal.SIGKILL)
    wait_until(lambda: victim.told["pid"] != first, 30)
    assert victim.state == "starting", "it had loaded before its first sign of life"
    os.kill(victim.told["pid"], signal.SIGSTOP)
    wait_until(lambda: victim.losses == losses + 2, 8)
    job = engine.submit(Request(**ASK))
    assert torch.equal(job.result(120).images, whole.generate(**ASK).images)


@pytest.mark.slow
@pytest.mark.usefixtures("signs_at_once")
def test_a_replica_whose_processes_die_or_hang_while_they_load_is_given_up_and_harms_nobody(
    engine: RayEngine, whole: triptych.Model
) -> None:
    wait_until(lambda: all_ready(engine))
    before = set(of(engine, "encoder"))
    engine.scale("encoder", len(before) + 1)
    wait_until(lambda: len(of(engine, "encoder")) > len(before))
    (added,) = set(of(engine, "encoder")) - before
    killed: set[int] = set()
    while len(killed) < GIVE_UP:
        wait_until(lambda: added._loading and added.told["pid"] not in killed)
        os.kill(added.told["pid"], signal.SIGKILL if len(killed) < GIVE_UP - 1 else signal.SIGSTOP)
        killed.add(added.told["pid"])
    wait_until(lambda: added.failure is not None, 10)
    assert f"{GIVE_UP} processes died or hung while they loaded" in str(added.failure) and added.state == "starting"
    assert torch.equal(engine.submit(Request(**ASK)).result(120).images, whole.generate(**ASK).images)
    engine.scale("encoder", len(before))
    wait_until(lambda: set(of(engine, "encoder")) == before)


def test_a_replica_that_served_and_cannot_load_again_is_replaced(
    engine: RayEngine, whole: triptych.Model, repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_pools, "REPLACE", 1.0)
    wait_until(lambda: all_ready(engine))
    (victim,) = of(engine, "decoder")
    weights, away = repository / "vae", repository / "away"
    weights.rename(away)
    try:
        os.kill(victim.told["pid"], signal.SIGKILL)
        wait_until(lambda: victim.failure is not None)
    finally:
        away.rename(weights)
    wait_until(lambda: victim not in engine.replicas and len(of(engine, "decoder")) == 1 and all_ready(engine))
    assert torch.equal(engine.generate(**ASK).images, whole.generate(**ASK).images)


def test_a_job_is_cancelled_in_another_process(engine: RayEngine) -> None:
    wait_until(lambda: all_ready(engine))
    begun = threading.Event()
    job = engine.submit(Request(**{**ASK, "num_inference_steps": 5000}))
    job.listen(lambda event: begun.set() if event.kind == "step" else None)
    assert begun.wait(30), "progress is told while it runs"
    job.cancel()
    with pytest.raises(Cancelled):
        job.result(1)
    wait_until(lambda: all(not each.tickets for each in engine.replicas), 10)


@ray.remote(num_cpus=0)
class Owner:
    """Has a state, as long as it lives."""

    def put(self) -> list[Any]:
        return [ray.put(np.zeros(2**20, np.uint8))]


def test_a_ticket_whose_state_is_lost_on_its_way_is_given_back(engine: RayEngine) -> None:
    wait_until(lambda: all_ready(engine))
    (replica,) = of(engine, "decoder")
    ended: list[Any] = []
    ticket = Ticket(
        Job(),
        RoleType.DECODER,
        Handover(RoleType.DECODER, None),
        1.0,
        1.0,
        False,
        lambda _, it: ended.append(it),
        replica,
    )
    owner = Owner.remote()
    (state,) = ray.get(owner.put.remote())
    ray.kill(owner)

    def is_lost() -> bool:
        try:
            ray.get(state, timeout=1)
        except (ObjectLostError, GetTimeoutError) as error:
            return isinstance(error, ObjectLostError)
        return False

    wait_until(is_lost)
    replica.tickets.append(ticket)
    try:
        replica.ask_for(ticket)  # and so it waits there
        replica.start(ticket, state)
        wait_until(lambda: bool(ended), 20)
    finally:
        replica.cancel(ticket)
        replica.tickets.clear()
    assert isinstance(ended[0], WireError)
    assert "the hand-over was lost" in str(ended[0])
    wait_until(lambda: ray.get(replica.actor.busy.remote()) == 0, 10)


def test_what_comes_straight_costs_no_call_of_rays(
    engine: RayEngine, whole: triptych.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    wait_until(lambda: all_ready(engine))
    asked: list[str] = []
    ask_for = RayReplica.ask_for

    def note(self: RayReplica, ticket: Ticket, payload: Any = None) -> None:
        asked.append(self.pool)
        ask_for(self, ticket, payload)

    monkeypatch.setattr(RayReplica, "ask_for", note)
    assert torch.equal(engine.generate(**ASK).images, whole.generate(**ASK).images)
    assert asked == []
    with pytest.raises(Cancelled):
        job = engine.submit(Request(**{**ASK, "num_inference_steps": 5000}))
        job.cancel()
        job.result(10)
    wait_until(lambda: all(not each.tickets for each in engine.replicas), 10)
    assert asked, "what has not begun is asked for"


def test_a_state_that_is_lost_on_its_straight_way_is_brought_by_ray(
    engine: RayEngine, whole: triptych.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    wait_until(lambda: all_ready(engine))
    monkeypatch.setattr(ray_replica, "LATE", 0.1)
    monkeypatch.setattr(ray_replica, "begin_sending", lambda *message: socket.socket())  # which nobody hears
    assert torch.equal(engine.submit(Request(**ASK)).result(30).images, whole.generate(**ASK).images)
    wait_until(lambda: all(not each.tickets for each in engine.replicas), 10)


def test_answers_that_are_late_are_asked_for_and_come_once(
    engine: RayEngine, whole: triptych.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    wait_until(lambda: all_ready(engine))
    monkeypatch.setattr(ray_replica, "LATE", -1.0)
    take = engine._hearing._take
    for delay in (0.0, 0.3):
        monkeypatch.setattr(engine._hearing, "_take", lambda *told, delay=delay: (time.sleep(delay), take(*told)))
        jobs = [engine.submit(Request(**{**ASK, "seed": seed})) for seed in range(6)]
        for seed, job in enumerate(jobs):
            for _ in range(4):
                engine._keeper.pulse()
            assert torch.equal(job.result(60).images, whole.generate(**{**ASK, "seed": seed}).images)
            assert job.lost == []
        wait_until(lambda: all(not each.tickets for each in engine.replicas), 10)


def test_an_unforeseen_error_does_not_end_the_heartbeats(engine: RayEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    pulses: list[float] = []

    def fail() -> None:
        pulses.append(time.monotonic())
        raise TypeError("nobody thought of this")

    monkeypatch.setattr(engine._keeper, "pulse", fail)
    wait_until(lambda: len(pulses) > 1, 10)


def test_no_object_of_a_finished_request_is_left_in_the_store(engine: RayEngine) -> None:
    wait_until(lambda: all_ready(engine))
    for seed in range(3):
        engine.generate(**{**ASK, "seed": seed})
    wait_until(lambda: engine.objects() <= 4, 20)


def test_a_pool_is_scaled_up_and_a_replica_drained_while_it_serves(engine: RayEngine) -> None:
    wait_until(lambda: all_ready(engine))
    engine.scale("decoder", 2)
    wait_until(lambda: len(of(engine, "decoder")) == 2 and all_ready(engine))
    gone = of(engine, "decoder")[0]
    jobs = [engine.submit(Request(**{**ASK, "seed": seed})) for seed in range(4)]
    engine.drain(gone.name)
    assert all(job.result(60) for job in jobs)
    wait_until(lambda: [each.name for each in of(engine, "decoder")] != [] and gone not in engine.replicas)
    assert len(of(engine, "decoder")) == 1
    with pytest.raises(UsageError, match="pool='vae'"):
        engine.scale("vae", 1)


def test_a_pool_that_shrinks_while_a_replica_loads_keeps_the_one_that_serves(engine: RayEngine) -> None:
    wait_until(lambda: all_ready(engine))
    (serving,) = of(engine, "decoder")
    engine.scale("decoder", 2)
    wait_until(lambda: len(of(engine, "decoder")) == 2)
    engine.scale("decoder", 1)
    wait_until(lambda: len(of(engine, "decoder")) == 1)
    assert of(engine, "decoder") == [serving]


JOIN = """
import signal, sys
from triptych.engine.ray_join import join
signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
join(sys.argv[1], "denoiser", sys.argv[2], threads=1, on_ready=lambda told: print("ready", flush=True))
"""


def test_a_replica_joins_from_outside_and_leaves_drained(engine: RayEngine, repository: Path) -> None:
    wait_until(lambda: all_ready(engine))
    command = [sys.executable, "-c", JOIN, str(repository), ray.get_runtime_context().gcs_address]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline().strip() == "ready"
        wait_until(lambda: len(of(engine, "denoiser")) == 3 and all_ready(engine))
        jobs = [engine.submit(Request(**{**ASK, "seed": seed})) for seed in range(6)]
        process.terminate()
        assert all(job.result(60) for job in jobs)
        assert process.wait(60) == 0
    wait_until(lambda: len(of(engine, "denoiser")) == 2)


def test_a_replica_of_another_model_is_refused_with_the_difference(
    engine: RayEngine, tiny_repo: Callable[..., Path]
) -> None:
    from triptych.engine.ray_join import join

    with pytest.raises(ReplicaRefusedError, match="its fingerprint is .*, the service's"):
        join(tiny_repo("flux2_klein", is_distilled=True), "denoiser", ray.get_runtime_context().gcs_address, threads=1)


@pytest.mark.slow
def test_a_replica_that_is_stopped_while_it_loads_ends_its_joining(
    engine: RayEngine, repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from triptych.engine import ray_join

    def actors() -> set[int]:
        return {each.pid for each in psutil.process_iter(["cmdline"]) if "ReplicaActor" in str(each.info["cmdline"])}

    def stop() -> None:
        wait_until(lambda: bool(actors() - before))
        (pid,) = actors() - before
        stopped.append(pid)
        os.kill(pid, signal.SIGSTOP)

    monkeypatch.setattr(ray_join, "SILENCE_LOADING", 3.0)
    wait_until(lambda: all_ready(engine))
    before, stopped = actors(), list[int]()
    stopper = threading.Thread(target=stop)
    stopper.start()
    with pytest.raises(ModelError, match="could not start: it has given no sign of life for 3 s"):
        ray_join.join(repository, "denoiser", ray.get_runtime_context().gcs_address, threads=1)
    stopper.join()
    wait_until(lambda: not psutil.pid_exists(stopped[0]), 20)
    assert len(of(engine, "denoiser")) == 2 and all_ready(engine)


@pytest.mark.slow
def test_a_replica_of_another_dtype_is_refused_with_the_difference(engine: RayEngine, repository: Path) -> None:
    from triptych.engine.ray_join import join

    with pytest.raises(ReplicaRefusedError, match="its dtype is 'default=bfloat16', the service's 'default=auto'"):
        join(repository, "denoiser", ray.get_runtime_context().gcs_address, dtype="bfloat16", threads=1)


def test_a_replica_that_joins_is_refused_where_its_machine_has_too_few_gpus(
    engine: RayEngine, repository: Path
) -> None:
    from triptych.engine.ray_join import join

    address = ray.get_runtime_context().gcs_address
    with pytest.raises(UsageError, match="is to reserve 64 GPUs, and Ray knows of"):
        join(repository, "denoiser", address, gpus=64, threads=1)


def test_ray_without_authentication_is_refused(repository: Path) -> None:
    code = f"from triptych.engine.ray import RayEngine; RayEngine({str(repository)!r})"
    environment = {**os.environ, "RAY_AUTH_MODE": "disabled", "PYTHONPATH": str(Path(triptych.__file__).parents[1])}
    ended = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert "only 'token' is accepted" in ended.stderr


@pytest.mark.parametrize(
    ("text", "message"),
    [("", "name at least one"), ("encoder", "role=number"), ("encoder=0", "at least 1"), ("denoiser=4..2", "not fall"),
     ("encoder=1,encoder=2", "twice"), ("server=1", "runs nothing"), ("painter=1", "unknown role")],
)  # fmt: skip
def test_pools_that_make_no_sense_are_refused(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse_pools(text)


def test_pools_are_read() -> None:
    pools = {pool.name: (pool.least, pool.most) for pool in parse_pools("encoder+decoder=1, denoiser=2..4")}
    assert pools == {"encoder+decoder": (1, 1), "denoiser": (2, 4)}


def test_pools_that_lack_a_role_are_refused(repository: Path) -> None:
    with pytest.raises(UsageError, match="no replica runs the role decoder"):
        RayEngine(repository, pools="encoder=1,denoiser=1")


def test_an_impossible_acceleration_is_refused_before_anything_is_started(repository: Path) -> None:
    nobody = "127.0.0.1:1"  # nothing listens there: to connect would fail in another way
    with pytest.raises(UsageError, match="FirstBlockCacheConfig does not fit"):
        RayEngine(repository, address=nobody, acceleration={"denoiser": {"cache": "first_block"}})
