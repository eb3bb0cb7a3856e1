"""The proof that a role loads what it uses: every byte it holds has a part in the results it was loaded for."""

import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

import triptych
from triptych import Request, State
from triptych.components.need import Need
from triptych.errors import HollowComponentError, UndeclaredError
from triptych.pipelines import flux2_klein, wan
from triptych.pipelines.registry import families, open_family
from triptych.roles import RoleType
from triptych.stages.base import Stage
from triptych.stages.denoising import Denoising
from triptych.stages.graph import route_of

from .parity import ROLES
from .tracing import CASES, Case, Trace, Tracer, selections, span, tensors_of, trace

TinyRepo = Callable[..., Path]

# What is held and never read: `{family or case: {role: {name: why}}}`. A whole model has those of its roles.
BATCHES = "8 bytes: a training counter that belongs to the state of torch's batch norm"
FREQUENCIES = "half a head: a second copy of `inv_freq`, which transformers' rotary embeddings keep for dynamic scaling"
GEMMA = {
    f"text_encoder.model.language_model.rotary_emb.{kind}_attention_original_inv_freq": FREQUENCIES
    for kind in ("full", "sliding")
}
SYNTHESIS = {"vocoder.mel_stft.stft_fn.inverse_basis": "diffusers' vocoder keeps the basis back from a spectrogram"}
LENGTH = "its result is a length: a number, no tensor"
UNREAD = {
    "ltx2": {"encoder": GEMMA},
    "ltx2 version=2.0 upsampler=True": {
        "encoder": GEMMA,
        "denoiser": {
            "latent_upsampler.upsampler.blur_down.kernel": "100 bytes: for scales with a denominator, asked for at all"
        },
    },
    "ltx2 version=2.3": {"encoder": GEMMA, "decoder": SYNTHESIS},
    "ltx2 version=2.5": {
        "encoder": GEMMA,
        "decoder": SYNTHESIS,
        "denoiser": {"transformer.keyframes_abs_pos_embedding": "one row, for the pipelines of keyframes"},
    },
    "flux2_klein": {
        "encoder": {
            "vae.bn.num_batches_tracked": BATCHES,
            "text_encoder.model.rotary_emb.original_inv_freq": FREQUENCIES,
        },
        "decoder": {"vae.bn.num_batches_tracked": BATCHES},
    },
    "flux2": {
        "encoder": {
            "vae.bn.num_batches_tracked": BATCHES,
            "text_encoder.model.language_model.rotary_emb.original_inv_freq": FREQUENCIES,
        },
        "decoder": {"vae.bn.num_batches_tracked": BATCHES},
    },
    "qwen_image": {"encoder": {"text_encoder.model.language_model.rotary_emb.original_inv_freq": FREQUENCIES}},
    **{
        family: {
            "encoder": {
                "text_encoder.model.language_model.rotary_emb.original_inv_freq": FREQUENCIES,
                "text_encoder.model.visual.rotary_pos_emb.original_inv_freq": FREQUENCIES,
            }
        }
        for family in ("qwen_image_edit", "qwen_image_layered")
    },
    "glm_image": {
        "encoder": {"vision_language_encoder.model.language_model.rotary_emb.original_inv_freq": FREQUENCIES}
    },
    "hunyuan_video15": {"encoder": {"text_encoder.rotary_emb.original_inv_freq": FREQUENCIES}},
    "longcat_image": {"encoder": {"text_encoder.model.language_model.rotary_emb.original_inv_freq": FREQUENCIES}},
    "longcat_image edit=True": {
        "encoder": {
            "text_encoder.model.language_model.rotary_emb.original_inv_freq": FREQUENCIES,
            "text_encoder.model.visual.rotary_pos_emb.original_inv_freq": FREQUENCIES,
        }
    },
    "z_image": {"encoder": {"text_encoder.rotary_emb.original_inv_freq": FREQUENCIES}},
}
# What is read and without effect.
TEXT_OF_THE_LAST_BLOCK = "diffusers' forward computes the text tokens after the last block, which nobody reads"
UNUSED = {
    family: {
        "denoiser": {
            f"transformer.transformer_blocks.1.{layer}.{leaf}": TEXT_OF_THE_LAST_BLOCK
            for layer in ("attn.to_add_out", "txt_mlp.net.0.proj", "txt_mlp.net.2")
            for leaf in ("weight", "bias")
        }
    }
    for family in ("qwen_image", "qwen_image_edit", "qwen_image_layered")
}
UNUSED["hunyuan_video15"] = {
    "denoiser": {
        f"transformer.transformer_blocks.1.{layer}.{leaf}": TEXT_OF_THE_LAST_BLOCK
        for layer in ("attn.to_add_out", "ff_context.net.0.proj", "ff_context.net.2")
        for leaf in ("weight", "bias")
    }
}
UNUSED["ltx2 version=2.5"] = {
    "encoder": {
        f"duration_head.{name}": LENGTH
        for name in (
            "attention_pooler.query_tokens",
            "video_modality_emb",
            "audio_modality_emb",
            *(
                f"{part}.{leaf}"
                for part in (
                    *(f"attention_pooler.to_{each}" for each in ("q", "k", "v", "out")),
                    *("video_input_proj", "audio_input_proj", "mlp_hidden", "mlp_out"),
                )
                for leaf in ("weight", "bias")
            ),
        )
    }
}
SMALL_BYTES = 4096

