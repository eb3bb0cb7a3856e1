"""HunyuanVideo 1.5 gives what diffusers gives, from text and from an image, whole and split."""

import functools
import json
import logging
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, HunyuanVideo15ImageToVideoPipeline, HunyuanVideo15Pipeline
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

TASKS = {"t2v": "text-to-video", "i2v": "image-to-video"}
FAMILY = "hunyuan_video15"
TinyRepo = Callable[..., Path]

FEWER_TOKENS = {"tokenizer_max_length": 30, "tokenizer_2_max_length": 24, "vision_num_semantic_tokens": 11}


def picture(shade: int, size: tuple[int, int] = (80, 64)) -> Image.Image:
    """A frame: two gradients, and one channel that is `shade` everywhere."""
    down, right = Image.linear_gradient("L").resize(size), Image.linear_gradient("L").rotate(90).resize(size)
    return Image.merge("RGB", (down, right, Image.new("L", size, shade)))


FIRST = picture(30)
CALL: dict[str, Any] = {
    "prompt": 'a red fox beside a sign "SLOW"',
    "negative_prompt": 'ugly background, a sign "STOP"',
    "num_frames": 5,
    "num_inference_steps": 2,
}
CALLS = {"t2v": {**CALL, "height": 16, "width": 24}, "i2v": {**CALL, "image": FIRST}}


@contextmanager
def fewer_tokens() -> Iterator[None]:
    """Let pipelines be made, ours and the oracle's, that pad to fewer tokens: a third of the time."""
    with pytest.MonkeyPatch.context() as patch:
        for pipeline in (HunyuanVideo15Pipeline, HunyuanVideo15ImageToVideoPipeline):
            patch.setattr(pipeline, "__init__", _with_fewer_tokens(pipeline.__init__))
        yield


