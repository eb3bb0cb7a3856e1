"""Accelerated models give what diffusers gives with the same switches, or say beforehand that they cannot."""

import shutil
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from diffusers.models import attention_dispatch
from diffusers.utils import USE_PEFT_BACKEND
from tiny import lora

import triptych
from triptych.components import switches
from triptych.components.acceleration import Acceleration
from triptych.engine.local import LocalEngine
from triptych.engine.ray_actor import difference
from triptych.errors import ComponentFileError, ParameterError, UsageError
from triptych.roles import RoleType
from triptych.runtime import budget
from triptych.runtime.segment import finish, running

ASK: dict[str, Any] = {
    "prompt": "a red fox", "seed": 7, "height": 64, "width": 48, "num_inference_steps": 3, "output_type": "pt",
    "max_sequence_length": 24,
}  # fmt: skip
# Larger than the 96 pixels that the tiny autoencoder takes at once.
LARGE = {**ASK, "height": 128, "width": 160, "num_inference_steps": 1}
ROLES = ("encoder", "denoiser", "decoder")


@pytest.fixture(scope="module")
def repo(tiny_repo: Callable[..., Path]) -> Path:
    return tiny_repo("flux2_klein")


@pytest.fixture
def without_weights(repo: Path, tmp_path: Path) -> Path:
    """The repository, whose weight files end after their headers: whoever reads a weight fails."""
    copy = shutil.copytree(repo, tmp_path / "copy")
    for file in copy.rglob("*.safetensors"):
        content = file.read_bytes()
        file.write_bytes(content[: 8 + int.from_bytes(content[:8], "little")])
    with pytest.raises(ComponentFileError, match="truncated"):
        triptych.load(copy, device="cpu")
    return copy


