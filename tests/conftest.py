"""A small generated data set, and scripts run as a user runs them: `python file.py` in a process of its own."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

CODE = Path(__file__).parent.parent
sys.path.insert(0, str(CODE))

import config  # noqa: E402

# The tests share two cores between two workers; more threads each only wait for one another.
os.environ["OMP_NUM_THREADS"] = "1"
IMAGES_PER_CLASS = 10
# Settings that train in seconds: what is tested is the machinery, not the accuracy.
SMALL_SETTINGS = """
import os
from config import Setting, RED_GREEN_BLUE, NEAR_AND_SHORT_WAVE_INFRARED
import config
small = dict(weights=None, backbone="mobilenet_v3_small", image_size=32, batch_size=16)
config.RGB_SETTINGS = [
    Setting("first", "mild", epochs=2, **small), Setting("second", "strong", epochs=2, **small)
]
groups = (RED_GREEN_BLUE, NEAR_AND_SHORT_WAVE_INFRARED)
config.MS_SETTINGS = [Setting("late", "strong", epochs=1, band_groups=groups, fusion="concat", **small)]
exec(os.environ.get("TEST_CONFIG", ""))
"""


@pytest.fixture(scope="session")
def sample(tmp_path_factory) -> Path:
    """A data set root with generated images; not to be changed."""
    from make_sample import make_sample

    folder = tmp_path_factory.mktemp("sample")
    make_sample(folder, IMAGES_PER_CLASS, seed=1)
    return folder


@pytest.fixture
def own_sample(sample, tmp_path) -> Path:
    """A copy of it that a test may damage."""
    return Path(shutil.copytree(sample, tmp_path / "own sample ü"))


@pytest.fixture
def project(tmp_path, sample, monkeypatch) -> Path:
    """A project root of its own, in this process: profile demo, the sample as data set root."""
    root = tmp_path / "project"
    root.mkdir()
    for name, value in (("PROJECT_ROOT", root), ("DATASET_ROOT", sample), ("PROFILE", "demo"), ("SEED", 7)):
        monkeypatch.setattr(config, name, value)
    return root


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
            **os.environ,
            "PYTHONPATH": str(site),
            "EUROSAT_PROJECT_ROOT": str(root),
            "EUROSAT_DATASET_ROOT": str(dataset_root),
            "EUROSAT_PROFILE": "demo",
            "http_proxy": "http://127.0.0.1:9",  # offline: whoever tries the network fails at once
            "https_proxy": "http://127.0.0.1:9",
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
        lines = [line for line in err.splitlines() if not line.startswith("note:")]
        assert process.returncode == 2 and len(lines) == 1, f"{script}: status {process.returncode}\n{out}\n{err}"
        assert lines[0].startswith(f"{script}: "), lines
        return lines[0]


@pytest.fixture
def user(tmp_path, sample) -> User:
    return User(tmp_path / "project root", sample)


@pytest.fixture(scope="session")
def trained(tmp_path_factory, sample) -> Path:
    """A project root after the whole chain on the sample; not to be changed."""
    root = tmp_path_factory.mktemp("trained") / "root"
    someone = User(root, sample)
    someone.transcript = {}
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
