"""The wire form: what goes in comes out bit for bit, and nothing malformed comes out as anything but a `WireError`."""

import collections
import enum
import json
import math
import mmap
import random
import struct
import subprocess
import sys

import numpy as np
import pytest
import safetensors
import safetensors.torch
import torch
import xxhash
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from triptych.errors import WireError
from triptych.tree import MAX_DEPTH
from triptych.wire import FORMAT_VERSION, pack, packed_size, unpack

DTYPES = [
    torch.bool,
    torch.uint8,
    torch.int8,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.float8_e4m3fnuz,
    torch.float8_e5m2fnuz,
    torch.uint16,
    torch.int16,
    torch.float16,
    torch.bfloat16,
    torch.uint32,
    torch.int32,
    torch.float32,
    torch.uint64,
    torch.int64,
    torch.float64,
    torch.complex64,
]
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
PREFIX = b'{"__metadata__":{"xxh3":"'
DIGEST = slice(8 + len(PREFIX), 8 + len(PREFIX) + 16)
NUMPY = ["?", "u1", "i1", "u2", "i2", "f2", "u4", "i4", "f4", "u8", "i8", "f8", "c8"]


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(BITS[tensor.element_size()]).numpy().tobytes()


def same(a: object, b: object) -> bool:
    """Equal in type and in every bit."""
    if isinstance(a, Image.Image):
        return isinstance(b, Image.Image) and (a.mode, a.size, a.tobytes(), a.info) == (
            b.mode,
            b.size,
            b.tobytes(),
            b.info,
        )
    if type(a) is not type(b):
        return False
    if isinstance(a, torch.Tensor):
        return a.dtype is b.dtype and a.shape == b.shape and raw(a) == raw(b)
    if isinstance(a, torch.Generator):
        return a.device == b.device and torch.equal(a.get_state(), b.get_state())
    if isinstance(a, np.ndarray | np.generic):
        return (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes())
    if isinstance(a, float):
        return struct.pack(">d", a) == struct.pack(">d", b)
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple) and not isinstance(a, torch.Size):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def round_trip(fields: dict, header: dict | None = None) -> dict:
    back, head = unpack(pack(fields, header or {}))
    assert same(head, header or {})
    return back


def rehash(data: bytes | bytearray) -> bytes:
    """The same bytes with a valid checksum, so that what is crafted is found by the checks behind it."""
    blank = bytes(data[: DIGEST.start]) + b"0" * 16 + bytes(data[DIGEST.stop :])
    digest = xxhash.xxh3_64_hexdigest(blank).encode()
    return blank[: DIGEST.start] + digest + blank[DIGEST.stop :]


