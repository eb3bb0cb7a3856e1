"""FastWan gives what FastVideo's few-step loop gives, whole and split, and refuses what it cannot do.

The loop is written out here from the paper (Distribution Matching Distillation 2, arxiv.org/abs/2405.14867, section 4.5)
and FastVideo's numbers; around it are diffusers' text encoding, image conditioning, transformer and decoding.
"""

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, WanImageToVideoPipeline, WanPipeline
from PIL import Image

import triptych
from triptych.errors import ModelError, ParameterError, UnknownParameterError, UsageError
from triptych.pipelines.wan_dmd import SHIFT, TIMESTEPS

from .parity import ROLES, Parity, assert_same, differ, in_both_dtypes
from .tracing import Case, trace

VERSIONS = ("2.1", "2.2-5b", "i2v")
TinyRepo = Callable[..., Path]

FRAME = Image.merge("RGB", [Image.linear_gradient("L").rotate(angle).resize((80, 64)) for angle in (0, 90, 180)])


def call_of(version: str, **changes: Any) -> dict[str, Any]:
    """A request that a version takes."""
    call: dict[str, Any] = {"prompt": "a red fox", "height": 32, "width": 48, "num_frames": 5}
    call |= {"image": FRAME, "max_sequence_length": 512} if version == "i2v" else {"max_sequence_length": 24}
    return {**call, **changes}


def level(timestep: int) -> torch.Tensor:
    """The share of noise at a timestep: that of the nearest of 1000 timesteps, shifted towards the noise by 8."""
    even = torch.arange(1000, 0, -1, dtype=torch.float32) / 1000
    shifted = 8.0 * even / (1 + (8.0 - 1) * even)
    return shifted[(shifted * 1000 - timestep).abs().argmin()]


class FastVideo(Parity):
    """A version, loaded by diffusers with the loop around it, whole, and once for each role."""

    def __init__(self, repo: Path, version: str, dtype: str = "float32") -> None:
        self.repo, self.version, self.dtype = repo, version, dtype
        cls: type[DiffusionPipeline] = WanImageToVideoPipeline if version == "i2v" else WanPipeline
        self.pipeline = cls.from_pretrained(repo, dtype=getattr(torch, dtype))
        self.call = call_of(version)
        self.model = triptych.load(repo, device="cpu", dtype=dtype)
        self.roles = {role: triptych.load(repo, role=role, device="cpu", dtype=dtype) for role in ROLES}

    def of(self, **changes: Any) -> Any:
        """Prove that all agree on the version's request with these changes; returns the video."""
        return self.check(**{**self.call, **changes})

    @torch.no_grad()
    def diffusers(
        self,
        *,
        prompt: str,
        height: int,
        width: int,
        num_frames: int,
        max_sequence_length: int,
        seed: int = 7,
        timesteps: Sequence[int] = (1000, 757, 522),
        num_videos_per_prompt: int = 1,
        image: Image.Image | None = None,
        output_type: str = "pt",
    ) -> Any:
        """FastVideo's loop over diffusers' models. The latents' second axis is time, as in FastVideo."""
        pipe, videos = self.pipeline, num_videos_per_prompt
        generator = torch.Generator("cpu").manual_seed(seed)
        text, _ = pipe.encode_prompt(
            prompt,
            do_classifier_free_guidance=False,
            num_videos_per_prompt=videos,
            max_sequence_length=max_sequence_length,
        )
        dtype = pipe.transformer.dtype
        shape = (
            videos,
            (num_frames - 1) // pipe.vae_scale_factor_temporal + 1,
            pipe.vae.config.z_dim,
            height // pipe.vae_scale_factor_spatial,
            width // pipe.vae_scale_factor_spatial,
        )
        noisy = torch.randn(shape, generator=generator, dtype=text.dtype)
        extra: dict[str, Any] = {}
        beside = []
        if image is not None:
            pixels = pipe.video_processor.preprocess(image, height=height, width=width)
            noise = noisy.transpose(1, 2).float()
            _, condition = pipe.prepare_latents(
                pixels, videos, shape[2], height, width, num_frames, torch.float32, torch.device("cpu"), latents=noise
            )
            beside = [condition]
            seen = pipe.encode_image(image, torch.device("cpu")).repeat(videos, 1, 1)
            extra["encoder_hidden_states_image"] = seen.to(dtype)
        for step, timestep in enumerate(timesteps):
            flow = pipe.transformer(
                torch.cat([noisy.transpose(1, 2).to(dtype), *beside], dim=1).to(dtype),
                timestep=torch.full((videos,), timestep),
                encoder_hidden_states=text.to(dtype),
                return_dict=False,
                **extra,
            )[0].transpose(1, 2)
            # x_t = (1 - s) x_0 + s e and v = e - x_0, so x_0 = x_t - s v.
            clean = (noisy.double() - level(timestep).double() * flow.double()).to(flow.dtype)
            if step == len(timesteps) - 1:
                noisy = clean
                break
            share = level(timesteps[step + 1])
            noise = torch.randn(shape, generator=generator, dtype=clean.dtype)
            noisy = ((1 - share) * clean.float() + share * noise.float()).to(noise.dtype)
        return self.decoded(noisy.transpose(1, 2), output_type)

    def decoded(self, latents: torch.Tensor, output_type: str) -> Any:
        if output_type == "latent":
            return latents
        vae = self.pipeline.vae
        mean, std = (
            torch.tensor(values).view(1, -1, 1, 1, 1).to(vae.dtype)
            for values in (vae.config.latents_mean, vae.config.latents_std)
        )
        pixels = vae.decode(latents.to(vae.dtype) / (1.0 / std) + mean, return_dict=False)[0]
        return self.pipeline.video_processor.postprocess_video(pixels, output_type=output_type)


