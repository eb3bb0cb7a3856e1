"""The engine in this process: a lane for every role, each role on a device of its own choosing."""

from __future__ import annotations

import atexit
import logging
import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from triptych.components.acceleration import parse_acceleration
from triptych.engine.base import Engine
from triptych.engine.choice import Policy
from triptych.engine.replica import Handover, Replica, Ticket
from triptych.engine.router import Router
from triptych.errors import ReplicaLost, UsageError
from triptych.roles import WORKERS, RoleType, role_name
from triptych.runtime import memory, streams
from triptych.runtime.crew import Crew
from triptych.runtime.decoder_lane import DecoderLane
from triptych.runtime.guest import is_guest
from triptych.runtime.lanes import Lane, Work, prepare
from triptych.runtime.model import Model, load
from triptych.runtime.preview import Previews, Projection
from triptych.runtime.prompt_cache import PromptCache
from triptych.runtime.step_lane import StepLane
from triptych.runtime.turns import Turns
from triptych.state import State

if TYPE_CHECKING:
    from triptych.components.acceleration import AccelerationSpec
    from triptych.components.dtypes import DtypeSpec

log = logging.getLogger(__name__)

SLOTS = {RoleType.ENCODER: 2, RoleType.DENOISER: 16, RoleType.DECODER: 2}
"""Segments a replica takes at a time: one more than it works on, and for the denoiser as many as may share forwards."""

PROMPT_CACHE = 256 * 2**20
"""Bytes of prompt embeddings that an encoder remembers."""

_FAILED = "the device of a role has failed, and nothing works there any more: start this process anew"


class LanesReplica(Replica):
    """A model loaded for some roles, with a lane for each.

    Attributes:
        model: what it runs.
        prompts: the prompt cache of its encoder; None where it has none.
        turns: what its lanes agree by when each computes.
    """

    def __init__(
        self,
        name: str,
        model: Model,
        *,
        threads: Mapping[RoleType, int] | None = None,
        slots: Mapping[RoleType, int] | None = None,
        budget: int | None = None,
        prompt_cache: int = PROMPT_CACHE,
        turns: Turns | None = None,
        on_broken: Callable[[LanesReplica, Exception], None] | None = None,
    ) -> None:
        super().__init__(name, model.roles, {**SLOTS, **(slots or {})})
        self.model = model
        self._on_broken = on_broken
        self.prompts = remember_prompts(model, prompt_cache)
        self._works: dict[Ticket, Work] = {}
        self.lanes: dict[RoleType, Lane] = {}
        self._settled_slots = frozenset(slots or ())
        lock = threading.Lock() if _share_weights(model) else None
        rows = 0 if budget == 0 else None
        self.turns = turns or Turns()
        self._crews = _crews(name, model, threads or {})
        for role in sorted(model.roles):
            where, share = f"{name}/{role.value}", (threads or {}).get(role)
            common: dict[str, Any] = {"threads": share, "turns": self.turns, "crew": self._crews.get(share)}
            if role is RoleType.DENOISER:
                self.lanes[role] = StepLane(model, where, budget=budget, **common)
            else:
                kind = DecoderLane if role is RoleType.DECODER else Lane
                self.lanes[role] = kind(model, where, exclusive=lock, rows=rows, **common)

    def start(self, ticket: Ticket, payload: State) -> None:
        state = payload.copy()

        def done(outcome: State | Exception) -> None:
            work = self._works.pop(ticket)
            self._make_room(ticket.role)
            if isinstance(outcome, State):
                ticket.done(ticket, Handover(outcome.next_role, outcome, work.seconds))
            elif self._on_broken is not None and streams.is_broken(outcome, self.model.device):
                self._on_broken(self, outcome)  # before its place is free, which somebody else would be given
                ticket.done(ticket, ReplicaLost(f"its device has failed: {outcome}"))
            else:
                ticket.done(ticket, outcome)

        previews = None if ticket.job.previews is None else Previews(*ticket.job.previews, ticket.show)
        work = Work(state, done, ticket.report, ticket.job.deadline, previews)
        self._works[ticket] = work
        self.lanes[ticket.role].put(work)

    def _make_room(self, role: RoleType) -> None:
        """Take as many segments of a role as its lane found worth running together, where nobody said how many."""
        if role not in self._settled_slots and not isinstance(self.lanes[role], StepLane):
            self.slots[role] = max(SLOTS[role], self.lanes[role].appetite)

    def cancel(self, ticket: Ticket) -> None:
        if (work := self._works.get(ticket)) is not None:
            work.cancel()

    def projection(self, timeout: float) -> Projection | None:
        """Return what previews are made with, if it has a decoder and that can tell within `timeout` seconds."""
        lane = self.lanes.get(RoleType.DECODER)
        return lane.projection(timeout) if isinstance(lane, DecoderLane) else None

    def close(self) -> None:
        for lane in self.lanes.values():
            lane.close()
        for crew in self._crews.values():
            crew.close()

    def describe(self) -> dict[str, Any]:
        for role in self.lanes:
            self._make_room(role)
        lane = self.lanes.get(RoleType.DENOISER)
        return {
            **super().describe(),
            "device": str(self.model.device),
            "loaded_bytes": sum(self.model.loaded_bytes.values()),
            "prompt_cache": None
            if self.prompts is None
            else {"hits": self.prompts.hits, "misses": self.prompts.misses},
            "budget": lane.budget if isinstance(lane, StepLane) else None,
            "forwards": dict(lane.forwards) if isinstance(lane, StepLane) else None,
        }


