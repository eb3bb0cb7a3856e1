"""What splitting costs one request, and what overlapping roles brings many.

    python bench/split.py                     # the embedded model
    (cd tests && python -m tiny flux2_klein /tmp/klein)
    K="--model /tmp/klein --param num_inference_steps=1"
    python bench/split.py --model /tmp/klein --name klein --param num_inference_steps=4 --param height=256 --param width=256
    python bench/split.py $K --name encode-bound --param height=64 --param width=64
    python bench/split.py $K --name decode-bound --param height=512 --param width=512 --param max_sequence_length=32

Serial: p50 of one request after another, run whole, by `LocalEngine` and by three processes over Ray, in turn and each
time another one first, so that all see the same machine. Limits: whole + 1 ms, and whole + 12 ms. The p50 of the
differences within a turn is given beside, with the bounds that hold with 95 % confidence: on a machine that others use
too, a millisecond can be less than what the machine does to either side. Whole and `LocalEngine` run the very same
weights: where in memory a copy comes to lie makes some percent of the difference between two. Over Ray it is another
copy; so what a request takes beyond its stages' own seconds is given too.

Pipelining: 16 clients that each ask again as soon as they have their picture, requests kept apart. Against the bound
min(1 / busiest role's seconds, cores / sum of all roles' seconds), of seconds measured one request at a time just before
and just after, since a machine that others use too changes its speed within a minute. The median of the rounds counts.
Limits: 0.95 of the bound in `LocalEngine`, 0.90 over Ray. The bound takes cores for independent, which two that share
caches and memory are not; so the same is measured of as many whole models as there are cores, each in a process of its own.

One thread in every process and lane, the whole included. Writes bench/results/split.json; exits 1 where a limit is not
met.
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
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

import torch

import triptych
from triptych import embedded
from triptych.bench.load import closed_loop
from triptych.engine.base import Engine
from triptych.engine.local import LocalEngine
from triptych.engine.ray import RayEngine
from triptych.request import Request
from triptych.roles import WORKERS, RoleType

RESULTS = Path(__file__).parent / "results" / "split.json"
CLIENTS = 16


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=str(embedded.path()))
    parser.add_argument("--name", default="embedded", help="under which the figures are kept")
    parser.add_argument("--param", action="append", default=[], help="name=json, of every request")
    parser.add_argument("--repeats", type=int, default=30, help="requests of the serial part, each way")
    parser.add_argument("--requests", type=int, default=64, help="requests of the pipelined part")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of the pipelined part")
    parser.add_argument("--output", type=Path, default=RESULTS)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    parameters = {"prompt": "a red heart", "seed": 0, "exact": True, "output_type": "pt"}
    parameters |= {name: json.loads(value) for name, _, value in (each.partition("=") for each in asked.param)}
    cores = len(os.sched_getaffinity(0))
    threads = dict.fromkeys(WORKERS, 1)
    roles = {role: triptych.load(asked.model, role=role, device="cpu", dtype="float32") for role in WORKERS}

    def measure_pipelined(**engines: Engine) -> dict[str, list[dict[str, Any]]]:
        """Return what each engine reached in each round, and what it was to reach."""
        rounds: dict[str, list[dict[str, Any]]] = {name: [] for name in engines}
        before = role_seconds(roles, parameters)
        for _ in range(asked.rounds):
            for name, engine in engines.items():
                rate = throughput(engine, parameters, asked.requests)
                after = role_seconds(roles, parameters)
                seconds = {role: (before[role] + after[role]) / 2 for role in after}
                bound = min(1 / max(seconds.values()), cores / sum(seconds.values()))
                rounds[name].append(
                    {
                        "role seconds": seconds,
                        "bound, requests/s": bound,
                        "requests/s": rate,
                        "share of the bound": rate / bound,
                        "over one at a time": rate * sum(seconds.values()),
                    }
                )
                before = after
        return rounds

    with (
        LocalEngine(asked.model, dtype="float32", encoder="cpu", denoiser="cpu", decoder="cpu", threads=threads,
                    batching=False, prompt_cache=0) as local,
        RayEngine(asked.model, dtype="float32", threads=1, batching=False, prompt_cache=0) as ray,
    ):  # fmt: skip
        (replica,) = local.router.replicas
        serial, beyond, over, bounds = measure_serial(replica.model, local, ray, parameters, asked.repeats)  # type: ignore[attr-defined]
        pipelined = measure_pipelined(local=local, ray=ray)
    with RayEngine(asked.model, pools=f"monolithic={cores}", dtype="float32", threads=1, batching=False,
                   prompt_cache=0) as wholes:  # fmt: skip
        pipelined |= measure_pipelined(wholes=wholes)
    shares = {
        name: statistics.median(each["share of the bound"] for each in rounds) for name, rounds in pipelined.items()
    }
    figures = {
        "command": " ".join(["python bench/split.py", *sys.argv[1:]]),
        "cores": cores,
        "serial p50, ms": {name: value * 1e3 for name, value in serial.items()},
        "beyond the stages' own seconds, ms": {name: value * 1e3 for name, value in beyond.items()},
        "over the whole, ms": {name: (serial[name] - serial["whole"]) * 1e3 for name in ("local", "ray")},
        "p50 of the differences within a turn, ms": {name: value * 1e3 for name, value in over.items()},
        "its bounds, ms": {name: [value * 1e3 for value in each] for name, each in bounds.items()},
        "pipelined, by round": pipelined,
        "share of the bound": shares,
        "over one at a time": {
            name: statistics.median(each["over one at a time"] for each in rounds) for name, rounds in pipelined.items()
        },
        "over as many wholes": {name: shares[name] / shares["wholes"] for name in ("local", "ray")},
    }
    figures["checks"] = {
        "local serial <= whole + 1 ms": figures["over the whole, ms"]["local"] <= 1,
        "ray serial <= whole + 12 ms": figures["over the whole, ms"]["ray"] <= 12,
        "local pipelined >= 0.95 of the bound": figures["share of the bound"]["local"] >= 0.95,
        "ray pipelined >= 0.90 of the bound": figures["share of the bound"]["ray"] >= 0.90,
    }
    print(json.dumps(figures, indent=2))
    known = json.loads(asked.output.read_text()) if asked.output.exists() else {}
    asked.output.write_text(json.dumps({**known, asked.name: figures}, indent=2) + "\n")
    return 0 if all(figures["checks"].values()) else 1


def measure_serial(
    whole: triptych.Model, local: Engine, ray: Engine, parameters: dict[str, Any], repeats: int
) -> tuple[dict[str, float], dict[str, float], dict[str, float], dict[str, list[float]]]:
    """Return the median seconds of one request, each way; of what no stage took; of the differences from the whole.

    And the bounds of the last. The ways take turns.
    """
    ways: dict[str, Callable[..., Any]] = {"whole": whole.generate, "local": local.generate, "ray": ray.generate}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    beyond: dict[str, list[float]] = {name: [] for name in ways}
    pictures = {}
    for k in range(repeats + 1):
        for name in (*list(ways)[k % 3 :], *list(ways)[: k % 3]):
            began = time.perf_counter()
            result = ways[name](**parameters)
            pictures[name] = result.images
            if k:  # the first warms up
                seconds[name].append(time.perf_counter() - began)
                beyond[name].append(seconds[name][-1] - sum(result.timings.values()))
    for name in ("local", "ray"):
        assert torch.equal(pictures[name], pictures["whole"]), f"{name} made another picture"
    over = {name: [split - whole for split, whole in zip(seconds[name], seconds["whole"])] for name in ("local", "ray")}
    medians = [{name: statistics.median(each) for name, each in kind.items()} for kind in (seconds, beyond, over)]
    return medians[0], medians[1], medians[2], {name: bounds_of_median(each) for name, each in over.items()}


def bounds_of_median(values: list[float]) -> list[float]:
    """Return between what two of the values the median of all there could be lies, with 95 % confidence.

    Whatever their distribution: how many of n values lie below their median is binomial, n/2 +- 0.98 sqrt(n).
    """
    ranked, middle, spread = sorted(values), len(values) / 2, 0.98 * math.sqrt(len(values))
    return [ranked[max(0, math.floor(middle - spread))], ranked[min(len(values), math.ceil(middle + spread)) - 1]]


def role_seconds(
    roles: dict[RoleType, triptych.Model], parameters: dict[str, Any], repeats: int = 5
) -> dict[str, float]:
    """Return the median seconds that each role takes for one request, one at a time."""
    seconds: dict[str, list[float]] = {role.value: [] for role in roles}
    for k in range(repeats + 1):
        work: Any = Request(**parameters)
        for role, loaded in roles.items():
            began = time.perf_counter()
            work = loaded.run(work)
            if k:  # the first warms up
                seconds[role.value].append(time.perf_counter() - began)
    return {role: statistics.median(each) for role, each in seconds.items()}


def throughput(engine: Engine, parameters: dict[str, Any], requests: int) -> float:
    """Return requests a second with `CLIENTS` clients, counted while all of them have one on its way."""

    def ask(number: int) -> dict[str, float]:
        return engine.generate(**{**parameters, "seed": number}).timings

    return closed_loop(ask, requests + 2 * CLIENTS, CLIENTS).busy_rate


if __name__ == "__main__":
    sys.exit(main())
