"""Memory and time of loading one role, against its plan and against the plainest possible reading of the same tensors.

    python bench/memory.py [--model DIR] [--json FILE]

Makes a FLUX.2-klein-shaped model of about 450 MB with random weights (unless given one), then, each in a fresh process:

- loads every role in the checkpoint's dtype and with a cast to float32, and reads from /proc what it cost in resident
  memory beyond the interpreter with its libraries imported: after loading, after every weight was touched, and at peak;
- reads the same tensors with `safe_open` and clones each: the time to beat.

Limits: resident memory, peak included, <= 1.10 x planned bytes + 48 MB (with a cast: of anonymous memory, looked at every
5 ms; file pages are released as the files are done); loading time <= 1.25 x reading and cloning.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

SLACK = 48 * 2**20
SAMPLE = 0.005  # seconds between two looks at the memory
ROLES = ("encoder", "denoiser", "decoder", "monolithic")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, help="a model folder; made when not given")
    parser.add_argument("--repeats", type=int, default=5, help="runs of each kind; the quickest counts")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(measure(*options.child)))
        return 0
    if options.model:
        return report(options.model, options.repeats, options.json)
    with tempfile.TemporaryDirectory(prefix="triptych-memory-") as folder:
        return report(make_model(Path(folder, "model")), options.repeats, options.json)


def report(model: Path, repeats: int, target: Path | None) -> int:
    import triptych

    rows = []
    plans = {dtype: triptych.plan(model, dtype=dtype) for dtype in ("auto", "float32")}
    print(f"whole model: {plans['auto'].whole_bytes / 1e6:.0f} MB\n")
    print(
        f"{'role':<11}{'dtype':<9}{'planned':>9}{'loaded':>9}{'touched':>9}{'peak':>9}{'limit':>9}{'time':>9}{'ratio':>7}"
    )
    for role in ROLES:
        for dtype, plan in plans.items():
            planned = plan.role_bytes(role)
            # One after the other in turns, and the quickest of each: whatever else the machine does slows both.
            runs = [(child("load", role, dtype, model), child("read", role, dtype, model)) for _ in range(repeats)]
            loads = [load for load, _ in runs]
            seconds, plain = (min(run[k]["seconds"] for run in runs) for k in (0, 1))
            used = {key: statistics.median(run[key] for run in loads) for key in ("loaded", "touched", "peak")}
            limit = 1.10 * planned + SLACK
            row = {
                "role": role, "dtype": dtype, "planned": planned, **used, "limit": limit, "seconds": seconds,
                "read_and_clone_seconds": plain, "ratio": seconds / plain,
                "memory_ok": max(used.values()) <= limit,
                "time_ok": seconds <= 1.25 * plain,
            }  # fmt: skip
            rows.append(row)
            sizes = "".join(f"{row[key] / 1e6:>9.0f}" for key in ("planned", "loaded", "touched", "peak", "limit"))
            verdict = "ok" if row["memory_ok"] and row["time_ok"] else "OVER"
            print(f"{role:<11}{dtype:<9}{sizes}{seconds:>9.3f}{row['ratio']:>7.2f}  {verdict}", flush=True)
    print(
        "\nMB of memory beyond the imported libraries; seconds to load; ratio to reading and cloning the same tensors"
    )
    if target:
        target.write_text(json.dumps(rows, indent=1) + "\n")
    return 0 if all(row["memory_ok"] and row["time_ok"] for row in rows) else 1


def child(kind: str, role: str, dtype: str, model: Path) -> dict[str, float]:
    command = [sys.executable, __file__, "--model", str(model), "--child", kind, role, dtype]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    figures: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return figures


def measure(kind: str, role: str, dtype: str) -> dict[str, float]:
    """Load one role, or read its tensors plainly, in this fresh process; return bytes and seconds."""
    import time

    import torch

    torch.set_num_threads(1)
    model = Path(sys.argv[sys.argv.index("--model") + 1])
    return load_role(model, role, dtype, time.perf_counter) if kind == "load" else read_plainly(model, role, dtype)


def load_role(model: Path, role: str, dtype: str, clock) -> dict[str, float]:
    import torch
    from diffusers import AutoencoderKLFlux2, Flux2KleinPipeline, Flux2Transformer2DModel  # noqa: F401
    from transformers import Qwen2Tokenizer, Qwen3ForCausalLM  # noqa: F401

    from triptych.components.dtypes import parse_dtype
    from triptych.components.loading import load_component
    from triptych.pipelines.registry import open_family
    from triptych.roles import parse_roles

    family = open_family(model)
    needs = family.needs(parse_roles(role), family.tasks)
    dtypes = parse_dtype(dtype, family.repository)
    weighted = [name for name in needs if family.repository.weight_files(name)]
    others = [name for name in needs if name not in weighted]
    for name in others:
        load_component(family.repository, name, needs[name], device=torch.device("cpu"), dtypes=dtypes, role=role)
    warm_up()
    # With a cast the result is anonymous memory, and mapped source pages come and go; without one it is file pages.
    before, kinds = memory(), ("anon",) if dtype != "auto" else ("anon", "file")
    with sampled() as most:
        began = clock()
        loaded = {
            name: load_component(
                family.repository, name, needs[name], device=torch.device("cpu"), dtypes=dtypes, role=role
            )
            for name in weighted
        }
        seconds = clock() - began
    after = memory()
    for each in loaded.values():
        for tensor in (*each.component.parameters(), *each.component.buffers()):
            if not tensor.is_meta:
                tensor.view(-1)[:: 2048 // tensor.element_size()].clone()
    touched = memory()

    def used(now: dict[str, int]) -> int:
        return sum(now[kind] - before[kind] for kind in kinds)

    # The kernel notes the peak of all resident memory, not that of the anonymous part.
    anonymous = max(most["anon"] - before["anon"], used(after), used(touched))
    peak = touched["peak"] - before["rss"] if dtype == "auto" else anonymous
    return {"seconds": seconds, "loaded": used(after), "touched": used(touched), "peak": peak}


def read_plainly(model: Path, role: str, dtype: str) -> dict[str, float]:
    """Read the tensors that the role loads with `safe_open`, cloning (or casting) each."""
    import time

    import torch
    from safetensors import safe_open

    from triptych.components.blueprint import draw
    from triptych.pipelines.registry import open_family
    from triptych.roles import parse_roles

    family = open_family(model)
    wanted: dict[str, list[str]] = {}
    for name, need in family.needs(parse_roles(role), family.tasks).items():
        if family.repository.weight_files(name) and need.weights:
            target = torch.bfloat16
            for slot in draw(family.repository, name, need, dtype=target, device=torch.device("cpu"), role=role).slots:
                wanted.setdefault(slot.source.file, []).append(slot.source.key)
    warm_up()
    kept = []
    began = time.perf_counter()
    for file, keys in wanted.items():
        with safe_open(model / file, framework="pt") as opened:
            for key in keys:
                tensor = opened.get_tensor(key)
                kept.append(tensor.float() if dtype == "float32" and tensor.is_floating_point() else tensor.clone())
    return {"seconds": time.perf_counter() - began}


def warm_up() -> None:
    """Let torch and safetensors allocate what they allocate once."""
    import torch
    from safetensors.torch import load, save

    load(save({"x": torch.ones(4096).bfloat16().float()}))
    import gc

    gc.collect()


def memory() -> dict[str, int]:
    """Return this process's resident memory in bytes: anonymous, of files, in all, and the peak."""
    names = {"RssAnon:": "anon", "RssFile:": "file", "VmRSS:": "rss", "VmHWM:": "peak"}
    fields = [line.split()[:2] for line in Path("/proc/self/status").read_text().splitlines() if line]
    return {names[field[0]]: int(field[1]) * 1024 for field in fields if field and field[0] in names}


