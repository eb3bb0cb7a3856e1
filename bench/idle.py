"""What every family's roles hold, and how much of that they never read or read for nothing: tiny models, every task.

    python bench/idle.py [FAMILY ...] [--json FILE]

The measures are those of `tests/pipelines/tracing.py`; `tests/pipelines/test_nothing_idle.py` says what may be idle.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))


def main() -> int:
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"  # before the libraries are imported
    import tiny
    import torch
    from pipelines.tracing import CASES, table

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("families", nargs="*", help=f"some of {', '.join(sorted({case.family for case in CASES}))}")
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args()
    chosen = tuple(case for case in CASES if not options.families or case.family in options.families)
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    rows = []
    print(f"{'checkpoint':<32}{'tasks':<15}{'role':<12}{'held':>9}{'never read':>12}{'no effect':>11}  of these")
    with tempfile.TemporaryDirectory(prefix="triptych-idle-") as folder:
        for trace in table(
            lambda family, **variant: tiny.build(family, Path(tempfile.mkdtemp(dir=folder)), **variant), chosen
        ):
            vain = {name: size for name, size in trace.unused.items() if name not in trace.unread}
            held, never, vainly = (sum(each.values()) for each in (trace.held, trace.unread, vain))
            print(
                f"{trace.case:<32}{trace.tasks:<15}{trace.role:<12}{held:>9}{never:>12}{vainly:>11}  {names(trace.unused)}"
            )
            rows.append({"case": trace.case, "tasks": trace.tasks, "role": trace.role, "held": held}
                        | {"unread": dict(trace.unread), "read_in_vain": vain})  # fmt: skip
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2) + "\n")
    return 0


def names(tensors: Iterable[str], most: int = 2) -> str:
    """Return the first few names, shortened to their ends."""
    ends = [".".join(name.split(".")[-3:]) for name in tensors]
    return ", ".join(ends[:most]) + (f" and {len(ends) - most} more" if len(ends) > most else "")


if __name__ == "__main__":
    sys.exit(main())
