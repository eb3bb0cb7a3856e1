"""The published checkpoints of docs/published, and the page that tools/published.py makes of them."""

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import transformers

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))

import published
from published import Published

from triptych.cli import run
from triptych.pipelines.registry import families

SPLIT = ("encoder", "denoiser", "decoder")
HALVES = {"encode": r"encoder\.|quant_conv\.|bn\.", "decode": r"decoder\.|post_quant_conv\.|bn\."}
RULES = {
    # What a role uses of its components, as a rule on the names of the weights; what is not named here, it uses none of.
    ("flux2-klein-4b", "encoder"): {
        "text_encoder": r"model\.(embed_tokens|layers\.(\d|1\d|2[0-6]))\.",
        "vae": HALVES["encode"],
    },
    ("flux2-dev", "encoder"): {
        "text_encoder": r"model\.language_model\.(embed_tokens|layers\.[12]?\d)\.",
        "vae": HALVES["encode"],
    },
    ("flux2-dev", "decoder"): {"vae": HALVES["decode"]},
    ("qwen-image", "encoder"): {"text_encoder": r"model\.language_model\."},
    ("qwen-image", "decoder"): {"vae": r"(decoder(?!.*time_conv)|post_quant_conv)\."},
    ("z-image-turbo", "encoder"): {"text_encoder": r"embed_tokens\.|layers\.([12]?\d|3[0-4])\."},
    ("wan2.1-i2v-14b-480p", "encoder"): {
        "text_encoder": "",
        "image_encoder": r"vision_model\.(embeddings|pre_layrnorm|encoder\.layers\.([12]?\d|30)\.)",
        "vae": HALVES["encode"],
    },
    ("wan2.2-t2v-a14b", "denoiser"): {"transformer": "", "transformer_2": ""},
    ("hunyuanvideo-1.5-480p-t2v", "encoder"): {
        "text_encoder": r"embed_tokens\.|layers\.(1?\d|2[0-5])\.",
        "text_encoder_2": "",
    },
}
"""Checkpoint and role to component to the names of what it loads, from the start of the name."""

ENCODES_WITH_WHOLE_MODELS = {
    "flux1-dev", "flux1-schnell", "sd3.5-large", "wan2.1-t2v-1.3b", "wan2.1-t2v-14b", "wan2.2-t2v-a14b",
    "wan2.2-ti2v-5b", "fastwan2.1-t2v-1.3b", "fastwan2.1-t2v-14b-480p", "fastwan2.2-ti2v-5b",
}  # fmt: skip
"""T5 and CLIP's text model are run to their end, and text to image and to video encodes no picture."""


@pytest.fixture(scope="module", autouse=True)
def leave_memory_untouched() -> Iterator[None]:
    """Parameters are moved to the meta device as they are made; deterministic algorithms would first fill each."""
    before = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = False
    yield
    torch.utils.deterministic.fill_uninitialized_memory = before


@pytest.fixture(scope="module")
def plans() -> dict[str, tuple[Published, dict[str, Any]]]:
    return {each.name: (each, published.planned(each)) for each in published.published()}


def test_the_page_in_the_tree_is_the_one_that_is_made_of_the_code(
    plans: dict[str, tuple[Published, dict[str, Any]]],
) -> None:
    assert published.PAGE.read_text(encoding="utf-8") == published.page(plans.values()), "run: make families-page"


def test_the_page_lists_what_the_command_line_lists(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["families", "--json"]) == 0
    page = published.PAGE.read_text(encoding="utf-8")
    for pipeline, family in json.loads(capsys.readouterr().out).items():
        assert f"| `{pipeline}` |" in page
        for task, about in family["tasks"].items():
            assert f"| {task} | {about['description']} | {' > '.join(about['roles'])} |" in page


def test_every_class_served_has_a_published_checkpoint_and_every_checkpoint_is_served() -> None:
    described = {Published.read(folder).pipeline for folder in published.CHECKPOINTS.iterdir()}
    assert described <= set(families())
    assert set(families()) - described == {"WanImageToVideoDmdPipeline"}, "FastVideo has published no model of it"


