"""Real images, project roots, and two ways to run a script: in the test's own process (`here`), as a process (`user`)."""

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

# Two workers share two cores. More threads would wait for each other.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["MPLCONFIGDIR"] = tempfile.mkdtemp()  # one list of fonts for all project roots

import pytest
import torch

CODE = Path(__file__).parent.parent
sys.path.insert(0, str(CODE))

from base.project import CLASSES, config  # noqa: E402

from engine import training, weights  # noqa: E402

CHAIN = (
    *("split_data.py", "verify_splits.py", "train_rgb.py", "train_ms.py", "predict_test.py", "reproduce.py"),
    *("rank_images.py", "make_report.py"),
)
OFFLINE = {"http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9"}  # any use of the network fails
# These settings train in seconds. The tests are about the machinery, not about accuracy.
SMALL_SETTINGS = """
import os
from base.project import config
from base.setting import Setting
small = dict(weights=None, backbone="shufflenet_v2_x0_5", image_size=32, batch_size=4, learning_rate=3e-2)
groups = (("B04", "B03", "B02"), ("B08", "B11", "B12"))
for tasks in config.settings.values():
    tasks["rgb"] = [Setting("first", "mild", epochs=2, **small), Setting("second", "strong", epochs=2, views=8, **small)]
    tasks["ms"] = [Setting("late", "strong", epochs=2, band_groups=groups, fusion="concat", views=8, **small)]
"""
# Records each change outside the project root and each address that is looked up or connected to.
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
# Runs several scripts in one process, with a form feed after the output of each.
RUN_ALL = """
import runpy, sys
for script in sys.argv[1:]:
    sys.argv = [script]
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as end:
        if end.code:
            raise
    print("\\f", flush=True)
"""


# The sample's patches that have both files: {class: ["Forest_1432", …]}.
NAMES = {name: sorted(path.stem for path in (CODE / "sample/EuroSAT_MS" / name).iterdir()) for name in CLASSES}


def jpeg(class_name: str, index: int = 0) -> str:
    """The RGB file of one of these patches, from the data set root on."""
    return f"EuroSAT_RGB/{class_name}/{NAMES[class_name][index]}.jpg"


def tif(class_name: str, index: int = 0) -> str:
    return f"EuroSAT_MS/{class_name}/{NAMES[class_name][index]}.tif"


@pytest.fixture(scope="session")
def once(tmp_path_factory) -> Callable[[str, Callable[[Path], object]], object]:
    """`once(name, make)`: what `make` of a new folder returns. The worker that comes first makes it for all."""
    base = tmp_path_factory.getbasetemp()
    common = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base

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
    """A read-only data set root with ten real images per class in both sets. Tests do not change it."""
    return once("sample", copy_sample)


def copy_sample(folder: Path) -> Path:
    for file in (name(class_name, index) for name in (jpeg, tif) for class_name in CLASSES for index in range(10)):
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(CODE / "sample" / file, folder / file)
    for path in [folder, *folder.rglob("*")]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    return folder


@pytest.fixture
def own_sample(sample, tmp_path) -> Path:
    """A copy that a test may damage."""
    return writable_copy(sample, tmp_path / "own sample ü")


def writable_copy(sample: Path, folder: Path) -> Path:
    shutil.copytree(sample, folder)
    for path in [folder, *folder.rglob("*")]:
        path.chmod(0o755)
    return folder


def files_below(folder: Path) -> dict[str, str]:
    """{path: SHA-256 of its content} of all files below a folder."""
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def state_of(folder: Path) -> dict[str, tuple]:
    """{path: (kind and permissions, size, time of last change, SHA-256)} of a folder and all below it."""
    digests, state = files_below(folder), {}
    for path in [folder, *folder.rglob("*")]:
        name, stat = str(path.relative_to(folder)), path.stat()
        state[name] = (stat.st_mode, stat.st_size, stat.st_mtime_ns, digests.get(name))
    return state


