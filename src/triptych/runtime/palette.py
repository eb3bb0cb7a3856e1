"""The palette: which colours a decoder makes of which latents, and the map from one to the other that previews need.

Two sources. Random latents, as wide as the first that the decoder was handed, say something of every direction, but
real pictures are not like them: large even areas, colours at the ends of their range. The pictures that requests lead
to anyhow are what the map is for, but the first few say nothing of other colours. So the map to random latents is where
the fit to real ones begins. On the embedded model the mean correlation of the last preview with the picture is 0.86
after the warm-up, 0.89 with one picture more, 0.90 with three and 0.95 with fifteen (`bench/previews.py`).
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Generator, Mapping
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

import torch
from torch.nn.functional import adaptive_avg_pool2d, interpolate

from triptych.errors import WireError
from triptych.runtime import budget
from triptych.runtime.preview import Projection, grid_of, with_mean
from triptych.state import State

log = logging.getLogger(__name__)

CELLS = 4
"""Colours a side that are predicted for each position of the latents: they cover 8 to 32 pixels a side each."""
SAMPLES = 4
"""Random pictures that the map is fitted to."""
SPREAD = 1.5
"""How much wider their latents are than those of a real hand-over, which has only one picture's colours."""
ENOUGH = 32
"""Pictures of requests that the map is fitted to; it is fitted anew whenever their number has doubled."""
POSITIONS = 1024
"""Positions of one picture's latents that are looked at, evenly spread."""
RIDGE = 1e-3
"""What keeps the map small where the samples say nothing: a share of the latents' mean square."""
PRIOR = 0.01
"""What keeps it near the one of random latents where requests say little: the same."""
FREE = 0.01
"""How much of that holds for the colour that every position gets."""
ENDS = 0.02
"""From 0 and from 1, within which a colour is taken to be cut off there."""
ROUNDS = 10
"""Of fitting, each allowing more of the colours at the ends to be beyond them."""

Rows = tuple[torch.Tensor, torch.Tensor]
"""Latents (n, 2 x channels + 1): with their means, and 1. Colours of their cells (n, 3 x cells x cells). Both double."""


