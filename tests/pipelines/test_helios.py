"""Helios gives what diffusers gives, whole and split, chunk by chunk, and refuses what it cannot do."""

import json
import logging
import shutil
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from PIL import Image

import triptych
from triptych.errors import ModelError, ParameterError, UnknownParameterError, UsageError
from triptych.state import View

from .parity import DTYPES, FORWARD_TOLERANCE, PIXEL_TOLERANCE, ROLES, Forwards, Parity, assert_same, differ
from .tracing import Case, trace

TinyRepo = Callable[..., Path]


def picture(shade: int, size: tuple[int, int] = (80, 64)) -> Image.Image:
    """A frame: two gradients, and one channel that is `shade` everywhere."""
    down, right = Image.linear_gradient("L").resize(size), Image.linear_gradient("L").rotate(90).resize(size)
    return Image.merge("RGB", (down, right, Image.new("L", size, shade)))


IMAGE = picture(30)
CLIP = [picture(30 + 15 * k).rotate(5 * k) for k in range(12)]  # two chunks of five frames, and two before them
# Latents of the tiny models at 16 x 32 pixels: a chunk is three frames of them.
LATENTS = torch.randn(1, 6, 6, 4, 8, generator=torch.Generator().manual_seed(1))
CHUNK_FRAMES = 5
STILL = {"image_latents": LATENTS[:, :, :1], "fake_image_latents": LATENTS[:, :, 1:2]}


def call_of(version: str, **changes: Any) -> dict[str, Any]:
    """A guided request of two chunks that a version takes."""
    steps = {"num_inference_steps": 3} if version == "base" else {"pyramid_num_inference_steps_list": [3, 2]}
    call: dict[str, Any] = {
        "prompt": "a red fox",
        "negative_prompt": "blurred, ugly colours and background",
        "height": 16,
        "width": 32,
        "num_frames": 10,
        "guidance_scale": 4.0,
        "max_sequence_length": 24,
        "num_latent_frames_per_chunk": 3,
        **steps,
    }
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

    def state(self, role: str, **changes: Any) -> triptych.State:
        """The version's request after a role has run it."""
        state = self.roles["encoder"].run(triptych.Request(**{**self.call, "seed": 7, **changes}))
        return state if role == "encoder" else self.roles[role].run(state)


def check_kth_draws(video: Video, monkeypatch: pytest.MonkeyPatch, **changes: Any) -> None:
    """Prove that output k of several is diffusers' single run in which each draw of the denoiser is the k-th of many."""
    call, outputs = {**video.call, **changes, "output_type": "pt"}, 2
    with pytest.raises(RuntimeError, match="Sizes of tensors must match"):
        video.diffusers(**call, num_videos_per_prompt=outputs)
    several = video.whole(**call, num_videos_per_prompt=outputs)
    assert_same(video.split(**call, num_videos_per_prompt=outputs), several, "split")
    for k in range(outputs):
        with monkeypatch.context() as patch:
            for name in ("prepare_latents", "sample_block_noise"):
                if hasattr(video.pipeline, name):
                    patch.setattr(video.pipeline, name, kth_of(getattr(video.pipeline, name), k, outputs))
            assert_same(several[k : k + 1], video.diffusers(**call), f"output {k}")
    assert differ(several[0], several[1])


def kth_of(draw: Callable[..., Any], k: int, outputs: int) -> Callable[..., Any]:
    return lambda *args, **options: [draw(*args, **options) for _ in range(outputs)][k]


def check_interleaved(video: Video) -> None:
    """Prove that two requests whose steps alternate in one stage end as each does by itself."""
    changes: list[dict[str, Any]] = [{"video": CLIP}, {"seed": 8, "num_frames": 15, "guidance_scale": 1.0}]
    (stage,) = (stage for stage in video.roles["denoiser"].stages if "denoising" in stage.name)
    views = [View(video.state("encoder", **each).fields, stage.name, stage.reads, stage.writes) for each in changes]
    with torch.no_grad():
        for view in views:
            stage.begin(view)
        assert len(views[0].timesteps) * 3 == len(views[1].timesteps) * 2  # chunks
        for i in range(len(views[1].timesteps)):
            for view in views:
                if i < len(view.timesteps):
                    stage.advance(view, i, stage.predict(stage.model_inputs(view, i)))
        for view in views:
            stage.finish(view)
    for view, each in zip(views, changes):
        expected = video.state("denoiser", **each).fields["latent_chunks"]
        assert_same(list(view.latent_chunks), expected, f"{each}")


