"""Replicas of several ranks on Ray: they are one replica to everybody else, in life and in death."""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

import triptych
import triptych.engine  # before ray: it asks for Ray's authentication

import ray  # isort: skip
from triptych.components.acceleration import Acceleration
from triptych.engine.pools import parse_pools
from triptych.engine.ranks import check_room, gpus_of, placed, ranks_of, with_ranks
from triptych.engine.ray import RayEngine
from triptych.errors import ParameterError, UsageError
from triptych.request import Request
from triptych.roles import RoleType

DENOISER = RoleType.DENOISER
ASK: dict[str, Any] = {
    "prompt": "a red fox", "guidance_scale": 3.0, "seed": 7, "height": 64, "width": 48,
    "num_inference_steps": 3, "output_type": "pt", "max_sequence_length": 24, "exact": True,
}  # fmt: skip


def wait_until(condition: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.05)


@pytest.fixture(scope="module")
def repository(tiny_repo: Callable[..., Path]) -> Path:
    return tiny_repo("flux2_klein")


@pytest.fixture(scope="module")
def engine(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayEngine]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRIPTYCH_CACHE", str(tmp_path_factory.mktemp("cache")))
        root = str(Path(triptych.__file__).parents[1])
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH")))))
        faster = {"denoiser": Acceleration(cfg_parallel=True)}
        with RayEngine(repository, pools="encoder+decoder=1,denoiser=1", threads=1, acceleration=faster) as engine:
            yield engine


def ranks_under(pid: int) -> list[psutil.Process]:
    """Return the processes that a replica's first one has started as ranks."""
    return [each for each in psutil.Process(pid).children() if "triptych.runtime.rank_process" in each.cmdline()]


@pytest.mark.slow
def test_a_replica_of_two_ranks_equals_the_whole_to_the_bit_and_is_one_in_death(
    engine: RayEngine, repository: Path
) -> None:
    whole = triptych.load(repository, device="cpu")
    replica = next(each for each in engine.replicas if each.pool == "denoiser")
    first = replica.told["pid"]
    (rank,) = ranks_under(first)
    jobs = [engine.submit(Request(**{**ASK, "seed": seed})) for seed in range(3)]
    for seed, job in enumerate(jobs):
        assert torch.equal(job.result(60).images, whole.generate(**{**ASK, "seed": seed}).images)

    long = {**ASK, "num_inference_steps": 60}
    jobs = [engine.submit(Request(**{**long, "seed": seed})) for seed in range(3)]
    begun = threading.Event()
    jobs[0].listen(lambda event: begun.set() if event.kind == "step" else None)
    assert begun.wait(30)
    rank.send_signal(signal.SIGKILL)
    wait_until(lambda: replica.losses == 1, 6)
    for seed, job in enumerate(jobs):
        assert torch.equal(job.result(120).images, whole.generate(**{**long, "seed": seed}).images)
    assert replica.told["pid"] != first
    (another,) = ranks_under(replica.told["pid"])
    os.kill(replica.told["pid"], signal.SIGKILL)  # and the other way round: no rank outlives its leader
    wait_until(lambda: not another.is_running() or another.status() == psutil.STATUS_ZOMBIE, 10)


@pytest.mark.slow
def test_gpus_are_reserved_for_all_ranks_together_or_refused(engine: RayEngine) -> None:
    two = {DENOISER: Acceleration(ulysses=2)}
    assert gpus_of({DENOISER}, {}, two) == 0, "this cluster has none, so the ranks run on the CPU"
    assert gpus_of({DENOISER}, {DENOISER: 1}, {}) == 1
    with pytest.raises(ParameterError, match="gpus='1': 2 ranks need one each"):
        gpus_of({DENOISER}, {DENOISER: 1}, two)
    with pytest.raises(UsageError, match="needs 2 GPUs on one machine, and the cluster's largest has 0"):
        gpus_of({DENOISER}, {DENOISER: 2}, two)


@pytest.mark.slow
def test_replicas_for_which_there_are_too_few_gpus_are_not_waited_for(engine: RayEngine, caplog: Any) -> None:
    pools = parse_pools("encoder=1..4,denoiser=2,decoder=1")
    check_room(pools, {}, {}, growing=False)  # this cluster has none, so they run on the CPU
    asked = {RoleType.ENCODER: 0.5, DENOISER: 1}
    with pytest.raises(
        UsageError, match=r"reserve 2.5 GPUs \(encoder: 0.5, denoiser: 2, decoder: 0\), and there are 0"
    ):
        check_room(pools, asked, {}, growing=False)
    check_room(pools, asked, {}, growing=True)
    assert "wait until a machine joins" in caplog.text
    with pytest.raises(ParameterError, match="gpus='1.5': a share of one GPU, or a whole number"):
        gpus_of({DENOISER}, {DENOISER: 1.5}, {})


