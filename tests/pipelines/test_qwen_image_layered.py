"""Qwen-Image-Layered gives what diffusers gives, whole and split, and refuses what it cannot do."""

import gc
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus, pipeline_qwenimage_layered
from PIL import Image
from transformers import Qwen2VLProcessor
from transformers.utils import is_torchvision_available

import triptych
from triptych.errors import ParameterError, UsageError

from .parity import DTYPES, PIXEL_TOLERANCE, ROLES, Forwards, Parity, assert_same, differ

TinyRepo = Callable[..., Path]

PROMPT = "a red fox"
NEGATIVE = "blurred, ugly colours"
CALL: dict[str, Any] = {"prompt": PROMPT, "layers": 2, "num_inference_steps": 3}
GUIDED: dict[str, Any] = {**CALL, "negative_prompt": NEGATIVE, "true_cfg_scale": 4.0}
SMALLER = 36  # times less area than the oracle scales pictures to


def picture(shade: int, width: int = 80, height: int = 64, mode: str = "RGBA") -> Image.Image:
    """A picture: three gradients, the last of them of transparency, and one channel that is `shade` everywhere."""
    down = Image.linear_gradient("L").resize((width, height))
    right = Image.linear_gradient("L").rotate(90).resize((width, height))
    return Image.merge("RGBA", (down, right, Image.new("L", (width, height), shade), right)).convert(mode)


