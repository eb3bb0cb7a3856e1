"""Encoder and decoder lanes: requests that wait together run as one, and come out as they would alone."""

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.utils import USE_PEFT_BACKEND
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny import lora

import triptych
from triptych import embedded
from triptych.engine.local import SLOTS, LanesReplica, LocalEngine, remember_prompts
from triptych.errors import Cancelled, DeadlineExceeded
from triptych.roles import RoleType
from triptych.runtime import meeting
from triptych.runtime.decoder_lane import DecoderLane
from triptych.runtime.lanes import OFTEN, Lane, Work
from triptych.runtime.model import Model
from triptych.runtime.pace import Appetite
from triptych.runtime.segment import finish
from triptych.state import State

TOLERANCE = 1e-4
"""Of a `pt` output, by the design."""
ROWS = 8
PROMPTS = ("a red fox", "two hens", "a green elephant in the snow", "a boat")
FAMILIES: dict[str, dict[str, Any]] = {
    "flux2_klein": {"max_sequence_length": 24},
    "flux2": {"max_sequence_length": 64},
    "flux": {"max_sequence_length": 24},
    "z_image": {"max_sequence_length": 24},
    "stable_diffusion_3": {"max_sequence_length": 24},
    "qwen_image": {"max_sequence_length": 24},
    "wan": {"max_sequence_length": 24, "num_frames": 5},
    "hunyuan_video15": {"num_frames": 5},
    "ltx2": {"max_sequence_length": 24, "num_frames": 9},
    "helios": {"max_sequence_length": 24, "num_frames": 17},
    "longcat_image": {},
}
SAME_LENGTH = {"qwen_image"}
"""Families that share an encoding only among prompts of as many tokens: their embeddings have no padding."""
NOT_SHARED = {("ltx2", "encoder"), ("longcat_image", "encoder"), ("hunyuan_video15", "decoder")}
"""What is not row-wise: Gemma's hidden states are all read; prompts are rewritten first; that autoencoder takes one."""


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What lanes learn and keep on disk is kept apart, test by test."""
    monkeypatch.setenv("TRIPTYCH_CACHE", str(tmp_path))


@pytest.fixture(scope="module")
def model(tiny_repo: Callable[..., Path]) -> Model:
    return triptych.load(tiny_repo("flux2_klein"), device="cpu")


class Calls:
    """Counts the rows of a module's calls; holds them up while `open` is not set."""

    def __init__(self, model: Model, component: str, method: str) -> None:
        self.rows: list[int] = []
        self.open = threading.Event()
        self.open.set()
        self.entered = threading.Event()
        self._module, self._method = model.components[component], method
        run = getattr(self._module, method)

        def counting(*args: Any, **kwargs: Any) -> Any:
            first = next(each for each in (*args, *kwargs.values()) if isinstance(each, torch.Tensor))
            self.rows.append(len(first))
            self.entered.set()
            assert self.open.wait(20)
            return run(*args, **kwargs)

        setattr(self._module, method, counting)

    def remove(self) -> None:
        self.open.set()
        delattr(self._module, self._method)


@pytest.fixture
def decodes(model: Model) -> Iterator[Calls]:
    calls = Calls(model, "vae", "decode")
    yield calls
    calls.remove()


@pytest.fixture
def encodes(model: Model) -> Iterator[Calls]:
    calls = Calls(model, "text_encoder", "forward")
    yield calls
    calls.remove()


def admitted(model: Model, **changes: Any) -> State:
    asked = {"prompt": "a red fox", "seed": 7, "num_inference_steps": 2, "output_type": "pt", "exact": False}
    accepted = {name: value for name, value in {"height": 64, "width": 64}.items() if name in model.family.parameters}
    asked |= {"max_sequence_length": 24} if "max_sequence_length" in model.family.parameters else {}
    return model.admit(triptych.Request(**{**asked, **accepted, **changes}))


def denoised(model: Model, **changes: Any) -> State:
    """A state that waits for the decoder."""
    state = admitted(model, **changes)
    while state.next_role is not RoleType.DECODER:
        finish(model.segment(state))
    return state


def alone(model: Model, state: State) -> State:
    """The state after its next segment, run by itself."""
    copy = state.copy()
    finish(model.segment(copy))
    return copy


