"""Previews: what a picture will look like, from its latents in the middle of denoising.

A step's estimate of the clean latents goes through a linear map from latents to colours. The decoder fits the map once,
from pictures that it decodes, and keeps it on disk; it is small enough to go along with requests.
"""

from __future__ import annotations

import io
import logging
import math
import os
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

import torch
from torch.nn.functional import adaptive_avg_pool2d, interpolate

from triptych.errors import WireError
from triptych.runtime import budget
from triptych.runtime.segment import Turn
from triptych.stages.denoising import Denoising
from triptych.state import State, View

log = logging.getLogger(__name__)

CELLS = 4
"""Colours a side that are predicted for each position of the latents: they cover 8 to 32 pixels a side each."""
SAMPLES = 4
"""Pictures that the map is fitted to."""
RIDGE = 1e-3
"""What keeps the map small where the samples say nothing: a share of the latents' mean square."""
SPREAD = 1.5
"""How much wider the samples' values are than those of a real hand-over, which has only one picture's colours."""
LARGEST = 512
"""Pixels of a preview's longer side."""


@dataclass(frozen=True)
class Projection:
    """A linear map from the latents that the decoder is handed to colours from 0 to 1.

    Attributes:
        weight: (channels + 1, 3 x cells x cells); the last row is added to every position.
    """

    weight: torch.Tensor

    def colours(self, latents: torch.Tensor, aspect: float) -> torch.Tensor:
        """Return a picture (3, height, width) of the first of the latents, `aspect` times as wide as high.

        Raises:
            ValueError: they are not of the form that the map was fitted to.
        """
        grid = grid_of(latents[:1].float(), aspect)
        if len(self.weight) != grid.shape[1] + 1:
            raise ValueError(f"the map takes {len(self.weight) - 1} channels, not {grid.shape[1]}")
        weight = self.weight.to(grid.device)
        cells = torch.einsum("chw,cd->dhw", grid[0], weight[:-1]) + weight[-1][:, None, None]
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


def fit(sample: State, decode: Callable[[State], None]) -> Generator[None, None, Projection]:
    """Return the map of a decoder's latents to the mean colours of the pixels that they cover.

    Yields after each picture, so that a decoder can do what it is there for in between.

    Args:
        sample: a state that was handed to the decoder: its latents tell the form and the statistics of others.
        decode: runs the decoder's segment, in place.

    Raises:
        ValueError: the decoder takes no latents of a known form, or makes no pictures.
    """
    template = sample.fields.get("latents")
    if not isinstance(template, torch.Tensor) or not template.is_floating_point():
        raise ValueError("its decoder is handed no latents")
    generator = torch.Generator("cpu").manual_seed(0)
    squares = products = torch.zeros(())
    for number in range(SAMPLES):
        latents = similar(template[:1], number / (SAMPLES - 1), generator)
        state = sample.copy()
        state.fields.update(latents=latents.to(template), output_type="pt")
        decode(state)
        picture = _picture(state.fields)
        grid = grid_of(latents, picture.shape[2] / picture.shape[1])
        cells = adaptive_avg_pool2d(picture, (grid.shape[2] * CELLS, grid.shape[3] * CELLS))
        x, y = grid[0].flatten(1).T.double(), torch.pixel_unshuffle(cells, CELLS).flatten(1).T.double()
        x = torch.cat([x, torch.ones(len(x), 1)], dim=1)
        squares, products = squares + x.T @ x, products + x.T @ y
        yield
    squares = squares + torch.eye(len(squares)) * RIDGE * squares.diagonal().mean()
    return Projection(torch.linalg.solve(squares, products).float())


def similar(latents: torch.Tensor, rough: float, generator: torch.Generator) -> torch.Tensor:
    """Return random latents of the same form and means, and somewhat wider; smooth, but for a share that is `rough`."""
    values = latents.float().cpu().movedim(2 if latents.ndim == 3 else 1, -1)  # channels last
    flat = values.flatten(0, -2)
    channels, planes = flat.shape[1], values.shape[1:-1]
    if len(planes) == 1:
        planes = grid_of(latents, 1.0).shape[2:]
    coarse = [max(1, (each + 3) // 4) for each in planes]
    smooth = torch.randn((1, channels, *coarse), generator=generator)
    mode = {2: "bilinear", 3: "trilinear"}[len(planes)]
    smooth = interpolate(smooth, tuple(planes), mode=mode, align_corners=False)
    drawn = (1 - rough) * smooth + rough * torch.randn((1, channels, *planes), generator=generator)
    drawn = drawn.flatten(2)[0].T / drawn.std(correction=0).clamp_min(1e-6)
    drawn = drawn * flat.std(0, correction=0) * SPREAD + flat.mean(0)
    return drawn.reshape(values.shape).movedim(-1, 2 if latents.ndim == 3 else 1)


def _picture(fields: Mapping[str, Any]) -> torch.Tensor:
    """Return the first output as (3, height, width): of a video the middle frame.

    Raises:
        ValueError: there is none.
    """
    outputs = fields.get("images") if fields.get("images") is not None else fields.get("frames")
    while isinstance(outputs, (list, tuple)) and outputs:
        outputs = outputs[0]
    if not isinstance(outputs, torch.Tensor) or outputs.ndim < 3:
        raise ValueError("its decoder makes no pictures")
    while outputs.ndim > 3:
        outputs = outputs[len(outputs) // 2] if outputs.ndim == 4 and fields.get("images") is None else outputs[0]
    return outputs[:3].float().cpu()


def _path(fingerprint: str) -> Path:
    return budget.cache_file().parent / "previews" / f"{fingerprint.replace('/', '_')}.safetensors"


def recall(fingerprint: str) -> Projection | None:
    """Return the map that was fitted for a model, if one was."""
    from triptych import wire

    try:
        weight = wire.unpack(_path(fingerprint).read_bytes())[0]["weight"]
    except (OSError, WireError, KeyError):
        return None
    return Projection(weight) if isinstance(weight, torch.Tensor) and weight.ndim == 2 else None


def remember(fingerprint: str, projection: Projection) -> None:
    """Keep a map for the next time; warns where that is not possible."""
    from triptych import wire

    path = _path(fingerprint)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with NamedTemporaryFile(dir=path.parent, delete=False) as file:
            file.write(wire.pack({"weight": projection.weight}, {}))
        os.replace(file.name, path)
    except OSError as error:
        log.warning("the map of previews cannot be kept in %s (%s): it is fitted again at every start", path, error)
