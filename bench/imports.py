"""What starting costs: `import triptych` and `triptych --help` in fresh processes, against the limits of the design.

The interpreter's own start is measured beside them and left out of the import, as it is nobody's to save; the command
is counted whole. Rows are interleaved, medians; the first round warms the file cache and is not counted.
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

IMPORT_LIMIT = 0.3  # seconds
HELP_LIMIT = 0.5  # seconds

ROWS = {
    "python -c pass": ["-c", "pass"],
    "import triptych": ["-c", "import triptych"],
    "triptych --help": ["-m", "triptych", "--help"],
    "triptych families": ["-m", "triptych", "families"],
}


def measure(repeats: int) -> dict[str, float]:
    """Return the median seconds of each row."""
    seconds: dict[str, list[float]] = {name: [] for name in ROWS}
    for repeat in range(repeats + 1):
        for name, arguments in ROWS.items():
            began = time.perf_counter()
            subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)
            took = time.perf_counter() - began
            if repeat:
                seconds[name].append(took)
    return {name: statistics.median(values) for name, values in seconds.items()}


def judge(seconds: dict[str, float]) -> list[tuple[str, float, float]]:
    """Return (what, seconds, limit) of each limit."""
    return [
        ("import triptych, itself", seconds["import triptych"] - seconds["python -c pass"], IMPORT_LIMIT),
        ("triptych --help, in all", seconds["triptych --help"], HELP_LIMIT),
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    arguments = parser.parse_args()

    seconds = measure(arguments.repeats)
    limits = judge(seconds)
    for name, median in seconds.items():
        print(f"{name:<28}{median * 1e3:8.1f} ms")
    for what, value, limit in limits:
        verdict = "PASS" if value < limit else "FAIL"
        print(f"{what:<28}{value * 1e3:8.1f} ms  {value / limit:5.2f} of {limit} s  {verdict}")
    if arguments.json:
        report = {
            "repeats": arguments.repeats,
            "machine": platform.platform(),
            "python": platform.python_version(),
            "seconds": seconds,
            "limits": [{"what": what, "seconds": s, "limit": limit, "held": s < limit} for what, s, limit in limits],
        }
        arguments.json.write_text(json.dumps(report, indent=2) + "\n")
    return 0 if all(value < limit for _, value, limit in limits) else 1


if __name__ == "__main__":
    raise SystemExit(main())
