"""Qwen-Image gives what diffusers gives, whole and split, and refuses what it cannot do."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

import triptych
from triptych.errors import ParameterError, UnknownParameterError, UsageError, WireError, WrongRoleError

from .parity import DTYPES, ROLES, Parity, assert_joined_within_tolerance, assert_same, differ

PROMPT = "a red fox"
NEGATIVE = "blurred, ugly colours and background"
CALL: dict[str, Any] = {"prompt": PROMPT, "height": 64, "width": 48, "num_inference_steps": 3}
GUIDED: dict[str, Any] = {**CALL, "negative_prompt": NEGATIVE, "true_cfg_scale": 4.0}


@pytest.fixture(scope="module", params=DTYPES)
def either(request: pytest.FixtureRequest, tiny_repo: Callable[..., Path]) -> Parity:
    """In both dtypes. The bfloat16 oracle is `from_pretrained(dtype=torch.bfloat16)`."""
    return Parity(tiny_repo("qwen_image"), request.param)


@pytest.fixture(scope="module")
def qwen(tiny_repo: Callable[..., Path]) -> Parity:
    return Parity(tiny_repo("qwen_image"))


def edited(repo: Path, target: Path, **config: object) -> Path:
    """A copy of a repository whose transformer has another configuration."""
    shutil.copytree(repo, target)
    file = target / "transformer" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **config}))
    return target


@pytest.mark.parametrize("size", [(64, 48), (40, 72)])
@pytest.mark.parametrize("seed", [7, 2**40 + 1])
def test_guided_pictures_are_those_of_diffusers(either: Parity, seed: int, size: tuple[int, int]) -> None:
    either.check(**{**GUIDED, "height": size[0], "width": size[1]}, seed=seed, output_types=("latent", "pt"))


def test_pictures_without_guidance_are_those_of_diffusers(either: Parity) -> None:
    plain = either.check(**CALL)
    assert_same(either.check(**{**GUIDED, "true_cfg_scale": 1.0}), plain, "a negative prompt without guidance")
    assert differ(either.check(**GUIDED), plain)


def test_several_pictures_of_one_prompt_are_one_batch_of_diffusers(either: Parity) -> None:
    pictures = either.check(**GUIDED, num_images_per_prompt=2)
    assert len(pictures) == 2
    assert differ(pictures[0], pictures[1])
    either.check(**CALL, num_images_per_prompt=3)


def test_pil_and_numpy_pictures_are_those_of_diffusers(qwen: Parity) -> None:
    qwen.check(**GUIDED, num_images_per_prompt=2, output_types=("pil", "np", "latent"))


def test_each_of_seed_prompt_negative_prompt_scale_and_steps_changes_the_picture(qwen: Parity) -> None:
    picture = qwen.check(**GUIDED)
    changes: list[dict[str, Any]] = [
        {"seed": 8},
        {"prompt": "a blue cat"},
        {"negative_prompt": ""},
        {"true_cfg_scale": 2.0},
        {"num_inference_steps": 2},
        {"max_sequence_length": 4},
    ]
    for change in changes:
        assert differ(qwen.check(**{**GUIDED, **change}), picture), change


def test_given_sigmas_are_used_as_diffusers_uses_them(either: Parity) -> None:
    assert differ(either.check(**GUIDED, sigmas=[1.0, 0.8, 0.1]), either.check(**GUIDED))


def test_given_latents_take_the_place_of_the_noise(either: Parity) -> None:
    noise = torch.randn(1, 8 * 6, 24, generator=torch.Generator().manual_seed(1))
    assert differ(either.check(**GUIDED, latents=noise), either.check(**GUIDED))
    assert_same(
        either.whole(**GUIDED, latents=noise, seed=1, output_type="pt"), either.check(**GUIDED, latents=noise), ""
    )


def test_given_embeddings_take_the_place_of_the_prompts(either: Parity) -> None:
    call = {name: value for name, value in GUIDED.items() if name not in ("prompt", "negative_prompt")}
    embeds, _ = either.pipeline.encode_prompt(PROMPT)
    negative, _ = either.pipeline.encode_prompt(NEGATIVE)
    picture = either.check(**call, prompt_embeds=embeds, negative_prompt_embeds=negative, num_images_per_prompt=2)
    assert_same(picture, either.check(**GUIDED, num_images_per_prompt=2), "embeddings of the same prompts")


def test_given_embeddings_of_several_lengths_keep_their_mask(either: Parity) -> None:
    call = {name: value for name, value in GUIDED.items() if name not in ("prompt", "negative_prompt")}
    embeds, mask = either.pipeline.encode_prompt([PROMPT, f"{PROMPT} and the background"])
    negative, negative_mask = either.pipeline.encode_prompt([NEGATIVE, ""])
    assert not mask.all() and not negative_mask.all()
    given = {
        "prompt_embeds": embeds,
        "prompt_embeds_mask": mask,
        "negative_prompt_embeds": negative,
        "negative_prompt_embeds_mask": negative_mask,
    }
    pictures = either.check(**call, **given)
    assert len(pictures) == 2
    if either.dtype == "float32":
        joined = either.whole(**call, **given, output_type="pt", exact=False)
        torch.testing.assert_close(joined, pictures, rtol=0, atol=1e-4)


def test_a_list_of_prompts_is_as_many_requests(qwen: Parity) -> None:
    call = {**GUIDED, "output_type": "pt"}
    prompts, negatives = [PROMPT, "a blue cat"], [NEGATIVE, "shape"]
    both = qwen.whole(**{**call, "prompt": prompts})
    assert_same(
        both, torch.cat([qwen.diffusers(**{**call, "prompt": prompt}) for prompt in prompts]), "one negative prompt"
    )
    both = qwen.whole(**{**call, "prompt": prompts, "negative_prompt": negatives})
    pairs = [{"prompt": prompt, "negative_prompt": negative} for prompt, negative in zip(prompts, negatives)]
    assert_same(both, torch.cat([qwen.diffusers(**{**call, **pair}) for pair in pairs]), "as many negative prompts")


@pytest.mark.parametrize("negative", [NEGATIVE, "", PROMPT])
@pytest.mark.parametrize("outputs", [1, 2])
def test_joined_branches_of_any_two_lengths_stay_within_the_tolerance(
    qwen: Parity, negative: str, outputs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    call = {**GUIDED, "negative_prompt": negative, "num_inference_steps": 8, "num_images_per_prompt": outputs}
    assert_joined_within_tolerance(qwen, "qwen_denoising", monkeypatch, call)


@pytest.mark.slow  # FLUX.2 [klein] has it among the quick ones
def test_processes_that_hand_over_files_give_the_same_pixels(qwen: Parity, tmp_path: Path) -> None:
    qwen.check_in_processes(tmp_path, {**GUIDED, "num_images_per_prompt": 2}, ("float32", "bfloat16"))


def test_copies_and_noise_do_not_cross_the_wire(qwen: Parity) -> None:
    state = qwen.roles["encoder"].run(triptych.Request(**GUIDED, num_images_per_prompt=4))
    tensors = {name: value for name, value in state.fields.items() if isinstance(value, torch.Tensor)}
    assert tensors.keys() == {"prompt_embeds", "negative_prompt_embeds"}
    assert {len(tensor) for tensor in tensors.values()} == {1}
    state = qwen.roles["denoiser"].run(state)
    assert [name for name, value in state.fields.items() if isinstance(value, torch.Tensor)] == ["latents"]


def test_roles_load_no_vision_tower_no_head_and_nothing_for_frames(qwen: Parity) -> None:
    loaded = {role: model.loaded_bytes for role, model in qwen.roles.items()}
    held = {role: {name for name, size in sizes.items() if size} for role, sizes in loaded.items()}
    assert held == {"encoder": {"text_encoder"}, "denoiser": {"transformer"}, "decoder": {"vae"}}
    whole = {name: part.state_dict() for name, part in qwen.pipeline.components.items() if hasattr(part, "state_dict")}
    text = sum(t.nbytes for key, t in whole["text_encoder"].items() if ".visual." not in key and "lm_head" not in key)
    assert loaded["encoder"]["text_encoder"] == text
    decoder = [(key, t) for key, t in whole["vae"].items() if key.startswith(("decoder.", "post_quant_conv."))]
    assert any("time_conv" in key for key, _ in decoder)
    assert loaded["decoder"]["vae"] == sum(t.nbytes for key, t in decoder if "time_conv" not in key)


def test_an_autoencoder_that_never_shrinks_time_decodes_too(tiny_repo: Callable[..., Path], tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    repo = shutil.copytree(tiny_repo("qwen_image"), tmp_path / "repo")
    config, weights = repo / "vae" / "config.json", repo / "vae" / "diffusion_pytorch_model.safetensors"
    config.write_text(json.dumps({**json.loads(config.read_text()), "temperal_downsample": [False, False]}))
    save_file({key: tensor for key, tensor in load_file(weights).items() if "time_conv" not in key}, weights)
    Parity(repo).check(**GUIDED)


def test_a_guidance_distilled_transformer_is_given_the_scale(
    tiny_repo: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from diffusers.models.transformers.transformer_qwenimage import QwenTimestepProjEmbeddings

    plain = QwenTimestepProjEmbeddings.forward

    def guided(
        self: Any, timestep: torch.Tensor, guidance: torch.Tensor, hidden: torch.Tensor, _: None
    ) -> torch.Tensor:
        return plain(self, timestep, hidden) + guidance[:, None] / 10_000

    # diffusers 0.42.1 hands the scale to an embedding that has no place for it; no such model is published yet.
    monkeypatch.setattr(QwenTimestepProjEmbeddings, "forward", guided)
    distilled = Parity(edited(tiny_repo("qwen_image"), tmp_path / "repo", guidance_embeds=True))
    picture = distilled.check(**CALL, guidance_scale=3.5, num_images_per_prompt=2)
    assert differ(distilled.check(**CALL, guidance_scale=1.5, num_images_per_prompt=2), picture)
    guided_twice = {**GUIDED, "guidance_scale": 3.5, "num_images_per_prompt": 2, "num_inference_steps": 8}
    assert_joined_within_tolerance(distilled, "qwen_denoising", monkeypatch, guided_twice)
    with pytest.raises(ParameterError, match="guidance_scale=None: this model is guidance-distilled"):
        distilled.whole(**CALL)


def test_a_transformer_that_modulates_token_by_token_joins_branches_too(
    tiny_repo: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    by_token = Parity(edited(tiny_repo("qwen_image"), tmp_path / "repo", zero_cond_t=True))
    by_token.check(**GUIDED, num_images_per_prompt=2)
    call = {**GUIDED, "num_images_per_prompt": 2, "num_inference_steps": 8}
    assert_joined_within_tolerance(by_token, "qwen_denoising", monkeypatch, call)


@pytest.mark.parametrize(
    ("changes", "warning"),
    [
        ({"true_cfg_scale": 4.0}, "true_cfg_scale=4.0 has no effect"),
        ({"true_cfg_scale": 1.0, "negative_prompt": NEGATIVE}, "negative_prompt has no effect"),
        ({"true_cfg_scale": 1.0, "guidance_scale": 3.5}, "guidance_scale=3.5 is ignored"),
    ],
)
def test_what_has_no_effect_is_warned_of(
    qwen: Parity, changes: dict[str, Any], warning: str, caplog: pytest.LogCaptureFixture
) -> None:
    qwen.check(**{**CALL, **changes})
    assert warning in caplog.text


def test_defaults_of_the_model_folder_are_honoured(qwen: Parity, tmp_path: Path) -> None:
    repo = shutil.copytree(qwen.repo, tmp_path / "repo")
    better = {"height": 40, "width": 56, "num_inference_steps": 2, "true_cfg_scale": 3.0, "max_sequence_length": 6}
    (repo / "triptych.json").write_text(json.dumps({"defaults": better}))
    given = {"prompt": PROMPT, "negative_prompt": NEGATIVE, "seed": 7, "output_type": "pt"}
    model = triptych.load(repo, device="cpu")
    assert_same(model.generate(**given).images, qwen.diffusers(**given, **better), "better defaults")
    assert_same(model.generate(**given, width=48).images, qwen.diffusers(**given, **{**better, "width": 48}), "given")


def test_without_a_size_the_picture_has_128_latents_a_side(qwen: Parity) -> None:
    state = qwen.model.admit(triptych.Request(prompt=PROMPT))
    assert (state.fields["height"], state.fields["width"]) == (128 * 4, 128 * 4)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"height": 60}, ParameterError, "height=60: .* multiple of 8 .* 56 or 64"),
        ({"width": 5}, ParameterError, "width=5: .* multiple of 8 .* 8$"),
        ({"negative_promt": "x"}, UnknownParameterError, "did you mean 'negative_prompt'"),
        ({"generator": None}, UnknownParameterError, "no parameter 'generator'"),
        ({"true_cfg_scale": "4"}, ParameterError, "true_cfg_scale='4'"),
        ({"max_sequence_length": 1025}, UsageError, "cannot be greater than 1024"),
        ({"prompt": None}, UsageError, "`prompt` or `prompt_embeds`"),
        ({"prompt_embeds": torch.zeros(1, 2, 24)}, UsageError, "Cannot forward both `prompt`"),
        ({"negative_prompt": ["a", "b"], "prompt": ["a"]}, ParameterError, "1 prompts need as many"),
        ({"prompt": None, "prompt_embeds": "text"}, ParameterError, "prompt_embeds='text': a tensor"),
        ({"latents": "noise"}, ParameterError, "latents='noise': a tensor"),
        ({"latents": torch.zeros(1, 47, 24)}, ParameterError, r"latents='of shape .*\(1, 48, 24\)"),
    ],
)
def test_what_cannot_be_done_is_refused_with_a_reason(
    qwen: Parity, changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        qwen.whole(**{**CALL, **changes})


def test_a_role_refuses_what_is_not_its_turn(qwen: Parity) -> None:
    encoder, denoiser, decoder = (qwen.roles[role] for role in ROLES)
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


def test_a_state_of_another_model_is_refused(qwen: Parity, tiny_repo: Callable[..., Path]) -> None:
    other = triptych.load(tiny_repo("qwen_image", seed=1), role="denoiser", device="cpu")
    state = qwen.roles["encoder"].run(triptych.Request(**CALL))
    with pytest.raises(WireError, match="another model"):
        other.run(triptych.State.from_bytes(bytes(state.to_bytes())))


def test_a_sharded_copy_and_a_variant_give_the_same_pixels(qwen: Parity, tmp_path: Path) -> None:
    expected = qwen.diffusers(**GUIDED, output_type="pt")
    repo = shutil.copytree(qwen.repo, tmp_path / "repo")
    for component in ("text_encoder", "transformer", "vae"):
        tiny.shard(repo, component)
    assert_same(Parity(repo).check(**GUIDED), expected, "sharded")
    for component in ("text_encoder", "transformer", "vae"):
        tiny.as_variant(repo, component)
    model = triptych.load(repo, device="cpu", variant="fp16")
    assert_same(model.generate(**GUIDED, seed=7, output_type="pt").images, expected, "variant")


def test_a_bfloat16_repository_runs_in_float32_and_by_default_in_bfloat16(tiny_repo: Callable[..., Path]) -> None:
    repo = tiny_repo("qwen_image", dtype="bfloat16")
    assert Parity(repo, "float32").check(**GUIDED).dtype == torch.float32
    Parity(repo, "bfloat16", load_dtype="auto").check(**GUIDED)