@contextmanager
def sampled() -> Iterator[dict[str, int]]:
    """Yield the most anonymous memory of this process, looked at every `SAMPLE` seconds until the end."""
    most, ended = {"anon": 0}, threading.Event()

    def look() -> None:
        while not ended.wait(SAMPLE):
            most["anon"] = max(most["anon"], memory()["anon"])

    looking = threading.Thread(target=look)
    looking.start()
    try:
        yield most
    finally:
        ended.set()
        looking.join()


def make_model(path: Path) -> Path:
    """Write a Flux2Klein model with random weights in bfloat16, its text encoder and transformer in shards."""
    import torch
    from diffusers import (
        AutoencoderKLFlux2,
        FlowMatchEulerDiscreteScheduler,
        Flux2KleinPipeline,
        Flux2Transformer2DModel,
    )
    from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

    from triptych import embedded

    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    text = Qwen3Config(
        hidden_size=512, intermediate_size=1024, num_hidden_layers=36, num_attention_heads=8, num_key_value_heads=4,
        head_dim=64, vocab_size=30000, tie_word_embeddings=True,
    )  # fmt: skip
    pipeline = Flux2KleinPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=AutoencoderKLFlux2(block_out_channels=(64, 128, 256, 256)),
        text_encoder=Qwen3ForCausalLM(text),
        tokenizer=AutoTokenizer.from_pretrained(embedded.path() / "tokenizer"),
        transformer=Flux2Transformer2DModel(
            in_channels=128, num_layers=2, num_single_layers=4, attention_head_dim=128, num_attention_heads=9,
            joint_attention_dim=3 * 512,
        ),
    )  # fmt: skip
    pipeline.save_pretrained(path, max_shard_size="100MB")
    return path


if __name__ == "__main__":
    sys.exit(main())
