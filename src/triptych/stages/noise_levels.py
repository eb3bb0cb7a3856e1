"""Noise levels of flow matching, as several families' pipelines choose them before their schedulers shift them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from triptych.errors import ParameterError


def even_sigmas(steps: int) -> Any:
    """Return evenly spaced noise levels from 1 to 1/steps: an array of that many float64."""
    import numpy as np

    return np.linspace(1.0, 1 / steps, steps)


def check_noise_levels(config: Mapping[str, Any], parameters: Mapping[str, Any]) -> None:
    """Check that a scheduler which stretches its noise levels to a terminal one has some to stretch.

    It divides by the distance of the last level from 1: by nothing, where that is the only one.

    Args:
        config: the scheduler's configuration.

    Raises:
        ParameterError: it has none, and all that it computes would be no number.
    """
    if not config.get("shift_terminal"):
        return
    sigmas = parameters.get("sigmas")
    if sigmas is None and parameters.get("num_inference_steps") == 1:
        accepted = "at least 2 are accepted: this model's scheduler cannot stretch the noise levels of one step"
        raise ParameterError("num_inference_steps", 1, accepted)
    if sigmas is not None and sigmas[-1] == 1:
        accepted = "a last noise level below 1 is accepted: this model's scheduler cannot stretch others"
        raise ParameterError("sigmas", sigmas, accepted)


def begin_at_first(scheduler: Any) -> None:
    """Have a scheduler begin at its first step.

    By itself it looks for the step by its timestep, for which it waits for the device; of two that are equal it takes the
    second, and is short of one at the end.
    """
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(0)


def resolution_shift(
    calculate_shift: Callable[..., float], config: Mapping[str, Any], tokens: int, *, max_shift: float = 1.15
) -> float:
    """Return `mu`, by which a scheduler shifts its noise levels: more for a picture of more tokens.

    Args:
        calculate_shift: the oracle's own function of that name.
        config: the scheduler's configuration.
        tokens: how many tokens the picture has.
        max_shift: what the oracle takes where the configuration has none.
    """
    return calculate_shift(
        tokens,
        config.get("base_image_seq_len", 256),
        config.get("max_image_seq_len", 4096),
        config.get("base_shift", 0.5),
        config.get("max_shift", max_shift),
    )