def diffusers_pictures(repo: Path, change: Callable[[Any], object], **ask: Any) -> torch.Tensor:
    """What diffusers' own pipeline makes, changed by hand."""
    pipeline = DiffusionPipeline.from_pretrained(repo, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    change(pipeline)
    seed = ask.pop("seed")
    pictures: torch.Tensor = pipeline(**ask, generator=torch.Generator("cpu").manual_seed(seed)).images
    return pictures


def split_pictures(repo: Path, acceleration: Any, **ask: Any) -> torch.Tensor:
    """What three loads make, one a role."""
    models = [triptych.load(repo, role=role, device="cpu", acceleration=acceleration) for role in ROLES]
    state = models[0].run(triptych.Request(**ask))
    for model in models[1:]:
        state = model.run(state)
    pictures: torch.Tensor = state.result.images
    return pictures


def test_a_picture_decoded_in_tiles_is_the_one_of_diffusers_in_tiles_whole_and_split(repo: Path) -> None:
    expected = diffusers_pictures(repo, lambda pipeline: pipeline.vae.enable_tiling(), **LARGE)
    assert not torch.equal(expected, diffusers_pictures(repo, lambda _: None, **LARGE))
    asked = {"decoder": Acceleration(tiling=True)}
    assert torch.equal(triptych.load(repo, device="cpu", acceleration=asked).generate(**LARGE).images, expected)
    assert torch.equal(split_pictures(repo, asked, **LARGE), expected)


def test_weights_in_8_bits_take_a_quarter_of_float32_and_give_the_picture_of_diffusers(repo: Path) -> None:
    expected = diffusers_pictures(repo, lambda pipeline: pipeline.transformer.enable_layerwise_casting(), **ASK)
    plain = triptych.load(repo, device="cpu")
    model = triptych.load(
        repo, device="cpu", acceleration={role: Acceleration(quantization="fp8") for role in ("encoder", "denoiser")}
    )
    for name in ("text_encoder", "transformer"):
        assert model.loaded_bytes[name] < 0.3 * plain.loaded_bytes[name]
        assert model.components[name].dtype is torch.float32
    assert model.loaded_bytes["vae"] == plain.loaded_bytes["vae"]
    assert model.generate(**ASK, exact=False).images.isfinite().all()
    only = triptych.load(repo, device="cpu", acceleration={"denoiser": Acceleration(quantization="fp8")})
    assert torch.allclose(only.generate(**ASK, exact=False).images, expected, atol=1e-5)
    assert (plain.generate(**ASK).images - expected).abs().max() > 1e-3


def test_encoders_in_8_bits_still_tell_the_dtype_that_they_compute_in(tiny_repo: Callable[..., Path]) -> None:
    asked = Acceleration(quantization="fp8")
    for family in ("flux", "wan"):  # CLIP, T5 and UMT5; some layers of T5's are asked for their own dtype
        model = triptych.load(tiny_repo(family), role="encoder", device="cpu", acceleration=asked)
        encoders = [each for name, each in model.components.items() if name.startswith("text_encoder")]
        for encoder in encoders:
            assert encoder.dtype is torch.float32
            assert torch.float8_e4m3fn in {parameter.dtype for parameter in encoder.parameters()}
        state = model.run(triptych.Request(prompt="a red fox", max_sequence_length=16, exact=False))
        assert state.fields["prompt_embeds"].dtype is torch.float32


@pytest.mark.skipif(find_spec("torchao") is not None, reason="torchao is installed")
def test_weights_as_integers_without_torchao_are_refused(without_weights: Path) -> None:
    with pytest.raises(UsageError, match="torchao is not installed; to get it: pip install"):
        triptych.load(without_weights, role="denoiser", device="cpu", acceleration=Acceleration(quantization="int8"))


@pytest.mark.skipif(find_spec("torchao") is None, reason="torchao is not installed")
def test_weights_as_integers_take_less_and_give_nearly_the_same_picture(repo: Path) -> None:
    asked = {role: Acceleration(quantization="int8") for role in ("encoder", "denoiser")}
    plain, model = triptych.load(repo, device="cpu"), triptych.load(repo, device="cpu", acceleration=asked)
    for name in ("text_encoder", "transformer"):
        assert model.loaded_bytes[name] < 0.5 * plain.loaded_bytes[name]
    difference = (model.generate(**ASK, exact=False).images - plain.generate(**ASK).images).abs()
    assert 1e-6 < difference.mean() < 0.02


def test_a_kernel_of_attention_is_the_denoisers_alone(repo: Path) -> None:
    before = attention_dispatch._AttentionBackendRegistry.get_active_backend()
    model = triptych.load(repo, role="denoiser", device="cpu", acceleration=Acceleration(attention="_native_math"))
    assert attention_dispatch._AttentionBackendRegistry.get_active_backend() == before
    kernels = {
        part.processor._attention_backend
        for part in model.components["transformer"].modules()
        if hasattr(part, "processor")
    }
    assert kernels == {attention_dispatch.AttentionBackendName._NATIVE_MATH}


def test_offloaded_weights_give_the_same_picture(repo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the host's memory to itself, where there is no accelerator: the same hooks, and nothing gained."""
    asked = {role: Acceleration(offload="group") for role in ("encoder", "denoiser")}
    device = torch.accelerator.current_accelerator() or torch.device("cpu")
    expected = triptych.load(repo, device=str(device)).generate(**ASK).images
    monkeypatch.setattr(switches, "_needs_accelerator", lambda device: None)
    model = triptych.load(repo, device=str(device), acceleration=asked)
    assert model.components["transformer"].device == device
    assert all(parameter.device.type == "cpu" for parameter in model.components["transformer"].parameters())
    assert torch.equal(model.generate(**ASK).images, expected)


@pytest.mark.parametrize("role", ["encoder", "decoder"])
def test_components_of_which_parts_were_cut_away_are_offloaded_too(
    tiny_repo: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, role: str
) -> None:
    """A text encoder without its vision tower, and the half of an autoencoder."""
    repo, ask = tiny_repo("qwen_image"), {**ASK, "width": 64}
    expected = triptych.load(repo, device="cpu").generate(**ask).images
    monkeypatch.setattr(switches, "_needs_accelerator", lambda device: None)
    split = {
        name: triptych.load(repo, role=name, device="cpu", acceleration={role: Acceleration(offload="group")})
        for name in ("encoder", "denoiser", "decoder")
    }
    state: Any = triptych.Request(**ask)
    for model in split.values():
        state = model.run(state)
    assert torch.equal(state.result.images, expected)


def test_the_repeated_blocks_of_a_model_are_compiled_and_of_an_autoencoder_the_half_that_decodes(repo: Path) -> None:
    asked = {role: Acceleration(compile=True) for role in ("denoiser", "decoder")}
    model = triptych.load(repo, device="cpu", acceleration=asked)
    transformer, vae = model.components["transformer"], model.components["vae"]
    compiled = {type(part).__name__ for part in transformer.modules() if part._compiled_call_impl is not None}
    assert compiled == {"Flux2TransformerBlock", "Flux2SingleTransformerBlock"}
    assert [name for name, part in vae.named_modules() if part._compiled_call_impl is not None] == ["decoder"]


@pytest.mark.slow
def test_a_compiled_model_gives_nearly_the_same_picture(repo: Path) -> None:
    asked = {role: Acceleration(compile=True) for role in ("denoiser", "decoder")}
    picture = triptych.load(repo, device="cpu", acceleration=asked).generate(**ASK, exact=False).images
    assert torch.allclose(picture, triptych.load(repo, device="cpu").generate(**ASK).images, atol=1e-4)


@pytest.mark.parametrize(("compiled", "forwards"), [(True, 2), (False, 1)])
def test_the_time_of_compiling_is_not_taken_for_that_of_a_forward(
    repo: Path, monkeypatch: pytest.MonkeyPatch, compiled: bool, forwards: int
) -> None:
    model = triptych.load(repo, device="cpu")
    transformer = model.components["transformer"]
    if compiled:
        transformer.compile_repeated_blocks(backend="eager")  # as long as it takes is what is slept below
    state = model.admit(triptych.Request(**ASK))
    finish(model.segment(state))
    turn = next(model.segment(state))
    turn.predict()
    rows: list[int] = []

    def compile_slowly(_: Any, __: Any, inputs: dict[str, Any]) -> None:
        rows.append(len(inputs["hidden_states"]))
        if rows.count(2) == 1 and rows[-1] == 2:
            time.sleep(1.1)

    transformer.register_forward_pre_hook(compile_slowly, with_kwargs=True)
    monkeypatch.setattr(budget, "LONGEST", 1.0)
    monkeypatch.setattr(budget, "MOST_ROWS", 2)
    with running(turn.stage.name):
        budget.measure(turn.stage, turn.forwards[0], lambda: False)
    assert rows.count(2) == forwards


@pytest.mark.skipif(not USE_PEFT_BACKEND, reason="PEFT is not installed")
@pytest.mark.parametrize(
    ("role", "changes"), [("denoiser", {"transformer": ["attn.to_q"]}), ("encoder", {"text_encoder": ["q_proj"]})]
)
def test_a_lora_is_refused_where_weights_are_not_as_it_would_change_them(
    tiny_repo: Callable[..., Path], tmp_path: Path, role: str, changes: dict[str, list[str]]
) -> None:
    repo = tiny_repo("flux")
    style = lora.write(tmp_path / "style.safetensors", repo, changes)
    model = triptych.load(repo, role="server", acceleration={role: Acceleration(quantization="fp8")})
    problem = f"lora='style.safetensors': none is accepted where the {role}'s weights are kept as fp8"
    with pytest.raises(ParameterError, match=problem):
        model.admit(triptych.Request(**ASK, exact=False, lora=[{"path": style}]))


@pytest.mark.skipif(not USE_PEFT_BACKEND, reason="PEFT is not installed")
@pytest.mark.parametrize(
    ("family", "role"), [("flux2_klein", "encoder"), ("flux2_klein", "decoder"), ("flux", "encoder")]
)
def test_a_lora_is_accepted_where_those_weights_are_as_they_were_that_it_changes(
    tiny_repo: Callable[..., Path], tmp_path: Path, family: str, role: str
) -> None:
    repo = tiny_repo(family)
    style = lora.write(tmp_path / "style.safetensors", repo, {"transformer": ["attn.to_q"]})
    model = triptych.load(repo, device="cpu", acceleration={role: Acceleration(quantization="fp8")})
    plain, adapted = (model.generate(**ASK, exact=False, lora=loras).images for loras in ([], [{"path": style}]))
    assert not torch.equal(plain, adapted)


@pytest.mark.parametrize(
    ("role", "values", "message"),
    [
        ("denoiser", {"attention": "flahs"}, "denoiser: attention='flahs': .*did you mean 'flash'"),
        ("denoiser", {"attention": "_native_cudnn"}, "does not run here on cpu in torch.float32: No viable backend"),
        ("denoiser", {"attention": "xformers"}, "does not run here on cpu in torch.float32: .*install `xformers"),
        ("encoder", {"attention": "native"}, "attention of Qwen3ForCausalLM does not go through diffusers' dispatcher"),
        ("denoiser", {"offload": "group"}, "denoiser: offload='group': .*this role runs on the CPU"),
        ("denoiser", {"tiling": True}, "denoiser: tiling: transformer: Flux2Transformer2DModel cannot work in tiles"),
        ("denoiser", {"cache": "first_block"}, "its first block returns other things than its last"),
        ("decoder", {"cache": "taylorseer"}, "AutoencoderKLFlux2 has no step caches"),
    ],
)
def test_what_cannot_be_is_refused_before_weights_are_read(
    without_weights: Path, role: str, values: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        triptych.load(without_weights, role=role, device="cpu", acceleration=Acceleration(**values))


def test_compiling_without_a_compiler_is_refused(without_weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(UsageError, match="needs a C.. compiler, and 'no-such-compiler' is not there"):
        triptych.load(without_weights, role="denoiser", device="cpu", acceleration=Acceleration(compile=True))


@pytest.mark.parametrize("role", ROLES)
def test_an_acceleration_of_a_role_that_is_elsewhere_is_nothing_to_this_one(repo: Path, role: str) -> None:
    asked = {other: Acceleration(compile=True) for other in ROLES if other != role}
    model = triptych.load(repo, role=role, device="cpu", acceleration=asked)
    parts = [part for each in model.components.values() if isinstance(each, torch.nn.Module) for part in each.modules()]
    if role != "encoder":  # which has the autoencoder, too, to encode pictures
        assert all(part._compiled_call_impl is None for part in parts)
    assert model.loaded_bytes == triptych.load(repo, role=role, device="cpu").loaded_bytes


def test_an_exact_request_is_refused_where_numbers_are_changed_at_admission_and_again_in_the_role(repo: Path) -> None:
    asked = {RoleType.DENOISER: Acceleration(quantization="fp8")}
    message = "exact=True: the denoiser runs with quantization, which changes numbers"
    with LocalEngine(repo, encoder="cpu", denoiser="cpu", decoder="cpu", acceleration=asked) as engine:
        with pytest.raises(ParameterError, match=message):
            engine.generate(**ASK, exact=True)
        assert engine.generate(**ASK).images.isfinite().all()
    unaware = triptych.load(repo, role="encoder", device="cpu")  # as a router that knows nothing of the replica's
    state = unaware.run(triptych.Request(**ASK))
    denoiser = triptych.load(repo, role="denoiser", device="cpu", acceleration=asked)
    with pytest.raises(ParameterError, match=message):
        denoiser.run(state)
    denoiser.run(unaware.run(triptych.Request(**ASK, exact=False)))


def test_without_accelerations_nothing_is_built_twice(repo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("triptych.runtime.accelerated.draw_hollow", None)
    triptych.load(repo, device="cpu", acceleration={"denoiser": Acceleration()})


def test_what_changes_numbers_is_part_of_what_all_replicas_of_a_service_have_alike(repo: Path) -> None:
    asked = {"decoder": Acceleration(tiling=True), "denoiser": Acceleration(cache="taylorseer", cfg_parallel=False)}
    identities = [triptych.load(repo, role=role, device="cpu", acceleration=asked).identity for role in ROLES]
    told = "denoiser: cache=taylorseer; decoder: tiling"
    assert [each["acceleration"] for each in identities] == [told] * 3
    kept = triptych.load(repo, role="server", acceleration={"denoiser": Acceleration(offload="group")})
    assert "acceleration" not in kept.identity
    mine, expected = {"version": "1"}, {"version": "1", "acceleration": told}
    assert difference(mine, expected).endswith(
        "its acceleration is 'none', the service's 'denoiser: cache=taylorseer; decoder: tiling'"
    )
