"""Qwen-Image-Edit and Edit-Plus give what diffusers gives, whole and split, and refuse what they cannot do."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit, pipeline_qwenimage_edit_plus
from PIL import Image
from transformers import Qwen2VLProcessor
from transformers.utils import is_torchvision_available

import triptych
from triptych.errors import ParameterError, UsageError
from triptych.pipelines.qwen_image_edit import QwenEditDenoising

from .parity import DTYPES, ROLES, Parity, assert_joined_within_tolerance, assert_same, differ

TinyRepo = Callable[..., Path]

PROMPT = "a red fox"
NEGATIVE = "blurred, ugly colours"
CALL: dict[str, Any] = {"prompt": PROMPT, "height": 128, "width": 64, "num_inference_steps": 3}
GUIDED: dict[str, Any] = {**CALL, "negative_prompt": NEGATIVE, "true_cfg_scale": 4.0}
SMALLER = 16  # times less area than the oracles scale pictures to


def picture(shade: int, width: int = 80, height: int = 64, mode: str = "RGB") -> Image.Image:
    """A picture: two gradients, and one channel that is `shade` everywhere."""
    down = Image.linear_gradient("L").resize((width, height))
    right = Image.linear_gradient("L").rotate(90).resize((width, height))
    return Image.merge("RGB", (down, right, Image.new("L", (width, height), shade))).convert(mode)


@pytest.fixture(scope="module", autouse=True)
def processor_without_videos() -> Iterator[None]:
    """Without torchvision, transformers makes no `Qwen2VLProcessor`, for want of the part for videos: leave it out."""
    with pytest.MonkeyPatch.context() as patch:
        if not is_torchvision_available():
            patch.setattr(Qwen2VLProcessor, "get_attributes", classmethod(lambda _: ["image_processor", "tokenizer"]))
        yield


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let pictures be scaled to a sixteenth of the area, for diffusers and for us: encoding a megapixel takes 1 s."""
    for module in (pipeline_qwenimage_edit, pipeline_qwenimage_edit_plus):
        scale = module.calculate_dimensions
        monkeypatch.setattr(
            module, "calculate_dimensions", lambda area, ratio, scale=scale: scale(area / SMALLER, ratio)
        )


@pytest.fixture(scope="module", params=DTYPES)
def either(request: pytest.FixtureRequest, tiny_repo: TinyRepo) -> Parity:
    """In both dtypes. The bfloat16 oracle is `from_pretrained(dtype=torch.bfloat16)`."""
    return Parity(tiny_repo("qwen_image_edit"), request.param)


@pytest.fixture(scope="module", params=DTYPES)
def either_plus(request: pytest.FixtureRequest, tiny_repo: TinyRepo) -> Parity:
    return Parity(tiny_repo("qwen_image_edit", plus=True), request.param)


@pytest.fixture(scope="module")
def edit(tiny_repo: TinyRepo) -> Parity:
    return Parity(tiny_repo("qwen_image_edit"))


@pytest.fixture(scope="module")
def plus(tiny_repo: TinyRepo) -> Parity:
    return Parity(tiny_repo("qwen_image_edit", plus=True))


@pytest.mark.parametrize("size", [(128, 64), (64, 192)])
@pytest.mark.parametrize("seed", [7, 2**40 + 1])
@pytest.mark.usefixtures("small")
def test_guided_edits_are_those_of_diffusers(either: Parity, seed: int, size: tuple[int, int]) -> None:
    call = {**GUIDED, "height": size[0], "width": size[1], "image": picture(30)}
    either.check(**call, seed=seed, output_types=("latent", "pt"))


@pytest.mark.parametrize("seed", [7, 2**40 + 1])
@pytest.mark.usefixtures("small")
def test_guided_edits_of_several_pictures_are_those_of_diffusers(either_plus: Parity, seed: int) -> None:
    one, other = picture(30), picture(200, 50, 170)
    edited = either_plus.check(**GUIDED, image=[one, other], seed=seed, output_types=("latent", "pt"))
    assert differ(either_plus.check(**GUIDED, image=[other, one], seed=seed), edited)


@pytest.mark.slow
def test_a_picture_of_a_megapixel_is_edited_as_diffusers_does(edit: Parity) -> None:
    call = {**CALL, "num_inference_steps": 2, "image": picture(30), "output_type": "pt"}
    assert_same(edit.split(**call), edit.diffusers(**call), "split")


