"""Safetensors headers: which tensors a weight file holds, without reading any of them.

Format: https://github.com/huggingface/safetensors#format - eight bytes of little-endian length, that much JSON, data.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass

from triptych.components.files import Files
from triptych.errors import ComponentFileError

ITEM_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "U16": 16, "I16": 16, "F16": 16, "BF16": 16, "U32": 32, "I32": 32, "F32": 32,
    "U64": 64, "I64": 64, "F64": 64, "C64": 64, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
}  # fmt: skip
"""Bits of one element, by the dtype's name in a header."""

MAX_HEADER = 100_000_000
"""The format's own limit for a header, in bytes."""


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor of a weight file."""

    file: str
    key: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int


def read_header(files: Files, name: str) -> tuple[dict[str, TensorInfo], int]:
    """Return the tensors of the weight file `name`, and the size in bytes that the whole file must have.

    Raises:
        ComponentFileError: the file is no safetensors file or its header is broken.
    """
    length = int.from_bytes(files.read(name, 0, 8), "little")
    if not 2 <= length <= MAX_HEADER:
        raise ComponentFileError(name, "is not a safetensors file (its header length makes no sense)")
    raw = files.read(name, 8, 8 + length)
    if len(raw) < length:
        raise ComponentFileError(name, f"is truncated: {len(raw)} of {length} header bytes are there")
    try:
        header = json.loads(raw)
        header.pop("__metadata__", None)
        tensors = {key: _tensor(name, key, entry) for key, entry in header.items()}
        end = max((int(entry["data_offsets"][1]) for entry in header.values()), default=0)
    except (ValueError, TypeError, KeyError, AttributeError, IndexError, RecursionError) as error:
        raise ComponentFileError(name, f"has a broken safetensors header ({type(error).__name__}: {error})") from error
    return tensors, 8 + length + end


def _tensor(file: str, key: str, entry: dict[str, object]) -> TensorInfo:
    dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]  # type: ignore[misc]
    bits = ITEM_BITS.get(str(dtype))
    if bits is None:
        raise ValueError(f"tensor {key!r} has the unknown dtype {dtype!r}")
    nbytes = math.prod(shape) * bits // 8  # type: ignore[arg-type]
    if nbytes != end - begin:
        raise ValueError(f"tensor {key!r} is {nbytes} bytes by its shape and {end - begin} by its offsets")
    return TensorInfo(file, key, str(dtype), tuple(shape), nbytes)  # type: ignore[arg-type]
