"""Two processes train what one process trains."""

import csv
import shutil
import sys
import time

import numpy as np
import pytest
import torch

# In both processes: freeze batch norm, and write down what each process trained on and ended with.
WATCH = """
import torch, dataclasses, os, pathlib
from dataset import EuroSATDataset
from engine import training
torch.nn.BatchNorm2d.train = lambda self, mode=True: torch.nn.Module.train(self, False)
own = config.settings["demo"]
own["rgb"] = [dataclasses.replace(own["rgb"][0], augmentation="strong", learning_rate=1e-4)]
rank = os.environ.get("RANK", "0")
folder = pathlib.Path(os.environ["EUROSAT_PROJECT_ROOT"]) / "watched"
folder.mkdir(exist_ok=True)
real_item, real_epoch = EuroSATDataset.__getitem__, training.train_one_epoch
seen = []
def item(self, indices):
    if self.augmentation != "none":
        seen.append(indices.tolist())
    return real_item(self, indices)
def train_one_epoch(model, *rest):
    result = real_epoch(model, *rest)
    epoch = rest[-2]
    state = getattr(model, "module", model).state_dict()
    torch.save({"seen": list(seen), "model": state}, folder / f"{rank}-{epoch}.pt")
    seen.clear()
    return result
EuroSATDataset.__getitem__, training.train_one_epoch = item, train_one_epoch
real_replace = os.replace
def replace(source, target):
    with open(folder / f"{rank}-wrote", "a") as log:
        log.write(f"{target}\\n")
    real_replace(source, target)
os.replace = replace
"""
SCRIPT = "train_rgb.py"


@pytest.fixture(scope="module")
def one_and_two(tmp_path_factory, sample):
    from conftest import CODE, User

    users = []
    for processes in (1, 2):
        user = User(
            tmp_path_factory.mktemp("processes") / str(processes), sample, TEST_CONFIG=WATCH, OMP_NUM_THREADS="1"
        )
        user.run("split_data.py", TEST_CONFIG="")
        if processes == 2:
            launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
            user.command = lambda script, *rest: [sys.executable, *launcher, str(CODE / script), *rest]
        user.output = user.run(SCRIPT)
        users.append(user)
    return users


def watched(user, rank: int, epoch: int) -> dict:
    return torch.load(user.root / "watched" / f"{rank}-{epoch}.pt", weights_only=True)


def test_every_image_exactly_once_per_epoch_over_both(one_and_two):
    for epoch in (0, 1):
        alone = watched(one_and_two[0], 0, epoch)["seen"]
        shares = [watched(one_and_two[1], rank, epoch)["seen"] for rank in (0, 1)]
        assert sorted(index for share in shares for batch in share for index in batch) == list(range(60))
        # and each step the same batch as one process takes
        assert [sorted(a + b) for a, b in zip(*shares, strict=True)] == [sorted(batch) for batch in alone]


def test_both_processes_end_with_identical_weights(one_and_two):
    first, second = (watched(one_and_two[1], rank, 1)["model"] for rank in (0, 1))
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_two_processes_reach_what_one_reaches(one_and_two):
    """With frozen batch norm only the order of additions differs; AdamW lets that grow a little with each step."""
    histories = [list(csv.DictReader((u.root / "outputs/demo/rgb/first/history.csv").open())) for u in one_and_two]
    for one, two in zip(*histories, strict=True):
        for key in ("train_loss", "val_loss", "train_accuracy", "val_accuracy"):
            assert np.isclose(float(one[key]), float(two[key]), rtol=1e-4), key
    one, two = (watched(user, 0, 1)["model"] for user in one_and_two)
    for key in one:
        assert torch.allclose(one[key].double(), two[key].double(), atol=1e-4), key


def test_one_writer(one_and_two):
    assert one_and_two[1].output.count("first epoch 1/2") == 1
    watched = one_and_two[1].root / "watched"
    assert "last.pt" in (watched / "0-wrote").read_text() and not (watched / "1-wrote").exists()


def test_a_stopped_run_of_two_processes_continues_to_the_same_end(one_and_two):
    """With batch norm at work, whose running statistics must continue, too."""
    user = one_and_two[1]
    moving = "\n".join(line for line in WATCH.splitlines() if "BatchNorm2d" not in line)
    folder = user.root / "outputs/demo/rgb"
    ends = []
    for stopped in (False, True):
        shutil.rmtree(folder)
        if stopped:
            process = user.start(SCRIPT, TEST_CONFIG=moving)
            while not (folder / "first/history.csv").exists() and process.poll() is None:
                time.sleep(0.01)
            process.terminate()
            output, _ = process.communicate(timeout=200)
            assert "stopped by SIGTERM; all whole epochs are kept in outputs/demo/rgb. To continue: EUROSAT_" in output
            assert "torchrun --nproc-per-node 2 train_rgb.py" in output and not (folder / "final_model.pt").exists()
        user.run(SCRIPT, TEST_CONFIG=moving)
        final = torch.load(folder / "final_model.pt", weights_only=True)["model"]
        ends.append((rows_of(folder), final))
    (rows, final), (rows_again, final_again) = ends
    assert rows == rows_again and all(torch.equal(final[key], final_again[key]) for key in final)
    assert any(final[key].any() for key in final if key.endswith("running_mean"))


def test_a_mistake_is_said_once(one_and_two, tmp_path):
    """By the first process, of lists as of config.py; the other ends quietly. The rest is torchrun's own report."""
    user = one_and_two[1]
    for change, told in (
        ("config.dataset_root = pathlib.Path('/nowhere')", "train_rgb.py: the data set root /nowhere is not there"),
        ("config.settings['demo']['rgb'] = []", "train_rgb.py: config.py has no SETTINGS['demo']['rgb']"),
    ):
        output = user.run(SCRIPT, status=1, TEST_CONFIG=f"import pathlib; {change}")
        own = [line for line in output.splitlines() if "train_rgb.py: " in line]
        assert len(own) == 1 and own[0].startswith(told), output
        assert "UserError" not in output and "gloo" not in output.lower(), output


def rows_of(folder) -> list[dict]:
    rows = list(csv.DictReader((folder / "first/history.csv").open()))
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]
