"""Tiny repositories are worth comparing on: diffusers runs them, and whatever goes in changes what comes out."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from transformers import Qwen3ForCausalLM

from . import as_variant, build, cast, header_only, shard

# Far above rounding (1e-6), below the weakest real effect; of pixels between 0 and 1, on average.
VISIBLE = 5e-4


@dataclass(frozen=True)
class Case:
    """One repository, a call of its pipeline, and changes of that call that each must show."""

    family: str
    variant: dict[str, str | bool]
    call: dict[str, Any]
    shape: tuple[int, ...]
    changes: dict[str, dict[str, Any]] = field(default_factory=dict)
    without_effect: dict[str, dict[str, Any]] = field(default_factory=dict)


def picture(shade: int) -> Image.Image:
    """A reference image: two gradients, and one channel that is `shade` everywhere."""
    down, right = Image.linear_gradient("L").resize((80, 64)), Image.linear_gradient("L").rotate(90).resize((80, 64))
    return Image.merge("RGB", (down, right, Image.new("L", (80, 64), shade)))


KLEIN = {"height": 64, "width": 48, "num_inference_steps": 4, "guidance_scale": 4.0}
QWEN = {"height": 64, "width": 48, "num_inference_steps": 4, "true_cfg_scale": 4.0, "negative_prompt": "blurred"}
WAN = {
    "height": 32,
    "width": 48,
    "num_frames": 5,
    "num_inference_steps": 4,
    "guidance_scale": 5.0,
    "negative_prompt": "blurred",
}
WAN_CHANGES: dict[str, dict[str, Any]] = {
    "guidance": {"guidance_scale": 3.0},
    "negative prompt": {"negative_prompt": "ugly colours"},
}
CASES = {
    "klein": Case(
        "flux2_klein",
        {},
        KLEIN,
        (1, 3, 64, 48),
        {
            "guidance": {"guidance_scale": 2.0},
            "reference image": {"image": picture(30)},
            "two reference images": {"image": [picture(30), picture(200)]},
            "sequence length": {"max_sequence_length": 64},
        },
    ),
    "klein with a reference image": Case(
        "flux2_klein",
        {},
        {**KLEIN, "image": picture(30)},
        (1, 3, 64, 48),
        {"reference image": {"image": picture(200)}, "guidance": {"guidance_scale": 2.0}},
    ),
    "klein distilled": Case(
        "flux2_klein",
        {"is_distilled": True},
        KLEIN,
        (1, 3, 64, 48),
        {"reference image": {"image": picture(30)}},
        {"guidance": {"guidance_scale": 2.0}},
    ),
    "qwen image": Case(
        "qwen_image",
        {},
        QWEN,
        (1, 3, 64, 48),
        {"guidance": {"true_cfg_scale": 2.0}, "negative prompt": {"negative_prompt": "ugly colours"}},
    ),
    "wan 2.1": Case("wan", {"version": "2.1"}, WAN, (1, 5, 3, 32, 48), WAN_CHANGES),
    "wan 2.2": Case(
        "wan",
        {"version": "2.2"},
        WAN,
        (1, 5, 3, 32, 48),
        {**WAN_CHANGES, "guidance of the second transformer": {"guidance_scale_2": 2.0}},
    ),
    "wan 2.2-5b": Case("wan", {"version": "2.2-5b"}, WAN, (1, 5, 3, 32, 48), WAN_CHANGES),
}


class Subject:
    """A loaded repository: runs its case's call, with changes."""

    def __init__(self, case: Case, repo: Path, dtype: torch.dtype = torch.float32) -> None:
        self.case = case
        self.repo = repo
        self.pipeline = DiffusionPipeline.from_pretrained(repo, dtype=dtype)
        self.pipeline.set_progress_bar_config(disable=True)
        self.output = self.run()

    def run(self, *, prompt: str = "a red fox", seed: int = 7, **changes: Any) -> torch.Tensor:
        generator = torch.Generator("cpu").manual_seed(seed)
        call = {"output_type": "pt", **self.case.call, **changes}
        result = self.pipeline(prompt=prompt, generator=generator, **call)
        output: torch.Tensor = result.frames if "frames" in result else result.images
        return output


