"""The plan: what each role would load, from headers and configurations alone."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file

import triptych
from triptych.errors import ModelError, ParameterError


@pytest.fixture(scope="module")
def klein(tiny_repo: Callable[..., Path]) -> Path:
    return tiny_repo("flux2_klein")


def test_a_plan_says_exactly_what_each_role_then_loads(klein: Path) -> None:
    planned = triptych.plan(klein)
    for role in ("encoder", "denoiser", "decoder", "monolithic"):
        loaded = triptych.load(klein, role=role, device="cpu").loaded_bytes
        assert {name: part.bytes for name, part in planned[role].items()} == loaded
        assert planned.role_bytes(role) == sum(loaded.values())


def test_what_the_roles_load_is_less_than_the_whole(klein: Path) -> None:
    planned = triptych.plan(klein)
    encoder = planned["encoder"]
    assert "transformer" not in encoder
    assert 0 < encoder["text_encoder"].bytes < encoder["text_encoder"].whole_bytes
    assert planned["denoiser"]["vae"].bytes == 0
    halves = encoder["vae"].bytes + planned["decoder"]["vae"].bytes
    statistics = 2 * 24 * 4 + 8  # mean and variance of 24 channels, and a counter, are in both halves
    assert halves == planned.whole["vae"] + statistics


def test_fewer_tasks_need_less(klein: Path) -> None:
    drawing = triptych.plan(klein, tasks=["text-to-image"])
    assert drawing["encoder"]["vae"].bytes == 0
    assert drawing.tasks == ["text-to-image"]
    assert drawing.role_bytes("encoder") < triptych.plan(klein).role_bytes("encoder")


def test_a_plan_needs_no_weights_only_headers(klein: Path, tmp_path: Path) -> None:
    shutil.copytree(klein, tmp_path / "headers")
    tiny.header_only(tmp_path / "headers")
    assert triptych.plan(tmp_path / "headers").roles == triptych.plan(klein).roles
    with pytest.raises(ModelError, match="truncated"):
        triptych.load(tmp_path / "headers", role="decoder", device="cpu")


def test_bytes_follow_the_dtype(klein: Path) -> None:
    full, half = triptych.plan(klein, dtype="float32"), triptych.plan(klein, dtype="bfloat16")
    assert half["denoiser"]["transformer"].bytes * 2 == full["denoiser"]["transformer"].bytes
    mixed = triptych.plan(klein, dtype={"transformer": "bf16", "default": "float32"})
    assert mixed["denoiser"]["transformer"].dtype == "bfloat16"
    assert mixed["decoder"]["vae"] == full["decoder"]["vae"]


@pytest.mark.parametrize(
    ("named", "asked", "expected"),
    [(None, "auto", "bfloat16"), ("float16", "auto", "float16"), ("float16", "float32", "float32")],
)
def test_without_weight_files_the_dtype_is_the_asked_the_configured_or_bfloat16(
    klein: Path, tmp_path: Path, named: str | None, asked: str, expected: str
) -> None:
    shutil.copytree(klein, tmp_path / "bare")
    for file in (tmp_path / "bare").rglob("*.safetensors"):
        file.unlink()
    config = tmp_path / "bare/transformer/config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), **({"torch_dtype": named} if named else {})}))
    planned = triptych.plan(tmp_path / "bare", dtype=asked)
    transformer = planned["denoiser"]["transformer"]
    assert transformer.dtype == expected
    whole = triptych.plan(klein, dtype=expected)["denoiser"]["transformer"].bytes
    assert transformer.bytes == whole
    assert any("transformer" in note for note in planned.notes) == (asked == "auto")


def test_what_no_role_uses_need_not_be_there(klein: Path, tmp_path: Path) -> None:
    repo = shutil.copytree(klein, tmp_path / "repo")
    index = json.loads((repo / "model_index.json").read_text())
    index["feature_extractor"] = ["transformers", "CLIPFeatureExtractorOfOld"]
    (repo / "model_index.json").write_text(json.dumps(index))
    planned = triptych.plan(repo)
    assert planned.whole["feature_extractor"] == 0
    assert {**planned.whole, "feature_extractor": 0} == {**triptych.plan(klein).whole, "feature_extractor": 0}
    assert any("feature_extractor is used by no role" in note for note in planned.notes)
    index["vae"] = ["diffusers", "AutoencoderOfOld"]
    (repo / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match="'AutoencoderOfOld'"):
        triptych.plan(repo)


def test_weights_in_a_pickle_are_counted_by_their_files(klein: Path, tmp_path: Path) -> None:
    repo = shutil.copytree(klein, tmp_path / "repo")
    file = repo / "transformer/diffusion_pytorch_model.safetensors"
    torch.save(load_file(file), file.with_suffix(".bin"))
    file.unlink()
    planned = triptych.plan(repo)
    size = file.with_suffix(".bin").stat().st_size
    assert planned["denoiser"]["transformer"].bytes == planned.whole["transformer"] == size
    (note,) = (note for note in planned.notes if "dtype" in note)
    assert note.startswith("transformer has no safetensors file, and a dtype has to be named to load it")


def test_a_plan_becomes_json_and_back(klein: Path) -> None:
    planned = triptych.plan(klein)
    plain = json.loads(json.dumps(planned.to_dict()))
    assert plain["roles"]["encoder"]["bytes"] == planned.role_bytes("encoder")
    assert plain["whole"]["bytes"] == planned.whole_bytes == sum(planned.whole.values())


def test_an_unknown_task_names_those_there_are(klein: Path) -> None:
    with pytest.raises(ParameterError, match=r"tasks='text-to-video'.*text-to-image, edit"):
        triptych.plan(klein, tasks="text-to-video")
