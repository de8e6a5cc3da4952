"""Training: the best epoch is what is saved, an interrupted run ends as an uninterrupted one."""

import csv
import dataclasses
import errno
import fcntl
import io
import json
import math
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import CODE, files_below, jpeg

import models
from augment import band_statistics
from dataset import CLASSES, EuroSATDataset, Split, load_images, patch_of
from engine import runtime, training
from engine.evaluation import in_order, load_model, predict, rgb_backbone
from engine.metrics import compute_metrics
from engine.runtime import Processes
from engine.splits import as_split, complete_patches, make_pools, overlapping_pairs, read_splits
from engine.training import EpochBatches, learning_rate
from models import build_model
from project import Setting, UserError, config, sha256
from studies import search, six_bands

TENSOR_FILES = ("first/best.pt", "first/last.pt", "second/best.pt", "second/last.pt", "final_model.pt")


def hash_of(tensor: torch.Tensor) -> str:
    return f"{tensor.dtype} {tuple(tensor.shape)} {sha256(tensor.numpy().tobytes())}"


def results(root) -> dict:
    """Every tensor's bytes and every history row but its seconds."""
    folder = root / "outputs/demo/rgb"
    content = {}
    for name in TENSOR_FILES:
        loaded = torch.load(folder / name, weights_only=True)
        for row in loaded.get("history", []):
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
        precision = [float(row[f"val_ap_{name}"]) for name in CLASSES]
        assert math.isclose(sum(precision) / 10, float(row["val_map"]), abs_tol=1e-9) and max(precision) <= 1
        assert all(float(row[key]) > 0 for key in ("train_loss", "val_loss", "learning_rate", "seconds"))
    assert (folder / "val_curves.png").read_bytes().startswith(b"\x89PNG")


def test_the_best_epoch_of_all_settings_is_saved(project, here, monkeypatch):
    """Validation made to go down and up: the saved state must be that epoch's, not the last one's."""
    here.run("split_data.py")
    small = {"weights": None, "backbone": "mobilenet_v3_small", "image_size": 32, "batch_size": 16}
    settings = [Setting("first", "mild", epochs=3, **small), Setting("second", "mild", epochs=2, **small)]
    config.settings["demo"]["rgb"] = settings
    planned = iter([(0.3, 0.3), (0.9, 0.4), (0.5, 0.9), (0.9, 0.5), (0.9, 0.45)])
    states = []
    real = training.evaluate

    def scripted(model, loader, processes):
        accuracy, mean_tpr = next(planned)
        states.append({key: value.clone() for key, value in model.state_dict().items()})
        return {**real(model, loader, processes), "accuracy": accuracy, "mean_tpr": mean_tpr}

    monkeypatch.setattr(training, "evaluate", scripted)
    here.run("train_rgb.py")
    final = load_model(project / "outputs/demo/rgb", "rgb", torch.device("cpu"))
    # Equal accuracy: the mean TPR decides, so the first epoch of the second setting.
    assert (final.setting.name, final.about["epoch"]) == ("second", 1)
    assert all(torch.equal(value, states[3][key]) for key, value in final.model.state_dict().items())
    assert any(not torch.equal(value, states[4][key]) for key, value in final.model.state_dict().items())
    selection = list(csv.DictReader((project / "outputs/demo/rgb/selection.csv").open()))
    assert [(row["setting"], row["selected"], row["best_epoch"]) for row in selection] == [
        ("first", "no", "2"),
        ("second", "yes", "1"),
    ]


def test_final_model_says_all_that_is_to_be_known(trained, sample):
    content = torch.load(trained.root / "outputs/demo/ms/final_model.pt", weights_only=True)
    assert content["classes"] == list(CLASSES) and content["task"] == "ms"
    assert content["bands"] == ["B04", "B03", "B02", "B08", "B11", "B12"]
    lists = read_splits(trained.root / "splits/demo/ms", "ms")
    train, _ = load_images(sample, "ms", lists["train"].files, content["bands"])
    mean, std = band_statistics(train)
    assert content["mean"].tolist() == mean.tolist() and content["std"].tolist() == std.tolist()
    assert content["images"] == {"train": 60, "val": 20, "test": 20} and content["initial_weights"] is None
    # Its val figures are those of the weights in it.
    final = load_model(trained.root / "outputs/demo/ms", "ms", torch.device("cpu"))
    val = EuroSATDataset(sample, "ms", lists["val"], final.bands, (final.mean, final.std))
    logits, labels = predict(final.model, in_order(val))
    assert compute_metrics(logits, labels.numpy())["accuracy"] == content["val"]["val_accuracy"]


