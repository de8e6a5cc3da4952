"""The project: its two tasks, its folders, and config.py, which is read and checked here and nowhere else."""

import os
import runpy
import tempfile
import traceback
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

from base.errors import UserError, reason
from base.setting import Setting

import pydantic
from pydantic import Field, StringConstraints

# A label is an index into this tuple.
CLASSES = (
    *("AnnualCrop", "Forest", "HerbaceousVegetation", "Highway", "Industrial"),
    *("Pasture", "PermanentCrop", "Residential", "River", "SeaLake"),
)
PARTS = ("train", "val", "test")
PROFILES = ("course", "full", "published", "spatial", "demo")
# The order of the bands in a EuroSAT GeoTIFF. B8A is last, although tables list it after B08.
MS_BANDS = ("B01", "B02", "B03", "B04", "B05", "B06", "B07", "B08", "B09", "B10", "B11", "B12", "B8A")


@dataclass(frozen=True)
class Task:
    """A task of the course, "rgb" or "ms": its image set, its settings, its folders."""

    name: str
    title: str  # what figures and messages call the image set
    bands: tuple[str, ...]  # in the file's order; a JPEG's red, green and blue are B04, B03 and B02
    dtype: str  # "uint8", or "uint16" for reflectance times 10,000
    suffixes: tuple[str, ...]  # of its files, in lower case
    layouts: tuple[str, ...]  # where archives put the class folders; lists use the second (`canonical_file`)
    profile: str | None = None  # None: the one in config.py

    def of_profile(self, profile: str) -> "Task":
        return replace(self, profile=profile)

    @property
    def splits(self) -> Path:
        """The folder of its lists."""
        return config.project_root / "splits" / (self.profile or config.profile) / self.name

    @property
    def outputs(self) -> Path:
        """The folder of everything that is trained and predicted."""
        return config.project_root / "outputs" / (self.profile or config.profile) / self.name

    @property
    def settings(self) -> list[Setting]:
        """What is trained; a UserError says that config.py has no setting for this task and profile."""
        profile = self.profile or config.profile
        settings = config.settings.get(profile, {}).get(self.name)
        if not settings:
            raise UserError(f"config.py has no SETTINGS[{profile!r}][{self.name!r}]: this profile trains nothing here")
        return settings


RGB_LAYOUTS = (".", "EuroSAT_RGB", "2750", "eurosat/2750", "EuroSAT")
MS_LAYOUTS = (".", "EuroSAT_MS", "ds/images/remote_sensing/otherDatasets/sentinel_2/tif", "EuroSATallBands")
RGB = Task("rgb", "RGB", ("B04", "B03", "B02"), "uint8", (".jpg", ".jpeg"), RGB_LAYOUTS)
MS = Task("ms", "multispectral", MS_BANDS, "uint16", (".tif", ".tiff"), MS_LAYOUTS)
TASKS = {"rgb": RGB, "ms": MS}


# config.py -------------------------------------------------------------------------------------------------------

Number = Annotated[int, Field(ge=0, lt=2**32)]  # what numpy and torch take as a seed
Name = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1, max_length=100)]
Size = Annotated[int, Field(ge=10)]
Settings = Annotated[list[Setting], Field(min_length=1)]


@pydantic.dataclasses.dataclass
class Config:
    """What config.py and the environment set, checked. The comments in config.py explain the names."""

    dataset_root: Path  # absolute, as the next one
    project_root: Path
    team: Annotated[list[tuple[Name, Number]], Field(max_length=3)]
    seed: Number  # the first member's number, or SEED while the team is empty
    split_seed: Number
    profile: Literal[PROFILES]
    course_sizes: tuple[Size, Size, Size]
    allow_smaller_splits: bool
    settings: dict[Literal[PROFILES], dict[Literal["rgb", "ms"], Settings]]
    ranked_classes: Annotated[tuple[Literal[CLASSES], ...], Field(min_length=1)]

    def __post_init__(self) -> None:
        studies = [path.stem for path in (Path(__file__).parents[1] / "studies").glob("*.py")]
        for settings in (settings for tasks in self.settings.values() for settings in tasks.values()):
            names = [setting.name.lower() for setting in settings]  # a Mac's folders ignore case
            if len({*names, *studies}) < len(names) + len(studies):
                raise ValueError(f"{', '.join(names)}: settings need different names, which are not those of studies")


