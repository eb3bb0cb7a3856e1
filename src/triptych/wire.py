"""The wire form of a tree of fields: bytes that are one valid safetensors file, checked by an xxh3 checksum.

Layout: 8 bytes of header length (little endian), the JSON header padded with spaces, then the tensors' bytes by
descending element size, so that each is naturally aligned and no byte lies between two. The header begins with
`{"__metadata__":{"xxh3":"<16 hex digits>"`, so the checksum sits at a fixed place in every version of this format; it
is XXH3-64 of the whole file with those 16 digits as zeros. The other metadata entries are `format` (the version),
`header` and `fields` (JSON texts).

`fields` is a tree of values as `tree` writes it; the tensors it refers to are the file's.

Sources: https://github.com/huggingface/safetensors#format and
https://github.com/Cyan4973/xxHash/blob/dev/doc/xxhash_spec.md (canonical, big-endian digest).
"""

from __future__ import annotations

import json
import math
import struct
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
import xxhash

from triptych.errors import WireError
from triptych.tree import SAFETENSORS_NAMES, TreeReader, TreeWriter

JSON: TypeAlias = "None | bool | int | float | str | list[JSON] | dict[str, JSON]"

FORMAT_VERSION = 1
MAX_HEADER_BYTES = 100_000_000  # the safetensors library refuses longer headers
_MOST_DIMENSIONS = 64  # of a tensor: to multiply very many sizes takes minutes

_PREFIX = b'{"__metadata__":{"xxh3":"'
_DIGEST = slice(8 + len(_PREFIX), 8 + len(_PREFIX) + 16)
_ALIGNMENT = 64  # bytes; the data begins at a multiple of it, which suits vector loads
_ELEMENT = 8  # bytes; the largest element that safetensors knows

_DTYPES = {name: dtype for dtype, name in SAFETENSORS_NAMES.items()}
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
# torch warns once a process that a read-only buffer can be written through a tensor. Here that is known (see `unpack`),
# and using the warning up at import is safe where changing the filters around every call is not: in threads.
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    torch.frombuffer(b"\0", dtype=torch.uint8)


def pack(
    fields: Mapping[str, object], header: Mapping[str, JSON], *, out: memoryview | bytearray | None = None
) -> memoryview:
    """Return `fields` and `header` as the bytes of one safetensors file.

    Fields may hold tensors, generators, PIL images (modes 1, L, LA, RGB, RGBA; the current frame), numpy arrays and
    scalars, `torch.dtype`, `torch.Size`, str, int, float, bool, None, bytes, and lists, tuples and str-keyed dicts of
    these; the header plain JSON values. Tensors come back on the CPU, without gradient. An object met twice is written
    once and comes back as one object, unless it is a list, tuple or dict.

    The result views memory of its own or, with `out` (best at an address that is a multiple of 64, as `torch.empty`
    gives), the part of `out` that was filled. Raises `WireError`, naming the
    field, for anything that cannot come back as it was, and where `out` is too small, read-only, or holds a tensor that
    is to be packed.
    """
    draft = _draft(fields, header)
    target = _fresh(draft.size) if out is None else _byte_view(out)
    if target.readonly or len(target) < draft.size:
        problem = "read-only" if target.readonly else f"too small: {len(target)} bytes, where {draft.size} are needed"
        raise WireError(f"out is {problem}")
    target = target[: draft.size]
    _check_apart(draft, target)
    target[: len(draft.head)] = draft.head
    for offset, tensor, path in draft.tensors:
        try:
            _copy(tensor, target, offset)
        except RuntimeError as error:
            raise WireError(f"{path}: {error}") from error
    target[_DIGEST] = _digest(target)
    return target


def packed_size(fields: Mapping[str, object], header: Mapping[str, JSON]) -> int:
    """Return how many bytes `pack` would need; raises what it would raise."""
    return _draft(fields, header).size


def unpack(buffer: bytes | bytearray | memoryview) -> tuple[dict[str, object], dict[str, JSON]]:
    """Return the fields and the header that `pack` was given.

    Tensors and numpy arrays alias `buffer` and keep it alive: writing to one writes there, even where the buffer is
    read-only to Python, and the checksum no longer fits then. Only a buffer whose address is no multiple of 8 is copied.

    Raises `WireError` for anything that is not what `pack` writes; the checksum is verified before all else.
    """
    try:
        return _unpack(buffer)
    except WireError:
        raise
    except Exception as error:  # the bytes come from outside: whatever they provoke is their fault, not the program's
        raise WireError(f"malformed state: {type(error).__name__}: {error}") from error


