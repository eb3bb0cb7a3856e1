"""Several ranks of one denoiser: the same pictures from more processes, and no process without the others."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

import triptych
from triptych.components.acceleration import Acceleration
from triptych.engine.local import LocalEngine
from triptych.errors import ModelError, ReplicaLost, TriptychError, UsageError
from triptych.runtime.rank import Rank
from triptych.runtime.rank_link import PULSE
from triptych.runtime.ranks import Ranks
from triptych.stages.denoising import Denoising, Forward

ASK: dict[str, Any] = {
    "prompt": "a red fox", "guidance_scale": 3.0, "seed": 7, "height": 64, "width": 48, "num_inference_steps": 3,
    "output_type": "pt", "max_sequence_length": 24,
}  # fmt: skip


class Team:
    """A model whose denoiser has several ranks, and what was told of losses."""

    def __init__(self, repository: Path, asked: Acceleration) -> None:
        self.losses: list[str] = []
        self.others = listening(os.getpid())  # of tests before, with Ray
        self.ranks = Ranks(repository, {"dtype": torch.float32}, asked, threads=1, on_lost=self.losses.append)
        try:
            self.model = triptych.load(repository, device="cpu")
            self.ranks.attach(self.model)
        except BaseException:
            self.ranks.close()
            raise

    def generate(self, **changes: Any) -> torch.Tensor:
        images = self.model.generate(**{**ASK, **changes}).images
        assert isinstance(images, torch.Tensor)
        return images


@pytest.fixture(scope="module")
def repository(tiny_repo: Callable[..., Path]) -> Path:
    return tiny_repo("flux2_klein")


@pytest.fixture(scope="module")
def whole(repository: Path) -> triptych.Model:
    return triptych.load(repository, device="cpu")


@pytest.fixture(scope="module")
def branches(repository: Path) -> Iterator[Team]:
    team = Team(repository, Acceleration(cfg_parallel=True))
    yield team
    team.ranks.close()


@pytest.fixture(scope="module")
def shared(repository: Path) -> Iterator[Team]:
    team = Team(repository, Acceleration(ulysses=2))
    yield team
    team.ranks.close()


def denoising(model: triptych.Model) -> Denoising:
    return next(stage for stage in model.stages if isinstance(stage, Denoising))


def listening(pid: int) -> set[tuple[str, int]]:
    """Return the addresses and ports at which a process can be reached."""
    connections = psutil.Process(pid).net_connections()
    return {(each.laddr.ip, each.laddr.port) for each in connections if each.status == psutil.CONN_LISTEN}


def gone(pid: int) -> bool:
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def wait_until(condition: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.05)


@pytest.mark.parametrize("exact", [True, False])
def test_guidance_branches_on_two_ranks_give_the_same_picture_to_the_bit(
    branches: Team, whole: triptych.Model, exact: bool
) -> None:
    # Where it is not to be exact, the whole joins the branches of a request, which two ranks need not.
    assert torch.equal(branches.generate(exact=exact), whole.generate(**ASK, exact=True).images)
    assert not torch.equal(branches.generate(guidance_scale=5.0), branches.generate())


def test_each_branch_is_computed_by_a_rank_of_its_own(branches: Team, monkeypatch: pytest.MonkeyPatch) -> None:
    here: list[str] = []
    stage = denoising(branches.model)
    compute = stage.compute
    monkeypatch.setattr(stage, "compute", lambda forward: here.append(forward.branch) or compute(forward))
    branches.generate(exact=True)
    assert here == ["cond"] * ASK["num_inference_steps"]


def test_a_request_without_guidance_is_run_by_the_first_rank_alone(branches: Team, whole: triptych.Model) -> None:
    assert torch.equal(branches.generate(guidance_scale=1.0), whole.generate(**{**ASK, "guidance_scale": 1.0}).images)


def test_an_error_of_one_branch_is_its_request_s_and_the_ranks_go_on(branches: Team, whole: triptych.Model) -> None:
    stage = denoising(branches.model)
    seen: list[Forward] = []

    class Spy:
        apart = False

        def __call__(self, stage: Denoising, forwards: Any) -> Any:
            seen.extend(forwards)
            return branches.ranks(stage, forwards)

    stage.spread = Spy()
    branches.generate(num_inference_steps=1)
    stage.spread = branches.ranks
    good, other = seen
    bad = Forward(other.component, other.branch, {**other.inputs, "hidden_states": torch.zeros(1, 5, 3)})
    with torch.no_grad(), pytest.raises(TriptychError, match="RuntimeError"):
        branches.ranks(stage, [good, bad])
    with torch.no_grad(), pytest.raises(RuntimeError):
        branches.ranks(stage, [bad, good])
    assert torch.equal(branches.generate(), whole.generate(**ASK).images)
    assert not branches.losses


def test_a_shared_sequence_gives_the_same_picture_but_for_rounding(shared: Team, whole: triptych.Model) -> None:
    one, other = shared.generate(exact=False), whole.generate(**ASK).images
    assert not torch.equal(one, other), "then the sequence was not shared"
    assert torch.allclose(one, other, rtol=0, atol=1e-4)


@pytest.mark.parametrize("length", [23, 17])
def test_a_sequence_of_any_length_is_shared(shared: Team, whole: triptych.Model, length: int) -> None:
    one, other = (
        shared.generate(exact=False, max_sequence_length=length),
        whole.generate(**{**ASK, "max_sequence_length": length}).images,
    )
    assert torch.allclose(one, other, rtol=0, atol=1e-4)


def test_a_shared_sequence_is_not_exact_and_says_so(shared: Team) -> None:
    with pytest.raises(UsageError, match="exact"):
        shared.generate(exact=True)


@pytest.mark.parametrize(("mask", "tokens", "message"), [(7, 4, "text_mask='7 entries'"), (6, 5, "'5 tokens'")])
def test_a_length_that_ranks_cannot_divide_is_refused_before_any_computes(
    shared: Team, mask: int, tokens: int, message: str
) -> None:
    inputs = {"hidden_states": torch.zeros(1, tokens, 4), "text_mask": torch.ones(1, mask)}
    with pytest.raises(UsageError, match=message):
        shared.ranks(denoising(shared.model), [Forward("transformer", "cond", inputs)])
    assert torch.isfinite(shared.generate(exact=False)).all()


def test_an_error_that_all_ranks_meet_is_its_request_s_and_they_stay_in_step(
    shared: Team, whole: triptych.Model
) -> None:
    forward = Forward("transformer", "cond", {"hidden_states": torch.zeros(1, 4, 4)})
    with torch.no_grad(), pytest.raises(ValueError, match="Expected 1 arguments"):
        shared.ranks(denoising(shared.model), [forward])
    assert torch.allclose(shared.generate(exact=False), whole.generate(**ASK).images, rtol=0, atol=1e-4)
    assert not shared.losses


def test_ranks_listen_on_the_loopback_interface_alone(shared: Team) -> None:
    for pid in (os.getpid(), *shared.ranks.pids):
        assert {ip for ip, _ in listening(pid) - shared.others} == {"127.0.0.1"}


@pytest.mark.slow
@pytest.mark.parametrize("signal_", [signal.SIGKILL, signal.SIGSTOP])
def test_a_rank_that_dies_or_hangs_takes_the_replica_with_it(repository: Path, signal_: signal.Signals) -> None:
    team = Team(repository, Acceleration(cfg_parallel=True))
    try:
        os.kill(team.ranks.pids[0], signal_)
        began = time.monotonic()
        with pytest.raises(ReplicaLost):
            team.generate()
        wait_until(lambda: bool(team.losses), 1)
        assert time.monotonic() - began < 6
        assert ("gone" if signal_ is signal.SIGKILL else "no sign of life") in team.losses[0]
    finally:
        if signal_ is signal.SIGSTOP:
            os.kill(team.ranks.pids[0], signal.SIGKILL)
        team.ranks.close()


def test_a_rank_that_dies_while_its_leader_still_loads_is_missed(repository: Path) -> None:
    losses: list[str] = []
    ranks = Ranks(repository, {}, Acceleration(cfg_parallel=True), threads=1, on_lost=losses.append)
    wait_until(lambda: not ranks._ranks[0].busy, 60)  # it has loaded, and said so
    os.kill(ranks.pids[0], signal.SIGKILL)
    wait_until(lambda: ranks._lost is not None, 5)
    with pytest.raises(ModelError, match=r"ended while it was loading: rank 1 is gone \(exit status -9\)"):
        ranks.attach(triptych.load(repository, device="cpu"))
    ranks.close()
    assert not losses, "there was no replica yet"


def test_an_error_may_be_taken_while_the_ranks_are_looked_after(shared: Team, monkeypatch: pytest.MonkeyPatch) -> None:
    looks: list[float] = []

    class Taken(Rank):
        """Its error is taken as soon as it was seen."""

        @property  # type: ignore[override]
        def failed(self) -> float | None:
            looks.append(time.monotonic())
            return looks[-1] if len(looks) % 2 else None

    monkeypatch.setattr(shared.ranks._ranks[0], "__class__", Taken)
    monkeypatch.setattr(shared.ranks, "_computing", True)
    wait_until(lambda: len(looks) > 3, 6 * PULSE)
    assert not shared.losses


def run_alone(code: str, repository: Path, timeout: float) -> subprocess.CompletedProcess[str]:
    """Run code that takes the repository as its argument, in a process of its own."""
    environment = {**os.environ, "PYTHONPATH": str(Path(triptych.__file__).parents[1])}
    command = [sys.executable, "-c", code, str(repository)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=timeout, check=False)


LEFT_BEHIND = """
import sys, time
import torch
import triptych
from triptych.components.acceleration import Acceleration
from triptych.runtime.ranks import Ranks

