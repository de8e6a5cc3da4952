"""config.py as people edit it: what is right is accepted however it is written, a mistake is one line that names it."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

from base.errors import UserError
from base.project import read_config
from base.setting import Setting

import pytest
from conftest import CODE

TEXT = (CODE / "config.py").read_text()
GROUPS = (("B04", "B03", "B02"), ("B08", "B11", "B12"))


def read(folder: Path, change=lambda text: text, **environment: str):
    """The configuration after `change` of the text of config.py, in a folder of its own."""
    path = folder / "config.py"
    path.write_text(change(TEXT))
    return read_config(path, environment)


def set_to(name: str, value: str):
    """Replace an assignment's line, as a person types it."""

    def change(text: str) -> str:
        text, count = re.subn(rf"(?m)^{name}\b.*$", f"{name} = {value}".replace("\\", r"\\"), text)
        assert count == 1
        return text

    return change


def replaced(old: str, new: str):
    return lambda text: text.replace(old, new, 1)


def test_the_defaults(tmp_path):
    config = read(tmp_path)
    assert config.project_root == tmp_path and config.dataset_root == tmp_path / "data"
    assert config.profile == "course" and config.course_sizes == (2500, 1000, 2000) and config.team == []
    assert config.seed == config.split_seed == 20190702 and not config.allow_smaller_splits


@pytest.mark.parametrize(
    "value, expected",
    [
        ('"/data/EuroSAT/"', "/data/EuroSAT"),
        ("'/data/with a space/ü'  # where they lie", "/data/with a space/ü"),
        ('"~/EuroSAT"', str(Path.home() / "EuroSAT")),
        ('"../images/"', "HERE/../images"),
        ("Path('/data/EuroSAT')", "/data/EuroSAT"),
        ("None", "HERE/data"),
    ],
)
def test_paths_as_people_write_them(tmp_path, value, expected):
    config = read(tmp_path, lambda text: "from pathlib import Path\n" + set_to("DATASET_ROOT", value)(text))
    assert str(config.dataset_root) == expected.replace("HERE", str(tmp_path))


