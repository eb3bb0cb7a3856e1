"""Z-Image gives what diffusers gives, whole and split, and refuses what it cannot do."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import triptych
from triptych.errors import ParameterError, UnknownParameterError, UsageError
from triptych.stages.denoising import Denoising

from .parity import DTYPES, FORWARD_TOLERANCE, ROLES, Parity, assert_same, differ

PROMPT = "a red fox"
NEGATIVE = "blurred, ugly colours and background, and so on until the text is longer than the other one"
CALL: dict[str, Any] = {"prompt": PROMPT, "height": 64, "width": 48, "num_inference_steps": 3}
GUIDED: dict[str, Any] = {**CALL, "guidance_scale": 3.0, "negative_prompt": NEGATIVE}
PLAIN: dict[str, Any] = {**CALL, "guidance_scale": 0.0}


@pytest.fixture(scope="module", params=DTYPES)
def either(request: pytest.FixtureRequest, tiny_repo: Callable[..., Path]) -> Parity:
    """In both dtypes. The bfloat16 oracle is `from_pretrained(dtype=torch.bfloat16)`."""
    return Parity(tiny_repo("z_image"), request.param)


@pytest.fixture(scope="module")
def z_image(tiny_repo: Callable[..., Path]) -> Parity:
    return Parity(tiny_repo("z_image"))


@pytest.mark.parametrize("size", [(64, 48), (40, 72)])
@pytest.mark.parametrize("seed", [7, 2**40 + 1])
def test_guided_pictures_are_those_of_diffusers(either: Parity, seed: int, size: tuple[int, int]) -> None:
    either.check(**{**GUIDED, "height": size[0], "width": size[1]}, seed=seed, output_types=("latent", "pt"))


@pytest.mark.parametrize("seed", [7, 2**40 + 1])
def test_pictures_without_guidance_are_those_of_diffusers(either: Parity, seed: int) -> None:
    plain = either.check(**PLAIN, seed=seed)
    assert_same(either.check(**{**GUIDED, "guidance_scale": -1.0}, seed=seed), plain, "a scale below zero")
    assert differ(either.check(**GUIDED, seed=seed), plain)


def test_a_scale_of_one_is_guidance_and_its_negative_prompt_is_empty_by_default(either: Parity) -> None:
    guided = either.check(**CALL, guidance_scale=1.0)
    assert differ(either.check(**PLAIN), guided)
    assert_same(either.check(**CALL, guidance_scale=1.0, negative_prompt=""), guided, "an empty negative prompt")
    assert differ(either.check(**CALL, guidance_scale=1.0, negative_prompt=NEGATIVE), guided)


def test_several_pictures_of_one_prompt_are_one_batch_of_diffusers(either: Parity) -> None:
    pictures = either.check(**GUIDED, num_images_per_prompt=2)
    assert len(pictures) == 2
    assert differ(pictures[0], pictures[1])
    either.check(**PLAIN, num_images_per_prompt=3)


def test_pil_numpy_and_latent_pictures_are_those_of_diffusers(z_image: Parity) -> None:
    z_image.check(**GUIDED, num_images_per_prompt=2, output_types=("pil", "np", "latent"))


def test_guidance_is_truncated_and_normalised_as_diffusers_does_it(either: Parity) -> None:
    drawn = either.check(**GUIDED, num_images_per_prompt=2)
    changes: list[dict[str, Any]] = [
        {"cfg_truncation": 0.2},
        {"cfg_truncation": 0.0},
        {"cfg_normalization": True},
        {"cfg_normalization": 0.7},
        {"cfg_normalization": 0.9, "cfg_truncation": 0.2},
    ]
    for change in changes:
        assert differ(either.check(**GUIDED, num_images_per_prompt=2, **change), drawn), change
    assert_same(either.check(**GUIDED, num_images_per_prompt=2, cfg_truncation=3.0), drawn, "a truncation beyond 1")


def test_each_of_seed_prompt_negative_prompt_scale_and_steps_changes_the_picture(z_image: Parity) -> None:
    drawn = z_image.check(**GUIDED)
    changes: list[dict[str, Any]] = [
        {"seed": 8},
        {"prompt": "a blue cat"},
        {"negative_prompt": ""},
        {"guidance_scale": 2.0},
        {"num_inference_steps": 2},
        {"max_sequence_length": 12},
    ]
    for change in changes:
        assert differ(z_image.check(**{**GUIDED, **change}), drawn), change


def test_given_sigmas_are_used_as_diffusers_uses_them(either: Parity) -> None:
    assert differ(either.check(**GUIDED, sigmas=[1.0, 0.8, 0.1]), either.check(**GUIDED))


def test_given_latents_take_the_place_of_the_noise(either: Parity) -> None:
    noise = torch.randn(1, 6, 16, 12, generator=torch.Generator().manual_seed(1))
    drawn = either.check(**GUIDED, latents=noise)
    assert differ(drawn, either.check(**GUIDED))
    assert_same(either.whole(**GUIDED, latents=noise, seed=1, output_type="pt"), drawn, "another seed")


def test_given_embeddings_take_the_place_of_the_prompts(either: Parity) -> None:
    call = {name: value for name, value in GUIDED.items() if name not in ("prompt", "negative_prompt")}
    prompts = [PROMPT, f"{PROMPT} and the background"]
    with torch.no_grad():
        embeds, negative = either.pipeline.encode_prompt(list(prompts), negative_prompt=[NEGATIVE, ""])
    assert len({len(each) for each in (*embeds, *negative)}) == 4
    drawn = either.check(**GUIDED, num_images_per_prompt=2)
    one = {"prompt_embeds": embeds[:1], "negative_prompt_embeds": negative[:1]}
    assert_same(either.check(**call, **one, num_images_per_prompt=2), drawn, "the same prompts")
    # Beside a prompt they take its place, and that of the negative prompt.
    assert_same(either.check(**{**GUIDED, "prompt": "else"}, **one, num_images_per_prompt=2), drawn, "beside a prompt")
    both = either.check(**call, prompt_embeds=embeds, negative_prompt_embeds=negative, num_images_per_prompt=2)
    assert len(both) == 4
    either.check(**{**call, "guidance_scale": 0.0}, prompt_embeds=embeds)


def test_a_list_of_prompts_is_as_many_requests_and_stays_as_it_is(z_image: Parity) -> None:
    call = {**GUIDED, "output_type": "pt"}
    prompts = [PROMPT, "a blue cat"]
    both = z_image.whole(**{**call, "prompt": prompts})
    assert prompts == [PROMPT, "a blue cat"]
    assert_same(both, torch.cat([z_image.diffusers(**{**call, "prompt": prompt}) for prompt in prompts]), "two prompts")


@pytest.mark.parametrize("changes", [{}, {"num_images_per_prompt": 2}])
def test_the_branches_share_a_forward_exact_or_not(
    z_image: Parity, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows: list[int] = []
    forward = z_image.model.components["transformer"].register_forward_hook(
        lambda _, inputs, output: rows.append(len(output[0]))
    )
    exact = z_image.whole(**GUIDED, **changes, output_type="pt")
    joined = z_image.whole(**GUIDED, **changes, output_type="pt", exact=False)
    forward.remove()
    assert rows == [2 * len(exact)] * 2 * GUIDED["num_inference_steps"]
    assert_same(joined, exact, "not exact")


def test_two_requests_can_share_a_forward(z_image: Parity, monkeypatch: pytest.MonkeyPatch) -> None:
    (denoising,) = (stage for stage in z_image.model.stages if isinstance(stage, Denoising))
    seen: list[tuple[Any, torch.Tensor]] = []
    advance = denoising.advance

    def record(state: Any, i: int, prediction: list[torch.Tensor]) -> None:
        seen.append((denoising.model_inputs(state, i)[0], prediction[0]))
        advance(state, i, prediction)

    monkeypatch.setattr(denoising, "advance", record)
    z_image.whole(**GUIDED, output_type="pt")
    z_image.whole(**{**GUIDED, "prompt": NEGATIVE, "negative_prompt": ""}, output_type="pt")
    z_image.whole(**{**GUIDED, "height": 40}, output_type="pt")
    one, other, smaller = seen[0], seen[4], seen[-1]
    with torch.no_grad():
        joined = denoising.predict([one[0], other[0]], exact=False)
        apart = denoising.predict([one[0], smaller[0]], exact=False)
    for actual, (_, expected) in zip(joined, (one, other), strict=True):
        assert (actual - expected).abs().max() <= FORWARD_TOLERANCE * expected.abs().max()
    assert_same(apart, [one[1], smaller[1]], "pictures of two sizes")


@pytest.mark.slow
def test_processes_that_hand_over_files_give_the_same_pixels(z_image: Parity, tmp_path: Path) -> None:
    z_image.check_in_processes(tmp_path, {**GUIDED, "num_images_per_prompt": 2}, ("float32", "bfloat16"))


def test_copies_and_noise_do_not_cross_the_wire(z_image: Parity) -> None:
    state = z_image.roles["encoder"].run(triptych.Request(**GUIDED, num_images_per_prompt=4))
    texts = {name: value for name, value in state.fields.items() if isinstance(value, list)}
    assert {name: len(value) for name, value in texts.items()} == {"prompt_embeds": 1, "negative_prompt_embeds": 1}
    assert not [name for name, value in state.fields.items() if isinstance(value, torch.Tensor)]
    state = z_image.roles["denoiser"].run(state)
    assert [name for name, value in state.fields.items() if isinstance(value, torch.Tensor)] == ["latents"]
    unguided = z_image.roles["encoder"].run(triptych.Request(**PLAIN))
    assert unguided.fields["negative_prompt_embeds"] == []


def test_the_encoder_loads_neither_the_last_layer_nor_the_norm_and_the_decoder_half_an_autoencoder(
    z_image: Parity,
) -> None:
    loaded = {role: {name: size for name, size in z_image.roles[role].loaded_bytes.items() if size} for role in ROLES}
    text = z_image.pipeline.text_encoder
    layers = sum(tensor.nbytes for layer in text.layers[:3] for tensor in layer.state_dict().values())
    assert len(text.layers) == 4
    whole = sum(tensor.nbytes for tensor in z_image.pipeline.transformer.state_dict().values())
    state = z_image.pipeline.vae.state_dict()
    half = sum(tensor.nbytes for key, tensor in state.items() if key.startswith(("decoder", "post_quant_")))
    assert loaded == {
        "encoder": {"text_encoder": layers + text.embed_tokens.weight.nbytes},
        "denoiser": {"transformer": whole},
        "decoder": {"vae": half},
    }


def test_without_a_size_the_picture_has_1024_pixels_a_side(z_image: Parity) -> None:
    state = z_image.model.admit(triptych.Request(prompt=PROMPT))
    assert (state.fields["height"], state.fields["width"]) == (1024, 1024)


def test_a_negative_prompt_without_guidance_is_remarked_on(z_image: Parity, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        z_image.model.admit(triptych.Request(**PLAIN, negative_prompt=NEGATIVE))
    assert "guidance needs guidance_scale > 0" in caplog.text


def test_pictures_of_the_largest_size_and_texts_of_the_greatest_length_are_those_of_diffusers(z_image: Parity) -> None:
    call = {**PLAIN, "num_inference_steps": 1}
    assert z_image.check(**{**call, "height": 1040, "width": 16}).shape[-2:] == (1040, 16)
    assert z_image.check(**{**call, "height": 16, "width": 1088}).shape[-2:] == (16, 1088)
    embeds = torch.randn(128, 20, generator=torch.Generator().manual_seed(1))
    z_image.check(**{**call, "prompt": None}, prompt_embeds=[embeds])
    with pytest.raises(IndexError):
        z_image.diffusers(**{**call, "height": 1048, "width": 16})
    with pytest.raises(IndexError):
        z_image.diffusers(**{**call, "prompt": None}, prompt_embeds=[torch.cat([embeds, embeds[:1]])])


@pytest.mark.parametrize("name", ["prompt", "negative_prompt"])
def test_a_text_of_more_tokens_than_the_transformer_has_positions_for_is_refused(z_image: Parity, name: str) -> None:
    request = triptych.Request(**{**GUIDED, name: "many leaves " * 60})
    with pytest.raises(ParameterError, match=f"^{name}=.*at most 128 tokens are accepted.*these are"):
        z_image.roles["encoder"].run(request)
    shorter = triptych.Request(**{**GUIDED, name: "many leaves " * 60}, max_sequence_length=128)
    assert z_image.roles["encoder"].run(shorter).next_role is not None


TEXT = torch.zeros(3, 20)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"height": 60}, ParameterError, "height=60: .* multiple of 8 .* 56 or 64"),
        ({"width": 5}, ParameterError, "width=5: .* multiple of 8 .* 8$"),
        ({"height": 1048}, ParameterError, "height=1048: at most 1040 is accepted"),
        ({"width": 1096}, ParameterError, "width=1096: at most 1088 is accepted"),
        ({"guidance_scal": 3.0}, UnknownParameterError, "did you mean 'guidance_scale'"),
        ({"joint_attention_kwargs": {}}, UnknownParameterError, "no parameter 'joint_attention_kwargs'"),
        ({"cfg_truncation": "1"}, ParameterError, "cfg_truncation='1'"),
        ({"prompt": None}, UsageError, "`prompt` or `prompt_embeds`"),
        ({"prompt": None, "prompt_embeds": [TEXT]}, UsageError, "needs `negative_prompt_embeds`"),
        ({"prompt_embeds": TEXT}, ParameterError, "a list of tensors"),
        ({"prompt_embeds": [TEXT, TEXT]}, ParameterError, "1 are expected"),
        (
            {"prompt": None, "prompt_embeds": [TEXT, TEXT], "negative_prompt_embeds": [TEXT]},
            ParameterError, "2 are expected",
        ),
        ({"prompt": None, "prompt_embeds": [], "guidance_scale": 0.0}, ParameterError, "give one or more tensors"),
        ({"prompt_embeds": [None]}, ParameterError, r"prompt_embeds=\[None\]: a list of tensors"),
        ({"prompt_embeds": ["a"]}, ParameterError, r"prompt_embeds\[0\]='a': .* of shape \(any, any\)"),
        ({"prompt_embeds": [TEXT[0]]}, ParameterError, r"prompt_embeds\[0\]='of shape \(20,\)"),
        ({"prompt_embeds": [torch.zeros(129, 20)]}, ParameterError, "at most 128 tokens .* these are 129"),
        ({"negative_prompt_embeds": [torch.zeros(129, 20)]}, ParameterError, "at most 128 tokens .* these are 129"),
        ({"latents": torch.zeros(1, 6, 16, 16)}, ParameterError, "latents='of shape"),
        ({"latents": torch.zeros(1, 6, 16, 12), "num_images_per_prompt": 2}, ParameterError, "latents='of shape"),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_refused_with_a_reason(
    z_image: Parity, changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    server = triptych.load(z_image.repo, role="server", device="cpu")
    with pytest.raises(error, match=message):
        server.admit(triptych.Request(**{**CALL, **changes}))


def test_a_bfloat16_repository_runs_in_float32_and_by_default_in_bfloat16(tiny_repo: Callable[..., Path]) -> None:
    repo = tiny_repo("z_image", dtype="bfloat16")
    assert Parity(repo, "float32").check(**GUIDED).dtype == torch.float32
    Parity(repo, "bfloat16", load_dtype="auto").check(**GUIDED)
