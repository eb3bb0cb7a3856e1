"""Whether short requests suffer from a long one, and whether the long one suffers from them.

    python bench/head_of_line.py

At t = 0: one request worth ten short ones, and thirty short ones, on two denoisers (three pools over Ray). Limits: the
short ones' p99 is at most 1.5 x what it is without the long one, and the last of all is done within 1.1 x the best
possible: what as many denoising steps take as equal short requests, which any order balances, less the encodes and
decodes that ten requests have and the one long one does not. Those are taken as what they are by themselves, halved,
since two cores do the work: with more cores they would cost less, and the best possible is rather too quick then. The
time that all stages take one at a time, divided by the cores, is given too; two processes that compute at once on
shared cores do not reach it.

One thread in every process. Writes bench/results/head_of_line.json; exits 1 where a limit is not met.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

import torch

from triptych import embedded
from triptych.engine.ray import RayEngine
from triptych.request import Request
from triptych.roles import WORKERS, RoleType

RESULTS = Path(__file__).parent / "results" / "head_of_line.json"
TIMES, COUNT = 10, 30  # how many short ones the long one is worth; short requests
POLICIES = ("predicted", "round_robin", "max_free_slots")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=16, help="of a short request; by default the model's own number")
    parser.add_argument("--policies", nargs="*", default=["predicted"], choices=POLICIES)
    parser.add_argument("--output", type=Path, default=RESULTS)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    figures: dict[str, Any] = {"command": " ".join(["python bench/head_of_line.py", *sys.argv[1:]])}
    for policy in asked.policies:
        figures[policy] = measure(policy, asked.rounds, asked.steps)
    best = figures[asked.policies[0]]
    figures["checks"] = {
        "short p99 <= 1.5 x without the long one": best["short p99 ratio"] <= 1.5,
        "makespan <= 1.1 x the best possible": best["makespan ratio"] <= 1.1,
    }
    print(json.dumps(figures, indent=2))
    asked.output.write_text(json.dumps(figures, indent=2) + "\n")
    return 0 if all(figures["checks"].values()) else 1


def measure(policy: Any, rounds: int, short: int) -> dict[str, Any]:
    """Return p99 and makespan with and without the long request: medians over the rounds.

    Ratios are of the same round, and then their medians: the host's speed may change from one round to the next.
    """
    with RayEngine(
        embedded.path(), dtype="float32", pools="encoder=1,denoiser=2,decoder=1", threads=1, batching=False,
        policy=policy, prompt_cache=0,
    ) as engine:  # fmt: skip
        for _ in range(4):
            engine.generate(**ask(short))  # the router learns what a request takes
        engine.generate(**ask(short * 3))
        runs = [
            {
                "alone": run(engine, short, long=False),
                "beside": run(engine, short, long=True),
                "equal": run(engine, short, long=False, count=COUNT + TIMES),
            }
            for _ in range(rounds)
        ]
        one, long = seconds_of(engine, short), seconds_of(engine, short * TIMES)
    work = sum(one.values()) * COUNT + sum(long.values())
    more = (TIMES - 1) * sum(seconds for role, seconds in one.items() if role is not RoleType.DENOISER) / 2

    def best(each: dict[str, dict[str, float]]) -> float:
        return each["equal"]["makespan"] - more

    def middle(figure: Callable[[dict[str, dict[str, float]]], float]) -> float:
        return statistics.median(figure(each) for each in runs)

    return {
        "short p99 alone, s": middle(lambda each: each["alone"]["p99"]),
        "short p99 beside the long one, s": middle(lambda each: each["beside"]["p99"]),
        "short p99 ratio": middle(lambda each: each["beside"]["p99"] / each["alone"]["p99"]),
        "long one done after, s": middle(lambda each: each["beside"]["long"]),
        "makespan, s": middle(lambda each: each["beside"]["makespan"]),
        "as many steps as equal short ones, s": middle(lambda each: each["equal"]["makespan"]),
        "of that, encodes and decodes that one long one spares, s": more,
        "the best possible, s": middle(best),
        "makespan ratio": middle(lambda each: each["beside"]["makespan"] / best(each)),
        "makespan ratios": sorted(each["beside"]["makespan"] / best(each) for each in runs),
        "the same work one at a time, halved, s": work / 2,
        "makespan against that": middle(lambda each: each["beside"]["makespan"]) / (work / 2),
    }


def ask(steps: int, seed: int = 0) -> dict[str, Any]:
    return {"prompt": "a red heart", "seed": seed, "num_inference_steps": steps, "exact": True, "output_type": "pt"}


def seconds_of(engine: RayEngine, steps: int) -> dict[RoleType, float]:
    """Return the seconds that each role computes for one request, by itself."""
    timings = min((engine.generate(**ask(steps)).timings for _ in range(3)), key=lambda each: sum(each.values()))
    roles = {name: stage.role for name, stage in engine.front.family.recipe}
    seconds = dict.fromkeys(WORKERS, 0.0)
    for name, taken in timings.items():
        seconds[roles[name]] += taken
    return seconds


def run(engine: RayEngine, short: int, *, long: bool, count: int = COUNT) -> dict[str, float]:
    """Submit all at once; returns when they were done, in seconds from then."""
    began = time.perf_counter()
    ended: dict[int, float] = {}
    jobs = [engine.submit(Request(**ask(short * TIMES)))] if long else []
    jobs += [engine.submit(Request(**ask(short, seed))) for seed in range(count)]
    for number, job in enumerate(jobs):
        job.listen(lambda event, number=number: ended.setdefault(number, time.perf_counter() - began)
                   if event.kind == "done" else None)  # fmt: skip
    for job in jobs:
        job.result(600)
    first = 1 if long else 0
    waited = sorted(ended[number] for number in range(first, len(jobs)))
    return {"p99": waited[-1], "long": ended[0] if long else 0.0, "makespan": max(ended.values())}


if __name__ == "__main__":
    sys.exit(main())
