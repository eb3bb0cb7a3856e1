"""Thousands of requests through the HTTP server, in a process of its own: none lost, none answered twice, memory level.

    python bench/soak.py                       # 10,000 requests of one step, 64 at once
    python bench/soak.py --requests 300 --since 100

`triptych serve` on the embedded model, with its defaults: what is asked of it is on disk. Each caller posts a request,
follows its events to the end and fetches its picture; there are some hundred prompts and seeds. Limits: every request
ends in `done` exactly once; callers of the same prompt and seed get the same picture; the server's resident memory stays
within 5 % from the 2,000th request to the last; none of its queues holds anything. Prints the figures, writes bench/results/soak.json; exits 1 on a miss.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import psutil

import triptych

RESULTS = Path(__file__).parent / "results" / "soak.json"
PROMPTS = 200
TIMEOUT = 600.0  # seconds a request may take, queue included


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--at-once", type=int, default=64)
    parser.add_argument("--since", type=int, default=2000, help="the request from which on memory is to be level")
    parser.add_argument("--output", type=Path, default=RESULTS)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="triptych-soak-") as folder:
        server, url = start(Path(folder))
        try:
            soak = Soak(url, asked.requests, asked.at_once, psutil.Process(server.pid))
            soak.run()
            left = standing(url)
        finally:
            server.terminate()
            server.wait(60)
    return report(soak, left, asked)


def start(folder: Path) -> tuple[subprocess.Popen[str], str]:
    """Start a server with a cache and a state of its own; returns it and its URL."""
    root = str(Path(triptych.__file__).parents[1])
    own = {"TRIPTYCH_CACHE": str(folder), "OMP_NUM_THREADS": "1", "PYTHONPATH": root}
    devices = [f"--{role}=cpu" for role in ("encoder", "denoiser", "decoder")]
    server = subprocess.Popen(
        [sys.executable, "-m", "triptych", "serve", "--port", "0", "--threads", "1", *devices],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, **own},
    )
    assert server.stdout is not None
    line = server.stdout.readline()
    found = re.search(r"http://[\d.:]+", line)
    assert found, f"the server did not start: {line!r}"
    return server, found[0]


class Soak:
    """Many callers at once.

    Attributes:
        ends: of each request by number, how often each kind of end was told.
        pictures: the different files that each prompt and seed led to.
        failures: what went wrong on the way, by number.
        resident: of the server in bytes, after so many requests.
        seconds: of the whole.
    """

    def __init__(self, url: str, requests: int, at_once: int, server: psutil.Process) -> None:
        self.ends: dict[int, Counter[str]] = {}
        self.pictures: dict[int, set[int]] = {}
        self.failures: dict[int, str] = {}
        self.resident: dict[int, int] = {}
        self.ids: set[str] = set()
        self.seconds = 0.0
        self._url, self._count, self._at_once, self._server = url, requests, at_once, server
        self._numbers, self._lock = iter(range(requests)), threading.Lock()
        self._done = 0

    def run(self) -> None:
        began = time.perf_counter()
        callers = [threading.Thread(target=self._call) for _ in range(self._at_once)]
        for each in callers:
            each.start()
        for each in callers:
            each.join()
        self.seconds = time.perf_counter() - began

    def _call(self) -> None:
        with httpx.Client(base_url=self._url, timeout=TIMEOUT) as client:
            while True:
                with self._lock:
                    number = next(self._numbers, None)
                if number is None:
                    return
                try:
                    self._ask(client, number)
                except Exception as error:  # noqa: BLE001 (told at the end)
                    self.failures[number] = f"{type(error).__name__}: {error}"
                self._note()

    def _ask(self, client: httpx.Client, number: int) -> None:
        which = number % PROMPTS
        parameters = {"prompt": f"a red heart {which}", "seed": which, "num_inference_steps": 1, "exact": True}
        while (answer := client.post("/v1/requests", json={"parameters": parameters})).status_code == 429:
            time.sleep(float(answer.headers["Retry-After"]))
        request = answer.raise_for_status().json()
        with client.stream("GET", request["links"]["events"]) as stream:
            kinds = [line.removeprefix("event: ") for line in stream.iter_lines() if line.startswith("event: ")]
        content = client.get(request["links"]["result"]).raise_for_status().content
        with self._lock:
            assert request["id"] not in self.ids, "two requests of one id"
            self.ids.add(request["id"])
            self.ends[number] = Counter(kind for kind in kinds if kind in ("done", "failed", "cancelled"))
            self.pictures.setdefault(which, set()).add(hash(content))

    def _note(self) -> None:
        every = max(1, self._count // 50)
        with self._lock:
            self._done += 1
            if self._done % every == 0 or self._done == self._count:
                self.resident[self._done] = self._server.memory_info().rss
                print(f"{self._done}: {self.resident[self._done] / 1e6:.1f} MB", file=sys.stderr, flush=True)


def standing(url: str) -> dict[str, Any]:
    """Return what the server still has to do."""
    told = httpx.get(f"{url}/v1/status", timeout=60).json()
    running = sum(sum(each.get("running", {}).values()) for each in told["replicas"])
    return {"requests": told["requests"], "waiting": sum(told["waiting"].values()), "running": running}


def report(soak: Soak, left: dict[str, Any], asked: argparse.Namespace) -> int:
    """Print and write the figures; returns the exit code."""
    settled = {number: size for number, size in soak.resident.items() if number >= asked.since}
    base = settled[min(settled)]
    growth = max(settled.values()) / base - 1
    once = sum(ends == Counter(done=1) for ends in soak.ends.values())
    checks = {
        "none lost: every request is done": once == asked.requests and not soak.failures,
        "none answered twice": all(sum(ends.values()) == 1 for ends in soak.ends.values())
        and len(soak.ids) == asked.requests,
        "the same request makes the same picture": all(len(files) == 1 for files in soak.pictures.values()),
        f"memory within 5 % from request {asked.since} on": growth <= 0.05,
        "nothing is left to do": not any(left.values()),
    }
    figures = {
        "command": " ".join(["python bench/soak.py", *sys.argv[1:]]),
        "requests": asked.requests,
        "at once": asked.at_once,
        "requests a second": asked.requests / soak.seconds,
        "done": once,
        "failures": dict(list(soak.failures.items())[:10]),
        "resident, MB": {str(number): size / 1e6 for number, size in soak.resident.items()},
        "growth": growth,
        "left": left,
        "checks": checks,
    }
    print(json.dumps(figures, indent=2))
    asked.output.write_text(json.dumps(figures, indent=2) + "\n")
    for what, holds in checks.items():
        print(f"{what:<60}{'PASS' if holds else 'FAIL'}")
    return 0 if all(checks.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
