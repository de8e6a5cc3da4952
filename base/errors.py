"""A user's mistake ends in one line on stderr: the error that carries it, and the only place that prints it."""

import os
import re
import signal
import sys
import traceback
from pathlib import Path
from types import TracebackType

CODE = Path(__file__).resolve().parents[1]


class UserError(Exception):
    """A mistake of the user's. The message says what is wrong, where, and what to do."""


def reason(error: BaseException) -> str:
    """The error's message on one line, at most 200 characters."""
    try:
        return " ".join(str(error).split())[:200] or type(error).__name__
    except Exception:  # of a message that cannot be shown
        return type(error).__name__


def line_and_status(error: BaseException) -> tuple[str, int] | None:
    """The line that tells the user about an error, and the exit status; None for a bug, which shows its traceback."""
    if isinstance(error, UserError):
        return str(error), 2
    if isinstance(error, KeyboardInterrupt):
        return "interrupted", 130
    if isinstance(error, ImportError) and error.name:
        which = "requirements-more.txt" if Path(sys.argv[0]).parent.name == "studies" else "requirements.txt"
        return (
            f"the package {error.name} is not installed or cannot be loaded ({reason(error)}); run: python -m pip install -r {which}",
            2,
        )
    # numpy raises MemoryError, torch a RuntimeError with such a text.
    if isinstance(error, MemoryError) or re.search("out of memory|can't allocate memory", str(error), re.IGNORECASE):
        return f"out of memory ({reason(error)}); set a smaller batch_size or image_size in config.py", 2
    if isinstance(error, OSError) and error.strerror:
        return (
            f"{error.filename or 'output'}: {error.strerror}; check the two paths in config.py, permissions and disk space",
            2,
        )
    return None


def started_by_torchrun() -> bool:
    """Other launchers set RANK and WORLD_SIZE, too."""
    variables = "TORCHELASTIC_RUN_ID", "RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"
    return all(os.environ.get(name) for name in variables)


def fail(message: str, status: int = 2) -> None:
    """Print one line on stderr and exit. One of several processes names its rank."""
    rank = f" (process {os.environ['RANK']})" if started_by_torchrun() else ""
    line = " ".join(message.splitlines())  # a file's name may have line breaks
    print(f"{Path(sys.argv[0]).name}{rank}: {line}", file=sys.stderr, flush=True)
    sys.exit(status)


def watch_imports() -> None:
    """Until a script's `main` runs, let errors and Ctrl-C end in one line. Leaves other programs that import this alone."""
    if Path(sys.argv[0]).resolve().parent in (CODE, CODE / "studies"):
        sys.excepthook = report_uncaught
        # At once: a KeyboardInterrupt inside the compiled parts of a library would abort the process.
        signal.signal(signal.SIGINT, lambda *_: report_uncaught(KeyboardInterrupt, KeyboardInterrupt(), None))


def report_uncaught(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """A `sys.excepthook`."""
    if (known := line_and_status(error)) is None:
        traceback.print_exception(kind, error, trace)
        return
    try:
        fail(*known)
    except SystemExit as end:
        os._exit(end.code)  # a hook cannot set the exit status otherwise
