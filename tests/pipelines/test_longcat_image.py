"""LongCat-Image and LongCat-Image-Edit give what diffusers gives, whole and split, and refuse what they cannot do."""

import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.pipelines.longcat_image import pipeline_longcat_image, pipeline_longcat_image_edit
from PIL import Image
from transformers import Qwen2VLProcessor
from transformers.utils import is_torchvision_available

import triptych
from triptych.errors import ParameterError, UnknownParameterError, UsageError

from .parity import DTYPES, ROLES, Parity, assert_joined_within_tolerance, assert_same, count_from_the_first, differ

TinyRepo = Callable[..., Path]

PROMPT = "a red fox"
NEGATIVE = "blurred, ugly colours"
SMALLER = 64  # times less area than the oracle scales pictures to
LONGEST = 512  # tokens of a prompt

# Guidance is on by default; a higher scale shows better.
GUIDED: dict[str, Any] = {
    "prompt": PROMPT,
    "negative_prompt": NEGATIVE,
    "guidance_scale": 6.0,
    "num_inference_steps": 2,
}
DRAWN: dict[str, Any] = {**GUIDED, "height": 64, "width": 96, "enable_prompt_rewrite": False}
REWRITTEN: dict[str, Any] = {**DRAWN, "enable_prompt_rewrite": True}


def picture(shade: int, width: int = 80, height: int = 40, mode: str = "RGB") -> Image.Image:
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
    """Let pictures be scaled to a fraction of the area, for diffusers and for us: a megapixel takes a second."""
    scale = pipeline_longcat_image_edit.calculate_dimensions
    monkeypatch.setattr(
        pipeline_longcat_image_edit, "calculate_dimensions", lambda area, ratio: scale(area / SMALLER, ratio)
    )


