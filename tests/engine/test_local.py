"""The engine in this process, on a tiny model: the same pixels as the whole, overlapped, cancelled, and level."""

import gc
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import triptych
from triptych.engine import local
from triptych.engine.local import LanesReplica, LocalEngine, place, thread_shares
from triptych.errors import Cancelled, MemoryShortageError, ParameterError, ReplicaLost, UsageError
from triptych.request import Request
from triptych.roles import RoleType
from triptych.runtime import streams

ASK: dict[str, Any] = {
    "prompt": "a red fox", "seed": 7, "height": 64, "width": 48, "num_inference_steps": 3, "output_type": "pt",
    "max_sequence_length": 24, "exact": True,
}  # fmt: skip
E, D, C = RoleType.ENCODER, RoleType.DENOISER, RoleType.DECODER
ONE = dict.fromkeys((E, D, C), 1)


@pytest.fixture(scope="module")
def repository(tiny_repo: Callable[..., Path]) -> Path:
    return tiny_repo("flux2_klein")


@pytest.fixture(scope="module")
def engine(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalEngine]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRIPTYCH_CACHE", str(tmp_path_factory.mktemp("cache")))
        with LocalEngine(repository, encoder="cpu", denoiser="cpu", decoder="cpu", threads=ONE) as engine:
            yield engine


@pytest.fixture(scope="module")
def whole(repository: Path) -> triptych.Model:
    return triptych.load(repository, device="cpu")


def test_many_exact_requests_at_once_equal_single_runs_to_the_bit(engine: LocalEngine, whole: triptych.Model) -> None:
    asked = [
        {**ASK, "seed": seed, "prompt": f"fox {seed % 3}", "num_inference_steps": 2 + seed % 3} for seed in range(8)
    ]
    jobs = [engine.submit(Request(**each)) for each in asked]
    for job, each in zip(jobs, asked):
        assert torch.equal(job.result(60).images, whole.generate(**each).images)


def test_requests_that_share_forwards_stay_within_the_tolerance(engine: LocalEngine, whole: triptych.Model) -> None:
    asked = [{**ASK, "seed": seed} for seed in range(6)]
    jobs = [engine.submit(Request(**{**each, "exact": False})) for each in asked]
    for job, each in zip(jobs, asked):
        assert (job.result(60).images - whole.generate(**each).images).abs().max() <= 1e-4


def test_a_job_tells_what_happens_to_it(engine: LocalEngine) -> None:
    job = engine.submit(Request(**ASK))
    events = list(job.events())
    assert [event.number for event in events] == list(range(len(events)))
    steps = [event.details["step"] for event in events if event.kind == "step"]
    assert steps == [1, 2, 3]
    roles = [event.details["role"] for event in events if event.kind == "started"]
    assert roles == ["encoder", "denoiser", "decoder"]
    assert events[0].kind == "queued"
    assert events[-1].kind == "done"
    assert [event.number for event in job.events(start=3)] == list(range(3, len(events)))


def test_a_bad_request_is_refused_before_it_is_a_job(engine: LocalEngine) -> None:
    with pytest.raises(ParameterError, match="multiple of"):
        engine.submit(Request(**{**ASK, "height": 65}))
    assert len(engine.router) == 0


def test_a_job_is_cancelled_in_the_middle_of_its_steps(engine: LocalEngine) -> None:
    begun = threading.Event()
    job = engine.submit(Request(**{**ASK, "num_inference_steps": 5000}))
    job.listen(lambda event: begun.set() if event.kind == "step" else None)
    assert begun.wait(20)
    job.cancel()
    with pytest.raises(Cancelled):
        job.result(5)
    assert engine.generate(**ASK).seed == 7, "the engine goes on"
    assert all(not replica.tickets for replica in engine.router.replicas)


