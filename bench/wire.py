"""What a hop costs before the network: `pack` and `unpack` of bfloat16 tensors against plain copies of that size.

One thread, all rows in the same run and interleaved, medians. Limits, the checksum's own time apart:
a fresh `pack` takes at most 1.3 fresh copies; `pack(out=...)` into a warm buffer reaches 60 % of the warm copy rate;
`unpack` takes at most 1.2 checksums, since it copies nothing. A fresh copy is the faster of what torch and numpy offer.
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import xxhash

from triptych.wire import pack, packed_size, unpack

PACK_LIMIT = 1.3  # fresh copies
OUT_LIMIT = 0.6  # of the warm copy rate
UNPACK_LIMIT = 1.2  # checksums


def measure(megabytes: int, tensors: int, repeats: int) -> dict[str, float]:
    """Return the median seconds of each row."""
    size = megabytes << 20
    source = torch.randint(0, 256, (size,), dtype=torch.uint8)
    parts = source.view(torch.bfloat16).chunk(tensors)
    fields = {f"embeds_{index}": part for index, part in enumerate(parts)}
    header = {"model": "0" * 64}
    pooled = torch.zeros(packed_size(fields, header), dtype=torch.uint8).numpy().data
    wire = bytes(pack(fields, header, out=pooled))
    warm = torch.zeros(size, dtype=torch.uint8)

    rows: dict[str, Callable[[], object]] = {
        "fresh copy (torch)": lambda: torch.empty(size, dtype=torch.uint8).copy_(source),
        "fresh copy (numpy)": lambda: torch.from_numpy(np.empty(size, np.uint8)).copy_(source),
        "warm copy": lambda: warm.copy_(source),
        "xxh3": lambda: xxhash.xxh3_64(wire).intdigest(),
        "pack": lambda: pack(fields, header),
        "pack(out)": lambda: pack(fields, header, out=pooled),
        "unpack": lambda: unpack(wire),
    }
    seconds: dict[str, list[float]] = {name: [] for name in rows}
    for repeat in range(repeats + 1):
        for name, row in rows.items():
            row()  # every row finds the caches as it left them itself, not as another did
            start = time.perf_counter()
            result = row()
            took = time.perf_counter() - start
            del result  # giving memory back is outside the clock
            if repeat:
                seconds[name].append(took)
    return {name: statistics.median(values) for name, values in seconds.items()}


def judge(seconds: dict[str, float]) -> list[tuple[str, float, str, bool]]:
    """Return (what, value, limit, held) of each limit."""
    fresh = min(seconds["fresh copy (torch)"], seconds["fresh copy (numpy)"])
    packed = (seconds["pack"] - seconds["xxh3"]) / fresh
    out = seconds["warm copy"] / (seconds["pack(out)"] - seconds["xxh3"])
    unpacked = seconds["unpack"] / seconds["xxh3"]
    return [
        ("pack, in fresh copies", packed, f"<= {PACK_LIMIT}", packed <= PACK_LIMIT),
        ("pack(out), of the warm copy rate", out, f">= {OUT_LIMIT}", out >= OUT_LIMIT),
        ("unpack, in checksums", unpacked, f"<= {UNPACK_LIMIT}", unpacked <= UNPACK_LIMIT),
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=64, help="size of all tensors, in MiB")
    parser.add_argument("--tensors", type=int, default=8, help="how many tensors share that size")
    parser.add_argument("--repeats", type=int, default=41)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    arguments = parser.parse_args()

    torch.set_num_threads(1)
    seconds = measure(arguments.megabytes, arguments.tensors, arguments.repeats)
    limits = judge(seconds)
    for name, median in seconds.items():
        print(f"{name:<34}{median * 1e3:9.2f} ms {arguments.megabytes / 1024 / median:8.2f} GiB/s")
    for what, value, limit, held in limits:
        print(f"{what:<34}{value:9.2f}    {limit:<7} {'PASS' if held else 'FAIL'}")
    if arguments.json:
        report = {
            "megabytes": arguments.megabytes,
            "tensors": arguments.tensors,
            "repeats": arguments.repeats,
            "machine": platform.platform(),
            "torch": torch.__version__,
            "seconds": seconds,
            "limits": [{"what": w, "value": v, "limit": limit, "held": held} for w, v, limit, held in limits],
        }
        arguments.json.write_text(json.dumps(report, indent=2) + "\n")
    return 0 if all(held for *_, held in limits) else 1


if __name__ == "__main__":
    raise SystemExit(main())
