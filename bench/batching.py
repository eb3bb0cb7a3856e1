"""What sharing forwards among requests brings, and what it does to the pictures.

    python bench/batching.py                                  # the embedded model
    (cd tests && python -m tiny flux2_klein /tmp/klein)       # a model whose forwards are mostly overhead:
    python bench/batching.py --model /tmp/klein --name launch-bound --steps 16 24 32 \
        --param height=64 --param width=64 --param max_sequence_length=32
    ... --engine ray --name launch-bound-ray              # the roles in processes of their own

Requests of mixed steps, guidance and prompts, 16 at a time, once each by itself and once with forwards shared:

- step lane: 16 clients of the lane alone, each with the next encoded request as soon as one has denoised;
- service: 16 clients of the engine, which also encodes and decodes, on the same two cores. Sharing forwards makes that
  no shorter, and lanes of one process wait for each other at Python's lock: its gain is smaller.

What counts is answered while all clients have a request on its way. Against both, the gain of a raw forward in the same
round: one of the budget's rows, or of those that 16 requests fill, beside as many of one request, in turn. Gains are
taken within a round, because the speed of a machine that others use too changes from one to the next; medians count.
Limits: both never below 0.97 of one at a time, every picture within 1e-4 of its single run; the step lane at least 0.9 of
the raw gain, or twice one at a time where the raw gain is more than that: a forward is nearly nothing but overhead then,
and beside it a request's own step counts, its scheduler's, which nothing shares.

One thread in every lane and process. Writes bench/results/batching.json; exits 1 where a limit is not met.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

import torch
from level import wait_until_measured

import triptych
from triptych import embedded
from triptych.bench.load import closed_loop
from triptych.engine.base import Engine
from triptych.engine.local import LocalEngine
from triptych.request import Request
from triptych.roles import WORKERS, RoleType
from triptych.runtime.lanes import Work
from triptych.runtime.segment import Turn, finish
from triptych.runtime.step_lane import StepLane
from triptych.state import State

RESULTS = Path(__file__).parent / "results" / "batching.json"
CLIENTS = 16
TOLERANCE = 1e-4


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=str(embedded.path()))
    parser.add_argument("--name", default="embedded", help="under which the figures are kept")
    parser.add_argument("--engine", choices=("local", "ray"), default="local")
    parser.add_argument("--param", action="append", default=[], help="name=json, of every request")
    parser.add_argument("--steps", type=int, nargs="+", default=[4, 6, 8], help="of the requests, in turn")
    parser.add_argument("--requests", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=RESULTS)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    given = {name: json.loads(value) for name, _, value in (each.partition("=") for each in asked.param)}
    asks = [mixed(number, asked.steps, given) for number in range(asked.requests)]
    whole = triptych.load(asked.model, device="cpu", dtype="float32")
    with open_engine(asked.engine, asked.model) as engine:
        budget = measured_budget(engine, asks[0])
        turn = first_turn(whole, asks[0])
        copies = max(1, min(budget // sum(forward.size for forward in turn.forwards), CLIENTS))
        encoded = [encode(whole, ask) for ask in asks]
        rounds: list[dict[str, float]] = []
        for _ in range(asked.rounds):
            figure = {
                f"lane {name}": run_lane(whole, encoded, size) for name, size in (("shared", budget), ("apart", 0))
            }
            figure |= raw_seconds(turn, copies)
            set_budget(engine, 0)
            figure["apart"], _ = run(engine, asks)
            set_budget(engine, budget)
            figure["shared"], pictures = run(engine, asks)
            figure["raw"] = figure["raw apart"] * copies / figure["raw shared"]
            figure["lane"] = figure["lane shared"] / figure["lane apart"]
            figure["service"] = figure["shared"] / figure["apart"]
            rounds.append(figure)
        differences = sorted(compare(whole, asks, pictures))

    def median(figure: Callable[[dict[str, float]], float]) -> float:
        return statistics.median(map(figure, rounds))

    figures = {
        "command": " ".join(["python bench/batching.py", *sys.argv[1:]]),
        "rows of a shared forward": copies * len(turn.forwards),
        "raw forward": {
            "ms": {name: median(lambda each, name=name: each[f"raw {name}"]) * 1e3 for name in ("apart", "shared")},
            "gain": median(lambda each: each["raw"]),
        },
        "step lane": {
            "requests/s": {name: median(lambda each, name=name: each[f"lane {name}"]) for name in ("apart", "shared")},
            "gain": median(lambda each: each["lane"]),
            "of the raw gain": median(lambda each: each["lane"] / each["raw"]),
            "of each round": [each["lane"] / each["raw"] for each in rounds],
        },
        "service": {
            "requests/s": {name: median(lambda each, name=name: each[name]) for name in ("apart", "shared")},
            "gain": median(lambda each: each["service"]),
            "of the raw gain": median(lambda each: each["service"] / each["raw"]),
            "of each round": [each["service"] / each["raw"] for each in rounds],
        },
        "difference from the single run": {
            "median": statistics.median(differences),
            "p90": differences[int(len(differences) * 0.9)],
            "most": differences[-1],
            "equal to the bit": sum(each == 0 for each in differences),
            "of": len(differences),
        },
    }
    figures["checks"] = {
        "never below 0.97 of one at a time": min(figures[name]["gain"] for name in ("step lane", "service")) >= 0.97,
        **lane_check(figures["raw forward"]["gain"], figures["step lane"]),
        "within the tolerance": differences[-1] <= TOLERANCE,
    }
    print(json.dumps(figures, indent=2))
    known = json.loads(asked.output.read_text()) if asked.output.exists() else {}
    asked.output.write_text(json.dumps({**known, asked.name: figures}, indent=2) + "\n")
    return 0 if all(figures["checks"].values()) else 1


def lane_check(raw: float, lane: dict[str, Any]) -> dict[str, bool]:
    """Return whether sharing forwards pays in the step lane, and what that means for such a model."""
    if raw > 2:
        return {"step lane: at least 2 times one at a time": lane["gain"] >= 2}
    return {"step lane: at least 0.9 of the raw gain": lane["of the raw gain"] >= 0.9}


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


def open_engine(kind: str, model: str) -> Engine:
    if kind == "ray":
        from triptych.engine.ray import RayEngine

        return RayEngine(model, dtype="float32", threads=1, warm_up=False)
    threads = dict.fromkeys(WORKERS, 1)
    return LocalEngine(
        model, dtype="float32", encoder="cpu", denoiser="cpu", decoder="cpu", threads=threads, warm_up=False
    )


def measured_budget(engine: Engine, ask: dict[str, Any]) -> int:
    """Return the budget that the denoiser finds, once it is idle."""
    engine.generate(**ask)
    wait_until_measured(engine)
    return int(denoiser_of(engine).describe()["budget"])


def set_budget(engine: Engine, budget: int) -> None:
    """Let the denoiser's forwards be as large as that from now on; 0 for one request at a time."""

    def settle(held: Any) -> None:
        held.lanes[RoleType.DENOISER].budget = budget

    denoiser = denoiser_of(engine)
    if isinstance(engine, LocalEngine):
        settle(denoiser)
    else:
        import ray

        ray.get(denoiser.actor.__ray_call__.remote(lambda actor: settle(actor._replica)))