def check_chunks_as_they_finish(video: Video) -> None:
    """Prove that a chunk is there once its steps are done, and gives its frames by itself."""
    (stage,) = (stage for stage in video.roles["denoiser"].stages if "denoising" in stage.name)
    decoding = video.roles["decoder"].stages[0]
    view = View(video.state("encoder").fields, stage.name, stage.reads, stage.writes)
    with torch.no_grad():
        stage.begin(view)
        for i in range(len(view.timesteps)):
            done = 2 * i // len(view.timesteps)
            assert len(view.latent_chunks) == done
            stage.advance(view, i, stage.predict(stage.model_inputs(view, i)))
        pixels = [decoding.decode(latents) for latents in view.latent_chunks]
    frames = [video.pipeline.video_processor.postprocess_video(each, output_type="pt") for each in pixels]
    assert [each.shape[1] for each in frames] == [CHUNK_FRAMES, CHUNK_FRAMES]
    joined = torch.cat(frames, dim=1)[:, : 2 * CHUNK_FRAMES - 1]
    assert_same(joined, video.base, "chunks")


def check_joined(video: Video, stage: str, monkeypatch: pytest.MonkeyPatch, outputs: int, **changes: Any) -> None:
    """Prove that beyond `exact` a step is one forward, of all branches and outputs, within the tolerance."""
    call = {**video.call, "num_frames": CHUNK_FRAMES, "num_videos_per_prompt": outputs, **changes}
    forwards = Forwards(video.model, stage, monkeypatch)
    exact = video.whole(**call, output_type="pt")
    count, expected = forwards.take()
    joined = video.whole(**call, exact=False, output_type="pt")
    joined_count, actual = forwards.take()
    forwards.close()
    assert count == 2 * outputs * joined_count
    for one, other in zip(actual, expected, strict=True):
        assert (one - other).abs().max() <= FORWARD_TOLERANCE * other.abs().max()
    torch.testing.assert_close(joined, exact, rtol=0, atol=PIXEL_TOLERANCE)


def check_one_copy_crosses(video: Video) -> None:
    """Prove that a hand-over has what is encoded once, no noise, and no frames but those of the result."""
    for given, encoded in (
        ({}, set()),
        ({"image": IMAGE}, {"image_latents", "fake_image_latents"}),
        ({"video": CLIP}, {"image_latents", "video_latents"}),
    ):
        fields = video.state("encoder", **given, num_videos_per_prompt=2).fields
        tensors = {name: value for name, value in fields.items() if isinstance(value, torch.Tensor)}
        assert tensors.keys() == {"prompt_embeds", "negative_prompt_embeds"} | encoded
        assert {len(tensor) for tensor in tensors.values()} == {1}
        fields = video.state("denoiser", **given, num_videos_per_prompt=2).fields
        assert not any(isinstance(value, torch.Tensor) for value in fields.values())
        shapes = [tuple(chunk.shape) for chunk in fields["latent_chunks"]]
        assert shapes == [(2, 6, 3, 4, 8)] * 2
        assert {chunk.dtype for chunk in fields["latent_chunks"]} == {torch.float32}


def check_idle_bytes(repo: Path, version: str) -> None:
    """Prove that no role holds a byte without use."""
    steps = {"num_inference_steps": 1} if version == "base" else {"pyramid_num_inference_steps_list": [1, 1]}
    changes = ({}, {"image": IMAGE}, {"video": CLIP[:CHUNK_FRAMES]})
    requests = (call_of(version, num_frames=CHUNK_FRAMES, **steps, **each) for each in changes)
    tasks = ("text-to-video", "image-to-video", "video-to-video")
    case = Case("helios", {"version": version}, {task: (request,) for task, request in zip(tasks, requests)})
    for each in trace(case, repo):
        assert (each.role, dict(each.unread), dict(each.unused)) == (each.role, {}, {})


@pytest.fixture(scope="module", params=DTYPES)
def either(request: pytest.FixtureRequest, tiny_repo: TinyRepo) -> Video:
    """Both dtypes. The bfloat16 oracle is `from_pretrained(dtype=torch.bfloat16)`."""
    return Video(tiny_repo("helios", version="base"), "base", request.param)


@pytest.fixture(scope="module")
def video(tiny_repo: TinyRepo) -> Video:
    return Video(tiny_repo("helios", version="base"), "base")


def edited(repo: Path, target: Path, file: str, **changes: object) -> Path:
    """A copy of a repository with other values in one of its JSON files."""
    shutil.copytree(repo, target)
    values = json.loads((target / file).read_text())
    (target / file).write_text(json.dumps({**values, **changes}))
    return target


