"""A few real images, and scripts run as a user runs them: `python file.py` in a process of its own."""

import dataclasses
import fcntl
import hashlib
import os
import pickle
import runpy
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

# The tests share two cores between two workers; more threads each only wait for one another.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["MPLCONFIGDIR"] = tempfile.mkdtemp()  # one list of fonts for all project roots

import pytest
import torch

CODE = Path(__file__).parent.parent
sys.path.insert(0, str(CODE))

from engine import training, weights  # noqa: E402
from project import CLASSES, config  # noqa: E402

IMAGES_PER_CLASS = 10
OFFLINE = {"http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9"}  # to try the network fails at once
# Settings that train in seconds: what is tested is the machinery, not the accuracy.
SMALL_SETTINGS = """
import os
from project import config
from setting import Setting
small = dict(weights=None, backbone="mobilenet_v3_small", image_size=32, batch_size=16, weight_averaging=0.5)
groups = (("B04", "B03", "B02"), ("B08", "B11", "B12"))
for of_tasks in config.settings.values():
    of_tasks["rgb"] = [Setting("first", "mild", epochs=2, **small), Setting("second", "strong", epochs=2, views=8, **small)]
    of_tasks["ms"] = [Setting("late", "strong", epochs=1, band_groups=groups, fusion="concat", views=8, **small)]
exec(os.environ.get("TEST_CONFIG", ""))
"""
# Writes down what a script changes outside the project root and each address that it looks up or connects to.
WATCH = """
import os, sys
root = os.environ["EUROSAT_PROJECT_ROOT"]
log = os.open(os.path.join(root, "site", "watched.txt"), os.O_WRONLY | os.O_APPEND | os.O_CREAT)
CHANGES = {"os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.truncate", "os.chmod", "os.utime"}
def watch(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo", "urllib.Request"):
        os.write(log, f"{event} {arguments[1:]}\\n".encode())
    elif event in CHANGES or event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
        for path in arguments[: 2 if event == "os.rename" else 1]:
            if isinstance(path, (str, bytes, os.PathLike)):
                path = os.path.abspath(os.fsdecode(path))
                if not path.startswith((root + os.sep, "/dev/")) and path != root:
                    os.write(log, f"{event} {path}\\n".encode())
sys.addaudithook(watch)
"""


# The sample's patches of which both files are there: {class: ["Forest_1432", …]}.
NAMES = {name: sorted(path.stem for path in (CODE / "sample/EuroSAT_MS" / name).iterdir()) for name in CLASSES}


def jpeg(class_name: str, index: int = 0) -> str:
    """One of them, from the data set root on."""
    return f"EuroSAT_RGB/{class_name}/{NAMES[class_name][index]}.jpg"


