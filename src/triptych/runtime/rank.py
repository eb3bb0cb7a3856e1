"""Another rank of a replica as its leader sees it: a process of its own, and the link to it."""

from __future__ import annotations

import json
import logging
import os
import queue
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from triptych.errors import ReplicaLost, from_text
from triptych.runtime.rank_link import Kind, Link

log = logging.getLogger(__name__)


class Rank:
    """Another rank as the leader sees it: a process of its own.

    Attributes:
        heard: when it last gave a sign of life, on `time.monotonic`'s clock.
        failed: when it last told of an error that has not been taken yet.
        busy: whether it has not answered what it was sent last.
    """

    def __init__(
        self, number: int, job: Mapping[str, Any], gpu: str | None, threads: int | None, lost: Callable[[str], None]
    ) -> None:
        self.number = number
        self.heard = time.monotonic()
        self.failed: float | None = None
        self.busy = False
        self._lost = lost
        self._answers: queue.SimpleQueue[tuple[Kind | None, Any]] = queue.SimpleQueue()
        ours, theirs = socket.socketpair()
        root = str(Path(__file__).parents[2])  # so that it finds this very package
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH")))),
            "PYTHONSAFEPATH": "1",  # nothing from the working folder
            **({} if gpu is None else {"CUDA_VISIBLE_DEVICES": gpu}),
            **({} if threads is None else {"OMP_NUM_THREADS": str(threads)}),
        }
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "triptych.runtime.rank_process", str(theirs.fileno())],
                env=environment,
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
            )
        self._link = Link(ours)
        self.send(Kind.LOAD, json.dumps(job).encode())
        threading.Thread(target=self._listen, name=f"rank {number}", daemon=True).start()

    def send(self, kind: Kind, data: bytes | memoryview = b"") -> None:
        """Send it a frame; one that is gone is noticed where its answer is awaited."""
        self.busy = True
        try:
            self._link.send(kind, data)
        except OSError:
            log.debug("rank %d is gone", self.number)

    def answer(self, kind: Kind, timeout: float | None = None) -> bytearray:
        """Wait for its answer.

        Raises:
            ReplicaLost: it is gone, or there was none after `timeout` seconds.
            TriptychError: what it failed with.
        """
        try:
            told, data = self._answers.get(timeout=timeout)
        except queue.Empty:
            self._lost(f"rank {self.number} did not end a forward that another had failed in")
            told, data = None, "it was left behind"
        if told is None:
            raise ReplicaLost(f"rank {self.number}: {data}")
        if told is Kind.FAILED:
            self.failed = None
            raise from_text(*json.loads(bytes(data)))
        assert told is kind, (told, kind)
        answer: bytearray = data
        return answer

    def give_up(self, reason: str) -> None:
        """Let whoever waits for its answer know that there will be none."""
        self._answers.put((None, reason))

    def close(self) -> None:
        """End it."""
        self._link.close()
        try:
            self.process.wait(5)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def _listen(self) -> None:
        try:
            while True:
                kind, data = self._link.receive()
                self.heard = time.monotonic()
                if kind is Kind.FAILED:
                    self.failed = self.heard
                if kind is not Kind.BEAT:
                    self.busy = False
                    self._answers.put((kind, data))
        except EOFError:
            try:
                how = f"exit status {self.process.wait(1)}"
            except subprocess.TimeoutExpired:
                how = "it closed its end"
            self.give_up(how)
            self._lost(f"rank {self.number} is gone ({how})")