def test_a_prompt_that_comes_again_is_not_encoded_again(engine: LocalEngine, whole: triptych.Model) -> None:
    encoder = engine.router.replicas[0].model.components["text_encoder"]  # type: ignore[attr-defined]
    calls = []
    hook = encoder.register_forward_pre_hook(lambda *_: calls.append(1))
    first = engine.generate(**{**ASK, "prompt": "an owl on a roof"})
    once = len(calls)
    again = engine.generate(**{**ASK, "prompt": "an owl on a roof"})
    other = engine.generate(**{**ASK, "prompt": "an owl on a hill"})
    hook.remove()
    assert once > 0
    assert len(calls) == once + 1, "the negative prompt is encoded once for all"
    assert torch.equal(first.images, again.images)
    assert torch.equal(other.images, whole.generate(**{**ASK, "prompt": "an owl on a hill"}).images)


def test_nothing_of_a_finished_request_is_kept(engine: LocalEngine) -> None:
    job = engine.submit(Request(**ASK))
    kept = weakref.ref(job.result(60).images)
    del job
    deadline = time.monotonic() + 5  # the decoder looks at the picture's colours after it was handed out
    while kept() is not None and time.monotonic() < deadline:
        time.sleep(0.01)
        gc.collect()
    assert kept() is None
    assert len(engine.router) == 0
    assert all(not replica.tickets and not replica._works for replica in engine.router.replicas)  # type: ignore[attr-defined]


def test_an_engine_says_how_things_stand(engine: LocalEngine) -> None:
    told = engine.snapshot()
    assert told["ready"]
    assert told["family"] == "Flux2KleinPipeline"
    (replica,) = told["replicas"]
    assert replica["roles"] == ["decoder", "denoiser", "encoder"]
    assert replica["loaded_bytes"] > 0
    assert replica["running"] == {"decoder": 0, "denoiser": 0, "encoder": 0}


def test_roles_on_one_device_share_a_replica_and_a_device_named_twice_is_two() -> None:
    assert place({E: "cpu", D: "cpu", C: "cpu"}) == [("cpu", [E, D, C])]
    assert place({E: "cuda:1", D: "cuda:0,cuda:2", C: "cuda:1"}) == [
        ("cuda:1", [E, C]),
        ("cuda:0", [D]),
        ("cuda:2", [D]),
    ]
    assert place({E: "cpu", D: "cpu,cpu", C: "cpu"}) == [("cpu", [E, D, C]), ("cpu", [D])]
    with pytest.raises(UsageError, match="a device is accepted"):
        place({E: " , "})


def test_lanes_never_have_more_threads_than_there_are() -> None:
    assert thread_shares(1) == {E: 1, D: 1, C: 1}
    assert thread_shares(2)[D] == 1
    assert thread_shares(16)[D] == 15