@pytest.mark.usefixtures("small")
def test_one_picture_may_come_alone_or_as_a_list(either: Parity, either_plus: Parity) -> None:
    for parity in (either, either_plus):
        parity.check(**CALL, image=picture(30))
        parity.check(**CALL, image=[picture(30)])


@pytest.mark.usefixtures("small")
def test_edits_without_guidance_are_those_of_diffusers(either: Parity, either_plus: Parity) -> None:
    for parity in (either, either_plus):
        plain = parity.check(**CALL, image=picture(30))
        unguided = parity.check(**{**GUIDED, "true_cfg_scale": 1.0}, image=picture(30))
        assert_same(unguided, plain, "a negative prompt without guidance")
        assert differ(parity.check(**GUIDED, image=picture(30)), plain)


@pytest.mark.usefixtures("small")
def test_several_edits_of_one_prompt_are_one_batch_of_diffusers(either: Parity, either_plus: Parity) -> None:
    for parity in (either, either_plus):
        pictures = parity.check(**GUIDED, image=picture(30), num_images_per_prompt=2)
        assert len(pictures) == 2
        assert differ(pictures[0], pictures[1])
    either_plus.check(**GUIDED, image=[picture(30), picture(200)], num_images_per_prompt=2)


@pytest.mark.usefixtures("small")
def test_pil_and_numpy_edits_are_those_of_diffusers(plus: Parity) -> None:
    call = {**GUIDED, "image": [picture(30), picture(90)], "num_images_per_prompt": 2}
    plus.check(**call, output_types=("pil", "np", "latent"))


@pytest.mark.usefixtures("small")
def test_each_of_picture_seed_prompt_guidance_and_steps_changes_the_edit(edit: Parity, plus: Parity) -> None:
    call = {**GUIDED, "image": picture(30)}
    changes: list[dict[str, Any]] = [
        {"image": picture(200)},
        {"seed": 8},
        {"prompt": "a blue cat"},
        {"negative_prompt": ""},
        {"true_cfg_scale": 2.0},
        {"num_inference_steps": 2},
    ]
    for parity in (edit, plus):
        edited = parity.whole(**call, output_type="pt")
        for change in changes:
            assert differ(parity.whole(**{**call, **change}, output_type="pt"), edited), change


@pytest.mark.usefixtures("small")
def test_the_vision_language_model_and_the_transformer_both_see_the_picture(edit: Parity) -> None:
    states = [edit.roles["encoder"].run(triptych.Request(**CALL, seed=7, image=picture(shade))) for shade in (30, 200)]
    for name in ("prompt_embeds", "image_latents"):
        one, other = (state.fields[name] for state in states)
        assert differ(one, other), name
        mixed = states[0].copy()
        mixed.fields[name] = other
        edits = [edit.roles["denoiser"].run(state).fields["latents"] for state in (states[0], mixed)]
        assert differ(*edits), name


@pytest.mark.parametrize("given", [{}, {"height": 64}, {"width": 64}])
@pytest.mark.usefixtures("small")
def test_an_edit_takes_the_size_it_is_not_given_from_the_last_picture(
    edit: Parity, plus: Parity, given: dict[str, int]
) -> None:
    call = {name: value for name, value in CALL.items() if name not in ("height", "width")}
    # 65 536 pixels of 85 : 40 are 384 x 160 or so, in multiples of 32; of 64 below, 384 x 128.
    for parity, image in ((edit, picture(30, 85, 40)), (plus, [picture(200), picture(30, 85, 40)])):
        edited = parity.check(**call, **given, image=image)
        assert edited.shape[-2:] == (given.get("height", 128), given.get("width", 384))


@pytest.mark.usefixtures("small")
def test_given_sigmas_and_latents_are_used_as_diffusers_uses_them(either: Parity) -> None:
    call = {**GUIDED, "image": picture(30)}
    edited = either.check(**call)
    assert differ(either.check(**call, sigmas=[1.0, 0.8, 0.1]), edited)
    noise = torch.randn(1, 2, 24, generator=torch.Generator().manual_seed(1))
    assert differ(either.check(**call, latents=noise), edited)


