"""Memory that was freed goes back to the system."""

import math
import platform
import subprocess
import sys
import time

import psutil
import pytest
import torch

from triptych import embedded
from triptych.engine.local import LocalEngine
from triptych.runtime import crew, memory

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc's allocator is asked")

BLOCKS, SIZE = 4000, 50_000  # 200 MB in pieces that come from the heap
MB = 1_000_000


def resident() -> int:
    return psutil.Process().memory_info().rss


def leave_holes() -> torch.Tensor:
    """Free much memory below a piece that is kept, so that it stays in the process."""
    blocks = [torch.ones(SIZE, dtype=torch.uint8) for _ in range(BLOCKS)]
    return blocks[-1]


def test_what_requests_leave_behind_is_given_back_when_nothing_is_to_be_done(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(crew, "QUIET", 0.1)
    monkeypatch.setattr(memory, "_next", math.inf)  # as if it had been asked just now
    devices = dict.fromkeys(("encoder", "denoiser", "decoder"), "cpu")
    with LocalEngine(embedded.path(), **devices, dtype="float32", batching=False) as engine:
        kept = leave_holes()
        before = resident()
        engine.generate(prompt="a dog", seed=0, num_inference_steps=1)
        time.sleep(0.5)
        memory._next = 0.0  # who was sent away comes again
        until = time.monotonic() + 20
        while resident() > before - 150 * MB:
            assert time.monotonic() < until, "nobody has given it back"
            time.sleep(0.05)
        assert kept.sum() == SIZE


FAULTS = """
import resource
import torch
from triptych.runtime.crew import Crew
crew = Crew(1, "lane", lambda: None)
faults = []
for _ in range(8):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(40 * 2**20, dtype=torch.uint8)  # more than glibc keeps by itself
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
crew.close()
print(min(faults) * resource.getpagesize())
"""


def test_what_requests_leave_behind_is_kept_for_the_next_ones() -> None:
    # In a process of its own: elsewhere there may be room from before.
    ended = subprocess.run([sys.executable, "-c", FAULTS], check=True, stdout=subprocess.PIPE, text=True, timeout=60)
    assert int(ended.stdout) < 2**20


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
