"""Training: the best epoch is what is saved, an interrupted run ends as an uninterrupted one."""

import csv
import json
import math
import signal
import time
from types import SimpleNamespace

import pytest
import torch

import config
import training
from config import RED_GREEN_BLUE, Setting
from dataset import CLASSES, band_statistics, load_images, read_split
from evaluation import load_model, measure, predict
from project import UserError, sha256
from training import check_settings, learning_rate

TENSOR_FILES = ("first/best.pt", "first/last.pt", "second/best.pt", "second/last.pt", "final_model.pt")


def hash_of(tensor: torch.Tensor) -> str:
    return f"{tensor.dtype} {tuple(tensor.shape)} {sha256(tensor.numpy().tobytes())}"


def results(root) -> dict:
    """Every tensor's bytes and every history row but its seconds."""
    folder = root / "outputs/demo/rgb"
    content = {}
    for name in TENSOR_FILES:
        loaded = torch.load(folder / name, weights_only=True)
        for row in loaded.get("progress", {}).get("history", []):
            row.pop("seconds")
        content[name] = json.dumps(loaded, default=hash_of, sort_keys=True)
    for name in ("first", "second"):
        rows = list(csv.DictReader((folder / name / "history.csv").open()))
        content[f"{name} history"] = [{k: v for k, v in row.items() if k != "seconds"} for row in rows]
    return content


def test_history_and_curves_after_each_epoch(trained):
    folder = trained.root / "outputs/demo/rgb/first"
    rows = list(csv.DictReader((folder / "history.csv").open()))
    assert [row["epoch"] for row in rows] == ["1", "2"]
    for row in rows:
        tpr = [float(row[f"val_tpr_{name}"]) for name in CLASSES]
        assert math.isclose(sum(tpr) / 10, float(row["val_mean_tpr"]), abs_tol=1e-9)
        assert all(float(row[key]) > 0 for key in ("train_loss", "val_loss", "learning_rate", "seconds"))
    assert (folder / "val_curves.png").read_bytes().startswith(b"\x89PNG")


def test_the_best_epoch_of_all_settings_is_saved(project, sample, monkeypatch):
    """Validation made to go down and up: the saved state must be that epoch's, not the last one's."""
    from split_data import find_image_sets, make_lists, make_record, write_lists

    found = find_image_sets()
    write_lists(make_lists(found, 7, None, False), make_record(found, 7))
    small = {"weights": None, "backbone": "mobilenet_v3_small", "image_size": 32, "batch_size": 16}
    settings = [Setting("first", "mild", epochs=3, **small), Setting("second", "mild", epochs=2, **small)]
    planned = iter([(0.3, 0.3), (0.9, 0.4), (0.5, 0.9), (0.9, 0.5), (0.9, 0.45)])
    states = []
    real = training.measure

    def scripted(logits, labels):
        accuracy, mean_tpr = next(planned)
        return {**real(logits, labels), "accuracy": accuracy, "mean_tpr": mean_tpr}

    real_predict = training.predict
    monkeypatch.setattr(training, "measure", scripted)
    monkeypatch.setattr(
        training,
        "predict",
        lambda network, *rest: (
            states.append({k: v.clone() for k, v in network.state_dict().items()}) or real_predict(network, *rest)
        ),
    )
    training.train("rgb", settings)
    model = load_model("rgb", torch.device("cpu"))
    # Equal accuracy: the mean TPR decides, so the first epoch of the second setting.
    assert (model.about["setting"]["name"], model.about["epoch"]) == ("second", 1)
    assert all(torch.equal(value, states[3][key]) for key, value in model.network.state_dict().items())
    assert any(not torch.equal(value, states[4][key]) for key, value in model.network.state_dict().items())
    selection = list(csv.DictReader((project / "outputs/demo/rgb/selection.csv").open()))
    assert [(row["setting"], row["selected"], row["best_epoch"]) for row in selection] == [
        ("first", "no", "2"),
        ("second", "yes", "1"),
    ]


def test_final_model_says_all_that_is_to_be_known(trained, monkeypatch, sample):
    for name, value in (("PROJECT_ROOT", trained.root), ("DATASET_ROOT", sample), ("PROFILE", "demo")):
        monkeypatch.setattr(config, name, value)
    content = torch.load(trained.root / "outputs/demo/ms/final_model.pt", weights_only=True)
    assert content["classes"] == list(CLASSES) and content["task"] == "ms"
    assert content["bands"] == ["B04", "B03", "B02", "B08", "B11", "B12"]
    train = load_images("ms", read_split("ms", "train").files, content["bands"]).pixels
    mean, std = band_statistics(train)
    assert content["mean"].tolist() == mean.tolist() and content["std"].tolist() == std.tolist()
    # Its val figures are those of the weights in it.
    val = read_split("ms", "val")
    model = load_model("ms", torch.device("cpu"))
    logits = predict(model.network, load_images("ms", val.files, model.bands).pixels, model.mean, model.std)
    assert measure(logits, val.labels)["accuracy"] == content["val"]["val_accuracy"]


