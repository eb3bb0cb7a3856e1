"""Errors: what their messages tell of refused values, and what they are in another process."""

from typing import Any

import pytest
from PIL import Image

from triptych.errors import (
    Cancelled,
    MemoryShortageError,
    ModelError,
    ParameterError,
    RemoteError,
    ReplicaLost,
    TriptychError,
    UsageError,
    WireError,
    from_text,
    to_text,
)
from triptych.server.problems import problem_of


def nested(depth: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(depth):
        value = [value]
    return value


PICTURE = Image.new("RGB", (64, 48))


@pytest.mark.parametrize(
    ("value", "told"),
    [
        (17, "17"),
        ("a fox", "'a fox'"),
        ([1, "a"], "[1, 'a']"),
        (10**5000, "int too long to be told"),
        (nested(100_000), "list too long to be told"),
        (PICTURE, "a picture (RGB, 64x48)"),
        ([PICTURE, 5], "[a picture (RGB, 64x48), 5]"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_refused_value_is_told_in_words_that_are_short_and_the_same_every_time(value: object, told: str) -> None:
    error = ParameterError("field", value, "a number is accepted")
    assert (str(error), error.value) == (f"field={told}: a number is accepted", value)
    problem = problem_of(error)
    assert problem.message == str(error)
    assert problem.details["value"] == (value if isinstance(value, str) or value == 17 else told)


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        *((each("why"), each) for each in (Cancelled, ReplicaLost, MemoryShortageError, ModelError, WireError)),
        (ParameterError("n", 0, "1 is accepted"), UsageError),
        (TriptychError("why"), TriptychError),
        (KeyError("why"), RemoteError),
    ],
)
def test_an_error_is_of_the_same_kind_in_another_process(error: Exception, kind: type[TriptychError]) -> None:
    there = from_text(*to_text(error))
    assert type(there) is kind
    assert str(error) in str(there)