class Outcomes:
    """Puts works into a lane, collects what it tells of them, and waits for all of it."""

    def __init__(self, lane: Lane) -> None:
        self.lane = lane
        self.of: dict[object, Any] = {}
        self._changed = threading.Condition()

    def work(self, name: object, state: State, **options: Any) -> Work:
        def done(outcome: Any) -> None:
            with self._changed:
                self.of[name] = outcome
                self._changed.notify_all()

        return Work(state, done, **options)

    def put(self, name: object, state: State, **options: Any) -> Work:
        work = self.work(name, state, **options)
        self.lane.put(work)
        return work

    def next(self, name: object, state: State) -> Any:
        """Put a copy of a state in and wait for what becomes of it."""
        self.put(name, state.copy())
        return self.wait(len(self.of) + 1)[name]

    def together(self, states: dict[Any, State]) -> dict[object, Any]:
        """Put states in while the lane is held up, so that all of them wait together; returns what became of them."""
        held = threading.Event()

        def wait(_: Any) -> None:
            held.wait(20)

        late = Work(next(iter(states.values())).copy(), wait, deadline=time.monotonic() - 1)
        self.lane.put(late)
        for name, state in states.items():
            self.put(name, state)
        held.set()
        return self.wait(len(states))

    def wait(self, count: int) -> dict[object, Any]:
        with self._changed:
            assert self._changed.wait_for(lambda: len(self.of) >= count, 30), f"only {list(self.of)} ended"
        return self.of


@pytest.fixture
def lane(model: Model) -> Iterator[Lane]:
    lane = DecoderLane(model, "test", threads=1, rows=ROWS)
    hungry(lane)
    yield lane
    lane.close()


@pytest.fixture
def encoder(model: Model) -> Iterator[Lane]:
    lane = Lane(model, "test", threads=1, rows=ROWS)
    hungry(lane)
    yield lane
    lane.close()


def hungry(lane: Lane) -> None:
    """Let a lane begin as if it had found all of its rows worth it."""

    class Known(dict[object, Any]):
        def setdefault(self, kind: object, default: Any = None) -> Any:
            default.found = ROWS
            return super().setdefault(kind, default)

    lane._appetites = Known()


def worst(one: Any, other: Any) -> float:
    """Return by how much two values' tensors differ, relative to the largest of them where that is above 1."""
    if isinstance(one, torch.Tensor):
        assert one.shape == other.shape and one.dtype == other.dtype
        if not one.numel():
            return 0.0
        return float((one.double() - other.double()).abs().max() / one.double().abs().max().clamp_min(1))
    if isinstance(one, (list, tuple)):
        assert len(one) == len(other)
        return max((worst(*pair) for pair in zip(one, other)), default=0.0)
    return 0.0


def check_equal(state: State, expected: State) -> None:
    assert state.fields.keys() == expected.fields.keys() and state.position == expected.position
    for name, value in expected.fields.items():
        assert worst(value, state.fields[name]) <= TOLERANCE, name


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_gives_each_request_what_it_gets_alone(family: str, tiny_repo: Callable[..., Path]) -> None:
    model = triptych.load(tiny_repo(family), device="cpu")
    states = [admitted(model, **{**FAMILIES[family], "prompt": p, "seed": k}) for k, p in enumerate(PROMPTS)]
    while (role := states[0].next_role) is not None:
        expected = [alone(model, state) for state in states]
        if role is RoleType.DENOISER:
            twins = [next(model.segment(State.from_bytes(bytes(states[0].to_bytes())))) for _ in range(2)]
            forms = [[each.stage.form(forward) for forward in each.forwards] for each in twins]
            assert forms[0] == forms[1], "the forwards of two requests that are alike can be rows of one"
        else:
            lane = (DecoderLane if role is RoleType.DECODER else Lane)(model, "test", threads=1, rows=ROWS)
            hungry(lane)
            outcomes = Outcomes(lane).together({k: state.copy() for k, state in enumerate(states)})
            for k, each in enumerate(expected):
                assert isinstance(outcomes[k], State), outcomes[k]
                check_equal(outcomes[k], each)
            shared = (family, role.value) not in NOT_SHARED
            assert dict(lane.batches) == ({len(states): 1} if shared else {})
            lane.close()
        states = expected


