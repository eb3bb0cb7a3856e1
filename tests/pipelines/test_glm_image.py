"""GLM-Image gives what diffusers gives, whole and split, and keeps the pictures of different requests apart."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import GlmImageProcessor

import triptych
from triptych.errors import ModelError, ParameterError, UsageError
from triptych.state import View

from .parity import (
    FORWARD_TOLERANCE,
    ROLES,
    Forwards,
    Parity,
    assert_joined_within_tolerance,
    assert_same,
    differ,
)

TinyRepo = Callable[..., Path]

PROMPT = "a sign that says 'open'"
WITHOUT_LETTERS = "a red fox"
CALL: dict[str, Any] = {"prompt": PROMPT, "height": 64, "width": 96, "num_inference_steps": 3, "guidance_scale": 2.5}


def picture(shade: int, width: int = 64, height: int = 96, mode: str = "RGB") -> Image.Image:
    """A picture: two gradients, and one channel that is `shade` everywhere."""
    down = Image.linear_gradient("L").resize((width, height))
    right = Image.linear_gradient("L").rotate(90).resize((width, height))
    return Image.merge("RGB", (down, right, Image.new("L", (width, height), shade))).convert(mode)


class GlmParity(Parity):
    """With an oracle that can read the pictures it is given: `mend` says how."""

    def __init__(self, repo: Path, dtype: str = "float32", *, load_dtype: str | None = None) -> None:
        super().__init__(repo, dtype, load_dtype=load_dtype)
        mend(self.pipeline.vision_language_encoder)


def mend(model: Any) -> None:
    """Give diffusers the features of pictures as (patches, channels), and take them back: what it was written for.

    transformers 5.23 gives each picture's as (channels, rows, columns). Its own calls, which tell `images_per_sample`
    or hand over a list, are left alone.
    """
    features, tokens = model.get_image_features, model.get_image_tokens

    def flat(
        pixel_values: torch.Tensor, image_grid_thw: Any = None, images_per_sample: Any = None, **options: Any
    ) -> Any:
        output = features(pixel_values, image_grid_thw, images_per_sample, **options)
        if images_per_sample is None:
            output.pooler_output = [each.flatten(1).T for each in output.pooler_output]
        return output

    def of_flat(patches: torch.Tensor, grids: torch.Tensor) -> torch.Tensor:
        each = patches.split(grids.prod(dim=-1).tolist())
        return tokens([one.T.reshape(-1, *grid[1:].tolist()) for one, grid in zip(each, grids, strict=True)], grids)

    model.get_image_features, model.get_image_tokens = flat, of_flat


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the preview before a picture have 4 tokens or so, for diffusers and for us: 256 take half a second."""
    shape = GlmImageProcessor._get_target_shape

    def shorter(self: GlmImageProcessor, height: int, width: int) -> tuple[int, ...]:
        rows, columns, *preview = shape(self, height, width)
        return rows, columns, *(each // 8 for each in preview)

    monkeypatch.setattr(GlmImageProcessor, "_get_target_shape", shorter)


@pytest.fixture(scope="module")
def exact(tiny_repo: TinyRepo) -> Parity:
    return GlmParity(tiny_repo("glm_image"))


@pytest.fixture(scope="module")
def rounded(tiny_repo: TinyRepo) -> Parity:
    return GlmParity(tiny_repo("glm_image"), "bfloat16")


@pytest.fixture(params=["float32", "bfloat16"])
def either(request: pytest.FixtureRequest, exact: Parity, rounded: Parity) -> Parity:
    """In both dtypes. The bfloat16 oracle is `from_pretrained(dtype=torch.bfloat16)`."""
    return exact if request.param == "float32" else rounded


@pytest.mark.parametrize(("seed", "size"), [(7, (64, 96)), (2**40 + 1, (160, 32))])
@pytest.mark.usefixtures("short")
def test_guided_pictures_are_those_of_diffusers(either: Parity, seed: int, size: tuple[int, int]) -> None:
    call = {**CALL, "height": size[0], "width": size[1]}
    assert either.check(**call, seed=seed).shape[-2:] == size


def test_pictures_after_a_preview_of_full_length_are_those_of_diffusers(exact: Parity) -> None:
    exact.check(**CALL)


@pytest.mark.parametrize(("seed", "size"), [(7, (64, 96)), (2**40 + 1, (160, 32))])
def test_guided_edits_are_those_of_diffusers(either: Parity, seed: int, size: tuple[int, int]) -> None:
    call = {**CALL, "height": size[0], "width": size[1], "image": [picture(30)]}
    either.check(**call, seed=seed)


def test_edits_of_several_pictures_are_those_of_diffusers(either: Parity) -> None:
    one, other = picture(30), picture(200, 128, 32)
    edited = either.check(**CALL, image=[one, other])
    assert differ(either.check(**CALL, image=[other, one]), edited)
    assert differ(either.check(**CALL, image=[one]), edited)


@pytest.mark.usefixtures("short")
def test_pictures_without_guidance_are_those_of_diffusers(either: Parity) -> None:
    for given in ({}, {"image": [picture(30)]}):
        plain = either.check(**{**CALL, "guidance_scale": 1.0, **given})
        assert differ(either.check(**CALL, **given), plain)


@pytest.mark.usefixtures("short")
def test_several_pictures_of_one_prompt_are_one_batch_of_diffusers(either: Parity) -> None:
    for given in ({}, {"image": [picture(30)]}, {"image": [picture(30), picture(200, 96, 32)], "guidance_scale": 1.0}):
        pictures = either.check(**{**CALL, **given}, num_images_per_prompt=2)
        assert len(pictures) == 2
        assert differ(pictures[0], pictures[1])


@pytest.mark.usefixtures("short")
def test_pil_and_numpy_pictures_and_latents_are_those_of_diffusers(exact: Parity) -> None:
    exact.check(**CALL, output_types=("pil", "latent"))
    exact.check(**CALL, image=[picture(30)], num_images_per_prompt=2, output_types=("pil", "np", "latent"))


@pytest.mark.usefixtures("short")
def test_a_picture_may_come_alone_as_a_list_or_as_a_list_of_one_list(exact: Parity) -> None:
    edited = exact.check(**CALL, image=[picture(30)], output_types=("pt",))
    for image in (picture(30), [[picture(30)]]):
        assert_same(exact.whole(**CALL, image=image, output_type="pt"), edited, "another form")


@pytest.mark.usefixtures("short")
def test_each_of_seed_prompt_letters_guidance_steps_crop_and_picture_changes_the_picture(exact: Parity) -> None:
    call = {**CALL, "image": [picture(30)]}
    edited = exact.whole(**call, output_type="pt")
    changes: list[dict[str, Any]] = [
        {"seed": 8},
        {"prompt": "a door that says 'open'"},
        {"prompt": PROMPT.replace("open", "shut")},
        {"max_sequence_length": 2},
        {"guidance_scale": 1.5},
        {"num_inference_steps": 2},
        {"crops_coords_top_left": (48, 16)},
        {"image": [picture(200)]},
        {"image": None},
    ]
    for change in changes:
        assert differ(exact.whole(**{**call, **change}, output_type="pt"), edited), change


def test_tokens_letters_and_latents_all_reach_the_denoiser(exact: Parity) -> None:
    one, other = (
        exact.roles["encoder"].run(triptych.Request(**{**CALL, **change}, seed=7))
        for change in (
            {"image": [picture(30)]},
            {"image": [picture(200)], "prompt": "'wall', or 'door'", "guidance_scale": 2.0},
        )
    )
    denoised = exact.roles["denoiser"].run(one).fields["latents"]
    for name in ("prior_token_ids", "prior_token_image_ids", "prompt_embeds", "image_latents"):
        mixed = one.copy()
        mixed.fields[name] = other.fields[name]
        assert differ(exact.roles["denoiser"].run(mixed).fields["latents"], denoised), name


@pytest.mark.usefixtures("short")
def test_the_global_random_state_has_no_say_and_is_left_as_it_was(exact: Parity) -> None:
    pictures = []
    for state in (1, 2):
        torch.manual_seed(state)
        before = torch.get_rng_state()
        pictures.append(exact.whole(**CALL, output_type="pt"))
        assert torch.equal(torch.get_rng_state(), before)
    assert_same(*pictures, "another global state")


def interleaved(parity: Parity, requests: list[dict[str, Any]], *, joined: bool) -> list[torch.Tensor]:
    """Denoise requests step by step in turn, as a lane does; `joined`, with the same branch of all in one forward."""
    model = parity.roles["denoiser"]
    (stage,) = model.stages
    states = [parity.roles["encoder"].run(triptych.Request(**{**CALL, **each}, seed=7)) for each in requests]
    views = [View(state.fields, stage.name, stage.reads, stage.writes) for state in states]
    with torch.no_grad():
        for view in views:
            stage.begin(view)
        for i in range(CALL["num_inference_steps"]):
            inputs = [stage.model_inputs(view, i) for view in reversed(views)][::-1]
            if joined:
                branches = [stage.predict(branch, exact=False) for branch in zip(*inputs, strict=True)]
                predictions = [list(each) for each in zip(*branches, strict=True)]
            else:
                predictions = [stage.predict(each) for each in inputs]
            for view, prediction in zip(views, predictions, strict=True):
                stage.advance(view, i, prediction)
        for view in views:
            stage.finish(view)
    return [state.fields["latents"] for state in states]


@pytest.mark.usefixtures("short")
def test_requests_that_take_turns_see_their_own_pictures_only(exact: Parity) -> None:
    requests = [{"image": [picture(30)]}, {}, {"image": [picture(200), picture(90, 96, 64)]}, {"image": [picture(200)]}]
    alone = [exact.whole(**{**CALL, **each}, output_type="latent") for each in requests]
    for number, latents in enumerate(interleaved(exact, requests, joined=False)):
        assert_same(latents, alone[number], f"request {number}")


def test_requests_with_pictures_of_one_size_share_forwards_and_see_their_own(
    exact: Parity, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = [{"image": [picture(shade)], "num_images_per_prompt": 2} for shade in (30, 200)]
    alone = [exact.whole(**{**CALL, **each}, output_type="latent") for each in requests]
    forwards = Forwards(exact.roles["denoiser"], "glm_denoising", monkeypatch)
    try:
        together = interleaved(exact, requests, joined=True)
    finally:
        forwards.close()
    # One for each picture, then two a step for both requests.
    assert forwards.count == 2 + 2 * CALL["num_inference_steps"]
    for one, other in zip(together, alone, strict=True):
        assert (one - other).abs().max() <= CALL["num_inference_steps"] * FORWARD_TOLERANCE * other.abs().max()
    assert differ(*alone)


def test_pictures_of_different_sizes_share_no_forward(exact: Parity, monkeypatch: pytest.MonkeyPatch) -> None:
    requests = [{"image": [picture(30)]}, {"image": [picture(200, 32, 64)]}]
    alone = [exact.whole(**{**CALL, **each}, output_type="latent") for each in requests]
    forwards = Forwards(exact.roles["denoiser"], "glm_denoising", monkeypatch)
    try:
        together = interleaved(exact, requests, joined=True)
    finally:
        forwards.close()
    assert forwards.count == 2 + 3 * CALL["num_inference_steps"]  # the unconditional branches see no picture
    for one, other in zip(together, alone, strict=True):
        assert (one - other).abs().max() <= CALL["num_inference_steps"] * FORWARD_TOLERANCE * other.abs().max()


@pytest.mark.parametrize("outputs", [1, 2])
@pytest.mark.usefixtures("short")
def test_joined_branches_stay_within_the_tolerance(
    exact: Parity, outputs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    call = {**CALL, "prompt": WITHOUT_LETTERS, "num_inference_steps": 8, "num_images_per_prompt": outputs}
    assert_joined_within_tolerance(exact, "glm_denoising", monkeypatch, call)


@pytest.mark.usefixtures("short")
def test_branches_of_unequal_text_or_with_pictures_are_not_joined(exact: Parity) -> None:
    for change in ({}, {"image": [picture(30)], "prompt": WITHOUT_LETTERS}):
        call = {**CALL, **change, "output_type": "pt"}
        assert_same(exact.whole(**call, exact=False), exact.whole(**call), "apart")


@pytest.mark.usefixtures("short")
def test_a_picture_without_a_size_has_that_of_the_first_given_or_of_the_documentation(exact: Parity) -> None:
    call = {name: value for name, value in CALL.items() if name not in ("height", "width")}
    images = [picture(30, 128, 32), picture(200)]
    for given, size in (({}, (32, 128)), ({"height": 64}, (64, 128)), ({"width": 32}, (32, 32))):
        edited = exact.whole(**call, **given, image=images, output_type="pt")
        settled = {"height": size[0], "width": size[1]}
        assert_same(edited, exact.diffusers(**call, **settled, image=images, output_type="pt"), "settled")
    fields = exact.model.admit(triptych.Request(**call)).fields
    assert (fields["height"], fields["width"]) == (512, 512)


@pytest.mark.parametrize(("size", "fitting"), [((70, 90), (64, 96)), ((20, 40), (32, 64)), ((600, 300), (192, 96))])
def test_a_picture_that_the_models_round_differently_is_scaled_first(
    exact: Parity, size: tuple[int, int], fitting: tuple[int, int]
) -> None:
    image = picture(30, *size)
    edited = exact.whole(**CALL, image=image, output_type="pt")
    scaled = exact.pipeline.image_processor.resize(image, fitting[1], fitting[0])
    assert_same(edited, exact.diffusers(**CALL, image=[scaled], output_type="pt"), "scaled")
    with pytest.raises(RuntimeError, match="must match"):
        exact.diffusers(**CALL, image=[image])


def test_a_picture_that_lies_on_its_side_is_turned_and_another_mode_is_read_in_colour(
    exact: Parity, tmp_path: Path
) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees, clockwise
    picture(30).save(tmp_path / "lying.png", exif=exif)
    upright = picture(30).transpose(Image.Transpose.ROTATE_270)
    cases = [(Image.open(tmp_path / "lying.png"), upright)]
    cases += [(image := picture(30, mode=mode), image.convert("RGB")) for mode in ("RGBA", "L", "P")]
    for image, read in cases:
        edited = exact.split(**CALL, image=image, output_type="pt")
        assert_same(edited, exact.diffusers(**CALL, image=[read], output_type="pt"), image.mode)


@pytest.mark.usefixtures("short")
def test_given_timesteps_sigmas_latents_and_crop_are_used_as_diffusers_uses_them(exact: Parity) -> None:
    plain = exact.whole(**CALL, output_type="pt")
    noise = torch.randn(1, 5, 16, 24, generator=torch.Generator().manual_seed(1))
    for given in (
        {"sigmas": [1.0, 0.8, 0.1]},
        {"timesteps": [900, 400]},
        {"timesteps": [900, 400], "sigmas": [1.0, 0.5]},
        {"latents": noise},
        {"crops_coords_top_left": (48, 16)},
    ):
        assert differ(exact.check(**CALL, **given), plain), given


def test_given_embeddings_and_tokens_take_the_place_of_what_the_encoder_makes(either: Parity) -> None:
    call = {name: value for name, value in CALL.items() if name != "prompt"}
    state = either.roles["encoder"].run(triptych.Request(**CALL, image=[picture(30)], seed=7))
    names = ("prompt_embeds", "prior_token_ids", "prior_token_image_ids", "source_image_grid_thw")
    given = {name: state.fields[name] for name in names}
    for outputs in (1, 2):
        edited = either.check(**call, **given, image=[picture(30)], num_images_per_prompt=outputs)
        assert_same(edited, either.check(**CALL, image=[picture(30)], num_images_per_prompt=outputs), "of the same")
    either.check(**{**CALL, "prompt": WITHOUT_LETTERS}, prior_token_ids=given["prior_token_ids"])
    negative = {"negative_prompt_embeds": torch.randn_like(given["prompt_embeds"])}
    assert differ(either.check(**call, **given, **negative, image=[picture(30)], num_images_per_prompt=2), edited)


@pytest.mark.usefixtures("short")
def test_a_list_of_prompts_is_as_many_requests(exact: Parity) -> None:
    call = {**CALL, "image": [picture(30)], "output_type": "pt"}
    prompts = [PROMPT, WITHOUT_LETTERS]
    both = exact.whole(**{**call, "prompt": prompts})
    assert_same(both, torch.cat([exact.diffusers(**{**call, "prompt": prompt}) for prompt in prompts]), "two prompts")


def test_copies_pictures_and_noise_do_not_cross_the_wire(exact: Parity) -> None:
    request = triptych.Request(**CALL, image=[picture(30), picture(200, 96, 32)], num_images_per_prompt=4)
    state = triptych.State.from_bytes(bytes(exact.roles["encoder"].run(request).to_bytes()))
    tensors = {name: value for name, value in state.fields.items() if isinstance(value, torch.Tensor)}
    assert tensors.keys() == {"prompt_embeds", "negative_prompt_embeds", "prior_token_ids"}
    assert {len(tensor) for tensor in tensors.values()} == {1}
    assert [tuple(each.shape) for each in state.fields["image_latents"]] == [(1, 5, 24, 16), (1, 5, 8, 24)]
    assert state.fields["image_sizes"] == [[96, 64], [32, 96]]
    assert "image" not in state.fields
    state = exact.roles["denoiser"].run(state)
    assert [name for name, value in state.fields.items() if isinstance(value, torch.Tensor)] == ["latents"]
    assert "conditioning" not in state.fields


def test_the_encoder_loads_no_transformer_and_for_a_prompt_alone_no_vision(exact: Parity) -> None:
    loaded = {role: model.loaded_bytes for role, model in exact.roles.items()}
    held = {role: {name for name, size in sizes.items() if size} for role, sizes in loaded.items()}
    writers = {"vision_language_encoder", "text_encoder"}
    assert held == {"encoder": {*writers, "vae"}, "denoiser": {"transformer"}, "decoder": {"vae"}}
    assert exact.roles["encoder"].is_hollow("transformer")
    whole = exact.pipeline.vision_language_encoder.state_dict()
    alone = triptych.load(exact.repo, role="encoder", device="cpu", tasks="text-to-image")
    assert {name for name, size in alone.loaded_bytes.items() if size} == writers
    for model, unused in (
        (exact.roles["encoder"], ("model.vqmodel.post_quant_conv.",)),
        (alone, ("model.vqmodel.", "model.visual.")),
    ):
        used = {key: tensor for key, tensor in whole.items() if not key.startswith(unused)}
        assert 0 < len(used) < len(whole)
        assert model.loaded_bytes["vision_language_encoder"] == sum(tensor.nbytes for tensor in used.values())


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"image": []}, ParameterError, "give one or more pictures"),
        ({"image": [[]]}, ParameterError, "give one or more pictures"),
        ({"image": torch.zeros(1, 3, 64, 64)}, ParameterError, "a PIL image is accepted, not Tensor"),
        ({"image": picture(30, 500, 100)}, ParameterError, "aspect ratio must be smaller than 4"),
        ({"image": picture(30, 9, 9)}, ParameterError, "the autoregressive model does not take it"),
        ({"height": 80}, ParameterError, "height=80: .* multiple of 32 .* 64 or 96"),
        ({"width": 5}, ParameterError, "width=5: .* multiple of 32 .* 32$"),
        ({"prompt": None}, UsageError, "`prompt` or `prompt_embeds`"),
        ({"prompt": "an <|image|>"}, ParameterError, r"prompt='an <\|image\|>': a text without"),
        ({"crops_coords_top_left": "ab"}, ParameterError, "crops_coords_top_left='ab': two finite numbers"),
        ({"crops_coords_top_left": [1, 2, 3]}, ParameterError, "two finite numbers"),
        ({"crops_coords_top_left": [1, float("nan")]}, ParameterError, "two finite numbers"),
        ({"crops_coords_top_left": 5}, ParameterError, "two finite numbers"),
        ({"latents": torch.zeros(1, 5, 16, 16)}, ParameterError, r"latents='of shape .*\(1, 5, 16, 24\)"),
        ({"latents": "noise"}, ParameterError, "latents='noise': a tensor"),
        ({"prompt": None, "prompt_embeds": "text", "negative_prompt_embeds": "none"}, ParameterError,
         "prompt_embeds='text': a tensor"),
        ({"prior_token_ids": [1, 2]}, ParameterError, r"\(1, 24\) tokens"),
        ({"prior_token_ids": torch.full((1, 24), 37)}, ParameterError, "whole numbers from 0 to 36"),
        ({"prior_token_ids": torch.full((1, 24), -1)}, ParameterError, "whole numbers from 0 to 36"),
        ({"prior_token_ids": torch.zeros(1, 24)}, ParameterError, "whole numbers from 0 to 36"),
        ({"prior_token_ids": torch.zeros(1, 24, dtype=torch.long), "image": picture(30),
          "prior_token_image_ids": [torch.full((24,), 37)], "source_image_grid_thw": [torch.tensor([[1, 6, 4]])]},
         ParameterError, "(?s)prior_token_image_ids=.* whole numbers from 0 to 36"),
        ({"sigmas": [1.0, 0.5]}, ParameterError, "as many as steps are accepted: 3"),
        ({"prior_token_ids": torch.zeros(1, 7)}, ParameterError, r"\(1, 24\) tokens .* not \(1, 7\)"),
        (
            {"prior_token_ids": torch.zeros(1, 24), "image": picture(30)},
            ParameterError,
            "one list entry for all pictures",
        ),
        ({"prior_token_image_ids": [torch.zeros(6)]}, UsageError, "must be provided together"),
        ({"prompt": None, "prompt_embeds": torch.zeros(2, 4, 20), "prior_token_ids": torch.zeros(1, 24)},
         ParameterError, "one prompt at a time"),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_refused_with_a_reason(
    exact: Parity, changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    server = triptych.load(exact.repo, role="server", device="cpu")
    with pytest.raises(error, match=message):
        server.admit(triptych.Request(**{**CALL, **changes}))


def test_a_picture_that_the_model_ends_too_early_is_told_of(exact: Parity, tmp_path: Path) -> None:
    repo = shutil.copytree(exact.repo, tmp_path / "repo")
    settings = repo / "vision_language_encoder" / "generation_config.json"
    content = json.loads(settings.read_text())
    # Nothing but the token that ends a picture may be written.
    content["suppress_tokens"] = [token for token in range(41) if token != content["eos_token_id"]]
    settings.write_text(json.dumps(content))
    encoder = triptych.load(repo, role="encoder", device="cpu")
    with pytest.raises(ModelError, match=r"ended the picture after \d of 6 tokens"):
        encoder.run(triptych.Request(**CALL, image=[picture(30)]))


def test_a_token_that_is_no_part_of_a_picture_is_told_of(exact: Parity, tmp_path: Path) -> None:
    repo = shutil.copytree(exact.repo, tmp_path / "repo")
    settings = repo / "vision_language_encoder" / "generation_config.json"
    content = json.loads(settings.read_text())
    content["suppress_tokens"] = [token for token in range(41) if token != 39]
    settings.write_text(json.dumps(content))
    encoder = triptych.load(repo, role="encoder", device="cpu")
    with pytest.raises(ModelError, match="wrote token 39, where pictures are made of those below 37; another seed"):
        encoder.run(triptych.Request(**CALL, image=[picture(30)]))


def test_diffusers_itself_cannot_read_pictures_with_the_installed_transformers(tiny_repo: TinyRepo) -> None:
    parity = Parity(tiny_repo("glm_image"))
    with pytest.raises(RuntimeError, match="channels"):
        parity.diffusers(**CALL, image=[picture(30)])


def test_defaults_of_the_model_folder_are_honoured(exact: Parity, tmp_path: Path) -> None:
    repo = shutil.copytree(exact.repo, tmp_path / "repo")
    better = {"height": 64, "width": 32, "num_inference_steps": 2, "guidance_scale": 3.0}
    (repo / "triptych.json").write_text(json.dumps({"defaults": better}))
    given = {"prompt": PROMPT, "image": [picture(30)], "output_type": "pt"}
    model = triptych.load(repo, device="cpu")
    assert_same(model.generate(**given, seed=7).images, exact.diffusers(**given, **better), "better defaults")


@pytest.mark.usefixtures("short")
def test_a_bfloat16_repository_runs_in_float32_and_by_default_in_bfloat16(tiny_repo: TinyRepo) -> None:
    repo = tiny_repo("glm_image", dtype="bfloat16")
    for dtype, load_dtype in (("float32", None), ("bfloat16", "auto")):
        parity = GlmParity(repo, dtype, load_dtype=load_dtype)
        for given in ({}, {"image": [picture(30)]}):
            assert parity.check(**CALL, **given).dtype == getattr(torch, parity.dtype)


def test_stages_follow_one_another_in_three_segments(exact: Parity) -> None:
    stages = {role: [stage.name for stage in exact.roles[role].stages] for role in ROLES}
    assert stages == {
        "encoder": ["prior_generation", "image_prior_generation", "glyph_encoding", "image_encoding"],
        "denoiser": ["glm_denoising"],
        "decoder": ["decoding"],
    }


@pytest.mark.slow
def test_processes_that_hand_over_files_give_the_same_pixels(exact: Parity, tmp_path: Path) -> None:
    exact.check_in_processes(tmp_path, CALL, ("float32", "bfloat16"))
