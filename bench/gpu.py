"""A published model's shapes, with random weights, on one GPU: whole against diffusers, split, and in shared forwards.

    python bench/gpu.py flux2-klein-4b                        # the configurations of docs/published, in bfloat16
    python bench/gpu.py wan2.1-t2v-1.3b --sizes 480 --frames 33
    python bench/gpu.py --model /tmp/klein --device cpu --sizes 64 --steps 2    # any repository: to try the script

For each size: seconds of one request and peak memory, by diffusers' pipeline and by the whole model;
the same request split on one card in `LocalEngine` (limit: 1.03 x the whole), with the seconds of each stage; and, for
models that make images, images a second with 16 clients against the rows that a forward may have.

The weights are noise: the pictures mean nothing, and equal those of diffusers. Writes bench/results/gpu.json; exits 1
where a limit is not met, or a picture differs.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import struct
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "tools"), str(ROOT / "tests")]

from diffusers import DiffusionPipeline

import triptych
from triptych.bench.load import closed_loop
from triptych.engine.local import LocalEngine
from triptych.roles import RoleType
from triptych.runtime.step_lane import StepLane

RESULTS = Path(__file__).parent / "results" / "gpu.json"
CLIENTS = 16
CHUNK = 2**25  # values written at a time
SCHEDULERS = {
    "Flux2KleinPipeline": {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0, "use_dynamic_shifting": True},
    "WanPipeline": {
        "_class_name": "UniPCMultistepScheduler", "prediction_type": "flow_prediction", "use_flow_sigmas": True,
        "flow_shift": 3.0,
    },
}  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("published", nargs="?", help="a folder of docs/published")
    parser.add_argument("--model", help="a repository instead, as it is")
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--sizes", type=int, nargs="+", default=[512, 1024], help="pixels of a side")
    parser.add_argument("--frames", type=int)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--requests", type=int, default=32, help="of each number of rows")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--output", type=Path, default=RESULTS)
    asked = parser.parse_args()
    if (asked.published is None) == (asked.model is None):
        parser.error("name a folder of docs/published, or --model")
    with tempfile.TemporaryDirectory(prefix="triptych-gpu-") as folder:
        source = asked.model or str(build(asked.published, Path(folder)))
        figures: dict[str, Any] = {"command": " ".join(["python bench/gpu.py", *sys.argv[1:]])}
        figures["device"] = torch.cuda.get_device_name(asked.device) if asked.device.startswith("cuda") else "cpu"
        figures["sizes"] = {str(size): measure(source, asked, size) for size in asked.sizes}
    figures["checks"] = {
        f"{size}: {name}": holds
        for size, each in figures["sizes"].items()
        for name, holds in each.pop("checks").items()
    }
    print(json.dumps(figures, indent=2))
    known = json.loads(asked.output.read_text()) if asked.output.exists() else {}
    asked.output.write_text(json.dumps({**known, asked.published or asked.model: figures}, indent=2) + "\n")
    return 0 if all(figures["checks"].values()) else 1


def build(name: str, target: Path) -> Path:
    """Make a repository with the configurations of a published checkpoint, and noise for weights."""
    from published import CHECKPOINTS, Published, lay_out
    from tiny import tokenizers

    checkpoint = Published.read(CHECKPOINTS / name)
    lay_out(checkpoint, target)
    for component, (_, kind) in checkpoint.entries.items():
        if "Tokenizer" in kind:
            (tokenizers.qwen() if "Qwen" in kind else tokenizers.unigram()).save_pretrained(target / component)
        elif component == "scheduler":
            text = json.dumps(SCHEDULERS[checkpoint.pipeline])
            (target / component / "scheduler_config.json").write_text(text)
    for file in target.rglob("*.safetensors"):
        fill(file)
    return target


def fill(file: Path) -> None:
    """Write noise of deviation 0.02 over a weight file's data; vectors are ones, as norms begin."""
    where = "cuda" if torch.cuda.is_available() else "cpu"  # a CPU takes minutes for some billions of numbers
    kinds = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
    with file.open("r+b") as stream:
        (length,) = struct.unpack("<Q", stream.read(8))
        header = json.loads(stream.read(length))
        for entry in header.values():
            if entry.get("dtype") not in kinds:
                continue
            stream.seek(8 + length + entry["data_offsets"][0])
            left = int(torch.Size(entry["shape"]).numel())
            while left:
                count = min(left, CHUNK)
                one = len(entry["shape"]) < 2
                values = torch.ones(count, device=where) if one else torch.randn(count, device=where) * 0.02
                stream.write(values.to(kinds[entry["dtype"]]).cpu().view(torch.uint8).numpy().tobytes())
                left -= count


