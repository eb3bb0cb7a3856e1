"""Image answers: pictures as files, and what the official clients read of them."""

from __future__ import annotations

import base64
import io
import math
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field

from triptych.errors import UsageError
from triptych.result import Result
from triptych.server.openai.image_order import Format, ImageOrder

if TYPE_CHECKING:
    from PIL.Image import Image

SUFFIXES: dict[Format, str] = {"png": ".png", "jpeg": ".jpg", "webp": ".webp"}
_BYTES_A_TOKEN, _PIXELS_A_TOKEN = 4, 16 * 16
_PNG_LEVEL = 2
"""Of zlib: beyond it files get a few per cent smaller and take several times as long."""


class TokenDetails(BaseModel):
    """Of what the tokens are."""

    image_tokens: int
    text_tokens: int


class Usage(BaseModel):
    """Estimates: a token for 4 bytes of the prompt, and for 16 x 16 pixels of a picture."""

    input_tokens: int
    input_tokens_details: TokenDetails
    output_tokens: int
    output_tokens_details: TokenDetails
    total_tokens: int


class ImageData(BaseModel):
    """One picture."""

    b64_json: str | None = None
    url: str | None = Field(default=None, description="Where it can be fetched without a key, for an hour at most.")


class ImagesAnswer(BaseModel):
    """Pictures, in the official clients' form."""

    model_config = ConfigDict(ser_json_inf_nan="null")

    created: int
    data: list[ImageData]
    background: str
    output_format: str
    quality: str
    size: str
    seed: int = Field(description="From which the same request makes the same pictures again.")
    usage: Usage
    safety_identifier: str | None = None


@dataclass
class Files:
    """What a request's result has become; filled in a thread of its own.

    Attributes:
        data: the files, in order.
        size: width and height of the first.
        pixels: of all together.
    """

    order: ImageOrder
    data: list[bytes] = field(default_factory=list)
    size: tuple[int, int] = (0, 0)
    pixels: int = 0

    def fill(self, result: Result) -> None:
        """Make files of a result.

        Raises:
            UsageError: it has no pictures.
        """
        pictures = flat(result.images)
        self.size = pictures[0].size
        self.pixels = sum(each.width * each.height for each in pictures)
        self.data = [encoded(each, self.order.format, self.order.compression) for each in pictures]

    def usage(self) -> Usage:
        """Return what it is told to have cost."""
        given: Any = self.order.request.parameters.get("image")
        sources = given if isinstance(given, list) else [given] if given is not None else []
        text = math.ceil(len(self.order.prompt.encode()) / _BYTES_A_TOKEN)
        image = sum(math.ceil(each.width * each.height / _PIXELS_A_TOKEN) for each in sources)
        output = math.ceil(self.pixels / _PIXELS_A_TOKEN)
        return Usage(
            input_tokens=text + image,
            input_tokens_details=TokenDetails(image_tokens=image, text_tokens=text),
            output_tokens=output,
            output_tokens_details=TokenDetails(image_tokens=output, text_tokens=0),
            total_tokens=text + image + output,
        )

    def answer(self, seed: int, links: list[str]) -> ImagesAnswer:
        """Return all of it, with the files themselves where there are no links to them."""
        data = [ImageData(url=link) for link in links] or [ImageData(b64_json=text(each)) for each in self.data]
        return ImagesAnswer(
            created=int(time.time()),
            data=data,
            background=self.order.background,
            output_format=self.order.format,
            quality=self.order.quality,
            size=f"{self.size[0]}x{self.size[1]}",
            seed=seed,
            usage=self.usage(),
            safety_identifier=self.order.user,
        )


def event(order: ImageOrder, kind: str, file: bytes, size: tuple[int, int], **more: Any) -> dict[str, Any]:
    """Return an event of a stream of pictures."""
    return {
        "type": kind,
        "b64_json": text(file),
        "created_at": int(time.time()),
        "size": f"{size[0]}x{size[1]}",
        "quality": order.quality,
        "background": order.background,
        "output_format": order.format,
        **more,
    }


def text(file: bytes) -> str:
    """Return a file in base64."""
    return base64.b64encode(file).decode("ascii")


def converted(png: bytes, order: ImageOrder) -> tuple[bytes, tuple[int, int]]:
    """Return a preview in the format that is asked for, and its size."""
    from PIL import Image

    with Image.open(io.BytesIO(png), formats=("PNG",)) as opened:
        return (png if order.format == "png" else encoded(opened, order.format, order.compression)), opened.size


def encoded(picture: Image, format: Format, compression: int) -> bytes:
    """Return a picture as a file; JPEG drops transparency."""
    file = io.BytesIO()
    if format == "png":
        picture.save(file, "PNG", compress_level=_PNG_LEVEL)
    elif format == "jpeg":
        picture.convert("RGB").save(file, "JPEG", quality=max(1, compression))
    else:
        picture.save(file, "WEBP", quality=compression)
    return file.getvalue()


def flat(images: Any) -> list[Image]:
    """Return all pictures of a result, the layers of one after another.

    Raises:
        UsageError: there are none, or they are no PIL images.
    """
    from PIL import Image

    pictures = [each for group in images or [] for each in (group if isinstance(group, (list, tuple)) else [group])]
    if not pictures or not all(isinstance(each, Image.Image) for each in pictures):
        raise UsageError("output_type: this interface makes files: leave it out")
    return pictures
