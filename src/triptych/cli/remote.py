"""`triptych generate --server`: the request goes to a running service, its files come here."""

from __future__ import annotations

import base64
import io
import json
import logging
import os
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from triptych.cli.arguments import Asked
from triptych.cli.client import KEY, Client, ServiceError
from triptych.cli.output import check_output, output_path, progress, summary
from triptych.errors import ParameterError, UnknownParameterError, UsageError

if TYPE_CHECKING:
    from PIL.Image import Image
    from rich.console import Console

log = logging.getLogger(__name__)

_FORMATS = {".png": "png", ".jpg": "jpeg", ".jpeg": "jpeg", ".webp": "webp", ".mp4": "mp4", ".gif": "gif"}


def check_remote(arguments: list[str], local: Mapping[str, object]) -> None:
    """Check that nothing is asked of the model or of this machine, which a service has settled.

    Raises:
        UsageError: something is.
    """
    given = [option for option, value in local.items() if value is not None and value != []]
    if given:
        raise UsageError(f"--server: {given[0]} is the service's to choose, when it is started")
    if len(arguments) > 1:
        raise UsageError(
            f"--server: only the prompt is accepted, the service has its model; found {arguments[0]!r} before it"
        )


def generate_remotely(url: str, asked: Asked, output: Path | None, console: Console) -> list[Path]:
    """Have a service make what is asked for, and write it here; returns the files written.

    A request that is not wanted any more (an error, Ctrl-C) is taken back, unless it is done: what could not be brought
    here stays there, and a warning says how to get it.

    Raises:
        UsageError: a parameter or the output is not accepted.
        ServiceError: the service cannot be reached, or fails.
    """
    began = time.perf_counter()
    with Client(url) as client:
        console.print(f"Asking {client.url}", markup=False, soft_wrap=True)
        request = _submit(client, asked)
        try:
            kind, prompt = request["makes"], str(asked.values["prompt"])
            check_output(output, kind)
            _follow(client, request, console)
        except BaseException:
            client.forget(request)
            raise
        try:
            done = client.get(request["links"]["self"])
            path = output_path(output, kind, prompt=prompt, seed=done["seed"], count=done["outputs"])
            fetching = time.perf_counter()
            written = _fetch(client, request, path, done["outputs"])
        except BaseException:
            key = f'-H "Authorization: Bearer ${KEY}" ' if os.environ.get(KEY) else ""
            where = f"{client.url}{request['links']['result']}?index=0"
            log.warning("the service still has the result; to get it: curl -o FILE %s'%s'", key, where)
            raise
        client.forget(request)
    seconds = {**done["timings"], "fetching": time.perf_counter() - fetching, "in all": time.perf_counter() - began}
    summary(console, seconds, done["seed"])
    return written


def _submit(client: Client, asked: Asked) -> dict[str, Any]:
    def post(values: dict[str, Any]) -> dict[str, Any]:
        plain = {name: as_json(value) for name, value in values.items()}
        for name, value in plain.items():
            check_json(name, value)
        return client.submit(plain)

    with asked.naming_options():
        try:
            return post(asked.values)
        except UnknownParameterError as error:
            values = asked.values_for(error.known)
            if values == asked.values:
                raise
        return post(values)


def _follow(client: Client, request: dict[str, Any], console: Console) -> None:
    """Show a request's steps until it has ended.

    Raises:
        ServiceError: it ended without a result.
    """
    with progress(console) as on_step:
        for kind, details in client.events(request):
            if kind == "step":
                on_step(details["stage"], details["step"], details["steps"])
            elif kind == "retried":
                console.print(f"started anew: {details['reason']}", markup=False, soft_wrap=True)
            elif kind in ("failed", "cancelled"):
                raise ServiceError(f"the service gave the request up: {details.get('reason', kind)}")


def _fetch(client: Client, request: dict[str, Any], path: Path, count: int) -> list[Path]:
    from triptych.result import numbered, write_all

    paths = numbered(path, count)
    writers: list[Callable[[BinaryIO], None]] = [
        partial(client.fetch, request, k, _FORMATS[path.suffix.lower()]) for k in range(count)
    ]
    write_all(paths, writers)
    return paths


def as_json(value: Any) -> Any:
    """Return a parameter's value as it travels: pictures as data URLs."""
    if isinstance(value, list):
        return [as_json(each) for each in value]
    return _data_url(value) if hasattr(value, "tobytes") else value


def check_json(name: str, value: Any) -> None:
    """Check that a value can be sent.

    Raises:
        ParameterError: it holds what JSON, or UTF-8, cannot express.
    """
    try:
        json.dumps(value, allow_nan=False, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise ParameterError(name, value, "valid Unicode text is accepted") from None
    except ValueError:
        raise ParameterError(name, value, "finite numbers are accepted") from None


def _data_url(image: Image) -> str:
    file = io.BytesIO()
    image.save(file, "PNG", compress_level=1)
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode('ascii')}"