def denoiser_of(engine: Engine) -> Any:
    """Return the one replica that denoises."""
    (denoiser,) = [each for each in engine.router.replicas if RoleType.DENOISER in each.roles]
    return denoiser


def run(engine: Engine, asks: list[dict[str, Any]]) -> tuple[float, list[torch.Tensor]]:
    """Return requests a second while `CLIENTS` clients ask, and the pictures."""
    pictures: dict[int, torch.Tensor] = {}

    def ask(number: int) -> dict[str, float]:
        result = engine.generate(**asks[number])
        pictures[number] = result.images
        return result.timings

    rate = closed_loop(ask, len(asks), CLIENTS).busy_rate
    return rate, [pictures[number] for number in range(len(asks))]


def encode(model: triptych.Model, ask: dict[str, Any]) -> State:
    """Return a request's state as the encoder leaves it."""
    state = model.admit(Request(**ask))
    finish(model.segment(state))
    return state


def run_lane(model: triptych.Model, encoded: list[State], budget: int) -> float:
    """Return requests a second while `CLIENTS` clients have a step lane denoise what is encoded."""
    lane = StepLane(model, "lane", threads=1, budget=budget)

    def ask(number: int) -> dict[str, float]:
        denoised: Future[State] = Future()

        def done(outcome: State | Exception) -> None:
            if isinstance(outcome, Exception):
                denoised.set_exception(outcome)
            else:
                denoised.set_result(outcome)

        lane.put(Work(encoded[number].copy(), done))
        return denoised.result().timings

    try:
        return closed_loop(ask, len(encoded), CLIENTS).busy_rate
    finally:
        lane.close()


def first_turn(model: triptych.Model, ask: dict[str, Any]) -> Turn:
    """Return a request's first denoising step, ready to be run."""
    return next(model.segment(encode(model, ask)))


def raw_seconds(turn: Turn, copies: int) -> dict[str, float]:
    """Return the median seconds of one request's forward, and of so many requests' as one; all lanes are idle meanwhile."""
    taken: dict[int, list[float]] = {1: [], copies: []}
    with torch.no_grad():
        for _ in range(24):
            for many in (1, 1, copies):
                began = time.perf_counter()
                turn.stage.predict(turn.forwards * many, exact=False)
                taken[many].append(time.perf_counter() - began)
    return {"raw apart": statistics.median(taken[1][2:]), "raw shared": statistics.median(taken[copies][2:])}


def compare(whole: triptych.Model, asks: list[dict[str, Any]], pictures: list[torch.Tensor]) -> list[float]:
    """Return how far each picture is from the one that a whole model makes of the request, exactly."""
    found = [
        (whole.generate(**{**ask, "exact": True}).images - picture).abs().max().item()
        for ask, picture in zip(asks, pictures)
    ]
    return [each if math.isfinite(each) else math.inf for each in found]  # NaN has no place in an order


if __name__ == "__main__":
    sys.exit(main())