FROM_ENVIRONMENT = ("dataset_root", "project_root", "profile", "allow_smaller_splits")


def read_config(path: Path, environment: Mapping[str, str]) -> Config:
    """Run and check config.py. Some variables of the environment, EUROSAT_<name>, win over it.

    A UserError names config.py, or the variable, and the wrong value.
    """
    assigned = run_config(path)
    values, source = {}, {}
    for name in Config.__dataclass_fields__:
        variable = f"EUROSAT_{name.upper()}"
        if name in FROM_ENVIRONMENT and environment.get(variable):
            values[name], source[name] = environment[variable], variable
        elif name.upper() in assigned:
            values[name], source[name] = assigned[name.upper()], f"config.py: {name.upper()}"
        else:
            raise UserError(f"config.py does not set {name.upper()}")
    for name, default in (("project_root", path.parent), ("dataset_root", None)):
        base = Path.cwd() if source[name].startswith("EUROSAT") else path.parent
        if values[name] is None:
            values[name] = default or values["project_root"] / "data"
        elif not isinstance(values[name], (str, Path)) or not str(values[name]).strip() or "\0" in str(values[name]):
            raise UserError(f'{source[name]} is {values[name]!r}; write a path as text: "/data/EuroSAT"')
        try:
            values[name] = base / Path(values[name]).expanduser()
            os.fsencode(values[name])
        except (RuntimeError, ValueError) as error:  # ~name of nobody; a character that no path can have
            raise UserError(f"{source[name]} is {str(values[name])!a}: {reason(error)}") from None
    try:
        config = Config(**values)
    except pydantic.ValidationError as error:
        place = error.errors()[0]["loc"] or ("settings",)
        raise UserError(f"{source[place[0]]}: {explain(error, skip=1)}") from None
    if config.team:
        config.seed = config.team[0][1]
    return config


def run_config(path: Path) -> dict[str, object]:
    """The names that config.py assigns. Whatever running it raises becomes a UserError, with the line if Python knows it."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # for example of a missing comma, which then raises with its line
            return runpy.run_path(str(path))
    except SyntaxError as error:
        raise UserError(f"config.py, line {error.lineno}: {error.msg:.150}: {(error.text or '').strip():.80}") from None
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
        where = f", line {lines[-1]}" if lines else ""
        said = explain(error) if isinstance(error, pydantic.ValidationError) else reason(error)
        kind = "it ends the program: " if isinstance(error, SystemExit) else ""
        raise UserError(f"config.py{where}: {kind}{said}") from None


def explain(error: pydantic.ValidationError, skip: int = 0) -> str:
    """The first problem on one line: where in the value (but for the first `skip` names), what is wrong, the value."""
    problem = error.errors()[0]
    place = problem["loc"][skip:]
    if error.title == "Setting" and place and isinstance(place[0], int):  # an argument without its name
        place = (list(Setting.__dataclass_fields__)[place[0]], *place[1:])
    where = ".".join(map(str, place))
    try:
        value = "" if problem["type"] == "value_error" else f", not {problem['input']!r:.80}"
    except Exception:  # a number of 5,000 digits, for example, has no text
        value = ""
    return f"{where}{': ' if where else ''}{problem['msg']}{value}"


def pretrained_dir() -> Path:
    """Where files of initial weights lie."""
    return config.project_root / "pretrained"


def report_path(kind: str = "report") -> Path:
    """The PDF of the report, or of the "appendix"."""
    profile = "" if config.profile == "course" else f"-{config.profile}"
    return config.project_root / "report" / f"{kind}{profile}.pdf"


def display_path(path: Path) -> str:
    """A path as messages show it: from the project root on if it lies below it."""
    return str(path.relative_to(config.project_root) if path.is_relative_to(config.project_root) else path)


config = read_config(Path(__file__).parents[1] / "config.py", os.environ)
# What libraries keep for themselves lies below the project root, or in a temporary folder if that is impossible. This is set
# before any of them is imported.
_cache = config.project_root / "cache"
_existing = next(path for path in (_cache, *_cache.parents) if path.exists())
if not (_existing.is_dir() and os.access(_existing, os.W_OK)):
    _cache = Path(tempfile.gettempdir()) / f"eurosat-{os.getuid()}"
os.environ["MPLBACKEND"] = "Agg"
os.environ.setdefault("MPLCONFIGDIR", str(_cache / "matplotlib"))
os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(_cache / "torchinductor"))
