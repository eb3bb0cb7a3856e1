"""Where a LoRA's file may be: on the hub too, of which only that file is brought, where a role needs it."""

import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers.utils import USE_PEFT_BACKEND
from safetensors.torch import save_file
from tiny import lora

from triptych.components.lora_files import Place, fingerprint
from triptych.components.repository import Repository

from .hub import COMMIT, serve
from .test_hub import machine

SCRIPT = """
import triptych
import sys
from triptych.components.lora import Lora
from triptych.errors import ParameterError

repo, path = os.environ["MODEL"], os.environ["LORA"]
ask = {"prompt": "a red fox", "height": 32, "width": 32, "num_inference_steps": 1, "seed": 7, "output_type": "pt"}
server = triptych.load(repo, role="server", device="cpu")

def refusal(name):
    try:
        server.admit(triptych.Request(**ask, lora=[{"path": name}]))
    except ParameterError as error:
        return str(error)

mark("admission")
field = server.admit(triptych.Request(**ask, lora=[{"path": "someone/style"}])).fields["lora"][0]
told = [refusal(name) for name in ("someone/style/sub/stile.safetensors", "nobody/style")]
mark("loading")
model = triptych.load(repo, device="cpu")
pictures = [
    model.generate(**ask, lora=[{"path": name}]).images
    for name in ("someone/style", path, "someone/style/sub/other.safetensors")
]
same = [bool(torch.equal(pictures[0], each)) for each in pictures]
print(json.dumps({"field": field, "same": same, "told": told}))
"""


OFFLINE = """
from huggingface_hub import constants
from triptych.components import lora_files

repository = Repository.open(os.environ["MODEL"])

def find(name):
    place = lora_files.find(name, repository, None)
    return [place.source, place.files(repository).revision, place.file]

names = ["someone/style", "someone/style/style.safetensors"]
first = [find(name) for name in names]
was = constants.HF_HUB_OFFLINE
constants.HF_HUB_OFFLINE = True
again = [find(name) for name in names]
constants.HF_HUB_OFFLINE = was
lora_files.find(names[0], repository, None).local(repository)
print(json.dumps({"first": first, "again": again}))
"""


def test_files_that_differ_in_one_number_anywhere_are_told_apart(
    tiny_repo: Callable[..., Path], tmp_path: Path
) -> None:
    repository = Repository.open(tiny_repo("flux2_klein"))
    weights = {f"transformer.{k}.lora_A.weight": torch.zeros(100, 1000) for k in range(4)}

    def write(name: str) -> str:
        save_file(weights, tmp_path / name)
        return fingerprint(Place(str(tmp_path), None, name), repository)

    first = write("first.safetensors")
    assert write("same.safetensors") == first
    seen = {first}
    for tensor in weights.values():
        for place in (0, 50_000, 99_999):
            tensor.view(-1)[place] += 1
            seen.add(write(f"{len(seen)}.safetensors"))
    assert len(seen) == 13


def test_a_file_of_the_hub_is_found_where_the_hub_cannot_be_reached_any_more(
    tiny_repo: Callable[..., Path], tmp_path: Path
) -> None:
    repo = tiny_repo("flux2_klein")
    lora.write(tmp_path / "root" / "style.safetensors", repo, {"transformer": ["attn.to_q"]}, seed=1)
    with serve("someone/style", tmp_path / "root") as hub:
        online = machine(hub, tmp_path / "home", OFFLINE, MODEL=str(repo))
    offline = machine(hub, tmp_path / "home", OFFLINE, MODEL=str(repo), HF_HUB_OFFLINE="1")
    place = ["someone/style", COMMIT, "style.safetensors"]
    for told in (online, offline):
        assert told["first"] == told["again"] == [place, place]


@pytest.mark.slow
@pytest.mark.skipif(not USE_PEFT_BACKEND, reason="PEFT is not installed")
def test_a_hub_id_names_a_file_that_is_checked_by_ranges_and_brought_where_it_is_loaded(
    tiny_repo: Callable[..., Path], tmp_path: Path
) -> None:
    repo = tiny_repo("flux2_klein")
    layers = {"transformer": ["attn.to_q", "ff.linear_in"]}
    style = lora.write(tmp_path / "root" / "style.safetensors", repo, layers, seed=1)
    lora.write(tmp_path / "root" / "sub" / "other.safetensors", repo, layers, seed=2)
    (tmp_path / "root" / "style.bin").write_bytes(b"a pickle")
    with serve("someone/style", tmp_path / "root") as hub:
        paths = {"MODEL": str(repo), "LORA": str(style), "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        told = machine(hub, tmp_path / "home", SCRIPT, **paths)
    assert told["same"] == [True, True, False]
    field = told["field"]
    assert isinstance(field, dict)
    assert (field["source"], field["revision"], field["file"]) == ("someone/style", COMMIT, "style.safetensors")
    misspelt, missing = told["told"]  # type: ignore[misc]
    assert "did you mean 'someone/style/sub/other.safetensors'" in misspelt
    assert "there is no such file or folder here, and of the hub" in missing
    assert hub.downloads("admission") == set()
    assert {asked.name for asked in hub.ranges("admission")} == {"style.safetensors"}
    assert hub.downloads("loading") == {"style.safetensors", "sub/other.safetensors"}
