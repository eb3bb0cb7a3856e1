"""State: whose turn it is, what is kept, and the trip over the wire."""

import pytest
import torch

from triptych.errors import RecipeError, WireError, WrongRoleError
from triptych.roles import RoleType
from triptych.state import State, check_no_meta

ROUTE = (RoleType.ENCODER, RoleType.DENOISER, RoleType.DECODER)


def some_state(**fields: object) -> State:
    return State("SomePipeline", "abc", "text-to-image", ROUTE, fields={"seed": 7, **fields})


def test_the_next_role_follows_the_route_and_is_none_at_its_end() -> None:
    state = some_state()
    turns = []
    while state.next_role is not None:
        turns.append(state.next_role)
        state.position += 1
    assert turns == list(ROUTE)


def test_there_is_no_result_before_the_last_segment() -> None:
    state = some_state(images=["picture"])
    with pytest.raises(WrongRoleError, match="encoder's turn"):
        _ = state.result
    state.position = 3
    assert state.result.images == ["picture"]
    assert state.result.seed == 7


def test_a_state_survives_the_wire_with_its_random_state() -> None:
    generator = torch.Generator().manual_seed(3)
    torch.randn(5, generator=generator)
    embeds = torch.randn(2, 3).to(torch.bfloat16)
    state = some_state(generator=generator, prompt_embeds=embeds, sizes=[(1, 2)], nested={"a": [torch.ones(2)]})
    state.position, state.timings = 1, {"text": 0.5}
    back = State.from_bytes(bytes(state.to_bytes()))
    assert (back.family, back.fingerprint, back.task, back.route) == ("SomePipeline", "abc", "text-to-image", ROUTE)
    assert (back.position, back.timings) == (1, {"text": 0.5})
    assert torch.equal(back.fields["prompt_embeds"], embeds)
    assert back.fields["sizes"] == [(1, 2)]
    assert torch.equal(back.fields["nested"]["a"][0], torch.ones(2))
    assert torch.equal(torch.randn(4, generator=back.fields["generator"]), torch.randn(4, generator=generator))


def test_a_field_that_cannot_be_carried_is_named() -> None:
    with pytest.raises(WireError, match="scheduler"):
        some_state(scheduler=object()).to_bytes()


@pytest.mark.parametrize(
    "change",
    [{"position": 9}, {"position": -1}, {"route": ["painter"]}, {"family": 3}, {"task": None}, {"parameters": [1]}],
)
def test_a_header_that_makes_no_sense_is_refused(change: dict[str, object]) -> None:
    from triptych import wire

    header = {
        "family": "F", "fingerprint": "f", "task": "t", "route": ["encoder"], "position": 0, "timings": {}, **change,
    }  # fmt: skip
    with pytest.raises(WireError, match="not a state"):
        State.from_bytes(bytes(wire.pack({}, header)))  # type: ignore[arg-type]


def test_what_is_told_of_the_request_stays_and_survives_the_wire() -> None:
    told = {"height": 16, "guidance_scale": 3.5, "sigmas": [1.0, 0.5], "exact": True, "negative_prompt": None}
    state = State("SomePipeline", "abc", "text-to-image", ROUTE, 3, {"seed": 7, "images": []}, parameters=told)
    state.keep({"seed", "images"})
    back = State.from_bytes(bytes(state.copy().to_bytes()))
    assert back.parameters == back.result.parameters == told


def test_what_a_stage_settles_is_told_of_the_state_it_ran_on_alone() -> None:
    state = some_state(prompt="a fox", height=None, output_type="pt", sigmas=[1.0])
    state.tell()
    assert state.parameters == {"prompt": "a fox", "output_type": "pt"}
    later = state.copy()
    later.fields |= {"prompt": "a red fox", "height": 64}
    later.keep({"seed"})
    assert (later.fields, state.parameters) == ({"seed": 7}, {"prompt": "a fox", "output_type": "pt"})
    later.position = 3
    assert later.result.parameters == {"prompt": "a red fox", "output_type": "pt", "height": 64}


def test_keep_drops_what_is_not_live() -> None:
    state = some_state(a=1, b=2)
    state.keep({"seed", "b"})
    assert state.fields == {"seed": 7, "b": 2}


@pytest.mark.parametrize(
    "value", [torch.empty(1, device="meta"), [torch.empty(1, device="meta")], {"x": (torch.empty(1, device="meta"),)}]
)
def test_a_tensor_without_data_in_the_state_is_an_error(value: object) -> None:
    with pytest.raises(RecipeError, match="'denoise' left a tensor without data in field 'latents'"):
        check_no_meta({"latents": value}, {"latents"}, "denoise")
    check_no_meta({"latents": torch.ones(1), "other": value}, {"latents"}, "denoise")