HALVES = {"encode": "encoder", "decode": "decoder"}
several_tasks = pytest.mark.parametrize(
    "case", [each for each in CASES if len(each.requests) > 1], ids=lambda case: case.name
)


@pytest.fixture(
    params=[
        pytest.param(
            each, marks=pytest.mark.slow if each.name in ("qwen_image_edit plus=True", "ltx2 version=2.5") else ()
        )
        for each in CASES
    ],
    ids=lambda case: case.name,
)
def case(request: pytest.FixtureRequest) -> Case:
    chosen: Case = request.param
    return chosen


@pytest.fixture
def repo(case: Case, tiny_repo: TinyRepo) -> Path:
    return tiny_repo(case.family, **case.variant)


def listed(table: Mapping[str, Mapping[str, Mapping[str, str]]], case: Case, role: str) -> set[str]:
    """Return the names that a table lists for a role."""
    return {
        name
        for each, names in table.get(case.name, table.get(case.family, {})).items()
        if role in (each, "monolithic")
        for name in names
    }


def test_every_family_is_in_the_table(tiny_repo: TinyRepo) -> None:
    assert {open_family(tiny_repo(case.family, **case.variant)).repository.family for case in CASES} == set(families())


def test_a_role_reads_and_uses_every_byte_it_holds(case: Case, repo: Path) -> None:
    for each in prove(case, repo, None):
        unread, unused = listed(UNREAD, case, each.role), listed(UNUSED, case, each.role)
        assert set(each.unread) == unread, f"{each.role}: excused, but read"
        assert set(each.unused) == unread | unused, f"{each.role}: excused, but of effect"


@pytest.mark.slow
@several_tasks
def test_a_role_loaded_for_one_task_reads_and_uses_every_byte_it_holds(case: Case, repo: Path) -> None:
    for tasks in selections(case, repo)[1:]:
        prove(case, repo, tasks)


def prove(case: Case, repo: Path, tasks: tuple[str, ...] | None) -> list[Trace]:
    """Trace a case, and see that every byte that is not excused is read and has an effect."""
    traces = trace(case, repo, tasks)
    for each in traces:
        where = f"{each.role}, tasks {each.tasks}"
        unread, unused = listed(UNREAD, case, each.role), listed(UNUSED, case, each.role)
        assert set(each.unread) <= unread, f"{where}: never read"
        assert set(each.unused) <= unread | unused, f"{where}: without effect"
        assert sum(each.unread.values()) < SMALL_BYTES < sum(each.held.values())
    return traces


def test_no_component_has_to_be_loaded_whole(case: Case, repo: Path, caplog: pytest.LogCaptureFixture) -> None:
    for role in (*ROLES, "monolithic"):
        triptych.load(repo, role=role, device="cpu")
    assert not [record.message for record in caplog.records if "loaded whole" in record.message]