@pytest.mark.usefixtures("small")
def test_given_embeddings_take_the_place_of_the_prompts(either: Parity, either_plus: Parity) -> None:
    call = {name: value for name, value in GUIDED.items() if name not in ("prompt", "negative_prompt")}
    for parity in (either, either_plus):
        image = picture(30)
        state = parity.roles["encoder"].run(triptych.Request(**GUIDED, image=image))
        names = ("prompt_embeds", "negative_prompt_embeds")
        given = {name: state.fields[name] for name in names}
        edited = parity.check(**call, **given, image=image, num_images_per_prompt=2)
        assert_same(edited, parity.check(**GUIDED, image=image, num_images_per_prompt=2), "of the same prompts")


@pytest.mark.usefixtures("small")
def test_given_embeddings_of_several_lengths_keep_their_mask(either: Parity) -> None:
    call = {name: value for name, value in GUIDED.items() if name not in ("prompt", "negative_prompt")}
    embeds, negative = (
        torch.randn(2, length, 24, generator=torch.Generator().manual_seed(length)) for length in (9, 5)
    )
    dtype = getattr(torch, either.dtype)
    masks = [torch.ones(2, each.shape[1], dtype=torch.long) for each in (embeds, negative)]
    masks[0][0, -4:] = masks[1][1, -2:] = 0
    given = {
        "prompt_embeds": embeds.to(dtype),
        "prompt_embeds_mask": masks[0],
        "negative_prompt_embeds": negative.to(dtype),
        "negative_prompt_embeds_mask": masks[1],
    }
    edits = either.check(**call, **given, image=picture(30))
    assert len(edits) == 2
    if either.dtype == "float32":
        joined = either.whole(**call, **given, image=picture(30), output_type="pt", exact=False)
        torch.testing.assert_close(joined, edits, rtol=0, atol=1e-4)


@pytest.mark.usefixtures("small")
def test_a_list_of_prompts_is_as_many_requests(edit: Parity) -> None:
    call = {**GUIDED, "image": picture(30), "output_type": "pt"}
    prompts = [PROMPT, "a blue cat"]
    both = edit.whole(**{**call, "prompt": prompts})
    assert_same(both, torch.cat([edit.diffusers(**{**call, "prompt": prompt}) for prompt in prompts]), "two prompts")


