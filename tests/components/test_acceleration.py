"""Accelerations are plain values, and a wrong one is refused when it is made."""

import json
import pickle
from typing import Any

import pytest

from triptych.components.acceleration import Acceleration, parse_acceleration, to_plain
from triptych.errors import ParameterError, RoleError, UnknownParameterError, UsageError
from triptych.roles import RoleType


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"offload": "disk"}, "offload='disk': group is accepted"),
        ({"quantization": "fp9"}, "quantization='fp9': fp8 or int8 is accepted; did you mean 'fp8'?"),
        ({"cache": "first_blok"}, "cache='first_blok': first_block.* did you mean 'first_block'?"),
        ({"cache": "first_block:2"}, "a share between 0 and 1"),
        ({"cache": "first_block:little"}, "a share between 0 and 1"),
        ({"cache": "taylorseer:2.5"}, "a whole number of steps from 2 on"),
        ({"cache": "taylorseer:1"}, "a whole number of steps from 2 on"),
        ({"cache": "taylorseer:inf"}, "a whole number of steps from 2 on"),
        ({"cache": "taylorseer:nan"}, "a whole number of steps from 2 on"),
        ({"cache": 3}, "cache=3: a text or None"),
        ({"attention": True}, "attention=True: a text or None"),
        ({"offload": ["group"]}, "offload=.*: a text or None"),
        ({"tiling": "no"}, "tiling='no': True or False"),
        ({"compile": 1}, "compile=1: True or False"),
        ({"ulysses": 0}, "ulysses=0: 1 or more ranks"),
        ({"ulysses": "2"}, "ulysses='2': 1 or more ranks are accepted, a whole number"),
        ({"ulysses": 1.5}, "ulysses=1.5: 1 or more ranks are accepted, a whole number"),
        ({"ring": True}, "ring=True: 1 or more ranks are accepted, a whole number"),
        ({"ring": -1}, "ring=-1: 1 or more ranks"),
    ],
)
def test_a_wrong_value_is_refused_by_name(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ParameterError, match=message):
        Acceleration(**values)


def test_a_step_cache_excludes_several_ranks() -> None:
    with pytest.raises(UsageError, match="cache='first_block' with 4 ranks"):
        Acceleration(cache="first_block", ulysses=2, cfg_parallel=True)


def test_integers_are_not_offloaded() -> None:
    with pytest.raises(UsageError, match="quantization='int8' with offload='group'"):
        Acceleration(quantization="int8", offload="group")


def test_an_acceleration_tells_what_is_on() -> None:
    assert str(Acceleration(compile=True, cache="first_block:0.1")) == "compile, cache=first_block:0.1"
    assert not Acceleration()
    assert Acceleration(ring=2, ulysses=3).ranks == 6


def test_only_what_cannot_be_left_out_for_one_request_makes_exact_impossible() -> None:
    assert Acceleration(compile=True, quantization="fp8").inexact == ("compile", "quantization")
    assert Acceleration(attention="native", cache="taylorseer", tiling=True, offload="group").inexact == ()


def test_accelerations_travel_to_other_processes() -> None:
    asked = {RoleType.DENOISER: Acceleration(cache="taylorseer:4"), RoleType.DECODER: Acceleration(tiling=True)}
    assert parse_acceleration(json.loads(json.dumps(to_plain(asked)))) == asked
    assert pickle.loads(pickle.dumps(asked)) == asked


def test_roles_may_be_named_in_text_and_those_without_anything_are_left_out() -> None:
    assert parse_acceleration({"Denoising": {"compile": True}, "encoder": Acceleration()}) == {
        RoleType.DENOISER: Acceleration(compile=True)
    }
    assert parse_acceleration(None) == {}
    assert parse_acceleration(Acceleration(tiling=True), [RoleType.DECODER]) == {
        RoleType.DECODER: Acceleration(tiling=True)
    }


@pytest.mark.parametrize(
    ("spec", "error", "message"),
    [
        (Acceleration(compile=True), UsageError, "say for which role"),
        ({"denoisr": Acceleration()}, RoleError, "did you mean 'denoiser'"),
        ({"server": Acceleration()}, ParameterError, "one of the roles encoder, denoiser, decoder is accepted"),
        ({"denoiser": {"compiled": True}}, UnknownParameterError, "did you mean 'compile'"),
        ("fp8", ParameterError, "acceleration='fp8': an Acceleration or a mapping"),
        ({"denoiser": "fp8"}, ParameterError, "acceleration={'denoiser': 'fp8'}: an Acceleration or a mapping"),
        ({"denoiser": 8}, ParameterError, "acceleration={'denoiser': 8}: an Acceleration or a mapping"),
    ],
)
def test_it_has_to_be_clear_which_role_and_which_field_is_meant(
    spec: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        parse_acceleration(spec)
