"""Training: the best epoch is what is saved, an interrupted run ends as an uninterrupted one, nothing is mixed up."""

import csv
import errno
import fcntl
import json
import math
import os
import shutil
import signal
from pathlib import Path

from base.errors import UserError
from base.files import sha256
from base.project import CLASSES, MS, RGB, config
from base.setting import Setting

import pytest
import torch
from conftest import CODE, files_below

from augment import band_statistics
from dataset import EuroSATDataset, load_images
from engine import checkpoint, training
from engine.final_model import load_model, rgb_backbone
from engine.metrics import compute_metrics
from engine.results import predict
from engine.splits import read_splits
from engine.training import epoch_batches, learning_rate
from models import torchvision_models

CPU = torch.device("cpu")


def results(root: Path) -> dict:
    """The final model, every tensor's bytes, and every row of a history but its seconds."""

    def described(tensor: torch.Tensor) -> str:
        return f"{tensor.dtype} {tuple(tensor.shape)} {sha256(tensor.numpy().tobytes())}"

    folder, content = root / "outputs/demo/rgb", {}
    for name in ("first", "second"):
        loaded = torch.load(folder / name / "last.pt", weights_only=True)
        loaded.pop("sha256")  # of the history, too
        rows = [*loaded["history"], *csv.DictReader((folder / name / "history.csv").open())]
        for row in rows:
            row.pop("seconds")
        content[name] = json.dumps([loaded, rows], default=described, sort_keys=True)
    return content | {"final_model.pt": sha256((folder / "final_model.pt").read_bytes())}


def test_the_history_has_accuracy_and_tpr_of_each_class_for_each_epoch(trained):
    folder = trained.root / "outputs/demo/rgb/first"
    rows = list(csv.DictReader((folder / "history.csv").open()))
    assert [row["epoch"] for row in rows] == ["1", "2"]
    for row in rows:
        for kind, mean in (("tpr", "val_mean_tpr"), ("ap", "val_map")):
            values = [float(row[f"val_{kind}_{name}"]) for name in CLASSES]
            assert math.isclose(sum(values) / 10, float(row[mean]), abs_tol=1e-9) and max(values) <= 1
        assert 0 <= float(row["val_accuracy"]) <= 1
        assert all(float(row[key]) > 0 for key in ("train_loss", "val_loss", "learning_rate", "seconds"))
    assert (folder / "val_curves.png").read_bytes().startswith(b"\x89PNG")


def test_the_best_epoch_of_all_settings_is_saved(here, monkeypatch):
    """Validation is made to rise and fall. The saved weights must be those of its best epoch, not of the last one."""
    here.run("split_data.py")
    small = {"weights": None, "backbone": "shufflenet_v2_x0_5", "image_size": 32, "batch_size": 16}
    settings = [Setting("first", "mild", epochs=3, **small), Setting("second", "mild", epochs=2, **small)]
    config.settings["demo"]["rgb"] = settings
    planned = iter([(0.3, 0.3), (0.9, 0.4), (0.5, 0.9), (0.9, 0.5), (0.9, 0.45)])
    states, evaluate = [], training.evaluate

    def scripted(model, data):
        states.append({key: value.clone() for key, value in model.state_dict().items()})
        return evaluate(model, data) | dict(zip(("accuracy", "mean_tpr"), next(planned), strict=True))

    monkeypatch.setattr(training, "evaluate", scripted)
    here.run("train_rgb.py")
    final = load_model(RGB, CPU)
    # Of equal accuracies the mean TPR decides: the first epoch of the second setting.
    assert (final.setting.name, final.metadata["epoch"]) == ("second", 1)
    assert all(torch.equal(value, states[3][key]) for key, value in final.model.state_dict().items())
    assert any(not torch.equal(value, states[4][key]) for key, value in final.model.state_dict().items())
    rows = [(row["setting"], row["selected"], row["best_epoch"]) for row in final.metadata["selection"]]
    assert rows == [("first", "no", 2), ("second", "yes", 1)]
    table = csv.DictReader((RGB.outputs / "selection.csv").read_text().splitlines())
    assert [(row["setting"], row["selected"], int(row["best_epoch"])) for row in table] == rows