@pytest.fixture(scope="module", params=in_both_dtypes(VERSIONS))
def either(request: pytest.FixtureRequest, tiny_repo: TinyRepo) -> FastVideo:
    version, dtype = request.param
    return FastVideo(tiny_repo("wan_dmd", version=version), version, dtype)


@pytest.fixture(scope="module", params=VERSIONS)
def fast(request: pytest.FixtureRequest, tiny_repo: TinyRepo) -> FastVideo:
    return FastVideo(tiny_repo("wan_dmd", version=request.param), request.param)


@pytest.mark.parametrize(
    ("seed", "height", "width", "num_frames"), [(7, 32, 48, 5), (2**40 + 1, 64, 32, 9)], ids=["usual", "unusual"]
)
def test_videos_are_those_of_fastvideo(either: FastVideo, seed: int, height: int, width: int, num_frames: int) -> None:
    video = either.of(seed=seed, height=height, width=width, num_frames=num_frames)
    assert video.shape == (1, num_frames, 3, height, width)


def test_several_videos_of_one_prompt_are_one_batch(either: FastVideo) -> None:
    videos = either.of(num_videos_per_prompt=2)
    assert len(videos) == 2
    assert differ(videos[0], videos[1])


def test_pil_and_numpy_frames_and_latents_are_those_of_fastvideo(fast: FastVideo) -> None:
    fast.of(output_types=("pil", "np", "latent"))


@pytest.mark.parametrize("timesteps", [(1000,), (1000, 500), (1000, 750, 500, 250), (999, 13, 1)])
def test_the_steps_are_those_asked_for(fast: FastVideo, timesteps: tuple[int, ...]) -> None:
    video = fast.of(timesteps=list(timesteps))
    assert differ(video, fast.of())
    call = {**fast.call, "output_type": "pt"}
    for given in (timesteps, torch.tensor(timesteps)):
        assert_same(fast.whole(**call, timesteps=given), video, "in another form")


def test_the_default_steps_are_those_of_the_published_models(fast: FastVideo) -> None:
    assert TIMESTEPS == (1000, 757, 522)
    fields = fast.model.admit(triptych.Request(**fast.call)).fields
    assert (fields["timesteps"], fields["num_inference_steps"]) == ([1000, 757, 522], 3)
    assert_same(fast.of(), fast.whole(**fast.call, num_inference_steps=3, guidance_scale=1.0, output_type="pt"), "said")


def test_a_model_may_have_steps_of_its_own(tiny_repo: TinyRepo, tmp_path: Path) -> None:
    repo = shutil.copytree(tiny_repo("wan_dmd", version="2.1"), tmp_path / "repo")
    (repo / "triptych.json").write_text(json.dumps({"defaults": {"timesteps": [1000, 500]}}))
    fast = FastVideo(repo, "2.1")
    assert_same(fast.whole(**fast.call, output_type="pt"), fast.of(timesteps=[1000, 500]), "triptych.json")


def test_levels_of_noise_are_looked_up_where_the_shift_leaves_gaps() -> None:
    # Late in time the shifted timesteps lie 8 apart; the published steps are rounded shares 1, 0.28 and 0.12 of them.
    assert SHIFT == 8.0
    assert level(1000) == 1
    assert [round(float(level(t)) * 1000, 2) for t in (757, 522, 13, 1)] == [756.76, 521.74, 15.78, 7.94]