@dataclass(frozen=True)
class _Draft:
    """A file before its data is written: all that precedes the data, and where each tensor (of which field) goes."""

    head: bytes
    tensors: list[tuple[int, torch.Tensor, str]]
    size: int


def _draft(fields: Mapping[str, object], header: Mapping[str, JSON]) -> _Draft:
    writer = TreeWriter()
    metadata = {"xxh3": "0" * 16, "format": str(FORMAT_VERSION)}
    metadata["header"] = _dump_header(header)
    metadata["fields"] = _dump(writer.mapping(fields, "", 0))
    entries: dict[str, object] = {"__metadata__": metadata}
    placed = []
    end = 0
    for name, (tensor, path) in sorted(writer.tensors.items(), key=lambda item: -item[1][0].element_size()):
        begin, end = end, end + tensor.numel() * tensor.element_size()
        shape, offsets = list(tensor.shape), [begin, end]
        entries[name] = {"dtype": SAFETENSORS_NAMES[tensor.dtype], "shape": shape, "data_offsets": offsets}
        placed.append((begin, tensor, path))
    text = _dump(entries).encode("ascii")
    text += b" " * (-(8 + len(text)) % _ALIGNMENT)
    if len(text) > MAX_HEADER_BYTES:
        raise WireError(f"all that is no tensor takes {len(text)} bytes, more than {MAX_HEADER_BYTES}")
    start = 8 + len(text)
    tensors = [(start + begin, tensor, path) for begin, tensor, path in placed]
    return _Draft(struct.pack("<Q", len(text)) + text, tensors, start + end)


def _check_apart(draft: _Draft, target: memoryview) -> None:
    begin = torch.frombuffer(target, dtype=torch.uint8).data_ptr()
    for _, tensor, path in draft.tensors:
        memory = tensor.untyped_storage()
        first, last = memory.data_ptr(), memory.data_ptr() + memory.nbytes()
        if tensor.device.type == "cpu" and first < begin + draft.size and begin < last:
            raise WireError(f"{path}: the tensor lies in the buffer that it should be written to")


def _copy(tensor: torch.Tensor, target: memoryview, offset: int) -> None:
    if not tensor.numel():
        return
    # As integers of the same size, so that no bit of a NaN can change; copy_ takes any strides and any device in one go.
    bits = _BITS[tensor.element_size()]
    source = tensor.detach().resolve_conj().resolve_neg().view(bits)
    if tensor.dtype is torch.bool:
        source = source.ne(0)  # torch takes any byte for true in places, and only 1 in others
    torch.frombuffer(target, dtype=bits, count=tensor.numel(), offset=offset).view(tensor.shape).copy_(source)


def _unpack(buffer: bytes | bytearray | memoryview) -> tuple[dict[str, object], dict[str, JSON]]:
    view = _byte_view(buffer)
    if len(view) < _DIGEST.stop or view[8 : _DIGEST.start] != _PREFIX:
        raise WireError(f"not a state: {len(view)} bytes that do not begin as one")
    if torch.frombuffer(view, dtype=torch.uint8).data_ptr() % _ELEMENT:
        view = np.array(view).data
    stored, computed = bytes(view[_DIGEST]), _digest(view)
    if stored != computed:
        raise WireError(f"checksum mismatch: the state says {stored!r}, its bytes give {computed!r}")
    start = 8 + int.from_bytes(view[:8], "little")
    if start > min(len(view), 8 + MAX_HEADER_BYTES) or start % _ELEMENT:
        raise WireError(f"a header of {start - 8} bytes does not fit a state of {len(view)} bytes")
    entries = _load(str(view[8:start], "ascii"))
    match entries.pop("__metadata__"):
        case {"format": str(version)} if version != str(FORMAT_VERSION):
            raise WireError(f"the state has format version {version}; this Triptych reads version {FORMAT_VERSION}")
        case {"xxh3": _, "format": str(), "header": str(header), "fields": str(fields), **rest} if not rest:
            reader = TreeReader(_tensors(entries, view, start))
        case _:
            raise WireError("unknown, missing or malformed metadata")
    tree = reader.mapping(_load(fields), "", 0)
    if unused := reader.tensors.keys() - reader.used:
        raise WireError(f"tensors that no field refers to: {sorted(unused)[:3]}")
    return tree, _load(header)