def test_the_final_model_holds_all_that_later_scripts_need(place, sample):
    final, lists = load_model(MS, CPU), read_splits(MS.splits, MS)
    about = final.metadata
    assert about["classes"] == list(CLASSES) and final.bands == ("B04", "B03", "B02", "B08", "B11", "B12")
    assert about["images"] == {"train": 60, "val": 20, "test": 20} and about["initial_weights"] is None
    pixels = load_images(sample, MS, lists["train"].files, final.bands)
    assert [values.tolist() for values in (final.mean, final.std)] == [v.tolist() for v in band_statistics(pixels)]
    # The val figures in it are those of the weights in it.
    val = EuroSATDataset(sample, MS, lists["val"], final.bands, (final.mean, final.std))
    metrics = compute_metrics(predict(final.model, val), val.split.labels)
    assert metrics["accuracy"] == about["val"]["val_accuracy"] == about["selection"][0]["val_accuracy"]


def test_a_final_model_that_another_one_replaces_is_kept(place):
    """As in a fresh clone, which has no checkpoints."""
    former = (place.outputs / "final_model.pt").read_bytes()
    for setting in ("first", "second"):
        shutil.rmtree(place.outputs / setting)
    config.seed += 1
    output = place.run("train_rgb.py")
    (kept,) = place.outputs.glob("final_model.pt.*.backup")
    assert kept.name in output and kept.read_bytes() == former


def test_six_bands_can_start_from_the_final_rgb_model(place):
    place.run(place.settings("ms", weights="rgb-model", learning_rate=1e-9))
    content = torch.load(MS.outputs / "final_model.pt", weights_only=True)
    rgb = place.outputs / "final_model.pt"
    assert content["initial_weights"] == {"origin": "the final RGB model", "sha256": sha256(rgb.read_bytes())}
    loaded = torch.load(rgb, weights_only=True)["model"]  # at this rate nothing is learned: it is still there
    for key, tensor in content["model"].items():
        if key.startswith("backbones.0.") and "running" not in key and "num_batches" not in key:
            assert torch.allclose(tensor, loaded[key.replace("backbones.0.", "backbone.")], atol=1e-5), key


def test_six_bands_do_not_start_from_a_model_that_has_seen_their_test_patches(place):
    rgb, ms = read_splits(RGB.splits, RGB), read_splits(MS.splits, MS)
    assert rgb_backbone(RGB, rgb, ms)
    with pytest.raises(UserError, match="has seen 20 test patches"):
        rgb_backbone(RGB, rgb, {"test": ms["val"]})
    with pytest.raises(UserError, match="trained with other lists"):
        rgb_backbone(RGB, {**rgb, "val": rgb["test"]}, ms)


def test_the_lists_handed_in_keep_rgb_training_patches_out_of_the_six_bands_test_list():
    rgb, ms = (read_splits(CODE / "splits/course" / task.name, task) for task in (RGB, MS))
    assert not {patch for part in ("train", "val") for patch in rgb[part].patches} & set(ms["test"].patches)


def test_training_again_from_scratch_gives_the_same_bytes(trained, here):
    shutil.copytree(trained.root / "splits", here.root / "splits")
    here.run("train_rgb.py")
    assert results(here.root) == results(trained.root)


def test_a_finished_setting_is_not_trained_again(place, monkeypatch):
    """Neither by another torch."""
    before = files_below(place.outputs)
    monkeypatch.setattr(torch, "__version__", "9.9.9")
    output = place.run("train_rgb.py")
    assert "first: finished before" in output and "epoch 1/2" not in output
    after = files_below(place.outputs)
    assert after.pop("train.lock") and after == before


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_run_says_so_and_ends_as_an_uninterrupted_one(trained, here, how):
    """With several processes: test_processes.py."""
    shutil.copytree(trained.root / "splits", here.root / "splits")
    evaluate = training.evaluate

    def stopped(model, data):
        if (here.root / "outputs/demo/rgb/first/history.csv").exists():
            os.kill(os.getpid(), how)
        return evaluate(model, data)

    with here.monkeypatch.context() as patched:
        patched.setattr(training, "evaluate", stopped)
        output = here.run("train_rgb.py", status=128 + how)
    assert f"stopped by {how.name}" in output and "outputs/demo/rgb" in output and "again" in output
    here.run("train_rgb.py")
    assert results(here.root) == results(trained.root)


