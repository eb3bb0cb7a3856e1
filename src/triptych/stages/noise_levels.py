"""Noise levels of flow matching, as several families' pipelines choose them before their schedulers shift them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any


def even_sigmas(steps: int) -> Any:
    """Return evenly spaced noise levels from 1 to 1/steps: an array of that many float64."""
    import numpy as np

    return np.linspace(1.0, 1 / steps, steps)


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
