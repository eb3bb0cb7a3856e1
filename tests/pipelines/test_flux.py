"""FLUX.1 gives what diffusers gives, whole and split, and refuses what it cannot do."""

import json
import logging
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import triptych
from triptych.errors import ParameterError, UnknownParameterError, UsageError

from .parity import DTYPES, ROLES, Parity, assert_joined_within_tolerance, assert_same, differ

PROMPT = "a red fox"
NEGATIVE = "an ugly cat"
SHORT: dict[str, Any] = {"max_sequence_length": 24}
# In 5 steps timesteps come that bfloat16 and float32 scale to different numbers.
CALL: dict[str, Any] = {"prompt": PROMPT, "height": 64, "width": 48, "num_inference_steps": 5, **SHORT}
GUIDED: dict[str, Any] = {**CALL, "negative_prompt": NEGATIVE, "true_cfg_scale": 4.0}


@pytest.fixture(scope="module", params=DTYPES)
def either(request: pytest.FixtureRequest, tiny_repo: Callable[..., Path]) -> Parity:
    """In both dtypes. The bfloat16 oracle is `from_pretrained(dtype=torch.bfloat16)`."""
    return Parity(tiny_repo("flux"), request.param)


@pytest.fixture(scope="module")
def flux(tiny_repo: Callable[..., Path]) -> Parity:
    return Parity(tiny_repo("flux"))


@pytest.mark.parametrize("size", [(64, 48), (40, 72)])
@pytest.mark.parametrize("seed", [7, 2**40 + 1])
def test_pictures_are_those_of_diffusers(either: Parity, seed: int, size: tuple[int, int]) -> None:
    for call in (CALL, GUIDED):
        either.check(**{**call, "height": size[0], "width": size[1]}, seed=seed, output_types=("latent", "pt"))


def test_true_guidance_changes_the_picture_and_a_scale_of_one_is_none(either: Parity) -> None:
    plain = either.check(**CALL)
    assert differ(either.check(**GUIDED), plain)
    assert_same(either.check(**{**GUIDED, "true_cfg_scale": 1.0}), plain, "a negative prompt without guidance")
    assert_same(either.check(**CALL, true_cfg_scale=4.0), plain, "guidance without a negative prompt")


def test_a_transformer_without_embedded_guidance_ignores_the_scale(tiny_repo: Callable[..., Path]) -> None:
    schnell = Parity(tiny_repo("flux", guidance_embeds=False))
    drawn = schnell.check(**CALL, num_images_per_prompt=2)
    assert_same(schnell.check(**CALL, guidance_scale=0.0, num_images_per_prompt=2), drawn, "another scale")
    assert differ(schnell.check(**GUIDED, num_images_per_prompt=2), drawn)
    Parity(schnell.repo, "bfloat16").check(**CALL)


def test_several_pictures_of_one_prompt_are_one_batch_of_diffusers(either: Parity) -> None:
    pictures = either.check(**GUIDED, num_images_per_prompt=2)
    assert len(pictures) == 2
    assert differ(pictures[0], pictures[1])
    either.check(**CALL, num_images_per_prompt=3)


def test_pil_numpy_and_latent_pictures_are_those_of_diffusers(flux: Parity) -> None:
    flux.check(**GUIDED, num_images_per_prompt=2, output_types=("pil", "np", "latent"))


def test_each_text_reaches_its_own_encoder_and_every_parameter_changes_the_picture(flux: Parity) -> None:
    drawn = flux.check(**GUIDED)
    changes: list[dict[str, Any]] = [
        {"seed": 8},
        {"prompt": "a blue cat"},
        {"prompt_2": "a blue cat"},
        {"prompt": "a blue cat", "prompt_2": PROMPT},
        {"negative_prompt": ""},
        {"negative_prompt_2": "blue"},
        {"true_cfg_scale": 2.0},
        {"guidance_scale": 1.0},
        {"num_inference_steps": 2},
        {"max_sequence_length": 4},
    ]
    for change in changes:
        assert differ(flux.check(**{**GUIDED, **change}), drawn), change