def effect(one: torch.Tensor, other: torch.Tensor) -> float:
    return (one - other).abs().mean().item()


@pytest.fixture(scope="module", params=CASES)
def subject(request: pytest.FixtureRequest, tiny_repo: Callable[..., Path]) -> Subject:
    case = CASES[request.param]
    return Subject(case, tiny_repo(case.family, **case.variant))


def test_the_output_has_the_size_asked_for_and_is_neither_constant_nor_saturated(subject: Subject) -> None:
    output = subject.output
    assert output.shape == subject.case.shape
    assert output.isfinite().all()
    assert output.std() > 0.05
    assert ((output <= 0) | (output >= 1)).float().mean() < 0.05


def test_the_same_call_gives_the_same_output(subject: Subject) -> None:
    assert torch.equal(subject.run(), subject.output)


def test_height_and_width_can_change_places(subject: Subject) -> None:
    height, width = subject.case.call["width"], subject.case.call["height"]
    assert subject.run(height=height, width=width).shape[-2:] == (height, width)


def test_seed_and_prompt_each_change_the_output(subject: Subject) -> None:
    assert effect(subject.run(seed=8), subject.output) > VISIBLE
    assert effect(subject.run(prompt="a blue cat"), subject.output) > VISIBLE


def test_everything_else_of_the_request_changes_the_output(subject: Subject) -> None:
    effects = {name: effect(subject.run(**change), subject.output) for name, change in subject.case.changes.items()}
    assert min(effects.values()) > VISIBLE, effects
    for change in subject.case.without_effect.values():
        assert torch.equal(subject.run(**change), subject.output)


def test_no_tensor_of_the_repository_is_constant(subject: Subject) -> None:
    files = sorted(subject.repo.rglob("*.safetensors"))
    assert files
    for file in files:
        for name, tensor in load_file(file).items():
            assert tensor.numel() == 1 or tensor.min() < tensor.max(), f"{file.parent.name}: {name}"


def test_a_repository_is_small_and_complete(subject: Subject) -> None:
    assert sum(file.stat().st_size for file in subject.repo.rglob("*") if file.is_file()) < 3_000_000
    assert not any(parameter.is_meta for part in modules(subject.pipeline).values() for parameter in part.parameters())


@pytest.mark.parametrize("version", ["2.2"])
def test_both_transformers_of_wan_run_within_four_steps(tiny_repo: Callable[..., Path], version: str) -> None:
    subject = Subject(CASES[f"wan {version}"], tiny_repo("wan", version=version))
    calls: list[str] = []
    for name in ("transformer", "transformer_2"):
        getattr(subject.pipeline, name).register_forward_hook(lambda *_, name=name: calls.append(name))
    subject.run()
    assert calls == ["transformer"] * 4 + ["transformer_2"] * 4  # two steps each, two branches of guidance a step


def test_a_pipeline_without_its_autoencoder_guesses_another_geometry(subject: Subject) -> None:
    names = ("vae_scale_factor", "vae_scale_factor_spatial", "vae_scale_factor_temporal")
    hollow = type(subject.pipeline)(**dict.fromkeys(subject.pipeline.components))
    compared = [(getattr(subject.pipeline, name), getattr(hollow, name)) for name in names if hasattr(hollow, name)]
    assert compared
    assert all(real != guessed for real, guessed in compared), compared


def test_a_repository_runs_in_bfloat16(subject: Subject) -> None:
    narrow = Subject(subject.case, subject.repo, torch.bfloat16)
    assert narrow.output.isfinite().all()
    # The same picture, coarsely: rounding neither blows up nor disappears.
    assert 0 < effect(narrow.output.float(), subject.output) < 0.1


