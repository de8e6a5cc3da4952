"""The ground under all scripts, without torch: the error type, config.py read and checked, the folders, the one writer,
the command line.
"""

import sys

if sys.version_info < (3, 11):  # noqa: UP036 (before anything that an older one would not understand)
    sys.exit(f"Python 3.11 or newer is needed; this is {sys.version.split()[0]} ({sys.executable})")

import argparse
import ast
import dataclasses
import difflib
import hashlib
import importlib.util
import json
import os
import shutil
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from setting import Setting

TASKS = ("rgb", "ms")
PARTS = ("train", "val", "test")
PROFILES = ("course", "full", "published", "spatial", "demo")
# A label is the index in this order.
CLASSES = (
    "AnnualCrop",
    "Forest",
    "HerbaceousVegetation",
    "Highway",
    "Industrial",
    "Pasture",
    "PermanentCrop",
    "Residential",
    "River",
    "SeaLake",
)


class UserError(Exception):
    """A mistake of the user's: one line that says what, where and what to do. Everything else is a bug."""


# config.py -------------------------------------------------------------------------------------------------------


@dataclass
class Config:
    """What config.py and the environment set, checked.

    Attributes:
        dataset_root, project_root: absolute.
        team: name and matriculation number of each member.
        seed: the first member's number, or SEED while the team is empty.
        course_sizes: images in train, val and test of the profile "course".
        settings: those of all profiles, {profile: {task: […]}}.
    """

    dataset_root: Path
    project_root: Path
    team: list[tuple[str, int]]
    seed: int
    split_seed: int
    profile: str
    course_sizes: tuple[int, int, int]
    allow_smaller_splits: bool
    settings: dict[str, dict[str, list[Setting]]]
    ranked_classes: tuple[str, ...]


NAMES = tuple(field.name.upper() for field in dataclasses.fields(Config))


def read_config(path: Path, environment: Mapping[str, str]) -> Config:
    """Read and check config.py; paths, profile and ALLOW_SMALLER_SPLITS of the environment win.

    Raises:
        UserError: the line, what is wrong in it and what is allowed.
    """
    values = _run_config(path)

    def check(name: str, kept: object, rule: str, value: object = None) -> None:
        if not kept:
            shown_value = values.get(name) if value is None else value
            raise UserError(f"config.py{_line_of(path, name)}: {name} is {shown_value!r}; {rule}")

    for name in values:
        meant = difflib.get_close_matches(name, NAMES, 1, 0.8) if name.isupper() and name[0] != "_" else []
        if meant and name not in NAMES:
            raise UserError(
                f"config.py{_line_of(path, name)}: {name} is none of the names that are read; is {meant[0]} meant?"
            )
    for name in NAMES:
        if name not in values:
            raise UserError(f"config.py does not set {name}; known: {', '.join(NAMES)}")

    def folder(name: str, default: Path) -> Path:
        given = environment.get(f"EUROSAT_{name}")
        value = given or values[name]
        if value is None:
            return default
        is_text = isinstance(value, (str, Path)) and str(value).strip() and "\0" not in str(value)
        check(name, is_text, f'give a path as text, for example {name} = "/data/EuroSAT"')
        try:
            return (Path.cwd() if given else path.parent) / Path(value).expanduser()
        except RuntimeError as error:  # ~name of nobody
            check(name, False, str(error), str(value))

    team_rule = 'write TEAM = [("Ada Lovelace", 3141592)], at most three members, numbers of digits alone below 2 ** 32'
    check("TEAM", isinstance(values["TEAM"], list) and len(values["TEAM"]) <= 3, team_rule)
    for member in values["TEAM"]:
        pair = isinstance(member, (tuple, list)) and len(member) == 2 and isinstance(member[0], str)
        check("TEAM", pair and member[0].strip() and _whole_number(member[1]) is not None, team_rule)
    team = [(name.strip(), _whole_number(number)) for name, number in values["TEAM"]]
    for name in ("SEED", "SPLIT_SEED"):
        check(name, _whole_number(values[name]) is not None, f"it must be a whole number from 0 to {2**32 - 1}")
    profile = environment.get("EUROSAT_PROFILE") or values["PROFILE"]
    check("PROFILE", profile in PROFILES, f"known: {', '.join(PROFILES)}", profile)
    sizes = values["COURSE_SIZES"]
    three = isinstance(sizes, (tuple, list)) and len(sizes) == 3 and all(type(n) is int and n >= 10 for n in sizes)
    check("COURSE_SIZES", three, "give three whole numbers (train, val, test), each at least 10")
    smaller = environment.get("EUROSAT_ALLOW_SMALLER_SPLITS") or values["ALLOW_SMALLER_SPLITS"]
    truth = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}.get(str(smaller).lower())
    check("ALLOW_SMALLER_SPLITS", truth is not None, "give True or False", smaller)
    classes = values["RANKED_CLASSES"]
    known = isinstance(classes, (tuple, list)) and classes and all(name in CLASSES for name in classes)
    check("RANKED_CLASSES", known, f"give a tuple of classes, at least one; known: {', '.join(CLASSES)}")
    for problem in _problems_of_settings(values["SETTINGS"]):
        raise UserError(f"config.py{_line_of(path, 'SETTINGS')}: {problem}")
    project_root = folder("PROJECT_ROOT", path.parent)
    return Config(
        folder("DATASET_ROOT", project_root / "data"),
        project_root,
        team,
        team[0][1] if team else _whole_number(values["SEED"]),
        _whole_number(values["SPLIT_SEED"]),
        profile,
        tuple(sizes),
        truth,
        values["SETTINGS"],
        tuple(classes),
    )