def test_each_of_seed_prompt_and_image_changes_the_video(fast: FastVideo) -> None:
    call = {**fast.call, "output_type": "pt"}
    before = fast.whole(**call)
    changes: list[dict[str, Any]] = [{"seed": 8}, {"prompt": "a blue cat"}]
    if fast.version == "i2v":
        changes.append({"image": FRAME.rotate(90)})
    for change in changes:
        assert differ(fast.whole(**{**call, **change}), before), change


def test_noise_is_drawn_anew_from_the_requests_own_generator(fast: FastVideo) -> None:
    # Drawn in the denoiser: the noise to start from, then that of every step but the last.
    state = fast.roles["encoder"].run(triptych.Request(**fast.call, seed=7))
    drawn = triptych.State.from_bytes(bytes(fast.roles["denoiser"].run(state).to_bytes()))
    latents = fast.whole(**fast.call, output_type="latent")
    torch.manual_seed(0)  # the process's own generator has no part in it
    assert_same(fast.whole(**fast.call, output_type="latent"), latents, "again")
    expected = torch.Generator().manual_seed(7)
    assert torch.equal(state.fields["generator"].get_state(), expected.get_state())
    assert "generator" not in drawn.fields


def test_given_latents_take_the_place_of_the_first_noise(fast: FastVideo) -> None:
    # They come as diffusers has them, the channels before time, and the first draw is then another's.
    shape = fast.whole(**fast.call, output_type="latent").shape
    videos, channels, frames, height, width = shape
    generator = torch.Generator().manual_seed(7)
    noise = torch.randn((videos, frames, channels, height, width), generator=generator).transpose(1, 2)
    one = {**fast.call, "timesteps": [1000], "output_type": "pt"}
    assert_same(fast.whole(**one, latents=noise), fast.of(timesteps=[1000]), "of one step")
    call = {**fast.call, "output_type": "pt"}
    assert differ(fast.whole(**call, latents=noise), fast.of())
    assert_same(fast.split(**call, latents=noise), fast.whole(**call, latents=noise), "split")


def test_given_embeddings_take_the_place_of_the_prompt(fast: FastVideo) -> None:
    with torch.no_grad():
        embeds, _ = fast.pipeline.encode_prompt(
            "a red fox", do_classifier_free_guidance=False, max_sequence_length=fast.call["max_sequence_length"]
        )
    call = {**fast.call, "prompt": None, "prompt_embeds": embeds, "output_type": "pt"}
    assert_same(fast.whole(**call), fast.of(), "whole")
    assert_same(fast.split(**call), fast.of(), "split")


def test_a_step_is_one_forward_exact_or_not(fast: FastVideo) -> None:
    calls: list[str] = []
    hook = fast.model.components["transformer"].register_forward_hook(lambda *_: calls.append("forward"))
    exact, joined = (fast.whole(**fast.call, exact=exact, output_type="pt") for exact in (True, False))
    hook.remove()
    assert len(calls) == 2 * 3
    assert_same(joined, exact, "one branch has nothing to be joined with")


def test_roles_load_what_they_use(fast: FastVideo) -> None:
    held = {role: {name for name, size in model.loaded_bytes.items() if size} for role, model in fast.roles.items()}
    encoder = {"text_encoder"} | ({"vae", "image_encoder"} if fast.version == "i2v" else set())
    assert held == {"encoder": encoder, "denoiser": {"transformer"}, "decoder": {"vae"}}
    for model in (fast.model, *fast.roles.values()):
        assert "scheduler" not in model.components  # FastVideo has its own


@pytest.mark.parametrize("version", VERSIONS)
def test_every_role_uses_every_byte_it_holds(tiny_repo: TinyRepo, version: str) -> None:
    request = {name: value for name, value in call_of(version).items() if name != "prompt"}
    task = "image-to-video" if version == "i2v" else "text-to-video"
    for each in trace(Case("wan_dmd", {"version": version}, {task: (request,)}), tiny_repo("wan_dmd", version=version)):
        assert (each.role, dict(each.unread), dict(each.unused)) == (each.role, {}, {})


