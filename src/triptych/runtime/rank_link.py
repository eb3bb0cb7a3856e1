"""What passes between the ranks of a replica: frames on a socket pair that only the two processes have."""

from __future__ import annotations

import socket
import struct
import threading
from enum import IntEnum

PULSE = 0.5
"""Seconds between two signs of life."""
_HEAD = struct.Struct("<BQ")
"""A frame's kind, and the bytes that follow."""


class Kind(IntEnum):
    """What a frame is."""

    LOAD = 1  # JSON: what to load
    MEET = 2  # JSON: whom to share sequences with
    RUN = 3  # a forward in the wire form, whose prediction is wanted
    HELP = 4  # one whose prediction another rank has
    READY = 5  # nothing: loaded, or met
    DONE = 6  # the forward's prediction in the wire form, or nothing
    FAILED = 7  # JSON: the kind and the text of an error, as `errors.to_text` gives them
    BEAT = 8  # nothing: a sign of life


class Link:
    """One end of a socket pair. Any thread may send; one at a time receives."""

    def __init__(self, end: socket.socket) -> None:
        self._socket = end
        self._sending = threading.Lock()

    def send(self, kind: Kind, data: bytes | memoryview = b"") -> None:
        """Send a frame.

        Raises:
            OSError: the other process is gone.
        """
        with self._sending:
            self._socket.sendall(_HEAD.pack(kind, len(data)))
            self._socket.sendall(data)

    def receive(self) -> tuple[Kind, bytearray]:
        """Wait for a frame.

        Raises:
            EOFError: the other process is gone.
        """
        kind, length = _HEAD.unpack(self._take(_HEAD.size))
        return Kind(kind), self._take(length)

    def close(self) -> None:
        """Let go: the other end is told."""
        try:
            self._socket.shutdown(socket.SHUT_RDWR)  # wakes the thread that receives
        except OSError:
            pass  # the other end was first
        self._socket.close()

    def _take(self, length: int) -> bytearray:
        data = bytearray(length)
        view, done = memoryview(data), 0
        while done < length:
            try:
                count = self._socket.recv_into(view[done:])
            except OSError as error:
                raise EOFError(str(error)) from error
            if count == 0:
                raise EOFError("the other process is gone")
            done += count
        return data
