"""States that go straight from one process to another."""

import errno
import json
import os
import queue
import resource
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from triptych.engine import inbox
from triptych.engine.inbox import SMALL, Inbox, Order, send


class Receiver:
    """Takes what comes, if it is open."""

    def __init__(self) -> None:
        self.open = True
        self.taken: queue.SimpleQueue[tuple[Order, bytes, int]] = queue.SimpleQueue()
        self.inbox = Inbox(Order, self.receive)
        assert self.inbox.address is not None

    def receive(self, order: Order, data: memoryview) -> Callable[[], None] | None:
        if not self.open:
            return None
        return lambda: self.taken.put((order, bytes(data), data.nbytes))

    def order(self, ticket: str = "a ticket") -> Order:
        return Order(ticket, inbox=self.inbox.address)


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    receiver = Receiver()
    yield receiver
    receiver.inbox.close()


def test_an_order_and_its_state_arrive_as_they_were(receiver: Receiver) -> None:
    last = Order("third", None, None, "\0elsewhere")
    then = Order("second", 2.5, (3, [[0.1, 0.25], [1e-9, -3.0]]), "\0there", last)
    order = replace(receiver.order("first"), seconds_left=7.0, then=then)
    data = os.urandom(1000)
    assert send(order, memoryview(data))
    arrived, state, _ = receiver.taken.get(timeout=5)
    assert state == data
    assert arrived.then is not None
    assert arrived.then.previews is not None
    count, matrix = arrived.then.previews
    assert (count, matrix) == then.previews
    assert replace(arrived, then=None) == replace(order, then=None)
    assert arrived.then.then == last


@pytest.mark.parametrize("size", [SMALL, SMALL + 1, 3_000_001])
def test_a_state_arrives_whole_in_its_message_or_beside_it(receiver: Receiver, size: int) -> None:
    data = os.urandom(size)
    assert send(receiver.order(), memoryview(data))
    assert receiver.taken.get(timeout=5)[1] == data


def test_a_state_that_is_too_large_is_left_to_ray(receiver: Receiver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inbox, "LARGEST", 2 * SMALL)
    assert send(receiver.order(), memoryview(bytes(2 * SMALL)))
    assert not send(receiver.order(), memoryview(bytes(2 * SMALL + 1)))


def test_a_large_state_can_be_written_to_and_leaves_no_memory_behind() -> None:
    kept: queue.SimpleQueue[memoryview] = queue.SimpleQueue()
    taking = Inbox(Order, lambda order, data: lambda: kept.put(data))
    sent = bytearray(SMALL + 8)
    for _ in range(3):
        assert send(Order("a ticket", inbox=taking.address), memoryview(sent))
        arrived = kept.get(timeout=5)
        arrived[:1] = b"x"
        assert arrived[0] == ord("x") and sent[0] == 0
        assert states_in_memory() > 0
        del arrived
    assert states_in_memory() == 0
    taking.close()


def states_in_memory() -> int:
    """How many large states this process maps, or holds the descriptors of."""
    descriptors = [os.readlink(each.path) for each in os.scandir("/proc/self/fd") if os.path.islink(each.path)]
    mapped = Path("/proc/self/maps").read_text().splitlines()
    return sum("triptych-state" in line for line in (*descriptors, *mapped))


def test_a_large_state_that_is_refused_leaves_no_memory_behind(receiver: Receiver) -> None:
    receiver.open = False
    assert not send(receiver.order(), memoryview(bytes(SMALL + 1)))
    deadline = time.monotonic() + 5
    while states_in_memory() and time.monotonic() < deadline:  # it answers before it lets go
        time.sleep(0.01)
    assert states_in_memory() == 0


def test_a_state_is_aligned_as_the_wire_form_needs_it(receiver: Receiver) -> None:
    starts: queue.SimpleQueue[int] = queue.SimpleQueue()
    taking = Inbox(Order, lambda order, data: lambda: starts.put(np.frombuffer(data, np.uint8).ctypes.data))
    for length in range(1, 20):
        assert send(Order("x" * length, inbox=taking.address), memoryview(b"12345678"))
        assert starts.get(timeout=5) % 8 == 0
    taking.close()


def test_who_sends_is_told_whether_it_was_taken(receiver: Receiver) -> None:
    receiver.open = False
    assert not send(receiver.order(), memoryview(b"state"))
    receiver.open = True
    assert send(receiver.order(), memoryview(b"state"))


def test_what_was_taken_is_begun_after_the_sender_knows(receiver: Receiver) -> None:
    known = threading.Event()
    slow = Inbox(Order, lambda order, data: lambda: receiver.taken.put((order, bytes(known.wait(5)), 0)))
    assert send(Order("a ticket", inbox=slow.address), memoryview(b"state")), "it does not wait for the work"
    known.set()
    assert receiver.taken.get(timeout=5)[1] == bytes(True)
    slow.close()


