"""Where a LoRA's file may be: on the hub too, of which only that file is brought, where a role needs it."""

import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from diffusers.utils import USE_PEFT_BACKEND
from tiny import lora

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
