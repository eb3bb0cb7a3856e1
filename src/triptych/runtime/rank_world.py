"""The world of the ranks that share sequences: PyTorch's process group, on this machine's loopback interface alone."""

from __future__ import annotations

import logging
import os
import socket
from datetime import timedelta
from typing import Any

import torch

from triptych.errors import ModelError

log = logging.getLogger(__name__)

MEETING = timedelta(minutes=5)
"""What ranks may take to find each other, and to wait for each other in a forward."""

_LOOPBACK = "127.0.0.1"
_distributed: Any = torch.distributed  # its stores are not typed


def open_world() -> tuple[int, Any]:
    """Open a place where ranks find each other: a port that is free, and what has to be kept as long as they run."""
    listener = socket.create_server((_LOOPBACK, 0))
    port: int = listener.getsockname()[1]
    # It would listen on all interfaces by itself, and asks nobody who he is.
    store = _distributed.TCPStore(
        _LOOPBACK, port, None, True, wait_for_workers=False, master_listen_fd=listener.detach()
    )
    return port, store


def join_world(port: int, place: int, size: int, device: torch.device) -> None:
    """Join the ranks that share sequences.

    Args:
        port: where they find each other.
        place, size: this one's number, and how many there are.

    Raises:
        ModelError: they do not find each other.
    """
    loopback = next((name for _, name in socket.if_nameindex() if name in ("lo", "lo0")), None)
    if loopback is None:
        log.warning("this machine has no loopback interface that is known: ranks listen where other machines may reach")
    else:
        for library in ("GLOO", "NCCL"):  # both would listen on the interface that the machine's name stands for
            os.environ.setdefault(f"{library}_SOCKET_IFNAME", loopback)
    try:
        _distributed.init_process_group(
            "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",  # lengths are told without waiting for the GPU
            store=_distributed.TCPStore(_LOOPBACK, port, None, False),
            rank=place,
            world_size=size,
            timeout=MEETING,
        )
    except (RuntimeError, ValueError) as error:
        raise ModelError(f"the ranks of this replica do not find each other: {error}") from error
