"""Submissions: the JSON of a request, checked and turned into what an engine takes."""

from __future__ import annotations

import base64
import binascii
import io
import math
import re
import struct
from collections.abc import Mapping
from threading import Lock
from types import TracebackType
from typing import TYPE_CHECKING, Any, ClassVar, Self
from weakref import WeakSet

from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError

from triptych.errors import ParameterError, UsageError, closest
from triptych.request import Request, draw_seed
from triptych.server.limits import Limits
from triptych.server.problems import Refusal

if TYPE_CHECKING:
    from PIL.Image import Image

    from triptych.pipelines.base import Family

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF")
"""Of pictures that are read. Not TIFF: its tiles are decoded whole, however large, for a picture of any size."""
UNREADABLE = (
    OSError, ValueError, SyntaxError, EOFError, struct.error, TypeError, LookupError, ArithmeticError, AttributeError
)  # fmt: skip
"""What Pillow raises, beside `DecompressionBombError`, for files that are damaged, and for EXIF data that are."""

PICTURE = re.compile(r"(^|_)image$")
"""Names of parameters that are pictures."""
TENSOR = re.compile(
    r"(^video|(?<!_to_image_)(?<!_to_video_)latents|embeds|mask|token_ids|token_image_ids|grid_thw)(_\d+)?$"
)
"""Names of parameters that HTTP does not carry."""
_LARGEST = 2**64  # beyond it no parameter has a meaning, and floats end somewhere
_COUNTS = ("num_frames", "layers", "num_images_per_prompt", "num_videos_per_prompt")
"""Parameters that say how many pictures of one size a request asks for: their product."""
_USUAL_AREA = 2**20
"""Pixels that a picture is taken to have where its size follows from one that was given: models work near it."""
_MOST_VALUES = 500_000
"""Of one body, commas in its texts included."""
_DEEPEST = 8
"""Parts of a place in a body that are told."""
_DATA_URL = re.compile(r"data:[^,]*;base64,")


class Submission(BaseModel):
    """What is posted."""

    model_config = ConfigDict(extra="forbid", strict=True)

    parameters: dict[str, JsonValue] = Field(
        description="The request's parameters by name, as `triptych families NAME` lists them. Pictures are data URLs "
        "or base64. `exact` is false unless given."
    )
    previews: int = Field(default=0, ge=0, le=3, description="Previews among the events, at steps of equal distance.")
    deadline: float | None = Field(default=None, description="Seconds from now after which the request is given up.")


def parse(body: bytes, limits: Limits) -> Submission:
    """Return what a request's body says.

    Raises:
        UsageError: it is no JSON, or not of the form.
    """
    check_values(body)
    try:
        submission = Submission.model_validate_json(body)
    except ValidationError as error:
        raise _explained(error) from None
    deadline = submission.deadline
    if deadline is not None and not 0 < deadline <= limits.deadline:
        raise ParameterError("deadline", deadline, f"more than 0 and at most {limits.deadline:g} seconds are accepted")
    return submission


def check_values(body: bytes) -> None:
    """Make sure that a JSON body is read in a moment: nothing else goes on meanwhile, in no thread.

    Raises:
        UsageError: it has too many values for that.
    """
    if sum(map(body.count, (b",", b"[", b"{"))) > _MOST_VALUES:
        raise UsageError(
            f"the body is not what is accepted: it has more than {_MOST_VALUES} values, or commas in texts"
        )


def submission_of(parameters: dict[str, Any]) -> Submission:
    """Return the submission of parameters that came in another form.

    Raises:
        UsageError: one of them is none that JSON can carry.
    """
    try:
        return Submission(parameters=parameters)
    except ValidationError as error:
        raise _explained(error) from None


def request_of(submission: Submission, limits: Limits, *, transparency: bool = False) -> Request:
    """Return the request that a submission asks for, with its pictures opened and its seed settled.

    Args:
        transparency: what `upright` takes.

    Raises:
        ParameterError: a value is not of a kind that HTTP carries, or is more than the limits allow.
        Refusal: there is no room for its pictures now.
    """
    with Pictures(limits, transparency) as pictures:
        request = _request_of(submission, limits, pictures)
    request.lora_folders = limits.lora_folders
    request.release = pictures.release
    return request


