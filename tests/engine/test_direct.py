"""Direct transport: states whose tensors go from device to device, and what becomes of them when a process dies."""

import os
import signal
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

import triptych
import triptych.engine  # before ray: it asks for Ray's authentication

import ray  # isort: skip
from triptych.engine import direct
from triptych.engine.ray import RayEngine
from triptych.errors import ModelError, UsageError, WireError
from triptych.request import Request

ASK: dict[str, Any] = {
    "prompt": "a red fox", "seed": 7, "height": 64, "width": 48, "num_inference_steps": 3, "output_type": "pt",
    "max_sequence_length": 24, "exact": True,
}  # fmt: skip
needs_nixl = pytest.mark.skipif(find_spec("nixl") is None, reason="NIXL is not installed")


@pytest.mark.parametrize(
    "dtype", [torch.bool, torch.uint8, torch.bfloat16, torch.float32, torch.int64, torch.complex64]
)
@pytest.mark.parametrize("count", [0, 1, 5, 24])
def test_no_changed_word_is_missed(dtype: torch.dtype, count: int) -> None:
    tensor = (torch.arange(2 * count).reshape(2, count) % 2).to(dtype)
    before, data = direct._sum(tensor), tensor.view(-1).view(torch.uint8) if count else tensor
    assert direct._sum(tensor.clone()) == before
    for position in range(len(data.view(-1))):
        data[position] ^= 1
        assert direct._sum(tensor) != before, position
        data[position] ^= 1


def test_the_sum_is_of_values_not_of_where_they_lie() -> None:
    memory = torch.arange(40, dtype=torch.int16)
    for start in range(4):  # not every start is a multiple of a word
        memory[start : start + 13] = torch.arange(13, dtype=torch.int16)
        assert direct._sum(memory[start : start + 13]) == direct._sum(torch.arange(13, dtype=torch.int16))
    assert direct._sum(memory[:12]) != direct._sum(memory[:12].flip(0)), "an order is a value too"


def test_an_unknown_transport_is_refused(tiny_repo: Callable[..., Path]) -> None:
    with pytest.raises(UsageError, match="transport='carrier pigeon': host or nixl is accepted"):
        RayEngine(tiny_repo("flux2_klein"), transport="carrier pigeon")


class Maker:
    """Another process."""

    def __init__(self, source: str) -> None:
        self._model = triptych.load(source, role="encoder", device="cpu")

    def pid(self) -> int:
        return os.getpid()

    def make(self) -> tuple[int, Any]:
        state = self._model.admit(Request(**ASK))
        for _ in self._model.segment(state):
            raise AssertionError("encoding has no denoising loop")
        self._state = state
        return state.nbytes, direct.place(state, torch.device("cpu"))

    def spoil(self) -> None:
        """Change a value in a tensor that was placed."""
        self._state.fields["prompt_embeds"].view(-1)[3] += 1


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRIPTYCH_CACHE", str(tmp_path_factory.mktemp("cache")))
        paths = [str(Path(triptych.__file__).parents[1]), str(Path(__file__).parent), os.environ.get("PYTHONPATH")]
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, paths)))
        yield


@pytest.mark.slow
@needs_nixl
def test_over_nixl_split_equals_whole_and_a_killed_role_loses_nothing(
    environment: None, tiny_repo: Callable[..., Path]
) -> None:
    repository = tiny_repo("flux2_klein")
    whole = triptych.load(repository, device="cpu")
    # Without predictions no replica is reserved ahead: then no state is sent at once, however small.
    with RayEngine(repository, threads=1, transport="nixl", policy="round_robin") as engine:
        held = engine.objects()
        for seed in range(3):
            parameters = {**ASK, "seed": seed}
            assert torch.equal(engine.generate(**parameters).images, whole.generate(**parameters).images)
        for pool in ("encoder", "denoiser", "decoder"):
            (victim,) = [each for each in engine.replicas if each.pool == pool]
            jobs = [engine.submit(Request(**{**ASK, "seed": seed, "num_inference_steps": 20})) for seed in range(3)]
            next(event for event in jobs[0].events() if event.kind == "started" and event.details["role"] == pool)
            os.kill(victim.told["pid"], signal.SIGKILL)
            for seed, job in enumerate(jobs):
                expected = whole.generate(**{**ASK, "seed": seed, "num_inference_steps": 20}).images
                assert torch.equal(job.result(120).images, expected), pool
        assert engine.objects() <= held


@pytest.mark.slow
@needs_nixl
def test_what_was_placed_comes_whole_or_not_at_all(environment: None, tiny_repo: Callable[..., Path]) -> None:
    repository = tiny_repo("flux2_klein")
    ray.init(address="local", include_dashboard=False, log_to_driver=False)
    try:
        maker = ray.remote(num_cpus=0, enable_tensor_transport=True)(Maker).remote(str(repository))
        model = triptych.load(repository, role="encoder", device="cpu")
        expected = model.run(Request(**ASK))
        nbytes, placed = ray.get(maker.make.remote())
        state = direct.fetch(placed)
        assert (state.nbytes, state.fields.keys()) == (nbytes, expected.fields.keys())
        assert torch.equal(state.fields["prompt_embeds"], expected.fields["prompt_embeds"])
        assert state.next_role == "denoiser"

        _, placed = ray.get(maker.make.remote())
        ray.get(maker.spoil.remote())
        with pytest.raises(WireError, match="checksum mismatch in field 'prompt_embeds'"):
            direct.fetch(placed)

        _, placed = ray.get(maker.make.remote())
        os.kill(ray.get(maker.pid.remote()), signal.SIGKILL)
        with pytest.raises(WireError, match="the hand-over was lost"):
            direct.fetch(placed)
    finally:
        ray.shutdown()


@pytest.mark.slow
@pytest.mark.skipif(find_spec("nixl") is not None, reason="NIXL is installed")
def test_a_replica_without_nixl_does_not_start(environment: None, tiny_repo: Callable[..., Path]) -> None:
    with pytest.raises(ModelError, match="pip install nixl"):
        RayEngine(tiny_repo("flux2_klein"), pools="monolithic=1", threads=1, transport="nixl")
