"""LTX-2's second stage with a LoRA gives what diffusers gives that loads it before its second call, whole and split."""

import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.utils import USE_PEFT_BACKEND
from safetensors.torch import load_file, save_file
from tiny import lora
from tiny.ltx2 import LORA

import triptych
from triptych.components.acceleration import Acceleration
from triptych.errors import ParameterError, UsageError
from triptych.runtime.lanes import Work
from triptych.runtime.segment import Turn
from triptych.runtime.step_lane import StepLane
from triptych.state import State

from .parity import FORWARD_TOLERANCE, PIXEL_TOLERANCE, assert_same, differ
from .test_ltx2_two_stage import CALL, FIRST, PLAIN, TwoStages, videos_with_sound  # noqa: F401 (a fixture)

TinyRepo = Callable[..., Path]

needs_peft = pytest.mark.skipif(not USE_PEFT_BACKEND, reason="PEFT is not installed")
LARGE = 10**9
"""A budget that no forward reaches."""


@pytest.fixture(
    scope="module",
    params=[
        ("2.0", "float32", True),
        ("2.3", "bfloat16", True),
        ("2.0", "bfloat16", "connectors"),
        *(pytest.param(each, marks=pytest.mark.slow) for each in [("2.3", "float32", True), ("2.5", "float32", True)]),
    ],
    ids=lambda param: "-".join(map(str, param)),
)
def either(request: pytest.FixtureRequest, tiny_repo: TinyRepo) -> TwoStages:
    version, dtype, lora = request.param
    return TwoStages(tiny_repo("ltx2", version=version, upsampler=True, lora=lora), dtype)


@pytest.fixture(scope="module")
def stages(tiny_repo: TinyRepo) -> TwoStages:
    return TwoStages(tiny_repo("ltx2", version="2.0", upsampler=True, lora=True))


@pytest.fixture(params=[{}, {"image": FIRST}], ids=["text", "image"])
def given(request: pytest.FixtureRequest) -> dict[str, Any]:
    """What a task is given beside the prompt."""
    return dict(request.param)


@needs_peft
@pytest.mark.parametrize(
    "call", [{}, {**PLAIN, "stage_2_lora_scale": 0.4}, {"num_videos_per_prompt": 2}], ids=["usual", "weaker", "two"]
)
def test_refined_videos_are_those_of_diffusers_chain_with_the_lora(
    either: TwoStages, given: dict[str, Any], call: dict[str, Any]
) -> None:
    either.of(stage_2_lora=LORA, **call, **given)


@needs_peft
def test_the_lora_and_its_scale_change_the_video(stages: TwoStages, given: dict[str, Any]) -> None:
    frames, audio = stages.of(**given)
    adapted, adapted_audio = stages.of(stage_2_lora=LORA, **given)
    assert differ(adapted, frames) and differ(adapted_audio, audio)
    assert differ(stages.of(stage_2_lora=LORA, stage_2_lora_scale=0.4, **given)[0], adapted)


@needs_peft
def test_requests_without_the_lora_stay_what_they_were(stages: TwoStages, given: dict[str, Any]) -> None:
    before = stages.of(**given)
    stages.of(stage_2_lora=LORA, **given)
    assert_same(stages.of(**given), before, "after a request with it")
    one_stage = {**CALL, **given, "seed": 7, "output_type": "pt"}
    fresh = triptych.load(stages.repo, device="cpu").generate(**one_stage)
    assert_same(stages.model.generate(**one_stage).frames, fresh.frames, "one stage after a request with it")


@needs_peft
def test_only_the_denoiser_loads_it_and_once(stages: TwoStages) -> None:
    for seed in (7, 8):
        stages.split(**CALL, two_stage=True, stage_2_lora=LORA, seed=seed)
    adapters = {
        role: [len(getattr(part, "peft_config", {})) for part in model.components.values()]
        for role, model in stages.roles.items()
    }
    assert {role: sum(counts) for role, counts in adapters.items()} == {"encoder": 0, "denoiser": 1, "decoder": 0}