def test_one_copy_crosses_the_wire_and_no_noise(fast: FastVideo) -> None:
    state = fast.roles["encoder"].run(triptych.Request(**fast.call, num_videos_per_prompt=3))
    tensors = {name: len(value) for name, value in state.fields.items() if isinstance(value, torch.Tensor)}
    expected = {"prompt_embeds", "image_embeds", "image_condition"} if fast.version == "i2v" else {"prompt_embeds"}
    assert tensors == dict.fromkeys(expected, 1)


def test_frames_per_second_are_those_of_the_published_models(fast: FastVideo) -> None:
    assert fast.model.generate(**fast.call, seed=7).fps == (24 if fast.version == "2.2-5b" else 16)


@pytest.mark.parametrize(
    ("version", "changes", "error", "message"),
    [
        ("2.1", {"timesteps": []}, ParameterError, "timesteps=.*a list of finite numbers is accepted"),
        ("2.1", {"timesteps": 3}, ParameterError, "timesteps=3: a list of finite numbers"),
        ("2.1", {"timesteps": [1000, 1000]}, ParameterError, "falling whole numbers"),
        ("2.1", {"timesteps": [500, 1000]}, ParameterError, "falling whole numbers"),
        ("2.1", {"timesteps": [1001, 500]}, ParameterError, "falling whole numbers"),
        ("2.1", {"timesteps": [1000, 0]}, ParameterError, "falling whole numbers"),
        ("2.1", {"timesteps": [1000, 0.5]}, ParameterError, "falling whole numbers"),
        ("2.1", {"num_inference_steps": 4}, ParameterError, "num_inference_steps=4: `timesteps` says the steps: 3"),
        ("2.1", {"guidance_scale": 3.0}, ParameterError, "guidance_scale=3.0: .*takes no guidance"),
        ("2.1", {"negative_prompt": "ugly"}, UnknownParameterError, "no parameter 'negative_prompt'"),
        ("2.1", {"image": FRAME}, UnknownParameterError, "no parameter 'image'"),
        ("2.1", {"height": 40}, ParameterError, "height=40: .* multiple of 16 .* 32 or 48"),
        ("2.1", {"num_frames": 4}, ParameterError, "num_frames=4: a multiple of 2, plus 1, .* 3 or 5"),
        ("2.1", {"prompt": None}, UsageError, "`prompt` or `prompt_embeds`"),
        ("2.1", {"prompt": None, "prompt_embeds": 3}, ParameterError, "prompt_embeds=3: a tensor"),
        ("2.1", {"latents": 3}, ParameterError, "latents=3: a tensor"),
        ("2.1", {"latents": torch.zeros(6, 3, 8, 12)}, ParameterError, r"latents=.*\(any, 6, any, any, any\)"),
        ("i2v", {"latents": torch.zeros(1, 6, 3, 8, 10)}, ParameterError, r"latents=.*\(1, 6, 3, 8, 12\)"),
        ("i2v", {"image": None}, ParameterError, "image=None: the video's first frame is missing"),
        ("i2v", {"image": [FRAME, FRAME]}, ParameterError, "one image is accepted, not 2"),
        ("i2v", {"last_image": FRAME}, ParameterError, "from its first frame only"),
        ("i2v", {"guidance_scale": 3.0}, ParameterError, "takes no guidance"),
    ],
)
def test_what_cannot_be_done_is_refused_with_a_reason(
    tiny_repo: TinyRepo, version: str, changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    server = triptych.load(tiny_repo("wan_dmd", version=version), role="server", device="cpu")
    with pytest.raises(error, match=message):
        server.admit(triptych.Request(**call_of(version, **changes)))


@pytest.mark.parametrize(
    ("version", "option", "message"),
    [
        ("2.1", {"boundary_ratio": 0.9}, "second transformer|no component 'transformer_2'"),
        ("i2v", {"expand_timesteps": True}, "no image to video for TI2V-5B"),
    ],
)
def test_models_that_fastvideo_has_no_such_loop_for_are_refused(
    tiny_repo: TinyRepo, version: str, option: dict[str, Any], message: str, tmp_path: Path
) -> None:
    repo = shutil.copytree(tiny_repo("wan_dmd", version=version), tmp_path / "repo")
    index = json.loads((repo / "model_index.json").read_text())
    (repo / "model_index.json").write_text(json.dumps({**index, **option}))
    with pytest.raises(ModelError, match=message):
        triptych.load(repo, device="cpu")


def test_every_role_has_its_turn_once(fast: FastVideo) -> None:
    state = fast.model.admit(triptych.Request(**fast.call))
    assert tuple(role.value for role in state.route) == ROLES