def test_what_is_evaluated_is_the_average_of_the_weights_and_statistics(trained, project, monkeypatch):
    """Held against the definition: after the first step the weights themselves, then a step of 1 - decay towards them."""
    decay, expected = 0.75, {}

    class Watched(torch.optim.AdamW):
        def step(self):
            super().step()
            for key, value in model.state_dict().items():
                if value.is_floating_point():
                    expected[key] = decay * expected[key] + (1 - decay) * value if key in expected else value.clone()

    setting = Setting(
        "x", "mild", 1, weights=None, backbone="mobilenet_v3_small", image_size=32, weight_averaging=decay
    )
    lists = read_splits(trained.root / "splits/demo/rgb", "rgb")
    data = EuroSATDataset(config.dataset_root, "rgb", lists["train"], augmentation="mild")
    model = build_model(setting, None)
    monkeypatch.setattr(training, "make_optimizer", lambda *_: Watched(model.parameters(), lr=0.0))
    training.train_setting(setting, model, data, data, "lists", project / "x", Processes(0, 1, torch.device("cpu")))
    kept = torch.load(project / "x/best.pt", weights_only=True)["model"]
    assert all(torch.allclose(kept[key], expected[key], atol=1e-6) for key in expected)
    assert any(not torch.allclose(kept[key], model.state_dict()[key], atol=1e-4) for key in expected)


def test_six_bands_can_start_from_the_final_rgb_model(place):
    out = place.here.run(place.settings("ms", weights="rgb-model", learning_rate=1e-9))
    content = torch.load(place.root / "outputs/demo/ms/final_model.pt", weights_only=True)
    rgb = place.root / "outputs/demo/rgb/final_model.pt"
    assert content["initial_weights"] == {"origin": "the final RGB model", "sha256": sha256(rgb.read_bytes())}, out
    loaded = torch.load(rgb, weights_only=True)["model"]  # nothing is learned at this rate: it is still there
    for key, tensor in content["model"].items():
        if key.startswith("backbones.0.") and "running" not in key and "num_batches" not in key:
            assert torch.allclose(tensor, loaded[key.replace("backbones.0.", "backbone.")], atol=1e-5), key


def test_six_bands_do_not_start_from_a_model_that_has_seen_their_test_patches(trained):
    folder, lists = trained.root / "outputs/demo/rgb", read_splits(trained.root / "splits/demo/rgb", "rgb")
    ms = read_splits(trained.root / "splits/demo/ms", "ms")
    assert rgb_backbone(folder, lists, ms)
    with pytest.raises(UserError, match="has seen 20 test patches of the multispectral lists"):
        rgb_backbone(folder, lists, {"test": ms["val"]})
    with pytest.raises(UserError, match="trained with other lists"):
        rgb_backbone(folder, {**lists, "val": lists["test"]}, ms)


def test_pools_keep_what_the_rgb_lists_train_on_out_of_the_test_list_of_six_bands():
    """On the lists that are handed in, so that their network may start from the RGB model."""
    rgb, ms = (read_splits(CODE / "splits/course" / task, task) for task in ("rgb", "ms"))
    seen = {patch_of(file) for part in ("train", "val") for file in rgb[part].files}
    assert not seen & {patch_of(file) for file in ms["test"].files}


def test_the_search_measures_each_run_once(place, monkeypatch):
    setting = config.settings["demo"]["rgb"][0]
    monkeypatch.setattr(search, "QUEUE", {"rgb": [(setting, 0), (setting, 1)]})
    place.edit("rgb", "train", lambda lines: lines[:-20])  # what leaves the list may be spare
    search.main(("rgb",))
    table = place.root / "outputs/demo/rgb/search/table.csv"
    before = table.read_bytes()
    rows = list(csv.DictReader(io.StringIO(before.decode())))
    assert [int(row["seed"]) - config.seed for row in rows] == [0, 1]
    assert all(int(row["spare_images"]) > 0 and 0 <= float(row["spare"]) <= 1 for row in rows)
    found = json.loads(table.with_name("study.json").read_text())
    assert [line[0] for line in found["tables"][0]["rows"]] == [setting.name] * 2
    assert table.with_name("frontier.png").read_bytes().startswith(b"\x89PNG")
    search.main(("rgb",))
    assert table.read_bytes() == before


