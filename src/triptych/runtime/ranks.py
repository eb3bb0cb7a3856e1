"""Several ranks for one replica: processes on one machine that hold the same models and run forwards together.

This process, the leader, drives the requests. It starts the others, gives each its part of every step, and sees to it
that none is missing: a replica that loses a rank is lost as a whole.
"""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from triptych import wire
from triptych.components.acceleration import Acceleration, to_plain
from triptych.components.blueprint import component_class
from triptych.components.context_parallel import check_context_parallel, check_inputs, share_sequences
from triptych.errors import ModelError, ParameterError, RemoteError, ReplicaLost, UsageError, to_text
from triptych.roles import RoleType, get_module_role
from triptych.runtime.rank import Rank
from triptych.runtime.rank_link import PULSE, Kind
from triptych.runtime.rank_world import join_world, open_world
from triptych.runtime.split import plain_dtype
from triptych.stages.denoising import Denoising, Forward
from triptych.state import moved

if TYPE_CHECKING:
    from triptych.pipelines.base import Family
    from triptych.runtime.model import Model

log = logging.getLogger(__name__)

SILENCE = 4.0
"""Seconds without a sign of life after which a rank is taken to hang."""
PATIENCE = 4.0
"""Seconds that ranks which share a forward get to end it after one of them has failed in it."""
_LOOK = 0.05
"""Seconds between two looks at whether the ranks have met."""

Options = Mapping[str, Any]
"""What `triptych.load` is given beside source, role and acceleration."""


def denoisers(family: Family, tasks: Collection[str]) -> list[str]:
    """Return the components that a denoiser's forwards run."""
    needs = family.needs((RoleType.DENOISER,), tasks)
    return [name for name, need in needs.items() if need.weights and get_module_role(name) is RoleType.DENOISER]


def check_ranks(family: Family, names: Iterable[str], asked: Acceleration, *, on_gpu: bool | None = None) -> None:
    """Check that the models of a denoiser can be run by several ranks as asked; reads no weights.

    Args:
        names: the models, as components.
        on_gpu: whether they will run on GPUs; None where that is not known yet.

    Raises:
        ParameterError: they cannot.
    """
    if asked.cfg_parallel and (reason := family.lone_forward()) is not None:
        raise ParameterError("cfg_parallel", True, f"there is nothing for a second rank: {reason}")
    if asked.ulysses * asked.ring > 1:
        for name in names:
            cls, config = component_class(family.repository, name), family.repository.config(name)
            check_context_parallel(cls, config, asked, on_gpu=on_gpu is not False)


