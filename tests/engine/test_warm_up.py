"""What a service warms up with."""

from collections.abc import Callable
from pathlib import Path

import triptych
from triptych import embedded
from triptych.engine.warm_up import warm_up_request


def test_it_is_no_larger_than_what_users_ask_for_by_default() -> None:
    request = warm_up_request(triptych.load(embedded.path(), role="server"))
    assert request is not None
    assert (request.parameters["height"], request.parameters["width"]) == (64, 64)


def test_it_is_small_where_the_default_is_large(tiny_repo: Callable[..., Path]) -> None:
    request = warm_up_request(triptych.load(tiny_repo("flux2_klein"), role="server"))
    assert request is not None
    assert (request.parameters["height"], request.parameters["num_inference_steps"]) == (256, 2)
