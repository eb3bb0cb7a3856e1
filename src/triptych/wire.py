"""The wire form of a tree of fields: bytes that are one valid safetensors file, checked by an xxh3 checksum.

Layout: 8 bytes of header length (little endian), the JSON header padded with spaces, then the tensors' bytes by
descending element size, so that each is naturally aligned and no byte lies between two. The header begins with
`{"__metadata__":{"xxh3":"<16 hex digits>"`, so the checksum sits at a fixed place in every version of this format; it
is XXH3-64 of the whole file with those 16 digits as zeros. The other metadata entries are `format` (the version),
`header` and `fields` (JSON texts).

In `fields` plain values stand for themselves and everything else is an object with one key, the tag: `$tensor`,
`$array`, `$scalar`, `$bytes` ([tensor]), `$generator` ([tensor, device type]), `$image` ([tensor, mode, info]),
`$tuple`, `$size`, `$dtype`, `$int` (hex, beyond 64 bits), `$float` (16 hex digits: a NaN or an infinity). Keys of the
caller's own that begin with `$` get a second one.

Sources: https://github.com/huggingface/safetensors#format and
https://github.com/Cyan4973/xxHash/blob/dev/doc/xxhash_spec.md (canonical, big-endian digest).
"""

from __future__ import annotations

import json
import math
import re
import struct
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
import torch
import xxhash
from PIL import Image

from triptych.errors import WireError

JSON: TypeAlias = "None | bool | int | float | str | list[JSON] | dict[str, JSON]"

FORMAT_VERSION = 1
MAX_HEADER_BYTES = 100_000_000  # the safetensors library refuses longer headers
MAX_DEPTH = 64  # levels of containers; far from the interpreter's recursion limit

_PREFIX = b'{"__metadata__":{"xxh3":"'
_DIGEST = slice(8 + len(_PREFIX), 8 + len(_PREFIX) + 16)
_ALIGNMENT = 64  # bytes; the data begins at a multiple of it, which suits vector loads
_ELEMENT = 8  # bytes; the largest element that safetensors knows

_NAMES = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.float8_e4m3fnuz: "F8_E4M3FNUZ",
    torch.float8_e5m2fnuz: "F8_E5M2FNUZ",
    torch.uint16: "U16",
    torch.int16: "I16",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.uint32: "U32",
    torch.int32: "I32",
    torch.float32: "F32",
    torch.uint64: "U64",
    torch.int64: "I64",
    torch.float64: "F64",
    torch.complex64: "C64",
}
_DTYPES = {name: dtype for dtype, name in _NAMES.items()}
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_ALL_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in vars(torch).values() if type(dtype) is torch.dtype}
_IMAGE_MODES = ("1", "L", "LA", "RGB", "RGBA")
# What Pillow keeps beside the pixels and a stage's reading depends on (orientation, colour key, profile).
_IMAGE_INFO = ("exif", "xmp", "XML:com.adobe.xmp", "Raw profile type exif", "transparency", "icc_profile")

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
    writer = _Writer()
    metadata = {"xxh3": "0" * 16, "format": str(FORMAT_VERSION)}
    metadata["header"] = _dump_header(header)
    metadata["fields"] = _dump(writer.mapping(fields, "", 0))
    entries: dict[str, object] = {"__metadata__": metadata}
    placed = []
    end = 0
    for name, (tensor, path) in sorted(writer.tensors.items(), key=lambda item: -item[1][0].element_size()):
        begin, end = end, end + tensor.numel() * tensor.element_size()
        shape, offsets = list(tensor.shape), [begin, end]
        entries[name] = {"dtype": _NAMES[tensor.dtype], "shape": shape, "data_offsets": offsets}
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