def craft(
    tensors: str | dict | None = None,
    fields: str | dict | None = None,
    data: bytes = bytes(16),
    header: str = "{}",
    metadata: dict | None = None,
) -> bytes:
    """A file with a valid checksum and the given parts; a str is taken as JSON text already."""
    if tensors is None:
        tensors = {"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}
    if fields is None:
        fields = {"a": {"$tensor": ["a"]}}
    fields = fields if isinstance(fields, str) else json.dumps(fields)
    meta = metadata or {"xxh3": "0" * 16, "format": str(FORMAT_VERSION), "header": header, "fields": fields}
    entries = tensors if isinstance(tensors, str) else json.dumps(tensors)[1:-1]
    text = f'{{"__metadata__":{json.dumps(meta, separators=(",", ":"))}' + (f",{entries}" if entries else "") + "}"
    text += " " * (-len(text) % 8)
    return rehash(struct.pack("<Q", len(text)) + text.encode() + data)


def tensor_of(code: str = "F32", shape: object = (4,), offsets: object = (0, 16)) -> dict:
    return {"dtype": code, "shape": shape, "data_offsets": offsets}


def sample() -> dict:
    return {
        "embeds": torch.arange(6, dtype=torch.bfloat16).reshape(2, 3),
        "mask": torch.tensor([True, False, True]),
        "generator": torch.Generator().manual_seed(7),
        "sizes": [(1, 2), {"x": 0.5}],
        "image": Image.new("RGB", (3, 2), (1, 2, 3)),
    }


# What hypothesis draws. A fixed seed per tensor keeps examples small; shapes include 0-dim and empty ones.


@st.composite
def tensors(draw: st.DrawFn) -> torch.Tensor:
    dtype = draw(st.sampled_from(DTYPES))
    shape = draw(st.lists(st.integers(0, 3), max_size=3))
    count = math.prod(shape)
    if dtype is torch.bool:
        tensor = torch.tensor(draw(st.lists(st.booleans(), min_size=count, max_size=count)), dtype=torch.bool)
    else:
        size = count * dtype.itemsize
        data = bytearray(draw(st.binary(min_size=size, max_size=size)))  # any bits: NaNs of every kind among them
        tensor = torch.frombuffer(data, dtype=dtype) if count else torch.empty(0, dtype=dtype)
    tensor = tensor.reshape(shape)
    match draw(st.sampled_from(["plain", "transposed", "expanded", "strided"])):
        case "transposed":
            return tensor.permute(list(reversed(range(tensor.dim()))))
        case "expanded":
            return tensor.expand(2, *shape)
        case "strided" if tensor.dim():
            return tensor[::2]
    return tensor


@st.composite
def arrays(draw: st.DrawFn) -> np.ndarray:
    dtype = np.dtype(draw(st.sampled_from(NUMPY[1:])))
    shape = draw(st.lists(st.integers(0, 3), max_size=3))
    size = math.prod(shape) * dtype.itemsize
    array = np.frombuffer(draw(st.binary(min_size=size, max_size=size)) or bytearray(), dtype).reshape(shape)
    return array[::-1] if shape and draw(st.booleans()) else array


@st.composite
def images(draw: st.DrawFn) -> Image.Image:
    mode = draw(st.sampled_from(["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16"]))
    width, height = draw(st.integers(1, 9)), draw(st.integers(1, 3))
    bands = len(Image.new(mode, (1, 1)).getbands())
    size = width * height * bands * (2 if mode == "I;16" else 1)
    data = draw(st.binary(min_size=size, max_size=size))
    image = Image.frombytes("L" if mode == "1" else mode, (width, height), data)
    if mode == "P":
        kind = draw(st.sampled_from(["RGB", "RGBA"]))
        image.putpalette(draw(st.binary(min_size=len(kind), max_size=256 * len(kind))), kind)
    return image.convert("1") if mode == "1" else image


texts = st.text(st.characters(codec=None, exclude_categories=[]), max_size=6) | st.sampled_from(
    ["$", "$$", "$tensor", "$$tuple", "__metadata__", "\ud800", "\0", 'a"b\\', "é", ""]
)
leaves = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(-(2**200), 2**200)
    | st.sampled_from([-0.0, math.inf, -math.inf, math.nan, struct.unpack(">d", bytes.fromhex("fff8000000000123"))[0]])
    | st.floats()
    | texts
    | st.binary(max_size=9)
    | tensors()
    | arrays()
    | arrays().filter(lambda array: array.size).map(lambda array: array.flat[0])
    | images()
    | st.sampled_from([torch.bfloat16, torch.float64, torch.complex128, torch.Size([]), torch.Size([2, 0, 3])])
    | st.integers(0, 99).map(lambda seed: torch.Generator().manual_seed(seed))
)
trees = st.recursive(
    leaves,
    lambda inner: (
        st.lists(inner, max_size=4) | st.lists(inner, max_size=4).map(tuple) | st.dictionaries(texts, inner, max_size=4)
    ),
    max_leaves=12,
)
plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=6,
)
relaxed = settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))


@relaxed
@given(st.dictionaries(texts, trees, max_size=5), st.dictionaries(texts, plain, max_size=3))
def test_any_tree_comes_back_bit_for_bit_and_the_file_is_valid_safetensors(fields: dict, header: dict) -> None:
    wire = pack(fields, header)
    assert len(wire) == packed_size(fields, header)
    back, head = unpack(wire)
    assert same(fields, back)
    assert same(header, head)
    safetensors.torch.load(bytes(wire))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (1,), (5, 3)], ids=str)
def test_a_tensor_of_every_dtype_comes_back_bit_for_bit(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    count = math.prod(shape)
    data = random.Random(0).randbytes(count * dtype.itemsize)
    if dtype is torch.bool:
        data = bytes(byte & 1 for byte in data)
    tensor = (torch.frombuffer(bytearray(data), dtype=dtype) if data else torch.empty(0, dtype=dtype)).reshape(shape)
    back = round_trip({"x": tensor})["x"]
    assert back.dtype is dtype and back.shape == shape and raw(back) == data


@pytest.mark.parametrize("code", NUMPY)
def test_numpy_arrays_and_scalars_keep_their_dtype_and_bits(code: str) -> None:
    array = np.arange(6).reshape(2, 3).astype(code)
    fields = {"array": array, "turned": array[:, ::-1], "one": array[:1][::-1], "zero": array[0, 0].reshape(())}
    fields |= {"scalar": array[1, 2], "empty": array[:0]}
    assert same(fields, round_trip(fields))


def test_every_nan_of_half_precision_keeps_its_bits_through_strided_copies() -> None:
    for dtype in (torch.float16, torch.bfloat16):
        every = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype).reshape(256, 256)
        assert raw(round_trip({"x": every.t()})["x"]) == raw(every.t())


