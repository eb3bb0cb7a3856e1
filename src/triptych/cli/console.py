"""What the command line shows on stderr beside errors: log lines, progress, sizes. Results go to stdout."""

from __future__ import annotations

import errno
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console


def stderr_console() -> Console:
    """Return a Rich console on stderr."""
    from rich.console import Console

    class Stderr(Console):
        def on_broken_pipe(self) -> None:
            # As any file would: Rich itself would end the process, from wherever something is printed.
            raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))

    return Stderr(stderr=True, highlight=False)


def human(size: int) -> str:
    """Return a number of bytes in decimal units, with three digits."""
    value = float(size)
    for unit in ("B", "kB", "MB"):
        if value < 999.5:
            return f"{value:.0f} {unit}" if unit == "B" or value >= 99.95 else f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.3g} GB" if value < 99.95 else f"{value:.0f} GB"


class _Lines(logging.Handler):
    """Prints log records as lines that do not disturb a progress bar."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        self.console = console

    def emit(self, record: logging.LogRecord) -> None:
        label = "" if record.levelno <= logging.INFO else f"{record.levelname.lower()}: "
        try:
            self.console.print(f"{label}{record.getMessage()}", markup=False, soft_wrap=True)
        except OSError as error:
            # Not the failure of whoever logs, who has work to go on with: a server, its last requests to finish. Once
            # the terminal or the pipe is gone, nothing more is printed: the console would collect what it cannot write.
            self.console.quiet = error.errno in (errno.EIO, errno.EPIPE)


@contextmanager
def logging_to(console: Console, *, verbose: bool) -> Iterator[None]:
    """Show Triptych's own log on the console: warnings, and with `verbose` what each role loaded."""
    logger, handler = logging.getLogger("triptych"), _Lines(console)
    before = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(logging.INFO if verbose else logging.WARNING)
    logger.propagate = False
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.level, logger.propagate = before


def quieten_libraries_to_come() -> None:
    """Silence the warnings of transformers and diffusers without importing them, which takes seconds.

    Their progress bars remain, which a process that loads no weights never sees.
    """
    import warnings

    warnings.simplefilter("ignore")
    for library in ("DIFFUSERS", "TRANSFORMERS"):
        os.environ.setdefault(f"{library}_VERBOSITY", "error")


def quieten_libraries(*, downloads: bool) -> None:
    """Silence the warnings and progress bars of transformers and diffusers.

    Args:
        downloads: keep the bars of the hub's downloads.
    """
    import warnings

    warnings.simplefilter("ignore")
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    for library in (diffusers_logging, transformers_logging):
        library.set_verbosity_error()
        library.disable_progress_bar()
    if downloads and sys.stderr.isatty():
        from huggingface_hub.utils.tqdm import enable_progress_bars

        enable_progress_bars()  # transformers switched them off with its own