@needs_peft
def test_what_it_changes_in_the_connectors_is_loaded_by_the_encoder(tiny_repo: TinyRepo) -> None:
    encoder = triptych.load(
        tiny_repo("ltx2", version="2.0", upsampler=True, lora="connectors"), role="encoder", device="cpu"
    )
    plain = encoder.run(triptych.Request(**CALL, two_stage=True, seed=7))
    adapted = encoder.run(triptych.Request(**CALL, two_stage=True, stage_2_lora=LORA, seed=7))
    assert plain.fields.get("refinement_conditioning") is None
    first, second = (adapted.fields[name] for name in ("connector_prompt_embeds", "refinement_conditioning"))
    assert_same(first, plain.fields["connector_prompt_embeds"], "the first stage's text")
    assert differ(second[0], first.chunk(2)[1])


def encoded(stages: TwoStages, **changes: Any) -> State:
    """A state that waits for the denoiser."""
    request = triptych.Request(**{**CALL, "two_stage": True, "seed": 7, "num_inference_steps": 3, **changes})
    return stages.roles["encoder"].run(request)


@needs_peft
def test_requests_with_and_without_it_that_take_turns_are_each_as_alone(
    stages: TwoStages, monkeypatch: pytest.MonkeyPatch
) -> None:
    denoiser = stages.roles["denoiser"]
    states = {
        "with": encoded(stages, stage_2_lora=LORA),
        "without": encoded(stages),
        "weaker": encoded(stages, stage_2_lora=LORA, stage_2_lora_scale=0.4, seed=8),
        "image": encoded(stages, stage_2_lora=LORA, image=FIRST),
        "first stage for long": encoded(stages, num_inference_steps=6),
    }
    alone = {name: denoiser.run(state).fields for name, state in states.items()}
    lane = StepLane(denoiser, "test", threads=1, budget=LARGE)
    together, outcomes, steps, ended = threading.Event(), {}, [], threading.Semaphore(0)
    names: dict[Work, str] = {}
    taken = lambda runner, now: [name for name, _ in steps].count(names[runner.work])
    monkeypatch.setattr(lane, "_urgency", taken)

    def work(name: str, state: State) -> Work:
        def stepped(stage: str, step: int, count: int) -> None:
            assert together.wait(20)
            steps.append((name, stage))

        def done(outcome: Any) -> None:
            outcomes[name] = outcome
            ended.release()

        return Work(state.copy(), done, on_step=stepped)

    try:
        names.update((work(name, state), name) for name, state in states.items())
        for each in names:
            lane.put(each)
        together.set()
        assert all(ended.acquire(timeout=60) for _ in states)
    finally:
        lane.close()
    refinement = [name for name, stage in steps if stage == "ltx2_refinement"]
    last = len(refinement) - 1 - refinement[::-1].index("with")
    assert "without" in refinement[refinement.index("with") : last], steps
    for name, fields in alone.items():
        assert isinstance(outcomes[name], State), outcomes[name]
        for field in ("latents", "audio_latents"):
            assert_same(outcomes[name].fields[field], fields[field], f"{name}: {field}")


def refining(stages: TwoStages, **changes: Any) -> Turn:
    """A request's first turn of the second stage."""
    segment = stages.roles["denoiser"].segment(encoded(stages, exact=False, **changes))
    turn = next(segment)
    while turn.stage.name != "ltx2_refinement":
        turn = segment.send(turn.predict())
    return turn


@needs_peft
def test_forwards_with_and_without_it_are_never_joined(stages: TwoStages) -> None:
    with_it = {"stage_2_lora": LORA}
    calls = [with_it, {}, {**with_it, "stage_2_lora_scale": 0.4}, {**with_it, "seed": 8}, {"seed": 8}]
    turns = [refining(stages, **call) for call in calls]
    forwards = [forward for turn in turns for forward in turn.forwards]
    stage = turns[0].stage
    assert stage.groups(forwards) == [[0, 3], [1, 4], [2]]
    with torch.no_grad():
        joined, exact = (stage.predict(forwards, exact=each) for each in (False, True))
    for one, other in zip(joined, exact, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=FORWARD_TOLERANCE * other.abs().max().item())


