"""Video orders: what a caller of `/v1/videos` asks for, turned into a request of the model's family."""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from triptych.engine.base import Engine
from triptych.errors import ParameterError, UnknownParameterError
from triptych.request import Request
from triptych.result import DEFAULT_FPS, SLOWEST
from triptych.server.limits import Limits
from triptych.server.openai.form import Fields, add_size, settle
from triptych.server.parameters import parameters_of
from triptych.server.problems import Refusal
from triptych.server.submission import Submission, check_outputs, request_of, submission_of

OWN = ("model", "size", "seconds", "fps", "input_reference", "user")
"""Fields that are the interface's own, beside the family's parameters."""
_ASKED_BY = {"width": "size", "height": "size", "num_frames": "seconds", "frame_rate": "fps"}
"""Parameters that the interface's own fields may stand for."""
_UNTOLD = frozenset(("num_videos_per_prompt", "num_images_per_prompt"))
_LONGEST = 600
"""Seconds of a video."""
_FASTEST = 240
"""Frames per second."""
_REACH = 32
"""Frames by which the length that `seconds` asks for may be changed to one that the model takes."""


@dataclass(frozen=True)
class VideoOrder:
    """A request for one video.

    Attributes:
        request: what an engine takes.
        submission: the same as JSON, from which it can be made again.
        told: what answers say of it.
    """

    request: Request
    submission: Submission
    told: dict[str, Any]


def order_of(fields: Fields, engine: Engine, limits: Limits) -> VideoOrder:
    """Return what a caller asks for, checked.

    Raises:
        UsageError: it is not acceptable.
        Refusal: this is not the server for it.
    """
    family = engine.front.family
    told = parameters_of(engine, limits)
    if told.makes != "videos":
        raise Refusal(400, "unsupported", f"{told.family} makes images: ask for them at /v1/images/generations")
    kinds: dict[str, str] = {each.name: each.kind for each in told.parameters if each.name not in _UNTOLD}
    for name in fields:
        if name not in kinds and name not in OWN:
            raise UnknownParameterError(name, told.family, [*kinds, *OWN])
    given = settle(fields, {**kinds, "fps": "number"})
    given = {name: value for name, value in given.items() if value is not None}
    own = {name: given.pop(name, None) for name in OWN}
    model = check_model(own["model"], told.model)
    if not isinstance(given.get("prompt"), str):
        raise ParameterError("prompt", given.get("prompt"), "it is missing: a text is accepted")
    add_size(given, own["size"], "832x480")
    if "frame_rate" in given:
        given["frame_rate"] = _number("frame_rate", given["frame_rate"], _FASTEST, SLOWEST)
    rate = _rate(given, own["fps"], family.frame_rate(given), takes_rate="frame_rate" in kinds)
    asked = _frames(given, own["seconds"], rate, takes_frames="num_frames" in kinds)
    _add_pictures(given, own["input_reference"], kinds)
    if asked is not None:
        given["num_frames"] = asked
    request = request_of(submission_of(given), limits, transparency=engine.front.family.transparency)
    settled = _admitted(engine, request, snap=asked is not None)
    try:
        check_outputs(settled, limits, family)
    except ParameterError as error:
        name = _ASKED_BY.get(error.field, error.field)
        if own.get(name) is None:
            raise
        raise ParameterError(name, own[name], error.accepted) from None
    frames, width, height = (settled.get(name) for name in ("num_frames", "width", "height"))
    kept = {**given, "seed": request.parameters["seed"], "exact": request.parameters["exact"]}
    if "num_frames" in request.parameters:
        kept["num_frames"] = request.parameters["num_frames"]
    answer = {
        "object": "video",
        "model": model,
        "prompt": given["prompt"],
        "size": f"{width}x{height}" if width and height else "auto",
        "seconds": f"{frames / rate:.4g}" if frames else "auto",
        "num_frames": frames,
        "fps": rate,
        "adjusted": None,
    }
    if asked is not None and frames != asked:
        answer["adjusted"] = (
            f"{own['seconds']} seconds at {rate:g} frames a second are {asked} frames; the model makes {frames}"
        )
    return VideoOrder(request, submission_of(kept), answer)


