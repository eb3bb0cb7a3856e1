"""How states go straight from one process to another on the same machine: through a local socket.

A small state is part of the message. A larger one lies in memory without a name (`memfd_create`) that the message passes
on: the kernel frees it with the last process that holds it, so nothing of a killed one is left.
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import mmap
import os
import secrets
import select
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

log = logging.getLogger(__name__)

LARGEST = 64 * 2**20
"""Bytes of a state up to which it is sent this way; larger ones lie in Ray's object store, which keeps them anyway."""
MODEST = 2**20
"""Bytes of a state up to which whoever has it sends it at once, and the router is told it, too, to keep it: less than what
it costs to have another thread do that, or Ray."""
SMALL = 65_536
"""Bytes of a state up to which it is part of its message."""
PATIENCE = 2.0
"""Seconds that either side waits for the other."""
_PROMPT = 20
"""Milliseconds in which a sender's message is mostly there; one that takes longer gets a thread, so that others go on."""
_REST = 0.1
"""Seconds until the next try where the system has nothing left to take a message with."""
_TAKEN, _REFUSED = b"\1", b"\0"
_HEAD = struct.Struct("<q")  # the bytes of the order that follows; it ends with spaces, so that the state is aligned
_ROOM = _HEAD.size + 2 * SMALL
"""Bytes of a whole message; Linux takes some more."""
_CREDENTIALS = struct.Struct("3i")  # of the other end: process, user, group


@dataclass(frozen=True)
class Order:
    """What a process is to do with the state of a ticket, in plain values.

    Attributes:
        ticket: its name.
        seconds_left: until the request's deadline; None where it has none.
        previews: how many pictures on the way are wanted, and the matrix to make them with.
        inbox: where the order and its state can be sent to; None where Ray has to bring them.
        then: the order that goes on with the state afterwards, if that is settled.
        reply: where the router hears what became of it; None where only Ray can tell.
    """

    ticket: str
    seconds_left: float | None = None
    previews: tuple[int, list[list[float]]] | None = None
    inbox: str | None = None
    then: Order | None = None
    reply: str | None = None


@dataclass(frozen=True)
class Answer:
    """What became of a ticket, in plain values; with it comes the state after the segment.

    Attributes:
        ticket: its name.
        inbox: the router's.
        turns: whose turns are left; None where Ray has to bring the answer, which the router asks for then.
        seconds: what the segment took.
        handed: whether the next replica has the state already.
    """

    ticket: str
    inbox: str
    turns: tuple[str, ...] | None = None
    seconds: float = 0.0
    handed: bool = False


class Message(Protocol):
    """What an inbox can be sent: a dataclass of plain values."""

    @property
    def inbox(self) -> str | None:
        """Where it goes."""


Heard = TypeVar("Heard", Order, Answer)