def visible_gpus(ranks: int) -> list[str] | None:
    """Return the GPUs that this process may use, one for each rank; None where it has none at all.

    Raises:
        UsageError: it has some, but too few.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count == 0:
        return None
    if count < ranks:
        raise UsageError(f"{ranks} ranks need as many GPUs, and this process has {count}: reserve more of them for it")
    named = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    return (named or [str(number) for number in range(count)])[:ranks]


class Ranks:
    """The other ranks of a denoiser, and what runs its forwards with them: a `Spread`.

    With ulysses or ring, each team of that many ranks runs the same forward, sharing its sequence; with cfg_parallel
    there are two teams, and the guidance branches of a request go to one each. Made before this process loads its own
    model, so that all load at the same time; then `attach`.

    Args:
        source, options: what the other ranks load, as this one does.
        asked: how many there are, and what else makes them faster.
        gpus: what each rank is to see as `CUDA_VISIBLE_DEVICES` names it, this one first; None to compute on the CPU.
        threads: CPU threads of each rank; None for PyTorch's default.
        on_lost: told once why the replica is lost, from any thread; it is to end the process.

    Attributes:
        apart: whether every forward is run by itself: sequences that are shared are long enough alone.
    """

    def __init__(
        self,
        source: str | Path,
        options: Options,
        asked: Acceleration,
        *,
        gpus: Sequence[str] | None = None,
        threads: int | None = None,
        on_lost: Callable[[str], None],
    ) -> None:
        self.asked = asked
        self.apart = asked.ulysses * asked.ring > 1
        self._size = asked.ulysses * asked.ring  # of a team
        self._on_lost = on_lost
        self._turn = threading.Lock()
        self._lost: str | None = None
        self._attached = self._closing = False
        self._computing = False  # whether this process is in the middle of a forward
        self._stores: list[Any] = []
        job = {
            **{name: value for name, value in options.items() if name != "acceleration"},
            "source": str(source),
            "tasks": tasks if (tasks := options.get("tasks")) is None or isinstance(tasks, str) else list(tasks),
            "dtype": plain_dtype(options.get("dtype") or "auto"),
            "acceleration": to_plain({RoleType.DENOISER: of_one_rank(asked)}),
            "device": "cpu" if gpus is None else "auto",
            "threads": threads,
            "log_level": logging.getLogger("triptych").getEffectiveLevel(),
        }
        self._ranks = [
            Rank(number, job, None if gpus is None else gpus[number], threads, self._lose)
            for number in range(1, asked.ranks)
        ]
        self._teams = [self._ranks[: self._size - 1]]
        if asked.cfg_parallel:
            self._teams.append(self._ranks[self._size - 1 :])

    @property
    def pids(self) -> list[int]:
        """The processes of the other ranks."""
        return [rank.process.pid for rank in self._ranks]

    def attach(self, model: Model) -> None:
        """Wait until all ranks have loaded, bring them together, and let the model's denoising stages use them.

        Raises:
            ModelError: a rank could not load, or they do not find each other.
        """
        try:
            for rank in self._ranks:
                rank.answer(Kind.READY)
            if self.apart:
                self._meet(model)
            self._attached = True  # from here on a loss ends the process
            if self._lost is not None:  # since that rank had loaded, so that its answer was there
                raise ReplicaLost(self._lost)
        except ReplicaLost as error:
            raise ModelError(f"a rank of the denoiser ended while it was loading: {error}") from error
        for stage in model.stages:
            if isinstance(stage, Denoising):
                stage.spread = self
        model.accelerated.asked[RoleType.DENOISER] = self.asked  # so that requests are checked against it
        threading.Thread(target=self._watch, name="ranks", daemon=True).start()
        log.info("the denoiser has %d ranks: this process, and %s", self.asked.ranks, self.pids)

    def __call__(self, stage: Denoising, forwards: Sequence[Forward]) -> list[torch.Tensor]:
        """Run forwards, as many at a time as there are teams.

        Raises:
            ReplicaLost: a rank is gone, or was left behind in the middle of a forward.
        """
        predictions: list[torch.Tensor] = []
        with self._turn:
            if self._lost is not None:
                raise ReplicaLost(self._lost)
            for start in range(0, len(forwards), len(self._teams)):
                predictions += self._together(stage, forwards[start : start + len(self._teams)])
        return predictions

    def close(self) -> None:
        """End the other ranks."""
        self._closing = True
        for rank in self._ranks:
            rank.close()
        if self._stores:
            if torch.distributed.is_initialized():  # not where the ranks did not find each other
                torch.distributed.destroy_process_group()
            self._stores.clear()

    def _meet(self, model: Model) -> None:
        """Make a world of each team."""
        worlds = [open_world() for _ in self._teams]
        self._stores = [store for _, store in worlds]  # each ends with its last reference
        for number, (team, (port, _)) in enumerate(zip(self._teams, worlds)):
            for place, rank in enumerate(team, 0 if number else 1):  # this process is the first of the first team
                told = {"port": port, "place": place, "ulysses": self.asked.ulysses, "ring": self.asked.ring}
                rank.send(Kind.MEET, json.dumps(told).encode())
        joined: Future[None] = Future()

        def join() -> None:
            try:
                join_world(worlds[0][0], 0, self._size, model.device)
                share_sequences(models_of(model), self.asked, model.device)
                joined.set_result(None)
            except Exception as error:  # noqa: BLE001 (for whoever waits)
                time.sleep(PULSE)  # the reason is better told by the rank that has it
                joined.set_exception(error)

        # In a thread of its own: it would wait for minutes for a rank that is gone, or has failed.
        threading.Thread(target=join, name="meeting", daemon=True).start()
        while not joined.done() or any(rank.busy for rank in self._ranks):
            for rank in self._ranks:
                if rank.failed is not None:
                    rank.answer(Kind.READY)  # raises what it failed with
            if self._lost is not None:
                raise ReplicaLost(self._lost)
            if joined.done():
                joined.result()
            time.sleep(_LOOK)
        joined.result()
        for rank in self._ranks:
            rank.answer(Kind.READY)

    def _together(self, stage: Denoising, forwards: Sequence[Forward]) -> list[torch.Tensor]:
        """Run at most one forward a team, at the same time."""
        teams = self._teams[: len(forwards)]
        if self.apart:
            for forward in forwards:
                check_inputs(forward.inputs, self._size, on_gpu=stage.device.type != "cpu")
        messages = [packed(stage.name, forward) if team else b"" for team, forward in zip(teams, forwards)]
        for number, (team, message) in enumerate(zip(teams, messages)):
            for place, rank in enumerate(team):
                rank.send(Kind.RUN if number and not place else Kind.HELP, message)
        predictions: list[Any] = []
        errors: list[list[Exception]] = [[] for _ in teams]
        self._computing = True
        try:
            predictions.append(stage.compute(forwards[0]))
        except Exception as error:  # noqa: BLE001 (whose fault it is shows when the others have answered)
            errors[0].append(error)
        finally:
            self._computing = False
        for number, team in enumerate(teams):
            answers = [self._answer_of(rank, errors[number]) for rank in team]
            predictions += [moved(each, stage.device) for each in answers if each is not None]
        self._check(errors)
        return predictions

    def _answer_of(self, rank: Rank, errors: list[Exception]) -> Any:
        """Return what a rank predicts, None where it need not tell; note its error."""
        try:
            # Where this process failed in a forward that both ran, the other may wait for it for ever.
            answer = rank.answer(Kind.DONE, PATIENCE if errors and self.apart else None)
        except ReplicaLost:
            raise
        except Exception as error:  # noqa: BLE001 (as above)
            errors.append(error)
            return None
        return wire.unpack(answer)[0]["prediction"] if answer else None

    def _check(self, errors: list[list[Exception]]) -> None:
        """Raise a request's own error; where ranks that share a forward did not all meet the same, they are out of step.

        What one of them sent for the part of the forward after that would be taken for the next one's.

        Raises:
            ReplicaLost: they are.
        """
        for first, *others in filter(None, errors):
            if self._size == 1:
                raise first
            if len(others) + 1 < self._size or len({_told(each) for each in (first, *others)}) > 1:
                self._lose(f"ranks that share a forward are out of step: {type(first).__name__}: {first}")
                raise ReplicaLost(str(self._lost))
            if self.asked.ulysses > 1 and self.asked.ring > 1:  # the lengths have to be divisible then
                asked = f"ulysses={self.asked.ulysses} and ring={self.asked.ring}"
                raise UsageError(f"the request's size does not go with {asked}: {first}") from first
            raise first

    def _watch(self) -> None:
        """Look for ranks that hang, or that failed in a forward the others still wait in."""
        while not self._closing and self._lost is None:
            time.sleep(PULSE)
            now = time.monotonic()
            for number, team in enumerate(self._teams):
                # An error that all of a team have met may wait for the other team's forward.
                running = any(rank.busy for rank in team) or (number == 0 and self._computing)
                for rank in team:
                    failed = rank.failed  # once: who takes the error forgets it meanwhile
                    if now - rank.heard > SILENCE:
                        self._lose(f"rank {rank.number} gave no sign of life for {SILENCE:.0f} s")
                    elif running and failed is not None and now - failed > PATIENCE:
                        self._lose(f"rank {rank.number} failed in a forward that the others did not end")

    def _lose(self, reason: str) -> None:
        if self._lost is None and not self._closing:
            self._lost = reason
            for rank in self._ranks:
                rank.give_up(reason)
            if self._attached:
                self._on_lost(reason)


def of_one_rank(asked: Acceleration) -> Acceleration:
    """Return what a rank does by itself of what a replica is asked for."""
    return replace(asked, ulysses=1, ring=1, cfg_parallel=False)


def models_of(model: Model) -> list[Any]:
    """Return the models that a denoiser's forwards run."""
    return [
        model.components[name]
        for name in model.components
        if get_module_role(name) is RoleType.DENOISER and not model.is_hollow(name)
    ]


def packed(stage: str, forward: Forward) -> memoryview:
    """Return a forward in the wire form, for another rank.

    Raises:
        WireError: an input cannot be carried; the message names it.
    """
    on_host = [
        name for name, value in forward.inputs.items() if isinstance(value, torch.Tensor) and value.device.type == "cpu"
    ]
    header: dict[str, wire.JSON] = {
        "stage": stage,
        "component": forward.component,
        "branch": forward.branch,
        "loras": [each.to_field() for each in forward.loras],
        "on_host": list(on_host),
    }
    return wire.pack({"inputs": forward.inputs, "cache": forward.cache}, header)


def _told(error: Exception) -> str:
    """Return an error's text as another process tells it."""
    return str(error) if isinstance(error, RemoteError) else to_text(error)[1]