def check_model(asked: object, served: str) -> str:
    """Return the name of the model that is served, if it is the one asked for, or none was.

    Raises:
        Refusal: it is another one.
    """
    short = served.rstrip("/").rpartition("/")[2]
    if asked is None or asked in ("", served, short):
        return short
    if not isinstance(asked, str):
        raise ParameterError("model", asked, "the name of a model is accepted")
    raise Refusal(404, "model_not_found", f"there is no model {asked[:200]!r} here, only {short!r}")


def _rate(given: dict[str, Any], fps: object, usual: float | None, *, takes_rate: bool) -> float:
    """Return the frames per second of the video; a model that has to know them is told."""
    if fps is None:
        return usual or DEFAULT_FPS
    rate = _number("fps", fps, _FASTEST, SLOWEST)
    if takes_rate:
        if "frame_rate" in given:
            raise ParameterError("fps", fps, "frame_rate is given too; give one of them")
        given["frame_rate"] = rate
    return rate


def _frames(given: Mapping[str, Any], seconds: object, rate: float, *, takes_frames: bool) -> int | None:
    """Return how many frames `seconds` asks for; None where it is not given."""
    if seconds is None:
        return None
    if not takes_frames:
        raise ParameterError("seconds", seconds, "this model decides itself how long its videos are")
    if "num_frames" in given:
        raise ParameterError("seconds", seconds, "num_frames is given too; give one of them")
    return max(1, round(_number("seconds", seconds, _LONGEST) * rate))


def _number(name: str, value: object, most: float, least: float = 0) -> float:
    try:
        number = float(value) if isinstance(value, (str, int, float)) and not isinstance(value, bool) else math.nan
    except (ValueError, OverflowError):
        number = math.nan
    if not least <= number <= most or not number:
        from_ = f"from {least:g}" if least else "above 0"
        raise ParameterError(name, value, f"a number {from_} and up to {most} is accepted")
    return number


def _add_pictures(given: dict[str, Any], reference: object, kinds: Mapping[str, str]) -> None:
    """Bring pictures, however they came, into the form of `/v1/requests`: base64."""
    for name, value in list(given.items()):
        if kinds.get(name) in ("image", "images"):
            pictures = [_picture(name, each) for each in (value if isinstance(value, list) else [value])]
            given[name] = pictures if isinstance(value, list) else pictures[0]
        elif isinstance(value, bytes):
            raise ParameterError(name, f"{len(value)} bytes", "this is not a file")
    if reference is None:
        return
    if "image" not in kinds:
        raise ParameterError("input_reference", "...", "this model makes videos from text only")
    if "image" in given:
        raise ParameterError("input_reference", "...", "image is given too; give one of them")
    given["image"] = _picture("input_reference", reference)


def _picture(name: str, value: object) -> str:
    if isinstance(value, Mapping):
        if set(value) != {"image_url"}:
            raise ParameterError(name, sorted(map(str, value)), "a picture is accepted: a file, or its `image_url`")
        value = value["image_url"]
    if isinstance(value, bytes):
        return base64.b64encode(value).decode("ascii")
    if not isinstance(value, str):
        raise ParameterError(name, value, "a picture is accepted: a file, a data URL, or base64")
    return value


def _admitted(engine: Engine, request: Request, *, snap: bool) -> dict[str, Any]:
    """Return a request's parameters as the model settles them.

    With `snap`, `num_frames` is changed to the nearest number that the model takes.

    Raises:
        UsageError: the model does not take the request.
    """
    try:
        return engine.front.admit(request).fields
    except ParameterError as error:
        if not snap or error.field != "num_frames":
            raise
    asked = int(str(request.parameters["num_frames"]))
    for distance in range(1, _REACH + 1):
        for frames in (asked + distance, asked - distance):
            if frames < 1:
                continue
            request.parameters["num_frames"] = frames
            try:
                return engine.front.admit(request).fields
            except ParameterError as error:
                if error.field != "num_frames":
                    raise
    raise ParameterError("seconds", asked, f"the model takes no video of about {asked} frames: give num_frames")
