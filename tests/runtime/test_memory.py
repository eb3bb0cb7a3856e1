"""Memory that was freed goes back to the system."""

import math
import platform
import subprocess
import sys
import threading
import time
from pathlib import Path

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


@pytest.mark.parametrize("used", [True, False])
def test_what_is_kept_of_cards_that_were_used_is_given_back_too(monkeypatch: pytest.MonkeyPatch, used: bool) -> None:
    given: list[bool] = []
    monkeypatch.setattr(memory, "_next", 0.0)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: used)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: given.append(True))
    memory.give_back()
    assert given == [True] * used


def test_a_card_that_has_failed_does_not_end_the_thread_that_asks_it(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def failed() -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(memory, "_next", 0.0)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", failed)
    assert memory.give_back()
    assert not memory.give_back(), "not at once again"
    assert "could not be given back: CUDA error" in caplog.text


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


GATHERED = """
import gc, re, sys
from pathlib import Path
from triptych.runtime import memory

def huge():
    return int(re.search(r"AnonHugePages: *(\\d+)", Path("/proc/self/smaps_rollup").read_text())[1]) * 1024

memory.LONGEST = float(sys.argv[1])
kept = [str(number) for number in range(400_000)]  # some 25 MB of Python's own
gc.collect()
before = huge()
memory.gather()
once = huge()
more = [str(number) for number in range(400_000)]
memory.gather()
print(once - before, huge() - once, kept == more)
"""

HAS_ONE = """
import mmap, sys
size = int(sys.argv[1])
with mmap.mmap(-1, 2 * size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as room:  # one of them whole, wherever it begins
    room.write(bytes(2 * size))
    room.madvise(25)  # MADV_COLLAPSE
"""


def gathered(longest: float) -> list[str]:
    command = [sys.executable, "-c", GATHERED, str(longest)]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, timeout=120).stdout.split()


@pytest.mark.skipif(memory._huge_page() is None, reason="the system has no huge pages")
def test_what_a_process_holds_comes_to_lie_in_huge_pages_once_and_stays_what_it_was() -> None:
    once, again, same = gathered(60.0)
    assert int(again) == 0, "a process is gathered once"
    assert same == "True"
    # How many the system has left is up to what else runs: one tells that it was asked.
    asking = [sys.executable, "-c", HAS_ONE, str(memory._huge_page())]
    if once == "0" and subprocess.run(asking, check=False).returncode:
        pytest.skip("the system gathers nothing: it is older than Linux 6.1, or has no huge page left")
    assert int(once) > 0


@pytest.mark.skipif(memory._huge_page() is None, reason="the system has no huge pages")
def test_gathering_ends_when_it_takes_too_long() -> None:
    assert gathered(0.0)[0] == "0"


@pytest.mark.parametrize(("told", "size"), [("2097152\n", 2**21), ("536870912\n", None)])
def test_huge_pages_that_would_be_mostly_empty_are_left_alone(
    monkeypatch: pytest.MonkeyPatch, told: str, size: int | None
) -> None:
    monkeypatch.setattr(Path, "read_text", lambda _: told)
    assert memory._huge_page() == size


def test_an_engine_gathers_what_it_holds_when_it_is_ready(monkeypatch: pytest.MonkeyPatch) -> None:
    ready = threading.Event()
    monkeypatch.setattr(memory, "gather", ready.set)
    with LocalEngine(embedded.path(), encoder="cpu", denoiser="cpu", decoder="cpu", dtype="float32"):
        assert ready.wait(5)