# Trains in forks of one process that has imported everything, and kills them at random moments, every second one not
# before it has begun to write a checkpoint. Prints the kills, those while writing, and the finished roots.
KILLER = """
import json, os, pathlib, random, runpy, signal, sys, time, traceback
import train_rgb
from base.project import config
script, splits = sys.argv[1:]
draw, kills, while_writing, root, finished = random.Random(0), 0, 0, None, []
while kills < 20 or root:
    if not root:
        root = config.project_root = pathlib.Path(os.environ["EUROSAT_PROJECT_ROOT"]) / f"run {len(finished) + 1}"
        root.mkdir()
        (root / "splits").symlink_to(splits)
    child = os.fork()
    if not child:
        sys.stdout, sys.argv = open(os.devnull, "w"), [script]
        try:
            runpy.run_path(script, run_name="__main__")
        except SystemExit as end:
            os._exit(end.code or 0)
        except BaseException:
            traceback.print_exc()
        os._exit(99)
    moment = time.monotonic() + draw.uniform(0, 0.8)
    def writing():
        return [p for p in root.glob("outputs/demo/rgb/*/last.pt.*.partial") if f".{child}." in p.name]
    ended = 0
    while not ended and (kills >= 20 or time.monotonic() < moment or (kills % 2 and not writing())):
        time.sleep(0.001)
        ended, status = os.waitpid(child, os.WNOHANG)
    if not ended:
        os.kill(child, signal.SIGKILL)
        kills += 1
        _, status = os.waitpid(child, 0)
        while_writing += bool(writing())
    elif os.waitstatus_to_exitcode(status):
        sys.exit(f"status {status} after {kills} kills")
    else:
        finished.append(str(root))
        root = None
print(json.dumps([kills, while_writing, finished]))
"""


def test_killed_twenty_times_every_run_ends_as_an_uninterrupted_one(trained, user):
    user.launcher = ("-c", KILLER)
    kills, while_writing, finished = json.loads(user.run("train_rgb.py", str(trained.root / "splits")).splitlines()[0])
    assert kills == 20 and while_writing >= 5 and finished
    for root in map(Path, finished):
        assert results(root) == results(trained.root)
        assert not list((root / "outputs").rglob("*.partial"))


# {what changed, as the message says: the change}
CHANGES = {
    "epochs": lambda place: place.settings("rgb", epochs=1),
    "splits_sha256, train_images_sha256": lambda place: place.edit("rgb", "train", lambda lines: lines[:-1]),
    "train_images_sha256": lambda place: shutil.copy(place.listed_image("rgb", "val"), place.listed_image("rgb")),
    # as in a fresh clone, which has no checkpoints
    "seed, initial_model_sha256": lambda place: (
        setattr(config, "seed", 5),
        (place.outputs / "first/last.pt").unlink(),
    ),
    "weights, initial_model_sha256": lambda place: place.settings("rgb", weights="DEFAULT"),
}


@pytest.mark.parametrize("told, change", CHANGES.items())
def test_what_another_run_left_is_put_aside_and_kept(place, stand_in, told, change):
    stand_in(torchvision_models.shufflenet_v2_x0_5().state_dict())
    config.settings["demo"]["rgb"] = config.settings["demo"]["rgb"][:1]
    change(place)
    before = files_below(place.outputs / "first")
    output = place.run("train_rgb.py")
    assert f"first: {told} changed" in output and "first: from epoch 1 of" in output
    (aside,) = place.outputs.glob("first-before-*")
    assert aside.name in output and files_below(aside) == before
    assert "first: finished before" in place.run("train_rgb.py")