def _request_of(submission: Submission, limits: Limits, pictures: Pictures) -> Request:
    values: dict[str, Any] = {}
    for name, value in submission.parameters.items():
        if value is not None and PICTURE.search(name):
            values[name] = (
                [pictures.open(name, each) for each in value] if isinstance(value, list) else pictures.open(name, value)
            )
        elif name == "lora" and value is not None and not isinstance(value, list):
            raise ParameterError(name, value, 'a list of {"path": ..., "scale": 1.0} is accepted')
        elif value is not None and TENSOR.search(name):
            raise ParameterError(name, value, "tensors and videos cannot be sent over HTTP")
        else:
            for each in value if name == "lora" and isinstance(value, list) else [value]:
                for plain in each.values() if name == "lora" and isinstance(each, dict) else [each]:
                    _check_plain(name, plain, limits, depth=3)
            values[name] = value
    if values.get("output_type") == "latent":
        raise ParameterError("output_type", "latent", "one of pil, np, pt is accepted: latents are no file")
    for name, most, what in (
        ("num_inference_steps", limits.steps, "steps"),
        ("pyramid_num_inference_steps_list", limits.steps, "steps"),
        ("max_sequence_length", limits.tokens, "tokens"),
        ("num_images_per_prompt", limits.images, "pictures"),
        ("num_videos_per_prompt", limits.images, "videos"),
    ):
        value = values.get(name)
        asked = sum(each for each in value if isinstance(each, (int, float))) if isinstance(value, list) else value
        if isinstance(asked, (int, float)) and asked > most:
            raise ParameterError(name, value, f"at most {most} {what} are accepted")
    if values.get("exact") is None:
        values["exact"] = False
    if values.get("seed") is None:
        values["seed"] = draw_seed()
    return Request(**values)


def check_outputs(settled: Mapping[str, Any], limits: Limits, family: Family) -> None:
    """Make sure that what a request asks for, its parameters settled by the model, is not too large to be made.

    Raises:
        ParameterError: it is.
    """
    sized = bool(settled.get("width") and settled.get("height"))
    # A model that decides itself over the frames makes as many as it may.
    length = ("max_seconds", "frame_rate") if settled.get("num_frames") is None else ()
    factors: dict[str, float] = {}
    for name in (*(("width", "height") if sized else ()), *_COUNTS, *length):
        if isinstance(factor := settled.get(name), (int, float)) and factor > 0:
            factors[name] = factor
    most = limits.video_pixels if "num_frames" in settled else limits.pixels
    more = family.enlargement(settled)
    if factors and math.prod(factors.values()) * (1 if sized else _USUAL_AREA) * more > most:
        largest = max(factors, key=lambda name: factors[name])
        asked = ", ".join(f"{name}={factor}" for name, factor in factors.items())
        each = "" if sized else f", each of some {_USUAL_AREA} pixels"
        times = "" if more == 1 else f", {more:.3g} times that in all"
        raise ParameterError(
            largest, factors[largest], f"{asked}{each}{times}: at most {most} pixels in all are accepted"
        )
    _check_length(settled, limits, family)
    if (chunks := family.chunks(settled)) > limits.chunks:
        accepted = f"a video of {chunks} chunks: at most {limits.chunks} are accepted"
        raise ParameterError("num_frames", settled["num_frames"], accepted)


def _check_length(settled: Mapping[str, Any], limits: Limits, family: Family) -> None:
    """Make sure that a video does not last too long: a slow one has few pixels, and as much sound as any other."""
    frames, rate = settled.get("num_frames"), family.frame_rate(settled)
    if frames is not None and rate is not None and frames / rate > limits.seconds:
        name = "frame_rate" if "frame_rate" in settled else "num_frames"
        accepted = f"{frames} frames at {rate:g} a second: at most {limits.seconds:g} seconds are accepted"
        raise ParameterError(name, settled[name], accepted)
    if frames is None and (longest := settled.get("max_seconds") or 0) > limits.seconds:
        raise ParameterError("max_seconds", longest, f"at most {limits.seconds:g} seconds are accepted")


def upright(opened: Image, *, transparency: bool) -> Image:
    """Return a picture as diffusers' `load_image` would, upright and RGB; with `transparency` RGBA, if any of it may be."""
    from PIL import ImageOps

    turned = ImageOps.exif_transpose(opened)
    return turned.convert("RGBA" if transparency and turned.has_transparency_data else "RGB")


