"""`triptych families`: what is supported."""

import json

import pytest
from diffusers import Flux2KleinPipeline

from triptych.cli import run


def test_every_family_is_listed_with_its_tasks_and_the_roles_they_run_through(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(["families", "--json"]) == 0
    described = json.loads(capsys.readouterr().out)
    assert {"Flux2KleinPipeline", "QwenImagePipeline", "WanPipeline"} <= set(described)
    tasks = described["Flux2KleinPipeline"]["tasks"]
    assert list(tasks) == ["text-to-image", "edit"]
    assert tasks["edit"]["roles"] == ["encoder", "denoiser", "decoder"]
    assert "reference" in tasks["edit"]["description"]
    assert "parameters" not in described["Flux2KleinPipeline"]


def test_the_table_names_the_pipelines_and_their_tasks(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["families"]) == 0
    shown = capsys.readouterr().out
    assert "WanPipeline" in shown
    assert "text-to-video" in shown


def test_one_family_is_shown_with_its_parameters_and_their_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["families", "Flux2KleinPipeline"]) == 0
    rows = {line.split()[0]: line.split()[1:] for line in capsys.readouterr().out.splitlines() if line.split()}
    default = Flux2KleinPipeline.__call__.__kwdefaults__ or {}
    assert rows["num_inference_steps"] == [str(default.get("num_inference_steps", 50)), "--steps"]
    assert rows["max_sequence_length"][-1] == "--max-sequence-length"
    assert rows["sigmas"] == ["None", "--param", "sigmas"]
    assert "generator" not in rows
    assert "WanPipeline" not in rows


def test_an_unknown_family_is_a_usage_error_that_names_the_closest(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["families", "WanPipelin"]) == 2
    captured = capsys.readouterr()
    assert "did you mean 'WanPipeline'" in captured.err
    assert captured.out == ""