def test_the_file_opens_with_the_safetensors_library(tmp_path) -> None:
    fields = sample() | {
        "nested": {"a b": [torch.ones(3, dtype=torch.float64)]},
        "half": torch.ones(1, dtype=torch.int8),
    }
    path = tmp_path / "state.safetensors"
    path.write_bytes(pack(fields, {"model": "m"}))
    with safetensors.safe_open(path, "pt") as file:
        metadata = file.metadata()
        assert raw(file.get_tensor("embeds")) == raw(fields["embeds"])
        assert raw(file.get_tensor("nested['a b'][0]")) == raw(fields["nested"]["a b"][0])
        assert set(metadata) == {"xxh3", "format", "header", "fields"}
    assert json.loads(metadata["header"]) == {"model": "m"}
    assert metadata["format"] == str(FORMAT_VERSION)


def test_tensors_are_ordered_by_element_size_so_that_each_is_aligned() -> None:
    fields = {str(index): torch.ones(3, dtype=dtype) for index, dtype in enumerate(DTYPES)}
    wire = pack(fields, {})
    for key, tensor in unpack(wire)[0].items():
        assert tensor.data_ptr() % tensor.element_size() == 0, fields[key].dtype


def test_bytes_are_the_same_whenever_the_state_is() -> None:
    assert bytes(pack(sample(), {"a": 1})) == bytes(pack(sample(), {"a": 1}))


def test_an_empty_state_is_carried() -> None:
    assert round_trip({}) == {}


@pytest.mark.parametrize(
    "device", ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]
)
def test_a_generator_continues_its_draws_exactly(device: str) -> None:
    generator = torch.Generator(device).manual_seed(3)
    torch.randn(7, generator=generator, device=device)  # odd, so that half of a Box-Muller pair may be left
    back = round_trip({"generator": generator})["generator"]
    assert back.device.type == device
    for draw in (torch.randn, torch.rand):
        for count in (1, 5, 33):
            expected = draw(count, generator=generator, device=device)
            assert torch.equal(draw(count, generator=back, device=device), expected)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_tensors_of_a_gpu_come_back_on_the_cpu() -> None:
    tensor = torch.randn(8, 6, device="cuda").to(torch.bfloat16).t()
    back = round_trip({"x": tensor})["x"]
    assert back.device.type == "cpu" and raw(back) == raw(tensor.cpu())


def test_an_object_met_twice_is_written_once_and_comes_back_as_one() -> None:
    tensor, generator = torch.zeros(1 << 16), torch.Generator()
    wire = pack({"a": tensor, "b": [tensor, generator], "c": {"d": generator}}, {})
    assert len(wire) < 1.5 * tensor.nbytes
    back = unpack(wire)[0]
    assert back["a"] is back["b"][0]
    assert back["b"][1] is back["c"]["d"]


def test_equal_tensors_that_are_two_objects_stay_two() -> None:
    back = round_trip({"a": torch.ones(2), "b": torch.ones(2)})
    back["a"].zero_()
    assert back["b"].tolist() == [1, 1]


def test_fields_whose_paths_look_alike_stay_apart() -> None:
    fields = {"a": [torch.ones(1)], "a[0]": torch.zeros(1), "['a[0]']": torch.ones(2), "__metadata__": torch.ones(3)}
    fields |= {"é": torch.ones(4), "\\xe9": torch.ones(5), "['\\xe9']": torch.ones(6)}
    assert same(fields, round_trip(fields))


def test_gradients_and_lazy_conjugates_are_resolved() -> None:
    parameter = torch.nn.Parameter(torch.ones(2))
    values = torch.tensor([1 + 2j, 3 - 4j], dtype=torch.complex64)
    back = round_trip({"parameter": parameter, "conj": values.conj(), "imag": values.conj().imag})
    assert type(back["parameter"]) is torch.Tensor and not back["parameter"].requires_grad
    assert back["conj"].tolist() == [1 - 2j, 3 + 4j]
    assert back["imag"].tolist() == [-2, 4]


def test_a_true_of_any_byte_arrives_as_one() -> None:
    odd = torch.tensor([0, 1, 2, 255], dtype=torch.uint8).view(torch.bool)
    assert raw(round_trip({"x": odd})["x"]) == b"\0\1\1\1"