def test_no_role_loads_more_than_a_split_by_names_would(plans: dict[str, tuple[Published, dict[str, Any]]]) -> None:
    for name, (_, plan) in plans.items():
        for role, loaded in plan["roles"].items():
            assert loaded["bytes"] <= published.by_name(plan, role), (name, role)


def test_less_is_loaded_where_a_part_is_not_used(plans: dict[str, tuple[Published, dict[str, Any]]]) -> None:
    saved = {
        (name, role) for name, (_, plan) in plans.items() for role in SPLIT
        if plan["roles"][role]["bytes"] < published.by_name(plan, role)
    }  # fmt: skip
    assert {name for name, role in saved if role == "decoder"} == set(plans), "an autoencoder's encoding half"
    assert {name for name, role in saved if role == "encoder"} == set(plans) - ENCODES_WITH_WHOLE_MODELS
    # Names give the two autoencoders of LTX-2 to the decoder; the denoiser uses their statistics only.
    assert {name for name, role in saved if role == "denoiser"} == {"ltx-2", "ltx-2-image"}


def test_every_component_is_loaded_by_its_parts_where_parts_are_needed(
    plans: dict[str, tuple[Published, dict[str, Any]]],
) -> None:
    for name, (_, plan) in plans.items():
        assert plan["notes"] == [], name


@pytest.mark.parametrize(("name", "role"), RULES)
def test_planned_bytes_are_those_of_the_weights_named(
    plans: dict[str, tuple[Published, dict[str, Any]]], name: str, role: str
) -> None:
    checkpoint, plan = plans[name]
    planned = {part: each["bytes"] for part, each in plan["roles"][role]["components"].items() if each["bytes"]}
    assert planned == {
        component: sum(
            tensor.numel() * getattr(torch, checkpoint.components[component]["dtype"]).itemsize
            if tensor.is_floating_point() else tensor.nbytes
            for key, tensor in built(checkpoint, component).items() if re.match(rule, key)
        )
        for component, rule in RULES[name, role].items()
    }  # fmt: skip


def built(checkpoint: Published, component: str) -> dict[str, torch.Tensor]:
    """Return the weights of the library's own class, without data, under that class's names; tied ones once."""
    library, cls = checkpoint.entries[component]
    config = json.loads(checkpoint.config(component))
    with torch.device("meta"):
        if library == "diffusers":
            module = getattr(diffusers, cls).from_config(config)
        else:
            kind = getattr(transformers, cls)
            module = kind(kind.config_class.from_dict(config))
    first: dict[int, str] = {}
    state = module.state_dict(keep_vars=True)
    for key, tensor in state.items():
        first.setdefault(id(tensor), key)
    return {key: state[key] for key in first.values()}


def test_configurations_give_as_many_weights_as_the_published_files_have(
    plans: dict[str, tuple[Published, dict[str, Any]]],
) -> None:
    for checkpoint, _ in plans.values():
        for name, about in checkpoint.components.items():
            if not {"parameters", "file_bytes"} & set(about):
                continue
            state = published.state_of(*checkpoint.entries[name], checkpoint.config(name))
            elements = sum(tensor.numel() for tensor in state.values() if tensor.is_floating_point())
            assert elements == about.get("parameters", elements), (checkpoint.name, name)
            stored = elements * getattr(torch, about["dtype"]).itemsize
            assert about.get("file_bytes", stored) == pytest.approx(stored, rel=0.01), (checkpoint.name, name)


def test_a_checkpoint_is_described_by_configurations_and_where_they_come_from() -> None:
    for folder in published.CHECKPOINTS.iterdir():
        checkpoint = Published.read(folder)
        files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
        configs = {
            f"{name}/{'config.json' if 'dtype' in about else 'scheduler_config.json'}"
            for name, about in checkpoint.components.items()
        }
        assert files == {"model_index.json", "source.json", *configs}
        for about in checkpoint.components.values():
            assert about["source"]
            assert about["verified"] == ("why" not in about)
            assert ("dtype" in about) == ("dtype_source" in about)
