"""How long a role will need for a request: learned from what the ones before it took."""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from triptych.roles import RoleType

MEMORY = 0.98
"""Weight of the past at each new measurement: about the last fifty count."""


def work_of(fields: Mapping[str, Any], role: RoleType) -> float:
    """Return the size of a request for a role, in a unit of the model's own: pixels x frames x outputs (x steps).

    The encoder's work does not depend on the picture to be made.
    """
    if role is RoleType.ENCODER:
        return 1.0
    names = ("height", "width", "num_frames", "num_images_per_prompt", "num_videos_per_prompt")
    numbers = [fields.get(name) for name in names]
    pixels = math.prod(number for number in numbers if isinstance(number, int) and number > 0)
    steps = fields.get("num_inference_steps")
    return float(pixels * (steps if role is RoleType.DENOISER and isinstance(steps, int) else 1))


@dataclass
class _Line:
    """Seconds as a straight line of work, by least squares with a fading memory."""

    weight: float = 0.0
    x: float = 0.0
    y: float = 0.0
    xx: float = 0.0
    xy: float = 0.0

    def add(self, x: float, y: float) -> None:
        for name, value in (("weight", 1.0), ("x", x), ("y", y), ("xx", x * x), ("xy", x * y)):
            setattr(self, name, getattr(self, name) * MEMORY + value)

    def at(self, x: float) -> float:
        spread = self.weight * self.xx - self.x * self.x
        if spread > 1e-9 * self.weight * self.xx:
            slope = (self.weight * self.xy - self.x * self.y) / spread
            start = (self.y - slope * self.x) / self.weight
            if slope >= 0 and start >= 0:
                return start + slope * x
        return self.y / self.x * x


@dataclass
class Costs:
    """The predicted seconds of every role."""

    _lines: dict[RoleType, _Line] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def learn(self, role: RoleType, work: float, seconds: float) -> None:
        """Take note of what a role took for a piece of work."""
        with self._lock:
            self._lines.setdefault(role, _Line()).add(work, seconds)

    def predict(self, role: RoleType, work: float) -> float:
        """Return how many seconds a role will take; before anything is known, a number that only compares."""
        with self._lock:
            line = self._lines.get(role)
            return work * 1e-7 if line is None or not line.x else line.at(work)
