"""Models that draw from torch's global random state, where an oracle seeds that instead of a generator of its own."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

_drawing = threading.Lock()


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed the global random state of every device, and put it back at the end.

    One thread of the process at a time: two encoders would take each other's numbers.
    """
    import torch

    with _drawing, torch.random.fork_rng():
        torch.manual_seed(seed)
        yield
