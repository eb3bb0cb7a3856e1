"""What sharing forwards among requests brings, and what it does to the pictures.

    python bench/batching.py                                  # the embedded model
    (cd tests && python -m tiny flux2_klein /tmp/klein)       # a model whose forwards are mostly overhead:
    python bench/batching.py --model /tmp/klein --name launch-bound --steps 16 24 32 \
        --param height=64 --param width=64 --param max_sequence_length=32

16 clients ask for pictures of mixed steps, guidance and prompts, once with forwards shared and once one request at a
time, on the same lanes; what counts is answered while all of them have a request on its way. Against them, the gain of a
raw forward: one of the budget's rows, or of those that 16 requests fill, beside as many of one request.
Limits: never below 0.97 of one at a time, at least 0.9 of the raw gain, every picture within 1e-4 of its single run.

One thread in every lane. Writes bench/results/batching.json; exits 1 where a limit is not met.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

import torch

import triptych
from triptych import embedded
from triptych.bench.load import closed_loop
from triptych.engine.local import LocalEngine
from triptych.request import Request
from triptych.roles import WORKERS, RoleType
from triptych.runtime.step_lane import StepLane

RESULTS = Path(__file__).parent / "results" / "batching.json"
CLIENTS = 16
TOLERANCE = 1e-4


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=str(embedded.path()))
    parser.add_argument("--name", default="embedded", help="under which the figures are kept")
    parser.add_argument("--param", action="append", default=[], help="name=json, of every request")
    parser.add_argument("--steps", type=int, nargs="+", default=[4, 6, 8], help="of the requests, in turn")
    parser.add_argument("--requests", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=RESULTS)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    given = {name: json.loads(value) for name, _, value in (each.partition("=") for each in asked.param)}
    asks = [mixed(number, asked.steps, given) for number in range(asked.requests)]
    threads = dict.fromkeys(WORKERS, 1)
    engine = LocalEngine(
        asked.model, dtype="float32", encoder="cpu", denoiser="cpu", decoder="cpu", threads=threads, warm_up=False
    )
    with engine:
        lane = engine.router.replicas[0].lanes[RoleType.DENOISER]
        assert isinstance(lane, StepLane)
        budget = measured_budget(engine, lane, asks[0])
        rates: dict[str, list[float]] = {"apart": [], "shared": []}
        for _ in range(asked.rounds):
            for name, limit in (("apart", 0), ("shared", budget)):
                lane.budget = limit
                rates[name].append(run(engine, asks)[0])
        lane.budget = budget
        _, pictures = run(engine, asks)
        raw, rows = raw_gain(lane, engine, asks[0], budget)
        differences = sorted(compare(asked.model, asks, pictures))
    apart, shared = (statistics.median(rates[name]) for name in ("apart", "shared"))
    figures = {
        "command": " ".join(["python bench/batching.py", *sys.argv[1:]]),
        "requests/s": {"apart": apart, "shared": shared},
        "gain": shared / apart,
        "rows of a shared forward": rows,
        "gain of a raw forward": raw,
        "difference from the single run": {
            "median": statistics.median(differences),
            "p90": differences[int(len(differences) * 0.9)],
            "most": differences[-1],
            "equal to the bit": sum(each == 0 for each in differences),
            "of": len(differences),
        },
    }
    figures["checks"] = {
        "never below 0.97 of one at a time": shared >= 0.97 * apart,
        "at least 0.9 of the raw gain": shared / apart >= 0.9 * raw,
        "within the tolerance": differences[-1] <= TOLERANCE,
    }
    print(json.dumps(figures, indent=2))
    known = json.loads(asked.output.read_text()) if asked.output.exists() else {}
    asked.output.write_text(json.dumps({**known, asked.name: figures}, indent=2) + "\n")
    return 0 if all(figures["checks"].values()) else 1


def mixed(number: int, steps: list[int], given: dict[str, Any]) -> dict[str, Any]:
    """Return the parameters of one of the mixed requests."""
    return {
        "prompt": ("a red heart", "a green tree", "a blue car")[number % 3],
        "seed": number,
        "num_inference_steps": steps[number % len(steps)],
        "guidance_scale": (3.0, 2.0, 4.5)[number // 3 % 3],
        "output_type": "pt",
        "exact": False,
        **given,
    }


def measured_budget(engine: LocalEngine, lane: StepLane, ask: dict[str, Any]) -> int:
    """Return the budget that the lane measures for itself, once it is idle."""
    lane.budget = None
    engine.generate(**ask)
    deadline = time.monotonic() + 120
    while lane.budget is None and time.monotonic() < deadline:
        time.sleep(0.05)
    assert lane.budget is not None, "no budget was measured"
    return int(lane.budget)


def run(engine: LocalEngine, asks: list[dict[str, Any]]) -> tuple[float, list[torch.Tensor]]:
    """Return requests a second while `CLIENTS` clients ask, and the pictures."""
    pictures: dict[int, torch.Tensor] = {}

    def ask(number: int) -> dict[str, float]:
        result = engine.generate(**asks[number])
        pictures[number] = result.images
        return result.timings

    rate = closed_loop(ask, len(asks), CLIENTS).busy_rate
    return rate, [pictures[number] for number in range(len(asks))]


def raw_gain(lane: StepLane, engine: LocalEngine, ask: dict[str, Any], budget: int) -> tuple[float, int]:
    """Return how much faster a forward of the budget is for each request than one request's own, and its rows.

    The denoiser lane is idle meanwhile.
    """
    model = lane.model
    state = model.admit(Request(**ask))
    for turn in model.segment(state):
        raise AssertionError(f"{turn.stage.name} encodes")
    turn = next(model.segment(state))
    size = sum(forward.size for forward in turn.forwards)
    copies = max(1, min(budget // size, CLIENTS))

    def seconds(forwards: list[Any]) -> float:
        taken = []
        with torch.no_grad():
            for k in range(12):
                began = time.perf_counter()
                turn.stage.predict(forwards, exact=False)
                if k > 1:
                    taken.append(time.perf_counter() - began)
        return statistics.median(taken)

    alone, together = seconds(turn.forwards), seconds(turn.forwards * copies)
    return alone * copies / together, copies * len(turn.forwards)


def compare(model: str, asks: list[dict[str, Any]], pictures: list[torch.Tensor]) -> list[float]:
    """Return how far each picture is from the one that a whole model makes of the request, exactly."""
    whole = triptych.load(model, device="cpu", dtype="float32")
    return [
        (whole.generate(**{**ask, "exact": True}).images - picture).abs().max().item()
        for ask, picture in zip(asks, pictures)
    ]


if __name__ == "__main__":
    sys.exit(main())
