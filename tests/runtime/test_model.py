"""A loaded model: what a role has, what it refuses, and that a hand-over can be run again."""

import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import triptych
from triptych.errors import Cancelled, ModelError, ParameterError, RoleError, UsageError, WrongRoleError
from triptych.roles import RoleType
from triptych.runtime.model import Model

ASK: dict[str, Any] = {
    "prompt": "a red fox", "seed": 7, "height": 64, "width": 48, "num_inference_steps": 2, "output_type": "pt",
    "max_sequence_length": 24,
}  # fmt: skip


@pytest.fixture(scope="module")
def klein(tiny_repo: Callable[..., Path]) -> Path:
    return tiny_repo("flux2_klein")


@pytest.fixture(scope="module")
def roles(klein: Path) -> dict[str, Model]:
    return {role: triptych.load(klein, role=role, device="cpu") for role in ("encoder", "denoiser", "decoder")}


def test_a_role_has_its_own_stages_and_components_only(roles: dict[str, Model]) -> None:
    assert [stage.name for stage in roles["encoder"].stages] == ["text_encoding", "image_encoding"]
    assert [stage.name for stage in roles["denoiser"].stages] == ["flux2_denoising"]
    assert set(roles["denoiser"].components) == {"scheduler", "transformer", "vae"}
    assert roles["denoiser"].is_hollow("vae")
    assert not roles["denoiser"].is_hollow("transformer")
    with pytest.raises(UsageError, match="'text_encoder' is not loaded here"):
        roles["denoiser"].is_hollow("text_encoder")


def test_the_extra_components_of_a_role_follow_from_its_needs(roles: dict[str, Model]) -> None:
    family = roles["encoder"].family
    assert family.extra_allowed_modules(RoleType.ENCODER) == {"vae"}
    assert family.extra_allowed_modules(RoleType.DENOISER) == {"vae"}
    assert family.extra_allowed_modules(RoleType.DECODER) == frozenset()


def test_two_roles_in_one_process_load_what_both_need(klein: Path) -> None:
    both = triptych.load(klein, role="encoder+decoder", device="cpu")
    apart = triptych.plan(klein)
    assert "transformer" not in both.components
    assert both.loaded_bytes["vae"] == apart.whole["vae"]
    state = both.run(triptych.Request(**ASK))
    assert state.next_role is RoleType.DENOISER


def test_a_server_loads_no_weights_and_admits_requests(klein: Path) -> None:
    server = triptych.load(klein, role="server", device="cpu")
    assert sum(server.loaded_bytes.values()) == 0
    state = server.admit(triptych.Request(**ASK))
    assert state.next_role is RoleType.ENCODER
    with pytest.raises(ParameterError, match="height=66.*the nearest: 64 or 72"):
        server.admit(triptych.Request(**{**ASK, "height": 66}))


def test_a_hand_over_can_be_run_again_with_the_same_result(roles: dict[str, Model]) -> None:
    handed = roles["encoder"].run(triptych.Request(**ASK))
    before = bytes(handed.to_bytes())
    first = roles["decoder"].run(roles["denoiser"].run(handed)).result.images
    assert bytes(handed.to_bytes()) == before
    again = roles["decoder"].run(roles["denoiser"].run(handed)).result.images
    assert torch.equal(first, again)


def test_only_what_a_later_role_reads_travels(roles: dict[str, Model]) -> None:
    state = roles["encoder"].run(triptych.Request(**ASK))
    assert {"prompt", "max_sequence_length"}.isdisjoint(state.fields)
    assert {"prompt_embeds", "generator", "height"} <= set(state.fields)
    state = roles["denoiser"].run(state)
    assert {"prompt_embeds", "generator", "scheduler", "conditioning"}.isdisjoint(state.fields)


def test_every_wrong_turn_is_an_error(roles: dict[str, Model]) -> None:
    with pytest.raises(WrongRoleError, match="begins with the encoder"):
        roles["denoiser"].run(triptych.Request(**ASK))
    state = roles["encoder"].run(triptych.Request(**ASK))
    with pytest.raises(WrongRoleError, match="the denoiser's turn"):
        roles["decoder"].run(state)
    with pytest.raises(WrongRoleError, match="no result yet"):
        _ = state.result
    with pytest.raises(WrongRoleError, match="needs a whole model"):
        roles["encoder"].generate(**ASK)


