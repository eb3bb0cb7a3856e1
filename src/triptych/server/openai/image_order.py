"""Image orders: what a caller of `/v1/images` asks for, turned into a request of the model's family."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from triptych.engine.base import Engine
from triptych.errors import ParameterError, UnknownParameterError
from triptych.request import Request
from triptych.server.limits import Limits
from triptych.server.openai.form import Fields, add_size, settle
from triptych.server.openai.video_order import check_model
from triptych.server.parameters import parameters_of
from triptych.server.problems import Refusal
from triptych.server.submission import request_of, submission_of

OWN = {
    "model": "text",
    "n": "integer",
    "size": "text",
    "quality": "text",
    "background": "text",
    "output_format": "text",
    "output_compression": "integer",
    "response_format": "text",
    "stream": "flag",
    "partial_images": "integer",
    "moderation": "text",
    "user": "text",
    "safety_identifier": "text",
}
"""Fields that are the interface's own, beside the family's parameters, and their kinds."""

QUALITIES = {
    "auto": 1.0, "standard": 1.0, "low": 0.5, "medium": 1.0, "high": 1.5, "hd": 1.5, "xhigh": 2.0, "max": 2.0,
}  # fmt: skip
"""How many times the model's usual steps each takes."""
_FEW = 8
"""Usual steps up to which a model is taken to be distilled: more of them would bring nothing."""
MOST = 10
"""Pictures of one request, as in OpenAI's API."""
PREVIEWS = 3
"""Partial pictures of one stream."""

_UNTOLD = frozenset(("num_images_per_prompt", "num_videos_per_prompt"))

Format = Literal["png", "jpeg", "webp"]


@dataclass(frozen=True)
class ImageOrder:
    """A request for pictures, and the form in which they are wanted.

    Attributes:
        request: what an engine takes.
        format, compression: of the files; the compression is what JPEG and WebP call quality.
        quality, background: as they are told back.
        links: whether addresses are wanted instead of the files.
        stream: whether events are.
        previews: partial pictures among them.
        user: told back as `safety_identifier`.
    """

    request: Request
    format: Format
    compression: int
    quality: str
    background: str
    links: bool
    stream: bool
    previews: int
    user: str | None

    @property
    def prompt(self) -> str:
        """The text that was given."""
        return str(self.request.parameters.get("prompt") or "")


def order_of(fields: Fields, engine: Engine, limits: Limits, *, edit: bool) -> ImageOrder:
    """Return what a caller asks for, checked.

    Raises:
        UsageError: it is not acceptable.
        Refusal: this is not the server for it.
    """
    told = parameters_of(engine, limits)
    if told.makes != "images":
        raise Refusal(400, "unsupported", f"{told.family} makes videos: ask for them at /v1/videos")
    kinds: dict[str, str] = {each.name: each.kind for each in told.parameters if each.name not in _UNTOLD}
    accepted = [*kinds, *OWN, *(["mask"] if edit else [])]
    for name in fields:
        if name not in accepted:
            raise UnknownParameterError(name, told.family, accepted)
    for name, value in fields.items():
        if kinds.get(name) not in ("image", "images") and name != "mask" and _has_file(value):
            raise ParameterError(name, "a file", "this is not a file")
    settled = settle(fields, {**kinds, **OWN})
    given = {name: value for name, value in settled.items() if value is not None}
    own = {name: given.pop(name, None) for name in OWN}
    if not isinstance(given.get("prompt"), str):
        raise ParameterError("prompt", given.get("prompt"), "it is missing: a text is accepted")
    _add_pictures(given, kinds, told.family, edit=edit)
    count = _whole("n", own["n"], 1, MOST)
    _add_count(given, count, engine)
    add_size(given, own["size"], "1024x768")
    if given.get("width") and given.get("height") and _area(given) * count > limits.pixels:
        size = f"{count} of {given['width']}x{given['height']}"
        raise ParameterError("size", size, f"at most {limits.pixels} pixels in all pictures together are accepted")
    quality = _one_of("quality", own["quality"], *QUALITIES)
    _add_steps(given, quality, engine, limits)
    format: Format = _one_of("output_format", own["output_format"], "png", "jpeg", "webp")  # type: ignore[assignment]
    background = _one_of("background", own["background"], "auto", "opaque", "transparent")
    transparent = "layers" in kinds and format != "jpeg"
    if background == "transparent" and "layers" not in kinds:
        raise ParameterError(
            "background", background, f"{told.family} makes opaque pictures: auto or opaque is accepted"
        )
    if background == "opaque" and transparent:
        raise ParameterError(
            "background", background, f"{told.family} makes layers, which are transparent: ask for jpeg"
        )
    if background == "transparent" and format == "jpeg":
        raise ParameterError("background", background, "JPEG has no transparency: ask for png or webp")
    compression = _whole("output_compression", own["output_compression"], 100, 100, least=0)
    if format == "png" and compression != 100:
        raise ParameterError("output_compression", compression, "PNG is lossless: it is for jpeg and webp")
    _one_of("moderation", own["moderation"], "auto", "low")  # nothing is moderated here
    links = _one_of("response_format", own["response_format"], "b64_json", "url") == "url"
    stream = _flag("stream", own["stream"])
    previews = _whole("partial_images", own["partial_images"], 0, PREVIEWS, least=0)
    if previews and not stream:
        raise ParameterError("partial_images", previews, "it needs stream=true")
    if stream and (count > 1 or links):
        field = "n" if count > 1 else "response_format"
        raise ParameterError(field, own[field], "a stream brings one picture, as b64_json")
    request = request_of(submission_of(given), limits, transparency=engine.front.family.transparency)
    check_model(own["model"], told.model)
    return ImageOrder(
        request=request,
        format=format,
        compression=compression,
        quality={"auto": "medium", "standard": "medium", "hd": "high"}.get(quality, quality),
        background="transparent" if transparent else "opaque",
        links=links,
        stream=stream,
        previews=previews,
        user=_text("safety_identifier", own["safety_identifier"]) or _text("user", own["user"]),
    )


