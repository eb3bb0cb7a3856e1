"""Whether memory stays level while thousands of requests pass.

    python bench/level.py                       # LocalEngine, 5,000 requests
    python bench/level.py --engine ray

One step each, 16 at a time, prompts that repeat, the prompt cache small enough to be full before the 1,000th. Begins when
the denoiser has measured how much its forwards may share, which it does when it is idle. What counts is the highest that
a process's resident memory was seen at, looked at ten times between two figures. Limit: of every process, from the 1,000th
request to the last, within 5 %. Writes bench/results/level.json; exits 1 where it is not.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

import psutil
import torch

from triptych import embedded
from triptych.bench.load import closed_loop
from triptych.engine.base import Engine
from triptych.roles import WORKERS, RoleType

RESULTS = Path(__file__).parent / "results" / "level.json"
CLIENTS = 16
CACHE = 2_000_000  # bytes of prompt embeddings


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--engine", choices=("local", "ray"), default="local")
    parser.add_argument("--requests", type=int, default=5000)
    parser.add_argument("--since", type=int, default=1000, help="the request from which on memory is to be level")
    parser.add_argument("--output", type=Path, default=RESULTS)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    with open_engine(asked.engine) as engine:
        wait_until_measured(engine)
        samples = run(engine, asked.requests, max(100, asked.requests // 50))
    settled = {number: each for number, each in samples.items() if number >= asked.since}
    first = settled[min(settled)]
    growth = {name: max(each[name] for each in settled.values()) / first[name] - 1 for name in first}
    figures = {
        "command": " ".join(["python bench/level.py", *sys.argv[1:]]),
        "requests": asked.requests,
        "resident at most, MB": {
            str(number): {name: size / 1e6 for name, size in each.items()} for number, each in samples.items()
        },
        "growth from the first settled sample to the highest": growth,
    }
    figures["checks"] = {"within 5 %": max(growth.values()) <= 0.05}
    print(json.dumps(figures, indent=2))
    known = json.loads(asked.output.read_text()) if asked.output.exists() else {}
    asked.output.write_text(json.dumps({**known, asked.engine: figures}, indent=2) + "\n")
    return 0 if all(figures["checks"].values()) else 1


def open_engine(kind: str) -> Engine:
    if kind == "ray":
        from triptych.engine.ray import RayEngine

        return RayEngine(embedded.path(), dtype="float32", threads=1, prompt_cache=CACHE)
    from triptych.engine.local import LocalEngine

    threads = dict.fromkeys(WORKERS, 1)
    return LocalEngine(
        embedded.path(), dtype="float32", encoder="cpu", denoiser="cpu", decoder="cpu", threads=threads,
        prompt_cache=CACHE,
    )  # fmt: skip


def wait_until_measured(engine: Engine, patience: float = 120.0) -> None:
    """Wait until the denoisers know their budgets."""
    denoisers = [each for each in engine.router.replicas if RoleType.DENOISER in each.roles]
    deadline = time.monotonic() + patience
    while any(each.describe()["budget"] is None for each in denoisers):
        assert time.monotonic() < deadline, "no budget was measured"
        time.sleep(0.1)


def run(engine: Engine, requests: int, every: int) -> dict[int, dict[str, int]]:
    """Return the most resident bytes that every process was seen with, for every so many requests."""
    samples: dict[int, dict[str, int]] = {}
    highest: dict[str, int] = {}

    def ask(number: int) -> dict[str, float]:
        prompt = f"a red heart {number % 400}"
        return engine.generate(prompt=prompt, seed=number, num_inference_steps=1, output_type="pt").timings

    def look(done: int) -> None:
        nonlocal highest
        if done % (every // 10) == 0 or done == requests:
            highest = {name: max(size, highest.get(name, 0)) for name, size in resident(engine).items()}
        if done % every == 0 or done == requests:
            samples[done], highest = highest, {}
            print(f"{done}: {samples[done]}", file=sys.stderr)

    closed_loop(ask, requests, CLIENTS, look)
    return samples


def resident(engine: Engine) -> dict[str, int]:
    """Return the resident bytes of this process and of the replicas' own."""
    sizes: dict[str, int] = {"this process": psutil.Process().memory_info().rss}
    replicas: Any = engine.router.replicas
    for replica in list(replicas):
        pid = getattr(replica, "told", {}).get("pid")
        if pid is not None:
            sizes[replica.name.partition("-")[0]] = psutil.Process(pid).memory_full_info().uss
    return sizes


if __name__ == "__main__":
    sys.exit(main())