def _problems_of_settings(settings: object) -> Iterator[str]:
    """What is wrong with SETTINGS; the fields of each setting are its own affair."""
    if not isinstance(settings, dict) or not all(isinstance(of_tasks, dict) for of_tasks in settings.values()):
        yield "SETTINGS must be {profile: {task: [Setting(…), …]}}"
        return
    for profile, of_tasks in settings.items():
        for task, own in of_tasks.items():
            where = f"SETTINGS[{profile!r}][{task!r}]"
            if profile not in PROFILES or task not in TASKS:
                yield f"{where}: known profiles: {', '.join(PROFILES)}; tasks: {', '.join(TASKS)}"
            elif not isinstance(own, list) or not own or not all(isinstance(setting, Setting) for setting in own):
                yield f"{where} must be a list in brackets, [Setting(…), …], of at least one"
            elif len({setting.name.lower() for setting in own}) < len(own):  # a Mac's folders ignore case
                yield f"the settings of {where} need different names: {', '.join(setting.name for setting in own)}"


def _run_config(path: Path) -> dict[str, object]:
    """The names that config.py assigns; what stops it is told with its line."""
    spec = importlib.util.spec_from_file_location("config", path)
    module = importlib.util.module_from_spec(spec)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a comma that may be missing: it is missed below, with the line
            spec.loader.exec_module(module)
    except SyntaxError as error:
        raise UserError(f"config.py, line {error.lineno}: {error.msg}: {(error.text or '').strip()}") from None
    except Exception as error:
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
        where = f", line {lines[-1]}" if lines else ""
        known = ""
        if isinstance(error, TypeError) and "Setting.__init__" in str(error):
            known = "; the fields of a setting: " + ", ".join(field.name for field in dataclasses.fields(Setting))
        raise UserError(f"config.py{where}: {' '.join(str(error).split()) or type(error).__name__}{known}") from None
    return {name: value for name, value in vars(module).items() if not name.startswith("__")}


def _line_of(path: Path, name: str) -> str:
    """Where config.py assigns a name."""
    for node in ast.parse(path.read_bytes()).body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        if any(isinstance(target, ast.Name) and target.id == name for target in targets):
            return f", line {node.lineno}"
    return ""


def _whole_number(value: object) -> int | None:
    """A seed or matriculation number: a number, or text of digits."""
    if isinstance(value, str) and value.strip().isascii() and value.strip().isdigit():
        value = int(value)
    return value if type(value) is int and 0 <= value < 2**32 else None


# Folders ---------------------------------------------------------------------------------------------------------


def splits_dir(task: str, profile: str | None = None) -> Path:
    return config.project_root / "splits" / (profile or config.profile) / task


def outputs_dir(task: str) -> Path:
    return config.project_root / "outputs" / config.profile / task


def cache_dir() -> Path:
    return config.project_root / "cache"


def pretrained_dir() -> Path:
    return config.project_root / "pretrained"


