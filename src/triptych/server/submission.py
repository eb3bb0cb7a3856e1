"""Submissions: the JSON of a request, checked and turned into what an engine takes."""

from __future__ import annotations

import base64
import binascii
import io
import math
import re
import struct
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError

from triptych.errors import ParameterError, UsageError, closest
from triptych.request import Request, draw_seed
from triptych.server.limits import Limits

if TYPE_CHECKING:
    from PIL.Image import Image

    from triptych.pipelines.base import Family

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")
"""Of pictures that are read."""
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
    try:
        submission = Submission.model_validate_json(body)
    except ValidationError as error:
        raise _explained(error) from None
    deadline = submission.deadline
    if deadline is not None and not 0 < deadline <= limits.deadline:
        raise ParameterError("deadline", deadline, f"more than 0 and at most {limits.deadline:g} seconds are accepted")
    return submission


def submission_of(parameters: dict[str, Any]) -> Submission:
    """Return the submission of parameters that came in another form.

    Raises:
        UsageError: one of them is none that JSON can carry.
    """
    try:
        return Submission(parameters=parameters)
    except ValidationError as error:
        raise _explained(error) from None


def request_of(submission: Submission, limits: Limits) -> Request:
    """Return the request that a submission asks for, with its pictures opened and its seed settled.

    Raises:
        ParameterError: a value is not of a kind that HTTP carries, or is more than the limits allow.
    """
    values: dict[str, Any] = {}
    pictures = _Pictures(limits)
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
    request = Request(**values)
    request.lora_folders = limits.lora_folders
    return request


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


class _Pictures:
    """Opens the pictures of one request, and counts what they take."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.count = 0
        self.pixels = 0

    def open(self, name: str, value: JsonValue) -> Image:
        """Return a picture, upright and RGB, as diffusers' `load_image` would."""
        from PIL import Image, ImageOps

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
                self.pixels += opened.width * opened.height
                if self.pixels > self.limits.pixels:
                    size = f"{opened.width}x{opened.height}"
                    raise ParameterError(name, size, f"at most {self.limits.pixels} pixels in all are accepted")
                return ImageOps.exif_transpose(opened).convert("RGB")
        except (*UNREADABLE, Image.DecompressionBombError) as error:
            if isinstance(error, ParameterError):
                raise
            raise ParameterError(name, told, f"this picture cannot be read: one of {', '.join(FORMATS)}") from None


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
