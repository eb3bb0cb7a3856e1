"""The HTTP side of `triptych serve`: who may ask, in what limits, and the line that says where."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from triptych.cli.console import human

if TYPE_CHECKING:
    from triptych.engine.base import Engine
    from triptych.server.jobs import JobStore


def listen(
    build: Callable[[], Engine],
    host: str,
    port: int,
    patience: float,
    keep: Callable[[], JobStore | None],
    *,
    api_key: str | None,
    origins: list[str] | None,
    certificate: Path | None,
    private: Path | None,
    lora_folders: tuple[Path, ...],
    max_prompt: int,
    insecure: bool,
) -> None:
    """Serve what `build` makes over HTTP until asked to end; see the options of `triptych serve`.

    Raises:
        UsageError: a key, a certificate or the address cannot be used.
    """
    from triptych.server.front import Tls
    from triptych.server.guard import Access, check_exposure
    from triptych.server.keys import read_keys
    from triptych.server.limits import Limits
    from triptych.server.serve import serve as serve_over_http

    access = Access(() if api_key is None else read_keys(api_key), tuple(origins or ()))
    tls = None if certificate is None else Tls(certificate, private)
    check_exposure(host, access, encrypted=tls is not None, insecure=insecure)

    def tell(engine: Engine, url: str) -> None:
        told = engine.snapshot()
        announce(told["replicas"], url, str(told["model"]).rstrip("/").rpartition("/")[2])

    limits = Limits(prompt=max_prompt, lora_folders=tuple(folder.resolve() for folder in lora_folders))
    serve_over_http(
        build,
        tell,
        host=host,
        port=port,
        limits=limits,
        patience=patience,
        store=keep(),
        access=access,
        tls=tls,
    )


def announce(replicas: list[dict[str, Any]], where: str, model: str | None = None) -> None:
    """Print the one line that says that requests can come."""
    names = ", ".join(str(each.get("name")) for each in replicas) or "no replica yet"
    loaded = human(sum(each.get("loaded_bytes") or 0 for each in replicas))
    serves = "Triptych has joined the service at" if model is None else f"Triptych serves {model} on"
    print(f"{serves} {where} ({names}; {loaded} loaded)", flush=True)