def fail(forward):
    raise MemoryError("here alone")

ranks = Ranks(sys.argv[1], {}, Acceleration(ulysses=2), threads=1, on_lost=lambda reason: print("lost:", reason))
model = triptych.load(sys.argv[1], device="cpu")
ranks.attach(model)
next(stage for stage in model.stages if stage.role == "denoiser").compute = fail
began = time.monotonic()
try:
    model.generate(prompt="a red fox", height=64, width=48, num_inference_steps=1, exact=False)
except triptych.errors.ReplicaLost:
    print(f"noticed after {time.monotonic() - began:.1f} s")
"""


@pytest.mark.slow
def test_a_rank_that_is_left_behind_in_a_forward_takes_the_replica_with_it(repository: Path) -> None:
    # In a process of its own: one can share sequences with one team only.
    ended = run_alone(LEFT_BEHIND, repository, timeout=100)
    lost, noticed = ended.stdout.splitlines()
    assert lost == "lost: rank 1 did not end a forward that another had failed in", ended.stderr
    assert float(noticed.split()[2]) < 6


TWO_TEAMS = """
import sys, time
import torch
import triptych
from triptych.components.acceleration import Acceleration
from triptych.runtime.ranks import Ranks
from triptych.stages.denoising import Forward

ask = dict(prompt="a red fox", guidance_scale=3.0, height=64, width=48, num_inference_steps=1, exact=False)
asked = Acceleration(ulysses=2, cfg_parallel=True)
ranks = Ranks(sys.argv[1], {}, asked, threads=1, on_lost=lambda reason: print("lost:", reason))
model = triptych.load(sys.argv[1], device="cpu")
ranks.attach(model)
stage = next(stage for stage in model.stages if stage.role == "denoiser")