@pytest.mark.parametrize("outputs", [1, 2])
@pytest.mark.usefixtures("small")
def test_joined_branches_stay_within_the_tolerance(
    edit: Parity, plus: Parity, outputs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    call = {**GUIDED, "num_inference_steps": 8, "num_images_per_prompt": outputs}
    stage = "qwen_edit_denoising"
    assert_joined_within_tolerance(edit, stage, monkeypatch, {**call, "image": picture(30)})
    images = [picture(30), picture(200, 50, 90)]
    assert_joined_within_tolerance(plus, stage, monkeypatch, {**call, "image": images})


@pytest.mark.usefixtures("small")
def test_a_transformer_that_modulates_given_pictures_as_clean_is_that_of_diffusers(
    tiny_repo: TinyRepo, monkeypatch: pytest.MonkeyPatch
) -> None:
    by_token = Parity(tiny_repo("qwen_image_edit", plus=True, zero_cond_t=True))
    call = {**GUIDED, "num_images_per_prompt": 2, "image": [picture(30), picture(200, 50, 90)]}
    by_token.check(**call)
    call["num_inference_steps"] = 8
    assert_joined_within_tolerance(by_token, "qwen_edit_denoising", monkeypatch, call)


@pytest.mark.parametrize("shapes", [[(1, 8, 4)], [(1, 8, 4), (1, 6, 40)]])
@pytest.mark.parametrize(("branch", "name"), [("cond", "prompt"), ("uncond", "negative_prompt")])
def test_a_text_for_which_there_are_no_positions_is_refused(
    edit: Parity, branch: str, name: str, shapes: list[tuple[int, int, int]]
) -> None:
    stage: Any = next(each for each in edit.model.stages if isinstance(each, QwenEditDenoising))

    def text(tokens: int) -> dict[str, dict[str, torch.Tensor]]:
        lengths = {"cond": 1, "uncond": 1, branch: tokens}
        return {each: {"encoder_hidden_states": torch.empty(1, length, 1)} for each, length in lengths.items()}

    longest = 4096 - max(max(shape) for shape in shapes) // 2
    for tokens, fits in ((longest, True), (longest + 1, False)):
        _, positions = stage.transformer.pos_embed([shapes], device=torch.device("cpu"), max_txt_seq_len=tokens)
        assert (len(positions) == tokens) is fits, "what diffusers has positions for"
    stage.check_positions(text(longest), shapes)
    with pytest.raises(ParameterError, match=f"^{name}='<{longest + 1} tokens>': at most {longest} tokens"):
        stage.check_positions(text(longest + 1), shapes)


@pytest.mark.usefixtures("small")
def test_a_prompt_that_is_far_too_long_is_refused_by_name(edit: Parity) -> None:
    with pytest.raises(ParameterError, match="prompt='<.* tokens>': at most .* beside these pictures"):
        edit.model.generate(**{**CALL, "prompt": "fox " * 4100, "image": picture(30)})


@pytest.mark.usefixtures("small")
def test_a_picture_of_another_mode_is_taken_for_what_it_shows_in_colour(edit: Parity) -> None:
    call = {**CALL, "output_type": "pt"}
    for mode in ("RGBA", "L", "P"):
        image = picture(30, mode=mode)
        assert_same(edit.whole(**call, image=image), edit.diffusers(**call, image=image.convert("RGB")), mode)


@pytest.mark.usefixtures("small")
def test_copies_pictures_and_noise_do_not_cross_the_wire(plus: Parity) -> None:
    images = [picture(30), picture(200, 50, 90)]
    request = triptych.Request(**GUIDED, image=images, num_images_per_prompt=4)
    state = triptych.State.from_bytes(bytes(plus.roles["encoder"].run(request).to_bytes()))
    tensors = {name: value for name, value in state.fields.items() if isinstance(value, torch.Tensor)}
    assert tensors.keys() == {"prompt_embeds", "negative_prompt_embeds", "image_latents"}
    assert {len(tensor) for tensor in tensors.values()} == {1}
    assert "image" not in state.fields
    assert sum(rows * columns for _, rows, columns in state.fields["image_shapes"]) == tensors["image_latents"].shape[1]
    state = plus.roles["denoiser"].run(state)
    assert [name for name, value in state.fields.items() if isinstance(value, torch.Tensor)] == ["latents"]


def test_roles_load_the_vision_tower_and_half_an_autoencoder_but_no_head_and_nothing_for_frames(
    edit: Parity, plus: Parity
) -> None:
    for parity in (edit, plus):
        loaded = {role: model.loaded_bytes for role, model in parity.roles.items()}
        held = {role: {name for name, size in sizes.items() if size} for role, sizes in loaded.items()}
        assert held == {"encoder": {"text_encoder", "vae"}, "denoiser": {"transformer"}, "decoder": {"vae"}}
        parts = parity.pipeline.components
        text = parts["text_encoder"].state_dict()
        expected = sum(tensor.nbytes for key, tensor in text.items() if "lm_head" not in key)
        assert loaded["encoder"]["text_encoder"] == expected
        halves = {"encoder": ("encoder.", "quant_conv."), "decoder": ("decoder.", "post_quant_conv.")}
        vae = parts["vae"].state_dict()
        for role, prefixes in halves.items():
            half = {key: tensor for key, tensor in vae.items() if key.startswith(prefixes)}
            assert any("time_conv" in key for key in half)
            expected = sum(tensor.nbytes for key, tensor in half.items() if "time_conv" not in key)
            assert loaded[role]["vae"] == expected, role
        assert "transformer" not in parity.roles["encoder"].components
        assert not {"text_encoder", "processor", "tokenizer"} & set(parity.roles["denoiser"].components)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"image": None}, ParameterError, "image=None: give a picture"),
        ({"image": []}, ParameterError, "give a picture"),
        ({"image": torch.zeros(1, 3, 64, 64)}, ParameterError, "a PIL image is accepted, not Tensor"),
        ({"image": picture(30, 400, 1)}, ParameterError, "too narrow"),
        ({"image": picture(30, 5000, 1)}, ParameterError, "too narrow"),
        ({"height": 96}, ParameterError, "height=96: .* multiple of 64 .* 64 or 128"),
        ({"width": 5}, ParameterError, "width=5: .* multiple of 64 .* 64$"),
        ({"prompt": None}, UsageError, "`prompt` or `prompt_embeds`"),
        ({"max_sequence_length": 1025}, UsageError, "cannot be greater than 1024"),
        ({"prompt": "a <|image_pad|>"}, ParameterError, r"^prompt='a <\|image_pad\|>': a text without"),
        ({"prompt": "a <|video_pad|>"}, ParameterError, r"^prompt='a <\|video_pad\|>': a text without"),
        ({"negative_prompt": "<|image_pad|>"}, ParameterError, r"negative_prompt='<\|image_pad\|>': a text without"),
        ({"prompt": None, "prompt_embeds": "text"}, ParameterError, "prompt_embeds='text': a tensor"),
        ({"latents": torch.zeros(2, 2, 24)}, ParameterError, r"latents='of shape .*\(1, 2, 24\)"),
    ],
)
def test_what_cannot_be_done_is_refused_with_a_reason(
    edit: Parity, plus: Parity, changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    for parity in (edit, plus):
        server = triptych.load(parity.repo, role="server", device="cpu")
        with pytest.raises(error, match=message):
            server.admit(triptych.Request(**{**CALL, "image": picture(30), **changes}))


def test_a_surplus_picture_or_prompt_is_refused(edit: Parity, plus: Parity) -> None:
    with pytest.raises(ParameterError, match="one picture is edited; models of QwenImageEditPlusPipeline"):
        edit.model.admit(triptych.Request(**CALL, image=[picture(30), picture(200)]))
    call = {**CALL, "prompt": None, "prompt_embeds": torch.zeros(2, 4, 24), "image": picture(30)}
    with pytest.raises(ParameterError, match="one prompt at a time"):
        plus.model.admit(triptych.Request(**call))


@pytest.mark.usefixtures("small")
def test_what_has_no_effect_is_warned_of(edit: Parity, caplog: pytest.LogCaptureFixture) -> None:
    for changes in ({"true_cfg_scale": 4.0}, {"true_cfg_scale": 1.0, "negative_prompt": NEGATIVE}):
        edit.model.admit(triptych.Request(**{**CALL, "image": picture(30), **changes}))
    assert "true_cfg_scale=4.0 has no effect" in caplog.text
    assert "negative_prompt has no effect" in caplog.text


@pytest.mark.usefixtures("small")
def test_defaults_of_the_model_folder_are_honoured(edit: Parity, tmp_path: Path) -> None:
    repo = shutil.copytree(edit.repo, tmp_path / "repo")
    better = {"height": 64, "width": 128, "num_inference_steps": 2, "true_cfg_scale": 3.0}
    (repo / "triptych.json").write_text(json.dumps({"defaults": better}))
    given = {"prompt": PROMPT, "negative_prompt": NEGATIVE, "image": picture(30), "output_type": "pt"}
    model = triptych.load(repo, device="cpu")
    assert_same(model.generate(**given, seed=7).images, edit.diffusers(**given, **better), "better defaults")


@pytest.mark.usefixtures("small")
def test_a_bfloat16_repository_runs_in_float32_and_by_default_in_bfloat16(tiny_repo: TinyRepo) -> None:
    repo = tiny_repo("qwen_image_edit", dtype="bfloat16")
    call = {**GUIDED, "image": picture(30)}
    assert Parity(repo, "float32").check(**call).dtype == torch.float32
    Parity(repo, "bfloat16", load_dtype="auto").check(**call)


def test_only_the_encoder_has_more_than_one_stage(edit: Parity, plus: Parity) -> None:
    for parity in (edit, plus):
        stages = {role: [stage.name for stage in parity.roles[role].stages] for role in ROLES}
        assert stages == {
            "encoder": ["text_encoding", "image_encoding"],
            "denoiser": ["qwen_edit_denoising"],
            "decoder": ["decoding"],
        }


@pytest.mark.slow
def test_processes_that_hand_over_files_give_the_same_pixels(edit: Parity, plus: Parity, tmp_path: Path) -> None:
    for parity, image in ((edit, picture(30)), (plus, [picture(30), picture(200)])):
        call = {**GUIDED, "image": image, "num_images_per_prompt": 2}
        parity.check_in_processes(tmp_path, call, ("float32", "bfloat16"))