def have_gpus(monkeypatch: pytest.MonkeyPatch, machines: list[int]) -> None:
    """Let Ray tell of a cluster whose machines have so many GPUs each."""
    nodes = [{"Alive": True, "Resources": {"GPU": float(cards)}} for cards in machines]
    monkeypatch.setattr(ray, "nodes", lambda: [{"Alive": False, "Resources": {"GPU": 8.0}}, *nodes])


@pytest.mark.parametrize(
    ("pools", "gpus", "machines", "problem"),
    [
        ("encoder=3,denoiser=1,decoder=1", (0.2, 0.3, 0.1), [1], None),  # 1.0000000000000002 as numbers of Python
        ("encoder=1,denoiser=1,decoder=1", (0.5, 2, 0.5), [1, 2], None),
        ("encoder=1,denoiser=2,decoder=1", (0.4, 0.6, 0.4), [2], None),
        ("encoder=1,denoiser=3,decoder=1", (0, 0.6, 0), [2], r"reserve 1.8 GPUs .*there are 2, but not for each on one"),
        ("encoder=1,denoiser=1,decoder=1", (0.5, 2, 0.5), [2], r"reserve 3 GPUs .*there are 2: let them share"),
        ("encoder=1,denoiser=1,decoder=1", (0.4, 2, 0), [1, 1, 1], r"reserve 2.4 GPUs .*3, but not for each on one"),
        ("encoder=1,denoiser=2,decoder=1", (0, 2, 0), [3, 1], r"reserve 4 GPUs .*there are 4, but not for each on one"),
    ],
)  # fmt: skip
def test_replicas_are_placed_on_cards_and_machines_as_ray_does_it(
    monkeypatch: pytest.MonkeyPatch, pools: str, gpus: tuple[float, ...], machines: list[int], problem: str | None
) -> None:
    have_gpus(monkeypatch, machines)
    asked = dict(zip((RoleType.ENCODER, DENOISER, RoleType.DECODER), gpus))
    with pytest.raises(UsageError, match=problem) if problem else nullcontext():
        check_room(parse_pools(pools), asked, {}, growing=False)


def test_a_replica_of_more_gpus_than_any_machine_has_may_wait_for_one_that_joins(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    have_gpus(monkeypatch, [1, 1])
    check_room(parse_pools("denoiser=1"), {DENOISER: 2}, {}, growing=True)
    assert "reserve 2 GPUs (denoiser: 2), and there are 2, but not for each on one card or machine" in caplog.text
    assert "wait until a machine joins" in caplog.text


@pytest.mark.parametrize("gpus", [float("nan"), float("inf"), -1.0])
def test_what_is_no_number_of_gpus_is_refused(monkeypatch: pytest.MonkeyPatch, gpus: float) -> None:
    have_gpus(monkeypatch, [2])
    with pytest.raises(ParameterError, match=f"gpus='{gpus:g}': a share of one GPU, or a whole number"):
        gpus_of({RoleType.ENCODER, DENOISER}, {RoleType.ENCODER: gpus, DENOISER: 0.5}, {})


@pytest.mark.slow
def test_a_replica_for_which_no_gpu_is_asked_computes_on_its_cpu(engine: RayEngine) -> None:
    options = {"dtype": "auto", "acceleration": {}}
    assert placed({DENOISER}, {}, options) == (0, options)
    assert placed({DENOISER}, {DENOISER: 0}, options) == (0, {**options, "device": "cpu"})
    both = {RoleType.ENCODER, DENOISER}
    assert placed(both, {RoleType.ENCODER: 0, DENOISER: 1}, options) == (1, options)


def test_only_a_replica_with_the_denoiser_has_the_ranks(repository: Path) -> None:
    faster = {DENOISER: Acceleration(ulysses=2, compile=True), RoleType.DECODER: Acceleration(tiling=True)}
    assert ranks_of({RoleType.ENCODER, RoleType.DECODER}, faster) == 1
    assert ranks_of({RoleType.ENCODER, DENOISER}, faster) == 2
    ranks, options = with_ranks(str(repository), "encoder", {"acceleration": faster}, 1)
    assert ranks is None
    assert options["acceleration"] == {
        DENOISER: Acceleration(compile=True), RoleType.DECODER: Acceleration(tiling=True)
    }  # fmt: skip


def test_what_the_model_cannot_share_is_refused_before_ray_starts(tiny_repo: Callable[..., Path]) -> None:
    with pytest.raises(ParameterError, match="ulysses=2: diffusers cannot divide ZImageTransformer2DModel"):
        RayEngine(tiny_repo("z_image"), acceleration={"denoiser": Acceleration(ulysses=2)})
