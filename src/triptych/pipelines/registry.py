"""Finds the family file that serves a pipeline class. Adding a family adds a file here and touches none."""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache
from pathlib import Path

from triptych import pipelines
from triptych.components.repository import Repository
from triptych.errors import UnsupportedFamilyError, did_you_mean
from triptych.pipelines.base import Family


@cache
def families() -> dict[str, type[Family]]:
    """Return the family of every pipeline class served, by the class's name."""
    found: dict[str, type[Family]] = {}
    for module in pkgutil.iter_modules(pipelines.__path__):
        for value in vars(importlib.import_module(f"{pipelines.__name__}.{module.name}")).values():
            if isinstance(value, type) and issubclass(value, Family) and value is not Family:
                found.update(dict.fromkeys(value.pipelines, value))
    return dict(sorted(found.items()))


def family_of(pipeline: str) -> type[Family]:
    """Return the family that serves a pipeline class.

    Raises:
        UnsupportedFamilyError: none does.
    """
    if pipeline not in families():
        raise UnsupportedFamilyError(
            f"no family serves {pipeline!r}{did_you_mean(pipeline, families())}. Served: {', '.join(families())}"
        )
    return families()[pipeline]


def find_family(source: str | Path, *, revision: str | None = None, variant: str | None = None) -> Family:
    """Open a model repository, for whoever `check`s its family later: that imports the model's libraries.

    Raises:
        ModelError: the repository is missing, damaged or not served.
    """
    repository = Repository.open(source, revision=revision, variant=variant)
    return family_of(repository.family)(repository)


def open_family(source: str | Path, *, revision: str | None = None, variant: str | None = None) -> Family:
    """Open a model repository and prove its family's graph; reads no weights.

    Raises:
        ModelError: the repository is missing, damaged or not served, or lacks a component.
        RecipeError: the family's stages contradict each other.
    """
    family = find_family(source, revision=revision, variant=variant)
    family.check()
    return family