def test_a_checkpoint_of_parts_of_different_runs_is_refused(place):
    """Neither an edited history nor the weights of another run are taken for this run's."""
    whole = torch.load(place.outputs / "first/last.pt", weights_only=True)
    other = torch.load(place.outputs / "second/last.pt", weights_only=True)
    row = {**whole["history"][0], "val_accuracy": 0.99}
    changes = [{"history": [row, *whole["history"][1:]]}, *({key: other[key]} for key in ("best", "model", "identity"))]
    for change in changes:
        torch.save({**whole, **change}, place.output("first/last.pt"))
        with pytest.raises(UserError, match=r"first/last\.pt is damaged"):
            checkpoint.read_checkpoint(place.outputs / "first")


def test_a_second_training_of_the_same_task_stops(place):
    """A lock that a killed process left does not block."""
    with (place.outputs / "train.lock").open("a+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert "another training" in place.refused("train_rgb.py")
    place.run("train_rgb.py")


def test_a_lock_that_is_a_link_leaves_its_target_alone(place, tmp_path):
    target = tmp_path / "thesis.txt"
    target.write_text("precious")
    (place.outputs / "train.lock").symlink_to(target)
    place.refused("train_rgb.py")
    assert target.read_text() == "precious"


def test_a_file_system_without_locks_is_reported_and_trained_on(place, monkeypatch):
    def flock(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", flock)
    output = place.run("train_rgb.py")
    assert "cannot be locked" in output and "first: finished before" in output


OUT_OF_MEMORY = (
    MemoryError("Unable to allocate 9.00 GiB"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory: you tried to …"),
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB"),
)


@pytest.mark.parametrize("error", OUT_OF_MEMORY)
def test_too_little_memory_is_one_line(place, monkeypatch, error):
    def refuse(*_, **__):
        raise error

    shutil.rmtree(place.root / "outputs")
    monkeypatch.setattr(training, "train_one_epoch", refuse)
    line = place.refused("train_rgb.py")
    assert "out of memory" in line and "batch_size" in line


def test_a_bug_shows_its_traceback(place, monkeypatch):
    shutil.rmtree(place.root / "outputs")
    monkeypatch.setattr(training, "train_one_epoch", None)
    with pytest.raises(TypeError):
        place.run("train_rgb.py")


def test_a_loss_that_is_not_a_number_keeps_the_best_epoch_so_far(place, monkeypatch):
    shutil.rmtree(place.root / "outputs")
    monkeypatch.setattr(training, "learning_rate", lambda setting, progress: 1e-3 if progress < 0.5 else math.nan)
    line = place.refused("train_rgb.py")
    assert "loss of first is not a number in epoch 2" in line and "kept" in line
    assert [row["epoch"] for row in checkpoint.read_checkpoint(place.outputs / "first")["history"]] == [1]


@pytest.mark.parametrize("images, batch_size", [(65, 32), (240, 32), (33, 16)])
def test_an_epoch_has_every_image_once_in_an_order_of_its_own_and_no_tiny_batch(images, batch_size):
    orders = [epoch_batches(images, batch_size, seed, epoch) for seed, epoch in ((5, 0), (5, 0), (5, 1), (6, 0))]
    for batches in orders:
        assert sorted(torch.cat(batches).tolist()) == list(range(images))
        sizes = [len(batch) for batch in batches]
        assert max(sizes) <= batch_size and min(sizes) >= max(sizes) - 1
    first, again, *others = (torch.cat(batches).tolist() for batches in orders)
    assert first == again and first not in others and others[0] != others[1]


def test_the_learning_rate_warms_up_and_decays_to_zero():
    setting = Setting("x", "none", epochs=1, learning_rate=1.0, warmup=0.2)
    rates = [learning_rate(setting, step / 100) for step in range(101)]
    assert rates[0] == 0 and max(rates) == rates[20] == 1 and rates[100] < 1e-9
    assert rates[:21] == sorted(rates[:21]) and rates[20:] == sorted(rates[20:], reverse=True)