def test_texts_of_one_length_are_rows_of_one_forward(model: Model, encoder: Lane, encodes: Calls) -> None:
    states = {prompt: admitted(model, prompt=prompt, guidance_scale=1.0) for prompt in PROMPTS}
    Outcomes(encoder).together(states)
    assert encodes.rows == [len(PROMPTS)]


def test_texts_of_different_lengths_without_padding_are_forwards_of_their_own(
    tiny_repo: Callable[..., Path],
) -> None:
    model = triptych.load(tiny_repo("qwen_image"), device="cpu", role="encoder")
    calls, lane = Calls(model, "text_encoder", "forward"), Lane(model, "test", threads=1, rows=ROWS)
    hungry(lane)
    prompts = ("a cat", "a dog", "a very much longer prompt than those before it")
    Outcomes(lane).together({prompt: admitted(model, prompt=prompt) for prompt in prompts})
    lane.close()
    assert sorted(calls.rows) == [1, 2]
    calls.remove()


def test_a_prompt_in_the_cache_needs_no_forward_and_the_negative_one_only_one(tiny_repo: Callable[..., Path]) -> None:
    model = triptych.load(tiny_repo("flux2_klein"), device="cpu", role="encoder")
    cache = remember_prompts(model, 2**30)
    assert cache is not None
    calls, lane = Calls(model, "text_encoder", "forward"), Lane(model, "test", threads=1, rows=ROWS)
    hungry(lane)
    first = Outcomes(lane).together({p: admitted(model, prompt=p) for p in PROMPTS[:3]})
    assert calls.rows == [3, 1], "three prompts, and the empty one"
    held = cache.nbytes
    again = Outcomes(lane).together({p: admitted(model, prompt=p) for p in (*PROMPTS[1:], "a red fox again")})
    assert calls.rows == [3, 1, 2], "the two that are new"
    check_equal(again[PROMPTS[1]], first[PROMPTS[1]])
    assert (
        held
        == sum(state.fields["prompt_embeds"].nbytes + 4 * 24 * 8 for state in first.values())
        + first[PROMPTS[0]].fields["prompt_embeds"].nbytes
        + 4 * 24 * 8
    )
    lane.close()


def test_what_requests_encoded_together_is_not_given_to_exact_ones(tiny_repo: Callable[..., Path]) -> None:
    model = triptych.load(tiny_repo("flux2_klein"), device="cpu", role="encoder")
    expected = alone(model, admitted(model, prompt=PROMPTS[0], exact=True)).fields["prompt_embeds"]
    cache = remember_prompts(model, 2**30)
    assert cache is not None
    calls, lane = Calls(model, "text_encoder", "forward"), Lane(model, "test", threads=1, rows=ROWS)
    hungry(lane)
    Outcomes(lane).together({p: admitted(model, prompt=p) for p in PROMPTS[:3]})
    assert calls.rows == [3, 1]
    exact = Outcomes(lane).together({"exact": admitted(model, prompt=PROMPTS[0], exact=True)})["exact"]
    assert calls.rows == [3, 1, 1, 1], "computed by itself"
    assert torch.equal(exact.fields["prompt_embeds"], expected)
    other = admitted(model, prompt=PROMPTS[3], exact=True)
    Outcomes(lane).together({"exact": other})
    calls.rows.clear()
    Outcomes(lane).together({p: admitted(model, prompt=p) for p in (PROMPTS[3], PROMPTS[0])})
    assert not calls.rows, "what an exact one has encoded is good for all"
    lane.close()


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    asked=st.lists(
        st.tuples(st.integers(0, 3), st.sampled_from((48, 64)), st.integers(1, 2), st.sampled_from(("pt", "latent"))),
        min_size=1,
        max_size=5,
    )
)
def test_any_mix_of_requests_comes_out_as_it_would_alone(
    model: Model, asked: list[tuple[int, int, int, str]], decoded: dict[object, tuple[State, State]]
) -> None:
    for each in asked:
        if each not in decoded:
            seed, width, outputs, kind = each
            state = denoised(model, seed=seed, width=width, num_images_per_prompt=outputs, output_type=kind)
            decoded[each] = state, alone(model, state)
    lane = DecoderLane(model, "test", threads=1, rows=ROWS)
    hungry(lane)
    outcomes = Outcomes(lane).together({k: decoded[each][0].copy() for k, each in enumerate(asked)})
    for k, each in enumerate(asked):
        check_equal(outcomes[k], decoded[each][1])
    lane.close()