@pytest.fixture
def brief(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the model read few instructions before it rewrites a prompt, for diffusers and for us."""
    monkeypatch.setattr(pipeline_longcat_image, "SYSTEM_PROMPT_EN", "Describe the image by detailing the color.")


@pytest.fixture(scope="module", params=DTYPES)
def dtype(request: pytest.FixtureRequest) -> str:
    chosen: str = request.param
    return chosen


@pytest.fixture(scope="module")
def either(dtype: str, tiny_repo: TinyRepo) -> Parity:
    """In both dtypes. The bfloat16 oracle is `from_pretrained(dtype=torch.bfloat16)`."""
    return Parity(tiny_repo("longcat_image"), dtype)


@pytest.fixture(scope="module")
def either_edit(dtype: str, tiny_repo: TinyRepo) -> Parity:
    return Parity(tiny_repo("longcat_image", edit=True), dtype)


@pytest.fixture(scope="module")
def longcat(tiny_repo: TinyRepo) -> Parity:
    return Parity(tiny_repo("longcat_image"))


@pytest.fixture(scope="module")
def edit(tiny_repo: TinyRepo) -> Parity:
    return Parity(tiny_repo("longcat_image", edit=True))


@pytest.mark.parametrize(("seed", "size"), [(7, (64, 96)), (2**40 + 1, (160, 32))])
def test_guided_pictures_are_those_of_diffusers(either: Parity, seed: int, size: tuple[int, int]) -> None:
    call = {**DRAWN, "height": size[0], "width": size[1]}
    either.check(**call, seed=seed, output_types=("latent", "pt"))


@pytest.mark.parametrize(("seed", "size"), [(7, (80, 40)), (2**40 + 1, (50, 170))])
@pytest.mark.usefixtures("small")
def test_guided_edits_are_those_of_diffusers(either_edit: Parity, seed: int, size: tuple[int, int]) -> None:
    either_edit.check(**GUIDED, image=picture(30, *size), seed=seed, output_types=("latent", "pt"))


def test_a_picture_of_a_megapixel_is_edited_as_diffusers_does(edit: Parity) -> None:
    call = {**GUIDED, "guidance_scale": 1.0, "num_inference_steps": 2, "output_type": "pt"}
    call["image"] = picture(30, 80, 64)
    edited = edit.diffusers(**call)
    assert_same(edit.split(**call), edited, "split")
    assert edited.shape == (1, 3, 928, 1152)


@pytest.mark.parametrize("prompt", [PROMPT, "一只红色的狐狸"])
def test_prompts_are_rewritten_as_diffusers_rewrites_them_if_nothing_else_is_said(longcat: Parity, prompt: str) -> None:
    call = {name: value for name, value in DRAWN.items() if name != "enable_prompt_rewrite"}
    longcat.check(**{**call, "prompt": prompt})


@pytest.mark.usefixtures("brief")
def test_a_rewritten_prompt_is_what_is_drawn_and_told(either: Parity) -> None:
    drawn = either.check(**REWRITTEN)
    (written,) = either.pipeline.rewire_prompt(PROMPT, "cpu")
    assert_same(either.check(**{**DRAWN, "prompt": written}), drawn, "that prompt")
    assert differ(either.whole(**DRAWN, output_type="pt"), drawn)
    results = [either.model.run(triptych.Request(**call, seed=7)).result for call in (REWRITTEN, DRAWN)]
    assert [result.parameters["prompt"] for result in results] == [written, PROMPT]


@pytest.mark.usefixtures("brief")
def test_a_sampled_prompt_is_that_of_diffusers_with_torchs_own_seed_set(tiny_repo: TinyRepo) -> None:
    repo = tiny_repo("longcat_image", generation={"do_sample": True, "temperature": 3.0, "top_k": 0})
    parity, call = Parity(repo), {**REWRITTEN, "output_type": "pt"}
    before = torch.get_rng_state()
    drawn = {seed: parity.whole(**call, seed=seed) for seed in (7, 8)}
    split = parity.split(**call, seed=7)
    assert torch.equal(torch.get_rng_state(), before)
    prompts = {seed: parity.model.run(triptych.Request(**call, seed=seed)).result.parameters for seed in (7, 8)}
    assert prompts[7]["prompt"] != prompts[8]["prompt"]
    with torch.random.fork_rng():
        for seed in (7, 8):
            torch.manual_seed(seed)
            assert_same(drawn[seed], parity.diffusers(**call, seed=seed), f"seed {seed}")
    assert_same(split, drawn[7], "split")


@pytest.mark.parametrize("option", ["enable_prompt_rewrite", "enable_cfg_renorm"])
def test_none_switches_an_option_off_as_in_diffusers(longcat: Parity, option: str) -> None:
    off = longcat.check(**{**DRAWN, option: None})
    assert_same(longcat.whole(**{**DRAWN, option: False}, output_type="pt"), off, "off")


@pytest.mark.usefixtures("small")
def test_an_edit_tells_the_size_that_its_picture_gave_it(edit: Parity) -> None:
    state = edit.model.admit(triptych.Request(**GUIDED, image=picture(30), output_type="pt", seed=7))
    assert {"height", "width"}.isdisjoint(state.parameters)
    result = edit.model.run(state).result
    assert (result.parameters["height"], result.parameters["width"]) == result.images.shape[2:]


def test_pictures_without_guidance_are_those_of_diffusers(either: Parity) -> None:
    plain = either.check(**{**DRAWN, "guidance_scale": 1.0})
    assert_same(either.check(**{**DRAWN, "guidance_scale": 0.5, "negative_prompt": None}), plain, "a lower scale")
    assert differ(either.check(**DRAWN), plain)


@pytest.mark.usefixtures("small")
def test_edits_without_guidance_are_those_of_diffusers(either_edit: Parity) -> None:
    call = {**GUIDED, "image": picture(30)}
    assert differ(either_edit.check(**call), either_edit.check(**{**call, "guidance_scale": 1.0}))


def test_without_a_negative_prompt_it_is_the_empty_one(longcat: Parity) -> None:
    empty = longcat.check(**{**DRAWN, "negative_prompt": ""})
    assert_same(longcat.check(**{**DRAWN, "negative_prompt": None}), empty, "none")
    assert differ(longcat.check(**DRAWN), empty)


def test_guidance_lengthens_predictions_as_far_as_it_may(longcat: Parity) -> None:
    call = {**DRAWN, "guidance_scale": 20.0}
    free = longcat.check(**call, enable_cfg_renorm=False)
    assert_same(longcat.check(**call, cfg_renorm_min=1.0), free, "a least length of all")
    limited, less = longcat.check(**call), longcat.check(**call, cfg_renorm_min=0.9)
    assert differ(limited, free) and differ(less, free) and differ(less, limited)


def test_several_pictures_of_one_prompt_are_one_batch_of_diffusers(either: Parity) -> None:
    pictures = either.check(**DRAWN, num_images_per_prompt=2)
    assert len(pictures) == 2
    assert differ(pictures[0], pictures[1])
    either.check(**{**DRAWN, "guidance_scale": 1.0}, num_images_per_prompt=3)


@pytest.mark.usefixtures("small")
def test_several_edits_of_one_prompt_are_one_batch_of_diffusers(either_edit: Parity) -> None:
    edits = either_edit.check(**GUIDED, image=picture(30), num_images_per_prompt=2)
    assert len(edits) == 2
    assert differ(edits[0], edits[1])


@pytest.mark.usefixtures("small")
def test_pil_and_numpy_pictures_are_those_of_diffusers(longcat: Parity, edit: Parity) -> None:
    longcat.check(**DRAWN, num_images_per_prompt=2, output_types=("pil", "np"))
    edit.check(**GUIDED, image=picture(30), output_types=("pil", "np"))


@pytest.mark.usefixtures("small", "brief")
def test_each_of_seed_prompts_guidance_steps_and_picture_changes_the_result(longcat: Parity, edit: Parity) -> None:
    changes: list[dict[str, Any]] = [
        {"seed": 8},
        {"prompt": "a blue cat"},
        {"prompt": "a 'red' fox"},
        {"negative_prompt": ""},
        {"guidance_scale": 2.0},
        {"num_inference_steps": 3},
    ]
    alone = ((longcat, DRAWN, {"enable_prompt_rewrite": True}), (edit, {**GUIDED, "image": picture(30)}, {}))
    for parity, call, more in alone:
        drawn = parity.whole(**call, output_type="pt")
        for change in [*changes, more or {"image": picture(200)}]:
            assert differ(parity.whole(**{**call, **change}, output_type="pt"), drawn), change


@pytest.mark.usefixtures("small")
def test_the_vision_language_model_and_the_transformer_both_see_the_picture(edit: Parity) -> None:
    states = [
        edit.roles["encoder"].run(triptych.Request(**GUIDED, seed=7, image=picture(shade))) for shade in (30, 200)
    ]
    for name in ("prompt_embeds", "image_latents"):
        one, other = (state.fields[name] for state in states)
        assert differ(one, other), name
        mixed = states[0].copy()
        mixed.fields[name] = other
        edits = [edit.roles["denoiser"].run(state).fields["latents"] for state in (states[0], mixed)]
        assert differ(*edits), name


@pytest.mark.usefixtures("small")
def test_a_picture_may_come_alone_or_as_a_list_and_is_then_seen_as_it_is(either_edit: Parity) -> None:
    image = picture(30, 20, 10)
    assert differ(either_edit.check(**GUIDED, image=[image]), either_edit.check(**GUIDED, image=image))


def test_the_first_noise_levels_may_be_equal(longcat: Parity, monkeypatch: pytest.MonkeyPatch) -> None:
    count_from_the_first(longcat.pipeline.scheduler, monkeypatch)
    longcat.check(**DRAWN, sigmas=[0.7, 0.7, 0.2])


@pytest.mark.usefixtures("small")
def test_given_sigmas_and_latents_are_used_as_diffusers_uses_them(longcat: Parity, edit: Parity) -> None:
    for parity, call in ((longcat, DRAWN), (edit, {**GUIDED, "image": picture(30)})):
        drawn = parity.check(**call)
        assert differ(parity.check(**call, sigmas=[1.0, 0.8, 0.1]), drawn)
        tokens = drawn.shape[2] * drawn.shape[3] // 32**2
        noise = torch.randn(1, tokens, 64, generator=torch.Generator().manual_seed(1))
        assert differ(parity.check(**call, latents=noise), drawn)


@pytest.mark.usefixtures("small")
def test_given_negative_embeddings_take_the_place_of_the_prompt(longcat: Parity, edit: Parity) -> None:
    for parity, call in ((longcat, DRAWN), (edit, {**GUIDED, "image": picture(30)})):
        state = parity.roles["encoder"].run(triptych.Request(**call))
        embeds = state.fields["negative_prompt_embeds"]
        call = {**call, "negative_prompt": None}
        drawn = parity.check(**call, negative_prompt_embeds=embeds)
        assert_same(drawn, parity.check(**{**call, "negative_prompt": NEGATIVE}), "of the same prompt")
        shorter = parity.check(**call, negative_prompt_embeds=embeds[:, :40])
        assert differ(shorter, drawn)
        joined = parity.whole(**call, negative_prompt_embeds=embeds[:, :40], output_type="pt", exact=False)
        torch.testing.assert_close(joined, shorter, rtol=0, atol=1e-4)


@pytest.mark.usefixtures("small")
def test_long_prompts_are_cut_as_diffusers_does_or_refused_where_it_fails(longcat: Parity, edit: Parity) -> None:
    tokens = [" color"] * LONGEST
    longest, longer = "".join(tokens), "".join([*tokens, " shape"])
    assert len(longcat.pipeline.tokenizer(longest)["input_ids"]) == LONGEST
    drawn = longcat.check(**{**DRAWN, "prompt": longest})
    assert_same(longcat.check(**{**DRAWN, "prompt": longer}), drawn, "one token more")
    call = {**GUIDED, "image": picture(30)}
    # Quoted text is read character by character.
    quoted = "".join([*tokens[:-6], " 'fox'"])
    edit.check(**{**call, "prompt": quoted[1:]})
    for name in ("prompt", "negative_prompt"):
        for text in (longer, f"{quoted}."):
            with pytest.raises(TypeError):
                edit.diffusers(**{**call, name: text})
            with pytest.raises(ParameterError, match=f"{name}=.*at most 512 tokens are accepted; these are 513"):
                edit.model.admit(triptych.Request(**{**call, name: text}))
    edit.model.admit(triptych.Request(**{**call, "negative_prompt": longer, "guidance_scale": 1.0}))


def test_a_list_of_prompts_is_as_many_requests(longcat: Parity) -> None:
    prompts = [PROMPT, "a blue cat"]
    both = longcat.whole(**{**DRAWN, "prompt": prompts}, output_type="pt")
    expected = [longcat.diffusers(**{**DRAWN, "prompt": prompt}, output_type="pt") for prompt in prompts]
    assert_same(both, torch.cat(expected), "two prompts")


@pytest.mark.parametrize("outputs", [1, 2])
@pytest.mark.usefixtures("small")
def test_joined_branches_stay_within_the_tolerance(
    longcat: Parity, edit: Parity, outputs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = {"num_inference_steps": 8, "num_images_per_prompt": outputs}
    assert_joined_within_tolerance(longcat, "long_cat_denoising", monkeypatch, {**DRAWN, **more})
    call = {**GUIDED, **more, "image": picture(30)}
    assert_joined_within_tolerance(edit, "long_cat_edit_denoising", monkeypatch, call)


@pytest.mark.slow
def test_three_processes_give_what_diffusers_gives(longcat: Parity, tmp_path: Path) -> None:
    longcat.check_in_processes(tmp_path, {**REWRITTEN, "num_images_per_prompt": 2}, ("float32", "bfloat16"))


@pytest.mark.usefixtures("small")
def test_a_picture_of_another_mode_is_taken_for_what_it_shows_in_colour(edit: Parity) -> None:
    call = {**GUIDED, "output_type": "pt"}
    for mode in ("RGBA", "L", "P"):
        image = picture(30, mode=mode)
        assert_same(edit.whole(**call, image=image), edit.diffusers(**call, image=image.convert("RGB")), mode)


@pytest.mark.usefixtures("small", "brief")
def test_copies_pictures_and_noise_do_not_cross_the_wire(longcat: Parity, edit: Parity) -> None:
    embeds = {"prompt_embeds", "negative_prompt_embeds"}
    calls = ((longcat, REWRITTEN, embeds), (edit, {**GUIDED, "image": picture(30)}, embeds | {"image_latents"}))
    for parity, call, names in calls:
        request = triptych.Request(**call, num_images_per_prompt=4)
        state = triptych.State.from_bytes(bytes(parity.roles["encoder"].run(request).to_bytes()))
        tensors = {name: value for name, value in state.fields.items() if isinstance(value, torch.Tensor)}
        assert tensors.keys() == names
        assert {len(tensor) for tensor in tensors.values()} == {1}
        assert "image" not in state.fields
        state = parity.roles["denoiser"].run(state)
        assert [name for name, value in state.fields.items() if isinstance(value, torch.Tensor)] == ["latents"]


def test_only_rewriting_loads_the_head_and_only_editing_the_vision_tower(longcat: Parity, edit: Parity) -> None:
    text = {key: tensor.nbytes for key, tensor in longcat.pipeline.text_encoder.state_dict().items()}
    head = {key for key in text if "lm_head" in key}
    vision = {key for key in text if ".visual." in key}
    assert head and vision
    absent = {"text-to-image": head | vision, "text-to-image-rewritten": vision, None: vision}
    for tasks, names in absent.items():
        model = triptych.load(longcat.repo, role="encoder", device="cpu", tasks=tasks)
        assert model.loaded_bytes["text_encoder"] == sum(size for key, size in text.items() if key not in names)
        assert ("text_processor" in model.components) == (tasks != "text-to-image")
    held = edit.roles["encoder"].loaded_bytes
    assert held["text_encoder"] == sum(size for key, size in text.items() if key not in head)
    vae = {key: tensor.nbytes for key, tensor in edit.pipeline.vae.state_dict().items()}
    for half, parity, role in (
        ("encoder.", edit, "encoder"),
        ("decoder.", edit, "decoder"),
        ("decoder.", longcat, "decoder"),
    ):
        expected = sum(size for key, size in vae.items() if key.startswith(half))
        assert parity.roles[role].loaded_bytes["vae"] == expected
    for parity in (longcat, edit):
        loaded = {role: model.loaded_bytes for role, model in parity.roles.items()}
        held = {role: {name for name, size in sizes.items() if size} for role, sizes in loaded.items()}
        encoder = {"text_encoder"} if parity is longcat else {"text_encoder", "vae"}
        assert held == {"encoder": encoder, "denoiser": {"transformer"}, "decoder": {"vae"}}
        assert "transformer" not in parity.roles["encoder"].components
        assert not {"text_encoder", "tokenizer"} & set(parity.roles["denoiser"].components)


def test_a_role_runs_only_its_own_stages(longcat: Parity, edit: Parity) -> None:
    stages = [
        {role: [stage.name for stage in parity.roles[role].stages] for role in ROLES} for parity in (longcat, edit)
    ]
    assert stages == [
        {
            "encoder": ["prompt_rewriting", "text_encoding"],
            "denoiser": ["long_cat_denoising"],
            "decoder": ["decoding"],
        },
        {
            "encoder": ["text_encoding", "image_encoding"],
            "denoiser": ["long_cat_edit_denoising"],
            "decoder": ["decoding"],
        },
    ]


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"prompt": None}, ParameterError, "prompt=None: give a text"),
        ({"prompt_embeds": torch.zeros(1, 4, 24)}, UnknownParameterError, "prompt_embeds"),
        ({"negative_prompt_embeds": torch.zeros(1, 4, 24)}, UsageError, "only forward one of the two"),
        ({"negative_prompt": None, "negative_prompt_embeds": torch.zeros(2, 4, 24)}, ParameterError, "one prompt"),
        ({"negative_prompt": None, "negative_prompt_embeds": "ugly"}, ParameterError, "one prompt"),
        ({"latents": "noise"}, ParameterError, "latents='noise': a tensor"),
        ({"latents": torch.zeros(1, 5, 63)}, ParameterError, "latents='of shape"),
    ],
)
def test_texts_that_cannot_be_used_are_refused_with_a_reason(
    longcat: Parity, edit: Parity, changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    for parity, call in ((longcat, DRAWN), (edit, {**GUIDED, "image": picture(30)})):
        server = triptych.load(parity.repo, role="server", device="cpu")
        with pytest.raises(error, match=message):
            server.admit(triptych.Request(**{**call, **changes}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"height": 80}, "height=80: .* multiple of 32 .* 64 or 96"),
        ({"width": 5}, "width=5: .* multiple of 32 .* 32$"),
        ({"enable_prompt_rewrite": "no"}, "enable_prompt_rewrite='no': True or False"),
        ({"enable_cfg_renorm": 1}, "enable_cfg_renorm=1: True or False"),
        ({"cfg_renorm_min": "0.5"}, "cfg_renorm_min='0.5': a finite number"),
        ({"cfg_renorm_min": True}, "cfg_renorm_min=True: a finite number"),
        ({"cfg_renorm_min": 1.5}, "cfg_renorm_min=1.5: a number from 0 to 1"),
    ],
)
def test_options_that_cannot_be_used_are_refused_with_a_reason(
    longcat: Parity, changes: dict[str, Any], message: str
) -> None:
    server = triptych.load(longcat.repo, role="server", device="cpu")
    with pytest.raises(ParameterError, match=message):
        server.admit(triptych.Request(**{**DRAWN, **changes}))


@pytest.mark.parametrize("placeholder", ["<|image_pad|>", "<|video_pad|>"])
def test_a_text_that_stands_for_a_picture_is_refused_where_a_processor_reads_it(
    longcat: Parity, edit: Parity, placeholder: str
) -> None:
    text = f"a fox {placeholder}"
    for parity, call, name in (
        (longcat, REWRITTEN, "prompt"),
        (edit, {**GUIDED, "image": picture(30)}, "prompt"),
        (edit, {**GUIDED, "image": picture(30)}, "negative_prompt"),
    ):
        with pytest.raises(ParameterError, match=f"^{name}='{re.escape(text)}': a text without"):
            parity.model.admit(triptych.Request(**{**call, name: text}))
    longcat.check(**{**DRAWN, "prompt": text})


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (None, "image=None: give a picture"),
        ([], "give a picture"),
        ([picture(30), picture(200)], "one picture is edited"),
        (torch.zeros(1, 3, 64, 64), "a PIL image is accepted, not Tensor"),
        (picture(30, 500, 1), "too narrow"),
        ([picture(30, 210, 1)], "too narrow"),
    ],
)
def test_pictures_that_cannot_be_used_are_refused_with_a_reason(edit: Parity, image: Any, message: str) -> None:
    server = triptych.load(edit.repo, role="server", device="cpu")
    with pytest.raises(ParameterError, match=message):
        server.admit(triptych.Request(**GUIDED, image=image))
    with pytest.raises((AttributeError, IndexError, RuntimeError, TypeError, ValueError)):
        edit.diffusers(**GUIDED, image=image)


def test_a_size_is_no_parameter_of_an_edit(edit: Parity) -> None:
    with pytest.raises(UnknownParameterError, match="height"):
        edit.model.admit(triptych.Request(**GUIDED, image=picture(30), height=64))


def test_a_negative_prompt_without_effect_is_warned_of(longcat: Parity, caplog: pytest.LogCaptureFixture) -> None:
    longcat.model.admit(triptych.Request(**DRAWN))
    assert not caplog.text
    longcat.model.admit(triptych.Request(**{**DRAWN, "guidance_scale": 1.0}))
    assert "the negative prompt has no effect" in caplog.text


def test_a_model_loaded_for_prompts_as_they_are_rewrites_none(longcat: Parity) -> None:
    plain = triptych.load(longcat.repo, device="cpu", tasks="text-to-image")
    with pytest.raises(UsageError, match="request for 'text-to-image-rewritten'"):
        plain.admit(triptych.Request(**REWRITTEN))
    pictures = plain.generate(**DRAWN, seed=7, output_type="pt").images
    assert_same(pictures, longcat.diffusers(**DRAWN, output_type="pt"), "as it is")


def test_defaults_of_the_model_folder_are_honoured(longcat: Parity, tmp_path: Path) -> None:
    repo = shutil.copytree(longcat.repo, tmp_path / "repo")
    better = {"height": 64, "width": 32, "num_inference_steps": 2, "enable_prompt_rewrite": False}
    (repo / "triptych.json").write_text(json.dumps({"defaults": better}))
    model = triptych.load(repo, device="cpu", tasks="text-to-image")
    pictures = model.generate(prompt=PROMPT, seed=7, output_type="pt").images
    assert_same(pictures, longcat.diffusers(prompt=PROMPT, output_type="pt", **better), "better defaults")


@pytest.mark.usefixtures("brief")
def test_a_bfloat16_repository_runs_in_float32_and_by_default_in_bfloat16(tiny_repo: TinyRepo) -> None:
    repo = tiny_repo("longcat_image", dtype="bfloat16")
    assert Parity(repo, "float32").check(**REWRITTEN).dtype == torch.float32
    Parity(repo, "bfloat16", load_dtype="auto").check(**REWRITTEN)
