"""Requests: which values are accepted, before any model is asked."""

import numpy as np
import pytest

from triptych.errors import ParameterError
from triptych.request import OWN, fill_in

TEXTS = [f"{negative}prompt{number}" for negative in ("", "negative_") for number in ("", "_2", "_3")]
DEFAULTS = {**dict.fromkeys(TEXTS), "output_type": "pil", **OWN}


@pytest.mark.parametrize(
    ("name", "value", "accepted"),
    [
        *((name, "half a \ud800 character", "valid Unicode text") for name in TEXTS),
        *((name, ["a", "b"], "a text is accepted") for name in TEXTS),
        ("output_type", np.zeros(2), "one of pil, np, pt, latent"),
        ("output_type", ["pil"], "one of pil, np, pt, latent"),
    ],
)
def test_a_value_of_the_wrong_kind_is_refused_by_its_name(name: str, value: object, accepted: str) -> None:
    with pytest.raises(ParameterError, match=accepted) as caught:
        fill_in({name: value}, DEFAULTS, {}, "SomePipeline")
    assert caught.value.field == name


def test_text_of_any_script_is_accepted() -> None:
    assert fill_in({"prompt": "赤い狐 🦊"}, DEFAULTS, {}, "SomePipeline")["prompt"] == "赤い狐 🦊"