@pytest.fixture(scope="module")
def decoded() -> dict[object, tuple[State, State]]:
    """Requests, denoised, and decoded alone."""
    return {}


def test_exact_requests_share_nothing_and_equal_single_runs_to_the_bit(
    model: Model, lane: Lane, decodes: Calls
) -> None:
    states = {seed: denoised(model, seed=seed, exact=True) for seed in range(3)}
    expected = {seed: alone(model, state).fields["images"] for seed, state in states.items()}
    decodes.rows.clear()
    for seed, state in Outcomes(lane).together(states).items():
        assert torch.equal(state.fields["images"], expected[seed])
    assert decodes.rows == [1, 1, 1] and not lane.batches


@pytest.mark.skipif(not USE_PEFT_BACKEND, reason="PEFT is not installed")
def test_requests_share_calls_only_with_those_of_the_same_loras(tiny_repo: Callable[..., Path], tmp_path: Path) -> None:
    repo = tiny_repo("flux")
    style = lora.write(tmp_path / "style.safetensors", repo, {"text_encoder": ["q_proj", "fc1"]})
    model = triptych.load(repo, device="cpu", role="encoder")
    plain = {p: admitted(model, prompt=p) for p in PROMPTS[:2]}
    styled = {f"{p}, styled": admitted(model, prompt=p, lora=[{"path": style}]) for p in PROMPTS[:2]}
    expected = {name: alone(model, state) for name, state in {**plain, **styled}.items()}
    one, other = (expected[name].fields["pooled_prompt_embeds"] for name in (PROMPTS[0], f"{PROMPTS[0]}, styled"))
    assert worst(one, other) > 100 * TOLERANCE
    lane = Lane(model, "test", threads=1, rows=ROWS)
    hungry(lane)
    mixed = dict(pair for pairs in zip(plain.items(), styled.items()) for pair in pairs)
    outcomes = Outcomes(lane).together(mixed)
    lane.close()
    for name, state in expected.items():
        check_equal(outcomes[name], state)
    assert dict(lane.batches) == {2: 2}


def test_a_request_that_fails_leaves_those_beside_it_alone(model: Model, lane: Lane, decodes: Calls) -> None:
    good, bad, other = (denoised(model, seed=seed) for seed in range(3))
    expected = alone(model, good)
    bad.fields["latents"] = bad.fields["latents"].to("meta")
    ended = Outcomes(lane).together({"good": good, "bad": bad, "other": other})
    assert isinstance(ended["bad"], Exception)
    check_equal(ended["good"], expected)
    assert isinstance(ended["other"], State)


def test_a_request_whose_rows_break_the_shared_call_fails_alone(
    model: Model, encoder: Lane, caplog: pytest.LogCaptureFixture
) -> None:
    module = model.components["text_encoder"]
    embed = module.get_input_embeddings()
    token = admitted(model, prompt="a boat")
    seen: set[int] = set()
    tokens = model.stages[0].tokenizer("boat")["input_ids"]

    def refuse(_: Any, args: tuple[torch.Tensor]) -> None:
        seen.update(args[0].flatten().tolist())
        if set(tokens) <= set(args[0].flatten().tolist()):
            raise RuntimeError("boats are not accepted")

    hook = embed.register_forward_pre_hook(refuse)
    try:
        ended = Outcomes(encoder).together({"boat": token, "fox": admitted(model), "hens": admitted(model, seed=8)})
    finally:
        hook.remove()
    assert isinstance(ended["boat"], RuntimeError)
    check_equal(ended["fox"], alone(model, admitted(model)))
    assert isinstance(ended["hens"], State)
    assert "run apart" in caplog.text