def measure(source: str, asked: argparse.Namespace, size: int) -> dict[str, Any]:
    """Return the figures of one size."""
    parameters: dict[str, Any] = {"prompt": "a red fox", "height": size, "width": size, "output_type": "pt"}
    parameters["num_inference_steps"] = asked.steps
    if asked.frames:
        parameters["num_frames"] = asked.frames

    theirs, ours = by_diffusers(source, parameters, asked), by_whole(source, parameters, asked)
    same = torch.equal(theirs.pop("made").cpu(), ours.pop("made").cpu())
    free()
    devices = dict.fromkeys(("encoder", "denoiser", "decoder"), asked.device)
    with LocalEngine(source, **devices, dtype="bfloat16", prompt_cache=0, batching=False) as engine:
        split = timed(lambda: made(engine.generate(**parameters, seed=0, exact=True)), asked)
        stages = dict(engine.generate(**parameters, seed=0, exact=True).timings)
        same &= torch.equal(split.pop("made").cpu(), made(engine.generate(**parameters, seed=0, exact=True)).cpu())
        lane = engine.router.replicas[0].lanes[RoleType.DENOISER]  # type: ignore[attr-defined]
        shared = (
            {}
            if asked.frames
            else {str(rows): images_a_second(engine, lane, parameters, asked, rows) for rows in asked.rows}
        )
    free()
    return {
        "diffusers": theirs,
        "whole": ours,
        "split on one card": split,
        "stages, s": stages,
        "images/s against rows of a forward": shared,
        "checks": {
            "split <= 1.03 x whole": split["seconds"] <= 1.03 * ours["seconds"],
            "the pictures are diffusers'": same,
        },
    }


def by_diffusers(source: str, parameters: dict[str, Any], asked: argparse.Namespace) -> dict[str, Any]:
    """Return what the model's own pipeline takes, and makes."""
    free()
    pipeline = DiffusionPipeline.from_pretrained(source, torch_dtype=torch.bfloat16).to(asked.device)
    pipeline.set_progress_bar_config(disable=True)
    return timed(lambda: pipeline(**parameters, generator=torch.Generator("cpu").manual_seed(0))[0], asked)


def by_whole(source: str, parameters: dict[str, Any], asked: argparse.Namespace) -> dict[str, Any]:
    """Return what the whole model takes, and makes."""
    free()
    whole = triptych.load(source, device=asked.device, dtype="bfloat16")
    return timed(lambda: made(whole.generate(**parameters, seed=0)), asked)


def timed(make: Callable[[], Any], asked: argparse.Namespace) -> dict[str, Any]:
    """Return the median seconds of what makes something, the peak of memory meanwhile, and what it made."""
    on_gpu = asked.device.startswith("cuda")
    thing = make()  # warms up
    if on_gpu:
        torch.cuda.synchronize(asked.device)
        torch.cuda.reset_peak_memory_stats(asked.device)
    seconds = []
    for _ in range(asked.repeats):
        began = time.perf_counter()
        thing = make()
        if on_gpu:
            torch.cuda.synchronize(asked.device)
        seconds.append(time.perf_counter() - began)
    peak = torch.cuda.max_memory_allocated(asked.device) if on_gpu else 0
    # Free memory belongs to the stream it was freed on: lanes hold more of it than one process that does all in turn.
    reserved = torch.cuda.max_memory_reserved(asked.device) if on_gpu else 0
    return {
        "seconds": statistics.median(seconds),
        "peak, GB": peak / 1e9,
        "reserved at most, GB": reserved / 1e9,
        "made": thing,
    }


def made(result: triptych.Result) -> torch.Tensor:
    output = result.images if result.images is not None else result.frames
    assert isinstance(output, torch.Tensor)
    return output


def images_a_second(
    engine: LocalEngine, lane: StepLane, parameters: dict[str, Any], asked: argparse.Namespace, rows: int
) -> float:
    """Return images a second while 16 clients ask and a forward may have so many rows."""
    model = lane.model
    state = model.admit(triptych.Request(**parameters, seed=0))
    for _ in model.segment(state):
        raise AssertionError("the encoder has no steps")
    turn = next(model.segment(state))
    lane.budget = rows * turn.forwards[0].size if rows > 1 else 0

    def ask(number: int) -> dict[str, float]:
        return engine.generate(**parameters, seed=number, exact=False).timings

    return closed_loop(ask, asked.requests, CLIENTS).rate


def free() -> None:
    """Give back what nobody holds any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


if __name__ == "__main__":
    sys.exit(main())
