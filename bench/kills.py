"""Kills roles at every phase while requests run, and counts what was lost.

    python bench/kills.py                     # 1,000 requests, 200 kills, as the design asks
    python bench/kills.py --requests 100 --kills 20

Every request is `exact`, so that its picture can be compared with the one that a whole model makes of the same seed: a
picture that survived a kill has the same pixels. Kills are SIGKILL and, every tenth, SIGSTOP; which process and when is
drawn from `--seed`. Prints the figures and writes them to bench/results/kills.json; exits 1 where a limit is not met.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch

import triptych
from triptych import embedded
from triptych.engine.ray import RayEngine, RayReplica
from triptych.request import Request

RESULTS = Path(__file__).parent / "results" / "kills.json"
SEEDS = 20  # different pictures, so that the whole model does not have to make every one
STEPS = 8


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--concurrency", type=int, default=16)
    parser.add_argument("--pools", default="encoder=2,denoiser=2,decoder=2")
    parser.add_argument("--corrupt", type=float, default=0.01, help="share of hand-overs in which a bit is flipped")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=RESULTS)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    whole = triptych.load(embedded.path(), device="cpu", dtype="float32")
    expected = [whole.generate(**parameters(seed)).images for seed in range(SEEDS)]
    engine = RayEngine(
        embedded.path(), dtype="float32", pools=asked.pools, threads=1, faults={"corrupt": asked.corrupt}
    )
    wait_for_all(engine, asked.pools)  # the engine is ready when one of each role is
    before = levels(engine)
    killer = Killer(engine, asked.kills, asked.requests, random.Random(asked.seed))
    ended = run(engine, asked.requests, asked.concurrency, expected, killer)
    killer.stop()
    wait_for_all(engine, asked.pools)
    after = levels(engine)
    engine.close(30)
    return report(asked, ended, killer, before, after)


def parameters(seed: int) -> dict[str, Any]:
    return {"prompt": "a red heart", "seed": seed, "num_inference_steps": STEPS, "output_type": "pt", "exact": True}


def run(engine: RayEngine, requests: int, concurrency: int, expected: list[Any], killer: Killer) -> Counter[str]:
    """Keep `concurrency` requests on their way until all are done; returns how they ended."""
    ended: Counter[str] = Counter()
    lock = threading.Lock()
    numbers = iter(range(requests))

    def client() -> None:
        while True:
            with lock:
                number = next(numbers, None)
            if number is None:
                return
            seed = number % SEEDS
            try:
                images = engine.submit(Request(**parameters(seed))).result(timeout=300).images
                outcome = "same" if torch.equal(images, expected[seed]) else "different"
            except TimeoutError:
                outcome = "hung"
            except Exception as error:  # noqa: BLE001 (a request's failure is what is counted here)
                outcome = f"failed: {type(error).__name__}"
            with lock:
                ended[outcome] += 1
            killer.one_more(sum(ended.values()))

    clients = [threading.Thread(target=client) for _ in range(concurrency)]
    for each in clients:
        each.start()
    for each in clients:
        each.join()
    return ended


class Killer:
    """Sends signals to replicas, evenly over the requests, and measures how long it takes until that is noticed."""

    def __init__(self, engine: RayEngine, kills: int, requests: int, chance: random.Random) -> None:
        self.engine, self.chance = engine, chance
        self.at = sorted(chance.sample(range(requests), min(kills, requests))) if kills else []
        self.seconds: dict[str, list[float]] = {"SIGKILL": [], "SIGSTOP": []}
        self.phases: Counter[str] = Counter()
        self.done = 0
        self._lock = threading.Lock()
        self._watchers: list[threading.Thread] = []

    def one_more(self, ended: int) -> None:
        """Take note that so many requests have ended; kill if it is time to."""
        with self._lock:
            while self.done < len(self.at) and self.at[self.done] < ended:
                if not self._kill("SIGSTOP" if self.done % 10 == 9 else "SIGKILL"):
                    return  # it stays due, until another request has ended
                self.done += 1

    def _kill(self, name: str) -> bool:
        """Send a signal to a process that runs; returns whether there was one."""
        time.sleep(self.chance.random() * 0.2)  # somewhere within a step, a hand-over, a decoding
        living = [each for each in self.engine.replicas if runs(each.told.get("pid"))]
        if not living:
            return False
        replica = self.chance.choice(living)
        busy = "+".join(sorted({ticket.role.value for ticket in replica.tickets})) or "idle"
        phase = f"{replica.pool} {replica.state} {busy}"
        watched = replica.state == "ready"
        pid, losses, began = replica.told["pid"], replica.losses, time.monotonic()
        try:
            os.kill(pid, getattr(signal, name))
        except ProcessLookupError:
            return False
        self.phases[phase] += 1
        if watched:
            watcher = threading.Thread(target=self._watch, args=(name, replica, losses, began))
            watcher.start()
            self._watchers.append(watcher)
        return True

    def _watch(self, name: str, replica: RayReplica, losses: int, began: float) -> None:
        while replica.losses == losses and time.monotonic() - began < 30:
            time.sleep(0.02)
        self.seconds[name].append(time.monotonic() - began)

    def stop(self) -> None:
        for watcher in self._watchers:
            watcher.join()


def runs(pid: int | None) -> bool:
    """Return whether a process is there, and neither dead nor stopped already."""
    try:
        return pid is not None and Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZXT"
    except OSError:
        return False


def wait_for_all(engine: RayEngine, pools: str) -> None:
    """Wait until every replica is back."""
    count = sum(int(part.split("=")[1]) for part in pools.split(","))
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        ready = [each for each in engine.replicas if each.state == "ready"]
        if len(ready) >= count and len(engine.router) == 0:
            return
        time.sleep(0.2)


def objects(engine: RayEngine) -> int:
    """Return the objects that are referred to now; questions for a sign of life come and go."""
    time.sleep(0.13)
    return engine.objects()


def levels(engine: RayEngine) -> dict[str, int]:
    """Return what must be as it was: jobs, slots in use, and objects in Ray's store."""
    time.sleep(2)  # Ray frees objects a moment after their last reference is gone
    return {
        "jobs": len(engine.router),
        "slots": sum(len(each.tickets) for each in engine.router.replicas),
        "waiting": len(engine.snapshot()["waiting"]),
        "replicas": len(engine.router.replicas),
        "objects": min(objects(engine) for _ in range(20)),
    }