def _crews(name: str, model: Model, threads: Mapping[RoleType, int]) -> dict[int | None, Crew]:
    """Return the threads that lanes share, by the CPU threads that each computes with.

    On a CPU only: elsewhere libraries keep memory on the device for every thread and stream that uses them.
    """
    if model.device.type != "cpu":
        return {}
    return {
        share: Crew(lanes, name, partial(prepare, share))
        for share, lanes in Counter(threads.get(role) for role in model.roles).items()
    }


def remember_prompts(model: Model, max_bytes: int) -> PromptCache | None:
    """Give the stages of a model's encoder a prompt cache; None where it has no encoder, or no bytes for it."""
    stages = [
        stage for stage in model.stages if stage.role is RoleType.ENCODER and hasattr(stage.helpers, "encode_prompt")
    ]
    if not stages or not max_bytes:
        return None
    cache = PromptCache(max_bytes)
    for stage in stages:
        stage.helpers.encode_prompt = cache.wrap(stage.helpers.encode_prompt, stage.adaptation, is_guest)
    return cache


def _share_weights(model: Model) -> bool:
    """Return whether a model's encoder and decoder run the same component."""
    needs = [model.family.needs((role,), model.tasks) for role in (RoleType.ENCODER, RoleType.DECODER)]
    return {RoleType.ENCODER, RoleType.DECODER} <= model.roles and any(
        need.weights and name in needs[1] and needs[1][name].weights for name, need in needs[0].items()
    )


