"""Wan gives what diffusers gives, whole and split, and refuses what it cannot do."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from diffusers import DiffusionPipeline

import triptych
from triptych.errors import ModelError, ParameterError, UnknownParameterError, UsageError
from triptych.runtime.model import Model

from .parity import (
    FORWARD_TOLERANCE,
    PIXEL_TOLERANCE,
    ROLES,
    Forwards,
    Parity,
    assert_joined_within_tolerance,
    assert_same,
    differ,
    in_both_dtypes,
)

VERSIONS = ("2.1", "2.2", "2.2-5b")
TinyRepo = Callable[..., Path]

PROMPT = "a red fox"
NEGATIVE = "blurred, ugly colours and background"
CALL: dict[str, Any] = {
    "prompt": PROMPT,
    "height": 32,
    "width": 48,
    "num_frames": 5,
    "num_inference_steps": 4,
    "max_sequence_length": 24,
    "guidance_scale": 1.0,
}
GUIDED: dict[str, Any] = {**CALL, "negative_prompt": NEGATIVE, "guidance_scale": 4.0}


@pytest.fixture(scope="module", params=in_both_dtypes(VERSIONS))
def either(request: pytest.FixtureRequest, tiny_repo: TinyRepo) -> Parity:
    """Every version in both dtypes. The bfloat16 oracle is `from_pretrained(dtype=torch.bfloat16)`."""
    version, dtype = request.param
    return Parity(tiny_repo("wan", version=version), dtype)


@pytest.fixture(scope="module", params=VERSIONS)
def wan(request: pytest.FixtureRequest, tiny_repo: TinyRepo) -> Parity:
    return Parity(tiny_repo("wan", version=request.param))


@pytest.fixture(scope="module")
def wan22(tiny_repo: TinyRepo) -> Parity:
    return Parity(tiny_repo("wan", version="2.2"))


def edited(repo: Path, target: Path, file: str, **changes: object) -> Path:
    """A copy of a repository with other values in one of its JSON files."""
    shutil.copytree(repo, target)
    values = json.loads((target / file).read_text())
    (target / file).write_text(json.dumps({**values, **changes}))
    return target


@pytest.mark.parametrize(("height", "width", "num_frames"), [(32, 48, 5), (64, 32, 3)])
@pytest.mark.parametrize("seed", [7, 2**40 + 1])
def test_guided_videos_are_those_of_diffusers(
    either: Parity, seed: int, height: int, width: int, num_frames: int
) -> None:
    either.check(**{**GUIDED, "height": height, "width": width, "num_frames": num_frames}, seed=seed)


def test_videos_without_guidance_are_those_of_diffusers(either: Parity) -> None:
    plain = either.check(**CALL)
    assert_same(either.check(**{**GUIDED, "guidance_scale": 1.0}), plain, "a negative prompt without guidance")
    assert differ(either.check(**GUIDED), plain)


def test_several_videos_of_one_prompt_are_one_batch_of_diffusers(either: Parity) -> None:
    videos = either.check(**GUIDED, num_videos_per_prompt=2)
    assert len(videos) == 2
    assert differ(videos[0], videos[1])
    either.check(**CALL, num_videos_per_prompt=2)


def test_pil_and_numpy_frames_are_those_of_diffusers(wan: Parity) -> None:
    wan.check(**GUIDED, num_videos_per_prompt=2, output_types=("pil", "np"))


def test_one_frame_is_a_video_too(wan: Parity) -> None:
    assert wan.check(**{**GUIDED, "num_frames": 1}).shape[1] == 1


def test_components_may_have_dtypes_of_their_own(wan: Parity) -> None:
    # As Wan is published: the autoencoder in float32, the rest in bfloat16. The embeddings are cast twice over.
    for narrow in ("transformer", "text_encoder"):
        dtypes = {"default": torch.float32, narrow: torch.bfloat16, "transformer_2": torch.bfloat16}
        dtypes |= {} if narrow == "transformer" else {"transformer_2": torch.float32}
        dtypes = {name: dtype for name, dtype in dtypes.items() if name in ("default", *wan.pipeline.components)}
        oracle = DiffusionPipeline.from_pretrained(wan.repo, dtype=dtypes)
        oracle.set_progress_bar_config(disable=True)
        expected = oracle(**GUIDED, generator=torch.Generator().manual_seed(7), output_type="pt").frames
        present = {name: dtype for name, dtype in dtypes.items() if name in wan.model.components or name == "default"}
        model = triptych.load(wan.repo, device="cpu", dtype=present)
        assert_same(model.generate(**GUIDED, seed=7, output_type="pt").frames, expected, narrow)


def test_each_of_seed_prompt_negative_prompt_scale_and_steps_changes_the_video(wan: Parity) -> None:
    video = wan.check(**GUIDED)
    changes: list[dict[str, Any]] = [
        {"seed": 8},
        {"prompt": "a blue cat"},
        {"negative_prompt": None},
        {"guidance_scale": 2.0},
        {"num_inference_steps": 3},
        {"max_sequence_length": 4},
    ]
    for change in changes:
        assert differ(wan.check(**{**GUIDED, **change}), video), change


def test_the_second_scale_guides_the_second_transformer(wan22: Parity) -> None:
    video = wan22.check(**GUIDED)
    assert_same(wan22.check(**GUIDED, guidance_scale_2=4.0), video, "the default is the first scale")
    for scale in (2.0, 1.0, 0.0):
        assert differ(wan22.check(**GUIDED, guidance_scale_2=scale), video)
    # The first scale alone switches guidance on, as in diffusers.
    assert_same(wan22.check(**CALL, guidance_scale_2=4.0), wan22.check(**CALL), "without guidance")


@pytest.mark.parametrize(("steps", "calls"), [(4, (4, 4)), (1, (2, 0))])
def test_early_steps_run_the_first_transformer_and_late_ones_the_second(
    wan22: Parity, steps: int, calls: tuple[int, int]
) -> None:
    for model in (wan22.model, wan22.roles["denoiser"]):
        with counted(model, "transformer") as first, counted(model, "transformer_2") as second:
            (wan22.whole if model is wan22.model else wan22.split)(**{**GUIDED, "num_inference_steps": steps})
        assert (len(first), len(second)) == calls  # two branches a step


class counted:
    """Lists the forwards of a component, while it is entered."""

    def __init__(self, model: Model, component: str) -> None:
        self.module = model.components[component]

    def __enter__(self) -> list[str]:
        calls: list[str] = []
        self.hook = self.module.register_forward_hook(lambda *_: calls.append("forward"))
        return calls

    def __exit__(self, *_: object) -> None:
        self.hook.remove()


def test_the_second_transformer_is_only_where_it_is_used(wan22: Parity) -> None:
    assert wan22.model.loaded_bytes["transformer_2"] == wan22.roles["denoiser"].loaded_bytes["transformer_2"] > 0
    for role in ("encoder", "decoder"):
        assert "transformer_2" not in wan22.roles[role].components
    server = triptych.load(wan22.repo, role="server", device="cpu")
    assert set(server.components) == {"transformer", "vae"}
    assert not any(server.loaded_bytes.values())


@pytest.mark.parametrize("ratio", [None, 0.0])
def test_the_second_transformer_is_not_loaded_where_no_step_is_below_the_boundary(
    wan22: Parity, ratio: float | None, tmp_path: Path
) -> None:
    parity = Parity(edited(wan22.repo, tmp_path / "repo", "model_index.json", boundary_ratio=ratio))
    assert differ(parity.check(**GUIDED), wan22.check(**GUIDED))
    for model in (parity.model, *parity.roles.values()):
        assert "transformer_2" not in model.components
    if ratio is None:
        with pytest.raises(UsageError, match="`guidance_scale_2` is only supported"):
            parity.whole(**GUIDED, guidance_scale_2=2.0)


def test_a_boundary_without_a_second_transformer_is_an_error_of_the_repository(wan22: Parity, tmp_path: Path) -> None:
    repo = edited(wan22.repo, tmp_path / "repo", "model_index.json", transformer_2=[None, None])
    for role in ("encoder", "denoiser", "monolithic"):
        with pytest.raises(ModelError, match="boundary_ratio=0.8, but no component 'transformer_2'"):
            triptych.load(repo, role=role, device="cpu")


def test_roles_load_what_they_use(wan: Parity) -> None:
    held = {role: {name for name, size in model.loaded_bytes.items() if size} for role, model in wan.roles.items()}
    transformers = {name for name in wan.pipeline.components if name.startswith("transformer")}
    transformers = {name for name in transformers if wan.pipeline.components[name] is not None}
    assert held == {"encoder": {"text_encoder"}, "denoiser": transformers, "decoder": {"vae"}}
    assert wan.roles["encoder"].is_hollow("transformer") and wan.roles["encoder"].is_hollow("vae")


def test_copies_and_noise_do_not_cross_the_wire(wan: Parity) -> None:
    state = wan.roles["encoder"].run(triptych.Request(**GUIDED, num_videos_per_prompt=3))
    tensors = {name: value for name, value in state.fields.items() if isinstance(value, torch.Tensor)}
    assert tensors.keys() == {"prompt_embeds", "negative_prompt_embeds"}
    assert {len(tensor) for tensor in tensors.values()} == {1}
    state = wan.roles["denoiser"].run(state)
    assert [name for name, value in state.fields.items() if isinstance(value, torch.Tensor)] == ["latents"]
    assert state.fields["latents"].dtype == torch.float32


def test_given_latents_take_the_place_of_the_noise(either: Parity) -> None:
    shape = either.diffusers(**GUIDED, output_type="latent").shape
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    assert differ(either.check(**GUIDED, latents=noise), either.check(**GUIDED))


def test_given_latents_decide_the_size_and_number_of_videos_as_in_diffusers(wan: Parity) -> None:
    call = {**GUIDED, "num_inference_steps": 2}
    _, channels, frames, height, width = wan.whole(**call, output_type="latent").shape
    shape = (2, channels, frames + 1, height + 2, width - 2)
    assert len(wan.check(**call, latents=torch.randn(shape, generator=torch.Generator().manual_seed(1)))) == 2


@torch.no_grad()
def encoded(parity: Parity) -> tuple[torch.Tensor, torch.Tensor]:
    """The embeddings of the prompt and the negative prompt."""
    embeds, negative = parity.pipeline.encode_prompt(PROMPT, NEGATIVE, max_sequence_length=24)
    return embeds, negative


def test_given_embeddings_take_the_place_of_the_prompts(either: Parity) -> None:
    embeds, negative = encoded(either)
    call = {name: value for name, value in GUIDED.items() if name not in ("prompt", "negative_prompt")}
    video = either.check(**GUIDED)
    assert_same(either.check(**call, prompt_embeds=embeds, negative_prompt_embeds=negative), video, "both")
    assert_same(either.check(**call, prompt_embeds=embeds, negative_prompt=NEGATIVE), video, "the first")
    assert_same(either.check(**call, prompt=PROMPT, negative_prompt_embeds=negative), video, "the second")
    both = either.check(
        **call, prompt_embeds=torch.cat([embeds, negative]), negative_prompt_embeds=embeds.repeat(2, 1, 1)
    )
    assert len(both) == 2
    assert len(either.check(**call, prompt_embeds=torch.cat([embeds, negative]), negative_prompt=NEGATIVE)) == 2


def test_several_videos_of_given_embeddings_are_those_of_the_prompt(wan: Parity) -> None:
    # diffusers repeats only the embeddings it made itself.
    embeds, negative = encoded(wan)
    call = {name: value for name, value in GUIDED.items() if name not in ("prompt", "negative_prompt")}
    given = {"prompt_embeds": embeds, "negative_prompt_embeds": negative, "num_videos_per_prompt": 2}
    expected = wan.check(**GUIDED, num_videos_per_prompt=2)
    assert_same(wan.whole(**call, **given, output_type="pt"), expected, "whole")
    assert_same(wan.split(**call, **given, output_type="pt"), expected, "split")


def test_a_list_of_prompts_is_as_many_requests(wan: Parity) -> None:
    call = {**GUIDED, "output_type": "pt"}
    prompts = [PROMPT, "a blue cat"]
    expected = torch.cat([wan.diffusers(**{**call, "prompt": prompt}) for prompt in prompts])
    assert_same(wan.whole(**{**call, "prompt": prompts}), expected, "a list of prompts")


def test_prompts_are_cleaned_as_diffusers_cleans_them(wan: Parity) -> None:
    # Quotes are straightened by ftfy, which is among our dependencies because diffusers uses it where it finds it.
    cleaned = wan.check(**{**GUIDED, "prompt": "  a “red”\n &amp;lt;fox&amp;gt; "})
    assert_same(cleaned, wan.check(**{**GUIDED, "prompt": 'a "red" <fox>'}), "cleaned")
    assert differ(cleaned, wan.check(**{**GUIDED, "prompt": "a red fox"}))


@pytest.mark.parametrize("outputs", [1, 2])
@pytest.mark.parametrize("steps", [4, 8])
def test_joined_branches_stay_within_the_tolerance(
    wan: Parity, outputs: int, steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    call = {**GUIDED, "num_inference_steps": steps, "num_videos_per_prompt": outputs}
    if "transformer_2" not in wan.model.components:
        assert_joined_within_tolerance(wan, "wan_denoising", monkeypatch, call)
        return
    early = Forwards(wan.model, "wan_denoising", monkeypatch)
    with counted(wan.model, "transformer_2") as late:
        exact = wan.whole(**call, output_type="pt")
        assert early.count + len(late) == 2 * steps
        _, expected = early.take()
        late.clear()
        joined = wan.whole(**call, exact=False, output_type="pt")
        assert early.count + len(late) == steps
        _, actual = early.take()
    early.close()
    for one, other in zip(actual, expected, strict=True):
        assert (one - other).abs().max() <= FORWARD_TOLERANCE * other.abs().max()
    torch.testing.assert_close(joined, exact, rtol=0, atol=PIXEL_TOLERANCE)


@pytest.mark.slow  # FLUX.2 [klein] has it among the quick ones
def test_processes_that_hand_over_files_give_the_same_frames(wan22: Parity, tmp_path: Path) -> None:
    wan22.check_in_processes(tmp_path, {**GUIDED, "num_videos_per_prompt": 2}, ("float32", "bfloat16"))


@pytest.mark.slow
@pytest.mark.parametrize("version", ["2.1", "2.2-5b"])
def test_processes_of_the_other_versions_do_so_too(tiny_repo: TinyRepo, version: str, tmp_path: Path) -> None:
    parity = Parity(tiny_repo("wan", version=version))
    parity.check_in_processes(tmp_path, {**GUIDED, "num_videos_per_prompt": 2}, ("float32", "bfloat16"))


def test_the_cache_of_steps_is_told_what_diffusers_tells_it(wan: Parity, monkeypatch: pytest.MonkeyPatch) -> None:
    def contexts(transformer: Any, run: Callable[..., Any]) -> Iterator[tuple[str, dict[str, Any]]]:
        told: list[tuple[str, dict[str, Any]]] = []
        cached = type(transformer).cache_context

        def record(self: Any, name: str, **kwargs: Any) -> Any:
            told.append((name, kwargs))
            return cached(self, name, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(type(transformer), "cache_context", record)
            run(**GUIDED, output_type="latent")
        yield from told

    ours = list(contexts(wan.model.components["transformer"], wan.whole))
    assert ours == list(contexts(wan.pipeline.transformer, wan.diffusers))
    assert [name for name, _ in ours] == ["cond", "uncond"] * 4
    assert set(ours[0][1]) == {"step_index", "sigma", "num_inference_steps"}


def test_frames_per_second_are_those_of_the_published_models(wan: Parity) -> None:
    expected = 24 if wan.pipeline.config.expand_timesteps else 16
    assert wan.model.generate(**CALL, seed=7).fps == expected
    assert wan.model.generate(**CALL, seed=7, output_type="latent").fps == expected


@pytest.mark.parametrize("sampling", [{"flow_shift": 5.0}, {"solver_order": 1}])
def test_the_scheduler_is_the_one_of_the_repository(wan22: Parity, sampling: dict[str, Any], tmp_path: Path) -> None:
    repo = edited(wan22.repo, tmp_path / "repo", "scheduler/scheduler_config.json", **sampling)
    assert differ(Parity(repo).check(**GUIDED), wan22.check(**GUIDED))


def test_a_scheduler_that_steps_in_the_models_dtype_is_followed(either: Parity, tmp_path: Path) -> None:
    repo = edited(either.repo, tmp_path / "repo", "model_index.json")
    index = json.loads((repo / "model_index.json").read_text())
    index["scheduler"] = ["diffusers", "FlowMatchEulerDiscreteScheduler"]
    (repo / "model_index.json").write_text(json.dumps(index))
    config = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 800, "shift": 2.5}
    (repo / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))
    Parity(repo, either.dtype).check(**GUIDED)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"height": 40}, ParameterError, "height=40: .* multiple of 16 .* 32 or 48"),
        ({"width": 5}, ParameterError, "width=5: .* multiple of 16 .* 16$"),
        ({"num_frames": 4}, ParameterError, "num_frames=4: a multiple of 2, plus 1, .* 3 or 5"),
        ({"num_frames": 0}, ParameterError, "num_frames=0: a whole number of at least 1"),
        ({"num_videos_per_prompt": 0}, ParameterError, "num_videos_per_prompt=0"),
        ({"prompt": None}, UsageError, "`prompt` or `prompt_embeds`"),
        ({"prompt_embeds": torch.zeros(1, 2, 18)}, UsageError, "Cannot forward both `prompt`"),
        ({"negative_prompt_embeds": torch.zeros(1, 2, 18)}, UsageError, "Cannot forward both `negative_prompt`"),
        ({"prompt": None, "prompt_embeds": 3}, ParameterError, "prompt_embeds=3: a tensor"),
        ({"prompt": None, "prompt_embeds": torch.zeros(2, 18)}, ParameterError, r"prompt_embeds=.*\(any, any, any\)"),
        ({"negative_prompt": None, "negative_prompt_embeds": "ugly"}, ParameterError, "embeds='ugly': a tensor"),
        ({"latents": 3}, ParameterError, "latents=3: a tensor"),
        ({"latents": torch.zeros(6, 3, 8, 12)}, ParameterError, r"latents=.*\(any, 6, any, any, any\)"),
        ({"latents": torch.zeros(1, 7, 3, 8, 12)}, ParameterError, r"latents=.*\(any, 6, any, any, any\)"),
        (
            {"latents": torch.zeros(3, 6, 3, 8, 12), "num_videos_per_prompt": 2},
            ParameterError,
            r"latents=.*\(2, 6, any, any, any\)",
        ),
        ({"guidance_scale_2": 2.0}, UsageError, "`guidance_scale_2` is only supported"),
        ({"guidance_scale": "4"}, ParameterError, "guidance_scale='4'"),
        ({"num_frame": 5}, UnknownParameterError, "did you mean 'num_frames'"),
        ({"generator": None}, UnknownParameterError, "no parameter 'generator'"),
        ({"attention_kwargs": {"scale": 1.0}}, UnknownParameterError, "no parameter 'attention_kwargs'"),
        ({"output_type": "mp4"}, ParameterError, "output_type='mp4'"),
    ],
)
def test_what_cannot_be_done_is_refused_with_a_reason(
    tiny_repo: TinyRepo, changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    encoder = triptych.load(tiny_repo("wan", version="2.1"), role="encoder", device="cpu")
    with pytest.raises(error, match=message):
        encoder.run(triptych.Request(**{**GUIDED, **changes}))


def test_sizes_fit_the_transformers_patches(tiny_repo: TinyRepo, tmp_path: Path) -> None:
    # The autoencoder shrinks by 4: patches of 6 x 12 latents are 24 x 48 pixels, and the oracle wants multiples of 16.
    repo = edited(tiny_repo("wan"), tmp_path / "repo", "transformer/config.json", patch_size=[1, 6, 12])
    server = triptych.load(repo, role="server", device="cpu")
    assert server.admit(triptych.Request(**{**CALL, "height": 96, "width": 96})).fields["height"] == 96
    with pytest.raises(ParameterError, match="height=64: a multiple of 48 is accepted; the nearest: 48 or 96"):
        server.admit(triptych.Request(**{**CALL, "height": 64, "width": 96}))
    with pytest.raises(ParameterError, match="width=80: a multiple of 48 is accepted; the nearest: 48 or 96"):
        server.admit(triptych.Request(**{**CALL, "height": 96, "width": 80}))


def test_the_defaults_are_those_of_diffusers(wan: Parity) -> None:
    fields = wan.model.admit(triptych.Request(prompt=PROMPT)).fields
    names = ("height", "width", "num_frames", "num_inference_steps", "guidance_scale", "output_type")
    assert [fields[name] for name in names] == [480, 832, 81, 50, 5.0, "np"]


def test_a_sharded_copy_gives_the_same_frames(wan22: Parity, tmp_path: Path) -> None:
    repo = shutil.copytree(wan22.repo, tmp_path / "repo")
    for component in ("transformer", "transformer_2", "vae"):
        tiny.shard(repo, component)
    assert_same(Parity(repo).check(**GUIDED), wan22.check(**GUIDED), "sharded")


def test_a_bfloat16_repository_runs_in_float32_and_by_default_in_bfloat16(tiny_repo: TinyRepo) -> None:
    repo = tiny_repo("wan", version="2.2", dtype="bfloat16")
    assert Parity(repo, "float32").check(**GUIDED).dtype == torch.float32
    Parity(repo, "bfloat16", load_dtype="auto").check(**GUIDED)


def test_every_role_has_its_turn_once(wan: Parity) -> None:
    state = wan.model.admit(triptych.Request(**CALL))
    assert tuple(role.value for role in state.route) == ROLES