def test_the_template_of_qwen_image_is_34_tokens(tiny_repo: Callable[..., Path]) -> None:
    pipeline = DiffusionPipeline.from_pretrained(tiny_repo("qwen_image"), dtype=torch.float32)
    before, _, after = pipeline.prompt_template_encode.partition("{}")
    assert len(pipeline.tokenizer(before).input_ids) == pipeline.prompt_template_encode_start_idx
    assert len(pipeline.tokenizer(after).input_ids) > 0


@pytest.mark.parametrize("family", ["flux2_klein", "qwen_image", "wan"])
def test_a_seed_decides_every_weight(family: str, tiny_repo: Callable[..., Path], tmp_path: Path) -> None:
    first, again, other = tiny_repo(family), tmp_path / "again", tmp_path / "other"
    build(family, again)
    build(family, other, seed=1)
    for file in first.rglob("*.safetensors"):
        inside = file.relative_to(first)
        assert file.read_bytes() == (again / inside).read_bytes()
        assert file.read_bytes() != (other / inside).read_bytes()


@pytest.mark.parametrize("variant", [None, "fp16"])
@pytest.mark.parametrize("family", ["flux2_klein", "wan"])
def test_a_sharded_repository_or_variant_holds_the_same_weights(
    family: str, variant: str | None, tiny_repo: Callable[..., Path], tmp_path: Path
) -> None:
    repo = shutil.copytree(tiny_repo(family), tmp_path / "repo")
    for component in ("text_encoder", "transformer", "vae"):
        assert len(shard(repo, component)) > 1
        if variant:
            as_variant(repo, component, variant)
    assert_equal_weights(tiny_repo(family), repo, variant=variant)


def test_a_variant_in_single_files_holds_the_same_weights(tiny_repo: Callable[..., Path], tmp_path: Path) -> None:
    repo = shutil.copytree(tiny_repo("qwen_image"), tmp_path / "repo")
    for component in ("text_encoder", "transformer", "vae"):
        as_variant(repo, component)
    assert_equal_weights(tiny_repo("qwen_image"), repo, variant="fp16")


def test_cast_stores_another_dtype(tiny_repo: Callable[..., Path], tmp_path: Path) -> None:
    repo = shutil.copytree(tiny_repo("flux2_klein"), tmp_path / "repo")
    shard(repo, "vae")
    cast(repo, "bfloat16")
    for file in repo.rglob("*.safetensors"):
        assert {t.dtype for t in load_file(file).values()} <= {torch.bfloat16, torch.int64}
    built = build("flux2_klein", tmp_path / "built", dtype="bfloat16")
    assert_equal_weights(repo, built, dtype=torch.bfloat16)
    # The pipeline's own from_pretrained knows no "auto"; the model's finds it in config.json.
    assert Qwen3ForCausalLM.from_pretrained(built / "text_encoder", dtype="auto").dtype == torch.bfloat16


def test_header_only_keeps_headers_and_no_weights(tiny_repo: Callable[..., Path], tmp_path: Path) -> None:
    repo = shutil.copytree(tiny_repo("qwen_image"), tmp_path / "repo")
    header_only(repo)
    for file in repo.rglob("*.safetensors"):
        size = file.stat().st_size
        assert size == 8 + int.from_bytes(file.read_bytes()[:8], "little")
        with pytest.raises(SafetensorError), safe_open(file, "pt"):
            pass


def modules(pipeline: DiffusionPipeline) -> dict[str, torch.nn.Module]:
    return {name: part for name, part in pipeline.components.items() if isinstance(part, torch.nn.Module)}


def assert_equal_weights(
    one: Path, other: Path, *, variant: str | None = None, dtype: torch.dtype = torch.float32
) -> None:
    expected = modules(DiffusionPipeline.from_pretrained(one, dtype=dtype))
    loaded = modules(DiffusionPipeline.from_pretrained(other, variant=variant, dtype=dtype))
    assert loaded.keys() == expected.keys()
    for name, part in expected.items():
        weights = loaded[name].state_dict()
        assert weights.keys() == part.state_dict().keys()
        for key, tensor in part.state_dict().items():
            assert torch.equal(weights[key], tensor), f"{name}: {key}"
