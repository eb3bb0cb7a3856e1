"""The model that ships with the package: emoji of 64 x 64 pixels."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

NAME = "emoji-64"


def path() -> Path:
    """Return the folder of the model, in diffusers' layout."""
    return Path(str(resources.files(__name__) / NAME))
