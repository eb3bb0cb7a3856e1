"""True guidance: classifier-free guidance with a scale and a negative prompt of its own, of models that need neither."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

log = logging.getLogger(__name__)


def true_guidance(scale: float, *negatives: object) -> bool:
    """Return whether true guidance is on: a scale above 1, and a negative prompt (even an empty one) or embeddings."""
    return scale > 1 and any(negative is not None for negative in negatives)


def warn_of_guidance(parameters: Mapping[str, Any]) -> None:
    """Warn where a request asks for true guidance, or for a negative prompt, in vain."""
    scale = parameters["true_cfg_scale"]
    negative = any(parameters[name] is not None for name in ("negative_prompt", "negative_prompt_embeds"))
    if scale > 1 and not negative:
        log.warning("true_cfg_scale=%s has no effect: guidance needs a negative_prompt, even an empty one", scale)
    elif scale <= 1 and negative:
        log.warning("negative_prompt has no effect: guidance needs true_cfg_scale > 1")