def test_an_image_keeps_its_orientation_and_transparency(tmp_path) -> None:
    exif = Image.Exif()
    exif[0x112] = 6
    Image.new("RGB", (4, 2), (255, 0, 0)).save(tmp_path / "a.png", exif=exif, transparency=(255, 0, 0))
    image = Image.open(tmp_path / "a.png")
    back = round_trip({"image": image})["image"]
    assert back.getexif()[0x112] == 6
    assert back.convert("RGBA").getpixel((0, 0)) == image.convert("RGBA").getpixel((0, 0)) == (255, 0, 0, 0)


def test_a_transparent_colour_of_a_palette_arrives(tmp_path) -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([255, 0, 0, 0, 255, 0])
    image.putpixel((1, 0), 1)
    image.save(tmp_path / "a.png", transparency=1)
    image = Image.open(tmp_path / "a.png")
    back = round_trip({"image": image})["image"]
    assert back.mode == image.mode == "P"
    assert [back.convert("RGBA").getpixel((x, 0)) for x in (0, 1)] == [(255, 0, 0, 255), (0, 255, 0, 0)]


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16"])
def test_an_image_without_pixels_is_carried(mode: str) -> None:
    assert round_trip({"x": Image.new(mode, (0, 5))})["x"].size == (0, 5)


# Zero copy


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_tensors_and_arrays_alias_the_received_buffer(kind: type) -> None:
    fields = {"a": torch.ones(5), "b": [torch.zeros(3, dtype=torch.bfloat16)], "c": np.ones(4, np.int16)}
    buffer = kind(bytes(pack(fields, {})))
    start = np.frombuffer(buffer, np.uint8).ctypes.data
    back = unpack(buffer)[0]
    addresses = [back["a"].data_ptr(), back["b"][0].data_ptr(), back["c"].ctypes.data]
    assert all(start < address < start + len(buffer) for address in addresses)


def test_a_received_tensor_keeps_the_buffer_alive() -> None:
    buffer = bytearray(pack({"a": torch.arange(1000)}, {}))
    tensor = unpack(buffer)[0]["a"]
    with pytest.raises(BufferError):
        buffer.clear()  # would free what the tensor shows
    del buffer
    assert torch.equal(tensor, torch.arange(1000))


def test_a_memory_map_is_read_in_place(tmp_path) -> None:
    path = tmp_path / "state"
    path.write_bytes(pack(sample(), {}))
    with path.open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    assert same(sample(), unpack(mapped)[0])


def test_an_unaligned_buffer_is_read_all_the_same() -> None:
    wire = bytes(pack({"a": torch.arange(5)}, {}))
    for shift in range(9):
        tensor = unpack(memoryview(bytearray(bytes(shift) + wire))[shift:])[0]["a"]
        assert tensor.data_ptr() % 8 == 0 and tensor.tolist() == [0, 1, 2, 3, 4]


def test_reading_read_only_bytes_warns_nobody() -> None:
    code = (
        "import numpy, torch; from triptych.wire import pack, unpack; array = numpy.ones(3); array.flags.writeable = False;"
        "unpack(bytes(pack({'x': torch.ones(3), 'y': array, 'z': b'z'}, {})))"
    )
    subprocess.run([sys.executable, "-W", "error::UserWarning", "-c", code], check=True, timeout=120)


def test_the_result_is_bytes_like(tmp_path) -> None:
    wire = pack(sample(), {})
    (tmp_path / "a").write_bytes(wire)
    assert (tmp_path / "a").read_bytes() == bytes(wire) and len(bytes(wire)) == len(wire)
    assert same(unpack(bytes(wire))[0], sample())


# A buffer of the caller's


@pytest.mark.parametrize("extra", [0, 1, 1000])
def test_out_is_filled_and_its_filled_part_returned(extra: int) -> None:
    fields = sample()
    out = bytearray(b"\xff" * (packed_size(fields, {}) + extra))
    wire = pack(fields, {}, out=out)
    assert isinstance(wire, memoryview) and wire.obj is out and len(wire) == len(out) - extra
    assert bytes(wire) == bytes(pack(fields, {})) == bytes(out[: len(wire)])
    assert bytes(out[len(wire) :]) == b"\xff" * extra


def test_out_too_small_is_an_error_with_both_sizes() -> None:
    needed = packed_size(sample(), {})
    with pytest.raises(WireError, match=rf"too small.*{needed - 1}.*{needed}"):
        pack(sample(), {}, out=bytearray(needed - 1))
    with pytest.raises(WireError, match="too small"):
        pack(sample(), {}, out=bytearray())


def test_out_read_only_or_with_holes_is_an_error() -> None:
    with pytest.raises(WireError, match="read-only"):
        pack({}, {}, out=memoryview(bytes(10_000)))
    with pytest.raises(WireError, match="contiguous"):
        pack({}, {}, out=memoryview(bytearray(20_000))[::2])


