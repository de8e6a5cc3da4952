"""What all scripts share, without torch: the one error type, the one writer, the folders, the command line."""

import argparse
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable
from contextlib import contextmanager, suppress
from pathlib import Path

import config

# What libraries keep for themselves lies below the project root, too; set before any of them is imported. Where nothing
# can be written there (to compare logits nothing need be), they take their own places.
if os.access(config.PROJECT_ROOT, os.W_OK):
    os.environ.setdefault("MPLCONFIGDIR", str(config.PROJECT_ROOT / "cache" / "matplotlib"))
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(config.PROJECT_ROOT / "cache" / "torchinductor"))

TASKS = ("rgb", "ms")
PARTS = ("train", "val", "test")


class UserError(Exception):
    """A mistake of the user's: one line that says what, where and what to do. Everything else is a bug."""


# Folders ---------------------------------------------------------------------------------------------------------


def splits_dir(profile: str | None = None) -> Path:
    return config.PROJECT_ROOT / "splits" / (profile or config.PROFILE)


def outputs_dir(task: str) -> Path:
    return config.PROJECT_ROOT / "outputs" / config.PROFILE / task


def report_path() -> Path:
    name = "report.pdf" if config.PROFILE == "course" else f"report-{config.PROFILE}.pdf"
    return config.PROJECT_ROOT / "report" / name


def shown(path: Path) -> str:
    """The path as messages show it: from the project root on where it lies below it."""
    return str(path.relative_to(config.PROJECT_ROOT) if path.is_relative_to(config.PROJECT_ROOT) else path)


# The one writer --------------------------------------------------------------------------------------------------


@contextmanager
def written_whole(path: Path, keep_former: bool = False):
    """Yield a path beside `path` to write to, then rename it into place: readers see the old file or the new one.

    Args:
        keep_former: keep a former file with another content as <name>.<start of its SHA-256>.backup, for good.

    Raises:
        UserError: the folder cannot be written to, or the disk is full.
    """
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        with open(partial, "rb") as file:
            os.fsync(file.fileno())  # or a power cut could leave the new name on an empty file
        if keep_former and path.exists() and (former := path.read_bytes()) != partial.read_bytes():
            backup = path.with_name(f"{path.name}.{sha256(former)[:8]}.backup")
            shutil.copy2(path, backup)
            print(f"kept the former {shown(path)} as {backup.name}")
        os.replace(partial, path)
    except OSError as error:
        raise UserError(
            f"cannot write {shown(path)}: {error.strerror or error}; "
            "free some space or point PROJECT_ROOT (config.py) to a folder that can be written"
        ) from error
    finally:
        with suppress(OSError):  # renamed, never begun, or on a disk that has become read-only
            partial.unlink()


def write_text(path: Path, text: str, keep_former: bool = False) -> None:
    with written_whole(path, keep_former) as partial:
        partial.write_bytes(text.encode())


def write_json(path: Path, content: object, keep_former: bool = False) -> None:
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n", keep_former)


def sha256(*contents: bytes) -> str:
    """SHA-256 over the contents one after another, as hexadecimal digits."""
    digest = hashlib.sha256()
    for content in contents:
        digest.update(content)
    return digest.hexdigest()


# The command line ------------------------------------------------------------------------------------------------


def run(main: Callable, documentation: str, switch: tuple[str, str] | None = None, tasks: bool = False) -> None:
    """Run a script's `main` and exit: status 0, or `main`'s own, or 2 after one line on stderr for a user's mistake.

    Args:
        main: called with `tasks` (a tuple of "rgb", "ms") if `tasks`, and with the state of the switch if there is one.
        documentation: the script's docstring, printed for --help.
        switch: name and help of the one optional switch, e.g. ("--save", "…").
        tasks: whether the script takes an optional `rgb` or `ms`.
    """
    parser = argparse.ArgumentParser(
        description=documentation, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    if tasks:
        parser.add_argument("task", nargs="?", choices=TASKS, help="only this one; without it, both")
    if switch:
        parser.add_argument(switch[0], dest="switch", action="store_true", help=switch[1])
    given = parser.parse_args()
    arguments = []
    if tasks:
        arguments.append((given.task,) if given.task else TASKS)
    if switch:
        arguments.append(given.switch)
    try:
        check_config()
        sys.exit(main(*arguments))
    except UserError as error:
        print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(f"{Path(sys.argv[0]).name}: interrupted", file=sys.stderr)
        sys.exit(130)


def check_config() -> None:
    """Refuse what is wrong in config.py before anything is read or written.

    Raises:
        UserError: names the value and the known ones.
    """
    if config.PROFILE not in config.SPLIT_SIZES:
        raise UserError(f"unknown PROFILE {config.PROFILE!r}; known: {', '.join(config.SPLIT_SIZES)}")
    if len(config.TEAM) > 3:
        raise UserError(f"TEAM in config.py has {len(config.TEAM)} members; at most three")
    if type(config.SEED) is not int or not 0 <= config.SEED < 2**32:
        raise UserError(
            f"SEED in config.py is {config.SEED!r}; it must be a whole number from 0 to {2**32 - 1} (a matriculation "
            "number without letters)"
        )
    sizes = config.SPLIT_SIZES[config.PROFILE]
    if sizes is not None and not (len(sizes) == 3 and all(type(size) is int and size >= 10 for size in sizes)):
        raise UserError(
            f"SPLIT_SIZES[{config.PROFILE!r}] in config.py is {sizes!r}; give three whole numbers (train, val, test), "
            "each at least 10, or None for all images"
        )