class Styled(TwoStages):
    """Two stages of diffusers with LoRAs of the request itself: on in both stages, before the second's own."""

    def diffusers(self, *, lora: list[dict[str, Any]] | None = None, **call: Any) -> Any:  # type: ignore[override]
        second = self.second["image" if "image" in call else "text"]
        names = [f"style_{number}" for number in range(len(lora or ()))]
        scales = [each.get("scale", 1.0) for each in lora or ()]
        for name, each in zip(names, lora or ()):
            path = Path(each["path"])
            second.load_lora_weights(str(path.parent), weight_name=path.name, adapter_name=name)
        if names:  # of modules that both stages' pipelines share
            second.set_adapters(names, scales)
        switch = type(second).set_adapters
        second.set_adapters = lambda name, scale: switch(second, [*names, name], [*scales, scale])
        try:
            return super().diffusers(**call)
        finally:
            del second.set_adapters
            if names:
                second.unload_lora_weights()


@needs_peft
@pytest.mark.parametrize("second", [{}, {"stage_2_lora": LORA, "stage_2_lora_scale": 0.4}], ids=["alone", "with-both"])
def test_a_requests_own_loras_are_on_in_both_stages(
    tiny_repo: TinyRepo, given: dict[str, Any], second: dict[str, Any], tmp_path: Path
) -> None:
    stages = Styled(tiny_repo("ltx2", version="2.0", upsampler=True, lora="connectors"))
    layers = {"transformer": ["attn1.to_k", "proj_in"], "connectors": ["attn1.to_q", "text_proj_in"]}
    style = lora.write(tmp_path / "style.safetensors", stages.repo, layers, seed=5)
    styled = stages.of(lora=[{"path": str(style), "scale": 0.7}], **second, **given)
    plain = stages.of(**second, **given)
    assert differ(styled[0], plain[0]) and differ(styled[1], plain[1])
    held = {
        role: {name: len(each) for name, each in model.adapters.held().items()} for role, model in stages.roles.items()
    }
    count = 2 if second else 1
    assert held == {"encoder": {"connectors": count}, "denoiser": {"transformer": count}, "decoder": {}}


@needs_peft
def test_a_requests_own_may_be_the_second_stages_too(stages: TwoStages, tmp_path: Path) -> None:
    twin = tmp_path / "twin.safetensors"
    save_file(load_file(stages.repo / LORA), twin, metadata={"format": "pt", "of": "another name"})

    def with_(path: str | Path, strength: float) -> Any:
        loras = [{"path": str(path), "scale": 0.3}]
        return stages.whole(
            **CALL, two_stage=True, lora=loras, stage_2_lora=LORA, stage_2_lora_scale=strength, output_type="pt"
        )[0]

    same, apart, weaker = with_(stages.repo / LORA, 0.5), with_(twin, 0.5), with_(twin, 0.4)
    assert (same - apart).abs().max() < PIXEL_TOLERANCE < (same - weaker).abs().max()


def test_without_peft_a_request_is_refused_before_its_first_step(
    stages: TwoStages, monkeypatch: pytest.MonkeyPatch
) -> None:
    denoiser = triptych.load(stages.repo, role="denoiser", device="cpu")
    monkeypatch.setattr("diffusers.utils.USE_PEFT_BACKEND", False)
    steps: list[int] = []
    with pytest.raises(UsageError, match=r"a LoRA needs PEFT .* pip install \"triptych\[lora\]\""):
        denoiser.run(encoded(stages, stage_2_lora=LORA), on_step=lambda _, step, __: steps.append(step))
    assert not steps
    denoiser.run(encoded(stages))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stage_2_lora": LORA[1:]}, f"beside the components, .* the repository has {LORA}; did you mean '{LORA}'"),
        ({"stage_2_lora": "transformer/diffusion_pytorch_model.safetensors"}, "a safetensors file beside"),
        ({"stage_2_lora": f"/etc/../{LORA}"}, "a safetensors file beside the components"),
        ({"stage_2_lora": True}, "a safetensors file beside the components"),
        ({"stage_2_lora": LORA, "stage_2_lora_scale": "1"}, "stage_2_lora_scale='1': a finite number"),
        ({"stage_2_lora": LORA, "stage_2_lora_scale": float("nan")}, "stage_2_lora_scale=nan: a finite number"),
    ],
)
def test_what_cannot_be_done_is_refused_with_a_reason(stages: TwoStages, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ParameterError, match=message):
        stages.model.admit(triptych.Request(**{**CALL, "two_stage": True, **changes}))


