"""Limits: what one caller may take of a server, and what is kept for all of them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Limits:
    """Bounds of a server; none can be passed by a request.

    Attributes:
        body: bytes of a request's body, images included.
        prompt: characters of one text.
        tokens: of a prompt that a request may have a text encoder see (`max_sequence_length`).
        images: pictures that one request may carry, and outputs that it may ask for.
        pixels: of all pictures of one request together, and of all that it asks for.
        waiting_pixels: of the pictures that all requests carry which have not ended: each takes some six bytes of memory.
        video_pixels: of all frames that one request asks for.
        seconds: of a video that one request asks for.
        chunks: of a video that is made piece by piece; each takes the request's steps.
        deadline: seconds that a request may ask for, and those of one that asks for nothing.
        kept: finished requests that are remembered.
        kept_seconds: how long each of them is.
        video_seconds: how long videos are that outlive the server's process.
        kept_bytes: of results on disk; the oldest go first.
        keep_alive: seconds of silence on a stream of events before a comment is sent.
        steps: denoising steps that a request may ask for, and values of a list: as many events are kept of each chunk.
        kept_events: of all finished requests together; the oldest requests go first.
        uploads: bodies of more than 64 KiB that may be on their way at a time.
        upload_seconds: how long a body may take.
        upload_silence: how long it may pause.
        lora_folders: in which requests may name LoRAs, beside the model's own folder.
        linger: seconds that a result which nobody has fetched holds a server back that is to stop.
    """

    body: int = 64 * 2**20
    prompt: int = 32_000
    tokens: int = 4096
    images: int = 16
    pixels: int = 64_000_000
    waiting_pixels: int = 512_000_000
    video_pixels: int = 2_000_000_000
    seconds: float = 3600
    chunks: int = 1000
    deadline: float = 24 * 3600
    kept: int = 1000
    kept_seconds: float = 3600
    video_seconds: float = 24 * 3600
    kept_bytes: int = 4 * 2**30
    keep_alive: float = 15
    steps: int = 1000
    kept_events: int = 200_000
    uploads: int = 16
    upload_seconds: float = 120
    upload_silence: float = 20
    linger: float = 5
    lora_folders: tuple[Path, ...] = ()