def test_a_finished_setting_is_not_trained_again(trained_copy):
    before = results(trained_copy.root)
    output = trained_copy.run("train_rgb.py")
    assert "first: finished before" in output and "epoch 1/2" not in output
    assert results(trained_copy.root) == before


def test_twice_from_scratch_gives_the_same(trained, user):
    user.run("split_data.py")
    user.run("train_rgb.py")
    assert results(user.root) == results(trained.root)


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_run_ends_as_an_uninterrupted_one(trained, user, how):
    user.run("split_data.py")
    process = user.start("train_rgb.py")
    history = user.root / "outputs/demo/rgb/first/history.csv"
    while not history.exists() and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(how)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == (-9 if how == signal.SIGKILL else 128 + how), out
    if how != signal.SIGKILL:
        assert "saved. To continue: python train_rgb.py" in out
    user.run("train_rgb.py")
    assert results(user.root) == results(trained.root)


def test_a_changed_setting_is_trained_afresh_and_the_old_one_kept(trained_copy):
    change = "import dataclasses; config.RGB_SETTINGS[0] = dataclasses.replace(config.RGB_SETTINGS[0], epochs=1)"
    output = trained_copy.run("train_rgb.py", TEST_CONFIG=change)
    assert "first: epochs changed; what was trained before is now in outputs/demo/rgb/first-before-" in output
    assert "second: finished before" in output
    kept = list((trained_copy.root / "outputs/demo/rgb").glob("first-before-*/last.pt"))
    assert len(kept) == 1


def test_a_second_training_of_the_same_task_is_told_and_stops(trained_copy):
    code = "import fcntl, time; f = open('outputs/demo/rgb/train.lock', 'r+'); fcntl.flock(f, fcntl.LOCK_EX); "
    import subprocess
    import sys

    holder = subprocess.Popen(
        [sys.executable, "-c", code + "print(1, flush=True); time.sleep(60)"],
        cwd=trained_copy.root,
        stdout=subprocess.PIPE,
    )
    try:
        holder.stdout.readline()
        assert "is being trained by process" in trained_copy.refused("train_rgb.py")
    finally:
        holder.kill()
        holder.communicate()
    trained_copy.run("train_rgb.py")  # a lock left by a killed process does not block


def test_a_loss_that_is_no_number_stops_and_keeps_the_best(user):
    user.run("split_data.py")
    broken = "import dataclasses; config.RGB_SETTINGS = [dataclasses.replace(config.RGB_SETTINGS[0], learning_rate=float('inf'))]"
    line = user.refused("train_rgb.py", TEST_CONFIG=broken)
    assert "is not a number in epoch 1" in line and "learning_rate" in line
    assert not (user.root / "outputs/demo/rgb/final_model.pt").exists()


def test_every_image_once_per_epoch_and_no_tiny_batch():
    for images, batch_size in ((65, 32), (240, 32), (33, 16)):
        run = SimpleNamespace(
            progress=SimpleNamespace(epoch=4), labels=range(images), setting=SimpleNamespace(batch_size=batch_size)
        )
        batches = training.Run.batches(run)
        assert sorted(index for batch in batches for index in batch) == list(range(images))
        assert max(map(len, batches)) <= batch_size and min(map(len, batches)) >= max(map(len, batches)) - 1


def test_learning_rate_warms_up_and_decays_to_zero():
    setting = Setting("x", "none", epochs=1, learning_rate=1.0, warmup=0.2)
    rates = [learning_rate(setting, step / 100) for step in range(101)]
    assert rates[0] == 0 and max(rates) == rates[20] == 1 and rates[100] < 1e-9
    assert rates[:21] == sorted(rates[:21]) and rates[20:] == sorted(rates[20:], reverse=True)


@pytest.mark.parametrize(
    "task, change, told",
    [
        ("rgb", {"augmentation": "wild"}, "unknown augmentation; known: none, mild, strong"),
        ("rgb", {"backbone": "resnet1"}, "unknown backbone; known: alexnet"),
        ("rgb", {"fusion": "magic"}, "unknown fusion; known: none, concat"),
        ("rgb", {"fusion": "concat"}, "takes 2 group"),
        ("rgb", {"band_groups": (("B08", "B11", "B12"),)}, "unknown band 'B08' of the RGB set; known: B04, B03, B02"),
        ("ms", {"band_groups": (("B04", "B03"),)}, "takes 1 group"),
        ("ms", {"epochs": 0}, "epochs"),
        ("ms", {"batch_size": 1}, "batch_size"),
        ("ms", {"image_size": 7}, "image_size"),
        ("ms", {"learning_rate": 0.0}, "learning_rate"),
        ("ms", {"name": "../up"}, "name"),
    ],
)
def test_wrong_settings_are_refused(task, change, told):
    values = {"name": "x", "augmentation": "mild", "epochs": 1, "band_groups": (RED_GREEN_BLUE,), **change}
    with pytest.raises(UserError) as error:
        check_settings(task, [Setting(**values)])
    assert told in str(error.value)


def test_nothing_lies_beside_the_outputs(trained):
    assert {path.name for path in trained.root.iterdir()} == {"site", "splits", "outputs", "report", "cache"}
    assert not list(trained.root.rglob("*.partial"))