@pytest.mark.parametrize(
    ("seed", "height", "width", "num_frames", "steps"), [(7, 32, 48, 10, 4), (2**40 + 1, 80, 48, 7, 2)]
)
def test_guided_videos_are_those_of_diffusers(
    either: Video, seed: int, height: int, width: int, num_frames: int, steps: int
) -> None:
    size = {"height": height, "width": width, "num_frames": num_frames}
    assert either.of(seed=seed, **size, num_inference_steps=steps).shape == (1, 9, 3, height, width)


def test_videos_without_guidance_are_those_of_diffusers(either: Video) -> None:
    plain = either.of(guidance_scale=1.0, negative_prompt=None)
    assert_same(either.ours(guidance_scale=1.0), plain, "a negative prompt without guidance")
    assert differ(plain, either.base)


@pytest.mark.parametrize("seed", [7, 2**40 + 1])
def test_images_and_videos_go_on_as_in_diffusers(either: Video, seed: int) -> None:
    # The encoder draws, and the denoiser after it: from the same generator, in the same order.
    size = {"seed": seed, "width": 48 if seed == 7 else 32}
    for given in ({"image": IMAGE}, {"video": CLIP}):
        assert differ(either.of(**given, **size), either.ours(**size))


def test_without_noise_images_and_videos_go_on_as_in_diffusers(video: Video) -> None:
    for given, noise in (
        ({"image": IMAGE}, "add_noise_to_image_latents"),
        ({"video": CLIP}, "add_noise_to_video_latents"),
    ):
        assert differ(video.of(**given, **{noise: False}), video.ours(**given))
    much = {"video_noise_sigma_min": 0.8, "video_noise_sigma_max": 0.9}
    # The image's still video is noised as videos are.
    for given in ({"video": CLIP}, {"image": IMAGE}):
        assert differ(video.of(**given, **much), video.ours(**given))


def test_latents_are_those_of_diffusers_and_what_was_given_is_among_them(video: Video) -> None:
    for given, frames in (
        ({}, 6),
        ({"image": IMAGE}, 7),
        ({"video": CLIP}, 12),
        ({"video_latents": LATENTS, "image": IMAGE}, 13),
    ):
        assert video.of(**given, output_types=["latent"]).shape[2] == frames


def test_more_is_given_than_is_looked_back_at(video: Video) -> None:
    video.of(video=CLIP, history_sizes=[1, 1, 2], output_types=("latent", "pt"))


@pytest.mark.parametrize(
    "given",
    [
        STILL,
        {**STILL, "fake_image_latents": LATENTS[:, :, 1:4]},
        {"image_latents": LATENTS[:, :, :1], "add_noise_to_image_latents": False},
        {"fake_image_latents": LATENTS[:, :, 1:2], "image": IMAGE},
        {"video_latents": LATENTS, "image_latents": LATENTS[:, :, :1], "add_noise_to_image_latents": False},
        {"video_latents": LATENTS[:, :, :4], "add_noise_to_video_latents": False},
    ],
    ids=lambda given: ", ".join(given),
)
def test_given_latents_take_the_place_of_image_and_video(video: Video, given: dict[str, Any]) -> None:
    assert differ(video.of(**given), video.base)


def test_several_videos_are_single_runs_with_their_draws(either: Video, monkeypatch: pytest.MonkeyPatch) -> None:
    check_kth_draws(either, monkeypatch, image=IMAGE)


def test_given_embeddings_take_the_place_of_the_prompts_and_several_are_one_batch(video: Video) -> None:
    with torch.no_grad():
        texts = (video.call["prompt"], video.call["negative_prompt"])
        embeds, negative = video.pipeline.encode_prompt(*texts, max_sequence_length=24)
    without = {"prompt": None, "negative_prompt": None}
    given = {"prompt_embeds": embeds, "negative_prompt_embeds": negative}
    assert_same(video.of(**without, **given), video.base, "given")
    several = {name: torch.cat([value, value.flip(1)]) for name, value in given.items()}
    assert len(video.of(**without, **several)) == 2
    assert len(video.of(prompt=None, prompt_embeds=several["prompt_embeds"])) == 2
    with pytest.raises(ParameterError, match="num_videos_per_prompt=2: not with embeddings of 2 prompts"):
        video.ours(**without, **several, num_videos_per_prompt=2)
    with pytest.raises(ParameterError, match="image=.*not with embeddings of 2 prompts"):
        video.ours(**without, **several, image=IMAGE)


