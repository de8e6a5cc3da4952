"""config.py as people edit it: what is right is taken however it is written, what is wrong is one line with its number."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import CODE

from project import UserError, read_config
from setting import Setting

TEXT = (CODE / "config.py").read_text()


def read(folder: Path, change, **environment: str):
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


def test_as_it_is(tmp_path):
    config = read(tmp_path, lambda text: text)
    assert config.project_root == tmp_path and config.dataset_root == tmp_path / "data"
    assert config.profile == "course" and config.course_sizes == (2500, 1000, 2000) and config.team == []
    assert config.seed == config.split_seed == 20190702 and not config.allow_smaller_splits


@pytest.mark.parametrize(
    "value, expected",
    [
        ('"/data/EuroSAT"', "/data/EuroSAT"),
        ('"/data/EuroSAT/"', "/data/EuroSAT"),
        ("'/data/with a space/ü'", "/data/with a space/ü"),
        ('"~/EuroSAT"', str(Path.home() / "EuroSAT")),
        ('"images"', "HERE/images"),
        ('"../images/"', "HERE/../images"),
        ("Path('/data/EuroSAT')", "/data/EuroSAT"),
        ('r"/data/EuroSAT"  # where they lie here', "/data/EuroSAT"),
        ("None", "HERE/data"),
    ],
)
def test_paths_as_people_write_them(tmp_path, value, expected):
    config = read(tmp_path, lambda text: "from pathlib import Path\n" + set_to("DATASET_ROOT", value)(text))
    assert str(config.dataset_root) == expected.replace("HERE", str(tmp_path))


def test_the_environment_wins(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    change = set_to("DATASET_ROOT", '"/data"')
    config = read(tmp_path, change, EUROSAT_DATASET_ROOT="here/", EUROSAT_PROJECT_ROOT="~/p", EUROSAT_PROFILE="full")
    assert config.dataset_root == tmp_path / "here" and config.project_root == Path.home() / "p"
    assert config.profile == "full"
    config = read(tmp_path, change, EUROSAT_DATASET_ROOT="", EUROSAT_PROFILE="")  # set to nothing: not set
    assert str(config.dataset_root) == "/data" and config.profile == "course"


@pytest.mark.parametrize(
    "value, expected",
    [("false", False), ("No", False), ("0", False), ("", False), ("1", True), ("yes", True), ("TRUE", True)],
)
def test_no_means_no_in_the_environment(tmp_path, value, expected):
    assert read(tmp_path, lambda text: text, EUROSAT_ALLOW_SMALLER_SPLITS=value).allow_smaller_splits == expected


@pytest.mark.parametrize("number", ["3141592", '"3141592"', '" 3141592 "', '"03141592"'])
@pytest.mark.parametrize("brackets", ["[({})]", "[[{}]]"])
def test_team_and_seeds(tmp_path, number, brackets):
    """The seed of training is the first member's number; the split's is not."""
    config = read(tmp_path, set_to("TEAM", brackets.format(f'"Ada Lovelace", {number}')))
    assert config.team == [("Ada Lovelace", 3141592)] and config.seed == 3141592 and config.split_seed == 20190702


MISTAKES = [
    (set_to("DATASET_ROOT", "5"), 'DATASET_ROOT is 5; give a path as text, for example DATASET_ROOT = "/data/EuroSAT"'),
    (set_to("DATASET_ROOT", '""'), "DATASET_ROOT is ''; give a path as text"),
    (set_to("DATASET_ROOT", '"~nobody here/x"'), "DATASET_ROOT is '~nobody here/x'; Could not determine home directory"),
    (set_to("DATASET_ROOT", "/data/EuroSAT"), "invalid syntax: DATASET_ROOT = /data/EuroSAT"),
    (set_to("DATASET_ROOT", '"/data'), "unterminated string literal"),
    (set_to("PROJECT_ROOT", "data"), "name 'data' is not defined"),
    (set_to("DATASET_ROOT", '"/data"\nDATASET_ROT = "/other"'), "DATASET_ROT is none of the names that are read; is DATASET_ROOT"),
    (set_to("TEAM", "None"), 'TEAM is None; write TEAM = [("Ada Lovelace", 3141592)]'),
    (set_to("TEAM", '{"Ada": 1}'), "TEAM is {'Ada': 1}; write TEAM"),
    (set_to("TEAM", '("Ada", 1)'), "TEAM is ('Ada', 1); write TEAM"),
    (set_to("TEAM", '["Ada"]'), "TEAM is ['Ada']; write TEAM"),
    (set_to("TEAM", '[("Ada", 1)] * 4'), "at most three members"),
    (set_to("TEAM", '[("Ada", "12a")]'), "TEAM is [('Ada', '12a')]; write TEAM"),
    (set_to("TEAM", '[("Ada", -1)]'), "numbers of digits alone"),
    (set_to("TEAM", '[("Ada", 1.0)]'), "numbers of digits alone"),
    (set_to("TEAM", '[("Ada", 1) ("Emmy", 2)]'), "'tuple' object is not callable"),
    (set_to("TEAM", '[("Ada", 0123)]'), "leading zeros in decimal integer literals are not permitted"),
    (set_to("SEED", '"12a"'), "SEED is '12a'; it must be a whole number from 0 to 4294967295"),
    (set_to("SEED", "-1"), "SEED is -1"),
    (set_to("SPLIT_SEED", "2 ** 40"), "SPLIT_SEED is 1099511627776"),
    (set_to("PROFILE", '"big"'), "PROFILE is 'big'; known: course, full, published, spatial, demo"),
    (set_to("PROFILE", "None"), "PROFILE is None; known"),
    (set_to("COURSE_SIZES", "(-1, 2, 3)"), "COURSE_SIZES is (-1, 2, 3); give three whole numbers"),
    (set_to("COURSE_SIZES", "2500"), "COURSE_SIZES is 2500"),
    (set_to("ALLOW_SMALLER_SPLITS", '"perhaps"'), "ALLOW_SMALLER_SPLITS is 'perhaps'; give True or False"),
    (set_to("RANKED_CLASSES", "()"), "RANKED_CLASSES is (); give a tuple of classes, at least one; known: AnnualCrop"),
    (set_to("RANKED_CLASSES", '("Desert",)'), "RANKED_CLASSES is ('Desert',)"),
    (set_to("RANKED_CLASSES", '"Forest"'), "RANKED_CLASSES is 'Forest'"),
    (lambda text: text.replace("PROFILE = ", "PROFIL = "), "PROFIL is none of the names that are read; is PROFILE meant?"),
    (lambda text: text.replace("RANKED_CLASSES = ", "_RANKED = "), "config.py does not set RANKED_CLASSES; known: DATASET_ROOT"),
]  # fmt: skip
A_SETTING = 'Setting("mild", "mild", epochs=6, image_size=128, weight_averaging=0.99, views=8)'
SETTING_MISTAKES = [
    ("epochs=6", "epoch=5", "unexpected keyword argument 'epoch'; the fields of a setting: name, augmentation, epochs"),
    ("epochs=6", 'epochs="2"', "epochs is '2', not of type int"),
    ("epochs=6", "epochs=True", "epochs is True, not of type int"),
    ("epochs=6", "epochs=0", "epochs must be at least 1 (setting 'mild')"),
    ("views=8", "batch_size=1", "batch_size must be at least 2"),
    ("image_size=128", "image_size=33.5", "image_size is 33.5, not of type int"),
    ("image_size=128", "image_size=7", "image_size must be from 32 to 1024"),
    ("views=8", 'learning_rate="2e-3"', "learning_rate is '2e-3', not of type float or int"),
    ("views=8", "learning_rate=0", "learning_rate must be positive"),
    ("views=8", "learning_rate=float('inf')", "learning_rate must be positive"),
    ("views=8", "weight_decay=-1", "weight_decay must be at least 0"),
    ("views=8", "label_smoothing=-0.5", "label_smoothing must be from 0 up to, not including, 1"),
    ("views=8", "label_smoothing=float('nan')", "label_smoothing must be from 0 up to, not including, 1"),
    ("views=8", "warmup=1", "warmup must be from 0 up to, not including, 1"),
    ("views=8", 'band_groups=("B04", "B03", "B02")', "band_groups takes groups"),
    ("views=8", "weights=5", "weights is 5, not of type str or NoneType"),
    ('("mild", "mild"', '("../up", "mild"', "name names a folder"),
    (
        '("mild", "mild"',
        '("strong", "mild"',
        "the settings of SETTINGS['course']['rgb'] need different names: strong, strong",
    ),
    ('("mild", "mild"', '("Strong", "mild"', "need different names: Strong, strong"),
    (" epochs=6,", "", "the fields of a setting: name, augmentation, epochs"),
    (A_SETTING + ",", A_SETTING, "invalid syntax. Perhaps you forgot a comma?"),
]
TABLE_MISTAKES = [
    ('"course": {"rgb": _RGB, "ms": _MS}', '"course": {"rgb": _RGB[0], "ms": _MS}', "must be a list in brackets"),
    ('"course": {"rgb": _RGB, "ms": _MS}', '"course": {"rgb": [], "ms": _MS}', "of at least one"),
    ('"course": {"rgb": _RGB, "ms": _MS}', '"course": _RGB', "SETTINGS must be {profile: {task: [Setting(…), …]}}"),
    ('"course": {"rgb": _RGB, "ms": _MS}', '"corse": {"rgb": _RGB}', "known profiles: course, full"),
]
MISTAKES += [
    (lambda text, a=a, b=b: text.replace(a, b, 1), told) for a, b, told in (*SETTING_MISTAKES, *TABLE_MISTAKES)
]


@pytest.mark.parametrize("change, told", MISTAKES)
def test_a_mistake_is_one_line_with_its_number(tmp_path, change, told):
    assert change(TEXT) != TEXT
    with pytest.raises(UserError) as raised:
        read(tmp_path, change)
    text = str(raised.value)
    assert told in text and "\n" not in text
    number = re.match(r"config\.py, line (\d+): ", text)
    if "does not set" in told:
        return
    line = change(TEXT).splitlines()[int(number[1]) - 1]
    former = TEXT.splitlines()
    assert line not in former or line.startswith(("SETTINGS", "_RGB", "    Setting(")), line


def test_what_the_environment_has_wrong_is_told(tmp_path):
    for name, value, told in (
        ("EUROSAT_PROFILE", "big", "PROFILE is 'big'"),
        ("EUROSAT_ALLOW_SMALLER_SPLITS", "perhaps", "'perhaps'; give True or False"),
    ):
        with pytest.raises(UserError, match=told):
            read(tmp_path, lambda text: text, **{name: value})


@pytest.fixture
def code(tmp_path):
    """A copy of the program, in a folder with a space in its name, whose config.py may be edited."""
    ignore = shutil.ignore_patterns(
        ".*", "outputs", "splits", "sample", "cache", "data", "pretrained", "tests", "__pycache__"
    )
    return Path(shutil.copytree(CODE, tmp_path / "the code", ignore=ignore))


def run(code: Path, *command: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *command], cwd=code, capture_output=True, text=True, env={"PATH": ""})


@pytest.mark.parametrize("script", ["split_data.py", "train_rgb.py", "reproduce.py", "make_report.py"])
def test_every_script_says_it_in_one_line_before_anything_is_done(code, script):
    before = sorted(code.rglob("*"))
    (code / "config.py").write_text(set_to("TEAM", "None")(TEXT))
    done = run(code, "-B", script)
    assert done.returncode == 2 and done.stdout == "" and len(done.stderr.splitlines()) == 1
    line = 1 + TEXT.splitlines().index("TEAM = []")
    assert done.stderr.startswith(f"{script}: config.py, line {line}: TEAM is None; write TEAM = ")
    assert sorted(code.rglob("*")) == before


def test_edited_as_text_it_works(code, sample):
    text = set_to("DATASET_ROOT", f'"{sample}/"')(TEXT)
    text = set_to("TEAM", '[("Ada Lovelace", 3141592), ("Emmy Noether", "2718281")]')(text)
    (code / "config.py").write_text(set_to("PROFILE", '"demo"')(text))
    done = run(code, "split_data.py")
    assert done.returncode == 0, done.stderr
    assert "wrote splits/demo/rgb" in done.stdout and (code / "splits/demo/rgb/train.csv").exists()


def test_an_older_python_is_refused_in_one_line(code):
    """What one that old says of the rest of the program would be its syntax errors."""
    old = "import sys; sys.version_info = (3, 10, 0); sys.argv = ['split_data.py']; import runpy; "
    done = run(code, "-c", old + "runpy.run_path('split_data.py', run_name='__main__')")
    assert done.returncode == 1 and done.stderr.startswith("Python 3.11 or newer is needed; this is ")
    assert len(done.stderr.splitlines()) == 1


def test_a_setting_has_its_bands_in_order():
    setting = Setting("x", "none", epochs=1, band_groups=(("B04", "B03", "B02"), ("B08", "B11", "B12")))
    assert setting.bands == ("B04", "B03", "B02", "B08", "B11", "B12")