def test_what_is_cancelled_or_late_before_a_batch_begins_is_left_out(model: Model, lane: Lane, decodes: Calls) -> None:
    states = [denoised(model, seed=seed) for seed in range(5)]
    decodes.rows.clear()
    decodes.open.clear()
    decodes.entered.clear()
    outcomes = Outcomes(lane)
    outcomes.put("first", states[0])
    assert decodes.entered.wait(10)
    outcomes.put("gone", states[1]).cancel()
    outcomes.put("late", states[2], deadline=time.monotonic() - 1)
    outcomes.put("a", states[3])
    outcomes.put("b", states[4])
    decodes.open.set()
    ended = outcomes.wait(5)
    assert isinstance(ended["gone"], Cancelled) and isinstance(ended["late"], DeadlineExceeded)
    assert decodes.rows == [1, 2]


def test_seconds_and_timings_are_each_request_s_share(model: Model, lane: Lane) -> None:
    states = {seed: denoised(model, seed=seed) for seed in range(4)}
    outcomes = Outcomes(lane)
    works = {}
    held = threading.Event()
    lane.put(Work(states[0].copy(), lambda _: held.wait(20) and None, deadline=time.monotonic() - 1))
    for seed, state in states.items():
        works[seed] = outcomes.put(seed, state)
    began = time.perf_counter()
    held.set()
    ended = outcomes.wait(4)
    passed = time.perf_counter() - began
    assert 0.3 * passed < sum(work.seconds for work in works.values()) <= passed
    for seed, work in works.items():
        assert work.seconds == pytest.approx(ended[seed].timings["decoding"])


def test_what_previews_are_made_with_is_fitted_between_batches(model: Model, lane: DecoderLane, decodes: Calls) -> None:
    states = [denoised(model, seed=seed) for seed in range(4)]
    outcomes = Outcomes(lane)
    outcomes.put("first", states[0])
    outcomes.wait(1)
    decodes.rows.clear()
    decodes.entered.clear()
    decodes.open.clear()
    outcomes.put("second", states[1])
    assert decodes.entered.wait(10)
    found: list[Any] = []
    fitting = threading.Thread(target=lambda: found.append(lane.projection(30)))
    fitting.start()
    while not lane._waiting:
        time.sleep(1e-3)
    outcomes.put("third", states[2])
    outcomes.put("fourth", states[3])
    decodes.open.set()
    outcomes.wait(4)
    fitting.join(30)
    assert found and found[0] is not None
    assert decodes.rows[:3] == [1, 1, 2], "the second, a picture to fit to, then the others together"