def test_pil_and_numpy_frames_are_those_of_diffusers(video: Video) -> None:
    video.of(output_types=("pil", "np"))


def test_each_of_seed_prompt_guidance_steps_and_history_changes_the_video(video: Video) -> None:
    for change in ({"seed": 8}, {"prompt": "a blue cat"}, {"negative_prompt": None}, {"guidance_scale": 2.0}):
        assert differ(video.ours(**change), video.base), change
    changes: list[dict[str, Any]] = [
        {"sigmas": np.array([0.9, 0.5])},
        {"history_sizes": [4, 1, 0]},
        {"num_latent_frames_per_chunk": 2},
    ]
    for change in changes:
        assert differ(video.of(**change), video.base), change
    three = {"num_frames": 15, "num_inference_steps": 1}
    assert differ(video.of(**three, is_skip_first_chunk=True), video.ours(**three))


def test_a_list_of_noise_levels_is_an_array_of_them(video: Video) -> None:
    assert_same(video.ours(sigmas=[0.9, 0.5]), video.ours(sigmas=np.array([0.9, 0.5])), "sigmas")


def test_videos_and_images_come_in_any_form_that_diffusers_takes(video: Video) -> None:
    clip = torch.rand(7, 3, 40, 56, generator=torch.Generator().manual_seed(1))
    short = {"num_frames": 5, "num_inference_steps": 1, "guidance_scale": 1.0}
    of_clip = video.of(video=clip, **short)
    forms = ([clip], clip[None], list(clip), [list(clip)], clip.permute(0, 2, 3, 1).numpy())
    for form in forms:
        assert_same(video.ours(video=form, **short), of_clip, str(type(form)))
    of_image = video.of(image=clip[0], **short)
    for form in ([clip[0]], clip[:1], clip[0].permute(1, 2, 0).numpy()):
        assert_same(video.ours(image=form, **short), of_image, str(type(form)))


def test_pictures_of_another_mode_are_taken_for_what_they_show_in_colour(video: Video) -> None:
    frames = [Image.new("RGB", (56, 40), (shade, 90, 30)) for shade in range(0, 210, 30)]
    short = {"num_frames": 5, "num_inference_steps": 1, "guidance_scale": 1.0}
    others = [each.convert("RGBA") for each in frames]
    assert_same(video.ours(image=others[1], **short), video.ours(image=frames[1], **short), "image")
    for given, seen in ((others, frames), ([others], [frames])):
        assert_same(video.ours(video=given, **short), video.ours(video=seen, **short), "video")


@pytest.mark.parametrize(
    ("dtype", "sampling"),
    [
        ("float32", {"scheduler_type": "euler"}),
        ("bfloat16", {"scheduler_type": "euler"}),  # its steps round to bfloat16
        ("float32", {"solver_order": 1}),
        ("float32", {"use_dynamic_shifting": False}),
    ],
)
def test_the_scheduler_is_the_one_of_the_repository(
    video: Video, dtype: str, sampling: dict[str, Any], tmp_path: Path
) -> None:
    repo = edited(video.repo, tmp_path / "repo", "scheduler/scheduler_config.json", **sampling)
    assert differ(Video(repo, "base", dtype).of(image=IMAGE), video.ours(image=IMAGE))


def test_components_may_have_dtypes_of_their_own(video: Video) -> None:
    # As published: the autoencoder in float32, the rest in bfloat16.
    dtypes = {"default": torch.bfloat16, "vae": torch.float32}
    oracle = type(video.pipeline).from_pretrained(video.repo, dtype=dtypes)
    oracle.set_progress_bar_config(disable=True)
    model = triptych.load(video.repo, device="cpu", dtype=dtypes)
    for given in ({"image": IMAGE}, {"video": CLIP}):
        call = {**video.call, **given, "output_type": "pt"}
        expected = oracle(**call, generator=torch.Generator().manual_seed(7)).frames
        assert_same(model.generate(**call, seed=7).frames, expected, "as published")


def test_requests_take_turns_step_by_step(video: Video) -> None:
    check_interleaved(video)


def test_a_chunk_is_there_when_its_steps_are_done(video: Video) -> None:
    check_chunks_as_they_finish(video)


