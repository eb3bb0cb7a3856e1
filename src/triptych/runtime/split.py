"""Runs one request with each role in a process of its own, one after another, over files in the wire form.

The parent starts `python -m triptych.runtime.split JOB` for each segment, the job in JSON: which role of which model to
load, where the state is and where to leave it. The child answers with lines of JSON on its stdout: `log`, `loaded`,
`step`, and at the end `done` or `error`.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from triptych import errors
from triptych.components.acceleration import parse_acceleration, to_plain
from triptych.errors import RoleProcessError

if TYPE_CHECKING:
    from triptych.components.acceleration import AccelerationSpec
    from triptych.components.dtypes import DtypeSpec
    from triptych.runtime.segment import OnStep
    from triptych.state import State

OnLoaded = Callable[[str, float], None]
"""Called with a role's name and the seconds that loading it took."""


class RoleRaisedError(RuntimeError):
    """A role's process met an error that Triptych does not raise itself."""


class _Remote(Exception):
    """Carries a child's traceback as the cause of the error raised here."""

    def __str__(self) -> str:
        return f"\n{self.args[0]}"


def run_split(
    source: str | Path,
    state: State,
    *,
    device: str = "auto",
    dtype: DtypeSpec = "auto",
    revision: str | None = None,
    variant: str | None = None,
    acceleration: AccelerationSpec = None,
    on_step: OnStep | None = None,
    on_loaded: OnLoaded | None = None,
    show_output: bool = False,
) -> State:
    """Run an admitted request to its end, each segment in a new process that loads only its role.

    Whatever happens, no process and no file is left behind.

    Args:
        state: as `Model.admit` returns it; `triptych.load(source, role="server")` admits without loading weights.
        on_step, on_loaded: told of every step, and of every role that is loaded; what they raise stops the run.
        show_output: let what the libraries print in the processes through to stderr.

    Raises:
        TriptychError: as `Model.run` does, in the class that says who is at fault.
        RoleProcessError: a process was killed.
        RoleRaisedError: anything else went wrong in a process.
    """
    import torch

    from triptych.state import State

    common = {
        "source": str(source),
        "device": device,
        "dtype": plain_dtype(dtype),
        "revision": revision,
        "variant": variant,
        "acceleration": to_plain(parse_acceleration(acceleration)),
        "task": state.task,
        "threads": torch.get_num_threads(),
        "log_level": logging.getLogger("triptych").getEffectiveLevel(),
    }
    with tempfile.TemporaryDirectory(prefix="triptych-") as folder:
        before = Path(folder, "0.safetensors")
        before.write_bytes(state.to_bytes())
        hop, role = 0, None if state.next_role is None else state.next_role.value
        while role is not None:
            hop += 1
            after = Path(folder, f"{hop}.safetensors")
            job = {**common, "role": role, "before": str(before), "after": str(after)}
            with _process(job, None if show_output else Path(folder, "stderr")) as (answers, last_words):
                role = _follow(answers, role, last_words, on_step, on_loaded)
            before.unlink()
            before = after
        return State.from_bytes(before.read_bytes())


@contextmanager
def _without_interrupts() -> Iterator[None]:
    """Hold Ctrl-C back for a moment; a process that is started in it is deaf to it, even while it is importing."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def _process(
    job: Mapping[str, object], stderr: Path | None
) -> Iterator[tuple[subprocess.Popen[str], Callable[[], str]]]:
    """Start a role's process; kill it when the block is left, however that happens."""
    root = str(Path(__file__).parents[2])  # so that the child finds this very package
    path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "PYTHONPATH": path, "PYTHONSAFEPATH": "1"}  # nothing from the working folder
    command = [sys.executable, "-m", "triptych.runtime.split", json.dumps(job)]
    with ExitStack() as stack:
        # Not a pipe: one that nobody reads would stall the child.
        sink = None if stderr is None else stack.enter_context(open(stderr, "w+b"))
        with _without_interrupts():
            process = stack.enter_context(
                subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=sink,
                    encoding="utf-8",
                    env=environment,
                )
            )
        # Before Popen's own exit, which waits for no more than a moment after Ctrl-C.
        stack.callback(process.wait)
        stack.callback(process.kill)
        yield process, lambda: _last_line(sink)