class Inbox(Generic[Heard]):
    """Receives messages of one kind, each with a state, in a thread of its own; one that is long in coming in another.

    The socket is one of Linux's that have a name but no file, so that nothing of a killed process is left. It hears
    this user's processes only.

    Args:
        kind: of the messages.
        receive: takes one and its state; returns what is to be done when the sender knows that, or None to refuse it.
            Both are to be quick: others that send wait meanwhile.

    Attributes:
        address: what `send` takes; None where the system has no such sockets.
    """

    def __init__(self, kind: type[Heard], receive: Callable[[Heard, memoryview], Callable[[], None] | None]) -> None:
        self.address: str | None = None
        self._kind: type[Heard] = kind
        self._receive: Callable[[Heard, memoryview], Callable[[], None] | None] = receive
        address = f"\0triptych-{secrets.token_hex(16)}"
        try:
            self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)  # a message comes whole, or not at all
            self._socket.bind(address)
        except (AttributeError, OSError) as error:
            log.warning("states cannot come straight to this process (%s): they come through Ray", error)
            return
        self._socket.listen(64)
        self.address = address
        threading.Thread(target=self._accept, name="inbox", daemon=True).start()

    def close(self) -> None:
        """Hear nobody any more."""
        if self.address is not None:
            self._socket.shutdown(socket.SHUT_RDWR)  # wakes the thread that accepts
            self._socket.close()

    def _accept(self) -> None:
        while True:
            try:
                sender, _ = self._socket.accept()
            except OSError as error:
                if error.errno in (errno.EBADF, errno.EINVAL):  # closed
                    return
                log.warning("nothing can be taken at the moment: %s", error)
                time.sleep(_REST)
                continue
            try:
                coming = select.poll()
                coming.register(sender, select.POLLIN)
                if coming.poll(_PROMPT):
                    self._hear(sender)
                else:
                    threading.Thread(target=self._hear, args=(sender,), name="inbox sender", daemon=True).start()
            except Exception:  # whoever sent goes through Ray, and others are still to be heard
                log.exception("a state could not be taken")
                sender.close()

    def _hear(self, sender: socket.socket) -> None:
        """Take the state that a process sends."""
        with sender:
            credentials = sender.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
            _, user, _ = _CREDENTIALS.unpack(credentials)
            if user != os.getuid():
                log.warning("a process of user %d wanted to hand over a state: refused", user)
                return
            sender.settimeout(PATIENCE)
            try:
                message, held, _, _ = socket.recv_fds(sender, _ROOM, 1)
                with _closing(held):
                    end = _HEAD.size + _HEAD.unpack_from(message)[0]
                    data = _mapped(held[0]) if held else memoryview(message)[end:]
                    begin = self._receive(self._read(message[_HEAD.size : end]), data)
            except (OSError, TypeError, ValueError, struct.error) as error:
                log.warning("a state could not be taken: %s", error)
                return
            with suppress(OSError):  # whether or not it wants to know: what was taken is to be begun
                sender.send(_REFUSED if begin is None else _TAKEN)
        if begin is not None:
            begin()

    def _read(self, head: bytes) -> Heard:
        """Return what a message begins with.

        Raises:
            TypeError, ValueError: it does not.
        """
        read: object = json.loads(head, object_hook=lambda told: self._kind(**told))
        if not isinstance(read, self._kind):
            raise TypeError(f"neither order nor answer: {read!r}")
        return read


def send(message: Message, data: memoryview) -> bool:
    """Give another process on this machine a message and a state.

    Returns whether it took it; False at once where it has no inbox, or the state is too large for one.
    """
    receiver = begin_sending(message, data, 2 * PATIENCE)
    return receiver is not None and is_taken(receiver)


def begin_sending(message: Message, data: memoryview, patience: float) -> socket.socket | None:
    """Give another process a message and a state, and do not wait for its answer.

    Args:
        patience: seconds to wait until there is room for the message.

    Returns where its answer comes, for `is_taken`; None where the state could not be sent.
    """
    if message.inbox is None or len(data) > LARGEST:
        return None
    inside = len(data) <= SMALL
    head = json.dumps(message, default=vars, separators=(",", ":")).encode("ascii")
    head += b" " * (-len(head) % 8)
    if len(head) > SMALL:
        return None
    try:
        # Before it is connected: then somebody waits for what is sent.
        with _closing([] if inside else [_stored(data)]) as held, ExitStack() as undo:
            receiver = undo.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
            receiver.settimeout(patience)
            receiver.connect(message.inbox)
            if inside:
                receiver.sendmsg((_HEAD.pack(len(head)), head, data))
            else:
                socket.send_fds(receiver, (_HEAD.pack(len(head)), head), held)
            undo.pop_all()
            return receiver
    except OSError as error:
        log.info("a state could not be sent directly (%s): it goes through Ray", error)
        return None


def is_taken(receiver: socket.socket) -> bool:
    """Wait for the answer to what `begin_sending` has sent; returns whether the state was taken."""
    with receiver:
        receiver.settimeout(2 * PATIENCE)
        try:
            return receiver.recv(1) == _TAKEN
        except OSError as error:
            log.info("a state that was sent directly may not have come (%s): it goes through Ray", error)
            return False


def _stored(data: memoryview) -> int:
    """Return the descriptor of memory that holds `data`, for good.

    Raises:
        OSError: there is none left.
    """
    memory = os.memfd_create("triptych-state", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        written = 0
        while written < len(data):
            written += os.write(memory, data[written:])
        fcntl.fcntl(memory, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
    except BaseException:
        os.close(memory)
        raise
    return memory


def _mapped(memory: int) -> memoryview:
    """Return the bytes that a descriptor's memory holds. What is written there is seen by this process alone."""
    return memoryview(mmap.mmap(memory, 0, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE))


@contextmanager
def _closing(held: list[int]) -> Iterator[list[int]]:
    try:
        yield held
    finally:
        for each in held:
            os.close(each)
