"""What all tests share: no network, one thread, deterministic kernels, and tiny model repositories."""

import os
import signal
import sys

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"  # transformers obeys it too
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # deterministic matrix products, where there is a GPU

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # started in the background: what tests start would be deaf, too
    signal.signal(signal.SIGINT, signal.default_int_handler)

from collections.abc import Callable, Iterator
from pathlib import Path

import operators  # noqa: F401 (before tiny, which imports the libraries)
import pytest
import tiny
import torch

torch.set_num_threads(1)
if torch.backends.cpu.get_cpu_capability() == "AVX2":
    # MKL rounds by where tensors lie in memory there: diffusers' pipeline differs from itself. It reads this when it is
    # first asked to compute, here and in the processes that tests start.
    os.environ.setdefault("MKL_CBWR", "AVX2,STRICT")
torch.use_deterministic_algorithms(True, warn_only=True)  # some kernels on a GPU have no such form

TinyRepo = Callable[..., Path]


@pytest.fixture(scope="session")
def tiny_repo(tmp_path_factory: pytest.TempPathFactory) -> TinyRepo:
    """`tiny_repo(family, **variant) -> Path`: built once per session and variant. Read-only: copy it to change it."""
    built: dict[tuple[str, str], Path] = {}

    def get(family: str, **variant: object) -> Path:
        key = (family, repr(sorted(variant.items())))
        if key not in built:
            folder = tmp_path_factory.mktemp(family)
            # Building models draws from the global generator; leave it as it was.
            with torch.random.fork_rng():
                built[key] = tiny.build(family, folder, **variant)
        return built[key]

    return get


@pytest.fixture(scope="module", autouse=True)
def no_ray_left_running() -> Iterator[None]:
    """No file's tests leave Ray running: it starts by itself where something merely uses it, and others meet it."""
    yield
    if (ray := sys.modules.get("ray")) is not None and ray.is_initialized():
        ray.shutdown()
        pytest.fail("Ray was left running")