class Palette:
    """What is known of one decoder's colours. For one thread at a time; `projection` for any.

    Attributes:
        projection: the map as it is now; None until there is one.
        seen: pictures of requests that it was fitted to, in this process or before it.
    """

    def __init__(self, fingerprint: str) -> None:
        self._fingerprint = fingerprint
        self.projection, self.seen = recall(fingerprint)
        self._before = self.seen
        self._prior = self.projection
        self._rows: list[Rows] = []
        self._early = self.seen == 0  # whether there was no picture yet, or only the first

    def see(self, latents: torch.Tensor, fields: Mapping[str, Any]) -> None:
        """Look at what a request's latents have become; after the first `ENOUGH` of them, no more.

        The very first counts until there is another: as a rule it is the warm-up's, which is hardly a picture.

        Raises:
            ValueError: these are no latents of a known form, or no pictures.
        """
        if self.seen < ENOUGH:
            rows = rows_of(latents, picture_of(fields))
            if self._early and self._rows:
                self._rows.clear()
                self._early = False
            self._rows.append(rows)
            self.seen = self._before + len(self._rows)
            if self.seen.bit_count() == 1:
                self._fit()

    def draw(self, sample: State, decode: Callable[[State], None]) -> Generator[None, None, None]:
        """Fit the map to random latents, and what they are decoded to.

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
        drawn = []
        for number in range(SAMPLES):
            latents = similar(template[:1], number / (SAMPLES - 1), generator)
            state = sample.copy()
            state.fields.update(latents=latents.to(template), output_type="pt")
            decode(state)
            drawn.append(rows_of(latents, picture_of(state.fields)))
            yield
        self._prior = fitted([without_means(rows) for rows in drawn], RIDGE)  # as many means are too few to learn from
        self._fit()

    def _fit(self) -> None:
        """Fit the map to all that is known, and keep it."""
        if self._prior is None:
            return  # what has been seen waits for it
        self.projection = self._prior
        if self._rows:
            self.projection = fitted(self._rows, PRIOR, self._prior, self._before / len(self._rows))
        remember(self._fingerprint, self.projection, self.seen)


def fitted(several: list[Rows], ridge: float, near: Projection | None = None, stands: float = 0.0) -> Projection:
    """Return the linear map from latents to colours with the least squared error.

    A colour at an end of its range is what the decoder cut off there: a map that goes beyond it is not wrong. That is
    the censored regression of https://doi.org/10.2307/1907382, by least squares in rounds.

    Args:
        ridge: how much deviating from `near`, or from nothing, costs, as a share of the latents' mean square.
        stands: for how many times as many pictures as these `near` stands, because it was fitted to them elsewhere.
    """
    latents, colours = (torch.cat(each) for each in zip(*several))
    squares = latents.T @ latents
    each = torch.full((len(squares),), ridge, dtype=torch.double) * squares.diagonal()[: len(squares) // 2].mean()
    each[-1] *= FREE
    cost = torch.diag(each + stands * squares.diagonal())
    start = cost @ near.weight.double() if near is not None else torch.zeros(())
    factor = torch.linalg.cholesky(squares + cost)
    aims = colours
    for _ in range(ROUNDS):
        weight = torch.cholesky_solve(latents.T @ aims + start, factor)
        told = latents @ weight
        beyond = ((colours > 1 - ENDS) & (told > colours)) | ((colours < ENDS) & (told < colours))
        aims = torch.where(beyond, told, colours)
    return Projection(weight.float())


def rows_of(latents: torch.Tensor, picture: torch.Tensor) -> Rows:
    """Return the first of the latents and the mean colours of what they cover in a picture (3, height, width).

    Raises:
        ValueError: the latents are of no known form, or not of the picture's.
    """
    aspect = picture.shape[2] / picture.shape[1]
    grid = grid_of(latents[:1].float().cpu(), aspect)
    height, width = grid.shape[2:]
    if abs(math.log(width / height / aspect)) > math.log(1.3):
        raise ValueError(f"latents of {height} x {width} positions are not those of a picture of {picture.shape[1:]}")
    cells = adaptive_avg_pool2d(picture, (height * CELLS, width * CELLS))
    x, y = with_mean(grid[0]).flatten(1).T.double(), torch.pixel_unshuffle(cells, CELLS).flatten(1).T.double()
    step = -(-len(x) // POSITIONS)
    step += step > 1 and width % step == 0  # or it would look at some columns only
    x, y = x[::step], y[::step]
    return torch.cat([x, torch.ones(len(x), 1)], dim=1), y.contiguous()


def without_means(rows: Rows) -> Rows:
    """Return rows in which the means say nothing."""
    latents = rows[0].clone()
    channels = latents.shape[1] // 2
    latents[:, channels : 2 * channels] = 0
    return latents, rows[1]


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


def picture_of(fields: Mapping[str, Any]) -> torch.Tensor:
    """Return the first output as (3, height, width), from 0 to 1: of a video the frame in the middle.

    Raises:
        ValueError: there is none.
    """
    import numpy as np
    from PIL import Image

    film = fields.get("images") is None
    output, depth = fields.get("frames") if film else fields.get("images"), 0
    while isinstance(output, (list, tuple)) or getattr(output, "ndim", 0) > 3:
        count = len(output)  # type: ignore[arg-type]
        output = output[count // 2 if film and depth == 1 else 0] if count else None  # type: ignore[index]
        depth += 1
    if isinstance(output, Image.Image):
        output = np.asarray(output.convert("RGB"), np.float32) / 255
    if isinstance(output, np.ndarray):
        output = torch.from_numpy(np.ascontiguousarray(output)).movedim(-1, 0)
    if (
        not isinstance(output, torch.Tensor)
        or output.ndim != 3
        or len(output) < 3
        or fields.get("output_type") == "latent"
    ):
        raise ValueError("its decoder makes no pictures")
    return output[:3].float().cpu()


def _path(fingerprint: str) -> Path:
    return budget.cache_file().parent / "previews" / f"{fingerprint.replace('/', '_')}.safetensors"


def recall(fingerprint: str) -> tuple[Projection | None, int]:
    """Return the map that was fitted for a model, if one was, and to how many pictures of requests."""
    from triptych import wire

    try:
        kept = wire.unpack(_path(fingerprint).read_bytes())[0]
        weight, seen = kept["weight"], kept["seen"]
    except (OSError, WireError, KeyError):
        return None, 0
    if not isinstance(weight, torch.Tensor) or weight.ndim != 2 or not isinstance(seen, int) or seen < 0:
        return None, 0
    return Projection(weight), seen


def remember(fingerprint: str, projection: Projection, seen: int) -> None:
    """Keep a map for the next time; warns where that is not possible."""
    from triptych import wire

    path = _path(fingerprint)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with NamedTemporaryFile(dir=path.parent, delete=False) as file:
            file.write(wire.pack({"weight": projection.weight, "seen": seen}, {}))
        os.replace(file.name, path)
    except OSError as error:
        log.warning("the map of previews cannot be kept in %s (%s): it is fitted again at every start", path, error)
