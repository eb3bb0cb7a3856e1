"""Whether it pays to split: one request at a time against requests that overlap."""

from __future__ import annotations

from triptych.bench.load import Load

PAYS = 1.1
"""The gain in throughput from which on it does."""


def verdict(alone: Load, many: Load) -> str:
    """Say what overlapping the roles brings, and what bounds it."""
    gain = many.rate * alone.percentile(0.5)
    stages = alone.stage_seconds()
    busiest = max(stages, key=lambda name: stages[name])
    share = stages[busiest] / sum(stages.values())
    said = (
        f"{many.clients} clients get {gain:.2f} x the throughput of one request after another; {busiest} takes "
        f"{share:.0%} of a request."
    )
    if gain >= PAYS:
        return f"{said} Overlapping pays here."
    if 1 / share >= PAYS:
        return (
            f"{said} Its stages could give {1 / share:.2f} x on devices of their own: give the role of {busiest} one "
            "for itself, or leave the model whole."
        )
    return f"{said} There is little to overlap: if the model fits one device, leave it whole, or add whole replicas."