def test_a_tensor_that_lies_in_out_is_an_error_and_out_is_left_alone() -> None:
    out = bytearray(pack({"a": torch.arange(400)}, {}))
    before = bytes(out)
    fields = {"other": [unpack(out)[0]["a"][:100]]}
    with pytest.raises(WireError, match=r"other\[0\].*lies in the buffer"):
        pack(fields, {}, out=out)
    assert bytes(out) == before


# What cannot be carried


class Colour(enum.IntEnum):
    RED = 1


class Words(str):
    pass


Point = collections.namedtuple("Point", "x y")


@pytest.mark.parametrize(
    "value",
    [
        object(), {1}, frozenset(), range(3), 1j, Colour.RED, Words("a"), Point(1, 2), collections.OrderedDict(),
        collections.defaultdict(int), bytearray(b"a"), memoryview(b"a"), len, int, torch.device("cpu"), torch.nn.Linear(1, 1),
        np.array(["a"]), np.array([None]), np.str_("a"), np.datetime64("2020-01-01"), np.complex128(1), np.array(1, ">f4"),
        np.ma.array([1]), np.longdouble(1), torch.ones(1, dtype=torch.complex128), torch.ones(2).to_sparse(),
        torch.ones(1, device="meta"), torch.ones(1).to_mkldnn() if torch.backends.mkldnn.is_available() else object(),
        Image.new("F", (1, 1)), Image.new("YCbCr", (1, 1)), Image.new("PA", (1, 1)),
    ],
    ids=lambda value: type(value).__name__,
)  # fmt: skip
def test_a_value_that_cannot_be_carried_is_an_error_that_names_its_field(value: object) -> None:
    with pytest.raises(WireError, match=r"^img_shapes\[0\]\.foo\['a b'\]"):
        pack({"ok": 1, "img_shapes": ({"foo": {"a b": value}},)}, {})


def test_the_error_names_the_type() -> None:
    with pytest.raises(WireError, match="a: a value of type set"):
        pack({"a": set()}, {})
    with pytest.raises(WireError, match="a: a value of type torch.device"):
        pack({"a": torch.device("cpu")}, {})
    with pytest.raises(WireError, match="a: a value of type PIL.Image.Image of mode HSV"):
        pack({"a": Image.new("HSV", (1, 1))}, {})
    with pytest.raises(WireError, match="a: a meta tensor"):
        pack({"a": torch.ones(1, device="meta")}, {})
    with pytest.raises(WireError, match=r"a\.b\[3\]: a key must be str, not int"):
        pack({"a": {"b": {3: 4}}}, {})


def test_a_container_in_itself_and_one_too_deep_are_errors() -> None:
    cycle: list = [1]
    cycle.append(cycle)
    with pytest.raises(WireError, match=r"a\[1\]\[1\].*nested deeper"):
        pack({"a": cycle}, {})
    tree: object = 1
    for _ in range(MAX_DEPTH - 1):
        tree = (tree,)
    assert round_trip({"a": tree}) == {"a": tree}
    with pytest.raises(WireError, match="nested deeper"):
        pack({"a": ((tree,),)}, {})


@pytest.mark.parametrize("value", [(1,), {1: 2}, math.nan, math.inf, {1}, torch.ones(1), np.float32(1), b"a"], ids=repr)
def test_a_header_that_is_not_plain_json_is_an_error(value: object) -> None:
    with pytest.raises(WireError, match="header is not plain JSON"):
        pack({}, {"a": [value]})
    cycle: list = []
    cycle.append(cycle)
    with pytest.raises(WireError, match="header is not plain JSON"):
        pack({}, {"a": cycle})


# What arrives damaged


def test_a_state_cut_anywhere_is_an_error() -> None:
    wire = bytes(pack({"a": torch.arange(9), "b": [1, "x"]}, {"c": 1}))
    for length in range(len(wire)):
        with pytest.raises(WireError):
            unpack(wire[:length])


def test_appended_bytes_are_an_error() -> None:
    wire = bytes(pack(sample(), {}))
    for extra in (b"\0", b" ", b"\0" * 8, wire):
        with pytest.raises(WireError, match="checksum"):
            unpack(wire + extra)
        with pytest.raises(WireError, match="belong to no tensor"):
            unpack(rehash(wire + extra))