def test_spare_images_are_in_no_list_and_of_the_train_pool(trained, sample, monkeypatch):
    monkeypatch.setattr(config, "dataset_root", sample)
    lists = read_splits(trained.root / "splits/demo/rgb", "rgb")
    train = lists["train"]
    lists["train"] = Split(train.files[:20], train.labels[:20])
    spare = search.spare_images("rgb", lists)
    held = {file for split in lists.values() for file in split.files}
    pool = set(make_pools(complete_patches(), config.split_seed)["train"])
    assert spare.files and not held & set(spare.files) and {patch_of(file) for file in spare.files} <= pool


def test_a_finished_setting_is_not_trained_again(place):
    before = results(place.root)
    output = place.here.run("train_rgb.py")
    assert "first: finished before" in output and "epoch 1/2" not in output
    assert results(place.root) == before


def test_a_graph_that_was_lost_is_drawn_again(place):
    """As after a kill between the last checkpoint and the graph, or by a person."""
    path = place.root / "outputs/demo/rgb/first/val_curves.png"
    before = path.read_bytes()
    path.unlink()
    assert "first: finished before" in place.here.run("train_rgb.py") and path.read_bytes() == before


def test_twice_from_scratch_gives_the_same(trained, user):
    shutil.copytree(trained.root / "splits", user.root / "splits")
    user.run("train_rgb.py")
    assert results(user.root) == results(trained.root)


def test_what_is_handed_in_outlives_a_training_without_its_checkpoints(place):
    """As in a fresh clone, where the checkpoints are not: another model does not take the place without a trace."""
    folder = place.root / "outputs/demo/rgb"
    former = (folder / "final_model.pt").read_bytes()
    for setting in ("first", "second"):
        (folder / setting / "last.pt").unlink()
    place.here.run("train_rgb.py")
    assert (folder / "final_model.pt").read_bytes() == former and not list(folder.glob("final_model.pt.*.backup"))
    for setting in ("first", "second"):
        shutil.rmtree(folder / setting)
    config.seed += 1
    out = place.here.run("train_rgb.py")
    kept = [path.name for path in folder.glob("final_model.pt.*.backup")]
    assert len(kept) == 1 and f"kept the former outputs/demo/rgb/final_model.pt as {kept[0]}" in out
    assert (folder / kept[0]).read_bytes() == former


def test_a_model_keeps_its_versions_when_it_is_found_finished_by_another_torch(place, monkeypatch):
    before = (place.root / "outputs/demo/rgb/final_model.pt").read_bytes()
    monkeypatch.setattr(torch, "__version__", "9.9.9")
    assert "finished before" in place.here.run("train_rgb.py")
    assert (place.root / "outputs/demo/rgb/final_model.pt").read_bytes() == before


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_run_says_how_to_continue_and_ends_as_an_uninterrupted_one(trained, user, how):
    shutil.copytree(trained.root / "splits", user.root / "splits")
    process = user.start("train_rgb.py")
    history = user.root / "outputs/demo/rgb/first/history.csv"
    while not history.exists() and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(how)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + how, out
    told = out.partition("all whole epochs are kept in outputs/demo/rgb. To continue: ")[2].strip()
    assert told.endswith(" python train_rgb.py"), out
    assert f"EUROSAT_PROFILE=demo EUROSAT_PROJECT_ROOT={shlex.quote(str(user.root))} " in told
    user.run("train_rgb.py")
    assert results(user.root) == results(trained.root)


