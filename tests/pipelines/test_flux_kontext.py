"""FLUX.1 Kontext gives what diffusers gives, whole and split, editing and drawing, and refuses what it cannot do."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import triptych
from triptych.errors import ParameterError, UnknownParameterError, UsageError

from .parity import DTYPES, ROLES, Parity, assert_joined_within_tolerance, assert_same, differ

TinyRepo = Callable[..., Path]

PROMPT = "a red fox"
SHORT: dict[str, Any] = {"max_sequence_length": 24}
# In 5 steps timesteps come that bfloat16 and float32 scale to different numbers.
PLAIN: dict[str, Any] = {
    "prompt": PROMPT, "height": 160, "width": 96, "max_area": 160 * 96, "num_inference_steps": 5, **SHORT,
}  # fmt: skip
GUIDED: dict[str, Any] = {**PLAIN, "negative_prompt": "an ugly cat", "true_cfg_scale": 4.0}


def picture(shade: int, width: int = 160, height: int = 128) -> Image.Image:
    """A reference image: two gradients, and one channel that is `shade` everywhere."""
    down = Image.linear_gradient("L").resize((width, height))
    right = Image.linear_gradient("L").rotate(90).resize((width, height))
    return Image.merge("RGB", (down, right, Image.new("L", (width, height), shade)))


# At its own size, for a megapixel takes a second.
EDIT: dict[str, Any] = {"image": picture(30), "_auto_resize": False}


@pytest.fixture(scope="module", params=DTYPES)
def either(request: pytest.FixtureRequest, tiny_repo: TinyRepo) -> Parity:
    """In both dtypes. The bfloat16 oracle is `from_pretrained(dtype=torch.bfloat16)`."""
    return Parity(tiny_repo("flux_kontext"), request.param)


@pytest.fixture(scope="module")
def kontext(tiny_repo: TinyRepo) -> Parity:
    return Parity(tiny_repo("flux_kontext"))


@pytest.mark.parametrize("size", [(160, 96), (96, 192)])
@pytest.mark.parametrize("seed", [7, 2**40 + 1])
def test_edited_pictures_are_those_of_diffusers(either: Parity, seed: int, size: tuple[int, int]) -> None:
    for call in (PLAIN, GUIDED):
        sized = {**call, "height": size[0], "width": size[1], "max_area": size[0] * size[1]}
        edited = either.check(**sized, **EDIT, seed=seed, output_types=("latent", "pt"))
        assert edited.shape == (1, 3, *size)


def test_pictures_without_a_reference_are_those_of_diffusers(either: Parity) -> None:
    drawn = either.check(**GUIDED, output_types=("latent", "pt"))
    assert differ(either.check(**GUIDED, **EDIT), drawn)
    either.check(**PLAIN, num_images_per_prompt=2)


def test_true_guidance_changes_the_picture_and_a_scale_of_one_is_none(either: Parity) -> None:
    plain = either.check(**PLAIN, **EDIT)
    assert differ(either.check(**GUIDED, **EDIT), plain)
    assert_same(either.check(**{**GUIDED, "true_cfg_scale": 1.0}, **EDIT), plain, "a negative prompt without guidance")
    assert_same(either.check(**PLAIN, **EDIT, true_cfg_scale=4.0), plain, "guidance without a negative prompt")


def test_a_transformer_without_embedded_guidance_ignores_the_scale(tiny_repo: TinyRepo) -> None:
    without = Parity(tiny_repo("flux_kontext", guidance_embeds=False))
    edited = without.check(**PLAIN, **EDIT)
    assert_same(without.check(**PLAIN, **EDIT, guidance_scale=0.0), edited, "another scale")
    assert differ(without.check(**GUIDED, **EDIT), edited)


def test_several_pictures_of_one_prompt_are_one_batch_of_diffusers(either: Parity) -> None:
    pictures = either.check(**GUIDED, **EDIT, num_images_per_prompt=2)
    assert len(pictures) == 2
    assert differ(pictures[0], pictures[1])
    either.check(**PLAIN, **EDIT, num_images_per_prompt=3)


def test_pil_numpy_and_latent_pictures_are_those_of_diffusers(kontext: Parity) -> None:
    kontext.check(**GUIDED, **EDIT, num_images_per_prompt=2, output_types=("pil", "np", "latent"))


@pytest.mark.parametrize("size", [(170, 131), (96, 160), (50, 300)])
def test_a_reference_is_brought_to_whole_tokens_as_diffusers_does(kontext: Parity, size: tuple[int, int]) -> None:
    edited = kontext.check(**PLAIN, image=picture(30, *size), _auto_resize=False)
    assert_same(kontext.check(**PLAIN, image=[picture(30, *size)], _auto_resize=False), edited, "a list of one")


def test_a_reference_is_brought_to_the_nearest_shape_that_the_model_knows(kontext: Parity) -> None:
    image = picture(30, 320, 200)
    kontext.check(**{**PLAIN, "num_inference_steps": 1}, image=image)
    state = kontext.roles["encoder"].run(triptych.Request(**PLAIN, image=image))
    # 1328 x 800 pixels, in tokens of 32 x 32.
    assert state.fields["image_latents"].shape == (1, 41 * 25, 20)
    assert state.fields["image_latent_ids"].max(dim=0).values.tolist() == [1, 24, 40]


def test_every_size_is_fitted_to_the_area_as_diffusers_does(kontext: Parity) -> None:
    # By default, a megapixel.
    latents = kontext.check(
        prompt=PROMPT, height=160, width=96, num_inference_steps=1, **SHORT, **EDIT, output_types=("latent",)
    )
    assert latents.shape == (1, 41 * 24, 20)
    for height, width, area in ((64, 64, 100 * 170), (301, 127, 20000.0), (96, 160, 96 * 160 + 1)):
        call = {**PLAIN, "height": height, "width": width, "max_area": area}
        assert kontext.check(**call).shape[-2:] != (height, width) or area == 96 * 160 + 1


def test_without_a_size_the_picture_is_square(kontext: Parity) -> None:
    state = kontext.model.admit(triptych.Request(prompt=PROMPT, **EDIT))
    assert (state.fields["height"], state.fields["width"]) == (1024, 1024)


def test_a_size_that_is_fitted_is_remarked_on(kontext: Parity, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        kontext.model.admit(triptych.Request(**{**PLAIN, "max_area": 1024**2}))
        assert "height=160, width=96 is fitted to max_area=1048576: height=1312, width=768" in caplog.text
        caplog.clear()
        kontext.model.admit(triptych.Request(**PLAIN))
        assert not caplog.text


@pytest.mark.parametrize("mode", ["L", "RGBA", "P"])
def test_a_reference_of_other_colours_is_encoded_in_red_green_and_blue(kontext: Parity, mode: str) -> None:
    image = picture(30).convert(mode)
    expected = kontext.diffusers(**PLAIN, image=image.convert("RGB"), _auto_resize=False, output_type="pt")
    assert_same(kontext.split(**PLAIN, image=image, _auto_resize=False, output_type="pt"), expected, mode)


def test_every_parameter_changes_the_picture(kontext: Parity) -> None:
    edited = kontext.check(**GUIDED, **EDIT)
    changes: list[dict[str, Any]] = [
        {"seed": 8},
        {"image": picture(200)},
        {"image": picture(30, 160, 96)},
        {"prompt": "a blue cat"},
        {"prompt_2": "a blue cat"},
        {"negative_prompt": ""},
        {"negative_prompt_2": "blue"},
        {"true_cfg_scale": 2.0},
        {"guidance_scale": 1.0},
        {"num_inference_steps": 2},
        {"max_sequence_length": 4},
    ]
    for change in changes:
        assert differ(kontext.check(**{**GUIDED, **EDIT, **change}), edited), change


def test_given_sigmas_are_used_as_diffusers_uses_them(either: Parity) -> None:
    assert differ(either.check(**PLAIN, **EDIT, sigmas=[1.0, 0.8, 0.1]), either.check(**PLAIN, **EDIT))


def test_given_latents_take_the_place_of_the_noise(either: Parity) -> None:
    noise = torch.randn(1, 5 * 3, 20, generator=torch.Generator().manual_seed(1))
    edited = either.check(**GUIDED, **EDIT, latents=noise)
    assert differ(edited, either.check(**GUIDED, **EDIT))
    assert_same(either.whole(**GUIDED, **EDIT, latents=noise, seed=1, output_type="pt"), edited, "another seed")


def test_given_embeddings_take_the_place_of_the_prompts(either: Parity) -> None:
    call = {name: value for name, value in GUIDED.items() if name not in ("prompt", "negative_prompt")} | EDIT
    with torch.no_grad():
        embeds, pooled, _ = either.pipeline.encode_prompt([PROMPT, "a blue cat"], **SHORT)
        negative, negative_pooled, _ = either.pipeline.encode_prompt(["an ugly cat", ""], **SHORT)
    names = ("prompt_embeds", "pooled_prompt_embeds", "negative_prompt_embeds", "negative_pooled_prompt_embeds")
    both = dict(zip(names, (embeds, pooled, negative, negative_pooled)))
    one = {name: tensor[:1] for name, tensor in both.items()}
    assert_same(either.check(**call, **one), either.check(**GUIDED, **EDIT), "the same prompts")
    assert len(either.check(**call, **both)) == 2
    # Here diffusers fails: it does not repeat embeddings that are given.
    several = either.whole(**call, **one, num_images_per_prompt=2, output_type="pt")
    assert_same(several, either.check(**GUIDED, **EDIT, num_images_per_prompt=2), "two pictures")


def test_a_list_of_prompts_is_as_many_requests(kontext: Parity) -> None:
    call = {**GUIDED, **EDIT, "output_type": "pt"}
    prompts = [PROMPT, "a blue cat"]
    both = kontext.whole(**{**call, "prompt": prompts})
    expected = torch.cat([kontext.diffusers(**{**call, "prompt": prompt}) for prompt in prompts])
    assert_same(both, expected, "two prompts")


@pytest.mark.parametrize("outputs", [1, 2])
def test_joined_branches_stay_within_the_tolerance(
    kontext: Parity, outputs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    call = {**GUIDED, **EDIT, "num_inference_steps": 8, "num_images_per_prompt": outputs}
    assert_joined_within_tolerance(kontext, "kontext_denoising", monkeypatch, call)


@pytest.mark.slow
def test_processes_that_hand_over_files_give_the_same_pixels(kontext: Parity, tmp_path: Path) -> None:
    call = {**GUIDED, **EDIT, "image": [EDIT["image"]], "num_images_per_prompt": 2}
    kontext.check_in_processes(tmp_path, call, ("float32", "bfloat16"))


def test_the_picture_copies_and_noise_do_not_cross_the_wire(kontext: Parity) -> None:
    state = kontext.roles["encoder"].run(triptych.Request(**PLAIN, **EDIT, num_images_per_prompt=4))
    shapes = {name: tuple(value.shape) for name, value in state.fields.items() if isinstance(value, torch.Tensor)}
    assert shapes == {
        "prompt_embeds": (1, 24, 20), "pooled_prompt_embeds": (1, 12), "text_ids": (24, 3),
        "image_latents": (1, 5 * 4, 20), "image_latent_ids": (5 * 4, 3),
    }  # fmt: skip
    assert "image" not in state.fields
    state = kontext.roles["denoiser"].run(state)
    assert [name for name, value in state.fields.items() if isinstance(value, torch.Tensor)] == ["latents"]


def test_encoder_and_decoder_each_load_half_an_autoencoder_and_the_denoiser_none(kontext: Parity) -> None:
    loaded = {role: {name: size for name, size in kontext.roles[role].loaded_bytes.items() if size} for role in ROLES}
    assert {role: set(sizes) for role, sizes in loaded.items()} == {
        "encoder": {"text_encoder", "text_encoder_2", "vae"}, "denoiser": {"transformer"}, "decoder": {"vae"},
    }  # fmt: skip
    state = kontext.pipeline.vae.state_dict()
    for half in ("encoder", "decoder"):
        assert loaded[half]["vae"] == sum(tensor.nbytes for key, tensor in state.items() if key.startswith(half))


def test_a_model_loaded_for_one_task_refuses_the_other(kontext: Parity) -> None:
    drawing = triptych.load(kontext.repo, role="encoder", device="cpu", tasks="text-to-image")
    assert not drawing.loaded_bytes["vae"]
    with pytest.raises(UsageError, match="'edit', but the model was loaded for text-to-image"):
        drawing.run(triptych.Request(**PLAIN, **EDIT))
    editing = triptych.load(kontext.repo, device="cpu", tasks="edit")
    expected = kontext.diffusers(**PLAIN, **EDIT, output_type="pt")
    assert_same(editing.generate(**PLAIN, **EDIT, seed=7, output_type="pt").images, expected, "one task")
    with pytest.raises(UsageError, match="'text-to-image', but the model was loaded for edit"):
        editing.generate(**PLAIN)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"image": []}, ParameterError, "one reference image is accepted"),
        ({"image": [picture(30), picture(200)]}, ParameterError, "one reference image is accepted"),
        ({"image": "fox.png"}, ParameterError, "image='fox.png': a PIL image is accepted, not str"),
        ({"image": picture(30, 31, 64)}, ParameterError, "too small: at least 32 x 32 pixels"),
        ({"image": picture(30), "_auto_resize": 1}, ParameterError, "_auto_resize=1: True or False"),
        ({"max_area": 900}, ParameterError, "width=96: too narrow: at 0 x 32 pixels, of max_area=900"),
        ({"max_area": "large"}, ParameterError, "max_area='large': a number of pixels"),
        ({"height": 0}, ParameterError, "height=0: a whole number of at least 1"),
        ({"width": 10**400}, ParameterError, "width=1000.*: less is accepted: no picture"),
        ({"height": 10**400}, ParameterError, "height=1000.*: less is accepted: no picture"),
        ({"max_area": 10**308, "width": 10**6}, ParameterError, "max_area=1000.*: less is accepted: no picture"),
        ({"latents": torch.zeros(1, 16, 20)}, ParameterError, r"latents='of shape .*\(1, 15, 20\)"),
        ({"true_cfg_scal": 3.0}, UnknownParameterError, "did you mean 'true_cfg_scale'"),
        ({"ip_adapter_image": None}, UnknownParameterError, "no parameter 'ip_adapter_image'"),
        ({"prompt_2": ["a", "b"]}, ParameterError, "prompt_2=.*a text is accepted"),
        ({"max_sequence_length": 513}, UsageError, "cannot be greater than 512"),
        ({"prompt": None}, UsageError, "`prompt` or `prompt_embeds`"),
    ],
)
def test_what_cannot_be_done_is_refused_with_a_reason(
    kontext: Parity, changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    server = triptych.load(kontext.repo, role="server", device="cpu")
    with pytest.raises(error, match=message):
        server.admit(triptych.Request(**{**PLAIN, **changes}))


def test_a_bfloat16_repository_runs_in_float32_and_by_default_in_bfloat16(tiny_repo: TinyRepo) -> None:
    repo = tiny_repo("flux_kontext", dtype="bfloat16")
    assert Parity(repo, "float32").check(**GUIDED, **EDIT).dtype == torch.float32
    Parity(repo, "bfloat16", load_dtype="auto").check(**GUIDED, **EDIT)
