"""What it brings that lanes of one process go one by one where they would hold each other up.

    (cd tests && python -m tiny flux2_klein /tmp/klein)       # a model whose forwards are mostly Python
    python bench/turns.py --model /tmp/klein --param height=64 --param width=64 --param max_sequence_length=32 \
        --param num_inference_steps=16

Requests a second with 16 clients in `LocalEngine`, requests kept apart: lanes side by side, one by one, and as they choose
themselves; and of a whole model, one request after another. In turn, so that all see the same machine; the median of the
rounds. Limit: what they choose is at least 0.9 of the better.

One thread in every lane. Writes bench/results/turns.json; exits 1 where the limit is not met.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

import torch
from split import throughput

from triptych import embedded
from triptych.engine.local import LanesReplica, LocalEngine
from triptych.roles import WORKERS
from triptych.runtime.turns import Turns

RESULTS = Path(__file__).parent / "results" / "turns.json"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=str(embedded.path()))
    parser.add_argument("--name", default="launch-bound", help="under which the figures are kept")
    parser.add_argument("--param", action="append", default=[], help="name=json, of every request")
    parser.add_argument("--requests", type=int, default=32, help="counted, of each round and way")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=RESULTS)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    parameters = {"prompt": "a red heart", "exact": True, "output_type": "pt"}
    parameters |= {name: json.loads(value) for name, _, value in (each.partition("=") for each in asked.param)}
    threads = dict.fromkeys(WORKERS, 1)
    rates: dict[str, list[float]] = {name: [] for name in ("whole", "side by side", "one by one", "chosen")}
    with LocalEngine(asked.model, dtype="float32", encoder="cpu", denoiser="cpu", decoder="cpu", threads=threads,
                     batching=False, prompt_cache=0) as engine:  # fmt: skip
        (replica,) = engine.router.replicas
        assert isinstance(replica, LanesReplica)
        for _ in range(asked.rounds):
            rates["whole"].append(1 / statistics.median(seconds(replica, parameters) for _ in range(5)))
            for name in ("side by side", "one by one", "chosen"):
                settle(replica.turns, name)
                rates[name].append(throughput(engine, parameters, asked.requests))
    middle = {name: statistics.median(each) for name, each in rates.items()}
    figures = {
        "command": " ".join(["python bench/turns.py", *sys.argv[1:]]),
        "requests/s": middle,
        "of each round": rates,
        "over the whole": {name: each / middle["whole"] for name, each in middle.items()},
        "checks": {
            "chosen >= 0.9 of the better": middle["chosen"] >= 0.9 * max(middle["side by side"], middle["one by one"])
        },
    }
    print(json.dumps(figures, indent=2))
    known = json.loads(asked.output.read_text()) if asked.output.exists() else {}
    asked.output.write_text(json.dumps({**known, asked.name: figures}, indent=2) + "\n")
    return 0 if all(figures["checks"].values()) else 1


def settle(turns: Turns, name: str) -> None:
    """Let lanes compute in a way from now on; `chosen` lets them find out anew."""
    turns.one_by_one = name == "one by one"
    turns._until = math.inf if turns.one_by_one else 0.0
    turns._spent = [-math.inf if name == "side by side" else 0.0, 0.0, 0.0]  # so long until they are judged


def seconds(replica: LanesReplica, parameters: dict[str, Any]) -> float:
    """Return the seconds of one request on the same weights, whole."""
    began = time.perf_counter()
    replica.model.generate(**parameters, seed=0)
    return time.perf_counter() - began


if __name__ == "__main__":
    sys.exit(main())
