"""From the hub a role downloads its own files and no others; planning reads headers by byte ranges.

The real client against an imitation of the hub on this machine. It fixes its settings when it is imported, so each
machine of the story is a process of its own.
"""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import tiny
from conftest import TinyRepo

from .hub import COMMIT, Hub, serve
from .support import copy

REPO = "someone/klein"
PRELUDE = """
import json, os, sys, urllib.request
import torch
from triptych.components.dtypes import parse_dtype
from triptych.components.loading import load_component
from triptych.components.need import Need
from triptych.components.repository import Repository
from triptych.errors import ModelError

REPO = "someone/klein"
NEEDS = {
    "encoder": {"text_encoder": Need.hidden(9, 18, 27), "tokenizer": Need.FULL, "vae": Need.CONFIG},
    "decoder": {"vae": Need.DECODE},
}

def mark(phase):
    urllib.request.urlopen(f"{os.environ['HF_ENDPOINT']}/mark/{phase}").read()

def load(role, repo=REPO, **options):
    repository = Repository.open(repo, **options)
    bytes = {
        name: load_component(
            repository, name, need, device=torch.device("cpu"), dtypes=parse_dtype("auto", repository), role=role
        ).nbytes
        for name, need in NEEDS[role].items()
    }
    return {"bytes": bytes, "fingerprint": repository.fingerprint, "revision": repository.files.revision}

def error(work, *arguments, **options):
    try:
        work(*arguments, **options)
    except ModelError as error:
        return f"{type(error).__name__}: {error}"
    return "no error"
"""


def machine(hub: Hub, home: Path, script: str, **environment: str) -> dict[str, object]:
    """Run a script in a fresh process with a hub cache of its own; returns what it printed as JSON last."""
    variables = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "TRANSFORMERS_"))}
    src = Path(__file__).parents[2] / "src"
    variables |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "PYTHONPATH": str(src), "NO_PROXY": "127.0.0.1"}
    done = subprocess.run(
        [sys.executable, "-c", PRELUDE + textwrap.dedent(script)],
        env={**variables, **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    answer: dict[str, object] = json.loads(done.stdout.splitlines()[-1])
    return answer


@pytest.fixture(scope="module")
def story(tiny_repo: TinyRepo, tmp_path_factory: pytest.TempPathFactory):
    """An encoder machine plans, loads and loads again offline; a decoder machine loads; then the hub goes away."""
    folder = tmp_path_factory.mktemp("hub")
    root = copy(tiny_repo("flux2_klein"), folder / "repo")
    shards = [f"transformer/{shard.name}" for shard in tiny.shard(root, "transformer")]
    with serve(REPO, root) as hub:
        first = """
            mark("plan")
            repository = Repository.open(REPO)
            told = {name: len(repository.tensors(name)) for name in ("text_encoder", "transformer", "vae")}
            for name in told:
                repository.check_complete(name)
            mark("encoder")
            loaded = load("encoder")
            mark("errors")
            errors = {
                "repository": error(load, "encoder", "someone/kline"),
                "revision": error(load, "encoder", revision="v9"),
                "id": error(load, "encoder", "models/of/klein"),
            }
            print(json.dumps({"told": told, "loaded": loaded, "errors": errors}))
        """
        encoder = machine(hub, folder / "encoder", first)
        decoder = machine(hub, folder / "decoder", 'mark("decoder"); print(json.dumps(load("decoder")))')
        damaged = root / "vae/diffusion_pytorch_model.safetensors"
        whole = damaged.read_bytes()
        damaged.write_bytes(whole[:-8])
        third = 'mark("damaged"); print(json.dumps({"error": error(load, "decoder")}))'
        damage = machine(hub, folder / "damaged", third)
        damaged.write_bytes(whole)
        again = """
            print(json.dumps({
                "loaded": load("encoder"),
                "revision": load("encoder", revision="main"),
                "decoder": error(load, "decoder"),
                "unknown": error(load, "encoder", "someone/else"),
            }))
        """
        hub.phases["offline"] = []
        offline = machine(hub, folder / "encoder", again, HF_HUB_OFFLINE="1")
    unreachable = machine(hub, folder / "encoder", again)
    return hub, shards, {
        "encoder": encoder, "decoder": decoder, "damage": damage, "offline": offline, "unreachable": unreachable
    }  # fmt: skip


def test_planning_reads_headers_by_ranges_and_downloads_no_weights(story) -> None:
    hub, shards, told = story
    assert told["encoder"]["told"]["transformer"] > 10
    assert {name for name in hub.downloads("plan") if name.endswith(".safetensors")} == set()
    ranges = hub.ranges("plan")
    weights = {"text_encoder/model.safetensors", "vae/diffusion_pytorch_model.safetensors", *shards}
    assert {asked.name for asked in ranges} == weights
    assert len(ranges) == len(set(ranges)), "each header is asked for once"


def test_the_encoder_downloads_its_own_files_only(story) -> None:
    hub, _, told = story
    downloads = hub.downloads("encoder") | hub.downloads("plan")
    assert {name for name in downloads if name.endswith(".safetensors")} == {"text_encoder/model.safetensors"}
    assert {name.split("/")[0] for name in downloads} == {
        "model_index.json",
        "text_encoder",
        "tokenizer",
        "vae",
        "transformer",
    }
    assert {name for name in downloads if name.startswith("vae")} == {"vae/config.json"}
    assert {name for name in downloads if name.startswith("transformer")} <= {
        "transformer/diffusion_pytorch_model.safetensors.index.json"  # for the plan
    }
    assert told["encoder"]["loaded"]["bytes"]["vae"] == 0 < told["encoder"]["loaded"]["bytes"]["text_encoder"]


def test_the_decoder_downloads_its_own_files_only(story) -> None:
    hub, _, _ = story
    assert hub.downloads("decoder") == {
        "model_index.json",
        "vae/config.json",
        "vae/diffusion_pytorch_model.safetensors",
    }


def test_both_roles_have_the_same_fingerprint(story) -> None:
    _, _, told = story
    assert told["encoder"]["loaded"]["fingerprint"] == told["decoder"]["fingerprint"]
    assert told["encoder"]["loaded"]["revision"] == told["decoder"]["revision"] == COMMIT


@pytest.mark.parametrize("machine", ["offline", "unreachable"])
def test_a_role_that_was_loaded_once_loads_without_the_hub(story, machine: str) -> None:
    hub, _, told = story
    assert told[machine]["loaded"] == told["encoder"]["loaded"] == told[machine]["revision"]
    assert hub.phases["offline"] == []
    assert told[machine]["decoder"].startswith("ComponentFileError: vae/: has no weight file")
    assert "'someone/else' is not a folder and not in the hub's cache" in told[machine]["unknown"]


def test_a_file_that_is_cut_short_on_the_hub_is_refused_before_it_is_downloaded(story) -> None:
    hub, _, told = story
    name = "vae/diffusion_pytorch_model.safetensors"
    assert told["damage"]["error"].startswith(f"ComponentFileError: {name}: is truncated or damaged")
    assert name not in hub.downloads("damaged")
    assert [asked.name for asked in hub.ranges("damaged")] == [name]


def test_what_the_hub_does_not_have_is_one_clear_error(story) -> None:
    errors = story[2]["encoder"]["errors"]
    assert "'someone/kline' is not a folder, and the hub says: RepositoryNotFoundError" in errors["repository"]
    assert "'someone/klein' at revision 'v9' is not a folder, and the hub says: RevisionNotFound" in errors["revision"]
    assert "'models/of/klein' is neither a folder nor a hub id (owner/name)" in errors["id"]
    assert all("\n" not in error for error in errors.values())