def tif(class_name: str, index: int = 0) -> str:
    return f"EuroSAT_MS/{class_name}/{NAMES[class_name][index]}.tif"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Each worker starts with one half: while the first makes `trained` the second has tests that do without it."""
    items.sort(key=lambda item: "trained" not in item.fixturenames)


@pytest.fixture(scope="session")
def once(tmp_path_factory) -> Callable[[str, Callable[[Path], object]], object]:
    """`once(name, make)`: what `make` of a folder with this name gave; made by the worker that comes first, for all."""
    own = tmp_path_factory.getbasetemp()
    common = own.parent if "PYTEST_XDIST_WORKER" in os.environ else own

    def take(name: str, make: Callable[[Path], object]) -> object:
        folder, made = common / name, common / f"{name}.pickle"
        with (common / f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not made.exists():
                folder.mkdir()
                made.write_bytes(pickle.dumps(make(folder)))
        return pickle.loads(made.read_bytes())

    return take


@pytest.fixture(scope="session")
def sample(once) -> Path:
    """A data set root with ten real images per class in both sets, read-only; not to be changed."""
    return once("sample", copy_sample)


def copy_sample(folder: Path) -> Path:
    for kind, suffix in (("EuroSAT_RGB", "jpg"), ("EuroSAT_MS", "tif")):
        for class_name, names in NAMES.items():
            (folder / kind / class_name).mkdir(parents=True)
            for name in names:
                shutil.copyfile(
                    CODE / "sample" / kind / class_name / f"{name}.{suffix}",
                    folder / kind / class_name / f"{name}.{suffix}",
                )
    for path in folder.rglob("*"):
        path.chmod(0o555 if path.is_dir() else 0o444)
    folder.chmod(0o555)
    return folder


@pytest.fixture
def own_sample(sample, tmp_path) -> Path:
    """A copy of it that a test may damage."""
    copy = Path(shutil.copytree(sample, tmp_path / "own sample ü"))
    for path in [copy, *copy.rglob("*")]:
        path.chmod(0o755)
    return copy


@pytest.fixture
def project(tmp_path, sample, monkeypatch) -> Path:
    """A project root of its own, in this process: profile demo, small settings, the sample as data set root."""
    root = tmp_path / "project"
    root.mkdir()
    for field in dataclasses.fields(config):
        monkeypatch.setattr(
            config, field.name, getattr(config, field.name)
        )  # put back afterwards, whatever a test sets
    config.settings = {profile: dict(of_tasks) for profile, of_tasks in config.settings.items()}
    exec(SMALL_SETTINGS, {})
    config.project_root, config.dataset_root, config.profile = root, sample, "demo"
    return root


def files_below(folder: Path) -> dict[str, str]:
    """{path: SHA-256 of its content} of all files below a folder."""
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def state_of(folder: Path) -> dict[str, tuple]:
    """{path: (kind and permissions, size, time of last change, SHA-256)} of a folder and all below it."""
    digests = files_below(folder)
    state = {}
    for path in [folder, *folder.rglob("*")]:
        name, stat = str(path.relative_to(folder)), path.stat()
        state[name] = (stat.st_mode, stat.st_size, stat.st_mtime_ns, digests.get(name))
    return state


class Here:
    """Runs scripts as `User` does, but in this process and with config as it is: no seconds spent on starting."""

    def __init__(self, monkeypatch, capsys) -> None:
        self.monkeypatch, self.capsys = monkeypatch, capsys

    def finish(self, script: str, *arguments: str) -> tuple[int, str, str]:
        """Exit status, stdout, stderr."""
        self.monkeypatch.setattr(sys, "argv", [str(CODE / script), *arguments])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(CODE / script), run_name="__main__")
        return ended.value.code or 0, *self.capsys.readouterr()

    def run(self, script: str, *arguments: str, status: int = 0) -> str:
        """Run to the end, hold it to its exit status, return what it printed (stderr behind stdout)."""
        code, out, err = self.finish(script, *arguments)
        assert code == status, f"{script}: status {code}\n{out}\n{err}"
        return out + err

    def refused(self, script: str, *arguments: str) -> str:
        """Run a script that must end with status 2 and one line on stderr; return that line."""
        return one_line(script, *self.finish(script, *arguments))


def one_line(script: str, status: int, out: str, err: str) -> str:
    lines = [line for line in err.splitlines() if not line.startswith("note:")]
    assert status == 2 and len(lines) == 1, f"{script}: status {status}\n{out}\n{err}"
    assert lines[0].startswith(f"{Path(script).name}: "), lines
    return lines[0]


@pytest.fixture
def here(project, monkeypatch, capsys, tmp_path) -> Here:
    for name, value in OFFLINE.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))  # no weights that this machine may have
    return Here(monkeypatch, capsys)


class User:
    """Runs scripts in a project root with a data set root and small settings."""

    def __init__(self, root: Path, dataset_root: Path, **environment: str) -> None:
        self.root = root
        root.mkdir(exist_ok=True)
        # Python imports sitecustomize at its start: how the tests put small settings in place of config.py's.
        site = root / "site"
        site.mkdir(exist_ok=True)
        (site / "sitecustomize.py").write_text(f"import sys; sys.path.insert(1, {str(CODE)!r})\n{SMALL_SETTINGS}")
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("TORCHINDUCTOR")},
            "PYTHONPATH": str(site),
            "EUROSAT_PROJECT_ROOT": str(root),
            "EUROSAT_DATASET_ROOT": str(dataset_root),
            "EUROSAT_PROFILE": "demo",
            **OFFLINE,
            **environment,
        }

    def command(self, script: str, *arguments: str) -> list[str]:
        return [sys.executable, str(CODE / script), *arguments]

    def start(self, script: str, *arguments: str, **environment: str) -> subprocess.Popen:
        return subprocess.Popen(
            self.command(script, *arguments),
            env={**self.environment, **environment},
            cwd=self.root,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, script: str, *arguments: str, status: int = 0, **environment: str) -> str:
        """Run to the end, hold it to its exit status, return what it printed (stderr behind stdout)."""
        process = self.start(script, *arguments, **environment)
        out, err = process.communicate(timeout=300)
        assert process.returncode == status, f"{script}: status {process.returncode}\n{out}\n{err}"
        return out + err

    def refused(self, script: str, *arguments: str, **environment: str) -> str:
        """Run a script that must end with status 2 and one line on stderr; return that line."""
        process = self.start(script, *arguments, **environment)
        out, err = process.communicate(timeout=300)
        return one_line(script, process.returncode, out, err)

    def move(self, root: Path) -> None:
        """Take another project root from now on."""
        self.root = root
        self.environment["EUROSAT_PROJECT_ROOT"] = str(root)


@pytest.fixture
def user(tmp_path, sample) -> User:
    return User(tmp_path / "project root ü", sample)


@pytest.fixture(scope="session")
def trained(once, sample) -> User:
    """Who has run the whole chain on the sample; not to be changed. `transcript`: {script: what it printed}."""
    return once("trained", lambda folder: run_the_chain(folder / "root", sample))


def run_the_chain(root: Path, sample: Path) -> User:
    someone = User(root, sample, PYTHONDONTWRITEBYTECODE="1")
    del someone.environment["MPLCONFIGDIR"]
    with (root / "site" / "sitecustomize.py").open("a") as site:
        site.write(WATCH)
    someone.transcript, someone.images_before = {}, state_of(sample)
    for script in (
        *("split_data.py", "verify_splits.py", "train_rgb.py", "train_ms.py", "predict_test.py", "reproduce.py"),
        *("rank_images.py", "make_report.py"),
    ):
        someone.transcript[script] = someone.run(script)
    return someone


@pytest.fixture
def trained_copy(trained, tmp_path, sample) -> User:
    """A copy of it that a test may change."""
    root = Path(shutil.copytree(trained.root, tmp_path / "copy"))
    return User(root, sample)


class Place:
    """A copy of the trained project root, and of the data set where asked for, to be damaged; scripts run in this process."""

    def __init__(self, project, trained, sample, here, monkeypatch) -> None:
        self.root, self.sample, self.here, self.monkeypatch = project, sample, here, monkeypatch
        self.trained_root = trained.root
        shutil.copytree(trained.root / "splits", project / "splits")
        shutil.copytree(trained.root / "outputs", project / "outputs", copy_function=os.link)

    def own_sample(self):
        """A copy of the data set that may be damaged; the image files are links, to be replaced rather than changed."""
        if self.sample == config.dataset_root:
            config.dataset_root = self.root.parent / "own sample ü"
            shutil.copytree(self.sample, config.dataset_root, copy_function=os.link)
            for path in [config.dataset_root, *config.dataset_root.rglob("*")]:
                if path.is_dir():
                    path.chmod(0o755)
        return config.dataset_root

    def images(self, task, name):
        return self.own_sample() / {"rgb": "EuroSAT_RGB", "ms": "EuroSAT_MS"}[task] / name

    def first_image(self, task):
        path = self.own_sample() / self.list(task, "train").read_text().splitlines()[1].split(",")[0]
        return unlinked(path) if path.is_file() else path

    def list(self, task, part):
        return self.root / "splits/demo" / task / f"{part}.csv"

    def edit(self, task, part, change):
        path = self.list(task, part)
        path.write_text("".join(f"{line}\n" for line in change(path.read_text().splitlines())))

    def line(self, text):
        self.edit("rgb", "train", lambda lines: [*lines, text])
        return "train_rgb.py"

    def output(self, name):
        return unlinked(self.root / "outputs/demo/rgb" / name)

    def change(self, name, change):
        path = self.output(name)
        content = torch.load(path, weights_only=True)
        change(content)
        torch.save(content, path)
        return "predict_test.py rgb"

    def settings(self, task, **changes):
        own = config.settings["demo"]
        own[task] = [dataclasses.replace(own[task][0], **changes)]
        return f"train_{task}.py"

    def pretrained(self, content):
        """A file of initial weights for mobilenet_v3_small, as if it were torchvision's own."""
        path = self.root / "pretrained" / "stand-in.pth"
        path.parent.mkdir(exist_ok=True)
        torch.save(content, path)
        self.weights_are(path)

    def weights_are(self, path):
        file = weights.WeightsFile("a stand-in", path.name, hashlib.sha256(path.read_bytes()).hexdigest())
        for module in (weights, training):
            self.monkeypatch.setattr(module, "weights_file", lambda backbone, weights: file)


def unlinked(path):
    """The same file, no longer the same as the one it was linked from."""
    if not path.is_symlink():
        content = path.read_bytes()
        path.unlink()
        path.write_bytes(content)
    return path


@pytest.fixture
def place(project, trained, sample, here, monkeypatch):
    return Place(project, trained, sample, here, monkeypatch)
