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
import torch, training, dataclasses, os, pathlib
torch.nn.BatchNorm2d.train = lambda self, mode=True: torch.nn.Module.train(self, False)
config.RGB_SETTINGS = [dataclasses.replace(config.RGB_SETTINGS[0], augmentation="strong", learning_rate=1e-4)]
training.CHECKPOINT_SECONDS, training.AGREE_EVERY = 0, 2  # checkpoints within epochs too
rank = os.environ.get("RANK", "0")
folder = pathlib.Path(os.environ["EUROSAT_PROJECT_ROOT"]) / "watched"
folder.mkdir(exist_ok=True)
real_reader, real_finish = training.batch_reader, training.Run.finish_epoch
seen = []
def reader(*arguments):
    read = real_reader(*arguments)
    return lambda indices: seen.append(indices.tolist()) or read(indices)
def finish(self):
    torch.save({"seen": list(seen), "network": self.network.state_dict()}, folder / f"{rank}-{self.progress.epoch}.pt")
    seen.clear()
    real_finish(self)
training.batch_reader, training.Run.finish_epoch = reader, finish
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
    first, second = (watched(one_and_two[1], rank, 1)["network"] for rank in (0, 1))
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_two_processes_reach_what_one_reaches(one_and_two):
    """With frozen batch norm only the order of additions differs; AdamW lets that grow a little with each step."""
    histories = [list(csv.DictReader((u.root / "outputs/demo/rgb/first/history.csv").open())) for u in one_and_two]
    for one, two in zip(*histories, strict=True):
        for key in ("train_loss", "val_loss", "train_accuracy", "val_accuracy"):
            assert np.isclose(float(one[key]), float(two[key]), rtol=1e-4), key
    one, two = (watched(user, 0, 1)["network"] for user in one_and_two)
    for key in one:
        assert torch.allclose(one[key].double(), two[key].double(), atol=1e-4), key


def test_one_writer(one_and_two):
    assert one_and_two[1].output.count("first epoch 1/2") == 1
    assert not list(one_and_two[1].root.rglob("*.partial"))


def test_a_stopped_run_of_two_processes_continues_to_the_same_end(one_and_two):
    folder = one_and_two[1].root / "outputs/demo/rgb"
    whole = rows_of(folder)
    final = torch.load(folder / "final_model.pt", weights_only=True)["network"]
    shutil.rmtree(folder)
    process = one_and_two[1].start(SCRIPT)
    while not (folder / "first/history.csv").exists() and process.poll() is None:
        time.sleep(0.01)
    process.terminate()
    output, _ = process.communicate(timeout=200)
    assert "stopped by SIGTERM; saved. To continue: torchrun --nproc-per-node 2 train_rgb.py" in output
    assert len(rows_of(folder)) < len(whole) or not (folder / "final_model.pt").exists()
    one_and_two[1].run(SCRIPT)
    assert rows_of(folder) == whole
    again = torch.load(folder / "final_model.pt", weights_only=True)["network"]
    assert all(torch.equal(final[key], again[key]) for key in final)


def rows_of(folder) -> list[dict]:
    rows = list(csv.DictReader((folder / "first/history.csv").open()))
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]