def report_path() -> Path:
    name = "report.pdf" if config.profile == "course" else f"report-{config.profile}.pdf"
    return config.project_root / "report" / name


def appendix_path() -> Path:
    return report_path().with_name(report_path().name.replace("report", "appendix"))


def settings_of(task: str) -> list[Setting]:
    """What is trained for a task in the profile.

    Raises:
        UserError: config.py has none.
    """
    settings = config.settings.get(config.profile, {}).get(task)
    if not settings:
        raise UserError(f"config.py has no SETTINGS[{config.profile!r}][{task!r}]: nothing to train for this profile")
    return settings


def shown(path: Path) -> str:
    """The path as messages show it: from the project root on where it lies below it."""
    return str(path.relative_to(config.project_root) if path.is_relative_to(config.project_root) else path)


# The one writer --------------------------------------------------------------------------------------------------


@contextmanager
def atomic_write(path: Path, keep_former: bool = False):
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
    with atomic_write(path, keep_former) as partial:
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


def run(
    main: Callable,
    documentation: str,
    switch: tuple[str, str] | None = None,
    choices: tuple[str, ...] = (),
    files: str | None = None,
) -> None:
    """Run a script's `main` and exit: status 0, or `main`'s own, or 2 after one line on stderr for a user's mistake.

    Args:
        main: called with a tuple of `choices` if there are any, with a list of paths if `files` is given, and with the state
            of the switch if there is one.
        documentation: the script's docstring, printed for --help.
        switch: name and help of the one optional switch, e.g. ("--save", "…").
        choices: what the script's one optional argument can name, to do only that; all without it.
        files: help of the files that the script is given, one at least.
    """
    parser = argparse.ArgumentParser(
        description=documentation, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    if choices:
        parser.add_argument("only", nargs="?", choices=choices, help="only this; without it, all")
    if files:
        parser.add_argument("files", nargs="*", type=Path, metavar="FILE", help=files)
    if switch:
        parser.add_argument(switch[0], dest="switch", action="store_true", help=switch[1])
    given = parser.parse_args()
    if files and not given.files:
        parser.error("name at least one FILE")
    arguments = []
    if choices:
        arguments.append((given.only,) if given.only else choices)
    if files:
        arguments.append(given.files)
    if switch:
        arguments.append(given.switch)
    try:
        status = main(*arguments)
        sys.stdout.flush()
    except UserError as error:
        fail(str(error))
    except KeyboardInterrupt:
        fail("interrupted", 130)
    except BrokenPipeError:  # `… | head -1`: no verdict that was not given, and no traceback
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)  # as a shell reports SIGPIPE
    except OSError as error:
        if error.strerror is None:
            raise
        fail(
            f"{error.filename or 'input or output'}: {error.strerror}; check the two paths in config.py, permissions and disk"
        )
    except Exception as error:
        if not _is_out_of_memory(error):
            if int(os.environ.get("RANK", 0)):  # most likely another process ended first, with its one line: torchrun,
                time.sleep(10)  # which sees that, ends this one
            raise
        fail(
            f"out of memory ({' '.join(str(error).split())[:150]}); set a smaller batch_size or image_size in config.py"
        )
    sys.exit(status)


def _is_out_of_memory(error: Exception) -> bool:
    """numpy raises MemoryError; torch a RuntimeError that only its text tells apart."""
    text = str(error).lower()
    return isinstance(error, MemoryError) or "out of memory" in text or "can't allocate memory" in text


def fail(message: str, status: int = 2) -> None:
    """End with one line on stderr; of several processes the first says it."""
    if int(os.environ.get("RANK", 0)) == 0:
        print(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr)
    else:
        time.sleep(10)  # torchrun ends all when one ends: that must not be before the first has said it
    sys.exit(status)


try:
    config = read_config(Path(__file__).parent / "config.py", os.environ)
except UserError as error:
    fail(str(error))
# What libraries keep for themselves lies below the project root, too; set before any of them is imported. Where nothing
# can be written there (to compare logits nothing need be), they take their own places.
if os.access(config.project_root, os.W_OK):
    os.environ.setdefault("MPLCONFIGDIR", str(config.project_root / "cache" / "matplotlib"))
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(config.project_root / "cache" / "torchinductor"))