class Runner:
    """Checks the exit status of scripts. `finish` runs one: exit status, stdout, stderr."""

    def run(self, command: str, *arguments: str, status: int = 0, **environment: str) -> str:
        """Run "script.py argument …"; return what it printed, stderr last."""
        code, out, err = self.finish(*command.split(), *arguments, **environment)
        assert code == status, f"{command}: status {code}\n{out}\n{err}"
        return out + err

    def refused(self, command: str, *arguments: str, **environment: str) -> str:
        """Run a script that must end with status 2 and one line on stderr; return it."""
        status, out, err = self.finish(*command.split(), *arguments, **environment)
        lines = [line for line in err.splitlines() if not line.startswith("note:")]
        assert status == 2 and len(lines) == 1, f"{command}: status {status}\n{out}\n{err}"
        assert lines[0].startswith(f"{Path(command.split()[0]).name}: "), lines
        return lines[0]


class Here(Runner):
    """Runs scripts in this process, with `config` as it is: no seconds are spent on starting."""

    def __init__(self, root: Path, monkeypatch, capsys) -> None:
        self.root, self.monkeypatch, self.capsys = root, monkeypatch, capsys

    def finish(self, script: str, *arguments: str, **environment: str) -> tuple[int, str, str]:
        for name, value in environment.items():
            self.monkeypatch.setenv(name, value)
        self.monkeypatch.setattr(sys, "argv", [str(CODE / script), *arguments])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(CODE / script), run_name="__main__")
        return ended.value.code or 0, *self.capsys.readouterr()


class User(Runner):
    """Runs scripts as processes in a project root, with the profile demo and small settings.

    Args:
        setup: Python code that each process runs after the small settings.
        launcher: arguments of Python before the script's path.
    """

    def __init__(self, root: Path, dataset_root: Path, setup: str = "", launcher: tuple[str, ...] = ()) -> None:
        self.root, self.launcher = root, launcher
        (root / "site").mkdir(parents=True)
        text = f"import sys; sys.path.insert(1, {str(CODE)!r})\n{SMALL_SETTINGS}\n{setup}"
        (root / "site" / "sitecustomize.py").write_text(text)  # Python imports it at its start
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("TORCHINDUCTOR", "PYTEST"))}
        roots = {"EUROSAT_PROJECT_ROOT": str(root), "EUROSAT_DATASET_ROOT": str(dataset_root)}
        self.environment = {**kept, **OFFLINE, **roots, "EUROSAT_PROFILE": "demo", "PYTHONPATH": str(root / "site")}

    def start(self, script: str, *arguments: str, **environment: str) -> subprocess.Popen:
        command = [sys.executable, *self.launcher, str(CODE / script), *arguments]
        output = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen(command, env={**self.environment, **environment}, cwd=self.root, **output)

    def finish(self, script: str, *arguments: str, **environment: str) -> tuple[int, str, str]:
        process = self.start(script, *arguments, **environment)
        out, err = process.communicate(timeout=500)
        return process.returncode, out, err


@pytest.fixture
def project(tmp_path, sample, monkeypatch) -> Path:
    """A project root for this process: profile demo, small settings, the sample as data set root, no network."""
    root = tmp_path / "project"
    root.mkdir()
    for name, value in {**OFFLINE, "TORCH_HOME": str(root / "none")}.items():
        monkeypatch.setenv(name, value)
    for field in dataclasses.fields(config):  # restores them afterwards, whatever a test sets
        monkeypatch.setattr(config, field.name, getattr(config, field.name))
    config.settings = {profile: dict(tasks) for profile, tasks in config.settings.items()}
    exec(SMALL_SETTINGS, {})
    config.project_root, config.dataset_root, config.profile = root, sample, "demo"
    return root


@pytest.fixture
def here(project, monkeypatch, capsys) -> Here:
    return Here(project, monkeypatch, capsys)


@pytest.fixture
def user(tmp_path, sample) -> User:
    return User(tmp_path / "project root ü", sample)


