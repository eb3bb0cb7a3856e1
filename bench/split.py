"""What splitting costs one request, and what overlapping roles brings many.

    python bench/split.py                     # the embedded model
    (cd tests && python -m tiny flux2_klein /tmp/klein)
    K="--model /tmp/klein --param num_inference_steps=1"
    python bench/split.py --model /tmp/klein --name klein --param num_inference_steps=4 --param height=256 --param width=256
    python bench/split.py $K --name encode-bound --param height=64 --param width=64
    python bench/split.py $K --name decode-bound --param height=512 --param width=512 --param max_sequence_length=32

Serial: p50 of one request after another, run whole, by `LocalEngine` and by three processes over Ray, in turn and each
time another one first, so that all see the same machine. Limits: whole + 1 ms, and whole + 12 ms. Where in memory a
process comes to lie makes some percent of its speed, for as long as it lives; so all is started anew `--launches` times,
and the median of the launches' p50s counts. The bounds beside it, within which it lies with 95 % confidence, are of the
differences within a turn, all of them. Whole and `LocalEngine` run the very same weights, and the whole has the memory
that the engine keeps: by itself it would fetch it from the system for every picture. What a request takes beyond its
stages' own seconds is given too. And how much of it is the machine's price for three processes: three bare ones, a role
each, take turns with the others, that pass states on through pipes, without an engine, and without its care for any loss.

Pipelining: 16 clients that each ask again as soon as they have their picture, requests kept apart. Against the bound
min(1 / busiest role's seconds, cores / sum of all roles' seconds), of seconds measured one request at a time just before
and just after, since a machine that others use too changes its speed within a minute. The median of the rounds counts.
Limits: 0.95 of the bound in `LocalEngine`, 0.90 over Ray. The bound takes cores for independent, which two that share
caches and memory are not; so the same is measured of as many whole models as there are cores, each in a process of its own
(`wholes`), and each in a bare thread of this one (`threads`), where they share Python's lock, too, as lanes do.

Free-threaded Python has no such lock, and Ray is not made for it: `--local` measures `LocalEngine` alone there.

    PYTHON_GIL=0 python3.14t bench/split.py --local --name 'klein, free-threaded' --model /tmp/klein ...

One thread in every process and lane, the whole included. Writes bench/results/split.json; exits 1 where a limit is not
met.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from multiprocessing.connection import Connection
from pathlib import Path
from queue import SimpleQueue
from statistics import median
from typing import TYPE_CHECKING, Any

os.environ["OMP_NUM_THREADS"] = "1"

import torch

import triptych
from triptych import embedded
from triptych.bench.load import closed_loop
from triptych.engine.local import LanesReplica, LocalEngine
from triptych.request import Request
from triptych.result import Result
from triptych.roles import WORKERS, RoleType
from triptych.runtime import memory
from triptych.state import State

if TYPE_CHECKING:
    from triptych.engine.ray import RayEngine

RESULTS = Path(__file__).parent / "results" / "split.json"
CLIENTS = 16
SPLIT = "local", "ray", "pipes"

Generate = Callable[..., Result]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=str(embedded.path()))
    parser.add_argument("--name", default="embedded", help="under which the figures are kept")
    parser.add_argument("--param", action="append", default=[], help="name=json, of every request")
    parser.add_argument("--repeats", type=int, default=30, help="requests of the serial part, each way and launch")
    parser.add_argument("--launches", type=int, default=5, help="of the engines, in the serial part")
    parser.add_argument("--requests", type=int, default=64, help="requests of the pipelined part")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of the pipelined part")
    parser.add_argument("--local", action="store_true", help="without Ray")
    parser.add_argument("--output", type=Path, default=RESULTS)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    parameters = {"prompt": "a red heart", "seed": 0, "exact": True, "output_type": "pt"}
    parameters |= {name: json.loads(value) for name, _, value in (each.partition("=") for each in asked.param)}
    cores = len(os.sched_getaffinity(0))
    splits = tuple(each for each in SPLIT if each != "ray" or not asked.local)

    def measure_pipelined(**ways: Generate) -> dict[str, list[dict[str, Any]]]:
        """Return what each way reached in each round, and what it was to reach."""
        rounds: dict[str, list[dict[str, Any]]] = {name: [] for name in ways}
        before = role_seconds(roles, parameters)
        for _ in range(asked.rounds):
            for name, generate in ways.items():
                rate = throughput(generate, parameters, asked.requests)
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

    # Each in a process of its own, and before this one loads anything.
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), max_tasks_per_child=1) as processes:
        launches = [
            processes.submit(measure_serial, asked.model, parameters, asked.repeats, splits).result()
            for _ in range(asked.launches)
        ]
    roles = {role: triptych.load(asked.model, role=role, device="cpu", dtype="float32") for role in WORKERS}
    with ExitStack() as opened:
        ways = {"local": opened.enter_context(local_engine(asked.model)).generate}
        if not asked.local:
            ways["ray"] = opened.enter_context(ray_engine(asked.model)).generate
        pipelined = measure_pipelined(**ways)
    with ExitStack() as opened:
        ways = {"threads": in_threads(asked.model, cores)}
        if not asked.local:
            ways["wholes"] = opened.enter_context(ray_engine(asked.model, pools=f"monolithic={cores}")).generate
        pipelined |= measure_pipelined(**ways)
    shares = {name: median(each["share of the bound"] for each in rounds) for name, rounds in pipelined.items()}
    serial, beyond = (
        {name: median(median(launch[kind][name]) for launch in launches) * 1e3 for name in ("whole", *splits)}
        for kind in ("seconds", "beyond")
    )
    over = {
        name: [(median(launch["seconds"][name]) - median(launch["seconds"]["whole"])) * 1e3 for launch in launches]
        for name in splits
    }
    turns = {
        name: [
            (split - whole) * 1e3
            for launch in launches
            for split, whole in zip(launch["seconds"][name], launch["seconds"]["whole"])
        ]
        for name in splits
    }
    figures = {
        "command": " ".join(["python bench/split.py", *sys.argv[1:]]),
        "Python": platform.python_version() + ("" if has_lock() else ", free-threaded"),
        "cores": cores,
        "serial p50, ms": serial,
        "beyond the stages' own seconds, ms": beyond,
        "over the whole, ms": {name: median(each) for name, each in over.items()},
        "the same by launch, ms": over,
        "p50 of the differences within a turn, ms": {name: median(each) for name, each in turns.items()},
        "its bounds, ms": {name: bounds_of_median(each) for name, each in turns.items()},
        "pipelined, by round": pipelined,
        "share of the bound": shares,
        "over one at a time": {
            name: median(each["over one at a time"] for each in rounds) for name, rounds in pipelined.items()
        },
        "over as many wholes": {
            name: shares[name] / shares["wholes"] for name in ("local", "ray") if "wholes" in shares
        },
        "over as many threads": {"local": shares["local"] / shares["threads"]},
    }
    figures["checks"] = {}
    for name, most, least in (("local", 1, 0.95), ("ray", 12, 0.90)):
        if name in splits:
            figures["checks"] |= {
                f"{name} serial <= whole + {most} ms": figures["over the whole, ms"][name] <= most,
                f"{name} pipelined >= {least:.2f} of the bound": shares[name] >= least,
            }
    print(json.dumps(figures, indent=2))
    known = json.loads(asked.output.read_text()) if asked.output.exists() else {}
    asked.output.write_text(json.dumps({**known, asked.name: figures}, indent=2) + "\n")
    return 0 if all(figures["checks"].values()) else 1


def local_engine(model: str) -> LocalEngine:
    """Open the one of this process, one thread in each of its lanes."""
    return LocalEngine(model, dtype="float32", encoder="cpu", denoiser="cpu", decoder="cpu",
                       threads=dict.fromkeys(WORKERS, 1), batching=False, prompt_cache=0)  # fmt: skip


def ray_engine(model: str, **options: Any) -> RayEngine:
    """Open the one over Ray, one thread in each of its processes."""
    from triptych.engine.ray import RayEngine

    return RayEngine(model, dtype="float32", threads=1, batching=False, prompt_cache=0, **options)


def has_lock() -> bool:
    """Return whether threads of this Python run one at a time."""
    return bool(getattr(sys, "_is_gil_enabled", lambda: True)())


def measure_serial(
    model: str, parameters: dict[str, Any], repeats: int, splits: Sequence[str]
) -> dict[str, dict[str, list[float]]]:
    """Return the seconds of each request by the way it went, and what of them no stage took. The ways take turns."""
    torch.set_num_threads(1)
    pictures = {}
    with ExitStack() as opened:
        local = opened.enter_context(local_engine(model))
        (replica,) = local.router.replicas
        assert isinstance(replica, LanesReplica)
        ways: dict[str, Generate] = {"whole": replica.model.generate, "local": local.generate}
        if "ray" in splits:
            ways["ray"] = opened.enter_context(ray_engine(model)).generate
        ways["pipes"] = opened.enter_context(piped(model, local))
        names = tuple(ways)
        seconds: dict[str, list[float]] = {name: [] for name in names}
        beyond: dict[str, list[float]] = {name: [] for name in names}
        for k in range(repeats + 1):
            for name in (*names[k % len(names) :], *names[: k % len(names)]):
                began = time.perf_counter()
                result = ways[name](**parameters)
                took = time.perf_counter() - began
                pictures[name] = result.images
                if k:  # the first warms up
                    seconds[name].append(took)
                    beyond[name].append(took - sum(result.timings.values()))
    for name in splits:
        assert torch.equal(pictures[name], pictures["whole"]), f"{name} made another picture"
    return {"seconds": seconds, "beyond": beyond}


@contextmanager
def piped(model: str, front: LocalEngine) -> Iterator[Generate]:
    """Open a process for each role, joined by nothing but pipes; `front` checks their requests."""
    context = multiprocessing.get_context("spawn")
    pipes = [context.Pipe(duplex=False) for _ in range(len(WORKERS) + 1)]
    for role, (states, _), (_, after) in zip(WORKERS, pipes, pipes[1:]):
        context.Process(target=run_role, args=(model, role, states, after), daemon=True).start()
        states.close()
        after.close()
    first, last = pipes[0][1], pipes[-1][0]

    def generate(**parameters: Any) -> Result:
        first.send_bytes(front.front.admit(Request(**parameters)).to_bytes())
        return State.from_bytes(last.recv_bytes()).result

    with first, last:
        yield generate


def run_role(model: str, role: RoleType, states: Connection, after: Connection) -> None:
    """Run a role's segment of one state after another, until no more can come."""
    torch.set_num_threads(1)
    memory.keep()
    loaded = triptych.load(model, role=role, device="cpu", dtype="float32")
    memory.gather()
    with suppress(EOFError):
        while True:
            after.send_bytes(loaded.run(State.from_bytes(states.recv_bytes())).to_bytes())


def in_threads(model: str, count: int) -> Generate:
    """Return what has a request done by one of so many whole models, in the thread that asks."""
    free: SimpleQueue[triptych.Model] = SimpleQueue()
    for _ in range(count):
        free.put(triptych.load(model, device="cpu", dtype="float32"))

    def generate(**parameters: Any) -> Result:
        loaded = free.get()
        try:
            return loaded.generate(**parameters)
        finally:
            free.put(loaded)

    return generate


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
    return {role: median(each) for role, each in seconds.items()}


def throughput(generate: Generate, parameters: dict[str, Any], requests: int) -> float:
    """Return requests a second with `CLIENTS` clients, counted while all of them have one on its way."""

    def ask(number: int) -> dict[str, float]:
        return generate(**{**parameters, "seed": number}).timings

    return closed_loop(ask, requests + 2 * CLIENTS, CLIENTS).busy_rate


if __name__ == "__main__":
    sys.exit(main())