def test_the_bytes_a_model_reports_are_those_it_holds(repo: Path) -> None:
    check_reported_bytes(repo, None)


@pytest.mark.slow
@several_tasks
def test_the_bytes_a_model_loaded_for_one_task_reports_are_those_it_holds(case: Case, repo: Path) -> None:
    for tasks in selections(case, repo)[1:]:
        check_reported_bytes(repo, tasks)


def check_reported_bytes(repo: Path, tasks: tuple[str, ...] | None) -> None:
    for role in (*ROLES, "monolithic", "server"):
        model = triptych.load(repo, role=role, device="cpu", tasks=tasks)
        held = {name: sum(weights_of(part).values()) for name, part in model.components.items()}
        assert model.loaded_bytes == held, role
        assert role != "server" or not any(held.values())


def weights_of(module: Any) -> dict[tuple[int, int], int]:
    """Return the bytes of each weight a module holds: of what a checkpoint holds, not of buffers that are computed."""
    if not isinstance(module, torch.nn.Module):
        return {}
    kept = module.state_dict(keep_vars=True)
    return {span(tensor): tensor.nbytes for name, tensor in tensors_of(module) if name in kept}


def test_a_role_holds_nothing_of_what_it_does_not_declare(case: Case, repo: Path) -> None:
    family = open_family(repo)
    for role in ROLES:
        model = triptych.load(repo, role=role, device="cpu")
        needs = family.needs([RoleType(role)], family.tasks)
        assert list(model.components) == list(needs)
        for name, need in needs.items():
            module = model.components[name]
            if isinstance(module, torch.nn.Module):
                assert model.is_hollow(name) == (not need.weights)
                assert need.weights or not list(tensors_of(module))


def test_touching_an_undeclared_component_is_impossible(case: Case, repo: Path) -> None:
    model = triptych.load(repo, device="cpu")
    undeclared = [
        (stage, name)
        for stage in model.stages
        for name in model.family.repository.components
        if name not in {*model.family.needs_of(type(stage)), *stage.needs}
    ]
    assert {stage.name for stage, _ in undeclared} == {stage.name for stage in model.stages}
    for stage, name in undeclared:
        # Helpers have what the diffusers pipeline's constructor takes.
        touches = (getattr, read_helper, call_helper) if hasattr(stage.helpers, name) else (getattr,)
        for touch in touches:
            with pytest.raises(UndeclaredError) as caught:
                touch(stage, name)
            assert (caught.value.stage, caught.value.kind, caught.value.name) == (stage.name, "component", name)


def read_helper(stage: Stage, name: str) -> None:
    _ = getattr(stage.helpers, name).config


def call_helper(stage: Stage, name: str) -> None:
    getattr(stage.helpers, name)()


