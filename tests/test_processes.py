"""Two processes train what one process trains. What `torchrun` announces is believed only if torchrun announced it."""

import csv
import shutil
import time

import numpy as np
import pytest
import torch
from conftest import User

# In each process: train "first" with frozen batch norm, and record what the process trained on, ended with and wrote.
RECORD = """
import dataclasses, os, pathlib, torch
from dataset import EuroSATDataset
from engine import training
for tasks in config.settings.values():
    first, second = tasks["rgb"]
    tasks["rgb"] = [dataclasses.replace(first, augmentation="strong", learning_rate=1e-4), second]
folder = pathlib.Path(os.environ["EUROSAT_PROJECT_ROOT"]) / "recorded"
folder.mkdir(exist_ok=True)
rank, seen, real = os.environ.get("RANK", "0"), [], (EuroSATDataset.__getitem__, training.train_one_epoch, os.replace)
batch_norm_train = torch.nn.BatchNorm2d.train
def item(self, indices):
    if self.augmentation != "none":
        seen.append(indices.tolist())
    return real[0](self, indices)
def train_one_epoch(model, train, optimizer, setting, epoch):
    seen.clear()
    frozen = lambda self, mode=True: torch.nn.Module.train(self, False)
    torch.nn.BatchNorm2d.train = frozen if setting.name == "first" else batch_norm_train
    result = real[1](model, train, optimizer, setting, epoch)
    state = getattr(model, "module", model).state_dict()
    torch.save({"seen": list(seen), "model": state}, folder / f"{rank}-{setting.name}-{epoch}.pt")
    return result
def replace(source, target):
    with open(folder / f"{rank}-wrote", "a") as log:
        log.write(f"{target}\\n")
    real[2](source, target)
EuroSATDataset.__getitem__, training.train_one_epoch, os.replace = item, train_one_epoch, replace
"""
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


def user_of(root, trained, sample, processes: int) -> User:
    user = User(root, sample, RECORD, TORCHRUN if processes == 2 else ())
    shutil.copytree(trained.root / "splits", root / "splits")
    return user


@pytest.fixture(scope="module")
def one_and_two(tmp_path_factory, trained, sample):
    """Two users who have trained, with one process and with two. `output`: what their run printed."""
    users = [user_of(tmp_path_factory.mktemp("processes") / "root", trained, sample, number) for number in (1, 2)]
    for user in users:
        user.output = user.run("train_rgb.py")
    return users


def recorded(user, rank: int, epoch: int) -> dict:
    return torch.load(user.root / "recorded" / f"{rank}-first-{epoch}.pt", weights_only=True)


def history(user, setting: str) -> list[dict]:
    rows = csv.DictReader((user.root / "outputs/demo/rgb" / setting / "history.csv").open())
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


def last_model(user, setting: str) -> dict[str, torch.Tensor]:
    return torch.load(user.root / "outputs/demo/rgb" / setting / "last.pt", weights_only=True)["model"]


def test_together_they_see_every_image_once_per_epoch_in_the_same_batches(one_and_two):
    for epoch in (0, 1):
        alone = recorded(one_and_two[0], 0, epoch)["seen"]
        shares = [recorded(one_and_two[1], rank, epoch)["seen"] for rank in (0, 1)]
        assert sorted(index for share in shares for batch in share for index in batch) == list(range(60))
        assert [sorted(a + b) for a, b in zip(*shares, strict=True)] == [sorted(batch) for batch in alone]


def test_both_end_with_identical_weights_and_one_writes(one_and_two):
    first, second = (recorded(one_and_two[1], rank, 1)["model"] for rank in (0, 1))
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert one_and_two[1].output.count("first epoch 1/2") == 1
    folder = one_and_two[1].root / "recorded"
    assert "last.pt" in (folder / "0-wrote").read_text() and not (folder / "1-wrote").exists()


def test_they_reach_what_one_reaches(one_and_two):
    """With frozen batch norm only the order of additions differs; AdamW lets that grow a little with each step."""
    for one, two in zip(*(history(user, "first") for user in one_and_two), strict=True):
        for key in ("train_loss", "val_loss", "train_accuracy", "val_accuracy"):
            assert np.isclose(float(one[key]), float(two[key]), rtol=1e-4), key
    one, two = (recorded(user, 0, 1)["model"] for user in one_and_two)
    assert all(torch.allclose(one[key].double(), two[key].double(), atol=1e-4) for key in one)


def test_a_stopped_run_of_two_ends_as_an_uninterrupted_one(one_and_two, trained, sample, tmp_path):
    """With batch norm at work, whose running statistics must continue, too."""
    user = user_of(tmp_path / "stopped", trained, sample, processes=2)
    process = user.start("train_rgb.py")
    while not (user.root / "outputs/demo/rgb/second/history.csv").exists() and process.poll() is None:
        time.sleep(0.01)
    process.terminate()
    out, _ = process.communicate(timeout=200)
    assert out.count("stopped by SIGTERM") == 1 and not (user.root / "outputs/demo/rgb/final_model.pt").exists()
    user.run("train_rgb.py")
    assert history(user, "second") == history(one_and_two[1], "second")
    ended, expected = last_model(user, "second"), last_model(one_and_two[1], "second")
    assert all(torch.equal(ended[key], expected[key]) for key in expected)
    assert any(expected[key].any() for key in expected if key.endswith("running_mean"))


def test_a_mistake_is_one_line_of_each_process(trained, sample, tmp_path):
    """What follows is torchrun's report."""
    user = user_of(tmp_path / "mistaken", trained, sample, processes=2)
    output = user.run("train_rgb.py", status=1, EUROSAT_DATASET_ROOT="/nowhere")
    lines = [line for line in output.splitlines() if line.startswith("train_rgb.py")]
    assert 1 <= len(lines) <= 2 and all("data set root /nowhere is not there" in line for line in lines), output
    assert "UserError" not in output, output


def test_several_processes_without_torchrun_are_refused(place):
    assert "torchrun" in place.refused("train_rgb.py", WORLD_SIZE="2")


@pytest.mark.parametrize("rank", ["3", "abc"])
def test_a_world_of_one_is_one_process_whatever_its_rank(place, rank):
    assert "first: finished before" in place.run("train_rgb.py", WORLD_SIZE="1", RANK=rank)
