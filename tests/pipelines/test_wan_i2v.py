"""Wan's image to video gives what diffusers gives, whole and split, and refuses what it cannot do."""

import json
import logging
import shutil
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from PIL import Image

import triptych
from triptych.errors import ModelError, ParameterError, UnknownParameterError, UsageError

from .parity import (
    FORWARD_TOLERANCE,
    PIXEL_TOLERANCE,
    ROLES,
    Forwards,
    Parity,
    assert_joined_within_tolerance,
    assert_same,
    differ,
)
from .tracing import Case, trace

CLIP_VERSIONS = ("2.1", "2.1-flf")
VERSIONS = (*CLIP_VERSIONS, "2.2", "2.2-5b")
TinyRepo = Callable[..., Path]


def picture(shade: int, size: tuple[int, int] = (80, 64)) -> Image.Image:
    """A frame: two gradients, and one channel that is `shade` everywhere."""
    down, right = Image.linear_gradient("L").resize(size), Image.linear_gradient("L").rotate(90).resize(size)
    return Image.merge("RGB", (down, right, Image.new("L", size, shade)))


FIRST, LAST = picture(30), picture(200)


def call_of(version: str, **changes: Any) -> dict[str, Any]:
    """A guided request that a version takes."""
    call: dict[str, Any] = {
        "prompt": "a red fox",
        "negative_prompt": "blurred, ugly colours and background",
        "image": FIRST,
        "height": 32,
        "width": 48,
        "num_frames": 5,
        "num_inference_steps": 2,  # in 2.2, one of each transformer's
        "guidance_scale": 4.0,
        "max_sequence_length": 512 if version in CLIP_VERSIONS else 24,
    }
    if version == "2.1-flf":
        call["last_image"] = LAST
    return {**call, **changes}


class Video(Parity):
    """A version, loaded four ways, and its request."""

    def __init__(self, repo: Path, version: str, dtype: str = "float32", **options: Any) -> None:
        super().__init__(repo, dtype, **options)
        self.version = version
        self.call = call_of(version)

    def of(self, **changes: Any) -> Any:
        """Prove that all agree on the version's request with these changes; returns the video."""
        return self.check(**{**self.call, **changes})

    @cached_property
    def base(self) -> Any:
        """The version's request as it is, on which all agree."""
        return self.of()

    def ours(self, **changes: Any) -> Any:
        """What the whole model gives for the request with these changes."""
        return self.whole(**{**self.call, "output_type": "pt", **changes})


@pytest.fixture(
    scope="module",
    params=[
        *((version, "float32") for version in VERSIONS),
        *(
            pytest.param((version, "bfloat16"), marks=() if version == "2.1" else pytest.mark.slow)
            for version in VERSIONS
        ),
    ],
    ids="-".join,
)
def either(request: pytest.FixtureRequest, tiny_repo: TinyRepo) -> Video:
    """Every version in both dtypes. The bfloat16 oracle is `from_pretrained(dtype=torch.bfloat16)`."""
    version, dtype = request.param
    return Video(tiny_repo("wan_i2v", version=version), version, dtype)


@pytest.fixture(
    scope="module", params=[pytest.param(each, marks=pytest.mark.slow if each == "2.1" else ()) for each in VERSIONS]
)
def video(request: pytest.FixtureRequest, tiny_repo: TinyRepo) -> Video:
    return Video(tiny_repo("wan_i2v", version=request.param), request.param)


@pytest.fixture(scope="module", params=CLIP_VERSIONS)
def clip(request: pytest.FixtureRequest, tiny_repo: TinyRepo) -> Video:
    return Video(tiny_repo("wan_i2v", version=request.param), request.param)


@pytest.fixture(scope="module")
def wan22(tiny_repo: TinyRepo) -> Video:
    return Video(tiny_repo("wan_i2v", version="2.2"), "2.2")


def edited(repo: Path, target: Path, file: str, **changes: object) -> Path:
    """A copy of a repository with other values in one of its JSON files."""
    shutil.copytree(repo, target)
    values = json.loads((target / file).read_text())
    (target / file).write_text(json.dumps({**values, **changes}))
    return target


