"""How near previews come to the picture: the last one of each request against the result, on the embedded model.

    python bench/previews.py                      # coloured things, before and after the first requests
    python bench/previews.py --sheet sheet.png    # and a picture of them: previews on the left, results on the right

What previews are made with is learned from nothing here: a cache of its own. First after the warm-up only, then after
the pictures of other prompts, 1, 3 and 15 of them. Correlation of 16 x 16 colours, mean absolute error of all pixels,
and how colourful the preview is where the picture is. Writes bench/results/previews.json; exits 1 where the mean
correlation after 15 pictures is below 0.9.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"
_cache = tempfile.TemporaryDirectory(prefix="triptych-previews-")
os.environ["TRIPTYCH_CACHE"] = _cache.name

import numpy as np
import torch
from PIL import Image

from triptych import embedded
from triptych.engine.local import LocalEngine
from triptych.request import Request
from triptych.roles import WORKERS

RESULTS = Path(__file__).parent / "results" / "previews.json"
LIMIT = 0.9
SHOWN = ("red heart", "yellow car", "green apple", "blue dog face", "orange cat", "pink flower", "brown bear", "pizza")
OTHERS = ("dog", "blue car", "red apple", "tree", "yellow star", "ghost", "green frog", "purple grapes", "sun",
          "pink pig", "rocket", "orange", "blue fish", "house", "red balloon")  # fmt: skip
ROUNDS = (0, 1, 3, 15)  # pictures of others before
STEPS = 16


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sheet", type=Path, help="where to put a picture of the previews and the results")
    parser.add_argument("--output", type=Path, default=RESULTS)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    rows, sheets, made = [], [], 0
    devices: dict[str, Any] = {role.value: "cpu" for role in WORKERS}
    devices["threads"] = dict.fromkeys(WORKERS, 1)
    with LocalEngine(embedded.path(), **devices) as engine, LocalEngine(embedded.path(), **devices) as shower:
        began = time.perf_counter()
        engine.find_projection(60)
        print(f"there {time.perf_counter() - began:.1f} s after the engine")
        for before in ROUNDS:
            for prompt in OTHERS[made:before]:
                engine.generate(prompt=prompt, seed=100 + made, num_inference_steps=STEPS)
                made += 1
            time.sleep(1.0)  # a decoder learns after it has given the picture away
            projection = engine.find_projection(0)
            assert projection is not None
            shower._projection, shower._projection_stale = projection, math.inf  # it learns nothing of what it shows
            pairs = [shown(shower, prompt, seed) for seed, prompt in enumerate(SHOWN)]
            rows.append({"pictures before": before, **told([figures(*pair) for pair in pairs])})
            sheets.append(pairs)
            print(", ".join(f"{name} {value:.3f}" for name, value in rows[-1].items()), flush=True)
    if asked.sheet:
        sheet(sheets).save(asked.sheet)
    checks = {f"mean correlation after {ROUNDS[-1]} pictures at least {LIMIT}": rows[-1]["correlation"] >= LIMIT}
    asked.output.write_text(
        json.dumps({"command": " ".join(sys.argv), "rows": rows, "checks": checks}, indent=2) + "\n"
    )
    for what, holds in checks.items():
        print(f"{what:<60}{'PASS' if holds else 'FAIL'}")
    return 0 if all(checks.values()) else 1


def shown(engine: LocalEngine, prompt: str, seed: int) -> tuple[Image.Image, Image.Image]:
    """Return the last preview of a request, and its result."""
    request = Request(prompt=prompt, seed=seed, num_inference_steps=STEPS, exact=True)
    job = engine.submit(request, previews=3)
    images = job.result(600).images
    last = [event.details["png"] for event in job.events() if event.kind == "preview"][-1]
    assert isinstance(images, list)
    return Image.open(io.BytesIO(last)).convert("RGB"), images[0].convert("RGB")


def figures(preview: Image.Image, result: Image.Image) -> dict[str, float]:
    """Return how alike two pictures are."""
    one, other = (np.asarray(each, np.float64) / 255 for each in (preview, result))
    small = [np.asarray(each.resize((16, 16), Image.Resampling.BOX), np.float64).ravel() for each in (preview, result)]
    colour = [each.max(2) - each.min(2) for each in (one, other)]
    where = colour[1] > 0.3
    return {
        "correlation": float(np.corrcoef(*small)[0, 1]),
        "mean absolute error": float(np.abs(one - other).mean()),
        "colourfulness": float(colour[0][where].mean() / colour[1][where].mean()) if where.any() else float("nan"),
    }


def told(several: list[dict[str, float]]) -> dict[str, float]:
    """Return the means, and the least correlation."""
    means = {name: float(np.nanmean([each[name] for each in several])) for name in several[0]}
    return {**means, "least correlation": min(each["correlation"] for each in several)}


def sheet(rounds: list[list[tuple[Image.Image, Image.Image]]]) -> Image.Image:
    """Return one picture: a row for each prompt, its previews round by round, then its result."""
    side = 128
    made = Image.new("RGB", ((len(rounds) + 1) * side, len(SHOWN) * side), "gray")
    for row in range(len(SHOWN)):
        pictures = [pairs[row][0] for pairs in rounds] + [rounds[-1][row][1]]
        for column, picture in enumerate(pictures):
            made.paste(picture.resize((side - 4, side - 4), Image.Resampling.NEAREST), (column * side, row * side))
    return made


if __name__ == "__main__":
    sys.exit(main())
