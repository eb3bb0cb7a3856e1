"""Python's search for objects that nobody refers to any more, while a process starts."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def collection_paused() -> Iterator[None]:
    """Search for none meanwhile: importing the libraries makes hundreds of thousands of objects that stay.

    For processes that are ours alone.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
