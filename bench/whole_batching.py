"""What running whole segments together brings: texts encoded and pictures decoded one by one, and as many at once.

    python bench/whole_batching.py                                  # the embedded model
    python bench/whole_batching.py --model PATH --name launch-bound # a model whose calls are mostly overhead

For the encoder and the decoder, on one lane each: `WAITING` segments of different prompts and seeds that wait together,
run apart, in calls of 2, 4 and 8 rows, and in as many as the lane finds worth it by itself. In requests a second; the
best of each of the rounds, in turn, so that all see the same machine. And of the lane that learns, how far what comes
out is from its single run.

Limits: what the lane finds is never below 0.97 of one by one, and everything within 1e-4 of its single run.

One thread. Writes bench/results/whole_batching.json; exits 1 where a limit is not met.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

import torch

import triptych
from triptych import embedded
from triptych.request import Request
from triptych.roles import RoleType
from triptych.runtime.decoder_lane import DecoderLane
from triptych.runtime.lanes import Lane, Work
from triptych.runtime.model import Model
from triptych.runtime.pace import Appetite
from triptych.runtime.segment import finish
from triptych.state import State

RESULTS = Path(__file__).parent / "results" / "whole_batching.json"
WAITING = 32
TOLERANCE = 1e-4
WAYS: dict[str, int | None] = {"one by one": 0, "2": 2, "4": 4, "8": 8, "learned": None}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=str(embedded.path()))
    parser.add_argument("--name", default="embedded", help="under which the figures are kept")
    parser.add_argument("--param", action="append", default=[], help="name=json, of every request")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--output", type=Path, default=RESULTS)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    given = {name: json.loads(value) for name, _, value in (each.partition("=") for each in asked.param)}
    model = triptych.load(asked.model, device=asked.device, dtype=asked.dtype)
    states = [model.admit(Request(**request(number, given))) for number in range(WAITING)]
    figures: dict[str, Any] = {"command": " ".join(["python bench/whole_batching.py", *sys.argv[1:]])}
    checks: dict[str, bool] = {}
    while (role := states[0].next_role) is not None:
        finished = [alone(model, state) for state in states]
        if role is not RoleType.DENOISER:
            found, worst = measure(model, role, states, finished, asked.rounds)
            figures[role.value] = {"requests/s": found, "difference from the single run": worst}
            checks[f"{role.value}: never below 0.97 of one by one"] = found["learned"] >= 0.97 * found["one by one"]
            checks[f"{role.value}: within the tolerance"] = worst <= TOLERANCE
        states = finished
    figures["checks"] = checks
    print(json.dumps(figures, indent=2))
    known = json.loads(asked.output.read_text()) if asked.output.exists() else {}
    asked.output.write_text(json.dumps({**known, asked.name: figures}, indent=2) + "\n")
    return 0 if all(checks.values()) else 1


def request(number: int, given: dict[str, Any]) -> dict[str, Any]:
    """Return the parameters of one of the requests: no two have the same prompt.

    Without guidance: the negative prompt, the same for all, would be computed once where texts are encoded together.
    """
    colour, thing = ("red", "green", "blue", "golden")[number % 4], ("heart", "tree", "car", "star")[number // 4 % 4]
    asked = {"prompt": f"a {colour} {thing} number {number}", "seed": number, "num_inference_steps": 2}
    return {**asked, "guidance_scale": 1.0, "output_type": "pt", "exact": False, **given}


def alone(model: Model, state: State) -> State:
    """Return a state after its next segment, run by itself."""
    copy = state.copy()
    finish(model.segment(copy))
    return copy


def measure(
    model: Model, role: RoleType, states: list[State], expected: list[State], rounds: int
) -> tuple[dict[str, float], float]:
    """Return requests a second each way, and the largest difference of the learned way's results from `expected`."""
    kind = DecoderLane if role is RoleType.DECODER else Lane
    lanes = {way: kind(model, way, threads=1, rows=rows) for way, rows in WAYS.items()}
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    results: list[State] = []
    for number in range(rounds + 2):  # the first ones warm up, and are learned from
        for way, lane in lanes.items():
            rows = WAYS[way]
            if rows:
                lane._appetites.clear()
                lane._appetites.update({lane._kind(Work(state, print)): Appetite(rows) for state in states})
            took, outcomes = run(lane, states)
            if number > 1:
                seconds[way].append(took)
            if way == "learned":
                results = outcomes
    for lane in lanes.values():
        lane.close()
    worst = max(difference(one.fields, other.fields) for one, other in zip(results, expected))
    return {way: round(len(states) / min(taken), 2) for way, taken in seconds.items()}, worst


def run(lane: Lane, states: list[State]) -> tuple[float, list[State]]:
    """Return the seconds that a lane takes for states that wait together, and what it makes of them."""
    outcomes: dict[int, Any] = {}
    began: list[float] = []
    held, ended = threading.Event(), threading.Event()

    def begin(_: Any) -> None:
        held.wait()
        began.append(time.perf_counter())

    def done(number: int, outcome: Any) -> None:
        outcomes[number] = outcome
        if len(outcomes) == len(states):
            ended.set()

    lane.put(Work(states[0].copy(), begin, deadline=time.monotonic() - 1))  # holds the lane up until all are there
    for number, state in enumerate(states):
        lane.put(Work(state.copy(), lambda outcome, number=number: done(number, outcome)))  # type: ignore[misc]
    held.set()
    ended.wait()
    took = time.perf_counter() - began[0]
    if failed := [outcome for outcome in outcomes.values() if isinstance(outcome, Exception)]:
        raise failed[0]
    return took, [outcomes[number] for number in range(len(states))]


def difference(one: Any, other: Any) -> float:
    """Return by how much two values' tensors differ at most, relative to the largest where that is above 1.

    Infinity where that is no number: NaN would be within any limit.
    """
    if isinstance(one, torch.Tensor) and one.numel():
        largest = max(1.0, other.abs().max().item())
        most = float((one.double() - other.double()).abs().max().item() / largest)
        return most if math.isfinite(most) else math.inf
    if isinstance(one, dict):
        return max(difference(value, other[name]) for name, value in one.items())
    if isinstance(one, (list, tuple)):
        return max((difference(*pair) for pair in zip(one, other)), default=0.0)
    return 0.0


if __name__ == "__main__":
    sys.exit(main())
