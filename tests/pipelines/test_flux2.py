"""FLUX.2 gives what diffusers gives, whole and split, drawing and editing, and refuses what it cannot do."""

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import triptych
from triptych.errors import ParameterError, UnknownParameterError, UsageError
from triptych.stages.denoising import Denoising

from .parity import DTYPES, FORWARD_TOLERANCE, ROLES, Parity, assert_same, differ, start

PROMPT = "a red fox"
# The system message takes 27 tokens of the tiny tokenizer: room is left for the prompt.
SHORT: dict[str, Any] = {"max_sequence_length": 80}
# In 4 steps a timestep comes that bfloat16 and float32 scale to different numbers.
CALL: dict[str, Any] = {
    "prompt": PROMPT, "height": 64, "width": 48, "num_inference_steps": 4, "guidance_scale": 4.0, **SHORT,
}  # fmt: skip

# The tokenizer folder of published repositories holds a processor, which needs torchvision.
PROCESSOR = """
import pathlib, sys
tests, folder = map(pathlib.Path, sys.argv[1:])
sys.path.insert(0, str(tests))
import operators
import tiny
import torch
from pipelines.parity import Parity
from pipelines.test_flux2 import CALL, picture

torch.set_num_threads(1)
parity = Parity(tiny.build("flux2", folder / "repo", processor=True))
assert type(parity.roles["encoder"].components["tokenizer"]).__name__ == "PixtralProcessor"
torch.save([parity.check(**CALL), parity.check(**CALL, image=picture(30))], folder / "pictures")
"""


def picture(shade: int, width: int = 80, height: int = 64) -> Image.Image:
    """A reference image: two gradients, and one channel that is `shade` everywhere."""
    down = Image.linear_gradient("L").resize((width, height))
    right = Image.linear_gradient("L").rotate(90).resize((width, height))
    return Image.merge("RGB", (down, right, Image.new("L", (width, height), shade)))


@pytest.fixture(scope="module", params=DTYPES)
def either(request: pytest.FixtureRequest, tiny_repo: Callable[..., Path]) -> Parity:
    """In both dtypes. The bfloat16 oracle is `from_pretrained(dtype=torch.bfloat16)`."""
    return Parity(tiny_repo("flux2"), request.param)


@pytest.fixture(scope="module")
def flux(tiny_repo: Callable[..., Path]) -> Parity:
    return Parity(tiny_repo("flux2"))


@pytest.mark.parametrize("size", [(64, 48), (40, 72)])
@pytest.mark.parametrize("seed", [7, 2**40 + 1])
def test_pictures_are_those_of_diffusers(either: Parity, seed: int, size: tuple[int, int]) -> None:
    either.check(**{**CALL, "height": size[0], "width": size[1]}, seed=seed, output_types=("latent", "pt"))


def test_several_pictures_of_one_prompt_are_one_batch_of_diffusers(either: Parity) -> None:
    pictures = either.check(**CALL, num_images_per_prompt=2)
    assert len(pictures) == 2
    assert differ(pictures[0], pictures[1])


def test_pil_numpy_and_latent_pictures_are_those_of_diffusers(flux: Parity) -> None:
    flux.check(**CALL, num_images_per_prompt=2, output_types=("pil", "np", "latent"))


def test_a_picture_edited_after_one_reference_is_that_of_diffusers(either: Parity) -> None:
    edited = either.check(**CALL, image=picture(30))
    assert_same(either.check(**CALL, image=[picture(30)]), edited, "a list of one")
    assert differ(either.check(**CALL, image=picture(200)), edited)
    assert differ(either.check(**CALL), edited)


def test_a_picture_edited_after_several_references_is_that_of_diffusers(either: Parity) -> None:
    references = [picture(30), picture(200, 72, 104), picture(120, 64, 64)]
    edited = either.check(**CALL, image=references, num_images_per_prompt=2, output_types=("latent", "pt"))
    assert differ(either.check(**CALL, image=references[::-1], num_images_per_prompt=2), edited)


@pytest.mark.parametrize("given", [{}, {"height": 40}, {"width": 40}])
def test_an_edited_picture_takes_the_size_it_is_not_given_from_the_first_reference(
    either: Parity, given: dict[str, int]
) -> None:
    call = {name: value for name, value in CALL.items() if name not in ("height", "width")}
    # 85 x 70 is no multiple of 8: the oracle cuts it to 80 x 64.
    edited = either.check(**call, **given, image=[picture(30, 85, 70), picture(200)])
    assert edited.shape[-2:] == (given.get("height", 64), given.get("width", 80))