@dataclass
class _Writer:
    """Turns values into JSON and collects the tensors it refers to, each with its field."""

    tensors: dict[str, tuple[torch.Tensor, str]] = field(default_factory=dict)
    written: dict[int, tuple[object, object]] = field(default_factory=dict)  # holds the object, so its id stays taken

    def value(self, value: object, path: str, depth: int) -> object:
        # Types are compared exactly: a subclass (an enum, a named tuple) would come back as something else.
        if depth > MAX_DEPTH:
            raise WireError(f"{path}: nested deeper than {MAX_DEPTH} levels, or in itself")
        if value is None or type(value) is bool or type(value) is str:
            return value
        if type(value) is int:
            return value if -(2**63) <= value < 2**63 else {"$int": f"{value:x}"}
        if type(value) is float:
            return value if math.isfinite(value) else {"$float": struct.pack(">d", value).hex()}
        if type(value) is dict:
            return self.mapping(value, path, depth)
        if type(value) is list or type(value) is tuple:
            items = [self.value(item, f"{path}[{index}]", depth + 1) for index, item in enumerate(value)]
            return items if type(value) is list else {"$tuple": items}
        if id(value) not in self.written:
            try:
                self.written[id(value)] = value, self.leaf(value, path, depth)
            except (OSError, RuntimeError, TypeError, ValueError) as error:
                raise WireError(f"{path}: {_type_name(value)} cannot be carried: {error}") from error
        return self.written[id(value)][1]

    def mapping(self, value: Mapping[str, object], path: str, depth: int) -> dict[str, object]:
        node = {}
        for key, item in value.items():
            if type(key) is not str:
                raise WireError(f"{_child(path, key)}: a key must be str, not {_type_name(key)}")
            node["$" + key if key.startswith("$") else key] = self.value(item, _child(path, key), depth + 1)
        return node

    def leaf(self, value: object, path: str, depth: int) -> object:
        if isinstance(value, torch.Tensor) and type(value) in (torch.Tensor, torch.nn.Parameter):
            return {"$tensor": [self.store(value, path)]}
        if isinstance(value, torch.Generator):
            return {"$generator": [self.store(value.get_state(), path), value.device.type]}
        if isinstance(value, Image.Image) and value.mode in _IMAGE_MODES:
            info = {key: value.info[key] for key in _IMAGE_INFO if key in value.info}
            info = {key: str(item) if isinstance(item, str) else item for key, item in info.items()}  # PNG: subclass
            pixels = self.store(torch.from_numpy(np.array(value)), path)
            return {"$image": [pixels, value.mode, self.value(info, f"{path}.info", depth + 1)]}
        if type(value) is np.ndarray or isinstance(value, np.generic):
            array = torch.from_numpy(np.array(value, order="C"))
            return {"$array" if type(value) is np.ndarray else "$scalar": [self.store(array, path)]}
        if type(value) is bytes:
            return {"$bytes": [self.store(torch.from_numpy(np.frombuffer(bytearray(value), np.uint8)), path)]}
        if isinstance(value, torch.dtype):
            return {"$dtype": str(value).removeprefix("torch.")}
        if isinstance(value, torch.Size):
            return {"$size": [self.value(int(size), path, depth) for size in value]}
        mode = f" of mode {value.mode}" if isinstance(value, Image.Image) else ""
        raise WireError(f"{path}: a value of type {_type_name(value)}{mode} cannot be carried")

    def store(self, tensor: torch.Tensor, path: str) -> str:
        """Keep the tensor for the file under a name that a person recognises; return the name."""
        if tensor.is_meta:
            raise WireError(f"{path}: a meta tensor has no data to carry")
        if tensor.layout is not torch.strided or tensor.dtype not in _NAMES:
            raise WireError(f"{path}: a tensor of dtype {tensor.dtype} and layout {tensor.layout} cannot be carried")
        name = path.encode("ascii", "backslashreplace").decode("ascii")
        while name in self.tensors or name == "__metadata__":
            name += "'"
        self.tensors[name] = tensor, path
        return name


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
            reader = _Reader(_tensors(entries, view, start))
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


