"""Streams: each lane has its device do things in an order of its own, beside what other lanes have it do.

What one lane has computed, another may use at once, because a lane waits for its device before it hands anything on; and
nothing that came from another lane is let go before that either, since its memory could be given away while it is read.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

_ACCELERATOR_ERROR: Any = getattr(torch, "AcceleratorError", ())  # it is there from 2.8 on
_CUDA_OUT_OF_MEMORY = 2
"""CUDA's code for it: https://docs.nvidia.com/cuda/cuda-runtime-api/group__CUDART__TYPES.html (cudaErrorMemoryAllocation)"""


def open_stream(device: torch.device) -> torch.cuda.Stream | None:
    """Return a stream for a lane on a device, once what the device was given before is done; None on other than CUDA."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)  # the weights are on their way there
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


def enter(stream: torch.cuda.Stream | None) -> None:
    """Let this thread compute on a stream from now on, and on its device where none is named."""
    if stream is not None:
        torch.cuda.set_stream(stream)


def wait(device: torch.device) -> None:
    """Wait until a device has done what this thread asked of it."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()
    elif device.type != "cpu":
        torch.accelerator.synchronize(device)


def lacks_memory(error: BaseException) -> bool:
    """Return whether an error tells that a device, or this machine, has not enough memory.

    PyTorch's allocator for the CPU has no class for it, and what is asked of CUDA beside its own allocator has only a code.
    """
    if isinstance(error, _ACCELERATOR_ERROR):
        return getattr(error, "error_code", None) == _CUDA_OUT_OF_MEMORY
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "DefaultCPUAllocator" in str(error)


def is_broken(error: BaseException, device: torch.device) -> bool:
    """Return whether an error comes from a device that has failed its process: nothing works there any more.

    The error alone does not tell: a lack of memory may look the same, and so does a tensor on another device that failed.
    """
    return isinstance(error, _ACCELERATOR_ERROR) and not answers(device)


def answers(device: torch.device) -> bool:
    """Return whether a device still computes."""
    try:
        torch.zeros(1, device=device).add_(1)
        wait(device)
    except RuntimeError:
        return False
    return True


def wait_for(values: Any) -> None:
    """Wait until tensors that this thread computed are there, so that lanes, which have other streams, may read them."""
    for device in {each.device for each in tree_leaves(values) if isinstance(each, torch.Tensor) and each.is_cuda}:
        wait(device)


class Stopwatch:
    """Times what this thread asks of a device from now until `stop`; on CUDA without waiting for the device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._began: Any = self._mark()
        self._ended: Any = None

    def stop(self) -> None:
        """End what is timed."""
        self._ended = self._mark()

    @property
    def seconds(self) -> float | None:
        """What it took; None until the device has done it.

        Raises:
            RuntimeError: the device has failed at it, or at something before.
        """
        took: float
        if isinstance(self._ended, float):
            took = self._ended - self._began
        elif self._ended.query():
            took = self._began.elapsed_time(self._ended) / 1e3
        else:
            return None
        return took

    def _mark(self) -> Any:
        if self._device.type != "cuda":
            wait(self._device)  # other accelerators are not asked to tell the time
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self._device))
        return event


def use_threads(count: int) -> None:
    """Let this thread compute with so many CPU threads.

    OpenMP counts by the thread that starts a region. PyTorch, where a thread comes to its first region or asks for the
    number, takes over what any thread has set last: so it is asked before.
    """
    torch.get_num_threads()
    torch.set_num_threads(count)


def like_this_thread(device: torch.device) -> Callable[[], None]:
    """Return what lets another thread compute as this one does: on as many CPU threads, and on the same stream."""
    threads = torch.get_num_threads()
    stream = torch.cuda.current_stream(device) if device.type == "cuda" else None

    def become() -> None:
        use_threads(threads)
        enter(stream)

    return become


def release(outputs: Any, device: torch.device) -> None:
    """Let tensors leave the lanes: whoever gets them computes with them on the device's usual stream, when he likes."""
    if device.type == "cuda":
        for each in tree_leaves(outputs):
            if isinstance(each, torch.Tensor) and each.is_cuda:
                each.record_stream(torch.cuda.default_stream(each.device))