def test_each_of_seed_prompt_guidance_steps_and_sequence_length_changes_the_picture(flux: Parity) -> None:
    drawn = flux.check(**CALL)
    changes: list[dict[str, Any]] = [
        {"seed": 8},
        {"prompt": "a blue cat"},
        {"guidance_scale": 1.0},
        {"guidance_scale": 0.0},
        {"num_inference_steps": 2},
        {"max_sequence_length": 120},
    ]
    for change in changes:
        assert differ(flux.check(**{**CALL, **change}), drawn), change


def test_the_system_message_stands_before_the_prompt(flux: Parity, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = flux.whole(**CALL, output_type="pt")
    (encoding,) = (stage for stage in flux.model.stages if stage.name == "text_encoding")
    monkeypatch.setattr(encoding.helpers, "system_message", "You are a painter.")
    assert differ(flux.whole(**CALL, output_type="pt"), drawn)


def test_given_sigmas_are_used_as_diffusers_uses_them(either: Parity) -> None:
    assert differ(either.check(**CALL, sigmas=[1.0, 0.8, 0.1]), either.check(**CALL))


def test_given_latents_take_the_place_of_the_noise(either: Parity) -> None:
    noise = torch.randn(1, 20, 8, 6, generator=torch.Generator().manual_seed(1))
    drawn = either.check(**CALL, latents=noise)
    assert differ(drawn, either.check(**CALL))
    assert_same(either.whole(**CALL, latents=noise, seed=1, output_type="pt"), drawn, "another seed")
    either.check(**CALL, latents=noise, image=picture(30))


def test_given_embeddings_take_the_place_of_the_prompt(either: Parity) -> None:
    call = {name: value for name, value in CALL.items() if name != "prompt"}
    embeds, _ = either.pipeline.encode_prompt([PROMPT, "a blue cat"], **SHORT)
    drawn = either.check(**CALL, num_images_per_prompt=2)
    assert_same(either.check(**call, prompt_embeds=embeds[:1], num_images_per_prompt=2), drawn, "the same prompt")
    both = either.check(**call, prompt_embeds=embeds, num_images_per_prompt=2)
    assert len(both) == 4 and differ(both[0], both[2])


def test_a_list_of_prompts_is_as_many_requests(flux: Parity) -> None:
    call = {**CALL, "output_type": "pt"}
    prompts = [PROMPT, "a blue cat"]
    both = flux.whole(**{**call, "prompt": prompts})
    assert_same(both, torch.cat([flux.diffusers(**{**call, "prompt": prompt}) for prompt in prompts]), "two prompts")


def test_two_requests_can_share_a_forward(flux: Parity, monkeypatch: pytest.MonkeyPatch) -> None:
    (denoising,) = (stage for stage in flux.model.stages if isinstance(stage, Denoising))
    seen: list[tuple[Any, torch.Tensor]] = []
    advance = denoising.advance

    def record(state: Any, i: int, prediction: list[torch.Tensor]) -> None:
        seen.append((denoising.model_inputs(state, i)[0], prediction[0]))
        advance(state, i, prediction)

    monkeypatch.setattr(denoising, "advance", record)
    flux.whole(**CALL, output_type="pt")
    flux.whole(**{**CALL, "prompt": "a blue cat", "guidance_scale": 1.0}, num_images_per_prompt=1, output_type="pt")
    one, other = seen[0], seen[-1]
    with torch.no_grad():
        joined = denoising.predict([one[0], other[0]], exact=False)
    for actual, (_, expected) in zip(joined, (one, other), strict=True):
        assert (actual - expected).abs().max() <= FORWARD_TOLERANCE * expected.abs().max()


@pytest.mark.slow
@pytest.mark.skipif(find_spec("torchvision") is None, reason="a Pixtral processor needs torchvision")
def test_a_published_processor_gives_the_same_pixels_as_its_tokenizer_alone(flux: Parity, tmp_path: Path) -> None:
    process = start([PROCESSOR, str(Path(__file__).parents[1]), str(tmp_path)])
    _, errors = process.communicate(timeout=240)
    assert process.returncode == 0, errors[-3000:]
    drawn, edited = torch.load(tmp_path / "pictures")
    assert_same(drawn, flux.diffusers(**CALL, output_type="pt"), "drawn")
    assert_same(edited, flux.diffusers(**CALL, image=picture(30), output_type="pt"), "edited")


@pytest.mark.slow
def test_processes_that_hand_over_files_give_the_same_pixels(flux: Parity, tmp_path: Path) -> None:
    call = {**CALL, "image": [picture(30), picture(200)], "num_images_per_prompt": 2}
    flux.check_in_processes(tmp_path, call, ("float32", "bfloat16"))


def test_copies_and_noise_do_not_cross_the_wire(flux: Parity) -> None:
    state = flux.roles["encoder"].run(triptych.Request(**CALL, image=picture(30), num_images_per_prompt=4))
    tensors = {name: value for name, value in state.fields.items() if isinstance(value, torch.Tensor)}
    assert tensors.keys() == {"prompt_embeds", "image_latents", "image_latent_ids"}
    assert {len(tensor) for tensor in tensors.values()} == {1}
    state = flux.roles["denoiser"].run(state)
    assert [name for name, value in state.fields.items() if isinstance(value, torch.Tensor)] == ["latents"]


def test_the_encoder_loads_thirty_layers_no_vision_tower_no_head_and_half_an_autoencoder(flux: Parity) -> None:
    loaded = {role: {name: size for name, size in flux.roles[role].loaded_bytes.items() if size} for role in ROLES}
    assert {role: set(sizes) for role, sizes in loaded.items()} == {
        "encoder": {"text_encoder", "vae"}, "denoiser": {"transformer"}, "decoder": {"vae"},
    }  # fmt: skip
    text = flux.pipeline.text_encoder.model.language_model
    layers = sum(tensor.nbytes for layer in text.layers[:30] for tensor in layer.state_dict().values())
    assert len(text.layers) == 33
    assert loaded["encoder"]["text_encoder"] == layers + text.embed_tokens.weight.nbytes
    half = {
        half: sum(t.nbytes for key, t in flux.pipeline.vae.state_dict().items() if key.startswith(prefixes))
        for half, prefixes in (("encoder", ("encoder", "quant_", "bn")), ("decoder", ("decoder", "post_quant_", "bn")))
    }
    assert {role: loaded[role]["vae"] for role in half} == half
    drawing = triptych.load(flux.repo, role="encoder", device="cpu", tasks="text-to-image")
    assert drawing.loaded_bytes["vae"] == 0 and drawing.is_hollow("vae")


def test_a_model_loaded_for_one_task_refuses_the_other(flux: Parity) -> None:
    drawing = triptych.load(flux.repo, device="cpu", tasks="text-to-image")
    expected = flux.diffusers(**CALL, output_type="pt")
    assert_same(drawing.generate(**CALL, seed=7, output_type="pt").images, expected, "one task")
    with pytest.raises(UsageError, match="'edit', but the model was loaded for text-to-image"):
        drawing.generate(**CALL, image=picture(30))


def test_without_a_size_the_picture_has_128_latents_a_side(flux: Parity) -> None:
    state = flux.model.admit(triptych.Request(prompt=PROMPT))
    assert (state.fields["height"], state.fields["width"]) == (128 * 4, 128 * 4)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"height": 60}, ParameterError, "height=60: .* multiple of 8 .* 56 or 64"),
        ({"width": 5}, ParameterError, "width=5: .* multiple of 8 .* 8$"),
        ({"negative_prompt": "ugly"}, UnknownParameterError, "no parameter 'negative_prompt'"),
        ({"caption_upsample_temperature": 0.2}, UnknownParameterError, "no parameter 'caption_upsample_temperature'"),
        ({"text_encoder_out_layers": (1, 2, 3)}, UnknownParameterError, "no parameter 'text_encoder_out_layers'"),
        ({"guidance_scale": "4"}, ParameterError, "guidance_scale='4'"),
        ({"prompt": None}, UsageError, "`prompt` or `prompt_embeds`"),
        ({"prompt_embeds": torch.zeros(1, 2, 36)}, UsageError, "Cannot forward both `prompt`"),
        ({"image": []}, ParameterError, "one or more reference images"),
        ({"image": "fox.png"}, ParameterError, "image='fox.png'"),
        ({"image": picture(30, 63, 64)}, ParameterError, "image="),
        ({"prompt": None, "prompt_embeds": "x"}, ParameterError, "prompt_embeds='x': a tensor"),
        ({"latents": torch.zeros(1, 24, 6, 8)}, ParameterError, r"latents='of shape .*\(1, \d+, 8, 6\)"),
    ],
)
def test_what_cannot_be_done_is_refused_with_a_reason(
    flux: Parity, changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    server = triptych.load(flux.repo, role="server", device="cpu")
    with pytest.raises(error, match=message):
        server.admit(triptych.Request(**{**CALL, **changes}))


def test_a_bfloat16_repository_runs_in_float32_and_by_default_in_bfloat16(tiny_repo: Callable[..., Path]) -> None:
    repo = tiny_repo("flux2", dtype="bfloat16")
    assert Parity(repo, "float32").check(**CALL).dtype == torch.float32
    Parity(repo, "bfloat16", load_dtype="auto").check(**CALL)