@pytest.fixture(scope="module", autouse=True)
def processor_without_videos() -> Iterator[None]:
    """Without torchvision, transformers makes no `Qwen2VLProcessor`, for want of the part for videos: leave it out."""
    with pytest.MonkeyPatch.context() as patch:
        if not is_torchvision_available():
            patch.setattr(Qwen2VLProcessor, "get_attributes", classmethod(lambda _: ["image_processor", "tokenizer"]))
        yield


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let pictures be scaled to a fraction of the area, for diffusers and for us: decoding large layers takes long."""
    for module in (pipeline_qwenimage_layered, pipeline_qwenimage_edit_plus):
        scale = module.calculate_dimensions
        monkeypatch.setattr(
            module, "calculate_dimensions", lambda area, ratio, scale=scale: scale(area / SMALLER, ratio)
        )


@pytest.fixture(scope="module", params=DTYPES)
def either(request: pytest.FixtureRequest, tiny_repo: TinyRepo) -> Parity:
    """In both dtypes. The bfloat16 oracle is `from_pretrained(dtype=torch.bfloat16)`."""
    return Parity(tiny_repo("qwen_image_layered"), request.param)


@pytest.fixture(scope="module")
def layered(tiny_repo: TinyRepo) -> Parity:
    return Parity(tiny_repo("qwen_image_layered"))


@pytest.mark.parametrize("size", [(80, 64), (50, 170)])
@pytest.mark.parametrize("seed", [7, 2**40 + 1])
@pytest.mark.usefixtures("small")
def test_guided_layers_are_those_of_diffusers(either: Parity, seed: int, size: tuple[int, int]) -> None:
    (layers,) = either.check(**GUIDED, image=picture(30, *size), seed=seed)
    assert layers.shape[:2] == (2, 4)
    assert differ(layers[0], layers[1])


@pytest.mark.slow
def test_a_picture_of_the_true_size_is_taken_apart_as_diffusers_does(layered: Parity) -> None:
    call = {**CALL, "layers": 1, "num_inference_steps": 2, "image": picture(30), "output_type": "pt"}
    (layers,) = layered.diffusers(**call)
    assert_same(layered.split(**call), [layers], "split")
    assert layers.shape == (1, 4, 576, 704)


@pytest.mark.parametrize("prompt", [None, "", " "])
@pytest.mark.usefixtures("small")
def test_without_a_prompt_the_layers_are_those_of_diffusers_own_caption(either: Parity, prompt: str | None) -> None:
    captioned = either.check(**{**GUIDED, "prompt": prompt}, image=picture(30))
    caption = either.pipeline.get_image_caption(scaled(picture(30)), device="cpu", use_en_prompt=False)
    assert caption
    assert_same(either.check(**{**GUIDED, "prompt": caption}, image=picture(30)), captioned, "with that caption")
    request = triptych.Request(**{**GUIDED, "prompt": prompt}, image=picture(30), seed=7, output_type="pt")
    result = either.model.run(request).result
    assert result.parameters["prompt"] == caption
    assert (result.parameters["height"], result.parameters["width"]) == result.images[0].shape[2:]


def scaled(image: Image.Image) -> Image.Image:
    width, height = pipeline_qwenimage_layered.calculate_dimensions(640 * 640, image.width / image.height)
    return image.resize((width, height), Image.Resampling.LANCZOS)


@pytest.mark.slow
@pytest.mark.usefixtures("small")
def test_a_caption_is_written_in_english_where_that_is_asked_for(layered: Parity) -> None:
    call = {**CALL, "prompt": "", "image": picture(30)}
    assert differ(layered.check(**call, use_en_prompt=True)[0], layered.check(**call)[0])


@pytest.mark.usefixtures("small")
def test_layers_without_guidance_and_with_its_norm_kept_are_those_of_diffusers(either: Parity) -> None:
    image = picture(30)
    (plain,) = either.check(**CALL, image=image)
    unguided = either.check(**{**GUIDED, "true_cfg_scale": 1.0}, image=image)
    assert_same(unguided, [plain], "a negative prompt without guidance")
    (guided,) = either.check(**GUIDED, image=image)
    (kept,) = either.check(**GUIDED, image=image, cfg_normalize=True)
    assert differ(guided, plain) and differ(kept, plain) and differ(kept, guided)


@pytest.mark.usefixtures("small")
def test_several_outputs_are_one_batch_of_diffusers_each_with_its_own_layers(either: Parity) -> None:
    call = {**GUIDED, "image": picture(30), "num_images_per_prompt": 2}
    expected = either.diffusers(**call, output_type="pt")
    assert [len(group) for group in expected] == [3, 1]  # cut wrongly: 2 outputs have 2 layers each
    outputs = either.whole(**call, output_type="pt")
    assert_same(torch.cat(outputs), torch.cat(expected), "whole")
    assert_same(torch.cat(either.split(**call, output_type="pt")), torch.cat(expected), "split")
    assert [len(layers) for layers in outputs] == [2, 2]
    assert differ(*outputs)


@pytest.mark.usefixtures("small")
def test_latents_are_those_after_the_last_step_of_diffusers_which_cannot_return_them(either: Parity) -> None:
    call = {**GUIDED, "image": picture(30), "num_images_per_prompt": 2}
    steps: list[torch.Tensor] = []

    def record(_: Any, __: int, ___: Any, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        steps.append(tensors["latents"])
        return {}

    with pytest.raises(UnboundLocalError):
        either.diffusers(**call, output_type="latent", callback_on_step_end=record)
    assert_same(either.whole(**call, output_type="latent"), steps[-1], "whole")
    assert_same(either.split(**call, output_type="latent"), steps[-1], "split")


@pytest.mark.usefixtures("small")
def test_each_of_several_outputs_is_that_of_its_own_draw(layered: Parity) -> None:
    call = {**GUIDED, "image": picture(30), "output_type": "pt"}
    outputs = layered.whole(**call, num_images_per_prompt=2)
    generator = torch.Generator("cpu").manual_seed(7)
    for output in outputs:
        (alone,) = layered.pipeline(generator=generator, **call).images
        torch.testing.assert_close(output, alone, rtol=0, atol=PIXEL_TOLERANCE)


@pytest.mark.usefixtures("small")
def test_pil_and_numpy_layers_are_those_of_diffusers(layered: Parity) -> None:
    ((bottom, top),) = layered.check(**GUIDED, image=picture(30), output_types=("np", "pil"))
    assert bottom.mode == top.mode == "RGBA"


@pytest.mark.usefixtures("small")
def test_each_of_picture_seed_prompts_guidance_and_steps_changes_the_layers(layered: Parity) -> None:
    call = {**GUIDED, "image": picture(30), "output_type": "pt"}
    (layers,) = layered.whole(**call)
    changes: list[dict[str, Any]] = [
        {"image": picture(200)},
        {"seed": 8},
        {"prompt": "a blue cat"},
        {"negative_prompt": ""},
        {"true_cfg_scale": 2.0},
        {"num_inference_steps": 2},
        {"layers": 3},
        {"resolution": 1024},
        {"max_sequence_length": 2},
    ]
    for change in changes:
        assert differ(layered.whole(**{**call, **change})[0], layers), change


@pytest.mark.usefixtures("small")
def test_given_sigmas_latents_and_embeddings_are_used_as_diffusers_uses_them(either: Parity) -> None:
    call = {**GUIDED, "image": picture(30)}
    (layers,) = either.check(**call)
    assert differ(either.check(**call, sigmas=[1.0, 0.8, 0.1])[0], layers)
    tokens = either.whole(**call, output_type="latent").shape[1]
    noise = torch.randn(1, tokens, 24, generator=torch.Generator().manual_seed(1))
    assert differ(either.check(**call, latents=noise)[0], layers)
    names = ("prompt_embeds", "negative_prompt_embeds")
    state = either.roles["encoder"].run(triptych.Request(**call))
    given = {name: state.fields[name] for name in names}
    call = {name: value for name, value in call.items() if name not in ("prompt", "negative_prompt")}
    assert_same(either.check(**call, **given), [layers], "embeddings of the same prompts")


@pytest.mark.parametrize("outputs", [1, 2])
@pytest.mark.usefixtures("small")
def test_joined_branches_stay_within_the_tolerance(
    layered: Parity, outputs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    call = {**GUIDED, "num_inference_steps": 8, "num_images_per_prompt": outputs, "image": picture(30)}
    forwards = Forwards(layered.model, "qwen_layered_denoising", monkeypatch)
    try:
        exact = torch.cat(layered.whole(output_type="pt", **call))
        count, expected = forwards.take()
        joined = torch.cat(layered.whole(output_type="pt", exact=False, **call))
        joined_count, actual = forwards.take()
    finally:
        forwards.close()
    assert (count, joined_count) == (16, 8)
    for one, other in zip(actual, expected, strict=True):
        assert (one - other).abs().max() <= 2e-5 * other.abs().max()
    assert (joined - exact).abs().max() <= PIXEL_TOLERANCE


@pytest.mark.usefixtures("small")
def test_a_picture_without_transparency_is_taken_as_opaque(layered: Parity) -> None:
    call = {**CALL, "output_type": "pt"}
    for mode in ("RGB", "L"):
        image = picture(30, mode=mode)
        assert_same(layered.whole(**call, image=image), layered.diffusers(**call, image=image.convert("RGBA")), mode)


@pytest.mark.usefixtures("small")
def test_a_sampled_caption_depends_on_the_seed_alone(tiny_repo: TinyRepo) -> None:
    model = triptych.load(tiny_repo("qwen_image_layered"), device="cpu")
    model.components["text_encoder"].generation_config.do_sample = True
    request = {**CALL, "prompt": "", "image": picture(30), "output_type": "latent"}
    before = torch.get_rng_state()
    captions = [model.run(triptych.Request(**request, seed=seed)).result.parameters["prompt"] for seed in (7, 8, 7)]
    assert captions[0] == captions[2] != captions[1]
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.usefixtures("small")
def test_copies_pictures_and_noise_do_not_cross_the_wire(layered: Parity) -> None:
    request = triptych.Request(**GUIDED, image=picture(30), num_images_per_prompt=4)
    state = triptych.State.from_bytes(bytes(layered.roles["encoder"].run(request).to_bytes()))
    tensors = {name: value for name, value in state.fields.items() if isinstance(value, torch.Tensor)}
    assert tensors.keys() == {"prompt_embeds", "negative_prompt_embeds", "image_latents"}
    assert {len(tensor) for tensor in tensors.values()} == {1}
    assert "image" not in state.fields
    state = layered.roles["denoiser"].run(state)
    assert [name for name, value in state.fields.items() if isinstance(value, torch.Tensor)] == ["latents"]


def test_only_a_role_that_writes_captions_loads_the_vision_tower_and_the_head(layered: Parity) -> None:
    text = layered.pipeline.components["text_encoder"].state_dict()
    reading = triptych.load(layered.repo, role="encoder", device="cpu", tasks="image-to-layers")
    expected = sum(t.nbytes for key, t in text.items() if ".visual." not in key and "lm_head" not in key)
    assert reading.loaded_bytes["text_encoder"] == expected
    assert "processor" not in reading.components
    assert layered.roles["encoder"].loaded_bytes["text_encoder"] == sum(t.nbytes for t in text.values())
    with pytest.raises(UsageError, match="image-to-layers-captioned"):
        reading.run(triptych.Request(**{**CALL, "prompt": ""}, image=picture(30)))


def test_no_role_loads_what_another_one_runs(layered: Parity) -> None:
    loaded = {role: model.loaded_bytes for role, model in layered.roles.items()}
    held = {role: {name for name, size in sizes.items() if size} for role, sizes in loaded.items()}
    assert held == {"encoder": {"text_encoder", "vae"}, "denoiser": {"transformer"}, "decoder": {"vae"}}
    assert "transformer" not in layered.roles["encoder"].components
    stages = {role: [stage.name for stage in layered.roles[role].stages] for role in ROLES}
    assert stages == {
        "encoder": ["captioning", "text_encoding", "image_encoding"],
        "denoiser": ["qwen_layered_denoising"],
        "decoder": ["decoding"],
    }


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"image": None}, ParameterError, "image=None: give a picture"),
        ({"image": [picture(30), picture(200)]}, ParameterError, "one picture is taken apart"),
        ({"image": picture(30, 5000, 1)}, ParameterError, "too narrow"),
        ({"layers": 0}, ParameterError, "layers=0: a whole number of at least 1"),
        ({"layers": True}, ParameterError, "layers=True: a whole number"),
        ({"layers": "2"}, ParameterError, "layers='2': a whole number"),
        ({"resolution": 512}, ParameterError, "resolution=512: 640 or 1024"),
        ({"cfg_normalize": "yes"}, ParameterError, "cfg_normalize='yes': True or False"),
        ({"use_en_prompt": 1}, ParameterError, "use_en_prompt=1: True or False"),
        ({"prompt": None, "prompt_embeds": torch.zeros(2, 3, 24)}, ParameterError, "one prompt at a time"),
        ({"max_sequence_length": 1025}, UsageError, "cannot be greater than 1024"),
        ({"height": 640}, UsageError, "no parameter 'height'"),
        ({"prompt": None, "prompt_embeds": "text"}, ParameterError, "prompt_embeds='text': a tensor"),
        ({"latents": torch.zeros(1, 5, 24)}, ParameterError, "latents='of shape"),
    ],
)
def test_what_cannot_be_done_is_refused_with_a_reason(
    layered: Parity, changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    server = triptych.load(layered.repo, role="server", device="cpu")
    with pytest.raises(error, match=message):
        server.admit(triptych.Request(**{**CALL, "image": picture(30), **changes}))


def test_the_transformer_keeps_the_positions_of_a_limited_number_of_sizes(layered: Parity) -> None:
    embedder = layered.model.components["transformer"].pos_embed
    device = torch.device("cpu")
    first = [
        weakref.ref(embedder._compute_video_freqs(1, 2, 2, 0, device)),
        weakref.ref(embedder._compute_condition_freqs(1, 2, 2, device)),
    ]
    assert all(each() is not None for each in first)
    for width in range(3, 40):
        embedder([[(1, 2, width), (1, 2, width)]], max_txt_seq_len=4, device=device)
    gc.collect()
    assert [each() for each in first] == [None, None]


@pytest.mark.usefixtures("small")
def test_a_bfloat16_repository_runs_in_float32_and_by_default_in_bfloat16(tiny_repo: TinyRepo) -> None:
    repo = tiny_repo("qwen_image_layered", dtype="bfloat16")
    call = {**GUIDED, "image": picture(30)}
    (layers,) = Parity(repo, "float32").check(**call)
    assert layers.dtype == torch.float32
    Parity(repo, "bfloat16", load_dtype="auto").check(**call)


def test_captions_follow_the_checkpoints_own_generation_settings(small: None, tiny_repo: TinyRepo) -> None:
    parity = Parity(tiny_repo("qwen_image_layered", generation={"repetition_penalty": 1.3}))
    parity.check(**{**GUIDED, "prompt": ""}, image=picture(30))


@pytest.mark.slow
def test_processes_that_hand_over_files_give_the_same_layers(layered: Parity, tmp_path: Path) -> None:
    layered.check_in_processes(tmp_path, {**GUIDED, "image": picture(30)}, ("float32", "bfloat16"))