def test_a_step_can_cancel_its_request(klein: Path) -> None:
    seen: list[tuple[str, int, int]] = []

    def stop(stage: str, step: int, steps: int) -> None:
        seen.append((stage, step, steps))
        raise Cancelled("enough")

    with pytest.raises(Cancelled):
        triptych.load(klein, device="cpu").generate(**ASK, on_step=stop)
    assert seen == [("flux2_denoising", 1, 2)]


def test_a_task_that_was_not_loaded_is_refused(klein: Path) -> None:
    from PIL import Image

    model = triptych.load(klein, device="cpu", tasks="text-to-image")
    with pytest.raises(UsageError, match="a request for 'edit', but the model was loaded for text-to-image"):
        model.generate(**ASK, image=Image.new("RGB", (64, 64)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_inference_steps": 0}, "num_inference_steps=0: a whole number of at least 1"),
        ({"num_inference_steps": True}, "num_inference_steps=True"),
        ({"seed": -1}, "seed=-1"),
        ({"guidance_scale": float("nan")}, "guidance_scale=nan: a finite number"),
        ({"output_type": "jpeg"}, "output_type='jpeg': one of pil, np, pt, latent"),
        ({"prompt": 3}, "prompt=3: a text is accepted"),
        ({"image": "fox.png"}, "image='fox.png'"),
        ({"image": []}, "image="),
        ({"guidance": 3.0}, "no parameter 'guidance'; did you mean 'guidance_scale'"),
        ({"generator": None}, "no parameter 'generator'"),
    ],
)
def test_a_bad_parameter_is_named_with_its_value_and_what_is_accepted(
    roles: dict[str, Model], change: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError) as error:
        roles["encoder"].run(triptych.Request(**{**ASK, **change}))
    assert message in str(error.value)


def test_a_seed_that_was_not_given_is_drawn_and_reported(klein: Path) -> None:
    model = triptych.load(klein, device="cpu")
    ask = {name: value for name, value in ASK.items() if name != "seed"}
    one, other = model.generate(**ask), model.generate(**ask)
    assert one.seed != other.seed
    assert torch.equal(model.generate(**ask, seed=one.seed).images, one.images)


def test_loading_says_what_was_skipped_and_what_that_saved(klein: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="triptych"):
        triptych.load(klein, role="decoder", device="cpu")
    said = [record.getMessage() for record in caplog.records if record.name == "triptych.runtime.model"]
    assert len(said) == 1
    assert "flux2_denoising" in said[0]
    assert "transformer" in said[0]
    assert "saved" in said[0]


def test_an_unknown_device_or_role_is_a_usage_error(klein: Path) -> None:
    with pytest.raises(UsageError, match="device='cuda:99' is not available|device='cuda:99'"):
        triptych.load(klein, device="cuda:99")
    with pytest.raises(RoleError):
        triptych.load(klein, role="painter")


def test_several_prompts_are_as_many_requests_with_one_seed(klein: Path) -> None:
    model = triptych.load(klein, device="cpu")
    ask = {**ASK, "prompt": ["a red fox", "a blue house"], "seed": None}
    both = model.generate(**ask)
    single = [model.generate(**{**ask, "prompt": prompt, "seed": both.seed}).images for prompt in ask["prompt"]]
    assert torch.equal(both.images, torch.cat(single))
    assert both.parameters["prompt"] == ask["prompt"]


def test_the_result_of_several_prompts_tells_what_each_was_made_of(tiny_repo: Callable[..., Path]) -> None:
    ask = {**ASK, "prompt": ["a red fox", "a red fox"], "negative_prompt": ["blurred", None], "true_cfg_scale": 2.0}
    told = triptych.load(tiny_repo("flux"), device="cpu").generate(**ask).parameters
    settled = {"exact": True, "guidance_scale": 3.5}
    assert told == {name: value for name, value in ask.items() if name != "seed"} | settled | {"seed": 7}


def test_a_model_s_own_defaults_must_be_parameters_of_its_family(klein: Path, tmp_path: Path) -> None:
    shutil.copytree(klein, tmp_path / "model")
    (tmp_path / "model/triptych.json").write_text('{"defaults": {"guidance": 3.0}}')
    with pytest.raises(ModelError, match=r"triptych.json: .* no parameter 'guidance'; did you mean 'guidance_scale'"):
        triptych.load(tmp_path / "model", device="cpu")