def _with_fewer_tokens(init: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(init)
    def changed(self: Any, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        assert FEWER_TOKENS.keys() <= vars(self).keys() | {"vision_num_semantic_tokens"}
        vars(self).update(FEWER_TOKENS)

    return changed


class Video(Parity):
    """A model of one task, loaded four ways, and its request."""

    def __init__(self, repo: Path, task: str, dtype: str = "float32", *, fewer: bool = True, **options: Any) -> None:
        with fewer_tokens() if fewer else nullcontext():
            super().__init__(repo, dtype, **options)
        self.task = task
        self.call = CALLS[task]
        self.stage = "i2v_denoising" if task == "i2v" else "hunyuan_denoising"

    def of(self, **changes: Any) -> Any:
        """Prove that all agree on the request with these changes; returns the video."""
        return self.check(**{**self.call, **changes})

    @cached_property
    def base(self) -> Any:
        """The request as it is, on which all agree."""
        return self.of()

    def ours(self, **changes: Any) -> Any:
        """What the whole model gives for the request with these changes."""
        return self.whole(**{**self.call, "output_type": "pt", **changes})


Load = Callable[..., Video]


@pytest.fixture(scope="module")
def load(tiny_repo: TinyRepo) -> Load:
    """`load(task, dtype="float32") -> Video`: loaded once. The bfloat16 oracle is `from_pretrained(dtype=...)`."""
    return functools.cache(lambda task, dtype="float32": Video(tiny_repo(FAMILY, task=task), task, dtype))


@pytest.fixture(params=[(task, dtype) for task in TASKS for dtype in ("float32", "bfloat16")], ids="-".join)
def either(request: pytest.FixtureRequest, load: Load) -> Video:
    """Both tasks in both dtypes."""
    return load(*request.param)


@pytest.fixture(params=TASKS)
def video(request: pytest.FixtureRequest, load: Load) -> Video:
    return load(request.param)


@pytest.fixture
def from_text(load: Load) -> Video:
    return load("t2v")


@pytest.fixture
def from_image(load: Load) -> Video:
    return load("i2v")


def with_guider(repo: Path, target: Path, **changes: object) -> Path:
    """A copy of a repository with other values in its guider's configuration, or a guider of another class."""
    shutil.copytree(repo, target)
    file = target / "guider" / "guider_config.json"
    values = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps(values))
    index = json.loads((target / "model_index.json").read_text())
    index["guider"] = ["diffusers", values["_class_name"]]
    (target / "model_index.json").write_text(json.dumps(index))
    return target


USUAL = {"t2v": ({"height": 16, "width": 24}, (16, 24)), "i2v": ({"image": FIRST}, (28, 32))}
UNUSUAL = {"t2v": ({"height": 40, "width": 16}, (40, 16)), "i2v": ({"image": picture(30, (37, 81))}, (40, 20))}


@pytest.mark.parametrize(
    ("seed", "num_frames", "steps", "sizes"), [(7, 5, 2, USUAL), (2**40 + 1, 3, 3, UNUSUAL)], ids=["usual", "unusual"]
)
def test_guided_videos_are_those_of_diffusers(
    either: Video, seed: int, num_frames: int, steps: int, sizes: dict[str, tuple[dict[str, Any], tuple[int, int]]]
) -> None:
    size, expected = sizes[either.task]
    result = either.of(seed=seed, num_frames=num_frames, num_inference_steps=steps, **size)
    assert result.shape == (1, num_frames, 3, *expected)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("task", TASKS)
def test_videos_of_distilled_models_are_those_of_diffusers(
    tiny_repo: TinyRepo, task: str, dtype: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    plain = Video(tiny_repo(FAMILY, task=task, guidance_scale=1.0), task, dtype)
    forwards = Forwards(plain.model, plain.stage, monkeypatch)
    expected = plain.of(negative_prompt=None)
    assert forwards.take()[0] == plain.call["num_inference_steps"]
    assert "negative_prompt" not in caplog.text
    with caplog.at_level(logging.WARNING):
        assert_same(plain.ours(), expected, "a negative prompt without guidance")
    assert "negative_prompt has no effect" in caplog.text
    sent = plain.roles["encoder"].run(triptych.Request(**plain.call)).fields
    assert not [name for name, value in sent.items() if name.startswith("negative_prompt_embeds") and value is not None]


@pytest.mark.parametrize(
    "guider",
    [
        {"start": 0.5},
        {"stop": 0.5},
        {"guidance_rescale": 0.7, "use_original_formulation": True},
        {
            "_class_name": "AdaptiveProjectedGuidance",
            "adaptive_projected_guidance_momentum": -0.5,
            "adaptive_projected_guidance_rescale": 5.0,
        },
    ],
    ids=["late", "early", "rescaled", "projected"],
)
def test_the_guider_decides_how_a_video_is_guided(
    from_text: Video, guider: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = Video(with_guider(from_text.repo, tmp_path / "repo", **guider), "t2v")
    # The oracle's guider stays at the last step of a run, and is asked before the next: the negative prompt is left out.
    guided = type(other.pipeline.guider)
    call = type(other.pipeline).__call__

    def anew(self: Any, **kwargs: Any) -> Any:
        self.guider = guided.from_config(self.guider.config)
        return call(self, **kwargs)

    monkeypatch.setattr(type(other.pipeline), "__call__", anew)
    result = other.of()
    assert differ(result, from_text.base)
    assert_same(other.ours(), result, "again")


@pytest.mark.parametrize("name", ["SkipLayerGuidance", "AutoGuidance", "PerturbedAttentionGuidance"])
def test_a_guider_that_changes_the_transformer_is_refused(from_text: Video, tmp_path: Path, name: str) -> None:
    repo = with_guider(from_text.repo, tmp_path / "repo", _class_name=name)
    with pytest.raises(ModelError, match=f"'guider' of .* is a {name}, which changes the transformer"):
        triptych.load(repo, role="server", device="cpu")


def test_each_of_several_videos_is_a_single_run_with_its_draw(either: Video) -> None:
    call = {**either.call, "num_videos_per_prompt": 2, "output_type": "pt"}
    with pytest.raises(RuntimeError, match="is invalid for input|doesn't match the broadcast shape"):
        either.diffusers(**call)
    both = either.whole(**call)
    assert_same(either.split(**call), both, "split")
    generator, dtype = torch.Generator().manual_seed(7), getattr(torch, either.dtype)
    shape = either.diffusers(**either.call, output_type="latent").shape
    for number, one in enumerate(both.split(1)):
        noise = torch.randn(shape, generator=generator, dtype=dtype)
        assert_same(one, either.diffusers(**either.call, latents=noise, output_type="pt"), f"output {number}")
    assert differ(both[0], both[1])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_several_latents_from_an_image_are_one_batch_of_diffusers(load: Load, dtype: str) -> None:
    both = load("i2v", dtype).of(num_videos_per_prompt=2, output_types=["latent"])
    assert len(both) == 2
    assert differ(both[0], both[1])


def test_latents_are_those_of_diffusers(video: Video) -> None:
    video.of(output_types=["latent"])


def test_pil_and_numpy_frames_are_those_of_diffusers(from_text: Video) -> None:
    from_text.of(output_types=("pil", "np"))


def test_one_frame_is_a_video_too(video: Video) -> None:
    assert video.of(num_frames=1).shape[1] == 1


def test_texts_of_the_full_length_give_the_videos_of_diffusers(tiny_repo: TinyRepo) -> None:
    full = Video(tiny_repo(FAMILY, task="t2v"), "t2v", fewer=False)
    full.of()
    state = full.roles["encoder"].run(triptych.Request(**full.call))
    assert [state.fields[name].shape[1] for name in ("prompt_embeds", "prompt_embeds_mask_2")] == [1000, 256]


def test_each_of_seed_prompts_quotations_steps_and_image_changes_the_video(video: Video) -> None:
    changes: list[dict[str, Any]] = [
        {"seed": 8},
        {"prompt": 'a blue cat beside a sign "SLOW"'},
        {"prompt": 'a red fox beside a sign "FAST"'},
        {"prompt": "a red fox beside a sign SLOW"},
        {"negative_prompt": None},
        {"num_inference_steps": 3},
        {"sigmas": [1.0, 0.7]},
        *([{"image": picture(200)}] if video.task == "i2v" else []),
    ]
    for change in changes:
        assert differ(video.ours(**change), video.base), change
    for change in ({"prompt": "a fox and no quotation", "negative_prompt": None}, {"sigmas": [1.0, 0.7]}):
        video.of(**change)


def test_quotations_and_the_image_reach_the_denoiser_by_each_of_their_ways(
    video: Video, monkeypatch: pytest.MonkeyPatch
) -> None:
    fields = ["prompt_embeds", "prompt_embeds_2", "negative_prompt_embeds", "negative_prompt_embeds_2"]
    fields += ["image_embeds", "image_latents"] if video.task == "i2v" else []
    for field in fields:
        state = video.roles["encoder"].run(triptych.Request(**video.call, seed=7, output_type="pt"))
        state.fields[field] = -state.fields[field]
        for role in ROLES[1:]:
            state = video.roles[role].run(state)
        assert differ(state.result.frames, video.base), field


@pytest.mark.parametrize(("dtype", "steps"), [("float32", 3), ("bfloat16", 2)])
def test_a_model_distilled_to_few_steps_is_told_the_next_timestep(tiny_repo: TinyRepo, dtype: str, steps: int) -> None:
    few = Video(tiny_repo(FAMILY, task="i2v", guidance_scale=1.0, use_meanflow=True), "i2v", dtype)
    few.of(negative_prompt=None, num_inference_steps=steps)


def test_a_video_without_a_size_has_the_models_own(video: Video) -> None:
    if video.task == "t2v":
        assert video.of(height=None, width=None).shape[-2:] == (24, 40)
    else:
        assert video.of(image=FIRST.convert("P").resize((300, 100))).shape[-2:] == (20, 48)


def test_an_image_may_be_in_a_list_of_its_own(from_image: Video) -> None:
    assert_same(from_image.ours(image=[FIRST]), from_image.base, "list")


@pytest.mark.parametrize(
    ("task", "dtypes"),
    [
        ("t2v", {"default": torch.float32, "transformer": torch.bfloat16}),
        ("i2v", {"default": torch.bfloat16, "text_encoder": torch.float32, "vae": torch.float32}),
    ],
    ids=TASKS,
)
def test_components_may_have_dtypes_of_their_own(
    tiny_repo: TinyRepo, task: str, dtypes: dict[str, torch.dtype]
) -> None:
    # The encoder casts to the dtype of the transformer, which it has not loaded.
    mixed = Video(tiny_repo(FAMILY, task=task), task, load_dtype=dtypes)
    with fewer_tokens():
        mixed.pipeline = DiffusionPipeline.from_pretrained(mixed.repo, dtype=dtypes)
    mixed.pipeline.set_progress_bar_config(disable=True)
    mixed.of()


def test_a_checkpoint_in_bfloat16_stays_so(tiny_repo: TinyRepo) -> None:
    Video(tiny_repo(FAMILY, task="i2v", dtype="bfloat16"), "i2v", "bfloat16", load_dtype="auto").of()


def test_roles_load_what_they_use(video: Video) -> None:
    held = {role: {name for name, size in model.loaded_bytes.items() if size} for role, model in video.roles.items()}
    vision = {"image_encoder", "vae"} if video.task == "i2v" else set()
    encoder = {"text_encoder", "text_encoder_2"} | vision
    assert held == {"encoder": encoder, "denoiser": {"transformer"}, "decoder": {"vae"}}
    assert video.roles["encoder"].is_hollow("transformer")
    if video.task == "i2v":
        halves = [video.roles[role].loaded_bytes["vae"] for role in ("encoder", "decoder")]
        assert sum(halves) == sum(tensor.nbytes for tensor in video.pipeline.vae.parameters())


def test_encoders_are_held_to_what_is_read(video: Video) -> None:
    left_out = {}
    for component in ("text_encoder", *(["image_encoder"] if video.task == "i2v" else [])):
        names, whole = (
            {name for name, _ in module.named_parameters()}
            for module in (video.roles["encoder"].components[component], getattr(video.pipeline, component))
        )
        left_out[component] = {
            ".".join(name.split(".")[:2]) if "layers" in name else name.split(".")[0] for name in whole - names
        }
    expected = {"text_encoder": {"layers.3", "layers.4", "norm"}, "image_encoder": {"head"}}
    assert left_out == {component: expected[component] for component in left_out}


@pytest.mark.parametrize("task", TASKS)
def test_every_role_uses_every_byte_it_holds(tiny_repo: TinyRepo, task: str) -> None:
    case = Case(FAMILY, {"task": task}, {TASKS[task]: (CALLS[task],)})
    # What transformers keeps for dynamic scaling; what diffusers computes of the text after the last block.
    unread = {"text_encoder.rotary_emb.original_inv_freq"}
    last = "transformer.transformer_blocks.1"
    layers = ("attn.to_add_out", "ff_context.net.0.proj", "ff_context.net.2")
    unused = {f"{last}.{layer}.{leaf}" for layer in layers for leaf in ("weight", "bias")}
    with fewer_tokens():
        traces = {each.role: each for each in trace(case, tiny_repo(FAMILY, task=task))}
    assert {role: set(each.unread) for role, each in traces.items()} == {
        "encoder": unread, "denoiser": set(), "decoder": set(), "monolithic": unread,
    }  # fmt: skip
    assert {role: set(each.unused) for role, each in traces.items()} == {
        "encoder": unread, "denoiser": unused, "decoder": set(), "monolithic": unread | unused,
    }  # fmt: skip


def test_one_copy_crosses_the_wire_and_no_noise(video: Video) -> None:
    state = video.roles["encoder"].run(triptych.Request(**video.call, num_videos_per_prompt=3))
    shapes = {name: tuple(value.shape) for name, value in state.fields.items() if isinstance(value, torch.Tensor)}
    text = {"prompt_embeds", "prompt_embeds_mask", "prompt_embeds_2", "prompt_embeds_mask_2"}
    image = {"image_embeds", "image_latents"} if video.task == "i2v" else set()
    assert shapes.keys() == text | {f"negative_{name}" for name in text} | image
    assert {shape[0] for shape in shapes.values()} == {1}
    assert "image" not in state.fields
    state = video.roles["denoiser"].run(state)
    assert [name for name, value in state.fields.items() if isinstance(value, torch.Tensor)] == ["latents"]
    assert len(state.fields["latents"]) == 3


def test_requests_do_not_share_a_guider_or_a_scheduler(video: Video) -> None:
    denoising = next(stage for stage in video.roles["denoiser"].stages if stage.name == video.stage)
    video.split(**video.call, output_type="pt")
    assert denoising.guider._step is None and denoising.scheduler._step_index is None


def test_given_latents_take_the_place_of_the_noise(video: Video) -> None:
    noise = torch.randn(video.ours(output_type="latent").shape, generator=torch.Generator().manual_seed(1))
    assert differ(video.of(latents=noise), video.base)


def test_given_latents_decide_the_size_that_no_image_does(video: Video) -> None:
    _, channels, frames, height, width = video.ours(output_type="latent").shape
    wider = 0 if video.task == "i2v" else 2
    shape = (1, channels, frames + 1, height + wider, width)
    made = video.of(latents=torch.randn(shape, generator=torch.Generator().manual_seed(1)))
    assert made.shape[1] > video.base.shape[1]


def test_given_embeddings_take_the_place_of_the_prompts(video: Video) -> None:
    names = ("prompt_embeds", "prompt_embeds_mask", "prompt_embeds_2", "prompt_embeds_mask_2")
    with torch.no_grad():
        given, negative = (
            dict(zip(names, video.pipeline.encode_prompt(video.call[prompt])))
            for prompt in ("prompt", "negative_prompt")
        )
    without = {"prompt": None, "negative_prompt": None}
    negative = {f"negative_{name}": value for name, value in negative.items()}
    assert_same(video.of(**without, **given, **negative), video.base, "given")
    # Those of the language model alone: the letters come from the prompt, or there are none.
    only = {name: given[name] for name in names[2:]}
    assert_same(video.ours(**only), video.base, "letters given")


@pytest.mark.parametrize("outputs", [1, 2])
def test_joined_forwards_stay_within_the_tolerance(video: Video, outputs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    call = {**video.call, "num_inference_steps": 4}
    if outputs == 1:
        assert_joined_within_tolerance(video, video.stage, monkeypatch, call)
        return
    call["num_videos_per_prompt"] = outputs
    forwards = Forwards(video.model, video.stage, monkeypatch)
    exact = video.whole(**call, output_type="pt")
    count, expected = forwards.take()
    joined = video.whole(**call, exact=False, output_type="pt")
    joined_count, actual = forwards.take()
    forwards.close()
    # Exactly, each video has its own forwards; joined, a step is one forward.
    assert (count, joined_count) == (2 * 2 * 4, 4)
    for one, other in zip(actual, expected, strict=True):
        assert (one - other).abs().max() <= FORWARD_TOLERANCE * other.abs().max()
    torch.testing.assert_close(joined, exact, rtol=0, atol=PIXEL_TOLERANCE)


def test_the_cache_of_steps_is_told_what_diffusers_tells_it(video: Video, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    cached = type(video.pipeline.transformer).cache_context

    def record(self: Any, name: str) -> Any:
        told.append(name)
        return cached(self, name)

    for transformer in (video.pipeline.transformer, video.model.components["transformer"]):
        monkeypatch.setattr(type(transformer), "cache_context", record)
    names = []
    for run, changes in ((video.diffusers, {}), (video.whole, {}), (video.whole, {"num_videos_per_prompt": 2})):
        told.clear()
        run(**{**video.call, **changes}, output_type="pt")
        names.append(list(told))
    assert names[0] == names[1] == ["pred_cond", "pred_uncond"] * 2
    assert names[2][:4] == ["pred_cond", "pred_cond_1", "pred_uncond", "pred_uncond_1"]


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
def test_processes_that_hand_over_files_give_the_same_frames(
    tiny_repo: TinyRepo, task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The comparison in bfloat16 makes its own oracle.
    monkeypatch.setattr("pipelines.parity.Parity", lambda repo, dtype: Video(repo, task, dtype, fewer=False))
    call = {**CALLS[task], **({"image": FIRST} if task == "i2v" else {})}
    full = Video(tiny_repo(FAMILY, task=task), task, fewer=False)
    full.check_in_processes(tmp_path, call, ("float32", "bfloat16"))


def test_frames_per_second_are_those_of_the_published_models(video: Video) -> None:
    assert video.model.generate(**video.call, seed=7).fps == 24


@pytest.mark.parametrize(
    ("task", "changes", "error", "message"),
    [
        ("t2v", {"height": 36}, ParameterError, "height=36: .* multiple of 8 .* 32 or 40"),
        ("t2v", {"width": 5}, ParameterError, "width=5: .* multiple of 8 .* 8$"),
        ("t2v", {"height": None}, UsageError, "`height` also have to be provided"),
        ("t2v", {"num_frames": 4}, ParameterError, "num_frames=4: a multiple of 2, plus 1, .* 3 or 5"),
        ("t2v", {"prompt": None}, UsageError, "`prompt` or `prompt_embeds`"),
        ("t2v", {"prompt": None, "prompt_embeds": torch.zeros(1, 3, 24)}, UsageError, "`prompt_embeds_mask` also"),
        ("t2v", {"prompt_embeds_2": torch.zeros(2, 3, 18), "prompt_embeds_mask_2": torch.zeros(2, 3)}, ParameterError,
         "prompt_embeds_2=.*those of one prompt"),
        ("t2v", {"prompt": None, "prompt_embeds": 3, "prompt_embeds_mask": 3, "prompt_embeds_2": 3,
                 "prompt_embeds_mask_2": 3}, ParameterError, "prompt_embeds=3: a tensor"),
        ("t2v", {"prompt_embeds_2": torch.zeros(3, 18), "prompt_embeds_mask_2": torch.zeros(1, 3)}, ParameterError,
         r"prompt_embeds_2=.*\(any, any, any\)"),
        ("t2v", {"prompt_embeds_2": torch.zeros(1, 3, 18), "prompt_embeds_mask_2": 3}, ParameterError,
         "prompt_embeds_mask_2=3: those of one prompt"),
        ("t2v", {"latents": 3}, ParameterError, "latents=3: a tensor"),
        ("t2v", {"latents": torch.zeros(2, 6, 3, 4, 6)}, ParameterError, r"latents=.*\(1, 6, any, any, any\)"),
        ("t2v", {"latents": torch.zeros(1, 7, 3, 4, 6)}, ParameterError, r"latents=.*\(1, 6, any, any, any\)"),
        ("i2v", {"latents": torch.zeros(1, 6, 3, 7, 10)}, ParameterError, r"latents=.*\(1, 6, any, 7, 8\)"),
        ("t2v", {"image": FIRST}, UnknownParameterError, "no parameter 'image'"),
        ("t2v", {"guidance_scale": 3.0}, UnknownParameterError, "no parameter 'guidance_scale'"),
        ("i2v", {"image": None}, ParameterError, "image=None: the video's first frame is missing"),
        ("i2v", {"image": []}, ParameterError, "one image is accepted, the video's first frame, not 0"),
        ("i2v", {"image": [FIRST, FIRST]}, ParameterError, "one image is accepted, the video's first frame, not 2"),
        ("i2v", {"image": "fox.png"}, ParameterError, "a PIL image is accepted, not str"),
        ("i2v", {"num_frames": 6}, ParameterError, "num_frames=6: a multiple of 2, plus 1, .* 5 or 7"),
        ("i2v", {"height": 32}, UnknownParameterError, "no parameter 'height'"),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_refused_with_a_reason(
    tiny_repo: TinyRepo, task: str, changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    server = triptych.load(tiny_repo(FAMILY, task=task), role="server", device="cpu")
    assert not any(server.loaded_bytes.values())
    with pytest.raises(error, match=message):
        server.admit(triptych.Request(**{**CALLS[task], **changes}))


def test_every_role_has_its_turn_once(video: Video) -> None:
    state = video.model.admit(triptych.Request(**video.call))
    assert tuple(role.value for role in state.route) == ROLES