@pytest.mark.parametrize("kind", ["FlowMatchEulerDiscreteScheduler", "FlowMatchLCMScheduler"])
def test_what_a_scheduler_draws_comes_from_the_seed(flux: Parity, tmp_path: Path, kind: str) -> None:
    repo = shutil.copytree(flux.repo, tmp_path / "repo")
    index, file = repo / "model_index.json", repo / "scheduler" / "scheduler_config.json"
    index.write_text(json.dumps({**json.loads(index.read_text()), "scheduler": ["diffusers", kind]}))
    config = {**json.loads(file.read_text()), "_class_name": kind}
    file.write_text(json.dumps({**config, **({"stochastic_sampling": True} if "Euler" in kind else {})}))
    noisy = Parity(repo)
    made = noisy.whole(**CALL, output_type="pt")
    torch.rand(3)
    assert_same(noisy.whole(**CALL, output_type="pt"), made, "again, with another global state")
    assert_same(noisy.split(**CALL, output_type="pt"), made, "split")
    assert differ(noisy.whole(**CALL, seed=8, output_type="pt"), made)
    # The oracle leaves it to the global state: it is given the call's generator here.
    step, generator = noisy.pipeline.scheduler.step, torch.Generator().manual_seed(7)
    noisy.pipeline.scheduler.step = partial(step, generator=generator)
    images = noisy.pipeline(generator=generator, **CALL, output_type="pt").images
    assert_same(images, made, "diffusers")


def test_given_sigmas_are_used_as_diffusers_uses_them(either: Parity) -> None:
    assert differ(either.check(**GUIDED, sigmas=[1.0, 0.8, 0.1]), either.check(**GUIDED))


def test_given_latents_take_the_place_of_the_noise(either: Parity) -> None:
    noise = torch.randn(1, 8 * 6, 20, generator=torch.Generator().manual_seed(1))
    drawn = either.check(**GUIDED, latents=noise)
    assert differ(drawn, either.check(**GUIDED))
    assert_same(either.whole(**GUIDED, latents=noise, seed=1, output_type="pt"), drawn, "another seed")


def test_given_embeddings_take_the_place_of_the_prompts(either: Parity) -> None:
    call = {name: value for name, value in GUIDED.items() if name not in ("prompt", "negative_prompt")}
    with torch.no_grad():
        embeds, pooled, _ = either.pipeline.encode_prompt([PROMPT, "a blue cat"], **SHORT)
        negative, negative_pooled, _ = either.pipeline.encode_prompt([NEGATIVE, ""], **SHORT)
    names = ("prompt_embeds", "pooled_prompt_embeds", "negative_prompt_embeds", "negative_pooled_prompt_embeds")
    both = dict(zip(names, (embeds, pooled, negative, negative_pooled)))
    one = {name: tensor[:1] for name, tensor in both.items()}
    assert_same(either.check(**call, **one), either.check(**GUIDED), "the same prompts")
    assert len(either.check(**call, **both)) == 2
    # Here diffusers fails: it does not repeat embeddings that are given.
    several = either.whole(**call, **one, num_images_per_prompt=2, output_type="pt")
    assert_same(several, either.check(**GUIDED, num_images_per_prompt=2), "two pictures")


def test_a_list_of_prompts_is_as_many_requests(flux: Parity) -> None:
    call = {**GUIDED, "output_type": "pt"}
    prompts = [PROMPT, "a blue cat"]
    both = flux.whole(**{**call, "prompt": prompts})
    assert_same(both, torch.cat([flux.diffusers(**{**call, "prompt": prompt}) for prompt in prompts]), "two prompts")