def _follow(
    process: subprocess.Popen[str],
    role: str,
    last_words: Callable[[], str],
    on_step: OnStep | None,
    on_loaded: OnLoaded | None,
) -> str | None:
    """Pass on what a role's process tells until it is done; returns the role whose turn it is then."""
    assert process.stdout is not None
    for line in process.stdout:
        message = json.loads(line)
        content = message["content"]
        if message["kind"] == "log":
            name, level, text = content
            logging.getLogger(name).log(level, "%s", text)
        elif message["kind"] == "loaded" and on_loaded is not None:
            on_loaded(role, content)
        elif message["kind"] == "step" and on_step is not None:
            on_step(*content)
        elif message["kind"] == "error":
            _raise(role, **content)
        elif message["kind"] == "done":
            process.wait()
            following: str | None = content
            return following
    raise RoleProcessError(role, process.wait(), last_words())


def _raise(role: str, kind: str, text: str, trace: str) -> None:
    """Raise here what a role's process raised."""
    error: Exception = errors.from_text(kind, text)
    if isinstance(error, errors.RemoteError):  # not one of ours: reported as unexpected, as it would be here
        error = RoleRaisedError(f"in the process of the {role}: {text}")
    raise error from _Remote(trace)


def _last_line(file: IO[bytes] | None) -> str:
    if file is None:
        return ""
    file.seek(max(0, file.seek(0, os.SEEK_END) - 4096))
    lines = file.read().decode(errors="replace").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "")


def plain_dtype(dtype: DtypeSpec) -> object:
    """Return what a dtype was asked for as, of types that JSON has."""
    return {name: str(each) for name, each in dtype.items()} if isinstance(dtype, Mapping) else str(dtype)


# What follows runs in a role's process.


class _Channel(logging.Handler):
    """Tells the parent; takes over stdout, so that nothing else gets between the lines."""

    def __init__(self) -> None:
        super().__init__()
        self.file = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
        os.dup2(2, 1)

    def tell(self, kind: str, content: object) -> None:
        print(json.dumps({"kind": kind, "content": content}), file=self.file)

    def emit(self, record: logging.LogRecord) -> None:
        self.tell("log", [record.name, record.levelno, record.getMessage()])


def _describe(error: Exception) -> dict[str, str]:
    kind, text = errors.to_text(error)
    return {"kind": kind, "text": text, "trace": traceback.format_exc()}


def _work(job: Mapping[str, Any], channel: _Channel) -> None:
    import torch

    torch.set_num_threads(job["threads"])
    from triptych.runtime.model import load
    from triptych.state import State

    began = time.perf_counter()
    names = ("role", "device", "dtype", "revision", "variant", "acceleration")
    model = load(job["source"], tasks=[job["task"]], **{name: job[name] for name in names})
    channel.tell("loaded", time.perf_counter() - began)
    state = State.from_bytes(Path(job["before"]).read_bytes())
    state = model.run(state, on_step=lambda *step: channel.tell("step", step))
    Path(job["after"]).write_bytes(state.to_bytes())
    channel.tell("done", None if state.next_role is None else state.next_role.value)


def main() -> int:
    """Run one segment of one request, as the parent's job says."""
    job = json.loads(sys.argv[1])
    channel = _Channel()
    logger = logging.getLogger("triptych")
    logger.addHandler(channel)
    logger.setLevel(job["log_level"])
    logger.propagate = False
    try:
        _work(job, channel)
    except Exception as error:  # noqa: BLE001 (it is raised again, in the parent)
        channel.tell("error", _describe(error))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
