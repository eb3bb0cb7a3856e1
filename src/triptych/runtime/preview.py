"""Previews: what a picture will look like, from its latents in the middle of denoising.

A step's estimate of the clean latents goes through a linear map from latents to colours. The decoder fits the map to
pictures that it decodes (`palette.py`); it is small enough to go along with requests.
"""

from __future__ import annotations

import io
import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from triptych.runtime.segment import Turn
from triptych.stages.denoising import Denoising
from triptych.state import State, View

log = logging.getLogger(__name__)

LARGEST = 512
"""Pixels of a preview's longer side."""


@dataclass(frozen=True)
class Projection:
    """A linear map from the latents that the decoder is handed to colours from 0 to 1.

    What a position becomes depends on its latents and on their mean over the picture: decoders normalise over all of it
    and look across it. Without the mean hues go wrong (on the embedded model a red heart turns out brown).

    Attributes:
        weight: (2 x channels + 1, 3 x cells x cells): for the latents, for their mean, and what every position gets.
    """

    weight: torch.Tensor

    def colours(self, latents: torch.Tensor, aspect: float) -> torch.Tensor:
        """Return a picture (3, height, width) of the first of the latents, `aspect` times as wide as high.

        Raises:
            ValueError: they are not of the form that the map was fitted to.
        """
        grid = with_mean(grid_of(latents[:1].float(), aspect)[0])
        if len(self.weight) != len(grid) + 1:
            raise ValueError(f"the map takes {len(self.weight) // 2} channels, not {len(grid) // 2}")
        weight = self.weight.to(grid.device)
        cells = torch.einsum("chw,cd->dhw", grid, weight[:-1]) + weight[-1][:, None, None]
        return torch.pixel_shuffle(cells, math.isqrt(len(cells) // 3)).clamp(0, 1)


@dataclass
class Previews:
    """A request's wish for pictures on the way.

    Attributes:
        count: how many, at steps of equal distance.
        projection: what they are made with.
        tell: called with the step, the steps in all and the picture as PNG.
    """

    count: int
    projection: Projection
    tell: Callable[[int, int, bytes], None]

    def prepare(self, turn: Turn, state: State) -> Callable[[], None] | None:
        """Look at a state before a turn; returns what is to be called after it, or None where no preview is due."""
        steps = len(state.fields["timesteps"])
        step = steps - turn.left + 1
        due = {round(k * steps / (self.count + 1)) for k in range(1, self.count + 1)}
        if step not in due or step >= steps:  # the last step leads to the result itself
            return None
        before, stage = state.fields.get("latents"), turn.stage

        def show() -> None:
            try:
                self.tell(step, steps, self._picture(stage, state.fields, before))
            except Exception as error:  # noqa: BLE001 (whatever it is, the request matters more)
                log.warning("there is no preview of step %d: %s: %s", step, type(error).__name__, error)

        return show

    def _picture(self, stage: Denoising, fields: dict[str, Any], before: Any) -> bytes:
        with torch.no_grad():
            clean = estimate(fields.get("scheduler"), before, fields["latents"])
            size = fields.get("width"), fields.get("height")
            colours = self.projection.colours(handed_over(stage, fields, clean), ratio(*size))
        return png(colours, size)


def ratio(width: int | None, height: int | None) -> float:
    """Return how many times as wide as high a picture is to be; 1 where that is not known."""
    return width / height if width and height else 1.0


def estimate(scheduler: Any, before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
    """Return the clean latents that a step was heading for: x0 = x - sigma * dx/dsigma.

    It is the model's own prediction for Euler steps (https://arxiv.org/abs/2206.00364, algorithm 1), and near it for
    those of higher order. A scheduler that draws noise at every step, or has no noise levels, gives no such line: then
    it is the latents as they are.
    """
    sigmas, index = getattr(scheduler, "sigmas", None), getattr(scheduler, "step_index", None)
    if sigmas is None or not index or index >= len(sigmas) or scheduler.config.get("stochastic_sampling"):
        return after
    last, now = float(sigmas[index - 1]), float(sigmas[index])
    if last == now or before.shape != after.shape:
        return after
    return after - now * (after - before) / (now - last)


def handed_over(stage: Denoising, fields: Mapping[str, Any], latents: torch.Tensor) -> torch.Tensor:
    """Return latents from the middle of a loop in the form in which its stage would leave them."""
    copy = {name: v.clone_state() if isinstance(v, torch.Generator) else v for name, v in fields.items()}
    view = View(copy, stage.name, {*stage.reads, *stage.writes}, stage.writes)
    view.latents = latents
    stage.finish(view)
    left: torch.Tensor = view.latents
    return left


def grid_of(latents: torch.Tensor, aspect: float) -> torch.Tensor:
    """Return latents as (n, channels, height, width): of videos the middle frame, of tokens row by row.

    Raises:
        ValueError: they are nothing of the kind.
    """
    if latents.ndim == 5:
        return latents[:, :, latents.shape[2] // 2]
    if latents.ndim == 4:
        return latents
    if latents.ndim == 3:
        tokens = latents.shape[1]
        heights = [height for height in range(1, tokens + 1) if tokens % height == 0]
        height = min(heights, key=lambda each: abs(math.log(tokens / each**2 / aspect)))
        return latents.movedim(2, 1).reshape(len(latents), -1, height, tokens // height)
    raise ValueError(f"latents of shape {tuple(latents.shape)} have no known form")


def with_mean(grid: torch.Tensor) -> torch.Tensor:
    """Return (channels, height, width) with each channel's mean beside it: (2 x channels, height, width)."""
    return torch.cat([grid, grid.mean((1, 2), keepdim=True).expand_as(grid)])


def png(colours: torch.Tensor, size: tuple[int | None, int | None]) -> bytes:
    """Return colours (3, height, width) as a PNG file, of the picture's own size where that is not too large."""
    from PIL import Image

    pixels = (colours * 255).round().to(torch.uint8).movedim(0, 2).contiguous().cpu().numpy()
    image = Image.fromarray(pixels)
    width, height = size[0] or image.width, size[1] or image.height
    shrink = min(1.0, LARGEST / max(width, height))
    image = image.resize((max(1, round(width * shrink)), max(1, round(height * shrink))), Image.Resampling.BICUBIC)
    file = io.BytesIO()
    image.save(file, "PNG", compress_level=1)
    return file.getvalue()
