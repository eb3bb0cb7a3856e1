"""What the user typed after `triptych generate`, checked and turned into a request."""

from __future__ import annotations

import json
import os.path
import re
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from triptych.cli.media import open_media
from triptych.cli.options import PARAMETER_OPTIONS, option_of
from triptych.errors import ParameterError, UnknownParameterError, UsageError, shown

if TYPE_CHECKING:
    from triptych.runtime.model import Model
    from triptych.state import State


_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def model_and_prompt(arguments: list[str], model: str | None) -> tuple[str | Path, str]:
    """Return the model and the prompt that the positional arguments and `--model` name.

    Raises:
        UsageError: there are too many or too few.
    """
    from triptych import embedded

    example = 'for example: triptych generate "a red heart"'
    if model is not None and len(arguments) == 2:
        raise UsageError("the model is given twice: by --model and before the prompt")
    if len(arguments) > 2 or (model is not None and len(arguments) > 1):
        raise UsageError(f"{len(arguments)} arguments where [MODEL] PROMPT are accepted; quote the prompt, {example}")
    if not arguments:
        raise UsageError(f"the prompt is missing; {example}")
    if len(arguments) == 2:
        return arguments[0], arguments[1]
    # Not `Path.is_dir`: it raises for what is too long to be a path, as prompts may be.
    if model is None and (os.path.isdir(arguments[0]) or _HUB_ID.fullmatch(arguments[0])):
        raise UsageError(
            f"{arguments[0]!r} looks like a model, and the prompt is missing; {example}. If it is the prompt, put a space "
            "after it"
        )
    return embedded.path() if model is None else model, arguments[0]


@dataclass
class Asked:
    """The request parameters that the user gave, and the option each came from. The others are the model's."""

    values: dict[str, Any] = field(default_factory=dict)
    options: dict[str, str] = field(default_factory=dict)

    def add(self, name: str, value: object, option: str | None = None) -> None:
        """Add a parameter unless its value is None, which means that it was not given.

        Raises:
            UsageError: it was given already, by another option.
        """
        option = option or PARAMETER_OPTIONS[name]
        if value is None and not option.startswith("--param"):
            return
        if name in self.values:
            raise UsageError(f"{option}: {name} is given already, by {self.options[name]}")
        self.values[name], self.options[name] = value, option

    def admit(self, model: Model) -> State:
        """Let a model check the parameters; returns the request's state.

        Raises:
            UsageError: one is not accepted; the message begins with its option.
        """
        from triptych.pipelines.base import in_colour
        from triptych.request import Request

        values = self.values_for(model.family.parameters)
        if not model.family.transparency:
            values = {name: in_colour(value) for name, value in values.items()}
        with self.naming_options():
            return model.admit(Request(**values))

    def values_for(self, known: Collection[str]) -> dict[str, Any]:
        """Return the parameters for a family that knows these: it may count its outputs as images or as videos."""
        if "num_images_per_prompt" in known or "num_videos_per_prompt" not in known:
            return dict(self.values)
        return {name.replace("num_images_per", "num_videos_per"): value for name, value in self.values.items()}

    @contextmanager
    def naming_options(self) -> Iterator[None]:
        """Let the message of a parameter that is refused begin with its option.

        Raises:
            UsageError: one was.
        """
        try:
            yield
        except UnknownParameterError as error:
            raise UsageError(f"{self._option(error.field)}: {error}") from error
        except ParameterError as error:
            option = self._option(error.field)
            value = f" {shown(error.value)}" if isinstance(error.value, (str, int, float, list)) else ""
            raise UsageError(f"{option}{value}: {error.accepted}") from error

    def _option(self, name: str) -> str:
        return self.options.get(name.replace("num_videos_per", "num_images_per"), option_of(name))


def parse_size(text: str | None) -> tuple[int, ...]:
    """Return width and height, or nothing where no size was given.

    Raises:
        UsageError: it is not two numbers.
    """
    if text is None:
        return ()
    match = re.fullmatch(r"(\d{1,9})\s*[xX×*]\s*(\d{1,9})", text.strip(), re.ASCII)
    if match is None:
        raise UsageError(f"--size {text!r}: width and height are accepted, as in 1024x768")
    return int(match[1]), int(match[2])


def parse_loras(texts: Iterable[str]) -> list[dict[str, Any]] | None:
    """Return the LoRAs that `PATH` or `PATH:SCALE` name; None where there is none.

    Raises:
        UsageError: a text names no file.
    """
    loras: list[dict[str, Any]] = []
    for text in texts:
        path, scale = text, 1.0
        if match := re.fullmatch(r"(.*):([^:/\\]+)", text, re.DOTALL):
            try:
                path, scale = match[1], float(match[2])
            except ValueError:  # a colon of the path's own
                pass
        if not path:
            raise UsageError(f"--lora {text!r}: PATH or PATH:SCALE is accepted, as in style.safetensors:0.8")
        loras.append({"path": path, "scale": scale})
    return loras or None


def parse_parameters(texts: Iterable[str]) -> Iterator[tuple[str, object]]:
    """Yield names and values of `name=value`, the value in JSON or, where it is none, plain text.

    `name=@file` stands for what the file shows: a picture, or the frames of a video.

    Raises:
        UsageError: a text has no name, its value is Python rather than JSON, or a file cannot be read.
    """
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name.strip().isidentifier():
            raise UsageError(f"--param {text!r}: name=value is accepted, as in --param sigmas=[1.0,0.5]")
        if value in ("True", "False", "None"):
            json_word = {"True": "true", "False": "false", "None": "null"}[value]
            raise UsageError(f"--param {text!r}: values are JSON: write {json_word}")
        if value.startswith("@"):
            yield name.strip(), open_media(Path(value[1:]), f"--param {name.strip()}")
            continue
        try:
            yield name.strip(), json.loads(value)
        except RecursionError:
            raise UsageError(f"--param {name.strip()}: the value has too many brackets inside one another") from None
        except ValueError:
            if value[:1] in ("[", "{", '"'):
                raise UsageError(f"--param {text!r}: the value is not valid JSON") from None
            yield name.strip(), value