def test_a_sender_that_does_not_wait_goes_on_at_once_and_its_state_arrives(receiver: Receiver) -> None:
    sent = inbox.begin_sending(receiver.order(), memoryview(b"state"), 0)
    assert sent is not None
    sent.close()
    assert receiver.taken.get(timeout=5)[1] == b"state"


def test_an_inbox_that_is_gone_takes_nothing(receiver: Receiver) -> None:
    gone = receiver.order()
    receiver.inbox.close()
    assert not send(gone, memoryview(b"state"))
    assert not send(replace(gone, inbox=None), memoryview(b"state"))
    receiver.inbox = Inbox(Order, receiver.receive)


def test_a_process_that_hangs_holds_its_sender_up_for_moments_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inbox, "PATIENCE", 0.1)
    address = f"\0triptych-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as deaf:
        deaf.bind(address)
        deaf.listen()
        began = time.monotonic()
        assert not send(Order("a ticket", inbox=address), memoryview(b"state"))
        assert time.monotonic() - began < 2


def test_without_a_descriptor_left_nothing_is_sent_and_nothing_raised(receiver: Receiver) -> None:
    held = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, held[1]))
    try:
        taken = [send(receiver.order(), memoryview(bytes(size))) for size in (8, 2 * SMALL)]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, held)
    assert taken == [False, False]


def test_a_sender_that_says_nothing_holds_nobody_up(receiver: Receiver) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as silent:
        silent.connect(receiver.inbox.address or "")
        began = time.monotonic()
        assert send(receiver.order(), memoryview(b"state"))
        assert time.monotonic() - began < inbox.PATIENCE / 2


def test_what_goes_wrong_with_one_state_does_not_make_it_deaf(receiver: Receiver) -> None:
    def begin(order: Order, data: bytes) -> None:
        if data == b"late":
            raise OSError(errno.EBADF, "what accepting fails with once it is closed")
        receiver.taken.put((order, data, 0))

    def take(order: Order, data: memoryview) -> Callable[[], None]:
        if bytes(data) == b"evil":
            raise RuntimeError("a defect")
        return partial(begin, order, bytes(data))

    taking = Inbox(Order, take)
    order = Order("a ticket", inbox=taking.address)
    assert not send(order, memoryview(b"evil"))
    assert send(order, memoryview(b"late"))
    assert send(order, memoryview(b"state"))
    assert receiver.taken.get(timeout=5)[1] == b"state"
    taking.close()


def test_it_is_not_deaf_for_ever_where_the_system_has_no_descriptor_left(receiver: Receiver) -> None:
    held = resource.getrlimit(resource.RLIMIT_NOFILE)
    kind = socket.AF_UNIX, socket.SOCK_SEQPACKET
    with socket.socket(*kind) as first, socket.socket(*kind) as second:  # one descriptor is reserved before it waits
        resource.setrlimit(resource.RLIMIT_NOFILE, (3, held[1]))
        try:
            for sender in (first, second):
                sender.settimeout(5)
                sender.connect(receiver.inbox.address or "")
                sender.send(b"none")
            time.sleep(3 * inbox._REST)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, held)
        assert second.recv(1) == b"", "it is heard after all"
    assert send(receiver.order(), memoryview(b"state"))


@pytest.mark.parametrize("message", [b"", b"x", b"\xff" * 8, b"\x04\0\0\0\0\0\0\0null", b"\x02\0\0\0\0\0\0\0{}",
                                     b"\x0a\0\0\0\0\0\0\0{\"evil\":1}"])  # fmt: skip
def test_a_message_that_is_none_harms_nothing(receiver: Receiver, message: bytes) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sender:
        sender.settimeout(5)
        sender.connect(receiver.inbox.address or "")
        sender.send(message)
        assert sender.recv(1) == b"", "it is not answered"
    assert send(receiver.order(), memoryview(b"state"))
    assert receiver.taken.get(timeout=5)[1] == b"state"


SEND = """
import os, socket, sys
os.setuid(65534)
sender = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
sender.connect("\\0" + sys.argv[1])
try:
    sender.send(bytes.fromhex(sys.argv[2]))
    print(sender.recv(1))
except OSError as error:
    print(type(error).__name__)
"""


@pytest.mark.skipif(os.getuid() != 0, reason="only root can be somebody else")
def test_another_user_is_not_heard(receiver: Receiver) -> None:
    command = [sys.executable, "-c", SEND, (receiver.inbox.address or "")[1:], "00"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    assert ended.stdout.strip() in ("b''", "BrokenPipeError", "ConnectionResetError"), ended.stderr
    assert receiver.taken.empty()


def test_the_longest_order_and_the_longest_state_beside_it_arrive_whole(receiver: Receiver) -> None:
    rest = len(json.dumps(receiver.order(""), default=vars, separators=(",", ":")))
    order, data = receiver.order("x" * (SMALL - rest)), os.urandom(SMALL)
    assert send(order, memoryview(data))
    assert receiver.taken.get(timeout=5)[:2] == (order, data)
