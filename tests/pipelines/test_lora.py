"""A request's LoRAs give what diffusers gives with `load_lora_weights` and `set_adapters`, whole and split."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from diffusers.utils import USE_PEFT_BACKEND
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny import lora

import triptych
from triptych.components.acceleration import Acceleration
from triptych.components.adapters import Adapters
from triptych.components.lora import MOST, LoraDesk
from triptych.engine.local import LocalEngine
from triptych.errors import ComponentFileError, ParameterError, UsageError
from triptych.runtime.prompt_cache import PromptCache
from triptych.runtime.ranks import Ranks

from .parity import FORWARD_TOLERANCE, PIXEL_TOLERANCE, Parity, assert_same, differ
from .test_helios import call_of as helios
from .test_qwen_image_edit import processor_without_videos, small  # noqa: F401 (fixtures)
from .test_qwen_image_layered import small as small_layers  # noqa: F401
from .test_wan_dmd import FastVideo

TinyRepo = Callable[..., Path]
Loras = list[dict[str, Any]]

pytestmark = pytest.mark.skipif(not USE_PEFT_BACKEND, reason="PEFT is not installed")

PICTURE = Image.linear_gradient("L").resize((80, 64)).convert("RGB")
SMALL: dict[str, Any] = {"prompt": "a red fox", "height": 64, "width": 48, "num_inference_steps": 2}
SHORT: dict[str, Any] = {**SMALL, "max_sequence_length": 24}
WAN: dict[str, Any] = {**SHORT, "num_frames": 5, "guidance_scale": 4.0}
EDIT: dict[str, Any] = {**SMALL, "height": 128, "width": 64, "image": PICTURE}
LAYER: dict[str, Any] = {"prompt": "a fox", "layers": 1, "num_inference_steps": 2, "image": PICTURE.convert("RGBA")}


@dataclass
class Family:
    """A tiny repository of a family, a call of it, and the layers that LoRAs change there.

    Attributes:
        seldom: whether it is left to the slow tests: its loader and its transformer are another family's.
    """

    call: dict[str, Any]
    layers: dict[str, list[str]]
    variant: dict[str, Any] = field(default_factory=dict)
    repository: str = ""
    seldom: bool = False


CLIPS = {"transformer": ["attn.to_q"], "text_encoder": ["q_proj"], "text_encoder_2": ["k_proj"]}
HELIOS = {"transformer": ["attn1.to_q", "attn2.to_v"]}
QWEN = {"transformer": ["attn.to_q", "attn.to_out", "img_in"]}
FAMILIES = {
    "flux2_klein": Family({**SMALL, "guidance_scale": 4.0}, {"transformer": ["attn.to_q", "to_qkv_mlp", "linear_in"]}),
    "qwen_image": Family({**SMALL, "negative_prompt": "ugly", "true_cfg_scale": 4.0}, QWEN),
    "flux": Family(SHORT, {"transformer": ["attn.to_q", "proj_mlp"], "text_encoder": ["q_proj", "fc1"]}),
    "stable_diffusion_3": Family({**SHORT, "negative_prompt": "ugly"}, CLIPS),
    "z_image": Family({**SMALL, "guidance_scale": 4.0}, {"transformer": ["attention.to_q", "feed_forward.w1"]}),
    "wan": Family(WAN, {"transformer": ["attn1.to_q", "attn2.to_v"]}, {"version": "2.2"}),
    # One for text to video, which diffusers fills up.
    "wan_i2v": Family(
        {**WAN, "image": PICTURE.resize((48, 64))}, {"transformer": ["attn2.to_k", "attn2.to_v"]}, {"version": "2.1"}
    ),
    "helios": Family(helios("base"), HELIOS, {"version": "base"}),
    "helios_pyramid": Family(helios("mid"), HELIOS, {"version": "mid"}, "helios", seldom=True),
    "flux2": Family({**SMALL, "max_sequence_length": 80}, {"transformer": ["attn.to_q"]}, seldom=True),
    "flux_kontext": Family({**SHORT, "max_area": 64 * 48}, {"transformer": ["attn.to_q"]}, seldom=True),
    "qwen_image_edit": Family(EDIT, QWEN, seldom=True),
    "qwen_image_edit_plus": Family(EDIT, QWEN, {"plus": True}, "qwen_image_edit", seldom=True),
    "qwen_image_layered": Family(LAYER, QWEN, seldom=True),
}


class Adapted(Parity):
    """A repository with LoRAs beside it; diffusers loads them for one call, and unloads them after it."""

    def __init__(self, repo: Path, folder: Path, family: str, dtype: str = "float32") -> None:
        super().__init__(repo, dtype)
        self.call, layers = FAMILIES[family].call, FAMILIES[family].layers
        self.style = lora.write(folder / "style.safetensors", repo, layers, seed=1)
        transformer = {"transformer": layers["transformer"][:1]}
        self.other = lora.write(folder / "other.safetensors", repo, transformer, seed=2, rank=3)

    def diffusers(self, *, lora: Loras | None = None, **call: Any) -> Any:  # type: ignore[override]
        for each in lora or ():
            path, second = Path(each["path"]), each.get("component") == "transformer_2"
            options = {"load_into_transformer_2": True} if second else {}
            name = f"lora_{path.stem}_{second}"
            self.pipeline.load_lora_weights(str(path.parent), weight_name=path.name, adapter_name=name, **options)
        if lora:
            names = [f"lora_{Path(each['path']).stem}_{each.get('component') == 'transformer_2'}" for each in lora]
            self.pipeline.set_adapters(names, [each.get("scale", 1.0) for each in lora])
        try:
            return super().diffusers(**call)
        finally:
            if lora:
                self.pipeline.unload_lora_weights()

    def of(self, *loras: dict[str, Any], **changes: Any) -> Any:
        """What all ways give with these LoRAs, to the bit."""
        made = self.check(**{**self.call, **changes}, **({"lora": list(loras)} if loras else {}))
        return torch.cat(made) if isinstance(made, list) else made


@pytest.fixture(scope="module")
def adapted(tiny_repo: TinyRepo, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Adapted]:
    built: dict[str, Adapted] = {}

    def get(family: str) -> Adapted:
        if family not in built:
            folder = tmp_path_factory.mktemp(f"{family}-loras")
            repo = tiny_repo(FAMILIES[family].repository or family, **FAMILIES[family].variant)
            built[family] = Adapted(repo, folder, family)
        return built[family]

    return get


@pytest.fixture(scope="module")
def klein(adapted: Callable[[str], Adapted]) -> Adapted:
    return adapted("flux2_klein")


@pytest.mark.usefixtures("processor_without_videos")
@pytest.mark.parametrize(
    "family", [pytest.param(name, marks=pytest.mark.slow if each.seldom else ()) for name, each in FAMILIES.items()]
)
def test_pictures_are_those_of_diffusers_with_the_same_loras_and_without_them_again(
    adapted: Callable[[str], Adapted], family: str, request: pytest.FixtureRequest
) -> None:
    request.getfixturevalue("small_layers" if family == "qwen_image_layered" else "small")
    parity = adapted(family)
    plain = parity.of()
    styled = parity.of({"path": str(parity.style)})
    both = parity.of({"path": str(parity.other), "scale": -0.5}, {"path": str(parity.style), "scale": 0.6})
    assert differ(styled, plain) and differ(both, plain) and differ(both, styled)
    assert_same(parity.of(), plain, "without, after requests with them")


def test_a_lora_of_a_text_encoder_alone_is_the_encoders_and_none_else_loads_it(
    adapted: Callable[[str], Adapted], tmp_path: Path
) -> None:
    flux = adapted("flux")
    words = lora.write(
        tmp_path / "words.safetensors", flux.repo, {"text_encoder": ["v_proj", "fc2"]}, seed=3, strength=2
    )
    assert differ(flux.of({"path": str(words)}), flux.of())
    fresh = {role: triptych.load(flux.repo, role=role, device="cpu") for role in ("encoder", "denoiser", "decoder")}
    for path in (words, flux.style, flux.other):
        state = fresh["encoder"].run(triptych.Request(**flux.call, lora=[{"path": path}]))
        fresh["decoder"].run(fresh["denoiser"].run(state))
    held = {role: {name: len(names) for name, names in model.adapters.held().items()} for role, model in fresh.items()}
    assert held == {"encoder": {"text_encoder": 2}, "denoiser": {"transformer": 2}, "decoder": {}}


def test_in_bfloat16_too_a_lora_of_either_dtype_gives_what_diffusers_gives(
    adapted: Callable[[str], Adapted], tmp_path: Path
) -> None:
    flux = Adapted(adapted("flux").repo, tmp_path, "flux", "bfloat16")
    half = tmp_path / "half.safetensors"
    save_file({key: value.bfloat16() for key, value in load_file(flux.style).items()}, half)
    plain = flux.of()
    assert differ(flux.of({"path": str(flux.style)}), plain) and differ(flux.of({"path": str(half)}), plain)
    assert_same(flux.of(), plain, "without, after requests with them")


def test_layers_under_other_names_and_alphas_are_read_as_diffusers_reads_them(
    adapted: Callable[[str], Adapted], tmp_path: Path
) -> None:
    flux, qwen = adapted("flux"), adapted("qwen_image")
    styled = load_file(flux.style)
    published: dict[str, torch.Tensor] = {}
    fused = {"transformer_blocks.0.attn.to_q": "lora_unet_double_blocks_0_img_attn_qkv"}
    alone = {"encoder.layers.0.mlp.fc1": "lora_te1_text_model_encoder_layers_0_mlp_fc1"}
    for name, theirs in {**fused, **alone}.items():
        component = "transformer" if name in fused else "text_encoder"
        down, up = (styled[f"{component}.{name}.lora_{side}.weight"] for side in "AB")
        published[f"{theirs}.lora_down.weight"] = down
        published[f"{theirs}.lora_up.weight"] = torch.cat([up] * 3) if name in fused else up
        published[f"{theirs}.alpha"] = torch.tensor(1.0)
    save_file(published, kohya := tmp_path / "kohya.safetensors")
    assert differ(flux.of({"path": str(kohya)}), flux.of())
    held = {name: len(names) for name, names in flux.roles["encoder"].adapters.held().items()}
    assert held["text_encoder"] >= 1
    config = {
        "transformer.r": 2,
        "transformer.lora_alpha": 6,
        "transformer.target_modules": ["to_q", "to_out.0", "img_in"],
    }
    scaled = tmp_path / "scaled.safetensors"
    save_file(load_file(qwen.style), scaled, metadata={"format": "pt", "lora_adapter_metadata": json.dumps(config)})
    assert differ(qwen.of({"path": str(scaled)}), qwen.of({"path": str(qwen.style)}))


@pytest.mark.parametrize("alpha", [None, 1.0])
@pytest.mark.parametrize("rank", [2, 3])  # three layers in one: each may have a third of the rank to itself
@pytest.mark.parametrize("family", ["flux", "flux2_klein"])
def test_kohyas_layers_are_read_as_diffusers_reads_them_whatever_their_rank_and_without_an_alpha(
    adapted: Callable[[str], Adapted], tmp_path: Path, family: str, rank: int, alpha: float | None
) -> None:
    parity = adapted(family)
    written = lora.write(
        tmp_path / "written.safetensors", parity.repo, {"transformer": ["transformer_blocks.0.attn.to_q"]}, rank=rank
    )
    down, up = (load_file(written)[f"transformer.transformer_blocks.0.attn.to_q.lora_{side}.weight"] for side in "AB")
    layer = "lora_unet_double_blocks_0_img_attn_qkv"
    weights = {f"{layer}.lora_down.weight": down, f"{layer}.lora_up.weight": torch.cat([up] * 3)}
    if alpha is not None:
        weights[f"{layer}.alpha"] = torch.tensor(alpha)
    save_file(weights, kohya := tmp_path / "kohya.safetensors")
    assert differ(parity.of({"path": str(kohya)}), parity.of())


def test_kohyas_single_blocks_are_read_at_ranks_that_are_divisible_by_their_four_layers(
    adapted: Callable[[str], Adapted], tmp_path: Path
) -> None:
    layer = "lora_unet_single_blocks_0_linear1"  # the sizes of FLUX.1's own, which diffusers expects
    weights = {
        f"{layer}.lora_down.weight": torch.ones(16, 3072),
        f"{layer}.lora_up.weight": torch.ones(21504, 16),
        f"{layer}.alpha": torch.tensor(16.0),
    }
    save_file(weights, tmp_path / "kohya.safetensors")
    flux = adapted("flux")
    with pytest.raises(ParameterError, match="does not fit the transformer: its layer 'single_transformer_blocks.0"):
        flux.model.admit(triptych.Request(**flux.call, lora=[{"path": tmp_path / "kohya.safetensors"}]))


@pytest.mark.slow
def test_three_processes_give_the_picture_of_diffusers(adapted: Callable[[str], Adapted], tmp_path: Path) -> None:
    flux = adapted("flux")
    flux.check_in_processes(tmp_path, {**flux.call, "lora": [{"path": str(flux.style)}]}, ["float32"])


def test_wans_second_transformer_has_one_only_where_it_is_asked_for(adapted: Callable[[str], Adapted]) -> None:
    wan = adapted("wan")
    first, second = {"path": str(wan.style)}, {"path": str(wan.style), "component": "transformer_2"}
    only_first, only_second, both = wan.of(first), wan.of(second), wan.of(first, {**second, "scale": 0.5})
    assert differ(only_first, only_second) and differ(both, only_first) and differ(both, only_second)
    held = wan.roles["denoiser"].adapters.held()
    assert len(held["transformer_2"]) == 1


def test_fastwan_has_the_loader_of_wan(tiny_repo: TinyRepo, tmp_path: Path) -> None:
    video = FastVideo(tiny_repo("wan_dmd", version="2.1"), "2.1")
    style = lora.write(tmp_path / "style.safetensors", video.repo, FAMILIES["wan"].layers, seed=1)
    plain = video.of()
    video.pipeline.load_lora_weights(str(tmp_path), weight_name=style.name)
    call = {**video.call, "output_type": "pt"}
    expected = video.diffusers(**call)
    assert differ(expected, plain)
    for way in (video.whole, video.split):
        assert_same(way(**call, lora=[{"path": str(style)}]), expected, way.__name__)


def test_a_model_holds_so_many_adapters_and_lets_go_of_the_least_recently_used(klein: Adapted, tmp_path: Path) -> None:
    model = triptych.load(klein.repo, device="cpu")
    model.adapters = Adapters(model.family.oracle, model.family.repository, model.components, most=2)
    for stage in model.stages:
        stage.adapters = model.adapters
    layers = {"transformer": ["attn.to_q"]}
    files = [lora.write(tmp_path / f"{k}.safetensors", klein.repo, layers, seed=k) for k in range(5)]
    short = {**klein.call, "num_inference_steps": 1, "guidance_scale": 1.0, "output_type": "pt"}
    call = {**short, "seed": 7}
    plain = model.generate(**call).images
    alone = [klein.diffusers(lora=[{"path": file}], **short) for file in files]
    sizes: list[int] = []
    for k in (0, 1, 0, 2, 3, 0, 4, 1):
        assert_same(model.generate(**call, lora=[{"path": files[k]}]).images, alone[k], f"file {k}")
        sizes.append(sum(each.nbytes for each in model.components["transformer"].parameters()))
        assert len(model.adapters.held()["transformer"]) <= 2
        assert len(model.components["transformer"].peft_config) <= 2
    assert len(set(sizes[1:])) == 1
    names = model.adapters.held()["transformer"]
    model.generate(**call, lora=[{"path": files[4]}])
    assert model.adapters.held()["transformer"] == names[::-1]  # 4 was there, and is the more recently used now
    assert_same(model.generate(**call).images, plain, "without, after all of them")


def test_requests_with_and_without_loras_that_take_turns_are_each_as_alone(klein: Adapted) -> None:
    style, other = {"path": str(klein.style)}, {"path": str(klein.other), "scale": 0.5}
    asked: list[Loras] = [[], [style], [other], [style, other], [], [style]]
    call = {**klein.call, "num_inference_steps": 3, "guidance_scale": 1.0, "output_type": "pt"}
    alone = [klein.diffusers(seed=seed, lora=loras, **call) for seed, loras in enumerate(asked)]
    devices: dict[str, Any] = dict.fromkeys(("encoder", "denoiser", "decoder"), "cpu")
    with LocalEngine(klein.repo, **devices, dtype="float32", warm_up=False) as engine:
        for exact in (True, False):
            requests = [triptych.Request(**call, exact=exact, seed=k, lora=loras) for k, loras in enumerate(asked)]
            jobs = [engine.submit(request) for request in requests]
            for job, loras, expected in zip(jobs, asked, alone):
                if exact:
                    assert_same(job.result().images, expected, str(loras))
                else:
                    torch.testing.assert_close(job.result().images, expected, rtol=0, atol=PIXEL_TOLERANCE)


def test_forwards_of_other_loras_are_never_joined_and_of_the_same_they_are(klein: Adapted) -> None:
    style, other = {"path": klein.style}, {"path": klein.other}
    asked: list[Loras] = [[style], [], [{**style, "scale": 0.5}], [style], [], [style, other], [other, style]]
    model = klein.roles["denoiser"]
    turns = []
    for seed, loras in enumerate(asked):
        ask = {**klein.call, "guidance_scale": 1.0, "seed": seed, "lora": loras, "exact": False}
        turns.append(next(model.segment(klein.roles["encoder"].run(triptych.Request(**ask)))))
    forwards = [forward for turn in turns for forward in turn.forwards]
    stage = turns[0].stage
    assert stage.groups(forwards) == [[0, 3], [1, 4], [2], [5], [6]]
    with torch.no_grad():
        joined, exact = (stage.predict(forwards, exact=each) for each in (False, True))
    for one, expected in zip(joined, exact, strict=True):
        torch.testing.assert_close(one, expected, rtol=0, atol=FORWARD_TOLERANCE * expected.abs().max().item())
    assert differ(exact[0], exact[2])


def test_a_prompt_is_remembered_for_the_text_encoder_that_it_was_encoded_with(
    adapted: Callable[[str], Adapted],
) -> None:
    flux = adapted("flux")
    with LocalEngine(flux.repo, encoder="cpu", denoiser="cpu", decoder="cpu", dtype="float32", warm_up=False) as engine:
        (prompts,) = {
            id(each.prompts): each.prompts for each in engine.router.replicas if each.prompts is not None
        }.values()
        assert isinstance(prompts, PromptCache)
        seen = []
        for loras in ([], [{"path": flux.style}], [], [{"path": flux.style}], [{"path": flux.other}]):
            made = engine.generate(**flux.call, seed=7, output_type="pt", exact=True, lora=loras).images
            assert_same(made, flux.diffusers(output_type="pt", lora=loras, **flux.call), str(loras))
            seen.append(prompts.misses)
    assert seen == [1, 2, 2, 2, 2]  # the last one's LoRA changes no text encoder


@pytest.fixture
def desk(klein: Adapted) -> Callable[..., Any]:
    """Admits LoRAs by headers, in a process that loads no weights."""
    server = triptych.load(klein.repo, role="server", device="cpu")
    return lambda *loras: server.admit(triptych.Request(**klein.call, lora=list(loras)))


def test_a_file_is_checked_before_any_weight_is_read(
    desk: Callable[..., Any], klein: Adapted, tiny_repo: TinyRepo, tmp_path: Path
) -> None:
    weights = load_file(klein.style)
    wide = {key: torch.cat([value, value], dim=int("lora_A" in key)) for key, value in weights.items()}
    ranks = {key: value[:, :1] if "lora_B" in key else value for key, value in weights.items()}
    odd = {**weights, "transformer.x_embedder.weight": torch.zeros(2, 2)}
    elsewhere = {key.replace("transformer_blocks.", "layers."): value for key, value in weights.items()}
    flat = {**weights, "transformer.proj_out.lora_A.weight": torch.zeros(2)}
    flat |= {"transformer.proj_out.lora_B.weight": torch.zeros(2)}
    half = {key: value for key, value in weights.items() if "lora_A" in key}
    of_other = {f"unet.{key}": value for key, value in weights.items()}
    for name, content, message in [
        ("wide", wide, "does not fit the transformer: its layer .* goes from"),
        ("ranks", ranks, "is broken: layer .* has rank 2 on one side, 1 on the other"),
        ("flat", flat, "'proj_out' is no layer that a LoRA can change"),
        ("half", half, "this file has only one half of the layer"),
        ("empty", {}, "this file has no tensors"),
        ("odd", odd, "this file has the tensor 'transformer.x_embedder.weight', which is none"),
        ("elsewhere", elsewhere, "does not fit the transformer, which has no layer"),
        ("unet", of_other, "a LoRA of Flux2KleinPipeline's transformer is accepted; this file changes"),
    ]:
        file = tmp_path / f"{name}.safetensors"
        save_file({key: value.contiguous() for key, value in content.items()}, file)
        with pytest.raises(ParameterError, match=message) as caught:
            desk({"path": file})
        assert (caught.value.field, caught.value.value) == ("lora", str(file))
    (tmp_path / "broken.safetensors").write_bytes(b"no header")
    with pytest.raises(ParameterError, match=r"broken.safetensors.*cannot be used: .* is not a safetensors file"):
        desk({"path": tmp_path / "broken.safetensors"})
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(klein.style.read_bytes()[:-1])
    with pytest.raises(ParameterError, match="cut.safetensors: is truncated or damaged"):
        desk({"path": cut})


def test_layers_that_lie_there_quantised_are_known_by_name(klein: Adapted, tmp_path: Path) -> None:
    repo = shutil.copytree(klein.repo, tmp_path / "repo")
    (file,) = (repo / "transformer").glob("*.safetensors")
    stored: dict[str, torch.Tensor] = {}
    for key, value in load_file(file).items():  # as bitsandbytes writes its 4-bit floats
        packed = torch.zeros((value.numel() + 1) // 2, 1, dtype=torch.uint8)
        stored |= {key: packed, f"{key}.absmax": torch.zeros(4)} if value.ndim == 2 else {key: value}
    save_file(stored, file, {"format": "pt"})
    config = json.loads((repo / "transformer/config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (repo / "transformer/config.json").write_text(json.dumps(config))
    server = triptych.load(repo, role="server", device="cpu")
    assert server.admit(triptych.Request(**klein.call, lora=[{"path": klein.style}])).fields["lora"]
    weights = load_file(klein.style)
    elsewhere = {key.replace("transformer_blocks.", "layers."): value for key, value in weights.items()}
    save_file(elsewhere, tmp_path / "elsewhere.safetensors")
    with pytest.raises(ParameterError, match="does not fit the transformer, which has no layer"):
        server.admit(triptych.Request(**klein.call, lora=[{"path": tmp_path / "elsewhere.safetensors"}]))


@pytest.mark.parametrize("role", ["server", "encoder"])
def test_one_is_admitted_where_the_weights_that_it_changes_are_not(klein: Adapted, tmp_path: Path, role: str) -> None:
    repo = shutil.copytree(klein.repo, tmp_path / "repo")
    for shard in tiny.shard(repo, "transformer"):
        shard.unlink()
    model = triptych.load(repo, role=role, device="cpu")
    assert model.admit(triptych.Request(**klein.call, lora=[{"path": klein.style}])).fields["lora"]


def test_one_of_the_layer_that_joins_a_shared_sequence_gives_the_same_picture_but_for_rounding(
    klein: Adapted, tmp_path: Path
) -> None:
    repo, losses = klein.repo, list[str]()
    last = lora.write(tmp_path / "last.safetensors", repo, {"transformer": ["proj_out", "attn.to_q"]}, seed=4)
    assert "transformer.proj_out.lora_A.weight" in load_file(last)
    call = {**klein.call, "seed": 7, "output_type": "pt", "exact": False}
    asked: list[Loras] = [[], [{"path": last}], [], [{"path": klein.style}, {"path": last, "scale": 0.5}]]
    whole = [triptych.load(repo, device="cpu").generate(**call, lora=loras).images for loras in asked]
    ranks = Ranks(repo, {"dtype": torch.float32}, Acceleration(ulysses=2), threads=1, on_lost=losses.append)
    try:
        model = triptych.load(repo, device="cpu")
        ranks.attach(model)
        shared = [model.generate(**call, lora=loras).images for loras in asked]
    finally:
        ranks.close()
    assert not losses and differ(whole[0], whole[1])
    for one, other in zip(shared, whole, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("style.safetensors", r'a list of {"path": ..., "scale": 1.0} is accepted'),
        ([{"path": "style.safetensors", "scael": 1}], "did you mean 'scale'"),
        ([{"scale": 1}], "lora=None: the path of a file is missing"),
        ([{"path": "{style}", "scale": "1"}], "lora='1': a number is accepted as the scale of"),
        ([{"path": "{style}", "scale": float("nan")}], "lora=nan: a number is accepted as the scale of"),
        ([{"path": "{style}", "scale": 10**400}], "a number is accepted as the scale of"),
        ([{"path": "{style}"}, {"path": "{style}"}], "it is named twice"),
        ([{"path": "{style}"}] * (MOST + 1), f"'{MOST + 1} LoRAs': at most {MOST} are accepted"),
        ([{"path": "{style}", "component": "transformer_2"}], "is loaded into is one of transformer; did you mean"),
        ([{"path": "{folder}/stile.safetensors"}], "there is .*; did you mean '.*style.safetensors'"),
        ([{"path": "{folder}"}], "a folder with one safetensors file is accepted; it has .*: name one of them"),
        ([{"path": "{repo}/model_index.json"}], "only safetensors files are read: pickles may run code"),
        ([{"path": "\0"}], "is accepted; there is none|this is no path"),
    ],
)
def test_what_is_no_lora_is_refused_with_a_reason(klein: Adapted, value: Any, message: str) -> None:
    names = {"{style}": str(klein.style), "{folder}": str(klein.style.parent), "{repo}": str(klein.repo)}

    def filled(text: Any) -> Any:
        for name, meant in names.items():
            text = text.replace(name, meant) if isinstance(text, str) else text
        return text

    loras = [{k: filled(v) for k, v in each.items()} for each in value] if isinstance(value, list) else value
    with pytest.raises(ParameterError, match=message):
        klein.model.admit(triptych.Request(**klein.call, lora=loras))


def test_a_folder_and_the_models_own_files_may_be_named(klein: Adapted, tmp_path: Path) -> None:
    repo = shutil.copytree(klein.repo, tmp_path / "repo")
    alone = tmp_path / "alone"
    alone.mkdir()
    shutil.copy(klein.style, alone / "pytorch_lora_weights.safetensors")
    shutil.copy(klein.style, repo / "style-lora.safetensors")
    shutil.copy(klein.other, alone / "another.safetensors")
    model = triptych.load(repo, device="cpu")
    call = {**klein.call, "seed": 7, "output_type": "pt"}
    expected = klein.diffusers(output_type="pt", lora=[{"path": klein.style}], **klein.call)
    for path in (alone, "style-lora.safetensors", klein.style):
        assert_same(model.generate(**call, lora=[{"path": path}]).images, expected, str(path))
    assert len(model.adapters.held()["transformer"]) == 1  # by content, not by name


def test_only_the_folders_given_may_be_named_where_others_send_requests(klein: Adapted, tmp_path: Path) -> None:
    given, secret = tmp_path / "given", tmp_path / "secret"
    for folder in (given / "sub", secret):
        folder.mkdir(parents=True)
    shutil.copy(klein.style, given / "sub" / "style.safetensors")
    shutil.copy(klein.other, secret / "other.safetensors")

    def admit(path: str) -> Any:
        request = triptych.Request(**klein.call, lora=[{"path": path}])
        request.lora_folders = [given]
        return klein.model.admit(request).fields["lora"]

    for accepted in ("sub/style.safetensors", str(given / "sub" / "style.safetensors")):
        assert admit(accepted)[0]["file"] == "style.safetensors"
    for path in ("../secret/other.safetensors", str(secret / "other.safetensors"), "sub/../../secret/other.safetensors",
                 f"{given}/../secret/other.safetensors", "owner/name", str(given), ".", "~"):  # fmt: skip
        with pytest.raises(ParameterError, match=r"lora='.*there is sub/style.safetensors") as caught:
            admit(path)
        assert str(tmp_path) not in caught.value.accepted
    with pytest.raises(ParameterError, match="did you mean 'sub/style.safetensors'"):
        admit("sub/stile.safetensors")


def test_a_role_refuses_another_file_under_the_path_that_was_checked(klein: Adapted, tmp_path: Path) -> None:
    file = tmp_path / "changing.safetensors"
    shutil.copy(klein.style, file)
    state = klein.roles["encoder"].run(triptych.Request(**klein.call, seed=7, lora=[{"path": file}]))
    shutil.copy(klein.other, file)
    denoiser = triptych.load(klein.repo, role="denoiser", device="cpu")
    with pytest.raises(ComponentFileError, match="is another file than the request was checked with"):
        denoiser.run(state)
    file.unlink()
    with pytest.raises(ComponentFileError, match="every role needs it under the same path"):
        denoiser.run(state)


def test_one_that_cannot_be_loaded_harms_no_other_request(klein: Adapted, monkeypatch: pytest.MonkeyPatch) -> None:
    model = triptych.load(klein.repo, device="cpu")
    call = {**klein.call, "seed": 7, "output_type": "pt"}
    plain = klein.diffusers(output_type="pt", **klein.call)
    styled = klein.diffusers(output_type="pt", lora=[{"path": klein.style}], **klein.call)
    with monkeypatch.context() as patch:
        patch.setattr(LoraDesk, "_check_shapes", lambda *_: None)
        weights = load_file(klein.other)
        wide = klein.other.with_name("wide.safetensors")
        save_file({k: torch.cat([v, v], dim=int("lora_A" in k)) for k, v in weights.items()}, wide)
        for before in (None, klein.style):
            if before is not None:
                assert_same(model.generate(**call, lora=[{"path": before}]).images, styled, "with a good one")
            with pytest.raises(ComponentFileError, match="wide.safetensors: is no LoRA that fits the transformer"):
                model.generate(**call, lora=[{"path": klein.style}, {"path": wide}])
            with pytest.raises(ComponentFileError):
                model.generate(**call, lora=[{"path": wide}])
            assert_same(model.generate(**call).images, plain, "without, after one that does not fit")
    wide.unlink()
    assert_same(model.generate(**call, lora=[{"path": klein.style}]).images, styled, "with, after it")


def test_no_lora_makes_a_model_wider_though_its_headers_told_nothing(
    adapted: Callable[[str], Adapted], monkeypatch: pytest.MonkeyPatch
) -> None:
    flux = adapted("flux")
    monkeypatch.setattr(LoraDesk, "_check_shapes", lambda *_: None)  # as where a role has no weights of the component
    narrow = load_file(
        lora.write(flux.style.with_name("narrow.safetensors"), flux.repo, {"transformer": ["x_embedder"]})
    )
    wide = flux.style.with_name("control.safetensors")
    save_file({k: torch.cat([v, v], dim=1) if "lora_A" in k else v for k, v in narrow.items()}, wide)
    model = triptych.load(flux.repo, device="cpu")
    call = {**flux.call, "seed": 7, "output_type": "pt"}
    plain = model.generate(**call).images
    with pytest.raises(ComponentFileError, match="control.safetensors: is no LoRA that fits the transformer"):
        model.generate(**call, lora=[{"path": wide}])
    transformer = model.components["transformer"]
    assert transformer.x_embedder.in_features == transformer.config.in_channels == 20
    assert_same(model.generate(**call).images, plain, "without, after it")


def test_families_without_a_loader_say_so(tiny_repo: TinyRepo, klein: Adapted) -> None:
    server = triptych.load(tiny_repo("longcat_image"), role="server", device="cpu")
    with pytest.raises(ParameterError, match="diffusers has no loader of LoRAs for LongCatImagePipeline"):
        server.admit(triptych.Request(prompt="a red fox", lora=[{"path": klein.style}]))
    server.admit(triptych.Request(prompt="a red fox", lora=[]))
    assert "lora" not in server.family.parameters
    assert "lora" in klein.model.family.parameters


def test_without_peft_a_request_is_refused_before_anything_runs(
    klein: Adapted, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("diffusers.utils.USE_PEFT_BACKEND", False)
    with pytest.raises(UsageError, match=r'a LoRA needs PEFT .* pip install "triptych\[lora\]"'):
        klein.model.admit(triptych.Request(**klein.call, lora=[{"path": klein.style}]))
    klein.model.admit(triptych.Request(**klein.call))
