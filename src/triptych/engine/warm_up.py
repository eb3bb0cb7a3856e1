"""A small request that any model can serve, to warm up with."""

from __future__ import annotations

from typing import Any

from triptych.errors import UsageError
from triptych.request import Request
from triptych.runtime.model import Model

_SIDE = 256  # pixels
_FRAMES = 9  # one more than a multiple of every autoencoder's compression in time


def warm_up_request(front: Model) -> Request | None:
    """Return a request of two steps, small and no larger than the model's own default; None if none is taken.

    Not of one, for which some schedulers have no noise level (`check_noise_levels`).
    """
    from PIL import Image

    known: dict[str, Any] = {**front.family.parameters, **front.family.repository.defaults}
    plain = {"prompt": "warm up", "num_inference_steps": 2, "seed": 0, "exact": False, "output_type": "pil"}
    small = {"height": _SIDE, "width": _SIDE, "num_frames": _FRAMES}
    small = {name: min(size, known.get(name) or size) for name, size in small.items()}
    picture = Image.new("RGB", (_SIDE, _SIDE), "gray")
    tries: list[dict[str, Any]] = [plain | small, plain, plain | small | {"image": picture}, plain | {"image": picture}]
    for each in tries:
        parameters = {name: value for name, value in each.items() if name in known}
        try:
            front.admit(Request(**parameters))
        except UsageError:
            continue
        return Request(**parameters)
    return None