def test_all_chunks_are_one_loop_of_fractional_timesteps(video: Video, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    transformer = video.model.components["transformer"]
    hook = transformer.register_forward_pre_hook(
        lambda _, __, inputs: seen.append(inputs["timestep"]), with_kwargs=True
    )
    reported: list[tuple[str, int, int]] = []
    video.model.generate(**{**video.call, "guidance_scale": 1.0}, on_step=lambda *step: reported.append(step))
    hook.remove()
    assert reported == [("helios_denoising", step, 6) for step in range(1, 7)]
    timesteps = torch.cat(seen)
    assert torch.equal(timesteps[:3], timesteps[3:])
    assert (timesteps != timesteps.round()).any()


@pytest.mark.parametrize("outputs", [1, 2])
def test_joined_forwards_stay_within_the_tolerance(video: Video, outputs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    check_joined(video, "helios_denoising", monkeypatch, outputs, num_inference_steps=8)


def test_one_copy_crosses_the_wire_and_no_noise(video: Video) -> None:
    check_one_copy_crosses(video)


def test_the_generator_crosses_the_wire_where_it_stopped(video: Video) -> None:
    start = torch.Generator().manual_seed(7).get_state()
    assert torch.equal(video.state("encoder").fields["generator"].get_state(), start)
    for given in ({"image": IMAGE}, {"video": CLIP}):
        assert not torch.equal(video.state("encoder", **given).fields["generator"].get_state(), start)


def test_every_role_uses_every_byte_it_holds(tiny_repo: TinyRepo) -> None:
    check_idle_bytes(tiny_repo("helios", version="base"), "base")


def test_roles_load_what_they_use(video: Video) -> None:
    held = {role: {name for name, size in model.loaded_bytes.items() if size} for role, model in video.roles.items()}
    assert held == {"encoder": {"text_encoder", "vae"}, "denoiser": {"transformer"}, "decoder": {"vae"}}
    halves = [video.roles[role].loaded_bytes["vae"] for role in ("encoder", "decoder")]
    assert sum(halves) == sum(tensor.nbytes for tensor in video.pipeline.vae.parameters())
    text_only = triptych.load(video.repo, role="encoder", device="cpu", tasks="text-to-video")
    assert {name for name, size in text_only.loaded_bytes.items() if size} == {"text_encoder"}
    with pytest.raises(UsageError, match="a request for 'image-to-video', but the model was loaded for text-to-video"):
        text_only.run(triptych.Request(**video.call, image=IMAGE))


@pytest.mark.slow
def test_processes_that_hand_over_files_give_the_same_frames(video: Video, tmp_path: Path) -> None:
    video.check_in_processes(tmp_path, {**video.call, "image": [IMAGE]}, ("float32", "bfloat16"))


def test_a_sharded_copy_gives_the_same_frames(video: Video, tmp_path: Path) -> None:
    repo = shutil.copytree(video.repo, tmp_path / "repo")
    for component in ("transformer", "vae"):
        tiny.shard(repo, component)
    assert_same(Video(repo, "base").of(), video.base, "sharded")


def test_videos_are_whole_chunks_and_the_log_says_so(video: Video, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "triptych"):
        video.model.admit(triptych.Request(**{**video.call, "num_frames": 10}))
        assert not caplog.records
        assert video.of(num_frames=6).shape[1] == 9
    assert "num_frames=6: videos are whole chunks of 5 frames; this one has 2" in caplog.text


def test_the_defaults_are_those_of_diffusers(video: Video) -> None:
    fields = video.model.admit(triptych.Request(prompt="a red fox")).fields
    names = ("height", "width", "num_frames", "num_inference_steps", "guidance_scale", "history_sizes", "output_type")
    assert [fields[name] for name in names] == [384, 640, 132, 50, 5.0, [16, 2, 1], "np"]
    assert video.model.generate(**video.call, seed=7).fps == 24


def test_a_scheduler_for_pyramids_is_refused(video: Video, tmp_path: Path) -> None:
    repo = edited(video.repo, tmp_path / "repo", "scheduler/scheduler_config.json", stages=3)
    with pytest.raises(ModelError, match="scheduler for pyramids .stages=3.* HeliosPyramidPipeline"):
        triptych.load(repo, role="server", device="cpu")


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"height": 40}, ParameterError, "height=40: .* multiple of 16 .* 32 or 48"),
        ({"width": 5}, ParameterError, "width=5: .* multiple of 16 .* 16$"),
        ({"num_frames": 0}, ParameterError, "num_frames=0: a whole number of at least 1"),
        ({"num_latent_frames_per_chunk": 0}, ParameterError, "num_latent_frames_per_chunk=0: a whole number"),
        ({"num_latent_frames_per_chunk": 2.0}, ParameterError, "num_latent_frames_per_chunk=2.0: a whole number"),
        ({"history_sizes": [16, 2]}, ParameterError, "three whole numbers"),
        ({"history_sizes": [16, 0, 0]}, ParameterError, "the smallest may be 0"),
        ({"history_sizes": [16, 2, "1"]}, ParameterError, "three whole numbers"),
        ({"sigmas": []}, ParameterError, "a list of finite numbers is accepted"),
        ({"image_noise_sigma_min": "a"}, ParameterError, "image_noise_sigma_min='a': a finite number"),
        ({"is_skip_first_chunk": "no"}, ParameterError, "is_skip_first_chunk='no': True or False"),
        ({"image": [IMAGE, IMAGE]}, ParameterError, "one image is accepted, not 2"),
        ({"image": []}, ParameterError, "one image is accepted, not 0"),
        ({"image": torch.zeros(2, 3, 32, 48)}, ParameterError, "one image is accepted, not 2"),
        ({"image": "fox.png"}, ParameterError, "image='fox.png': a PIL image, an array or a tensor"),
        ({"image": IMAGE, "video": CLIP}, UsageError, "image and video cannot be provided simultaneously"),
        ({"video": CLIP[:4]}, ParameterError, "at least 5 frames .one chunk. is accepted, not of 4"),
        ({"video": []}, ParameterError, "at least 5 frames .one chunk. is accepted, not of 0"),
        ({"video": [CLIP, CLIP]}, ParameterError, "one video is accepted, not 2"),
        ({"video": torch.zeros(2, 7, 3, 32, 48)}, ParameterError, "one video is accepted, not 2"),
        ({"video": "fox.mp4"}, ParameterError, "a list of frames, an array or a tensor is accepted, not str"),
        ({"video": ["fox.png"] * 7}, ParameterError, "a list of frames, an array or a tensor is accepted, not list"),
        ({"image_latents": LATENTS[:, :, :1]}, ParameterError, "`image_latents` go with `fake_image_latents`"),
        ({"video_latents": LATENTS}, ParameterError, "`video_latents` that are noised go with `image_latents`"),
        ({"video_latents": LATENTS, "video": CLIP}, ParameterError, "`video` or `video_latents` is accepted, not both"),
        ({**STILL, "image_latents": 3}, ParameterError, "^image_latents=3: a tensor"),
        ({**STILL, "image_latents": LATENTS[0, :, :1]}, ParameterError, r"^image_latents=.*\(1, 6, 1, 4, 8\)"),
        ({**STILL, "image_latents": LATENTS[:, :, :2]}, ParameterError, r"^image_latents=.*\(1, 6, 1, 4, 8\)"),
        ({**STILL, "fake_image_latents": LATENTS[:, :5]}, ParameterError, r"fake_.*=.*\(1, 6, any, 4, 8\)"),
        ({**STILL, "video_latents": LATENTS[:, :, :, :2]}, ParameterError, r"video_.*=.*\(1, 6, any, 4, 8\)"),
        ({**STILL, "video_latents": LATENTS[:, :, :2]}, ParameterError, "at least 3 frames .one chunk. are accepted"),
        ({"prompt": None, "prompt_embeds": 3}, ParameterError, "prompt_embeds=3: a tensor"),
        ({"prompt": None, "prompt_embeds": torch.zeros(2, 18)}, ParameterError, r"prompt_embeds=.*\(any, any, any\)"),
        ({"prompt": None}, UsageError, "`prompt` or `prompt_embeds`"),
        ({"latents": LATENTS}, UnknownParameterError, "no parameter 'latents'"),
        ({"keep_first_frame": False}, UnknownParameterError, "no parameter 'keep_first_frame'"),
        ({"num_frame": 5}, UnknownParameterError, "did you mean 'num_frames'"),
    ],
)
def test_what_cannot_be_done_is_refused_with_a_reason(
    tiny_repo: TinyRepo, changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    server = triptych.load(tiny_repo("helios", version="base"), role="server", device="cpu")
    with pytest.raises(error, match=message):
        server.admit(triptych.Request(**call_of("base", **changes)))


def test_every_role_has_its_turn_once(video: Video) -> None:
    for given, task in (
        ({}, "text-to-video"),
        ({"image": IMAGE}, "image-to-video"),
        ({"video": CLIP}, "video-to-video"),
    ):
        state = video.model.admit(triptych.Request(**video.call, **given))
        assert (state.task, tuple(role.value for role in state.route)) == (task, ROLES)
