"""Formats: which file of a result a caller asks for."""

from __future__ import annotations

from dataclasses import dataclass

from triptych.errors import ParameterError
from triptych.server.problems import Refusal


@dataclass(frozen=True)
class Format:
    """A kind of file that outputs can be had as."""

    name: str
    suffix: str
    media_type: str


_IMAGES = (
    Format("png", ".png", "image/png"),
    Format("jpeg", ".jpg", "image/jpeg"),
    Format("webp", ".webp", "image/webp"),
)
_VIDEOS = (
    Format("mp4", ".mp4", "video/mp4"),
    Format("webp", ".webp", "image/webp"),
    Format("gif", ".gif", "image/gif"),
)
FORMATS = {"images": _IMAGES, "videos": _VIDEOS}
"""By what a model makes; the first is what a caller without a wish gets."""
MEDIA_TYPES = sorted({each.media_type for several in FORMATS.values() for each in several})
"""Of all of them."""
_ALIASES = {"jpg": "jpeg"}


def named(makes: str, name: str, kept: str | None = None) -> Format:
    """Return the format of that name.

    Args:
        kept: the suffix of the only files that there are of the outputs; None where they can be made in any format.

    Raises:
        ParameterError: such outputs cannot be had in it.
    """
    wanted = _ALIASES.get(name.lower(), name.lower())
    offered = _offered(makes, kept)
    for each in offered:
        if each.name == wanted:
            return each
    names = ", ".join(each.name for each in offered)
    raise ParameterError("format", name, f"{_what(makes, kept)} can be had as {names}")


def accepted(makes: str, accept: str | None, kept: str | None = None) -> Format:
    """Return the format that an `Accept` header prefers; `kept` as in `named`.

    Raises:
        Refusal: it takes none that there is.
    """
    offered = _offered(makes, kept)
    if not accept or not accept.strip():
        return offered[0]
    ranges = [_range(part) for part in accept.split(",")]
    if makes == "videos" and any(name == "text/html" for name, _ in ranges) and _quality(offered[0], ranges) > 0:
        return offered[0]  # a browser goes to the address: the pictures that it names are no wish for a moving one
    best = max(offered, key=lambda each: (_quality(each, ranges), -offered.index(each)))
    if _quality(best, ranges) > 0:
        return best
    media_types = ", ".join(each.media_type for each in offered)
    raise Refusal(406, "not_acceptable", f"{_what(makes, kept)} can be had as {media_types}, not as {accept}")


def _offered(makes: str, kept: str | None) -> tuple[Format, ...]:
    return tuple(each for each in FORMATS[makes] if kept in (None, each.suffix))


def _what(makes: str, kept: str | None) -> str:
    return makes if kept is None else "this result"


def _range(text: str) -> tuple[str, float]:
    media_type, *options = (part.strip().lower() for part in text.split(";"))
    quality = 1.0
    for option in options:
        if option.startswith("q="):
            try:
                quality = float(option[2:])
            except ValueError:
                quality = 0.0
    return media_type, quality


def _quality(each: Format, ranges: list[tuple[str, float]]) -> float:
    """Return how welcome a format is: by the range that names it most closely (RFC 9110, 12.5.1)."""
    kind = each.media_type.partition("/")[0]
    for name in (each.media_type, f"{kind}/*", "*/*"):
        qualities = [quality for media_type, quality in ranges if media_type == name]
        if qualities:
            return max(qualities)
    return 0.0