@pytest.mark.parametrize("role", ROLES)
def test_running_a_hollow_component_tells_component_role_and_stage(
    case: Case, role: str, repo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = triptych.load(repo, role=role, device="cpu")
    state = turn_of(case, repo, role)
    stage = next(
        stage for stage in model.stages if stage.name == route_of(model.family.recipe, state.task)[state.position][1][0]
    )
    calls = list(hollow_calls(model))
    assert calls
    for component, call in calls:
        with monkeypatch.context() as patch, pytest.raises(HollowComponentError) as caught:
            patch.setattr(stage, "begin" if isinstance(stage, Denoising) else "run", lambda _, call=call: call())
            model.run(State.from_bytes(bytes(state.to_bytes())))
        assert (caught.value.component, caught.value.role, caught.value.stage) == (component, role, stage.name)
        assert all(repr(part) in str(caught.value) for part in (component, role, stage.name))


def turn_of(case: Case, repo: Path, role: str) -> State:
    """Return the first request of a case as a state whose turn is `role`'s."""
    state = triptych.load(repo, role="server", device="cpu").admit(
        Request(**{"prompt": "fox", **next(iter(case.requests.values()))[0]})
    )
    state.position = [each.value for each in state.route].index(role)
    return state


def hollow_calls(model: Any) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Go through everything of a model that must not be run: hollow components, and the unused half of a halved one."""
    for name, component in model.components.items():
        if model.is_hollow(name):
            yield name, component
            for method in HALVES:
                if hasattr(component, method):
                    yield name, getattr(component, method)
        elif isinstance(component, torch.nn.Module):
            for part in HALVES.values():
                half = getattr(component, part, None)
                if half is not None and not list(tensors_of(half)):
                    yield name, half


def test_the_proof_fails_where_a_role_loads_layers_for_nothing(
    tiny_repo: TinyRepo, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoding, case = flux2_klein.TextEncoding, CASES[0]
    monkeypatch.setattr(encoding, "needs", {**encoding.needs, "text_encoder": Need.FULL})
    encoder, denoiser, *_ = trace(case, tiny_repo(case.family), ("text-to-image",))
    surplus = set(encoder.unused) - listed(UNREAD, case, "encoder")
    parts = {re.match(r"text_encoder\.(model\.)?(layers\.\d+|\w+)", name)[2] for name in surplus}
    # They run, because transformers computes all that is there; so they are read.
    assert parts == {"layers.27", "layers.28", "layers.29", "layers.30", "norm", "lm_head"}
    assert surplus.isdisjoint(encoder.unread)
    assert not denoiser.unused


def test_the_proof_fails_where_a_role_loads_what_never_runs(
    tiny_repo: TinyRepo, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoding, case = wan.Decoding, next(case for case in CASES if case.family == "wan")
    monkeypatch.setattr(decoding, "needs", {"vae": Need.FULL})
    decoder = next(each for each in trace(case, tiny_repo(case.family, **case.variant)) if each.role == "decoder")
    assert {name.split(".")[1] for name in decoder.unread} == {"encoder", "quant_conv"}
    assert decoder.unread == decoder.unused


class Sample(torch.nn.Module):
    """Every way in which a tensor is used, read for nothing, or only seems to be read."""

    def __init__(self) -> None:
        super().__init__()
        names = ("multiplied", "sliced", "converted", "copied_in", "added_in", "handed_on")
        for name in (*names, "in_vain", "overwritten", "viewed", "measured", "copied", "left"):
            self.register_parameter(name, torch.nn.Parameter(torch.ones(4, 4)))
        self.tied = self.multiplied
        self.register_buffer("looked_up", torch.ones(4, 4))

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        x = x @ self.multiplied + self.sliced.t()[1:3].sum() + self.looked_up[torch.tensor([2])].detach()
        x = x * self.converted.double().t().mean() + torch.empty(4, 4).copy_(self.copied_in).sum()
        x[0].add_(self.added_in[1])
        (self.in_vain * x).sum()
        x = x + (self.overwritten * 2).zero_()
        self.viewed.view(16).detach().t()
        self.copied.double().contiguous().clone()
        return [
            x + torch.zeros_like(self.measured) + self.measured.new_ones(4) + len(self.measured),
            self.handed_on.t(),
        ]


def test_the_tracer_tells_use_from_reading_and_reading_from_looking() -> None:
    module = Sample()
    with Tracer({"sample": module}) as tracer, torch.no_grad():
        tracer.arrived({"outputs": module(torch.ones(4, 4))})
    unread = {f"sample.{name}": 64 for name in ("viewed", "measured", "copied", "left", "handed_on")}
    assert tracer.unread == unread
    # What is overwritten counts as used: memory is followed, not values.
    del unread["sample.handed_on"]
    assert tracer.unused == unread | {"sample.in_vain": 64}
    assert "sample.multiplied=sample.tied" in tracer.sizes


def test_tensors_in_one_storage_are_told_apart() -> None:
    storage = torch.ones(8)
    module = torch.nn.Module()
    module.register_buffer("first", storage[:4])
    module.register_buffer("second", storage[4:])
    with Tracer({"sample": module}) as tracer:
        tracer.arrived(module.get_buffer("second").sum())
    assert tracer.unread == tracer.unused == {"sample.first": 16}