def _tensors(entries: Mapping[str, object], view: memoryview, start: int) -> dict[str, torch.Tensor]:
    """Return the tensors, after checking that they are aligned and fill the file in order, without hole or overlap."""
    tensors = {}
    begin = 0
    for name, entry in entries.items():
        match entry:
            case {"dtype": str(code), "shape": [*shape], "data_offsets": [first, last], **rest} if not rest:
                dtype = _DTYPES.get(code)
            case _:
                raise WireError(f"malformed entry of tensor {name!r}")
        if dtype is None:
            raise WireError(f"tensor {name!r} has the unknown dtype {code!r}")
        if len(shape) > _MOST_DIMENSIONS:
            raise WireError(f"tensor {name!r} has {len(shape)} dimensions, and at most {_MOST_DIMENSIONS} are accepted")
        if not all(type(number) is int and 0 <= number < 2**63 for number in (*shape, first, last)):
            raise WireError(f"tensor {name!r} has a size or an offset that is no integer of 0 to 2**63 - 1")
        if first != begin or first % dtype.itemsize or start + last > len(view):
            raise WireError(f"tensor {name!r} has offsets {first} to {last}, where {begin} is next")
        count = math.prod(shape)
        if math.prod(filter(None, shape)) >= 2**63 or last - first != count * dtype.itemsize:
            raise WireError(f"tensor {name!r} of shape {shape} and dtype {code} does not take {last - first} bytes")
        if count:
            flat = torch.frombuffer(view, dtype=dtype, count=count, offset=start + first)
        else:
            flat = torch.empty(0, dtype=dtype, device="cpu")
        if dtype is torch.bool and count and flat.view(torch.uint8).max() > 1:
            raise WireError(f"tensor {name!r} has a bool that is neither 0 nor 1")
        tensors[name] = flat.view(shape)
        begin = last
    if start + begin != len(view):
        raise WireError(f"{len(view) - start - begin} bytes at the end belong to no tensor")
    return tensors


def _fresh(size: int) -> memoryview:
    # np.empty neither fills with zeros nor faults in by small pages: numpy asks for huge ones. Its address is no multiple
    # of 64 though, and copying to such a one is a quarter slower.
    space = np.empty(size + _ALIGNMENT, np.uint8)
    return space[-space.ctypes.data % _ALIGNMENT :][:size].data


def _byte_view(buffer: bytes | bytearray | memoryview) -> memoryview:
    try:
        return memoryview(buffer).cast("B")
    except TypeError as error:
        raise WireError(f"not a contiguous buffer of bytes: {error}") from error


def _digest(view: memoryview) -> bytes:
    checksum = xxhash.xxh3_64(view[: _DIGEST.start])
    checksum.update(b"0" * 16)
    checksum.update(view[_DIGEST.stop :])
    return checksum.hexdigest().encode("ascii")


def _dump(node: object) -> str:
    return _ENCODER.encode(node)


def _dump_header(header: Mapping[str, JSON]) -> str:
    try:
        text = _dump(dict(header))
        if _load(text) == dict(header):
            return text
    except (RecursionError, TypeError, ValueError) as error:
        raise WireError(f"the header is not plain JSON: {error}") from error
    raise WireError("the header is not plain JSON: a tuple or a key that is no str")


def _load(text: str) -> dict[str, Any]:
    node = _DECODER.decode(text)
    if not isinstance(node, dict):
        raise WireError("the JSON of a state is no object")
    return node


def _distinct(pairs: list[tuple[str, object]]) -> dict[str, object]:
    node = dict(pairs)
    if len(node) != len(pairs):
        raise WireError("a JSON object has the same key twice")
    return node


def _refuse(constant: str) -> None:
    raise WireError(f"{constant} is not JSON")


_ENCODER = json.JSONEncoder(separators=(",", ":"), allow_nan=False)
_DECODER = json.JSONDecoder(object_pairs_hook=_distinct, parse_constant=_refuse)
