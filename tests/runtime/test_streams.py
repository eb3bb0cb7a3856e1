"""Streams: lanes on one card do not wait for each other's work, and what they hand on is complete."""

import time
from collections.abc import Callable
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from typing import Any

import pytest
import torch

import triptych
from triptych import Request
from triptych.engine.local import LanesReplica, LocalEngine
from triptych.runtime import streams
from triptych.runtime.lanes import Lane, Work
from triptych.state import State

ASK: dict[str, Any] = {
    "prompt": "a red fox", "height": 64, "width": 48, "num_inference_steps": 4, "output_type": "pt",
    "max_sequence_length": 24,
}  # fmt: skip
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


def test_another_thread_computes_like_this_one() -> None:
    threads, before = SimpleQueue[int](), torch.get_num_threads()
    torch.set_num_threads(before + 1)
    alike = streams.like_this_thread(torch.device("cpu"))
    torch.set_num_threads(before)
    thread = Thread(target=lambda: (alike(), threads.put(torch.get_num_threads())))
    thread.start()
    thread.join()
    assert threads.get() == before + 1


def test_what_a_device_fails_at_is_its_requests_end_not_its_lanes(
    tiny_repo: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = triptych.load(tiny_repo("flux2_klein"), role="encoder", device="cpu")
    lane = Lane(model, "encoder")
    outcomes: SimpleQueue[State | Exception] = SimpleQueue()

    def fail(_: torch.device) -> None:
        raise RuntimeError("an illegal address")

    with monkeypatch.context() as patch:
        patch.setattr(streams, "wait", fail)
        lane.put(Work(model.admit(Request(**ASK)), outcomes.put))
        assert str(outcomes.get(timeout=20)) == "an illegal address"
    lane.put(Work(model.admit(Request(**ASK)), outcomes.put))
    assert isinstance(outcomes.get(timeout=20), State)
    lane.close()


def test_a_lack_of_memory_is_told_whatever_it_is_raised_as() -> None:
    with pytest.raises(RuntimeError) as refused:
        torch.empty(2**46, dtype=torch.uint8)
    assert streams.lacks_memory(refused.value), "the CPU's allocator has no class for it"
    assert streams.lacks_memory(torch.OutOfMemoryError("no room")) and streams.lacks_memory(MemoryError())
    assert not streams.lacks_memory(RuntimeError("sizes do not match"))


@pytest.mark.skipif(not hasattr(torch, "AcceleratorError"), reason="this PyTorch has no class for it")
@pytest.mark.parametrize(("code", "memory"), [(2, True), (700, False)])
def test_an_accelerator_s_error_is_a_lack_of_memory_by_its_code(code: int, memory: bool) -> None:
    error = torch.AcceleratorError("CUDA error")
    error.error_code = code
    assert streams.lacks_memory(error) is memory


def test_a_stopwatch_times_a_cpu_at_once() -> None:
    watch = streams.Stopwatch(torch.device("cpu"))
    time.sleep(0.02)
    watch.stop()
    time.sleep(0.2)
    assert watch.seconds is not None and 0.02 <= watch.seconds < 0.2


@needs_gpu
def test_a_stopwatch_tells_what_a_card_took_and_not_what_asking_took() -> None:
    card = torch.device("cuda")
    square = torch.randn(8192, 8192, device=card)
    streams.wait(card)
    watch = streams.Stopwatch(card)
    for _ in range(20):
        square = square @ square
    asked = time.perf_counter()
    watch.stop()
    assert watch.seconds is None, "it computes longer than it takes to ask for it"
    streams.wait(card)
    waited = time.perf_counter() - asked
    assert watch.seconds is not None and watch.seconds >= 0.5 * waited


@needs_gpu
def test_every_lane_has_a_stream_of_its_own(tiny_repo: Callable[..., Path]) -> None:
    with LocalEngine(tiny_repo("flux2_klein"), encoder="cuda", denoiser="cuda", decoder="cuda") as engine:
        (replica,) = engine.router.replicas
        assert isinstance(replica, LanesReplica)
        handles = {lane.stream.cuda_stream for lane in replica.lanes.values() if lane.stream is not None}
        assert len(handles) == 3
        assert torch.cuda.default_stream().cuda_stream not in handles


@needs_gpu
def test_requests_that_overlap_on_a_card_make_what_they_make_alone(tiny_repo: Callable[..., Path]) -> None:
    alone = triptych.load(tiny_repo("flux2_klein"), device="cuda", dtype="float32")
    devices = dict.fromkeys(("encoder", "denoiser", "decoder"), "cuda")
    with LocalEngine(tiny_repo("flux2_klein"), dtype="float32", **devices) as engine:
        jobs = [engine.submit(Request(**ASK, seed=seed)) for seed in range(40)]
        for seed, job in enumerate(jobs):
            wanted = alone.generate(**ASK, seed=seed).images
            assert torch.equal(job.result(60).images, wanted), seed
