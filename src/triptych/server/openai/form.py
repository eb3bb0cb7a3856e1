"""Forms: the fields of a body in JSON or as multipart/form-data, never more of it than is accepted."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping
from typing import Any

from anyio import to_thread
from fastapi import Request
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser

from triptych.errors import ParameterError, UsageError
from triptych.server.problems import Refusal
from triptych.server.submission import check_values

_FIELDS = 128
"""Of one form."""
_LONGEST = 100_000
"""Characters of a number, a flag or a list."""
_SIZE = re.compile(r"(\d{1,5})\s*[xX]\s*(\d{1,5})")
_HALF = re.compile(r"[\ud800-\udfff]")
"""Of a surrogate pair: JSON may escape it alone, and no answer could repeat it."""
_NESTED = re.compile(r"([^\[\]]+)\[([^\[\]]*)\]")
_LISTED = re.compile(r"([^\[\]]+)\[\]\[([^\[\]]+)\]")


class Fields(dict[str, Any]):
    """What a body says, by name. Of a form, values are texts, `bytes` of files, lists and objects of them.

    Attributes:
        texts: whether all values came as texts, so that `7` may be a number.
    """

    texts: bool = False


async def read_fields(request: Request, files: int) -> Fields:
    """Return the fields of a request's body, whose length `Uploads` bounds.

    Args:
        files: how many are accepted.

    Raises:
        Refusal: it is of another kind.
        UsageError: it is not what it says it is.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "multipart/form-data":
        return await _form(request, files)
    if kind not in ("", "application/json", "application/x-www-form-urlencoded"):  # the last: curl's default
        raise Refusal(415, "unsupported_media_type", f"{kind}: application/json or multipart/form-data is accepted")
    try:
        value = await to_thread.run_sync(_parsed, await request.body())
    except (ValueError, RecursionError) as error:
        raise UsageError(f"the body is no JSON: {error}") from None
    if not isinstance(value, dict):
        raise UsageError("the body is not what is accepted: an object of fields is")
    return Fields(value)


def _parsed(body: bytes) -> Any:
    check_values(body)
    return json.loads(body)


class _Parser(MultiPartParser):
    """Reads a form whose texts are UTF-8, whatever it says of them, to its last boundary.

    Attributes:
        complete: whether that was there: without it, the last part is missing.
    """

    complete = False

    def on_part_end(self) -> None:
        part = self._current_part
        if part.file is not None:
            super().on_part_end()
            return
        try:
            self.items.append((part.field_name, part.data.decode()))
        except UnicodeDecodeError as error:
            told = part.data[error.start : error.start + 8].hex(" ")
            raise ParameterError(part.field_name, told, "text in UTF-8 is accepted, and these bytes are none") from None

    def on_end(self) -> None:
        self.complete = True


async def _form(request: Request, files: int) -> Fields:
    parser = _Parser(
        request.headers,
        request.stream(),
        max_files=files,
        max_fields=_FIELDS,
        max_part_size=sys.maxsize,  # a text may be a photo's data URL, and `Uploads` bounds the body
    )
    try:
        form = await parser.parse()
    except MultiPartException as error:
        raise UsageError(f"the form cannot be read: {error.message}") from None
    except (UnicodeError, LookupError) as error:
        raise UsageError(f"the form cannot be read: UTF-8 is accepted as its charset: {error}") from None
    fields = Fields()
    fields.texts = True
    try:
        if not parser.complete:
            raise UsageError("the form cannot be read: it ends before its last boundary")
        for name, value in form.multi_items():
            _add(fields, name, await value.read() if isinstance(value, UploadFile) else value)
    finally:
        await form.close()
    return fields


def _add(fields: Fields, name: str, value: str | bytes) -> None:
    """Add a field of a form: `name`, `name[]` for one of a list, `name[key]` for one of an object.

    `name[][key]` is for one of an object in a list; a key that this has already begins the next one.
    """
    if (listed := _LISTED.fullmatch(name)) is not None:
        name, key = listed.groups()
        objects = fields.setdefault(name, [])
        if not isinstance(objects, list) or not all(isinstance(each, dict) for each in objects):
            raise ParameterError(name, _told(value), "it is given twice, in two ways")
        if not objects or key in objects[-1]:
            objects.append({})
        objects[-1][key] = value
        return
    nested = _NESTED.fullmatch(name)
    if nested is None:
        if name in fields:
            raise ParameterError(name, _told(value), "it is given twice")
        fields[name] = value
        return
    name, key = nested.groups()
    held = fields.setdefault(name, {} if key else [])
    if isinstance(held, dict) and key and key not in held:
        held[key] = value
    elif isinstance(held, list) and not key and not any(isinstance(each, dict) for each in held):
        held.append(value)
    else:
        raise ParameterError(name, _told(value), "it is given twice, in two ways")


def _told(value: str | bytes) -> str:
    return value if isinstance(value, str) else f"{len(value)} bytes"


def add_size(given: dict[str, Any], size: object, example: str) -> None:
    """Add the width and the height that `size` asks for; none for `auto`.

    Raises:
        ParameterError: it is neither, or one of the two is given too.
    """
    if size is None or size == "auto":
        return
    for name in ("width", "height"):
        if name in given:
            raise ParameterError("size", size, f"{name} is given too; give size, or width and height")
    found = _SIZE.fullmatch(size.strip()) if isinstance(size, str) else None
    if found is None:
        raise ParameterError("size", size, f"auto or WIDTHxHEIGHT is accepted, as in {example}")
    given["width"], given["height"] = int(found[1]), int(found[2])


def settle(fields: Fields, kinds: Mapping[str, str]) -> dict[str, Any]:
    """Return the fields of a body; those of a form that are numbers, flags or lists (by their `kinds`) read as JSON.

    Raises:
        ParameterError: one holds text that no answer could repeat.
    """
    settled = dict(fields)
    for name, value in fields.items() if fields.texts else ():
        kind = kinds.get(name)
        if kind in (None, "text", "image", "images"):
            continue
        if isinstance(value, str):
            settled[name] = _plain(value)
        elif isinstance(value, list):
            settled[name] = [_plain(each) if isinstance(each, str) else each for each in value]
            if kind == "loras":
                settled[name] = [_lora(each) if isinstance(each, dict) else each for each in settled[name]]
    _check_texts(settled)
    return settled


def _plain(text: str) -> Any:
    if not text:
        return None  # how clients send none
    if len(text) > _LONGEST:
        return text
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text  # whoever checks the value says what is accepted


def _lora(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return a LoRA of a form: all but its path may be a number."""
    return {key: _plain(each) if isinstance(each, str) and key != "path" else each for key, each in given.items()}


def _check_texts(fields: Mapping[str, Any]) -> None:
    """Make sure that all texts, names included, can be written in UTF-8.

    Raises:
        ParameterError: one cannot.
    """
    for name, value in fields.items():
        parts = [name, value]
        for part in parts:  # of which there come more
            if isinstance(part, dict):
                parts += [*part, *part.values()]
            elif isinstance(part, list):
                parts += part
            elif isinstance(part, str) and not part.isascii() and (half := _HALF.search(part)):
                raise ParameterError(name, half[0], "whole characters are accepted, and this is half a surrogate pair")