def test_the_environment_wins_unless_it_is_empty(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    change = set_to("DATASET_ROOT", '"/data"')
    config = read(tmp_path, change, EUROSAT_DATASET_ROOT="here/", EUROSAT_PROJECT_ROOT="~/p", EUROSAT_PROFILE="full")
    assert config.dataset_root == tmp_path / "here" and config.project_root == Path.home() / "p"
    assert config.profile == "full"
    config = read(tmp_path, change, EUROSAT_DATASET_ROOT="", EUROSAT_PROFILE="")
    assert str(config.dataset_root) == "/data" and config.profile == "course"


@pytest.mark.parametrize("value, expected", [("No", False), ("0", False), ("", False), ("1", True), ("yes", True)])
def test_no_means_no_in_the_environment(tmp_path, value, expected):
    assert read(tmp_path, EUROSAT_ALLOW_SMALLER_SPLITS=value).allow_smaller_splits == expected


@pytest.mark.parametrize("member", ['("Ada Lovelace", 3141592)', '[" Ada Lovelace ", " 03141592 "]'])
def test_the_first_members_number_seeds_training_but_not_the_split(tmp_path, member):
    config = read(tmp_path, set_to("TEAM", f"[{member}]"))
    assert config.team == [("Ada Lovelace", 3141592)] and config.seed == 3141592 and config.split_seed == 20190702


def test_a_setting_lists_its_bands_in_order_and_comes_back_from_its_values():
    setting = Setting("x", "none", epochs=1, band_groups=GROUPS, fusion="add")
    assert setting.bands == ("B04", "B03", "B02", "B08", "B11", "B12")
    assert Setting.from_values({**setting.values(), "weight_averaging": 0.99}) == setting  # a field that was given up


COURSE = '"course": {"rgb": _RGB, "ms": _MS}'
# A change of config.py, and what the line must say: the name, and the value or the problem.
MISTAKES = [
    (set_to("DATASET_ROOT", "5"), "DATASET_ROOT is 5; write a path as text"),
    (set_to("DATASET_ROOT", '""'), "DATASET_ROOT is ''"),
    (set_to("DATASET_ROOT", '"~nobody here/x"'), "DATASET_ROOT is '~nobody here/x'"),
    (set_to("TEAM", "None"), "TEAM.* None"),
    (set_to("TEAM", '("Ada", 1)'), "TEAM.*'Ada'"),
    (set_to("TEAM", '[("Ada", 1)] * 4'), "TEAM.* at most 3"),
    (set_to("TEAM", '[("Ada", "12a")]'), "TEAM.*'12a'"),
    (set_to("TEAM", f'[("Ada", "{"9" * 5000}")]'), "TEAM.*999"),
    (set_to("SPLIT_SEED", "2 ** 40"), "SPLIT_SEED.*1099511627776"),
    (set_to("PROFILE", '"big"'), "PROFILE.*'course'.*'demo'.*'big'"),
    (set_to("COURSE_SIZES", "(-1, 1000, 2000)"), "COURSE_SIZES.*-1"),
    (set_to("ALLOW_SMALLER_SPLITS", '"perhaps"'), "ALLOW_SMALLER_SPLITS.*'perhaps'"),
    (set_to("RANKED_CLASSES", "()"), "RANKED_CLASSES"),
    (set_to("RANKED_CLASSES", '("Desert",)'), "RANKED_CLASSES.*'Desert'"),
    (replaced("RANKED_CLASSES = ", "_RANKED = "), "does not set RANKED_CLASSES"),
    (replaced(COURSE, '"course": {"rgb": _RGB[0], "ms": _MS}'), "SETTINGS.*course.rgb"),
    (replaced(COURSE, '"corse": {"rgb": _RGB}'), "SETTINGS.*corse"),
    (replaced('("mild", "mild"', '("Strong", "mild"'), "SETTINGS.*strong.*different names"),
]
# Python knows the line of these.
MISTAKES_WITH_A_LINE = [
    (set_to("DATASET_ROOT", "/data/EuroSAT"), "invalid syntax: DATASET_ROOT = /data/EuroSAT"),
    (set_to("PROJECT_ROOT", "data"), "'data' is not defined"),
    (set_to("TEAM", '[("Ada", 1) ("Emmy", 2)]'), "not callable"),
    (set_to("TEAM", '[("Ada", 0123)]'), "leading zeros"),
    (set_to("SEED", "9" * 5000), "digits"),
    (set_to("SEED", "exit()"), "ends the program"),
    (replaced("views=8),\n", "views=8)\n"), "comma"),
    (replaced("epochs=3", "epoch=5"), "epoch"),
    (replaced("epochs=3", 'epochs="2"'), "epochs.*'2'"),
    (replaced("epochs=3", "epochs=True"), "epochs.*True"),
    (replaced("image_size=112", "image_size=7"), "image_size.*32.* 7"),
    (replaced("views=8", "learning_rate=0"), "learning_rate.* 0"),
    (replaced("views=8", "label_smoothing=float('nan')"), "label_smoothing.*nan"),
    (replaced("views=8", "weight_averaging=0.99"), "weight_averaging"),
    (replaced("views=8", 'fusion="concat"'), "takes 2 group"),
    (replaced("views=8", 'fusion="magic"'), "fusion.*'magic'"),
    (replaced("views=8", 'band_groups=(("B04", "B03"),)'), "band_groups"),
    (replaced('("mild", "mild"', '("../up", "mild"'), "'../up'"),
]


@pytest.mark.parametrize("change, told", [*MISTAKES, *MISTAKES_WITH_A_LINE])
def test_a_mistake_is_one_line_that_names_config_py_and_the_value(tmp_path, change, told):
    with pytest.raises(UserError, match=told) as raised:
        read(tmp_path, change)
    text = str(raised.value)
    assert text.startswith("config.py") and "\n" not in text and len(text) < 500
    if (change, told) in MISTAKES_WITH_A_LINE:
        number = int(re.match(r"config\.py, line (\d+): ", text)[1])
        assert change(TEXT).splitlines()[number - 1] not in TEXT.splitlines() or "comma" in told


def test_a_mistake_in_the_environment_names_the_variable(tmp_path):
    for name, value in (("EUROSAT_PROFILE", "big"), ("EUROSAT_ALLOW_SMALLER_SPLITS", "perhaps")):
        with pytest.raises(UserError, match=f"^{name}.*'{value}'"):
            read(tmp_path, **{name: value})


@pytest.fixture
def code(tmp_path):
    """A copy of the program whose config.py may be edited."""
    ignore = shutil.ignore_patterns(
        ".*", "outputs", "splits", "sample", "cache", "data", "pretrained", "tests", "__pycache__"
    )
    return Path(shutil.copytree(CODE, tmp_path / "the code", ignore=ignore))


def run(code: Path, *command: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *command], cwd=code, capture_output=True, text=True, env={"PATH": ""})


@pytest.mark.parametrize("script", ["split_data.py", "train_rgb.py"])
def test_a_script_reports_it_before_anything_is_done(code, script):
    before = sorted(code.rglob("*"))
    (code / "config.py").write_text(set_to("TEAM", "None")(TEXT))
    done = run(code, "-B", script)
    assert done.returncode == 2 and done.stdout == "" and len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith(f"{script}: config.py: TEAM")
    assert sorted(code.rglob("*")) == before


def test_it_works_edited_as_text(code, sample):
    text = set_to("DATASET_ROOT", f'"{sample}/"')(TEXT)
    text = set_to("TEAM", '[("Ada Lovelace", 3141592), ("Emmy Noether", "2718281")]')(text)
    (code / "config.py").write_text(set_to("PROFILE", '"demo"')(text))
    done = run(code, "split_data.py")
    assert done.returncode == 0, done.stderr
    assert "wrote splits/demo/rgb" in done.stdout and (code / "splits/demo/rgb/train.csv").exists()


def test_an_older_python_is_refused_in_one_line(code):
    """Without this check it would report syntax errors in the rest of the program."""
    old = "import sys; sys.version_info = (3, 10, 0); sys.argv = ['split_data.py']; import runpy; "
    done = run(code, "-c", old + "runpy.run_path('split_data.py', run_name='__main__')")
    assert done.returncode == 1 and done.stderr.startswith("Python 3.11 or newer is needed")
    assert len(done.stderr.splitlines()) == 1
