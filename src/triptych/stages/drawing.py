"""Models that draw from torch's global random state, where an oracle seeds that instead of a generator of its own."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

_drawing = threading.Lock()


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Seed the global random state of the CPU and of a device, and put it back at the end.

    One thread of the process at a time: two encoders would take each other's numbers.
    """
    import torch

    kind = "cuda" if device.type == "cpu" else device.type
    devices = [] if device.type == "cpu" else [device]  # others are left alone, and not even begun with
    with _drawing, torch.random.fork_rng(devices, device_type=kind):
        torch.default_generator.manual_seed(seed)
        if devices:
            torch.get_device_module(device).manual_seed(seed)  # of the one that this thread computes on
        yield
