"""A rank of a replica, in a process of its own: it runs the forwards that the leader sends, and nothing else.

Started as `python -m triptych.runtime.rank_process FD`, where FD is its end of a socket pair. It ends when the other
end does.
"""

from __future__ import annotations

import json
import logging
import os
import queue
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from triptych.errors import to_text
from triptych.runtime.rank_link import PULSE, Kind, Link

if TYPE_CHECKING:
    import torch


class _Worker:
    """What the leader's frames are done by."""

    device: torch.device | None = None  # where it computes, once it has loaded

    def load(self, data: bytearray) -> bytes:
        """Load the denoiser."""
        import torch

        from triptych.runtime.model import load

        job = json.loads(bytes(data))
        logging.basicConfig(level=job.pop("log_level"), format=f"rank of {os.getppid()}: %(message)s")
        if (threads := job.pop("threads")) is not None:
            torch.set_num_threads(threads)
        self.model = load(job.pop("source"), role="denoiser", **job)
        self.device = self.model.device
        self.stages = {stage.name: stage for stage in self.model.stages}
        return b""

    def meet(self, data: bytearray) -> bytes:
        """Join the ranks that share sequences."""
        from triptych.components.acceleration import Acceleration
        from triptych.components.context_parallel import share_sequences
        from triptych.runtime.rank_world import join_world
        from triptych.runtime.ranks import models_of

        told = json.loads(bytes(data))
        asked = Acceleration(ulysses=told["ulysses"], ring=told["ring"])
        join_world(told["port"], told["place"], asked.ulysses * asked.ring, self.model.device)
        share_sequences(models_of(self.model), asked, self.model.device)
        return b""

    def run(self, data: bytearray) -> memoryview:
        """Run a forward; returns its prediction."""
        from triptych import wire

        return wire.pack({"prediction": self._compute(data)}, {})

    def help(self, data: bytearray) -> bytes:
        """Run a forward whose prediction another rank has."""
        self._compute(data)
        return b""

    def _compute(self, data: bytearray) -> torch.Tensor:
        from triptych import wire
        from triptych.components.lora import Lora
        from triptych.runtime.segment import running
        from triptych.stages.denoising import Denoising, Forward
        from triptych.state import moved

        fields, header = wire.unpack(data)
        told: dict[str, Any] = {**header}
        given: dict[str, Any] = {**fields}
        device = self.model.device
        inputs = {
            name: value if name in told["on_host"] else moved(value, device) for name, value in given["inputs"].items()
        }
        stage = self.stages[told["stage"]]
        assert isinstance(stage, Denoising)
        loras = tuple(Lora.from_field(each) for each in told["loras"])
        forward = Forward(told["component"], told["branch"], inputs, given["cache"], loras)
        with running(stage.name):
            return stage.compute(forward)


def _beat(link: Link) -> None:
    while True:
        link.send(Kind.BEAT)
        time.sleep(PULSE)


def _listen(link: Link, frames: queue.SimpleQueue[tuple[Kind, bytearray]]) -> None:
    """Take the leader's frames, and end the process, whatever it is at, when there will be no more."""
    try:
        while True:
            frames.put(link.receive())
    except EOFError:
        os._exit(0)


def main() -> None:
    """Do what the leader says, one thing after another, until it is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the leader ends us
    link = Link(socket.socket(fileno=int(sys.argv[1])))
    frames: queue.SimpleQueue[tuple[Kind, bytearray]] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(link, frames), daemon=True).start()
    threading.Thread(target=_beat, args=(link,), daemon=True).start()
    worker = _Worker()
    todo: dict[Kind, tuple[Callable[[bytearray], bytes | memoryview], Kind]] = {
        Kind.LOAD: (worker.load, Kind.READY),
        Kind.MEET: (worker.meet, Kind.READY),
        Kind.RUN: (worker.run, Kind.DONE),
        Kind.HELP: (worker.help, Kind.DONE),
    }
    while True:
        kind, data = frames.get()
        do, done = todo[kind]
        try:
            answer = do(data)
        except Exception as error:  # noqa: BLE001 (told to the leader, which knows whose fault it is)
            from triptych.runtime.streams import is_broken

            link.send(Kind.FAILED, json.dumps(to_text(error)).encode())
            if worker.device is not None and is_broken(error, worker.device):
                os._exit(1)  # the leader starts all ranks anew
        else:
            link.send(done, answer)


if __name__ == "__main__":
    main()