def _add_pictures(given: dict[str, Any], kinds: Mapping[str, str], family: str, *, edit: bool) -> None:
    """Bring pictures into the form of `/v1/requests`, base64."""
    if "mask" in given:
        if "mask_image" not in kinds:
            raise ParameterError("mask", "...", f"{family} edits whole pictures: leave the mask out")
        given["mask_image"] = given.pop("mask")
    if edit and "image" not in kinds:
        raise ParameterError("image", "...", f"{family} makes pictures from text only")
    if edit and not given.get("image"):
        raise ParameterError("image", None, "it is missing: one picture or several are accepted")
    for name, value in list(given.items()):
        if kinds.get(name) not in ("image", "images"):
            continue
        several = value if isinstance(value, list) else [value]
        if not several:
            raise ParameterError(name, value, "one picture or several are accepted, or leave it out")
        if len(several) > 1 and kinds[name] == "image":
            raise ParameterError(name, f"{len(several)} pictures", f"{family} takes one")
        if other := next((each for each in several if not isinstance(each, (bytes, str))), None):
            raise ParameterError(name, type(other).__name__, "a file, a data URL or base64 is accepted")
        files = [base64.b64encode(each).decode() if isinstance(each, bytes) else each for each in several]
        given[name] = files if len(files) > 1 else files[0]


def _has_file(value: object) -> bool:
    if isinstance(value, dict):
        value = list(value.values())
    return isinstance(value, bytes) or (isinstance(value, list) and any(isinstance(each, bytes) for each in value))


def _add_count(given: dict[str, Any], count: int, engine: Engine) -> None:
    if "num_images_per_prompt" in engine.front.family.parameters:
        given["num_images_per_prompt"] = count
    elif count > 1:
        raise ParameterError("n", count, "this model makes one picture at a time")


def _area(given: Mapping[str, Any]) -> int:
    sides = [given[name] for name in ("width", "height")]
    return sides[0] * sides[1] if all(isinstance(each, int) and each > 0 for each in sides) else 0


def _add_steps(given: dict[str, Any], quality: str, engine: Engine, limits: Limits) -> None:
    """Have the quality decide over the steps, where they are not given."""
    family, factor = engine.front.family, QUALITIES[quality]
    usual = family.repository.defaults.get("num_inference_steps", family.parameters.get("num_inference_steps"))
    if "num_inference_steps" in given or not isinstance(usual, int) or factor == 1 or (usual <= _FEW and factor > 1):
        return
    given["num_inference_steps"] = min(limits.steps, max(1, round(usual * factor)))


def _one_of(name: str, value: object, first: str, *others: str) -> str:
    """Return a value that is one of several; the first where there is none."""
    accepted = (first, *others)
    if value is None:
        return first
    if value not in accepted:
        raise ParameterError(name, value, f"one of {', '.join(accepted)} is accepted")
    return str(value)


def _whole(name: str, value: object, usual: int, most: int, *, least: int = 1) -> int:
    if value is None:
        return usual
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise ParameterError(name, value, f"a whole number from {least} to {most} is accepted")
    return value


def _flag(name: str, value: object) -> bool:
    if value is not None and not isinstance(value, bool):
        raise ParameterError(name, value, "true or false is accepted")
    return bool(value)


def _text(name: str, value: object) -> str | None:
    if value is not None and not isinstance(value, str):
        raise ParameterError(name, value, "a text is accepted")
    return value