class Spy:
    apart = True

    def __call__(self, stage, forwards):
        seen.extend(forwards)
        return ranks(stage, forwards)

def slow(forward, compute=stage.compute):
    prediction = compute(forward)
    time.sleep(6)
    return prediction

seen = []
stage.spread = Spy()
model.generate(**ask)
stage.spread, stage.compute = ranks, slow
bad = Forward("transformer", "uncond", {"hidden_states": torch.zeros(1, 4, 4)})
try:
    with torch.no_grad():
        ranks(stage, [seen[0], bad])
except triptych.errors.TriptychError as error:
    print(error)
del stage.compute
model.generate(**ask)
print("they go on")
ranks.close()
"""


@pytest.mark.slow
def test_an_error_that_a_whole_team_meets_waits_for_the_other_team_s_forward(repository: Path) -> None:
    ended = run_alone(TWO_TEAMS, repository, timeout=200)
    error, went_on = ended.stdout.splitlines()
    assert "Expected 1 arguments" in error, ended.stderr
    assert went_on == "they go on"


MEETING = """
import os, signal, sys, threading, time
import triptych
from triptych.components.acceleration import Acceleration
from triptych.errors import ModelError
from triptych.runtime.ranks import Ranks

model = triptych.load(sys.argv[1], device="cpu")
for fault in ("fails", "dies"):
    if fault == "fails":
        os.environ["GLOO_SOCKET_IFNAME"] = "nowhere"  # of the other rank alone
    ranks = Ranks(sys.argv[1], {}, Acceleration(ulysses=2), threads=1, on_lost=print)
    os.environ.pop("GLOO_SOCKET_IFNAME", None)
    if fault == "dies":
        while ranks._ranks[0].busy:
            time.sleep(0.05)
        os.kill(ranks.pids[0], signal.SIGSTOP)  # so that it does not meet before it dies
        threading.Timer(1, os.kill, (ranks.pids[0], signal.SIGKILL)).start()
    try:
        ranks.attach(model)
    except ModelError as error:
        print(error)
    ranks.close()
