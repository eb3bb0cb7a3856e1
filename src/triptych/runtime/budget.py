"""How large a shared forward may be: measured once for a model on a device, and remembered on disk."""

from __future__ import annotations

import json
import logging
import math
import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

import torch

from triptych.components.switches import is_compiled
from triptych.runtime import streams
from triptych.stages.denoising import Denoising, Forward

log = logging.getLogger(__name__)

GAIN = 1.05
"""What doubling a forward must bring in throughput to be worth the waiting."""
LONGEST = 2.0
"""Seconds: a forward that would take longer is not tried. It is bound by computing, and a request may come to wait for it."""
MOST_ROWS = 64
_TURNS = 10
"""How often a size is timed, at most."""
_LONG_ENOUGH = 0.5
"""Seconds after which a size has been timed often enough, if that was once after its warm-up."""


def measure(stage: Denoising, sample: Forward, interrupted: Callable[[], bool]) -> int | None:
    """Return the size (`Forward.size`) beyond which forwards gain nothing from more rows.

    Doubles the sample's rows as long as throughput grows, and once more: a moment in which the machine was busy
    elsewhere must not settle what is kept for good. Each size is timed in turn with the best so far, and the least
    seconds count, for the same reason. Returns None where `interrupted` said that there is something better to do.
    """
    best, vain, copies = 1, 0, 2
    while copies * sample.rows(stage.shared) <= MOST_ROWS and vain < 2:
        try:
            least = _compare(stage, sample, (best, copies), interrupted)
        except Exception as error:
            if not streams.lacks_memory(error):
                raise
            break
        if least is None:
            return None
        if copies / least[copies] >= best / least[best] * GAIN:
            best, vain = copies, 0
        else:
            vain += 1
        if least[copies] > LONGEST:
            break
        copies *= 2
    return best * sample.size


def _compare(
    stage: Denoising, sample: Forward, sizes: tuple[int, int], interrupted: Callable[[], bool]
) -> dict[int, float] | None:
    """Return the least seconds of forwards that so many copies of a sample share; infinite where it was not timed.

    Ends before one that would take longer than `LONGEST`, by what others took, and with one that did. Returns None where it
    was interrupted.
    """
    compiled = is_compiled(getattr(stage, sample.component))
    least = dict.fromkeys(sizes, math.inf)
    began = time.perf_counter()
    for turn in range(_TURNS):
        for copies in sizes:
            if interrupted():
                return None
            each = min(seconds / many for many, seconds in least.items())
            if LONGEST < each * copies < math.inf:
                return least
            seconds = _time(stage, [replace(sample) for _ in range(copies)])
            if turn or not compiled:
                least[copies] = min(least[copies], seconds)
                if least[copies] > LONGEST:
                    return least
        if turn and time.perf_counter() - began > _LONG_ENOUGH:
            break
    return least


def _time(stage: Denoising, forwards: list[Forward]) -> float:
    """Return the seconds that a shared forward takes."""
    began = time.perf_counter()
    stage.predict(forwards, exact=False)
    streams.wait(stage.device)
    return time.perf_counter() - began


def rehearse(stage: Denoising, sample: Forward, budget: int) -> int:
    """Run one forward as large as a budget allows; returns the budget, or less where memory does not suffice.

    Memory is then at its highest from the start, not from some busy hour on.
    """
    copies = min(budget // sample.size, MOST_ROWS)
    while copies > 1:
        try:
            stage.predict([replace(sample) for _ in range(copies)], exact=False)
            streams.wait(stage.device)
        except Exception as error:
            if not streams.lacks_memory(error):
                raise
            log.warning("%d requests in one forward do not fit into memory: half of them are tried", copies)
            budget = (copies := copies // 2) * sample.size
        else:
            return budget
    return max(budget, sample.size)


def key(fingerprint: str, device: torch.device, dtype: torch.dtype, threads: int) -> str:
    """Return what a measured budget holds for: this model, on this kind of device, in this dtype."""
    named = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    where = f"cpu x{threads}" if device.type == "cpu" else named
    return f"{fingerprint}/{where}/{str(dtype).removeprefix('torch.')}"


def cache_file() -> Path:
    """Return where measured budgets are kept: `budgets.json` in `$TRIPTYCH_CACHE`, or in `~/.cache/triptych`."""
    return Path(os.environ.get("TRIPTYCH_CACHE") or os.path.expanduser("~/.cache/triptych"), "budgets.json")


def recall(name: str) -> int | None:
    """Return the budget that was measured under this key, if one was."""
    found = _known().get(name)
    return found if isinstance(found, int) and found > 0 else None


def remember(name: str, budget: int) -> None:
    """Keep a budget for the next time; warns where that is not possible."""
    path = cache_file()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
            json.dump({**_known(), name: budget}, file, indent=1)
        os.replace(file.name, path)
    except OSError as error:
        log.warning(
            "the measured batch budget cannot be kept in %s (%s): it is measured again at every start", path, error
        )


def _known() -> dict[str, Any]:
    """Return what the file holds; nothing where it is missing or broken."""
    try:
        known = json.loads(cache_file().read_text())
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}