class Pictures:
    """Opens the pictures of one request, and counts what they take of the room for those of all requests.

    As a context: has it released where something goes wrong. Whoever forgets to release it holds the room until it is gone.
    """

    _all: ClassVar[WeakSet[Pictures]] = WeakSet()
    _lock: ClassVar[Lock] = Lock()

    def __init__(self, limits: Limits, transparency: bool = False) -> None:
        self.limits, self.transparency = limits, transparency
        self.count = 0
        self.pixels = 0
        with self._lock:
            self._all.add(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if error is not None:
            self.release()

    def release(self) -> None:
        """Give the room back."""
        with self._lock:
            self._all.discard(self)

    def open(self, name: str, value: JsonValue) -> Image:
        """Return a picture, `upright`."""
        from PIL import Image

        accepted = "a picture as a data URL or in base64 is accepted"
        if not isinstance(value, str):
            raise ParameterError(name, value, accepted)
        self.count += 1
        if self.count > self.limits.images:
            raise ParameterError(name, f"{self.count} pictures", f"at most {self.limits.images} pictures are accepted")
        told = f"{value[:40]}..." if len(value) > 40 else value
        if value.startswith(("http://", "https://")):
            raise ParameterError(name, told, f"{accepted}; addresses are not fetched")
        start = _DATA_URL.match(value)
        try:
            data = base64.b64decode(value[start.end() if start else 0 :], validate=True)
        except (binascii.Error, ValueError):
            raise ParameterError(name, told, accepted) from None
        try:
            with Image.open(io.BytesIO(data), formats=FORMATS) as opened:
                self._take_room(name, opened.width, opened.height)
                return upright(opened, transparency=self.transparency)
        except (*UNREADABLE, Image.DecompressionBombError) as error:
            if isinstance(error, ParameterError):
                raise
            raise ParameterError(name, told, f"this picture cannot be read: one of {', '.join(FORMATS)}") from None

    def _take_room(self, name: str, width: int, height: int) -> None:
        """Count a picture that is about to be decoded."""
        pixels = self.pixels + width * height
        if pixels > self.limits.pixels:
            accepted = f"at most {self.limits.pixels} pixels in all are accepted"
            raise ParameterError(name, f"{width}x{height}", accepted)
        with self._lock:
            held = sum(each.pixels for each in self._all if each is not self)
            if held and held + pixels > self.limits.waiting_pixels:
                words = "the pictures of the requests that have not ended fill the memory that there is for them"
                raise Refusal(429, "overloaded", words, {"Retry-After": "10"})
            self.pixels = pixels


def _check_plain(name: str, value: JsonValue, limits: Limits, depth: int) -> None:
    if isinstance(value, str) and len(value) > limits.prompt:
        told = f"{value[:40]}..."
        raise ParameterError(
            name, told, f"a text of at most {limits.prompt} characters is accepted, and this one has {len(value)}"
        )
    if isinstance(value, list) and depth:
        if len(value) > limits.steps:
            told = f"{len(value)} values"
            raise ParameterError(name, told, f"a list of at most {limits.steps} values is accepted")
        for each in value:
            _check_plain(name, each, limits, depth - 1)
    elif isinstance(value, (dict, list)) or (isinstance(value, (int, float)) and not abs(value) < _LARGEST):
        raise ParameterError(name, value, "a text, a number, true, false, null or a list of them is accepted")


def _explained(error: ValidationError) -> UsageError:
    """Return pydantic's first complaint as one of ours."""
    errors = error.errors(include_url=False, include_context=False)
    first = next((each for each in errors if each["type"] == "extra_forbidden"), errors[0])
    name = ".".join(str(part) for part in first["loc"][:_DEEPEST])
    if not name:
        return UsageError(
            f'the body is not what is accepted, as in {{"parameters": {{"prompt": ...}}}}: {first["msg"]}'
        )
    if first["type"] == "extra_forbidden":
        close = closest(name, Submission.model_fields)
        hint = f"did you mean {close!r}?" if close else "a request's parameters go under 'parameters'"
        return ParameterError(
            name, first["input"], f"the body has only 'parameters', 'previews' and 'deadline'; {hint}"
        )
    if first["type"] == "missing":
        return ParameterError(name, None, "it is missing: an object of parameters is accepted")
    return ParameterError(name, first["input"], first["msg"])