def report(
    asked: argparse.Namespace, ended: Counter[str], killer: Killer, before: dict[str, int], after: dict[str, int]
) -> int:
    total = sum(ended.values())
    slowest = {name: max(seconds, default=0.0) for name, seconds in killer.seconds.items()}
    checks = {
        "as many requests ended as were asked": total == asked.requests,
        "as many signals were sent as were asked": killer.done == asked.kills,
        "at least 99 % have the same pixels": ended["same"] >= 0.99 * total,
        "none differs, none hangs": ended["different"] == ended["hung"] == 0,
        "deaths noticed within 2 s": slowest["SIGKILL"] <= 2,
        "hangs noticed within 5 s": slowest["SIGSTOP"] <= 5,
        "nothing left": before == after,
    }
    figures = {
        "command": " ".join(["python bench/kills.py", *sys.argv[1:]]),
        "requests": total,
        "kills": killer.done,
        "ended": dict(ended),
        "killed": dict(sorted(killer.phases.items())),
        "noticed after, s": {
            name: {"median": sorted(each)[len(each) // 2], "most": max(each)}
            for name, each in killer.seconds.items()
            if each
        },
        "before": before,
        "after": after,
        "checks": checks,
    }
    print(json.dumps(figures, indent=2))
    asked.output.write_text(json.dumps(figures, indent=2) + "\n")
    return 0 if all(checks.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
