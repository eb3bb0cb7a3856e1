"""LoRAs over HTTP: only files that the server was given, and the pictures that Python gives."""

import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from diffusers.utils import USE_PEFT_BACKEND
from PIL import Image, ImageChops
from serving import Caller, served
from tiny import lora

import triptych
from triptych.engine.local import LocalEngine
from triptych.server.limits import Limits

pytestmark = pytest.mark.skipif(not USE_PEFT_BACKEND, reason="PEFT is not installed")

ASK: dict[str, Any] = {"prompt": "a red fox", "height": 64, "width": 48, "num_inference_steps": 2, "seed": 7}


@pytest.fixture(scope="module")
def repo(tiny_repo: Callable[..., Path]) -> Path:
    return tiny_repo("flux2_klein")


@pytest.fixture(scope="module")
def given(repo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that the server is given, beside one that it is not."""
    root = tmp_path_factory.mktemp("loras")
    for file in ("given/style.safetensors", "secret/style.safetensors"):
        lora.write(root / file, repo, {"transformer": ["attn.to_q", "ff.linear_in"]}, seed=1, strength=0.6)
    return root / "given"


@pytest.fixture(scope="module")
def caller(repo: Path, given: Path) -> Iterator[Caller]:
    devices: dict[str, Any] = dict.fromkeys(("encoder", "denoiser", "decoder"), "cpu")
    engine = LocalEngine(repo, **devices, warm_up=False)
    with engine, served(Limits(lora_folders=(given,)), serves=engine) as caller:
        yield caller


def png(caller: Caller, **changes: Any) -> bytes:
    request = caller.submit({**ASK, "exact": True, **changes})
    assert caller.wait(request)["status"] == "done"
    return caller.get(request["links"]["result"]).content


def test_a_picture_is_the_one_of_python_with_the_same_lora(caller: Caller, repo: Path, given: Path) -> None:
    made = png(caller, lora=[{"path": "style.safetensors", "scale": 0.9}])
    model = triptych.load(repo, device="cpu")
    expected = model.generate(**ASK, lora=[{"path": given / "style.safetensors", "scale": 0.9}]).images[0]
    assert ImageChops.difference(Image.open(io.BytesIO(made)).convert("RGB"), expected).getbbox() is None
    assert made != png(caller)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([{"path": "../secret/style.safetensors"}], "a safetensors file in the model's folder or in one that"),
        ([{"path": "{root}/secret/style.safetensors"}], "there is style.safetensors"),
        ([{"path": "{root}/given/../secret/style.safetensors"}], "there is style.safetensors"),
        ([{"path": "/etc/passwd"}], "there is style.safetensors"),
        ([{"path": "someone/style"}], "there is style.safetensors"),
        ([{"path": "stile.safetensors"}], "did you mean 'style.safetensors'"),
        ([{"path": "style.safetensors", "weight": 1}], "is accepted"),
        ([{"path": "style.safetensors", "scale": "much"}], "a number is accepted as the scale"),
        ([{"path": "style.safetensors", "scale": 1e300}], "a text, a number"),
        ([{"path": {"of": "style"}}], "a text, a number"),
        ("style.safetensors", "a list of"),
        ([["style.safetensors"]], "a list of"),
    ],
)
def test_no_other_file_can_be_named_and_nothing_of_the_machine_is_told(
    caller: Caller, given: Path, value: Any, message: str
) -> None:
    body = json.loads(json.dumps(value).replace("{root}", str(given.parent)))
    answer = caller.post("/v1/requests", json={"parameters": {**ASK, "lora": body}})
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["param"] == "lora"
    assert message in error["message"]
    told = error["message"].partition(": ")[2]
    assert str(given.parent) not in told


def test_the_openai_client_names_one_in_json_and_in_a_form(caller: Caller) -> None:
    client = openai.OpenAI(base_url=f"{caller.url}/v1", api_key="none", max_retries=0)
    more = {"seed": 7, "num_inference_steps": 2, "exact": True}
    plain = client.images.generate(prompt="a red fox", size="48x64", extra_body=more)  # type: ignore[arg-type]
    named = {**more, "lora": [{"path": "style.safetensors"}]}
    styled = client.images.generate(prompt="a red fox", size="48x64", extra_body=named)  # type: ignore[arg-type]
    assert plain.data and styled.data
    assert plain.data[0].b64_json != styled.data[0].b64_json
    with pytest.raises(openai.BadRequestError, match="did you mean 'style.safetensors'") as caught:
        client.images.generate(prompt="a red fox", extra_body={"lora": [{"path": "styl.safetensors"}]})
    assert caught.value.param == "lora"
    file = io.BytesIO()
    Image.new("RGB", (64, 64), "gray").save(file, "PNG")
    form = {"seed": 7, "num_inference_steps": 1, "lora": json.dumps([{"path": "stile.safetensors"}])}
    with pytest.raises(openai.BadRequestError, match="did you mean 'style.safetensors'"):
        client.images.edit(image=file.getvalue(), prompt="a red fox", extra_body=form)


def test_the_field_is_among_the_parameters(caller: Caller) -> None:
    told = {each["name"]: each for each in caller.get("/v1/parameters").json()["parameters"]}
    assert (told["lora"]["kind"], told["lora"]["default"]) == ("loras", None)