@pytest.mark.parametrize(
    ("seed", "height", "width", "num_frames", "steps"),
    [(7, 32, 48, 5, 4), (2**40 + 1, 64, 32, 9, 3)],
    ids=["usual", "unusual"],
)
def test_guided_videos_are_those_of_diffusers(
    either: Video, seed: int, height: int, width: int, num_frames: int, steps: int
) -> None:
    size = {"height": height, "width": width, "num_frames": num_frames}
    result = either.of(seed=seed, **size, num_inference_steps=steps)
    assert result.shape == (1, num_frames, 3, height, width)


def test_videos_without_guidance_are_those_of_diffusers(either: Video) -> None:
    plain = either.of(guidance_scale=1.0, negative_prompt=None)
    assert_same(either.ours(guidance_scale=1.0), plain, "a negative prompt without guidance")


@pytest.mark.parametrize("version", ["2.2", "2.2-5b"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_without_clip_several_videos_are_one_batch_of_diffusers(tiny_repo: TinyRepo, version: str, dtype: str) -> None:
    both = Video(tiny_repo("wan_i2v", version=version), version, dtype).of(num_videos_per_prompt=2)
    assert len(both) == 2
    assert differ(both[0], both[1])


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
@pytest.mark.parametrize("version", CLIP_VERSIONS)
def test_with_clip_each_of_several_videos_is_a_single_run_with_its_draw(
    tiny_repo: TinyRepo, version: str, dtype: str
) -> None:
    clip = Video(tiny_repo("wan_i2v", version=version), version, dtype)
    call = {**clip.call, "num_videos_per_prompt": 2, "output_type": "pt"}
    with pytest.raises(RuntimeError, match="Sizes of tensors must match"):
        clip.diffusers(**call)
    both = clip.whole(**call)
    assert_same(clip.split(**call), both, "split")
    generator = torch.Generator().manual_seed(7)
    shape = clip.diffusers(**clip.call, output_type="latent").shape
    for number, one in enumerate(both.split(1)):
        noise = torch.randn(shape, generator=generator)
        assert_same(one, clip.diffusers(**clip.call, latents=noise, output_type="pt"), f"output {number}")
    assert differ(both[0], both[1])


def test_pil_and_numpy_frames_are_those_of_diffusers(wan22: Video) -> None:
    wan22.of(output_types=("pil", "np"))


def test_latents_are_those_of_diffusers(video: Video) -> None:
    video.of(output_types=["latent"])


def test_one_frame_is_a_video_too(video: Video) -> None:
    if video.version == "2.1-flf":
        with pytest.raises(ParameterError, match="num_frames=1: with a first and a last frame, 5 or more"):
            video.model.admit(triptych.Request(**call_of("2.1-flf", num_frames=1)))
    else:
        assert video.of(num_frames=1).shape[1] == 1


def test_each_of_seed_prompt_guidance_steps_and_images_changes_the_video(video: Video) -> None:
    before = video.base
    changes: list[dict[str, Any]] = [
        {"seed": 8},
        {"prompt": "a blue cat"},
        {"negative_prompt": None},
        {"guidance_scale": 2.0},
        {"num_inference_steps": 3},
        {"image": LAST},
        *([{"last_image": FIRST}] if video.version == "2.1-flf" else []),
    ]
    for change in changes:
        assert differ(video.ours(**change), before), change


def test_the_second_scale_guides_the_second_transformer(wan22: Video) -> None:
    one = wan22.base
    assert_same(wan22.ours(guidance_scale_2=4.0), one, "the default is the first scale")
    assert differ(wan22.of(guidance_scale_2=2.0), one)


def test_a_model_without_clip_takes_a_last_frame_too(wan22: Video) -> None:
    assert differ(wan22.of(last_image=LAST), wan22.base)


def test_clip_reaches_the_denoiser(clip: Video, monkeypatch: pytest.MonkeyPatch) -> None:
    # The frames' latents stay as they are: what changes comes through the embeddings alone.
    before = clip.base
    embedding = next(stage for stage in clip.roles["encoder"].stages if stage.name == "image_embedding")
    run = embedding.run

    def swapped(state: Any) -> None:
        run(state)
        state.image_embeds = -state.image_embeds

    monkeypatch.setattr(embedding, "run", swapped)
    assert differ(clip.split(**clip.call, output_type="pt"), before)


def test_clip_is_held_to_its_last_layer_but_one(clip: Video) -> None:
    encoder = clip.roles["encoder"]
    names = {name for name, parameter in encoder.components["image_encoder"].named_parameters()}
    whole = {name for name, parameter in clip.pipeline.image_encoder.named_parameters()}
    left_out = {name.partition("encoder.layers.")[2].partition(".")[0] or name for name in whole - names}
    assert left_out == {"2", "post_layernorm.weight", "post_layernorm.bias"}
    pixels = clip.pipeline.image_processor(images=[FIRST, LAST], return_tensors="pt")
    with torch.no_grad():
        expected = clip.pipeline.image_encoder(**pixels, output_hidden_states=True).hidden_states[-2]
        actual = encoder.components["image_encoder"](**pixels, output_hidden_states=True).hidden_states[-2]
    assert_same(actual, expected, "hidden state")


def test_clip_that_the_transformer_has_no_use_for_is_not_loaded(
    wan22: Video, tiny_repo: TinyRepo, tmp_path: Path
) -> None:
    entries = {
        "image_encoder": ["transformers", "CLIPVisionModel"],
        "image_processor": ["transformers", "CLIPImageProcessor"],
    }
    repo = edited(wan22.repo, tmp_path / "repo", "model_index.json", **entries)
    for name in entries:
        shutil.copytree(tiny_repo("wan_i2v", version="2.1") / name, repo / name)
    parity = Video(repo, "2.2")
    assert_same(parity.of(), wan22.base, "with a CLIP beside it")
    for model in (parity.model, *parity.roles.values()):
        assert not {"image_encoder", "image_processor"} & model.components.keys()


def test_a_transformer_that_wants_clip_and_has_none_is_an_error_of_the_repository(
    tiny_repo: TinyRepo, tmp_path: Path
) -> None:
    source = tiny_repo("wan_i2v", version="2.1")
    repo = edited(source, tmp_path / "repo", "model_index.json", image_encoder=[None, None])
    for role in ("denoiser", "monolithic"):
        with pytest.raises(ModelError, match="no component 'image_encoder', but its transformer takes embeddings"):
            triptych.load(repo, role=role, device="cpu")


def test_roles_load_what_they_use(video: Video) -> None:
    held = {role: {name for name, size in model.loaded_bytes.items() if size} for role, model in video.roles.items()}
    transformers = {"transformer", "transformer_2"} if video.version == "2.2" else {"transformer"}
    clip = {"image_encoder"} if video.version in CLIP_VERSIONS else set()
    assert held == {"encoder": {"text_encoder", "vae"} | clip, "denoiser": transformers, "decoder": {"vae"}}
    halves = [video.roles[role].loaded_bytes["vae"] for role in ("encoder", "decoder")]
    # One frame alone is encoded without the convolutions over time.
    idle = "encoder.down_blocks.0.downsampler.time_conv." if video.version == "2.2-5b" else "none"
    used = [tensor for name, tensor in video.pipeline.vae.named_parameters() if not name.startswith(idle)]
    assert sum(halves) == sum(tensor.nbytes for tensor in used)


TRACED = {"height": 32, "width": 48, "num_frames": 5, "num_inference_steps": 4, "image": FIRST}


@pytest.mark.parametrize("version", VERSIONS)
def test_every_role_uses_every_byte_it_holds(tiny_repo: TinyRepo, version: str) -> None:
    request = {**TRACED, "max_sequence_length": call_of(version)["max_sequence_length"]}
    if version == "2.1-flf":
        request["last_image"] = LAST
    case = Case("wan_i2v", {"version": version}, {"image-to-video": (request,)})
    for each in trace(case, tiny_repo("wan_i2v", version=version)):
        assert (each.role, dict(each.unread), dict(each.unused)) == (each.role, {}, {})


def test_one_copy_crosses_the_wire_and_no_noise(video: Video) -> None:
    state = video.roles["encoder"].run(triptych.Request(**video.call, num_videos_per_prompt=3))
    shapes = {name: tuple(value.shape) for name, value in state.fields.items() if isinstance(value, torch.Tensor)}
    expected = {"prompt_embeds", "negative_prompt_embeds", "image_condition"}
    expected |= {"image_embeds"} if video.version in CLIP_VERSIONS else set()
    expected |= {"first_frame_mask"} if video.version == "2.2-5b" else set()
    assert shapes.keys() == expected
    assert {shape[0] for name, shape in shapes.items() if name != "image_embeds"} == {1}
    if "image_embeds" in shapes:
        assert shapes["image_embeds"][0] == (2 if video.version == "2.1-flf" else 1)
    state = video.roles["denoiser"].run(state)
    assert [name for name, value in state.fields.items() if isinstance(value, torch.Tensor)] == ["latents"]
    assert len(state.fields["latents"]) == 3


def test_the_model_that_encodes_only_its_first_frame_makes_any_odd_number(tiny_repo: TinyRepo) -> None:
    # diffusers' autoencoder decodes in ones, but encodes in fours; the tiny one shrinks time by 2.
    assert Video(tiny_repo("wan_i2v", version="2.2-5b"), "2.2-5b").of(num_frames=7).shape[1] == 7


def test_given_latents_take_the_place_of_the_noise(video: Video) -> None:
    noise = torch.randn(video.ours(output_type="latent").shape, generator=torch.Generator().manual_seed(1))
    assert differ(video.of(latents=noise), video.base)


def test_latents_beside_a_first_frame_of_each_token_are_repeated_as_in_diffusers(tiny_repo: TinyRepo) -> None:
    video = Video(tiny_repo("wan_i2v", version="2.2-5b"), "2.2-5b")
    noise = torch.randn(1, 5, 1, 8, 1, generator=torch.Generator().manual_seed(1))
    assert video.of(latents=noise).shape == video.base.shape


def test_given_embeddings_take_the_place_of_the_prompts(video: Video) -> None:
    with torch.no_grad():
        embeds, negative = video.pipeline.encode_prompt(
            video.call["prompt"],
            video.call["negative_prompt"],
            max_sequence_length=video.call["max_sequence_length"],
        )
    without = {"prompt": None, "negative_prompt": None}
    given = {"prompt_embeds": embeds, "negative_prompt_embeds": negative}
    assert_same(video.ours(**without, **given), video.base, "given")
    # Of several, every model makes one batch, as diffusers does.
    several = {name: torch.cat([value, value.flip(1)]) for name, value in given.items()}
    assert len(video.of(**without, **several)) == 2
    assert len(video.of(prompt=None, prompt_embeds=several["prompt_embeds"])) == 2


def test_an_image_may_be_a_tensor_or_in_a_list_of_its_own(video: Video) -> None:
    assert_same(video.ours(image=[FIRST]), video.base, "list")
    pixels = torch.rand(3, 40, 56, generator=torch.Generator().manual_seed(1))
    changes = {"image": pixels} if video.version != "2.1-flf" else {"image": pixels, "last_image": pixels.flip(1)}
    assert differ(video.of(**changes), video.base)


def test_pictures_of_another_mode_are_taken_for_what_they_show_in_colour(video: Video) -> None:
    seen = FIRST.convert("P").convert("RGB")
    assert_same(video.ours(image=FIRST.convert("RGBA")), video.base, "RGBA")
    assert_same(video.ours(image=FIRST.convert("P")), video.of(image=seen), "P")
    if video.version == "2.1-flf":
        assert_same(video.ours(last_image=LAST.convert("RGBA")), video.base, "last")


def test_components_may_have_dtypes_of_their_own(clip: Video) -> None:
    # As published: CLIP and the autoencoder in float32, the rest in bfloat16.
    dtypes = {"default": torch.bfloat16, "image_encoder": torch.float32, "vae": torch.float32}
    oracle = type(clip.pipeline).from_pretrained(clip.repo, dtype=dtypes)
    oracle.set_progress_bar_config(disable=True)
    expected = oracle(**clip.call, generator=torch.Generator().manual_seed(7), output_type="pt").frames
    model = triptych.load(clip.repo, device="cpu", dtype=dtypes)
    assert_same(model.generate(**clip.call, seed=7, output_type="pt").frames, expected, "as published")


@pytest.mark.parametrize("outputs", [1, 2])
def test_joined_forwards_stay_within_the_tolerance(video: Video, outputs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    call = {**video.call, "num_videos_per_prompt": outputs, "num_inference_steps": 4}
    if video.version == "2.2":
        exact, joined = (video.whole(**call, exact=exact, output_type="pt") for exact in (True, False))
        torch.testing.assert_close(joined, exact, rtol=0, atol=PIXEL_TOLERANCE)
    elif outputs == 1 or video.version == "2.2-5b":
        assert_joined_within_tolerance(video, "i2v_denoising", monkeypatch, call)
    else:
        forwards = Forwards(video.model, "i2v_denoising", monkeypatch)
        exact = video.whole(**call, output_type="pt")
        count, expected = forwards.take()
        joined = video.whole(**call, exact=False, output_type="pt")
        joined_count, actual = forwards.take()
        forwards.close()
        # Exactly, each video has its own forwards; joined, a step is one forward.
        assert (count, joined_count) == (2 * 2 * call["num_inference_steps"], call["num_inference_steps"])
        for one, other in zip(actual, expected, strict=True):
            assert (one - other).abs().max() <= FORWARD_TOLERANCE * other.abs().max()
        torch.testing.assert_close(joined, exact, rtol=0, atol=PIXEL_TOLERANCE)


def test_the_cache_of_steps_is_told_what_diffusers_tells_it(video: Video, monkeypatch: pytest.MonkeyPatch) -> None:
    def contexts(transformer: Any, run: Callable[..., Any], **changes: Any) -> list[tuple[str, dict[str, Any]]]:
        told: list[tuple[str, dict[str, Any]]] = []
        cached = type(transformer).cache_context

        def record(self: Any, name: str, **kwargs: Any) -> Any:
            told.append((name, kwargs))
            return cached(self, name, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(type(transformer), "cache_context", record)
            run(**{**video.call, **changes}, output_type="latent")
        return told

    ours = video.model.components["transformer"]
    assert contexts(ours, video.whole) == contexts(video.pipeline.transformer, video.diffusers)
    if video.version in CLIP_VERSIONS:
        names = [name for name, _ in contexts(ours, video.whole, num_videos_per_prompt=2)]
        assert names[:4] == ["cond", "cond_1", "uncond", "uncond_1"]


def test_a_sharded_copy_gives_the_same_frames(tiny_repo: TinyRepo, tmp_path: Path) -> None:
    source = tiny_repo("wan_i2v", version="2.1")
    repo = shutil.copytree(source, tmp_path / "repo")
    for component in ("transformer", "vae", "image_encoder"):
        tiny.shard(repo, component)
    assert_same(Video(repo, "2.1").ours(), Video(source, "2.1").ours(), "sharded")


@pytest.mark.slow
@pytest.mark.parametrize("version", ["2.1", "2.2", "2.2-5b"])
def test_processes_that_hand_over_files_give_the_same_frames(tiny_repo: TinyRepo, version: str, tmp_path: Path) -> None:
    call = call_of(version, image=FIRST)
    Video(tiny_repo("wan_i2v", version=version), version).check_in_processes(tmp_path, call, ("float32", "bfloat16"))


def test_frames_per_second_are_those_of_the_published_models(video: Video) -> None:
    assert video.model.generate(**video.call, seed=7).fps == (24 if video.version == "2.2-5b" else 16)


def test_a_length_of_text_that_diffusers_misreads_is_followed_with_a_warning(
    tiny_repo: TinyRepo, caplog: pytest.LogCaptureFixture
) -> None:
    video = Video(tiny_repo("wan_i2v", version="2.1"), "2.1")
    with caplog.at_level(logging.WARNING):
        assert differ(video.of(max_sequence_length=24), video.base)
    assert "max_sequence_length=24" in caplog.text


@pytest.mark.parametrize(
    ("version", "changes", "error", "message"),
    [
        ("2.1", {"image": None}, ParameterError, "image=None: the video's first frame is missing"),
        ("2.1", {"image": []}, ParameterError, "one image is accepted, not 0"),
        (
            "2.1",
            {"image": [FIRST, LAST]},
            ParameterError,
            "one image is accepted, not 2; the last frame is `last_image`",
        ),
        ("2.1", {"image": torch.zeros(2, 3, 32, 48)}, ParameterError, "one image is accepted, not 2"),
        ("2.1", {"image": "fox.png"}, ParameterError, "a PIL image or a tensor is accepted, not str"),
        ("2.1", {"last_image": LAST}, ParameterError, "last_image=.*from its first frame only"),
        ("2.2-5b", {"last_image": LAST}, ParameterError, "last_image=.*from its first frame only"),
        ("2.2", {"last_image": "fox.png"}, ParameterError, "last_image='fox.png': a PIL image or a tensor"),
        ("2.2", {"last_image": LAST, "num_frames": 1}, ParameterError, "num_frames=1: .* 5 or more are accepted"),
        ("2.1-flf", {"image": torch.zeros(3, 32, 48)}, ParameterError, "last_image='Image': a tensor is accepted"),
        ("2.1-flf", {"last_image": None}, ParameterError, "last_image=None: .*from its first and its last frame"),
        ("2.1", {"height": 40}, ParameterError, "height=40: .* multiple of 16 .* 32 or 48"),
        ("2.1", {"width": 5}, ParameterError, "width=5: .* multiple of 16 .* 16$"),
        ("2.1", {"num_frames": 4}, ParameterError, "num_frames=4: a multiple of 2, plus 1, .* 3 or 5"),
        ("2.1", {"num_frames": 7}, ParameterError, "num_frames=7: a multiple of 4, plus 1, .* 5 or 9"),
        ("2.1", {"latents": torch.zeros(2, 6, 3, 8, 12)}, ParameterError, r"latents=.*\(1, 6, 3, 8, 12\)"),
        ("2.1", {"latents": torch.zeros(1, 6, 4, 8, 12)}, ParameterError, r"latents=.*\(1, 6, 3, 8, 12\)"),
        ("2.1", {"latents": torch.zeros(1, 6, 3, 10, 12)}, ParameterError, r"latents=.*\(1, 6, 3, 8, 12\)"),
        ("2.1", {"latents": torch.zeros(1, 1, 3, 8, 12)}, ParameterError, r"latents=.*\(1, 6, 3, 8, 12\)"),
        ("2.1", {"latents": 3}, ParameterError, "latents=3: a tensor"),
        ("2.2-5b", {"latents": 3}, ParameterError, "latents=3: a tensor"),
        ("2.2-5b", {"latents": torch.zeros(1, 5, 4, 8, 12)}, ParameterError, r"latents=.*\(1, 5, 3, 8, 12\)"),
        ("2.2-5b", {"latents": torch.zeros(1, 5, 1, 10, 12)}, ParameterError, r"latents=.*\(1, 5, 1, 8, 12\)"),
        ("2.1", {"prompt": None, "prompt_embeds": 3}, ParameterError, "prompt_embeds=3: a tensor"),
        ("2.1", {"prompt": None}, UsageError, "`prompt` or `prompt_embeds`"),
        ("2.1", {"guidance_scale_2": 2.0}, UsageError, "`guidance_scale_2` is only supported"),
        ("2.1", {"image_embeds": torch.zeros(1, 5, 20)}, UnknownParameterError, "no parameter 'image_embeds'"),
        ("2.1", {"last_imag": LAST}, UnknownParameterError, "did you mean 'last_image'"),
    ],
)
def test_what_cannot_be_done_is_refused_with_a_reason(
    tiny_repo: TinyRepo, version: str, changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    server = triptych.load(tiny_repo("wan_i2v", version=version), role="server", device="cpu")
    with pytest.raises(error, match=message):
        server.admit(triptych.Request(**call_of(version, **changes)))


def test_every_role_has_its_turn_once(video: Video) -> None:
    state = video.model.admit(triptych.Request(**video.call))
    assert tuple(role.value for role in state.route) == ROLES