@pytest.mark.parametrize("outputs", [1, 2])
def test_joined_branches_stay_within_the_tolerance(flux: Parity, outputs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    call = {**GUIDED, "num_inference_steps": 8, "num_images_per_prompt": outputs}
    assert_joined_within_tolerance(flux, "flux_denoising", monkeypatch, call)


@pytest.mark.slow
def test_processes_that_hand_over_files_give_the_same_pixels(flux: Parity, tmp_path: Path) -> None:
    flux.check_in_processes(tmp_path, {**GUIDED, "num_images_per_prompt": 2}, ("float32", "bfloat16"))


def test_copies_and_noise_do_not_cross_the_wire(flux: Parity) -> None:
    state = flux.roles["encoder"].run(triptych.Request(**GUIDED, num_images_per_prompt=4))
    rows = {name: len(value) for name, value in state.fields.items() if isinstance(value, torch.Tensor)}
    texts = {"prompt_embeds": 1, "pooled_prompt_embeds": 1, "text_ids": SHORT["max_sequence_length"]}
    assert rows == texts | {f"negative_{name}": count for name, count in texts.items()}
    state = flux.roles["denoiser"].run(state)
    assert [name for name, value in state.fields.items() if isinstance(value, torch.Tensor)] == ["latents"]


def test_each_role_loads_its_own_weights_and_the_decoder_half_an_autoencoder(flux: Parity) -> None:
    loaded = {role: {name: size for name, size in flux.roles[role].loaded_bytes.items() if size} for role in ROLES}
    assert {role: set(sizes) for role, sizes in loaded.items()} == {
        "encoder": {"text_encoder", "text_encoder_2"}, "denoiser": {"transformer"}, "decoder": {"vae"},
    }  # fmt: skip
    state = flux.pipeline.vae.state_dict()
    assert loaded["decoder"]["vae"] == sum(tensor.nbytes for key, tensor in state.items() if key.startswith("decoder"))


def test_without_a_size_the_picture_has_128_latents_a_side(flux: Parity) -> None:
    state = flux.model.admit(triptych.Request(prompt=PROMPT))
    assert (state.fields["height"], state.fields["width"]) == (128 * 4, 128 * 4)


@pytest.mark.parametrize("changes", [{"negative_prompt": NEGATIVE}, {"true_cfg_scale": 3.0}])
def test_half_of_what_guidance_needs_is_remarked_on(
    flux: Parity, changes: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        flux.model.admit(triptych.Request(**CALL, **changes))
    assert "has no effect: guidance needs" in caplog.text


EMBEDS: dict[str, Any] = {"prompt": None, "prompt_embeds": torch.zeros(1, 24, 20)}
POOLED: dict[str, Any] = {"pooled_prompt_embeds": torch.zeros(1, 12)}
NEGATIVE_EMBEDS: dict[str, Any] = {
    "negative_prompt_embeds": torch.zeros(1, 9, 20), "negative_pooled_prompt_embeds": torch.zeros(1, 12),
}  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"height": 60}, ParameterError, "height=60: .* multiple of 8 .* 56 or 64"),
        ({"width": 5}, ParameterError, "width=5: .* multiple of 8 .* 8$"),
        ({"true_cfg_scal": 3.0}, UnknownParameterError, "did you mean 'true_cfg_scale'"),
        ({"ip_adapter_image": None}, UnknownParameterError, "no parameter 'ip_adapter_image'"),
        ({"prompt_2": ["a", "b"]}, ParameterError, "prompt_2=.*a text is accepted"),
        ({"prompt_2": "\ud800"}, ParameterError, "prompt_2=.*valid Unicode text"),
        ({"negative_prompt_2": "\ud800"}, ParameterError, "negative_prompt_2=.*valid Unicode text"),
        ({"max_sequence_length": 513}, UsageError, "cannot be greater than 512"),
        ({"prompt": None}, UsageError, "`prompt` or `prompt_embeds`"),
        (EMBEDS, UsageError, "`pooled_prompt_embeds` also have to be passed"),
        (
            {**EMBEDS, **POOLED, **NEGATIVE_EMBEDS, "true_cfg_scale": 2.0},
            ParameterError, "negative_prompt_embeds=.*the shape of `prompt_embeds`",
        ),
        ({**EMBEDS, "pooled_prompt_embeds": "pooled"}, ParameterError, "pooled_prompt_embeds='pooled': a tensor"),
        ({**EMBEDS, **POOLED, "prompt_embeds": torch.zeros(24, 20)}, ParameterError, r"\(any, any, any\)"),
        ({**EMBEDS, **POOLED, "prompt_embeds": torch.zeros(1, 24, 20).long()}, ParameterError, "floating point"),
        ({"latents": "noise"}, ParameterError, "latents='noise': a tensor"),
        ({"latents": torch.zeros(1, 3, 5)}, ParameterError, r"latents='of shape \(1, 3, 5\) .*\(1, 48, 20\)"),
        (
            {"latents": torch.zeros(1, 48, 20), "num_images_per_prompt": 2},
            ParameterError, r"\(2, 48, 20\), is accepted",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_refused_with_a_reason(
    flux: Parity, changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    server = triptych.load(flux.repo, role="server", device="cpu")
    with pytest.raises(error, match=message):
        server.admit(triptych.Request(**{**CALL, **changes}))


def test_a_bfloat16_repository_runs_in_float32_and_by_default_in_bfloat16(tiny_repo: Callable[..., Path]) -> None:
    repo = tiny_repo("flux", dtype="bfloat16")
    assert Parity(repo, "float32").check(**GUIDED).dtype == torch.float32
    Parity(repo, "bfloat16", load_dtype="auto").check(**GUIDED)