class LocalEngine(Engine):
    """All roles in this process, overlapped: while one request denoises, the next is encoded and the last decoded.

    Args:
        source: a folder in diffusers' layout, or a hub id.
        encoder, denoiser, decoder: the device of each role, or several, separated by commas: a replica on each.
        dtype, tasks, revision, variant, acceleration: as in `triptych.load`.
        threads: CPU threads of each role's lane; by default, on a CPU, the denoiser's has all but one.
        policy: how a replica is chosen: `predicted` seconds, `round_robin` or `max_free_slots`.
        max_waiting: requests on their way before further ones are turned away.
        prompt_cache: bytes of embeddings that an encoder remembers; 0 for none.
        batching: whether requests that are not exact share forwards.
        warm_up: whether to run one small request before the constructor returns.
    """

    def __init__(
        self,
        source: str | Path,
        *,
        encoder: str = "auto",
        denoiser: str = "auto",
        decoder: str = "auto",
        dtype: DtypeSpec = "auto",
        tasks: str | Iterable[str] | None = None,
        revision: str | None = None,
        variant: str | None = None,
        acceleration: AccelerationSpec = None,
        threads: Mapping[RoleType, int] | None = None,
        slots: Mapping[RoleType, int] | None = None,
        policy: Policy = "predicted",
        max_waiting: int = 256,
        prompt_cache: int = PROMPT_CACHE,
        batching: bool = True,
        warm_up: bool = True,
    ) -> None:
        options: dict[str, Any] = {"dtype": dtype, "tasks": tasks, "revision": revision, "variant": variant}
        options["acceleration"] = parse_acceleration(acceleration)
        self.router = Router(lambda handover: handover.payload.result, policy=policy, max_waiting=max_waiting)
        self.front = load(source, role=RoleType.SERVER, device="cpu", **options)
        needed = {role for role, _ in self.front.route()}
        devices = {RoleType.ENCODER: encoder, RoleType.DENOISER: denoiser, RoleType.DECODER: decoder}
        places = place({role: devices[role] for role in WORKERS if role in needed})
        budget, turns = None if batching else 0, Turns()
        self._watch()
        with ExitStack() as undo:
            undo.callback(self.close, 0)
            for number, (device, roles) in enumerate(places):
                model = load(source, role="+".join(role.value for role in roles), device=device, **options)
                name = f"{role_name(frozenset(roles))}-{number}"
                usual = thread_shares(torch.get_num_threads()) if model.device.type == "cpu" else {}
                self.router.add(
                    LanesReplica(
                        name,
                        model,
                        threads={**usual, **(threads or {})},
                        slots=slots,
                        budget=budget,
                        prompt_cache=prompt_cache,
                        turns=turns,
                        on_broken=self._lose,
                    )
                )
            # A thread that computes while the interpreter goes away would abort it.
            goodbye = weakref.WeakMethod(self.close)
            atexit.register(lambda: (close := goodbye()) and close(0))
            if warm_up:
                self.warm_up()
            threading.Thread(target=memory.gather, name="gathering", daemon=True).start()
            undo.pop_all()

    def hand_in(self, state: State) -> Handover:
        streams.wait_for(state.fields)
        return Handover(state.next_role, state)

    def find_projection(self, timeout: float, *, wait: bool = True) -> Projection | None:
        until = time.monotonic() + (timeout if wait else 0.0)
        replicas = [each for each in self.router.replicas if isinstance(each, LanesReplica)]
        asked = (each.projection(max(0.0, until - time.monotonic())) for each in replicas)
        return next((found for found in asked if found is not None), None)

    def _lose(self, replica: LanesReplica, error: Exception) -> None:
        """Give nothing more to a replica whose device has failed; where a role has no other, end what is on its way."""
        if replica.draining:
            return
        replica.draining = True
        log.critical("the device of %s has failed, and it is given nothing more: %s", replica.name, error)
        if not self.ready():
            self.router.refuse_all(ReplicaLost(_FAILED))

    def close(self, timeout: float | None = None) -> None:
        self._drain(timeout)
        self._closed.set()
        for replica in list(self.router.replicas):
            self.router.remove(replica, "the engine was closed")
            replica.close()


def place(devices: Mapping[RoleType, str]) -> list[tuple[str, list[RoleType]]]:
    """Return the replicas to load: each a device and the roles that share it. A device named twice is two replicas.

    Raises:
        UsageError: a role is given no device.
    """
    places: list[tuple[str, list[RoleType]]] = []
    for role, text in devices.items():
        names = [name.strip() for name in text.split(",") if name.strip()]
        if not names:
            raise UsageError(f"{role.value}={text!r}: a device is accepted, or several separated by commas")
        for name in names:
            shared = next((roles for device, roles in places if device == name and role not in roles), None)
            if shared is None:
                places.append((name, [role]))
            else:
                shared.append(role)
    return places


def thread_shares(threads: int) -> dict[RoleType, int]:
    """Return the CPU threads of each role's lane: more lanes than cores would only get in each other's way."""
    return {
        RoleType.ENCODER: max(1, threads // 4),
        RoleType.DENOISER: max(1, threads - 1),
        RoleType.DECODER: max(1, threads // 4),
    }