@dataclass
class _Reader:
    """Turns the JSON of a `_Writer` back into values."""

    tensors: dict[str, torch.Tensor]
    used: set[str] = field(default_factory=set)
    made: dict[tuple[str, str], object] = field(default_factory=dict)

    def value(self, node: object, path: str, depth: int) -> object:
        if depth > MAX_DEPTH:
            raise WireError(f"{path}: nested deeper than {MAX_DEPTH} levels")
        if isinstance(node, list):
            return [self.value(item, f"{path}[{index}]", depth + 1) for index, item in enumerate(node)]
        if isinstance(node, dict):
            tag = next(iter(node), "")
            return (
                self.tagged(tag, node[tag], path, depth)
                if len(node) == 1 and _is_tag(tag)
                else self.mapping(node, path, depth)
            )
        if isinstance(node, float) and not math.isfinite(node):
            raise WireError(f"{path}: a number out of range")
        return node

    def mapping(self, node: Mapping[str, object], path: str, depth: int) -> dict[str, object]:
        tree = {}
        for key, item in node.items():
            if _is_tag(key):
                raise WireError(f"{path}: the tag {key!r} among other keys")
            key = key.removeprefix("$")
            tree[key] = self.value(item, _child(path, key), depth + 1)
        return tree

    def tagged(self, tag: str, node: object, path: str, depth: int) -> object:
        match tag, node:
            case "$int", str(text) if re.fullmatch("-?[0-9a-f]+", text):
                return int(text, 16)
            case "$float", str(text) if re.fullmatch("[0-9a-f]{16}", text):
                return struct.unpack(">d", bytes.fromhex(text))[0]
            case "$tuple", [*items]:
                return tuple([self.value(item, f"{path}[{index}]", depth + 1) for index, item in enumerate(items)])
            case "$size", [*sizes]:
                numbers = [self.value(size, path, depth) for size in sizes]
                if all(type(number) is int for number in numbers):
                    return torch.Size(numbers)  # type: ignore[arg-type]
            case "$dtype", str(name) if name in _ALL_DTYPES:
                return _ALL_DTYPES[name]
            case _, [str(name), *rest] if name in self.tensors:
                if (tag, name) not in self.made:
                    self.used.add(name)
                    try:
                        self.made[tag, name] = self.leaf(tag, self.tensors[name], rest, path, depth)
                    except (LookupError, RuntimeError, TypeError, ValueError) as error:
                        raise WireError(f"{path}: {tag} cannot be restored here: {error}") from error
                return self.made[tag, name]
        raise WireError(f"{path}: the tag {tag!r} is unknown, malformed or refers to a tensor that is not there")

    def leaf(self, tag: str, tensor: torch.Tensor, rest: list[object], path: str, depth: int) -> object:
        match tag, rest:
            case "$tensor", []:
                return tensor
            case "$array", []:
                return tensor.numpy()
            case "$scalar", [] if tensor.dim() == 0:
                return tensor.numpy()[()]
            case "$bytes", [] if tensor.dim() == 1 and tensor.dtype is torch.uint8:
                return tensor.numpy().tobytes()
            case "$generator", [str(device)]:
                generator = torch.Generator(device=device)
                return generator.set_state(tensor.clone())  # torch reads numbers out of it, so it must be aligned
            case "$image", [str(mode), dict(info)] if mode in _IMAGE_MODES:
                image = Image.fromarray(tensor.numpy()).copy()
                image.info.update(self.mapping(info, f"{path}.info", depth + 1))
                if image.mode == mode:
                    return image
        raise WireError(f"{path}: malformed {tag} of a tensor of shape {tuple(tensor.shape)} and dtype {tensor.dtype}")


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
    return json.dumps(node, separators=(",", ":"), allow_nan=False)


def _dump_header(header: Mapping[str, JSON]) -> str:
    try:
        text = _dump(dict(header))
        if _load(text) == dict(header):
            return text
    except (RecursionError, TypeError, ValueError) as error:
        raise WireError(f"the header is not plain JSON: {error}") from error
    raise WireError("the header is not plain JSON: a tuple or a key that is no str")


def _load(text: str) -> dict[str, Any]:
    node = json.loads(text, object_pairs_hook=_distinct, parse_constant=_refuse)
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


def _is_tag(key: str) -> bool:
    return key.startswith("$") and not key.startswith("$$")


def _child(path: str, key: object) -> str:
    if isinstance(key, str) and key.isidentifier():
        return f"{path}.{key}" if path else key
    return f"{path}[{key!r}]"


def _type_name(value: object) -> str:
    kind = type(value)
    return kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