"""


@pytest.mark.slow
def test_a_rank_that_fails_or_dies_while_the_ranks_meet_is_not_waited_for(repository: Path) -> None:
    ended = run_alone(MEETING, repository, timeout=100)
    failed, died = ended.stdout.splitlines()
    assert "nowhere" in failed, ended.stderr
    assert died == "a rank of the denoiser ended while it was loading: rank 1 is gone (exit status -9)", ended.stderr


LEADER = """
import sys, time
from triptych.components.acceleration import Acceleration
from triptych.runtime.ranks import Ranks
ranks = Ranks(sys.argv[1], {}, Acceleration(cfg_parallel=True), threads=1, on_lost=print)
print(*ranks.pids, flush=True)
time.sleep(60)
"""


def test_no_rank_outlives_its_leader(repository: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(Path(triptych.__file__).parents[1])}
    command = [sys.executable, "-c", LEADER, str(repository)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as leader:
        assert leader.stdout is not None
        pid = int(leader.stdout.readline())
        leader.kill()
    wait_until(lambda: gone(pid), 5)


def test_a_rank_that_cannot_load_says_why(repository: Path, tmp_path: Path) -> None:
    broken = shutil.copytree(repository, tmp_path / "broken")
    weights = next((broken / "transformer").glob("*.safetensors"))
    ranks = Ranks(broken, {}, Acceleration(cfg_parallel=True), threads=1, on_lost=lambda _: None)
    model = triptych.load(repository, role="denoiser", device="cpu")
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ModelError, match="transformer"):
        ranks.attach(model)
    ranks.close()


@pytest.mark.parametrize(
    ("family", "variant", "asked", "message"),
    [
        ("z_image", {}, {"ulysses": 2}, "ulysses=2: diffusers cannot divide ZImageTransformer2DModel"),
        (
            "ltx2",
            {},
            {"ulysses": 2},
            "LTX2VideoTransformer3DModel with rope_type='interleaved', and this one has 'split'",
        ),
        ("helios", {}, {"ulysses": 2}, "HeliosTransformer3DModel of 40 layers, and this one has 2"),
        ("flux2_klein", {}, {"ulysses": 3}, "num_attention_heads=2: a divisor of that"),
        ("flux2_klein", {}, {"ring": 2}, "ring=2: attention='native' cannot be computed in parts"),
        ("flux2_klein", {}, {"ulysses": 2, "attention": "flex"}, "attention='flex': with ulysses=2, .*native"),
        ("flux2_klein", {"is_distilled": True}, {"cfg_parallel": True}, "nothing for a second rank: .* distilled"),
        ("z_image", {}, {"cfg_parallel": True}, "nothing for a second rank: .* rows of one forward"),
    ],
)
def test_what_a_model_cannot_is_refused_before_weights_are_read(
    tiny_repo: Callable[..., Path], family: str, variant: dict[str, Any], asked: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        triptych.load(tiny_repo(family, **variant), role="server", acceleration={"denoiser": asked})


def test_attention_in_parts_needs_a_gpu(repository: Path) -> None:
    from triptych.pipelines.registry import open_family
    from triptych.runtime.ranks import check_ranks

    asked = Acceleration(ring=2, attention="_native_cudnn")
    check_ranks(open_family(repository), ["transformer"], asked, on_gpu=True)
    with pytest.raises(UsageError, match="ring=2: attention in parts needs kernels of a GPU"):
        check_ranks(open_family(repository), ["transformer"], asked, on_gpu=False)


def test_one_process_has_no_ranks_and_names_what_has(repository: Path) -> None:
    with pytest.raises(UsageError, match="serve with --pools"):
        triptych.load(repository, role="denoiser", acceleration=Acceleration(cfg_parallel=True))
    with pytest.raises(UsageError, match="serve with --pools"):
        LocalEngine(repository, acceleration={"denoiser": Acceleration(ulysses=2)})
    with pytest.raises(UsageError, match="several ranks are for the denoiser only"):
        triptych.load(repository, role="server", acceleration={"decoder": Acceleration(ulysses=2)})
