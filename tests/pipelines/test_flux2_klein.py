"""FLUX.2-klein gives what diffusers gives, whole and split, drawing and editing, and refuses what it cannot do."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from PIL import Image

import triptych
from triptych.errors import ParameterError, UnknownParameterError, UsageError, WireError, WrongRoleError

from .parity import ROLES, Forwards, Parity, assert_joined_within_tolerance, assert_same, differ

PROMPT = "a red fox"
SHORT: dict[str, Any] = {"max_sequence_length": 48}
CALL: dict[str, Any] = {"prompt": PROMPT, "height": 64, "width": 48, "num_inference_steps": 3, **SHORT}
GUIDED: dict[str, Any] = {**CALL, "guidance_scale": 4.0}
PLAIN: dict[str, Any] = {**CALL, "guidance_scale": 1.0}


def picture(shade: int, width: int = 80, height: int = 64) -> Image.Image:
    """A reference image: two gradients, and one channel that is `shade` everywhere."""
    down = Image.linear_gradient("L").resize((width, height))
    right = Image.linear_gradient("L").rotate(90).resize((width, height))
    return Image.merge("RGB", (down, right, Image.new("L", (width, height), shade)))


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def either(request: pytest.FixtureRequest, tiny_repo: Callable[..., Path]) -> Parity:
    """In both dtypes. The bfloat16 oracle is `from_pretrained(dtype=torch.bfloat16)`."""
    return Parity(tiny_repo("flux2_klein"), request.param)


@pytest.fixture(scope="module")
def klein(tiny_repo: Callable[..., Path]) -> Parity:
    return Parity(tiny_repo("flux2_klein"))


@pytest.mark.parametrize("size", [(64, 48), (40, 72)])
@pytest.mark.parametrize("seed", [7, 2**40 + 1])
def test_guided_pictures_are_those_of_diffusers(either: Parity, seed: int, size: tuple[int, int]) -> None:
    either.check(**{**GUIDED, "height": size[0], "width": size[1]}, seed=seed, output_types=("latent", "pt"))


def test_pictures_without_guidance_are_those_of_diffusers(either: Parity) -> None:
    assert differ(either.check(**PLAIN), either.check(**GUIDED))


def test_several_pictures_of_one_prompt_are_one_batch_of_diffusers(either: Parity) -> None:
    pictures = either.check(**GUIDED, num_images_per_prompt=2)
    assert len(pictures) == 2
    assert differ(pictures[0], pictures[1])
    either.check(**PLAIN, num_images_per_prompt=3)


def test_pil_and_numpy_pictures_are_those_of_diffusers(klein: Parity) -> None:
    klein.check(**GUIDED, num_images_per_prompt=2, output_types=("pil", "np", "latent"))


def test_a_picture_edited_after_one_reference_is_that_of_diffusers(either: Parity) -> None:
    edited = either.check(**GUIDED, image=picture(30))
    assert_same(either.check(**GUIDED, image=[picture(30)]), edited, "a list of one")
    assert differ(either.check(**GUIDED, image=picture(200)), edited)
    assert differ(either.check(**PLAIN, image=picture(30)), edited)
    assert differ(either.check(**GUIDED), edited)


def test_a_picture_edited_after_two_references_is_that_of_diffusers(either: Parity) -> None:
    one, other = picture(30), picture(200, 72, 104)
    edited = either.check(**GUIDED, image=[one, other], num_images_per_prompt=2, output_types=("latent", "pt"))
    assert differ(either.check(**GUIDED, image=[other, one], num_images_per_prompt=2), edited)


@pytest.mark.parametrize("given", [{}, {"height": 40}, {"width": 40}])
def test_an_edited_picture_takes_the_size_it_is_not_given_from_the_first_reference(
    either: Parity, given: dict[str, int]
) -> None:
    call = {name: value for name, value in GUIDED.items() if name not in ("height", "width")}
    # 85 x 70 is no multiple of 8: the oracle cuts it to 80 x 64.
    edited = either.check(**call, **given, image=[picture(30, 85, 70), picture(200)])
    assert edited.shape[-2:] == (given.get("height", 64), given.get("width", 80))


def test_a_reference_beyond_a_megapixel_is_shrunk_as_diffusers_does(klein: Parity) -> None:
    large = picture(30, 2048, 1000)
    width, height = klein.pipeline.image_processor._resize_to_target_area(large, 1024 * 1024).size
    assert width * height < large.width * large.height
    state = klein.model.admit(triptych.Request(prompt=PROMPT, image=large))
    assert (state.fields["width"], state.fields["height"]) == (width // 8 * 8, height // 8 * 8)


def in_mode(mode: str, width: int, height: int) -> Image.Image:
    """A reference image in a mode that does not travel."""
    if mode == "I;16":
        return Image.fromarray(np.asarray(picture(30, width, height).convert("L")).astype(np.uint16) * 2)
    return picture(30, width, height).convert(mode)


@pytest.mark.parametrize(
    ("mode", "size"),
    [
        ("P", (85, 70)),
        ("CMYK", (85, 70)),
        ("I;16", (85, 70)),
        pytest.param("P", (1300, 1000), marks=pytest.mark.slow),
    ],
)
def test_a_reference_in_a_mode_that_does_not_travel_is_read_as_diffusers_does(
    klein: Parity, mode: str, size: tuple[int, int]
) -> None:
    image, call = in_mode(mode, *size), {**PLAIN, "num_inference_steps": 1}
    assert image.mode == mode
    edited = klein.check(**call, image=image)
    # What a server admits goes to the encoder as bytes.
    front = triptych.load(klein.repo, role="server", device="cpu")
    state = front.admit(triptych.Request(**call, image=image, seed=7, output_type="pt"))
    for role in ROLES:
        state = klein.roles[role].run(triptych.State.from_bytes(bytes(state.to_bytes())))
    assert_same(state.result.images, edited, "from a server")


@pytest.mark.parametrize("mode", ["P", "CMYK", "I;16"])
def test_a_reference_in_a_mode_that_does_not_travel_is_shrunk_before_it_is_converted(klein: Parity, mode: str) -> None:
    image, processor = in_mode(mode, 1300, 1000), klein.pipeline.image_processor
    (admitted,) = klein.model.admit(triptych.Request(**CALL, image=image)).fields["image"]
    shrunk = processor._resize_to_target_area(image, 1024 * 1024)
    size = {"height": shrunk.height // 8 * 8, "width": shrunk.width // 8 * 8, "resize_mode": "crop"}
    assert_same(processor.preprocess(admitted, **size), processor.preprocess(shrunk, **size), mode)
    assert admitted.mode == "RGB" and admitted.size == shrunk.size
    if mode == "P":
        converted_first = processor._resize_to_target_area(image.convert("RGB"), 1024 * 1024)
        assert np.any(np.asarray(converted_first) != np.asarray(admitted))


def test_a_distilled_model_takes_no_guidance(tiny_repo: Callable[..., Path]) -> None:
    distilled = Parity(tiny_repo("flux2_klein", is_distilled=True))
    drawn = distilled.check(**GUIDED)
    assert_same(distilled.check(**PLAIN), drawn, "guidance asked for and not")
    distilled.check(**GUIDED, image=picture(30), num_images_per_prompt=2)
    Parity(distilled.repo, "bfloat16").check(**GUIDED)


def test_each_of_seed_prompt_guidance_steps_and_sequence_length_changes_the_picture(klein: Parity) -> None:
    drawn = klein.check(**GUIDED)
    changes: list[dict[str, Any]] = [
        {"seed": 8},
        {"prompt": "a blue cat"},
        {"guidance_scale": 2.0},
        {"num_inference_steps": 2},
        {"max_sequence_length": 512},
    ]
    for change in changes:
        assert differ(klein.check(**{**GUIDED, **change}), drawn), change


def test_given_sigmas_are_used_as_diffusers_uses_them(either: Parity) -> None:
    assert differ(either.check(**GUIDED, sigmas=[1.0, 0.8, 0.1]), either.check(**GUIDED))


def test_given_latents_take_the_place_of_the_noise(either: Parity) -> None:
    noise = torch.randn(1, 24, 8, 6, generator=torch.Generator().manual_seed(1))
    drawn = either.check(**GUIDED, latents=noise)
    assert differ(drawn, either.check(**GUIDED))
    assert_same(either.whole(**GUIDED, latents=noise, seed=1, output_type="pt"), drawn, "another seed")
    either.check(**GUIDED, latents=noise, image=picture(30))


def test_given_embeddings_take_the_place_of_the_prompt(either: Parity) -> None:
    call = {name: value for name, value in GUIDED.items() if name != "prompt"}
    embeds, _ = either.pipeline.encode_prompt(PROMPT, **SHORT)
    negative, _ = either.pipeline.encode_prompt("", **SHORT)
    drawn = either.check(**GUIDED, num_images_per_prompt=2)
    assert_same(either.check(**call, prompt_embeds=embeds, num_images_per_prompt=2), drawn, "the same prompt")
    both = {"prompt_embeds": embeds, "negative_prompt_embeds": negative}
    assert_same(either.check(**call, **both, num_images_per_prompt=2), drawn, "the same empty prompt")
    both["negative_prompt_embeds"] = embeds
    assert differ(either.check(**call, **both, num_images_per_prompt=2), drawn)


def test_a_list_of_prompts_is_as_many_requests(klein: Parity) -> None:
    call = {**GUIDED, "output_type": "pt"}
    prompts = [PROMPT, "a blue cat"]
    both = klein.whole(**{**call, "prompt": prompts})
    assert_same(both, torch.cat([klein.diffusers(**{**call, "prompt": prompt}) for prompt in prompts]), "two prompts")
    assert len(klein.whole(**{**GUIDED, "prompt": prompts, "num_images_per_prompt": 2})) == 4


@pytest.mark.parametrize("changes", [{}, {"num_images_per_prompt": 2}, {"image": [picture(30), picture(200)]}])
def test_joined_branches_stay_within_the_tolerance(
    klein: Parity, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    call = {**GUIDED, "num_inference_steps": 8, **changes}
    assert_joined_within_tolerance(klein, "flux2_denoising", monkeypatch, call)


def test_branches_of_two_lengths_are_not_joined(klein: Parity, monkeypatch: pytest.MonkeyPatch) -> None:
    call = {name: value for name, value in GUIDED.items() if name != "prompt"}
    embeds, _ = klein.pipeline.encode_prompt(PROMPT, max_sequence_length=40)
    expected = klein.check(**call, prompt_embeds=embeds)
    forwards = Forwards(klein.model, "flux2_denoising", monkeypatch)
    assert_same(klein.whole(**call, prompt_embeds=embeds, output_type="pt", exact=False), expected, "one by one")
    forwards.close()
    assert forwards.count == 2 * GUIDED["num_inference_steps"]


def test_processes_that_hand_over_files_give_the_same_pixels(klein: Parity, tmp_path: Path) -> None:
    call = {**GUIDED, "image": [picture(30), picture(200)], "num_images_per_prompt": 2}
    klein.check_in_processes(tmp_path, call, ("float32", "bfloat16"))


def test_copies_and_noise_do_not_cross_the_wire(klein: Parity) -> None:
    state = klein.roles["encoder"].run(triptych.Request(**GUIDED, image=picture(30), num_images_per_prompt=4))
    tensors = {name: value for name, value in state.fields.items() if isinstance(value, torch.Tensor)}
    assert tensors.keys() == {"prompt_embeds", "negative_prompt_embeds", "image_latents", "image_latent_ids"}
    assert {len(tensor) for tensor in tensors.values()} == {1}
    state = klein.roles["denoiser"].run(state)
    assert [name for name, value in state.fields.items() if isinstance(value, torch.Tensor)] == ["latents"]


def test_a_model_loaded_for_one_task_refuses_the_other(klein: Parity) -> None:
    drawing = triptych.load(klein.repo, device="cpu", tasks="text-to-image")
    expected = klein.diffusers(**GUIDED, output_type="pt")
    assert_same(drawing.generate(**GUIDED, seed=7, output_type="pt").images, expected, "one task")
    with pytest.raises(UsageError, match="'edit', but the model was loaded for text-to-image"):
        drawing.generate(**GUIDED, image=picture(30))
    editing = triptych.load(klein.repo, device="cpu", tasks=["edit"])
    expected = klein.diffusers(**GUIDED, image=picture(30), output_type="pt")
    assert_same(editing.generate(**GUIDED, image=picture(30), seed=7, output_type="pt").images, expected, "the other")
    with pytest.raises(ParameterError, match="does text-to-image, edit"):
        triptych.load(klein.repo, device="cpu", tasks="inpaint")


def test_defaults_of_the_model_folder_are_honoured(klein: Parity, tmp_path: Path) -> None:
    repo = shutil.copytree(klein.repo, tmp_path / "repo")
    better = {"height": 40, "width": 56, "num_inference_steps": 2, "guidance_scale": 3.0, "max_sequence_length": 40}
    (repo / "triptych.json").write_text(json.dumps({"defaults": better}))
    given = {"prompt": PROMPT, "seed": 7, "output_type": "pt"}
    model = triptych.load(repo, device="cpu")
    assert_same(model.generate(**given).images, klein.diffusers(**given, **better), "better defaults")
    assert_same(model.generate(**given, width=48).images, klein.diffusers(**given, **{**better, "width": 48}), "given")


def test_without_a_size_the_picture_has_128_latents_a_side(klein: Parity) -> None:
    state = klein.model.admit(triptych.Request(prompt=PROMPT))
    assert (state.fields["height"], state.fields["width"]) == (128 * 4, 128 * 4)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"height": 60}, ParameterError, "height=60: .* multiple of 8 .* 56 or 64"),
        ({"width": 5}, ParameterError, "width=5: .* multiple of 8 .* 8$"),
        ({"guidance_scal": 3.0}, UnknownParameterError, "did you mean 'guidance_scale'"),
        ({"generator": None}, UnknownParameterError, "no parameter 'generator'"),
        ({"guidance_scale": "4"}, ParameterError, "guidance_scale='4'"),
        ({"prompt": None}, UsageError, "`prompt` or `prompt_embeds`"),
        ({"prompt_embeds": torch.zeros(1, 2, 36)}, UsageError, "Cannot forward both `prompt`"),
        ({"image": []}, ParameterError, "one or more reference images"),
        ({"image": "fox.png"}, ParameterError, "image='fox.png'"),
        ({"image": picture(30, 63, 64)}, ParameterError, "image="),
        ({"prompt": []}, ParameterError, "the list is empty"),
        ({"prompt": None, "prompt_embeds": "x", "negative_prompt_embeds": "z"}, ParameterError, "prompt_embeds='x'"),
        ({"latents": "noise"}, ParameterError, "latents='noise': a tensor"),
        ({"latents": torch.zeros(1, 24, 6, 8)}, ParameterError, r"latents='of shape .*\(1, 24, 8, 6\)"),
    ],
)
def test_what_cannot_be_done_is_refused_with_a_reason(
    klein: Parity, changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        klein.whole(**{**CALL, **changes})


def test_a_role_refuses_what_is_not_its_turn(klein: Parity) -> None:
    encoder, denoiser, decoder = (klein.roles[role] for role in ROLES)
    for role in (denoiser, decoder):
        with pytest.raises(WrongRoleError):
            role.run(triptych.Request(**CALL))
    state = encoder.run(triptych.Request(**CALL))
    for role in (encoder, decoder):
        with pytest.raises(WrongRoleError, match="denoiser's turn"):
            role.run(state)
    with pytest.raises(WrongRoleError, match="no result yet"):
        _ = state.result
    with pytest.raises(WrongRoleError, match="whole model"):
        encoder.generate(**CALL)
    state = decoder.run(denoiser.run(state))
    with pytest.raises(WrongRoleError, match="result is there already"):
        decoder.run(state)


def test_a_state_of_another_model_is_refused(klein: Parity, tiny_repo: Callable[..., Path]) -> None:
    other = triptych.load(tiny_repo("flux2_klein", is_distilled=True), role="denoiser", device="cpu")
    state = klein.roles["encoder"].run(triptych.Request(**CALL))
    with pytest.raises(WireError, match="another model"):
        other.run(triptych.State.from_bytes(bytes(state.to_bytes())))


def test_a_sharded_copy_and_a_variant_give_the_same_pixels(klein: Parity, tmp_path: Path) -> None:
    call = {**GUIDED, "image": picture(30)}
    expected = klein.diffusers(**call, output_type="pt")
    repo = shutil.copytree(klein.repo, tmp_path / "repo")
    for component in ("text_encoder", "transformer", "vae"):
        tiny.shard(repo, component)
    assert_same(Parity(repo).check(**call), expected, "sharded")
    for component in ("text_encoder", "transformer", "vae"):
        tiny.as_variant(repo, component)
    model = triptych.load(repo, device="cpu", variant="fp16")
    assert_same(model.generate(**call, seed=7, output_type="pt").images, expected, "variant")


def test_a_bfloat16_repository_runs_in_float32_and_by_default_in_bfloat16(tiny_repo: Callable[..., Path]) -> None:
    repo = tiny_repo("flux2_klein", dtype="bfloat16")
    assert Parity(repo, "float32").check(**GUIDED).dtype == torch.float32
    Parity(repo, "bfloat16", load_dtype="auto").check(**GUIDED)
