"""Memory that was freed goes back to the system."""

import platform
import time

import psutil
import pytest
import torch

from triptych import embedded
from triptych.engine.local import LocalEngine
from triptych.runtime import memory

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc's allocator is asked")

BLOCKS, SIZE = 4000, 50_000  # 200 MB in pieces that come from the heap
MB = 1_000_000


def resident() -> int:
    return psutil.Process().memory_info().rss


def leave_holes() -> torch.Tensor:
    """Free much memory below a piece that is kept, so that it stays in the process."""
    blocks = [torch.ones(SIZE, dtype=torch.uint8) for _ in range(BLOCKS)]
    return blocks[-1]


def test_what_a_request_leaves_behind_is_given_back_at_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    with LocalEngine(embedded.path(), encoder="cpu", denoiser="cpu", decoder="cpu", dtype="float32") as engine:
        monkeypatch.setattr(memory, "_next", 0.0)
        kept = leave_holes()
        before = resident()
        engine.generate(prompt="a dog", seed=0, num_inference_steps=1)
        until = time.monotonic() + 20
        while resident() > before - 150 * MB:
            assert time.monotonic() < until, "the lane has not given it back"
            time.sleep(0.05)
        assert kept.sum() == SIZE


def test_it_is_not_asked_for_at_every_request(monkeypatch: pytest.MonkeyPatch) -> None:
    memory.give_back()
    monkeypatch.setattr(memory, "EVERY", 0.0)
    kept = leave_holes()
    before = resident()
    memory.give_back()
    assert resident() > before - 50 * MB, "not yet"
    monkeypatch.setattr(memory, "_next", 0.0)
    memory.give_back()
    assert resident() < before - 150 * MB
    assert kept.sum() == SIZE