@pytest.mark.parametrize(
    ("kind", "given", "expected"),
    [
        ("cuda", {D: 3}, {D: 3}),
        ("cuda", None, {}),
        ("cpu", {D: 3}, {**thread_shares(torch.get_num_threads()), D: 3}),
    ],
)
def test_lanes_have_the_threads_that_are_given_and_of_their_own_only_on_a_cpu(
    repository: Path, kind: str, given: dict[RoleType, int] | None, expected: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[object] = []

    def recorded(name: str, model: triptych.Model, *, threads: object, **options: Any) -> LanesReplica:
        told.append(threads or {})
        model.device = torch.device("cpu")  # as it is, whatever was pretended
        return LanesReplica(name, model, threads=ONE, **options)

    def elsewhere(*args: Any, role: Any, **options: Any) -> triptych.Model:
        model = triptych.load(*args, role=role, **options)
        if role is not RoleType.SERVER:
            model.device = torch.device(kind)
        return model

    monkeypatch.setattr(local, "LanesReplica", recorded)
    monkeypatch.setattr(local, "load", elsewhere)
    devices: dict[str, Any] = dict.fromkeys(("encoder", "denoiser", "decoder"), "cpu")
    LocalEngine(repository, **devices, threads=given, warm_up=False).close(0)
    assert told == [expected]


def test_a_request_does_not_fail_for_want_of_previews(engine: LocalEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "find_projection", lambda timeout, **_: time.sleep(timeout))
    monkeypatch.setattr(engine, "_projection_sought", False)
    monkeypatch.setattr(engine, "_projection_stale", 0.0)
    job = engine.submit(Request(**ASK), deadline=5.0, previews=1)
    assert job.result(60).seed == 7


def test_two_denoisers_share_the_work(repository: Path) -> None:
    with LocalEngine(
        repository, encoder="cpu", denoiser="cpu,cpu", decoder="cpu", threads=ONE, warm_up=False
    ) as engine:
        jobs = [engine.submit(Request(**{**ASK, "seed": seed})) for seed in range(8)]
        used = set()
        for job in jobs:
            job.result(60)
            used |= {event.details["replica"] for event in job.events() if event.details.get("role") == "denoiser"
                     and event.kind == "started"}  # fmt: skip
    assert len(used) == 2


NEEDS_ACCELERATOR_ERROR = pytest.mark.skipif(
    not hasattr(torch, "AcceleratorError"), reason="PyTorch before 2.8 does not tell such errors apart"
)


def fail_on_one_denoiser(engine: LocalEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    replica = min((each for each in engine.router.replicas if D in each.roles), key=lambda each: len(each.roles))
    (stage,) = (each for each in replica.model.stages if each.role is RoleType.DENOISER)  # type: ignore[attr-defined]

    def fail(forward: object) -> None:
        raise torch.AcceleratorError("an illegal address")

    monkeypatch.setattr(stage, "compute", fail)


@NEEDS_ACCELERATOR_ERROR
@pytest.mark.parametrize("denoisers", [1, 2])
def test_a_device_that_has_failed_is_given_nothing_more(
    repository: Path, whole: triptych.Model, denoisers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    devices = ",".join(["cpu"] * denoisers)
    with LocalEngine(repository, encoder="cpu", denoiser=devices, decoder="cpu", threads=ONE) as engine:
        fail_on_one_denoiser(engine, monkeypatch)
        monkeypatch.setattr(streams, "answers", lambda device: False)
        jobs = [engine.submit(Request(**{**ASK, "seed": seed, "num_inference_steps": 9})) for seed in range(20)]
        if denoisers == 1:
            for job in jobs:
                with pytest.raises(ReplicaLost, match="start this process anew"):
                    job.result(60)
            with pytest.raises(ReplicaLost, match="start this process anew"):
                engine.submit(Request(**ASK))
            assert not engine.ready()
        else:
            for seed, job in enumerate(jobs):
                expected = whole.generate(**{**ASK, "seed": seed, "num_inference_steps": 9}).images
                assert torch.equal(job.result(60).images, expected)
            assert engine.ready()
            assert any(event.kind == "retried" for job in jobs for event in job.events())


@NEEDS_ACCELERATOR_ERROR
def test_an_error_that_looks_like_a_failed_device_is_one_requests_where_the_device_goes_on(
    repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with LocalEngine(repository, encoder="cpu", denoiser="cpu", decoder="cpu", threads=ONE) as engine:
        with monkeypatch.context() as patch:
            fail_on_one_denoiser(engine, patch)
            with pytest.raises(torch.AcceleratorError, match="an illegal address"):
                engine.generate(**ASK)
        assert engine.ready()
        engine.generate(**ASK)


def test_a_request_that_lacks_memory_beside_another_is_made_again_alone(
    engine: LocalEngine, whole: triptych.Model
) -> None:
    (replica,) = engine.router.replicas
    assert isinstance(replica, LanesReplica)
    beside: list[int] = []

    def fail(*_: Any) -> None:
        beside.append(len(replica.tickets))
        if len(replica.tickets) > 1:
            raise torch.OutOfMemoryError("another has it")

    hook = replica.model.components["text_encoder"].register_forward_pre_hook(fail)
    try:
        jobs = [engine.submit(Request(**{**ASK, "prompt": f"{name} fox"})) for name in ("one", "another")]
        for job, name in zip(jobs, ("one", "another")):
            expected = whole.generate(**{**ASK, "prompt": f"{name} fox"}).images
            assert torch.equal(job.result(60).images, expected)
    finally:
        hook.remove()
    assert max(beside) > 1 and beside.count(1) == 2
    reasons = [event.details["reason"] for job in jobs for event in job.events() if event.kind == "retried"]
    assert reasons and all("not enough memory" in reason for reason in reasons)


def test_a_request_for_which_there_is_no_memory_says_so(engine: LocalEngine) -> None:
    (replica,) = engine.router.replicas
    assert isinstance(replica, LanesReplica)

    def fail(*_: Any) -> None:
        raise MemoryError("too large")

    hook = replica.model.components["transformer"].register_forward_pre_hook(fail)
    try:
        with pytest.raises(MemoryShortageError, match="not enough memory.*/denoiser: too large"):
            engine.generate(**ASK)
    finally:
        hook.remove()
    engine.generate(**ASK)


def test_closing_finishes_what_was_taken_on(repository: Path) -> None:
    engine = LocalEngine(repository, encoder="cpu", denoiser="cpu", decoder="cpu", threads=ONE, warm_up=False)
    jobs = [engine.submit(Request(**{**ASK, "seed": seed})) for seed in range(3)]
    engine.close(60)
    assert [job.status for job in jobs] == ["done"] * 3


def test_roles_that_compute_with_as_many_threads_share_theirs(repository: Path) -> None:
    drivers: dict[str, set[Any]] = {}
    with LocalEngine(
        repository, encoder="cpu", denoiser="cpu", decoder="cpu", threads={E: 1, D: 2, C: 1}, warm_up=False
    ) as engine:
        (replica,) = engine.router.replicas
        for name in ("text_encoder", "transformer", "vae"):
            module = replica.model.components[name]  # type: ignore[attr-defined]
            module = module.decoder if name == "vae" else module
            module.register_forward_pre_hook(
                lambda *_, name=name: drivers.setdefault(name, set()).add(
                    (threading.current_thread().name, torch.get_num_threads())
                )
            )
        engine.generate(**ASK)
    assert drivers["transformer"] == {("monolithic-0", 2)}
    assert drivers["text_encoder"] | drivers["vae"] <= {("monolithic-0-0", 1), ("monolithic-0-1", 1)}


def test_one_request_is_driven_by_one_thread_once_nothing_is_to_be_tried_out(engine: LocalEngine) -> None:
    (replica,) = engine.router.replicas
    drivers: set[threading.Thread] = set()
    modules = [replica.model.components[name] for name in ("text_encoder", "transformer")]  # type: ignore[attr-defined]
    modules.append(replica.model.components["vae"].decoder)  # type: ignore[attr-defined]
    hooks = [each.register_forward_pre_hook(lambda *_: drivers.add(threading.current_thread())) for each in modules]
    deadline = time.monotonic() + 60
    try:
        while len(drivers) != 1:
            assert time.monotonic() < deadline
            engine.router.drained(10)
            drivers.clear()
            engine.generate(**ASK)
    finally:
        for hook in hooks:
            hook.remove()


def test_a_closed_engine_takes_nothing_on(repository: Path) -> None:
    with LocalEngine(repository, encoder="cpu", denoiser="cpu", decoder="cpu", threads=ONE, warm_up=False) as closed:
        pass
    with pytest.raises(Cancelled, match="closed"):
        closed.submit(Request(**ASK))


def test_an_engine_that_cannot_start_leaves_nothing(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[weakref.ref[LocalEngine]] = []

    def fail(engine: LocalEngine) -> None:
        kept.append(weakref.ref(engine))
        raise MemoryError("no room")

    monkeypatch.setattr(LocalEngine, "warm_up", fail)
    before = set(threading.enumerate())
    with pytest.raises(MemoryError):
        LocalEngine(repository, encoder="cpu", denoiser="cpu", decoder="cpu", threads=ONE)
    deadline = time.monotonic() + 10
    while gc.collect() and kept[0]() is not None or set(threading.enumerate()) - before:
        assert time.monotonic() < deadline, "it is still there, or its threads are"
        time.sleep(0.05)
