"""Stable Diffusion 3 gives what diffusers gives, whole and split, with and without T5, and refuses what it cannot do."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline

import triptych
from triptych.errors import ParameterError, UnknownParameterError, UsageError
from triptych.pipelines.base import check_inputs

from . import parity
from .parity import DTYPES, ROLES, Forwards, Parity, assert_same, count_from_the_first, differ

TinyRepo = Callable[..., Path]

PROMPT = "a red fox"
SHORT: dict[str, Any] = {"max_sequence_length": 24}
PLAIN: dict[str, Any] = {"prompt": PROMPT, "height": 64, "width": 48, "num_inference_steps": 5, **SHORT}
GUIDED: dict[str, Any] = {**PLAIN, "negative_prompt": "an ugly cat"}
PLAIN = {**PLAIN, "guidance_scale": 1.0}
# Of 5 steps, 1 and 2 have it.
SKIPPING: dict[str, Any] = {"skip_guidance_layers": [1], "skip_layer_guidance_stop": 0.6}


@pytest.fixture(scope="module", params=DTYPES)
def either(request: pytest.FixtureRequest, tiny_repo: TinyRepo) -> Parity:
    """In both dtypes. The bfloat16 oracle is `from_pretrained(dtype=torch.bfloat16)`."""
    return Parity(tiny_repo("stable_diffusion_3"), request.param)


@pytest.fixture(scope="module")
def sd3(tiny_repo: TinyRepo) -> Parity:
    return Parity(tiny_repo("stable_diffusion_3"))


@pytest.mark.parametrize("size", [(64, 48), (40, 72)])
@pytest.mark.parametrize("seed", [7, 2**40 + 1])
def test_pictures_are_those_of_diffusers(either: Parity, seed: int, size: tuple[int, int]) -> None:
    for call in (PLAIN, GUIDED):
        either.check(**{**call, "height": size[0], "width": size[1]}, seed=seed, output_types=("latent", "pt"))


def test_guidance_changes_the_picture_and_a_scale_of_one_is_none(either: Parity) -> None:
    plain = either.check(**PLAIN)
    assert differ(either.check(**GUIDED), plain)
    unguided = {name: value for name, value in PLAIN.items() if name != "negative_prompt"}
    assert_same(either.check(**unguided), plain, "a negative prompt without guidance")
    empty = {name: value for name, value in GUIDED.items() if name != "negative_prompt"}
    assert_same(either.check(**empty), either.check(**empty, negative_prompt=""), "without a negative prompt")


def test_guidance_by_skipped_layers_is_that_of_diffusers(either: Parity) -> None:
    guided = either.check(**GUIDED)
    skipping = either.check(**GUIDED, **SKIPPING, num_images_per_prompt=2)
    assert differ(skipping[:1], guided)
    for change in ({"skip_guidance_layers": [0, 2]}, {"skip_layer_guidance_scale": 1.0}):
        assert differ(either.check(**GUIDED, **{**SKIPPING, **change}), skipping[:1]), change
    for change in ({"skip_layer_guidance_start": 0.4}, {"skip_layer_guidance_stop": 0.4}):
        assert differ(either.check(**GUIDED, **{**SKIPPING, **change}), skipping[:1]), change
    assert_same(either.check(**PLAIN, **SKIPPING), either.check(**PLAIN), "without guidance")
    assert_same(either.check(**GUIDED, **{**SKIPPING, "skip_layer_guidance_stop": 0.2}), guided, "no step between")


def test_only_the_steps_between_have_a_forward_of_fewer_layers(sd3: Parity, monkeypatch: pytest.MonkeyPatch) -> None:
    forwards = Forwards(sd3.model, "sd3_denoising", monkeypatch)
    try:
        sd3.whole(**GUIDED, **SKIPPING)
    finally:
        forwards.close()
    assert [len(each) for each in forwards.predictions] == [1, 2, 2, 1, 1]
    assert forwards.count == 7


class OracleWithoutT5:
    """Loads a checkpoint without T5 in diffusers, which has to be told that."""

    @staticmethod
    def from_pretrained(repo: Path, **options: Any) -> Any:
        return DiffusionPipeline.from_pretrained(repo, text_encoder_3=None, tokenizer_3=None, **options)


def test_a_model_without_t5_gives_what_diffusers_gives_and_loads_none(
    tiny_repo: TinyRepo, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parity, "DiffusionPipeline", OracleWithoutT5)
    without = Parity(tiny_repo("stable_diffusion_3", t5=False))
    drawn = without.check(**GUIDED, **SKIPPING)
    assert_same(without.check(**GUIDED, **SKIPPING, prompt_3="a blue cat"), drawn, "a prompt that nobody reads")
    assert differ(without.check(**{**GUIDED, "prompt": "a blue cat"}, **SKIPPING), drawn)
    without.check(**PLAIN, num_images_per_prompt=2)
    assert {name for name, size in without.roles["encoder"].loaded_bytes.items() if size} == {
        "text_encoder", "text_encoder_2",
    }  # fmt: skip
    Parity(without.repo, "bfloat16").check(**GUIDED)


def test_a_scheduler_that_shifts_by_size_does_so_as_in_diffusers(tiny_repo: TinyRepo) -> None:
    dynamic = Parity(tiny_repo("stable_diffusion_3", dynamic_shifting=True))
    drawn = dynamic.check(**GUIDED)
    assert differ(dynamic.check(**GUIDED, mu=2.5), drawn)
    dynamic.check(**{**GUIDED, "height": 96, "width": 104})


def test_several_pictures_of_one_prompt_are_one_batch_of_diffusers(either: Parity) -> None:
    pictures = either.check(**GUIDED, num_images_per_prompt=2)
    assert len(pictures) == 2
    assert differ(pictures[0], pictures[1])
    either.check(**PLAIN, num_images_per_prompt=3)


def test_pil_numpy_and_latent_pictures_are_those_of_diffusers(sd3: Parity) -> None:
    sd3.check(**GUIDED, num_images_per_prompt=2, output_types=("pil", "np", "latent"))


def test_each_text_reaches_its_own_encoder_and_every_parameter_changes_the_picture(sd3: Parity) -> None:
    drawn = sd3.check(**GUIDED)
    changes: list[dict[str, Any]] = [
        {"seed": 8},
        {"prompt": "a blue cat"},
        {"prompt_2": "a blue cat"},
        {"prompt_3": "a blue cat"},
        {"prompt": "a blue cat", "prompt_2": PROMPT, "prompt_3": PROMPT},
        {"negative_prompt": ""},
        {"negative_prompt_2": "blue"},
        {"negative_prompt_3": "blue"},
        {"guidance_scale": 3.0},
        {"clip_skip": 1},
        {"num_inference_steps": 2},
        {"max_sequence_length": 4},
    ]
    for change in changes:
        assert differ(sd3.check(**{**GUIDED, **change}), drawn), change


def test_clip_skip_is_that_of_diffusers(either: Parity) -> None:
    assert_same(either.check(**GUIDED, clip_skip=0), either.check(**GUIDED), "nothing skipped")
    assert differ(either.check(**GUIDED, clip_skip=2), either.check(**GUIDED, clip_skip=1))


def test_given_sigmas_are_used_as_diffusers_uses_them(either: Parity) -> None:
    assert differ(either.check(**GUIDED, **SKIPPING, sigmas=[1.0, 0.8, 0.1]), either.check(**GUIDED, **SKIPPING))


def test_the_first_noise_levels_may_be_equal(sd3: Parity, monkeypatch: pytest.MonkeyPatch) -> None:
    count_from_the_first(sd3.pipeline.scheduler, monkeypatch)
    sd3.check(**GUIDED, sigmas=[0.5, 0.5, 0.2])


def test_given_latents_take_the_place_of_the_noise(either: Parity) -> None:
    noise = torch.randn(1, 5, 16, 12, generator=torch.Generator().manual_seed(1))
    drawn = either.check(**GUIDED, latents=noise)
    assert differ(drawn, either.check(**GUIDED))
    assert_same(either.whole(**GUIDED, latents=noise, seed=1, output_type="pt"), drawn, "another seed")


def test_given_embeddings_take_the_place_of_the_prompts(either: Parity) -> None:
    call = {name: value for name, value in GUIDED.items() if name not in ("prompt", "negative_prompt")}
    encode = either.pipeline.encode_prompt
    names = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
    with torch.no_grad():
        one = dict(zip(names, encode(PROMPT, None, None, negative_prompt="an ugly cat", **SHORT)))
        other = dict(zip(names, encode("a blue cat", None, None, negative_prompt="", **SHORT)))
    both = {name: torch.cat([one[name], other[name]]) for name in names}
    assert_same(either.check(**call, **one), either.check(**GUIDED), "the same prompts")
    assert len(either.check(**call, **both)) == 2
    assert_same(either.check(**PLAIN), either.check(**{**PLAIN, "prompt": None}, **one), "without guidance")
    positive = {name: tensor for name, tensor in both.items() if not name.startswith("negative")}
    assert len(either.check(**call, **positive)) == 2  # guided by the empty prompt
    # Here diffusers fails: it does not repeat embeddings that are given.
    several = either.whole(**call, **one, num_images_per_prompt=2, output_type="pt")
    assert_same(several, either.check(**GUIDED, num_images_per_prompt=2), "two pictures")


def test_a_list_of_prompts_is_as_many_requests(sd3: Parity) -> None:
    call = {**GUIDED, "output_type": "pt"}
    prompts = [PROMPT, "a blue cat"]
    both = sd3.whole(**{**call, "prompt": prompts})
    assert_same(both, torch.cat([sd3.diffusers(**{**call, "prompt": prompt}) for prompt in prompts]), "two prompts")


def test_both_branches_are_one_forward_exact_or_not(sd3: Parity, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = sd3.diffusers(**GUIDED, **SKIPPING, output_type="pt")
    forwards = Forwards(sd3.model, "sd3_denoising", monkeypatch)
    try:
        assert_same(sd3.whole(**GUIDED, **SKIPPING, exact=False, output_type="pt"), expected, "not exact")
    finally:
        forwards.close()
    assert forwards.count == 7


@pytest.mark.slow
def test_processes_that_hand_over_files_give_the_same_pixels(sd3: Parity, tmp_path: Path) -> None:
    call = {**GUIDED, **SKIPPING, "num_images_per_prompt": 2}
    sd3.check_in_processes(tmp_path, call, ("float32", "bfloat16"))


def test_copies_and_noise_do_not_cross_the_wire(sd3: Parity) -> None:
    state = sd3.roles["encoder"].run(triptych.Request(**GUIDED, num_images_per_prompt=4))
    rows = {name: tuple(value.shape) for name, value in state.fields.items() if isinstance(value, torch.Tensor)}
    texts = {"prompt_embeds": (1, 39 + 24, 36), "pooled_prompt_embeds": (1, 24)}
    assert rows == texts | {f"negative_{name}": shape for name, shape in texts.items()}
    state = sd3.roles["denoiser"].run(state)
    assert [name for name, value in state.fields.items() if isinstance(value, torch.Tensor)] == ["latents"]


def test_each_role_loads_its_own_weights_and_the_decoder_half_an_autoencoder(sd3: Parity) -> None:
    loaded = {role: {name: size for name, size in sd3.roles[role].loaded_bytes.items() if size} for role in ROLES}
    assert {role: set(sizes) for role, sizes in loaded.items()} == {
        "encoder": {"text_encoder", "text_encoder_2", "text_encoder_3"},
        "denoiser": {"transformer"},
        "decoder": {"vae"},
    }
    state = sd3.pipeline.vae.state_dict()
    assert loaded["decoder"]["vae"] == sum(tensor.nbytes for key, tensor in state.items() if key.startswith("decoder"))


def test_without_a_size_the_picture_has_the_transformers_own(sd3: Parity) -> None:
    state = sd3.model.admit(triptych.Request(prompt=PROMPT))
    assert (state.fields["height"], state.fields["width"]) == (22 * 4, 22 * 4)


@pytest.mark.parametrize("changes", [{"negative_prompt": "ugly"}, SKIPPING])
def test_what_has_no_effect_without_guidance_is_remarked_on(
    sd3: Parity, changes: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        sd3.model.admit(triptych.Request(**PLAIN, **changes))
    assert f"{next(iter(changes))} has no effect: guidance needs" in caplog.text


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"height": 60}, ParameterError, "height=60: .* multiple of 8 .* 56 or 64"),
        ({"width": 5}, ParameterError, "width=5: .* multiple of 8 .* 8$"),
        ({"width": 216}, ParameterError, "width=216: at most 208 "),
        ({"guidance_scal": 3.0}, UnknownParameterError, "did you mean 'guidance_scale'"),
        ({"ip_adapter_image": None}, UnknownParameterError, "no parameter 'ip_adapter_image'"),
        ({"prompt_3": ["a", "b"]}, ParameterError, "prompt_3=.*a text is accepted"),
        ({"prompt_3": "\ud800"}, ParameterError, "prompt_3=.*valid Unicode text"),
        ({"negative_prompt_3": "\ud800"}, ParameterError, "negative_prompt_3=.*valid Unicode text"),
        ({"max_sequence_length": 513}, UsageError, "cannot be greater than 512"),
        ({"prompt": None}, UsageError, "`prompt` or `prompt_embeds`"),
        ({"prompt": None, "prompt_embeds": torch.zeros(1, 63, 36)}, UsageError, "`pooled_prompt_embeds` also have"),
        ({"clip_skip": 3}, ParameterError, "clip_skip=3: a whole number from 0 to 2 "),
        ({"skip_guidance_layers": [3]}, ParameterError, "skip_guidance_layers=.*layers from 0 to 2 "),
        ({"skip_guidance_layers": 1}, ParameterError, "a list of layers"),
        ({"skip_layer_guidance_stop": "late"}, ParameterError, "skip_layer_guidance_stop='late': a finite number"),
        ({"skip_layer_guidance_scale": []}, ParameterError, r"skip_layer_guidance_scale=\[\]: a finite number"),
        ({"mu": "much"}, ParameterError, "mu='much': a finite number"),
        (
            {"prompt": None, "prompt_embeds": "x", "negative_prompt_embeds": "z"},
            ParameterError,
            "prompt_embeds='x': a tensor",
        ),
        ({"latents": torch.zeros(1, 5, 12, 16)}, ParameterError, r"latents='of shape .*\(1, 5, 16, 12\)"),
    ],
)
def test_what_cannot_be_done_is_refused_with_a_reason(
    sd3: Parity, changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    server = triptych.load(sd3.repo, role="server", device="cpu")
    with pytest.raises(error, match=message):
        server.admit(triptych.Request(**{**PLAIN, **changes}))


def test_what_diffusers_cannot_compare_is_refused_as_the_callers_fault(sd3: Parity) -> None:
    embeds = {"prompt_embeds": "x", "pooled_prompt_embeds": "x"}
    negative = {f"negative_{name}": value for name, value in embeds.items()}
    parameters = {**PLAIN, "prompt": None, **embeds, **negative}
    with pytest.raises(UsageError, match="has no attribute 'shape'"):
        check_inputs(sd3.pipeline, parameters)


def test_a_bfloat16_repository_runs_in_float32_and_by_default_in_bfloat16(tiny_repo: TinyRepo) -> None:
    repo = tiny_repo("stable_diffusion_3", dtype="bfloat16")
    assert Parity(repo, "float32").check(**GUIDED).dtype == torch.float32
    Parity(repo, "bfloat16", load_dtype="auto").check(**GUIDED)
