"""A tree of values as JSON and the tensors that it refers to: what a state's fields become on the wire.

Plain values stand for themselves and everything else is an object with one key, the tag: `$tensor`,
`$array`, `$scalar`, `$bytes` ([tensor]), `$generator` ([tensor, device type]), `$image` ([tensor, mode, info], and
where it has a palette that one's mode and colours), `$tuple`, `$size`, `$dtype`, `$int` (hex, beyond 64 bits), `$float`
(16 hex digits: a NaN or an infinity). Keys of the caller's own that begin with `$` get a second one.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from PIL import Image

from triptych.errors import WireError

MAX_DEPTH = 64  # levels of containers; far from the interpreter's recursion limit

SAFETENSORS_NAMES = {
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
"""The dtypes that a tensor may have, by the names that safetensors gives them."""

_ALL_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in vars(torch).values() if type(dtype) is torch.dtype}
_IMAGE_MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16")
# What Pillow keeps beside the pixels and a stage's reading depends on (orientation, colour key, profile).
_IMAGE_INFO = ("exif", "xmp", "XML:com.adobe.xmp", "Raw profile type exif", "transparency", "icc_profile")


@dataclass
class TreeWriter:
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
            node = [pixels, value.mode, self.value(info, f"{path}.info", depth + 1)]
            if value.mode == "P":
                assert value.palette is not None
                node += [value.palette.mode, value.getpalette(value.palette.mode)]
            return {"$image": node}
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
        if tensor.layout is not torch.strided or tensor.dtype not in SAFETENSORS_NAMES:
            raise WireError(f"{path}: a tensor of dtype {tensor.dtype} and layout {tensor.layout} cannot be carried")
        name = path.encode("ascii", "backslashreplace").decode("ascii")
        while name in self.tensors or name == "__metadata__":
            name += "'"
        self.tensors[name] = tensor, path
        return name


@dataclass
class TreeReader:
    """Turns the JSON of a `TreeWriter` back into values."""

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
            case "$image", [str(mode), dict(info), *palette] if mode in _IMAGE_MODES:
                image = Image.fromarray(tensor.numpy()).copy()
                if mode == "CMYK":  # which has as many channels as RGBA
                    image = Image.frombytes(mode, image.size, image.tobytes())
                match palette:
                    case [str(kind), [*colours]]:
                        image.putpalette(bytes(int(str(each)) for each in colours), kind)
                image.info.update(self.mapping(info, f"{path}.info", depth + 1))
                if image.mode == mode:
                    return image
        raise WireError(f"{path}: malformed {tag} of a tensor of shape {tuple(tensor.shape)} and dtype {tensor.dtype}")


def _is_tag(key: str) -> bool:
    return key.startswith("$") and not key.startswith("$$")


def _child(path: str, key: object) -> str:
    if isinstance(key, str) and key.isidentifier():
        return f"{path}.{key}" if path else key
    return f"{path}[{key!r}]"


def _type_name(value: object) -> str:
    kind = type(value)
    return kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
