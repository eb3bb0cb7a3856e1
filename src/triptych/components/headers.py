"""Safetensors headers: which tensors a weight file holds, without reading any of them.

Format: https://github.com/huggingface/safetensors#format - eight bytes of little-endian length, that much JSON, data.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass

from triptych.components.files import Files
from triptych.errors import ComponentFileError

ITEM_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "U16": 16, "I16": 16, "F16": 16, "BF16": 16, "U32": 32, "I32": 32, "F32": 32,
    "U64": 64, "I64": 64, "F64": 64, "C64": 64, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
}  # fmt: skip
"""Bits of one element, by the dtype's name in a header."""

MOST_DIMENSIONS = 64
"""Of a tensor: no weight has nearly as many."""
MAX_HEADER = 100_000_000
"""The format's own limit for a header, in bytes."""
FIRST_READ = 65_536
"""Bytes asked for at first: most headers fit, and then one request to the hub is enough."""


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor of a weight file; `start` is where it begins in the file's data."""

    file: str
    key: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    nbytes: int


def read_header(files: Files, name: str) -> tuple[dict[str, TensorInfo], int]:
    """Return the tensors of the weight file `name`, and the size in bytes that the whole file must have.

    Raises:
        ComponentFileError: the file is no safetensors file or its header is broken.
    """
    first = files.read(name, 0, FIRST_READ)
    length = int.from_bytes(first[:8], "little")
    if first.startswith(b"version https://git-lfs"):
        raise ComponentFileError(name, "is a Git LFS pointer, not the file itself (`git lfs pull` brings it)")
    if len(first) < 8 or not 2 <= length <= MAX_HEADER:
        raise ComponentFileError(name, "is not a safetensors file (its header length makes no sense)")
    raw = first[8 : 8 + length]
    if len(raw) < length and len(first) == FIRST_READ:
        raw += files.read(name, FIRST_READ, 8 + length)
    if len(raw) < length:
        raise ComponentFileError(name, f"is truncated: {len(raw)} of {length} header bytes are there")
    try:
        header = json.loads(raw)
        header.pop("__metadata__", None)
        tensors = {key: _tensor(name, key, entry) for key, entry in header.items()}
        end = _check_contiguous(tensors.values())
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ComponentFileError(name, f"has a broken safetensors header ({type(error).__name__}: {error})") from error
    return tensors, 8 + length + end


def _tensor(file: str, key: str, entry: dict[str, object]) -> TensorInfo:
    dtype, shape, (start, end) = entry["dtype"], _counts(entry["shape"]), _counts(entry["data_offsets"])
    bits = ITEM_BITS.get(str(dtype))
    if bits is None:
        raise ValueError(f"tensor {key!r} has the unknown dtype {dtype!r}")
    nbytes = math.prod(shape) * bits // 8
    if nbytes != end - start:
        raise ValueError(f"tensor {key!r} is {nbytes} bytes by its shape and {end - start} by its offsets")
    return TensorInfo(file, key, str(dtype), shape, start, nbytes)


def _counts(value: object) -> tuple[int, ...]:
    # Bounded: to multiply many long numbers takes minutes.
    if not isinstance(value, list) or len(value) > MOST_DIMENSIONS or not all(map(_is_size, value)):
        raise ValueError(f"{str(value)[:80]} should be a list of sizes")
    return tuple(value)


def _is_size(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _check_contiguous(tensors: Iterable[TensorInfo]) -> int:
    """Check that the tensors lie side by side, as the format demands; returns where the last one ends."""
    end = 0
    for tensor in sorted(tensors, key=lambda each: (each.start, each.nbytes)):
        if tensor.start != end:
            raise ValueError(f"tensor {tensor.key!r} starts at {tensor.start}, but the one before it ends at {end}")
        end += tensor.nbytes
    return end
