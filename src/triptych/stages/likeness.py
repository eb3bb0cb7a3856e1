"""Whether values are alike, as something hashable that can be kept and looked up."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any


def likeness(value: Any) -> Hashable | None:
    """Return what equals only for equal values, tensors bit by bit; None for values that cannot be compared."""
    import torch
    import xxhash

    if value is None or isinstance(value, (str, bool, int, float, torch.dtype, torch.device)):
        return type(value).__name__, str(value)
    if isinstance(value, torch.Tensor):
        bits = value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy() if value.numel() else b""
        return "tensor", str(value.dtype), tuple(value.shape), xxhash.xxh3_128_hexdigest(memoryview(bits))  # type: ignore[arg-type]
    if isinstance(value, (list, tuple)):
        keys = [likeness(each) for each in value]
        return None if None in keys else (type(value).__name__, *keys)
    if isinstance(value, dict):
        entries = [(name, likeness(each)) for name, each in sorted(value.items())]
        return None if any(each is None for _, each in entries) else ("dict", *entries)
    return None