# Trains in forks of one process that has imported everything, and kills them at random moments; every second one not
# before it has begun to write a checkpoint. Checkpoints are written after each batch. Prints what it did.
KILLER = """
import json, os, pathlib, random, runpy, signal, sys, time
import train_rgb
from project import config
code, splits = map(pathlib.Path, sys.argv[1:])
draw, kills, while_writing, root, finished = random.Random(0), 0, 0, None, []
while kills < 20 or root:
    if not root:
        root = pathlib.Path(os.environ["EUROSAT_PROJECT_ROOT"]) / f"run {len(finished) + 1}"
        root.mkdir()
        (root / "splits").symlink_to(splits)
        config.project_root = root
    child = os.fork()
    if not child:
        sys.stdout = open(os.devnull, "w")
        sys.argv = [str(code / "train_rgb.py")]
        try:
            runpy.run_path(sys.argv[0], run_name="__main__")
        except SystemExit as end:
            os._exit(end.code or 0)
        except BaseException:
            __import__("traceback").print_exc()
        os._exit(99)
    moment = time.monotonic() + draw.uniform(0, 1.2)
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


def test_killed_at_twenty_random_moments_every_run_ends_as_an_uninterrupted_one(trained, user):
    command = [sys.executable, "-c", KILLER, str(CODE), str(trained.root / "splits")]
    result = subprocess.run(command, env=user.environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    kills, while_writing, finished = json.loads(result.stdout)
    assert kills == 20 and while_writing >= 5 and finished
    for root in finished:
        assert results(Path(root)) == results(trained.root)
        assert not list((Path(root) / "outputs").rglob("*.partial"))


def change_a_setting(place):
    """epochs"""
    place.settings("rgb", epochs=1)


def change_the_lists(place):
    """splits_sha256, train_images_sha256"""
    place.edit("rgb", "train", lambda lines: lines[:-1])


def change_an_image(place):
    """train_images_sha256"""
    shutil.copy(place.own_sample() / jpeg("River"), place.first_image("rgb"))


def change_the_seed(place):
    """seed, initial_model_sha256"""
    config.seed = 5


def change_the_initial_weights(place):
    """initial_model_sha256"""
    place.pretrained(models.torchvision_models.mobilenet_v3_small().state_dict())
    place.settings("rgb", weights="DEFAULT")
    place.here.run("train_rgb.py")
    place.pretrained(models.torchvision_models.mobilenet_v3_small().state_dict())


@pytest.mark.parametrize(
    "change", [change_a_setting, change_the_lists, change_an_image, change_the_seed, change_the_initial_weights]
)
def test_what_another_setting_list_image_seed_or_network_left_is_put_aside_and_kept(place, change):
    config.settings["demo"]["rgb"] = config.settings["demo"]["rgb"][:1]
    change(place)
    folder = place.root / "outputs/demo/rgb"
    before = files_below(folder / "first")
    output = place.here.run("train_rgb.py")
    told = f"first: {change.__doc__} changed; what was trained before is now in outputs/demo/rgb/first-before-"
    assert told in output and "first: from epoch 1 of" in output
    digest = output.partition("first-before-")[2][:8]
    assert files_below(folder / f"first-before-{digest}") == before
    assert "first: finished before" in place.here.run("train_rgb.py")


def test_a_second_training_of_the_same_task_is_told_and_stops(trained_copy):
    code = "import fcntl, time; f = open('outputs/demo/rgb/train.lock', 'r+'); fcntl.flock(f, fcntl.LOCK_EX); "
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


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_told_and_trained_on(place, monkeypatch, number):
    """Common on clusters; it was taken for another training at work once."""

    def flock(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    output = place.here.run("train_rgb.py")
    assert "note: outputs/demo/rgb cannot be locked" in output and "first: finished before" in output


@pytest.mark.parametrize(
    "error",
    [
        MemoryError("Unable to allocate 9.00 GiB"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory: you tried to …"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB"),
    ],
)
def test_too_little_memory_is_one_line(place, monkeypatch, error):
    shutil.rmtree(place.root / "outputs")

    def refuse(*_, **__):
        raise error

    monkeypatch.setattr(training, "train_one_epoch", refuse)
    assert "out of memory" in (line := place.here.refused("train_rgb.py")) and "set a smaller batch_size" in line


def test_a_bug_still_shows_its_traceback(place, monkeypatch):
    shutil.rmtree(place.root / "outputs")
    monkeypatch.setattr(training, "train_one_epoch", None)
    with pytest.raises(TypeError):
        place.here.run("train_rgb.py")


def test_a_full_disk_when_the_lock_is_written_is_one_line(place, monkeypatch):
    real = open

    class Full:
        def __init__(self, file):
            self.file = file

        def __getattr__(self, name):
            return getattr(self.file, name)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.file.close()

        def flush(self):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def refuse(path, *rest, **keywords):
        file = real(path, *rest, **keywords)
        return Full(file) if str(path).endswith("train.lock") else file

    monkeypatch.setattr(runtime, "open", refuse, raising=False)
    assert "No space left on device" in place.here.refused("train_rgb.py")


def test_a_wrong_setting_leaves_a_finished_training_where_it_is(place):
    """It was put aside first, then training crashed."""
    before = files_below(place.root / "outputs")
    place.settings("rgb", augmentation="wild")
    place.here.refused("train_rgb.py")
    assert files_below(place.root / "outputs") == before


def test_a_loss_that_becomes_no_number_keeps_the_best_epoch_so_far(place, monkeypatch):
    shutil.rmtree(place.root / "outputs")
    monkeypatch.setattr(training, "learning_rate", lambda setting, progress: 1e-3 if progress < 0.5 else math.nan)
    line = place.here.refused("train_rgb.py")
    assert (
        "the loss of first is not a number in epoch 2; the best epoch so far, 1, is kept in outputs/demo/rgb/first"
        in line
    )
    folder = place.root / "outputs/demo/rgb/first"
    assert torch.load(folder / "best.pt", weights_only=True)["epoch"] == 1
    assert len((folder / "history.csv").read_text().splitlines()) == 2


def test_every_image_once_per_epoch_and_no_tiny_batch():
    for images, batch_size, size in ((65, 32, 1), (240, 32, 2), (33, 16, 3)):
        every = [
            EpochBatches(images, batch_size, 5, Processes(rank, size, torch.device("cpu"))) for rank in range(size)
        ]
        orders = []
        for epoch in (0, 1):
            for batches in every:
                batches.epoch = epoch
            steps = [torch.cat(shares) for shares in zip(*every, strict=True)]
            assert sorted(torch.cat(steps).tolist()) == list(range(images))
            assert [len(step) for step in steps] == every[0].sizes and len(every[0]) == len(steps)
            orders.append([sorted(step.tolist()) for step in steps])
        assert orders[0] != orders[1]
        assert max(every[0].sizes) <= batch_size and min(every[0].sizes) >= max(every[0].sizes) - 1


def test_learning_rate_warms_up_and_decays_to_zero():
    setting = Setting("x", "none", epochs=1, learning_rate=1.0, warmup=0.2)
    rates = [learning_rate(setting, step / 100) for step in range(101)]
    assert rates[0] == 0 and max(rates) == rates[20] == 1 and rates[100] < 1e-9
    assert rates[:21] == sorted(rates[:21]) and rates[20:] == sorted(rates[20:], reverse=True)


def test_nothing_lies_beside_the_outputs(trained):
    assert {path.name for path in trained.root.iterdir()} == {"site", "splits", "outputs", "report", "cache"}
    assert not list(trained.root.rglob("*.partial"))


def test_folds_keep_the_same_ground_together_and_predict_each_patch_once():
    pairs = overlapping_pairs()
    together = [patch for pair in pairs[:40] for patch in pair]
    alone = [patch for patch in complete_patches() if patch not in {p for pair in pairs for p in pair}][::150]
    every = as_split("ms", dict.fromkeys([*together, *alone]))
    fold_of, predicted = {}, []
    for fold, (train, test) in enumerate(six_bands.folds(every)):
        assert not set(train) & set(test)
        predicted += test.tolist()
        fold_of |= {patch_of(every.files[index]): fold for index in test}
    assert sorted(predicted) == list(range(len(every.files)))
    assert all(fold_of[a] == fold_of[b] for a, b in pairs if a in fold_of and b in fold_of)


def test_three_and_six_bands_are_compared_on_each_patch_and_a_second_run_predicts_none_again(
    place, monkeypatch, capsys
):
    small = {"weights": None, "backbone": "mobilenet_v3_small", "image_size": 32, "views": 1, "epochs": 1}
    for name in ("THREE", "SIX"):
        monkeypatch.setattr(six_bands, name, dataclasses.replace(getattr(six_bands, name), **small))
    six_bands.main()
    folder = place.root / "outputs/demo/ms/six_bands"
    rows = list(csv.DictReader((folder / "predictions.csv").open()))
    result = json.loads((folder / "study.json").read_text())["values"]
    right = [[row[kind] == row["class_name"] for row in rows] for kind in ("three_bands", "six_bands")]
    assert len(rows) == 100 and {row["fold"] for row in rows} == set("01234")
    assert [result[name]["accuracy"] for name in ("three", "six")] == [sum(own) / 100 for own in right]
    assert result["second_alone"] == sum(b and not a for a, b in zip(*right, strict=True))
    assert "three-0: " in capsys.readouterr().out
    before = files_below(folder)
    six_bands.main()
    changed = {name for name, digest in files_below(folder).items() if before.get(name) != digest}
    assert "three-0: " not in capsys.readouterr().out and changed == {"train.lock"}