def test_every_flipped_bit_is_an_error() -> None:
    wire = bytearray(pack({"a": torch.arange(3), "b": 1.5}, {"c": 1}))
    for bit in range(8 * len(wire)):
        wire[bit // 8] ^= 1 << bit % 8
        with pytest.raises(WireError):
            unpack(wire)
        wire[bit // 8] ^= 1 << bit % 8
    unpack(wire)


@relaxed
@given(st.data())
def test_crafted_bytes_with_a_valid_checksum_give_a_state_or_a_wire_error(data: st.DataObject) -> None:
    wire = bytearray(pack(sample() | {"f": math.nan, "i": 2**70, "$": b"x", "s": torch.Size([1])}, {"c": [1]}))
    length = int.from_bytes(wire[:8], "little")
    for _ in range(data.draw(st.integers(1, 3))):
        # Header bytes are where structure is; replacing them by JSON's own characters gets furthest.
        position = data.draw(st.integers(0, 8 + length - 1))
        wire[position] = data.draw(st.sampled_from(b'{}[]":,$0129-.eNtfaTI\\ ') | st.integers(0, 255))
    try:
        unpack(rehash(wire))
    except WireError:
        pass


@relaxed
@given(st.binary(max_size=200))
def test_arbitrary_bytes_are_an_error(data: bytes) -> None:
    for candidate in (data, struct.pack("<Q", len(data)) + data, data[:8].ljust(8, b"\0") + PREFIX + b"0" * 16 + data):
        with pytest.raises(WireError):
            unpack(candidate)
        if candidate[8 : DIGEST.start] == PREFIX:
            with pytest.raises(WireError):
                unpack(rehash(candidate))


def test_crafting_nothing_gives_a_state() -> None:
    assert unpack(craft())[0]["a"].tolist() == [0, 0, 0, 0]


HUGE = 2**63
TENSORS = {
    "overlap": ({"a": tensor_of(offsets=[0, 16]), "b": tensor_of(offsets=[8, 24])}, 24),
    "hole": ({"a": tensor_of(offsets=[0, 16]), "b": tensor_of(offsets=[20, 36])}, 36),
    "hole at the start": ({"a": tensor_of(offsets=[4, 20])}, 20),
    "bytes left": ({"a": tensor_of()}, 20),
    "data cut": ({"a": tensor_of()}, 12),
    "no data": ({"a": tensor_of()}, 0),
    "out of order": ({"a": tensor_of(offsets=[16, 32]), "b": tensor_of(offsets=[0, 16])}, 32),
    "same place": ({"a": tensor_of(), "b": tensor_of()}, 16),
    "misaligned": ({"a": tensor_of("U8", [2], [0, 2]), "b": tensor_of("F32", [4], [2, 18])}, 18),
    "dtype size": ({"a": tensor_of("F64")}, 16),
    "shape size": ({"a": tensor_of(shape=[5])}, 16),
    "huge shape": ({"a": tensor_of(shape=[2**62])}, 16),
    "product of 2**64": ({"a": tensor_of(shape=[2**32, 2**32, 4])}, 16),
    "product wraps to 4": ({"a": tensor_of(shape=[2**62 + 1, 4])}, 16),
    "beyond 64 bits": ({"a": tensor_of(shape=[HUGE], offsets=[0, 4 * HUGE])}, 16),
    "empty and huge": ({"a": tensor_of(shape=[0, 2**62, 2**62], offsets=[0, 0])}, 0),
    "negative size": ({"a": tensor_of(shape=[-4])}, 16),
    "two negative sizes": ({"a": tensor_of(shape=[-2, -2])}, 16),
    "negative begin": ({"a": tensor_of(offsets=[-16, 0])}, 0),
    "negative end": ({"a": tensor_of(shape=[0], offsets=[0, -16])}, 0),
    "bool as size": ({"a": tensor_of("F32", [True, 4])}, 16),
    "bool as offset": ({"a": tensor_of(offsets=[False, 16])}, 16),
    "float size": ({"a": tensor_of(shape=[4.0])}, 16),
    "text size": ({"a": tensor_of(shape=["4"])}, 16),
    "shape a number": ({"a": tensor_of(shape=4)}, 16),
    "shape an object": ({"a": tensor_of(shape={"0": 4})}, 16),
    "shape text": ({"a": tensor_of(shape="4")}, 16),
    "one offset": ({"a": tensor_of(offsets=[0])}, 16),
    "three offsets": ({"a": tensor_of(offsets=[0, 16, 16])}, 16),
    "no offsets": ({"a": {"dtype": "F32", "shape": [4]}}, 16),
    "unknown entry key": ({"a": tensor_of() | {"x": 1}}, 16),
    "unknown dtype": ({"a": tensor_of("F31")}, 16),
    "dtype a number": ({"a": tensor_of(1)}, 16),
    "dtype null": ({"a": tensor_of(None)}, 16),
    "entry a list": ({"a": [1, 2]}, 16),
    "very many sizes": ({"a": tensor_of(shape=[2**62] * 100_000)}, 16),
    "too many dimensions": ({"a": tensor_of(shape=[1] * 100_000 + [4])}, 16),
    "bool of two": ({"a": tensor_of("BOOL", [1], [0, 1])}, b"\2"),
    "unreferenced": ({"a": tensor_of(), "b": tensor_of(offsets=[16, 32])}, 32),
}  # fmt: skip


@pytest.mark.parametrize("case", TENSORS)
def test_a_crafted_tensor_is_an_error(case: str) -> None:
    entries, data = TENSORS[case]
    data = bytes(data) if isinstance(data, int) else data
    fields = {"a": {"$tensor": ["a"]}}
    if "b" in entries and case != "unreferenced":
        fields["b"] = {"$tensor": ["b"]}
    with pytest.raises(WireError):
        unpack(craft(entries, fields, data))


def test_a_tensor_named_twice_is_an_error() -> None:
    entry = json.dumps(tensor_of())
    with pytest.raises(WireError, match="same key twice"):
        unpack(craft(f'"a":{entry},"a":{entry}'))


FIELDS = {
    "unknown tag": {"a": {"$pickle": "gASVAA=="}},
    "empty tag": {"a": {"$": 1}},
    "tag among keys": {"a": {"$tuple": [], "b": 1}},
    "two tags": {"a": {"$tensor": ["a"], "$tuple": []}},
    "tag at the top": {"$tuple": []},
    "dangling": {"a": {"$tensor": ["nobody"]}},
    "tensor as text": {"a": {"$tensor": "a"}},
    "tensor with more": {"a": {"$tensor": ["a", 1]}},
    "tensor a number": {"a": {"$tensor": [0]}},
    "no tensor": {"a": {"$tensor": []}},
    "metadata as tensor": {"a": {"$tensor": ["__metadata__"]}},
    "unused": {"a": 1},
    "scalar of four": {"a": {"$scalar": ["a"]}},
    "bytes of floats": {"a": {"$bytes": ["a"]}},
    "generator of floats": {"a": {"$generator": ["a", "cpu"]}},
    "generator without device": {"a": {"$generator": ["a"]}},
    "generator of nonsense": {"a": {"$generator": ["a", "nonsense"]}},
    "generator of meta": {"a": {"$generator": ["a", "meta"]}},
    "image of floats": {"a": {"$image": ["a", "RGB", {}]}},
    "image of mode F": {"a": {"$image": ["a", "F", {}]}},
    "image without info": {"a": {"$image": ["a", "L"]}},
    "image without palette": {"a": {"$image": ["a", "P", {}]}},
    "image with a palette of text": {"a": {"$image": ["a", "P", {}, "RGB", ["a"]]}},
    "image with too large a palette": {"a": {"$image": ["a", "P", {}, "RGB", [0] * 769]}},
    "image with a palette of no mode": {"a": {"$image": ["a", "P", {}, "none", [0, 0, 0]]}},
    "tuple of text": {"a": {"$tuple": "ab"}},
    "tuple of an object": {"a": {"$tuple": {"b": 1}}},
    "size of text": {"a": {"$size": ["4"]}},
    "size of bools": {"a": {"$size": [True]}},
    "size of floats": {"a": {"$size": [1.0]}},
    "dtype of nobody": {"a": {"$dtype": "float31"}},
    "dtype a module": {"a": {"$dtype": "os"}},
    "int with underscores": {"a": {"$int": "1_0"}},
    "int with prefix": {"a": {"$int": "0x10"}},
    "int with blank": {"a": {"$int": " 10"}},
    "int with newline": {"a": {"$int": "10\n"}},
    "int in other digits": {"a": {"$int": "١"}},
    "int empty": {"a": {"$int": ""}},
    "int a number": {"a": {"$int": 10}},
    "float short": {"a": {"$float": "7ff8"}},
    "float a word": {"a": {"$float": "nan"}},
    "float a number": {"a": {"$float": 1.5}},
}


@pytest.mark.parametrize("case", FIELDS)
def test_a_crafted_field_is_an_error(case: str) -> None:
    keep = {} if case in ("unused", "dangling") else {"keep": {"$tensor": ["a"]}}
    with pytest.raises(WireError):
        unpack(craft(fields=FIELDS[case] | keep))


def test_a_generator_that_this_machine_lacks_is_an_error_that_names_its_field() -> None:
    state = torch.Generator().get_state()
    entries = {"a": tensor_of("U8", [len(state)], [0, len(state)])}
    data = state.numpy().tobytes()
    assert isinstance(unpack(craft(entries, {"g": {"$generator": ["a", "cpu"]}}, data))[0]["g"], torch.Generator)
    with pytest.raises(WireError, match=r"^x\[0\]: \$generator"):
        unpack(craft(entries, {"x": [{"$generator": ["a", "xpu"]}]}, data))
    with pytest.raises(WireError, match=r"^x: \$generator"):
        unpack(craft(entries, {"x": {"$generator": ["a", "cpu"]}}, b"\xff" * len(data)))


@pytest.mark.parametrize(
    "text",
    [
        "", "1", "[]", '"a"', "null", "{", '{"a":1}x', '{"a":NaN}', '{"a":Infinity}', '{"a":-Infinity}', '{"a":1e999}',
        '{"a":1,"a":1}', '{"a":{"b":1,"b":2}}', '{"a":' + "9" * 5000 + "}", '{"a":01}', "{'a':1}", '{"a":"\n"}',
        '{"a":' + "[" * 200 + "]" * 200 + "}", '{"a":' + "[" * 500_000, '{"a":' * 500_000,
        '{"a":' + '{"$tuple":[' * 70 + "]}" * 70 + "}",
    ],
    ids=lambda text: text[:12] + f"({len(text)})",
)  # fmt: skip
def test_crafted_json_is_an_error(text: str) -> None:
    with pytest.raises(WireError):
        unpack(craft({}, text, b""))
    if not text.startswith(('{"a":[[', '{"a":{"$t', '{"a":1e')) or len(text) > 1000:
        with pytest.raises(WireError):
            unpack(craft({}, {}, b"", header=text))


def test_crafted_nesting_in_the_outer_header_is_an_error() -> None:
    with pytest.raises(WireError):
        unpack(craft('"a":' + "[" * 500_000))


def test_another_format_version_is_refused_with_both_versions() -> None:
    for version in ("0", "2", "999", "1.0", ""):
        with pytest.raises(WireError, match=rf"format version {version};.* reads version {FORMAT_VERSION}"):
            unpack(craft(metadata={"xxh3": "0" * 16, "format": version, "entirely": "new"}))


def test_unknown_or_missing_metadata_is_an_error() -> None:
    whole = {"xxh3": "0" * 16, "format": str(FORMAT_VERSION), "header": "{}", "fields": "{}"}
    unpack(craft({}, {}, b""))
    for change in ({"more": "x"}, {"format": 1}, {"format": None}, {"fields": {}}, {"header": []}, {"header": None}):
        with pytest.raises(WireError):
            unpack(craft({}, {}, b"", metadata=whole | change))
    for name in ("format", "header", "fields"):
        with pytest.raises(WireError):
            unpack(craft({}, {}, b"", metadata={key: text for key, text in whole.items() if key != name}))


def test_a_crafted_header_length_is_an_error() -> None:
    wire = craft()
    length = int.from_bytes(wire[:8], "little")
    for other in (0, 1, 8, length - 8, length - 1, length + 1, length + 8, len(wire), 100_000_008, 2**63, 2**64 - 1):
        with pytest.raises(WireError, match="does not fit|malformed|JSON"):
            unpack(rehash(struct.pack("<Q", other) + wire[8:]))


def test_an_integer_of_any_size_comes_back() -> None:
    limit = 2**63
    fields = {"x": [limit - 1, limit, -limit, -limit - 1, 10**5000, -(10**5000)], "size": torch.Size([2**80])}
    assert same(fields, round_trip(fields))


def test_a_header_beyond_the_cap_is_refused_on_both_sides(monkeypatch: pytest.MonkeyPatch) -> None:
    wire = bytes(pack({"x": "y" * 2000}, {}))
    monkeypatch.setattr("triptych.wire.MAX_HEADER_BYTES", 2000)
    with pytest.raises(WireError, match="more than 2000"):
        pack({"x": "y" * 2000}, {})
    with pytest.raises(WireError, match="does not fit"):
        unpack(wire)
    assert round_trip({"x": "y" * 1000}) == {"x": "y" * 1000}


def test_a_header_that_is_not_ascii_is_an_error() -> None:
    for text in ("\xe9".encode(), b"\xff\xfe"):
        wire = craft({"a": tensor_of()}).replace(b'"F32"', b'"' + text.ljust(3) + b'"')
        with pytest.raises(WireError):
            unpack(rehash(wire))


def test_a_plain_safetensors_file_is_an_error() -> None:
    with pytest.raises(WireError, match="not a state"):
        unpack(safetensors.torch.save({"a": torch.ones(1000)}))


def test_what_is_no_contiguous_buffer_is_an_error() -> None:
    for buffer in ("text", None, 3, memoryview(bytes(20))[::2]):
        with pytest.raises(WireError, match="contiguous buffer"):
            unpack(buffer)
