"""What it brings that a process has its memory lie in huge pages.

    python bench/huge_pages.py                # the embedded model
    (cd tests && python -m tiny flux2_klein /tmp/klein)
    K="--param height=64 --param width=64 --param max_sequence_length=32 --param num_inference_steps=1"
    python bench/huge_pages.py --model /tmp/klein --name klein-small $K

p50 of one request after another and requests a second of 16 clients, by one `LocalEngine`, before and after
`runtime/memory.py` gathers what it holds, and the process's memory. Each launch is a process of its own; the median of
the launches' ratios counts. How much it is depends on how far memory lies apart: little on a machine that was started just
now, most on one whose memory has been given and taken back for days.

One thread in every lane, one core or more. Writes bench/results/huge_pages.json; exits 1 where a request takes longer
afterwards.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

import psutil
import torch

from triptych import embedded
from triptych.bench.load import closed_loop
from triptych.engine.local import LocalEngine
from triptych.roles import WORKERS
from triptych.runtime import memory

RESULTS = Path(__file__).parent / "results" / "huge_pages.json"
CLIENTS = 16


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=str(embedded.path()))
    parser.add_argument("--name", default="embedded", help="under which the figures are kept")
    parser.add_argument("--param", action="append", default=[], help="name=json, of every request")
    parser.add_argument("--requests", type=int, default=30, help="of each part")
    parser.add_argument("--launches", type=int, default=3)
    parser.add_argument("--output", type=Path, default=RESULTS)
    asked = parser.parse_args()
    parameters = {"prompt": "a red heart", "seed": 0, "exact": True, "output_type": "pt"}
    parameters |= {name: json.loads(value) for name, _, value in (each.partition("=") for each in asked.param)}
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), max_tasks_per_child=1) as processes:
        launches = [
            processes.submit(compare, asked.model, parameters, asked.requests).result() for _ in range(asked.launches)
        ]
    ratios = {
        name: median(launch["after"][name] / launch["before"][name] for launch in launches)
        for name in launches[0]["before"]
    }
    figures: dict[str, Any] = {
        "command": " ".join(["python bench/huge_pages.py", *sys.argv[1:]]),
        "by launch": launches,
        "after over before": ratios,
        "checks": {"a request takes no longer": ratios["p50, ms"] <= 1.02},
    }
    print(json.dumps(figures, indent=2))
    known = json.loads(asked.output.read_text()) if asked.output.exists() else {}
    asked.output.write_text(json.dumps({**known, asked.name: figures}, indent=2) + "\n")
    return 0 if all(figures["checks"].values()) else 1


def compare(model: str, parameters: dict[str, Any], requests: int) -> dict[str, dict[str, float]]:
    """Return the figures of one engine before its memory is gathered, and after."""
    torch.set_num_threads(1)
    gather, memory.gather = memory.gather, lambda: None  # not yet
    with LocalEngine(model, dtype="float32", encoder="cpu", denoiser="cpu", decoder="cpu",
                     threads=dict.fromkeys(WORKERS, 1), batching=False, prompt_cache=0) as engine:  # fmt: skip
        before = measure(engine, parameters, requests)
        gather()
        return {"before": before, "after": measure(engine, parameters, requests)}


def measure(engine: LocalEngine, parameters: dict[str, Any], requests: int) -> dict[str, float]:
    """Return what requests take one after another, how many are answered at a time, and the process's memory."""

    def ask(number: int) -> dict[str, float]:
        return engine.generate(**{**parameters, "seed": number}).timings

    seconds = []
    for number in range(requests + 1):
        began = time.perf_counter()
        ask(number)
        seconds.append(time.perf_counter() - began)
    rate = closed_loop(ask, requests + 2 * CLIENTS, CLIENTS).busy_rate
    resident = psutil.Process().memory_info().rss / 1e6
    return {"p50, ms": median(seconds[1:]) * 1e3, "requests/s": rate, "resident, MB": resident}


if __name__ == "__main__":
    sys.exit(main())