@pytest.fixture
def stand_in(project, monkeypatch) -> Callable[[object], Path]:
    """`stand_in(tensors)`: a file in pretrained/ that takes the place of all initial weights. Returns its path."""

    def put(content: object) -> Path:
        path = project / "pretrained" / "stand-in.pth"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
        file = weights.WeightsFile("a stand-in", path.name, hashlib.sha256(path.read_bytes()).hexdigest())
        for module in (weights, training):
            monkeypatch.setattr(module, "weights_file", lambda backbone, weights: file)
        return path

    return put


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """While one worker makes `trained`, the other has tests that do without it: each starts with one half."""
    items.sort(key=lambda item: "trained" not in item.fixturenames)


@pytest.fixture(scope="session")
def trained(once, sample) -> User:
    """The whole chain has run on the sample. Tests only read it. `transcript`: {script: what it printed}."""
    return once("trained", lambda folder: run_the_chain(folder / "root", sample))


def run_the_chain(root: Path, sample: Path) -> User:
    user = User(root, sample, f"import sys; sys.dont_write_bytecode = True\n{WATCH}", ("-c", RUN_ALL))
    del user.environment["MPLCONFIGDIR"]
    user.images_before = state_of(sample)
    output = user.run(CHAIN[0], *(str(CODE / script) for script in CHAIN[1:]))
    user.transcript = dict(zip(CHAIN, output.split("\f\n"), strict=False))
    return user


class Place(Here):
    """A copy of the trained project root, to be damaged. Scripts run in this process."""

    def __init__(self, root: Path, trained: User, monkeypatch, capsys) -> None:
        super().__init__(root, monkeypatch, capsys)
        self.trained_root, self.outputs = trained.root, root / "outputs/demo/rgb"
        shutil.copytree(trained.root / "splits", root / "splits")
        # Links, which scripts replace and never write into; but each place has a lock of its own.
        unlocked = shutil.ignore_patterns("train.lock")
        shutil.copytree(trained.root / "outputs", root / "outputs", copy_function=os.link, ignore=unlocked)

    def own_sample(self) -> Path:
        """The data set root, from now on a copy that may be damaged."""
        folder = self.root.parent / "own sample ü"
        if config.dataset_root != folder:
            config.dataset_root = writable_copy(config.dataset_root, folder)
        return folder

    def listed_image(self, task: str, part: str = "train", index: int = 0) -> Path:
        """An image of a list, below `own_sample`."""
        return self.own_sample() / self.list_path(task, part).read_text().splitlines()[1 + index].split(",")[0]

    def list_path(self, task: str, part: str) -> Path:
        return self.root / f"splits/demo/{task}/{part}.csv"

    def edit(self, task: str, part: str, change: Callable[[list[str]], list[str]]) -> None:
        """Change the lines of a list."""
        path = self.list_path(task, part)
        path.write_text("".join(f"{line}\n" for line in change(path.read_text().splitlines())))

    def output(self, name: str) -> Path:
        """A file in outputs/demo/rgb that may be changed: no longer a link to the trained one."""
        path = self.outputs / name
        content = path.read_bytes()
        path.unlink()
        path.write_bytes(content)
        return path

    def change(self, name: str, change: Callable) -> None:
        """Change what a file of tensors in outputs/demo/rgb holds."""
        path = self.output(name)
        content = torch.load(path, weights_only=True)
        change(content)
        if name == "final_model.pt":
            content.pop("sha256")  # as earlier versions wrote it: each part is looked at
        torch.save(content, path)

    def settings(self, task: str, **changes) -> str:
        """Train only the first setting of a task, with these changes; return the command."""
        tasks = config.settings["demo"]
        tasks[task] = [dataclasses.replace(tasks[task][0], **changes)]
        return f"train_{task}.py"


@pytest.fixture
def place(project, trained, monkeypatch, capsys) -> Place:
    return Place(project, trained, monkeypatch, capsys)
