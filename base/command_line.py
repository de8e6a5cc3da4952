"""The command line of every script, and the boundary at which a user's mistake becomes one line."""

import argparse
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

from base.errors import fail, line_and_status, started_by_torchrun


def run(
    main: Callable,
    documentation: str,
    switch: tuple[str, str] | None = None,
    choices: dict[str, object] | None = None,
    files: str | None = None,
) -> None:
    """Run a script's `main` and exit with the status that it returns; with 2 after a user's mistake.

    Args:
        main: called with a list of values of `choices` if there are any, with a list of paths if `files` is given, and
            with the state of the switch if there is one.
        documentation: the script's docstring, printed for --help.
        switch: name and help of an optional switch.
        choices: what the optional argument can name; all of them without it.
        files: help of the files that the script takes, at least one.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed by the shell
            setattr(sys, name, open(os.devnull, "w"))
        else:
            stream.reconfigure(errors="replace")  # a terminal may lack some characters
    parser = argparse.ArgumentParser(
        description=documentation, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    if choices:
        parser.add_argument("only", nargs="?", choices=list(choices), help="only this; all without it")
    if files:
        parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help=files)
    if switch:
        parser.add_argument(switch[0], dest="switch", action="store_true", help=switch[1])
    given = parser.parse_args()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # the imports are over
    arguments = []
    if choices:
        arguments.append([choices[given.only]] if given.only else list(choices.values()))
    if files:
        arguments.append(given.files)
    if switch:
        arguments.append(given.switch)
    try:
        status = main(*arguments)
        sys.stdout.flush()
    except BrokenPipeError:  # `python … | head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)  # as a shell reports SIGPIPE
    except (Exception, KeyboardInterrupt) as error:
        known = line_and_status(error)
        if known is None:
            if started_by_torchrun():
                time.sleep(10)  # another process probably failed first; torchrun then ends this one without a traceback
            raise
        fail(*known)
    sys.exit(status)
