"""The comparison that every family's tests make: loaded whole, loaded by role, and diffusers give the same bits."""

import functools
import json
import os
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image

import triptych
from triptych.components.dtypes import emulated

ROLES = ("encoder", "denoiser", "decoder")

# What a family's tests run in. Each has a quick test in bfloat16 beside these, and `test_flux2_klein` all of them.
DTYPES = ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)]

# Far above rounding (1e-6), below the weakest real effect; of pixels between 0 and 1, on average.
VISIBLE = 5e-4

# Beyond `exact`: of one forward, relative to its largest value; of the final pixels, at 8 steps or fewer.
FORWARD_TOLERANCE = 2e-5
PIXEL_TOLERANCE = 1e-4


def count_from_the_first(scheduler: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have an oracle's scheduler begin at its first step, where its pipeline does not say so and noise levels are equal."""
    set_timesteps = scheduler.set_timesteps

    @functools.wraps(set_timesteps)  # whose signature pipelines look at
    def from_the_first(*args: Any, **options: Any) -> None:
        set_timesteps(*args, **options)
        scheduler.set_begin_index(0)

    monkeypatch.setattr(scheduler, "set_timesteps", from_the_first)


def in_both_dtypes(versions: Sequence[str]) -> list[Any]:
    """Every version in both dtypes; only the first is quick in bfloat16."""
    return [
        pytest.param((version, dtype), marks=pytest.mark.slow if dtype == "bfloat16" and version != versions[0] else ())
        for version in versions
        for dtype in ("float32", "bfloat16")
    ]


# One role in a process of its own: files in, files out, and the public API between. One job for each dtype. It waits for
# a line once its models are there, so that three such processes can start side by side.
PROCESS = """
import json, pathlib, sys
import PIL.Image, torch, triptych

torch.set_num_threads(1)
repo, role, *jobs = sys.argv[1:]
jobs = [job.split(":") for job in jobs]
models = {dtype: triptych.load(repo, role=role, device="cpu", dtype=dtype) for dtype, _, _ in jobs}
input()
for dtype, source, target in jobs:
    if role == "encoder":
        opened = lambda node: PIL.Image.open(node["picture"]) if "picture" in node else node
        work = triptych.Request(**json.loads(pathlib.Path(source).read_text(), object_hook=opened))
    else:
        work = triptych.State.from_bytes(pathlib.Path(source).read_bytes())
    pathlib.Path(target).write_bytes(models[dtype].run(work).to_bytes())
"""


class Parity:
    """One repository, loaded four ways: by diffusers, whole, and once for each role.

    Args:
        load_dtype: what we load it with, if not `dtype`; `auto` is to be `dtype`, or float32 where that is emulated.
    """

    def __init__(self, repo: Path, dtype: str = "float32", *, load_dtype: str | None = None) -> None:
        if load_dtype == "auto" and dtype in emulated():
            dtype = "float32"
        self.repo = repo
        self.dtype = dtype
        self.pipeline = DiffusionPipeline.from_pretrained(repo, dtype=getattr(torch, dtype))
        self.pipeline.set_progress_bar_config(disable=True)
        options = {"device": "cpu", "dtype": load_dtype or dtype}
        self.model = triptych.load(repo, **options)
        self.roles = {role: triptych.load(repo, role=role, **options) for role in ROLES}

    def diffusers(self, *, seed: int = 7, **call: Any) -> Any:
        """What diffusers' own pipeline returns."""
        result = self.pipeline(generator=torch.Generator("cpu").manual_seed(seed), **call)
        return result.frames if "frames" in result else result.images

    def whole(self, *, seed: int = 7, **call: Any) -> Any:
        """What a model gives that is loaded whole."""
        return output(self.model.generate(seed=seed, **call))

    def split(self, *, seed: int = 7, **call: Any) -> Any:
        """What three loads give, one a role, that hand over bytes."""
        state = self.roles[ROLES[0]].run(triptych.Request(seed=seed, **call))
        while state.next_role is not None:
            received = triptych.State.from_bytes(bytes(state.to_bytes()))
            state = self.roles[state.next_role.value].run(received)
        return output(state.result)

    def check(self, *, output_types: Iterable[str] = ("pt",), **call: Any) -> Any:
        """Prove that all three agree to the bit for each output type; returns the last one's output."""
        for output_type in output_types:
            expected = self.diffusers(output_type=output_type, **call)
            assert_same(self.whole(output_type=output_type, **call), expected, f"whole, {output_type}")
            assert_same(self.split(output_type=output_type, **call), expected, f"split, {output_type}")
        return expected

    def check_in_processes(self, folder: Path, call: Mapping[str, Any], dtypes: Iterable[str]) -> None:
        """Prove that three processes, one a role, that hand over files give what diffusers gives."""
        saved = count()

        def save(image: Image.Image) -> dict[str, str]:
            path = folder / f"{next(saved)}.png"
            image.save(path)
            return {"picture": str(path)}

        request = json.dumps({**call, "seed": 7, "output_type": "pt"}, default=save)
        files = {dtype: [folder / f"{dtype}.{role}" for role in ("request", *ROLES)] for dtype in dtypes}
        for request_file, *_ in files.values():
            request_file.write_text(request)
        running: list[subprocess.Popen[str]] = []
        try:
            for position, role in enumerate(ROLES):
                jobs = [f"{dtype}:{chain[position]}:{chain[position + 1]}" for dtype, chain in files.items()]
                running.append(start([PROCESS, str(self.repo), role, *jobs]))
            for role, process in zip(ROLES, running):
                _, errors = process.communicate("go\n", timeout=120)
                assert process.returncode == 0, f"{role}: {errors[-3000:]}"
        finally:
            for process in running:
                process.kill()
                process.wait()
        for dtype, chain in files.items():
            state = triptych.State.from_bytes(chain[-1].read_bytes())
            expected = (self if dtype == self.dtype else Parity(self.repo, dtype)).diffusers(output_type="pt", **call)
            assert_same(output(state.result), expected, f"processes, {dtype}")


def start(arguments: list[str]) -> "subprocess.Popen[str]":
    """Start a Python process that runs on one thread, as the tests do."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    return subprocess.Popen([sys.executable, "-c", *arguments], env=environment, text=True, **pipes)


def output(result: triptych.Result) -> Any:
    """The pictures or videos of a result."""
    return result.images if result.images is not None else result.frames


def assert_same(actual: Any, expected: Any, what: str) -> None:
    """Prove that two outputs are of one kind and equal to the bit: tensors, arrays, PIL images, or lists of those."""
    assert type(actual) is type(expected), f"{what}: a {type(actual).__name__}, expected a {type(expected).__name__}"
    if isinstance(expected, list):
        assert len(actual) == len(expected), f"{what}: {len(actual)} outputs, expected {len(expected)}"
        for number, (one, other) in enumerate(zip(actual, expected)):
            assert_same(one, other, f"{what}[{number}]")
    elif isinstance(expected, Image.Image):
        assert actual.mode == expected.mode, what
        assert_same(np.asarray(actual), np.asarray(expected), what)
    else:
        kind = f"{actual.dtype} {tuple(actual.shape)}, expected {expected.dtype} {tuple(expected.shape)}"
        assert actual.dtype == expected.dtype and actual.shape == expected.shape, f"{what}: {kind}"
        one, other = (torch.tensor(each) if isinstance(each, np.ndarray) else each for each in (actual, expected))
        difference = (one.double() - other.double()).abs().max()
        assert torch.equal(one, other), f"{what}: differs by up to {difference:.3g}"


def differ(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two outputs differ visibly; of another size they do."""
    return one.shape != other.shape or bool((one.float() - other.float()).abs().mean() > VISIBLE)


class Forwards:
    """Counts the forwards of a model's denoising stage and keeps what `advance` is handed."""

    def __init__(self, model: triptych.Model, stage: str, monkeypatch: Any, component: str = "transformer") -> None:
        self.count = 0
        self.predictions: list[list[torch.Tensor]] = []
        (denoising,) = (each for each in model.stages if each.name == stage)
        advance = denoising.advance

        def record(state: Any, i: int, prediction: list[torch.Tensor]) -> None:
            self.predictions.append(list(prediction))
            advance(state, i, prediction)

        def counted(*_: Any) -> None:
            self.count += 1

        monkeypatch.setattr(denoising, "advance", record)
        hook = model.components[component].register_forward_hook(counted)
        self.close = hook.remove

    def take(self) -> tuple[int, list[torch.Tensor]]:
        """Return the forwards so far and the first step's predictions, and start over."""
        taken = self.count, self.predictions[0]
        self.count, self.predictions = 0, []
        return taken


def assert_joined_within_tolerance(parity: Parity, stage: str, monkeypatch: Any, call: Mapping[str, Any]) -> None:
    """Prove that `exact=False` runs a step's guidance branches in one forward and stays within the tolerance.

    The forward is the first step's, where both have the same inputs.
    """
    steps = call["num_inference_steps"]
    forwards = Forwards(parity.model, stage, monkeypatch)
    try:
        exact = parity.whole(output_type="pt", **call)
        count, expected = forwards.take()
        joined = parity.whole(output_type="pt", exact=False, **call)
        joined_count, actual = forwards.take()
    finally:
        forwards.close()
    assert (count, joined_count) == (2 * steps, steps)
    of_forward = max(
        ((one - other).abs().max() / other.abs().max()).item() for one, other in zip(actual, expected, strict=True)
    )
    of_pixels = (joined - exact).abs().max().item()
    assert of_forward <= FORWARD_TOLERANCE, of_forward
    assert of_pixels <= PIXEL_TOLERANCE, of_pixels