@needs_peft
@pytest.mark.parametrize(("changes", "role"), [(True, "denoiser"), ("connectors", "encoder")])
def test_one_is_refused_where_weights_are_not_as_it_would_change_them(
    tiny_repo: TinyRepo, changes: bool | str, role: str
) -> None:
    repo = tiny_repo("ltx2", version="2.0", upsampler=True, lora=changes)
    ask = {**CALL, "two_stage": True, "exact": False}
    fp8 = Acceleration(quantization="fp8")
    server = triptych.load(repo, role="server", device="cpu", acceleration={role: fp8})
    server.admit(triptych.Request(**ask))
    server.admit(triptych.Request(**{**ask, "two_stage": False}, stage_2_lora=LORA))  # where it says nothing
    with pytest.raises(ParameterError, match=f"'{LORA}': none is accepted where the {role}'s weights are") as caught:
        server.admit(triptych.Request(**ask, stage_2_lora=LORA))
    assert (caught.value.field, caught.value.value) == ("stage_2_lora", LORA)
    decoding = triptych.load(repo, role="server", device="cpu", acceleration={"decoder": fp8})
    decoding.admit(triptych.Request(**ask, stage_2_lora=LORA))


def test_a_repository_without_one_says_so(tiny_repo: TinyRepo) -> None:
    model = triptych.load(tiny_repo("ltx2", version="2.0", upsampler=True), role="server", device="cpu")
    with pytest.raises(ParameterError, match="the repository has none"):
        model.admit(triptych.Request(**CALL, two_stage=True, stage_2_lora=LORA))


@pytest.fixture
def copied(stages: TwoStages, tmp_path: Path) -> Path:
    """A copy of the repository, with files beside its LoRA that do not fit."""
    repo = shutil.copytree(stages.repo, tmp_path / "copied")
    weights = load_file(repo / LORA)
    save_file({f"unet.{key}": value for key, value in weights.items()}, repo / "other-lora.safetensors")
    wide = {key: torch.cat([value, value], dim=int("lora_A" in key)) for key, value in weights.items()}
    save_file(wide, repo / "wide-lora.safetensors")
    (repo / "broken-lora.safetensors").write_bytes(b"no header")
    return repo


def test_a_file_that_holds_no_lora_of_the_transformer_is_refused_by_its_header(copied: Path) -> None:
    model = triptych.load(copied, role="server", device="cpu")
    with pytest.raises(ParameterError, match="other-lora.safetensors.*a LoRA of LTX2Pipeline's transformer or conn"):
        model.admit(triptych.Request(**CALL, two_stage=True, stage_2_lora="other-lora.safetensors"))
    with pytest.raises(ParameterError, match="broken-lora.safetensors: is not a safetensors file"):
        model.admit(triptych.Request(**CALL, two_stage=True, stage_2_lora="broken-lora.safetensors"))


@needs_peft
def test_one_that_does_not_fit_harms_no_other_request(stages: TwoStages, copied: Path) -> None:
    model = triptych.load(copied, device="cpu")
    call = {**CALL, "two_stage": True, "seed": 7, "output_type": "pt"}
    for _ in range(2):
        with pytest.raises(ParameterError, match="wide-lora.safetensors'.*does not fit the transformer: its layer"):
            model.generate(**call, stage_2_lora="wide-lora.safetensors")
    assert_same(model.generate(**call).frames, stages.of()[0], "without, after one that does not fit")
    adapted = model.generate(**call, stage_2_lora=LORA).frames
    assert_same(adapted, stages.of(stage_2_lora=LORA)[0], "with, after one that does not fit")