def test_nothing_that_several_threads_put_in_is_lost(model: Model) -> None:
    lane = DecoderLane(model, "test", threads=1)
    state = denoised(model)
    outcomes = Outcomes(lane)

    def call(first: int) -> None:
        for number in range(first, first + 20):
            outcomes.put(number, state.copy())

    callers = [threading.Thread(target=call, args=(first,)) for first in range(0, 100, 20)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join(30)
    assert len(outcomes.wait(100)) == 100
    lane.close()
    assert all(isinstance(outcome, State) for outcome in outcomes.of.values())


def test_a_lane_with_nothing_to_do_finds_out_how_many_segments_are_worth_a_call(model: Model, decodes: Calls) -> None:
    lane = DecoderLane(model, "test", threads=1)
    hungry(lane)
    assert lane._meeting is not None
    Outcomes(lane).together({seed: denoised(model, seed=seed) for seed in range(2)})
    deadline = time.monotonic() + 30
    while lane._meeting.eager and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not lane._meeting.eager
    lane.close()  # after its last trial
    assert max(decodes.rows) >= 2
    assert len(decodes.rows) > 6, "trials of one row and of more, three times each"


def test_what_is_met_often_is_tried_out_even_if_it_never_waits_beside_another(model: Model, decodes: Calls) -> None:
    lane = DecoderLane(model, "test", threads=1)
    assert lane._meeting is not None
    outcomes, state = Outcomes(lane), denoised(model)
    expected = alone(model, state)
    decodes.rows.clear()
    for number in range(OFTEN):
        assert not lane._meeting.eager and decodes.rows == [1] * number
        check_equal(outcomes.next(number, state), expected)
    deadline = time.monotonic() + 30
    while max(decodes.rows) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    lane.close()
    assert max(decodes.rows) >= 2


def test_a_lane_that_is_never_idle_tries_out_between_its_requests(
    model: Model, decodes: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(meeting, "PATIENCE", 0.0)
    lane, state = DecoderLane(model, "test", threads=1), denoised(model)
    decodes.rows.clear()
    left, ended = iter(range(60)), threading.Event()

    def next_one(_: Any = None) -> None:
        """Let another come as one ends, and the trials end it: three at a time, so that the lane is never idle."""
        if max(decodes.rows, default=0) > 3 or next(left, None) is None:
            ended.set()
        else:
            lane.put(Work(state.copy(), next_one))

    for _ in range(3):
        next_one()
    assert ended.wait(30)
    assert next(left, None) is not None, "more rows than there were requests, before the last of them"
    lane.close()


def test_a_trial_that_fails_ends_neither_the_lane_nor_a_request(
    model: Model, decodes: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    lane = DecoderLane(model, "test", threads=1)
    hungry(lane)
    assert lane._meeting is not None
    tried = threading.Event()

    def fail() -> None:
        tried.set()
        raise RuntimeError("an illegal address")

    monkeypatch.setattr(lane._meeting, "rehearse", fail)
    Outcomes(lane).together({seed: denoised(model, seed=seed) for seed in range(2)})
    assert tried.wait(20)
    ended = Outcomes(lane).together({seed: denoised(model, seed=seed) for seed in range(2)})
    assert all(isinstance(outcome, State) for outcome in ended.values())
    lane.close()


def test_a_lane_that_is_closed_finishes_what_it_has(model: Model) -> None:
    lane, outcomes = DecoderLane(model, "test", threads=1), None
    outcomes = Outcomes(lane)
    for number in range(5):
        outcomes.put(number, denoised(model))
    lane.close()
    assert len(outcomes.of) == 5


def test_a_replica_takes_as_many_segments_as_its_lane_runs_together_unless_told(model: Model) -> None:
    free = LanesReplica("free", model, prompt_cache=0)
    told = LanesReplica("told", model, prompt_cache=0, slots={RoleType.DECODER: 3})
    for replica in (free, told):
        assert replica.describe()["slots"]["encoder"] == 2
        for lane in replica.lanes.values():
            hungry(lane)
            lane._appetites.setdefault("any", Appetite())
    assert free.describe()["slots"] == {"encoder": ROWS, "decoder": ROWS, "denoiser": SLOTS[RoleType.DENOISER]}
    assert told.describe()["slots"] == {"encoder": ROWS, "decoder": 3, "denoiser": SLOTS[RoleType.DENOISER]}
    free.close()
    told.close()


def test_without_batching_an_engine_runs_every_segment_apart() -> None:
    engine = LocalEngine(
        embedded.path(), encoder="cpu", denoiser="cpu", decoder="cpu", dtype="float32", batching=False, warm_up=False
    )
    with engine:
        lanes = engine.router.replicas[0].lanes
        asked = {"num_inference_steps": 1, "exact": False}
        jobs = [engine.submit(triptych.Request(prompt=p, seed=k, **asked)) for k, p in enumerate(PROMPTS)]
        for job in jobs:
            job.result()
        assert not any(lanes[role].batches for role in (RoleType.ENCODER, RoleType.DECODER))


def test_an_engine_s_pictures_are_those_of_a_whole_model_while_its_lanes_learn() -> None:
    whole = triptych.load(embedded.path(), device="cpu", dtype="float32")
    asked = {"num_inference_steps": 2, "output_type": "pt"}
    expected = {
        (p, seed): whole.generate(prompt=p, seed=seed, **asked).images for p in PROMPTS[:2] for seed in range(2)
    }
    engine = LocalEngine(
        embedded.path(), encoder="cpu", denoiser="cpu", decoder="cpu", dtype="float32", warm_up=False,
        threads={role: 1 for role in (RoleType.ENCODER, RoleType.DENOISER, RoleType.DECODER)},
    )  # fmt: skip
    with engine:
        jobs = [
            (each, engine.submit(triptych.Request(prompt=each[0], seed=each[1], exact=False, **asked)))
            for each in [*expected] * 5
        ]
        for each, job in jobs:
            assert worst(expected[each], job.result().images) <= TOLERANCE
        lanes = engine.router.replicas[0].lanes
        assert lanes[RoleType.DECODER].batches or lanes[RoleType.ENCODER].batches
