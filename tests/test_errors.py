"""A user's mistake ends in one line that says what, where and what to do, with status 2, and leaves all as it was."""

import os
import pickle
import re
import shutil
import subprocess
from pathlib import Path

from base.errors import UserError
from base.files import atomic_write
from base.project import MS, config

import pytest
import torch
from conftest import CODE, files_below, jpeg
from PIL import Image
from tifffile import imread, imwrite

# Mistakes --------------------------------------------------------------------------------------------------------
# Each of these returns a function that makes one mistake in a place.


def root(name: str):
    return lambda place: setattr(config, "dataset_root", place.root / name)


def removed(name: str):
    """A file or folder below the project root."""
    return lambda place: (place.root / name).rename(place.root / "elsewhere")


def emptied(name: str):
    """A json file."""
    return lambda place: ((place.root / name).unlink(), (place.root / name).write_text("{}"))


def truncated(name: str):
    """A file in outputs/demo/rgb."""
    return lambda place: cut(place.output(name))


def cut(path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 3])


def image(change, task="rgb"):
    """Change the first training image."""
    return lambda place: change(place.listed_image(task))


def picture(*arguments, **options):
    """Another picture in the place of the first training image."""
    return image(lambda path: Image.new(*arguments).save(path, **options))


def forest(change):
    """Change the folder of a class."""
    return lambda place: change(place.own_sample() / "EuroSAT_RGB/Forest")


def lines(part: str, change):
    """Change the lines of an RGB list."""
    return lambda place: place.edit("rgb", part, change)


def model(change=None, **changes):
    """Change the content of the final model of RGB."""
    return lambda place: place.change("final_model.pt", change or (lambda content: content.update(changes)))


def weights(tensor: torch.Tensor):
    """Replace the first tensor of the final model's weights."""
    return model(lambda content: content["model"].update({next(iter(content["model"])): tensor}))


def logits(change):
    return lambda place: place.change("test_logits.pt", change)


def settings(**changes):
    return lambda place: place.settings("rgb", **changes)


def unreadable(place) -> None:
    """As for a user who may not read a folder. Tests often run as root, who may read everything."""
    scandir = os.scandir

    def refuse(path):
        if "EuroSAT_RGB" in str(path):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    place.monkeypatch.setattr(os, "scandir", refuse)


def overlapping_lists(place) -> None:
    line = place.list_path("rgb", "train").read_text().splitlines()[5]
    place.edit("rgb", "val", lambda lines: [*lines, line])


def model_of_the_other_task(place) -> None:
    shutil.copy(MS.outputs / "final_model.pt", place.output("final_model.pt"))


def project_root_a_file(place) -> None:
    config.project_root = CODE / "config.py"


def too_little_disk(place) -> None:
    place.monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 0, 10**8))


FILTER = (24, 3, 3, 3)  # shape of the first tensor
# {command: {case: (mistake, what the line must say)}}: the essential words, the file's name, the remedy.
MISTAKES = {
    "split_data.py": {
        "root missing": (root("nowhere"), "is not there; set DATASET_ROOT"),
        "root a file": (root("splits/demo/rgb/train.csv"), "is not a folder; set DATASET_ROOT"),
        "root empty": (root("splits"), "no EuroSAT images.*DATASET_ROOT.*download.py"),
        "class unreadable": (unreadable, "Permission denied.*permissions"),
        "class missing": (forest(shutil.rmtree), "no RGB images of Forest"),
        "a patch twice": (image(lambda path: shutil.copy(path, path.with_suffix(".JPEG"))), "are of the same patch"),
        "a line break": (image(lambda path: path.rename(path.with_name("a\nb.jpg"))), "a.nb.jpg.*rename it"),
        "record damaged": (emptied("splits/demo/rgb/split.json"), "split.json is damaged.*--overwrite"),
        "project root a file": (project_root_a_file, "cannot write.*PROJECT_ROOT"),
    },
    "split_data.py --overwrite": {
        "class too small": (
            forest(lambda folder: [path.unlink() for path in sorted(folder.iterdir())[1:]]),
            "no RGB image of Forest is left.*unpack",
        ),
    },
    "verify_splits.py": {"no lists": (removed("splits"), "run: python split_data.py")},
    "train_rgb.py": {
        "image missing": (image(Path.unlink), "1 of 60 listed images are not below.*DATASET_ROOT"),
        "image truncated": (image(cut), ".jpg is damaged.*unpack it again"),
        "image gray": (picture("L", (64, 64)), ".jpg is damaged.*Gray"),
        "image a giant": (picture("RGB", (9000, 9000)), ".jpg is damaged.*9000 x 9000"),
        "list missing": (removed("splits/demo/rgb/val.csv"), "val.csv is missing; run: python split_data.py$"),
        "lists overlap": (overlapping_lists, "in train.csv and in val.csv of splits/demo/rgb.*--overwrite"),
        "one image": (lines("train", lambda lines: lines[:2]), "'first'.*1 training images"),
        "checkpoint truncated": (truncated("second/last.pt"), "second/last.pt is damaged.*delete it"),
        "weights out of reach": (settings(weights="DEFAULT"), "cannot be.*download.py weights"),
        "augmentation unknown": (settings(augmentation="wild"), "'wild'.*mild"),
        "backbone unknown": (settings(backbone="resnet1"), "'resnet1'.*resnet18"),
        "band of the other images": (settings(band_groups=(("B08", "B11", "B12"),)), "'B08' of the RGB set"),
        "no settings": (lambda place: config.settings["demo"].pop("rgb"), "SETTINGS.'demo'..'rgb'"),
    },
    "train_ms.py": {
        "tif truncated": (image(cut, "ms"), ".tif is damaged.*unpack it again"),
    },
    # Each line must also name final_model.pt and how to train it again.
    "predict_test.py rgb": {
        "model missing": (removed("outputs/demo/rgb/final_model.pt"), "there is no model"),
        "model truncated": (truncated("final_model.pt"), "damaged"),
        "model of the other task": (model_of_the_other_task, "task ms"),
        "model of another backbone": (model(lambda c: c["setting"].update(backbone="resnet18")), "damaged"),
        "model of other bands": (model(bands=["B08", "B11", "B12"]), "bands"),
        "model of other classes": (model(classes=["Desert"]), "Desert"),
        "model of an older program": (model(lambda content: content.pop("runs")), "runs"),
        "model with nan": (weights(torch.full(FILTER, torch.nan)), "finite"),
        "model with infinity": (weights(torch.full(FILTER, torch.inf)), "finite"),
        "model of float64": (weights(torch.zeros(FILTER).double()), "float32"),
        "model with a deviation of 0": (model(std=torch.zeros(3)), "damaged"),
        "model of other lists": (lines("train", lambda lines: lines[:-1]), "other lists"),
    },
    # Each line must also say how to predict again.
    "reproduce.py rgb": {
        "reference missing": (removed("outputs/demo/rgb/test_logits.pt"), "test_logits.pt is missing"),
        "reference with a row cut": (logits(lambda logits: logits.resize_(19, 10)), "damaged.*19, 10"),
        "reference with nan": (logits(lambda logits: logits[0].fill_(torch.nan)), "damaged"),
        "figures missing": (emptied("outputs/demo/rgb/test_metrics.json"), "json is damaged"),
    },
    "rank_images.py rgb": {"results of another model": (model(epoch=7), "of another model.*predict_test.py rgb")},
    "reproduce.py": {"no model at all": (removed("outputs"), "train_rgb.py or python train_ms.py")},
    "make_report.py": {"no model at all": (removed("outputs"), "nothing to report.*train_rgb.py")},
    "download.py rgb": {
        "no network": (lambda place: None, "cannot be.*network.*MD5"),
        "too little disk": (too_little_disk, "0.1 GB free.*0.2 GB"),
    },
}
ALSO = {"predict_test.py rgb": "final_model.pt.*train_rgb.py", "reproduce.py rgb": "run: python predict_test.py rgb"}
CASES = [
    pytest.param(command, mistake, told, id=f"{command}: {case}")
    for command, cases in MISTAKES.items()
    for case, (mistake, told) in cases.items()
]


@pytest.mark.parametrize("command, mistake, told", CASES)
def test_mistakes_end_in_one_line(place, command, mistake, told):
    mistake(place)
    before, images_before = files_below(place.root), files_below(place.root.parent / "own sample ü")
    line = place.refused(command)
    assert re.search(told, line) and re.search(ALSO.get(command, ""), line), line
    after = files_below(place.root)
    assert {path: after.get(path) for path in before} == before
    assert all(path.endswith("train.lock") for path in set(after) - set(before))
    assert files_below(place.root.parent / "own sample ü") == images_before


def an_odd_name(place):
    path = place.own_sample() / jpeg("Forest")
    path.rename(path.with_name("Forest 1, ü “é”.JPEG"))
    place.settings("rgb", epochs=1)
    return (
        "split_data.py --overwrite",
        "verify_splits.py",
        "train_rgb.py",
        "predict_test.py rgb",
        "rank_images.py rgb",
    )


def one_image_in_the_last_batch(place):
    place.edit("rgb", "train", lambda lines: lines[:34])  # 33 images in batches of 4: the last ones have 3
    return (place.settings("rgb", epochs=1),)


def a_class_absent_from_val(place):
    place.edit("rgb", "val", lambda lines: [line for line in lines if "River" not in line])
    return place.settings("rgb", epochs=1), "predict_test.py rgb", "make_report.py"


def a_constant_band(place):
    for path in (place.own_sample() / "EuroSAT_MS").rglob("*.tif"):
        pixels = imread(path)
        pixels[:, :, 7] = 9
        imwrite(path, pixels, photometric="minisblack", planarconfig="contig")
    return ("train_ms.py",)


ACCEPTED = (an_odd_name, one_image_in_the_last_batch, a_class_absent_from_val, a_constant_band)


@pytest.mark.parametrize("prepare", ACCEPTED)
def test_what_is_odd_and_safe_is_accepted(place, prepare):
    for command in prepare(place):
        place.run(command)


class Evil:
    def __reduce__(self):
        return os.system, (f"touch {os.environ['EVIL_FILE']}",)


EVIL = {
    "outputs/demo/rgb/final_model.pt": "predict_test.py rgb",
    "outputs/demo/rgb/second/last.pt": "train_rgb.py",
    "outputs/demo/rgb/test_logits.pt": "reproduce.py rgb",
    "pretrained/stand-in.pth": "train_rgb.py",
}


@pytest.mark.parametrize("name, command", EVIL.items())
def test_a_pickle_that_would_run_code_does_not(place, stand_in, monkeypatch, tmp_path, name, command):
    monkeypatch.setenv("EVIL_FILE", str(tmp_path / "ran"))
    torch.save({"model": Evil()}, tmp_path / "evil.pt")
    for content in ((tmp_path / "evil.pt").read_bytes(), pickle.dumps(Evil())):
        if name.startswith("pretrained"):
            place.settings("rgb", weights="DEFAULT")
            stand_in(content)
        else:
            place.output(name.removeprefix("outputs/demo/rgb/")).write_bytes(content)
        assert "damaged" in place.refused(command) and not (tmp_path / "ran").exists()


def test_a_write_that_fails_leaves_the_old_file(project):
    path = project / "kept.txt"
    path.write_text("old")
    with pytest.raises(UserError, match="No space left"), atomic_write(path) as partial:
        partial.write_text("half")
        raise OSError(28, "No space left on device")
    assert path.read_text() == "old" and [p.name for p in project.iterdir()] == ["kept.txt"]


@pytest.fixture
def mounted():
    """`mounted(folder, *options)`: mount a file system there; skips if that takes more rights."""
    folders = []

    def mount(folder, *options):
        folder.mkdir(exist_ok=True)
        if subprocess.run(["mount", *options, str(folder)], capture_output=True).returncode:
            pytest.skip("mounting a file system takes root")
        folders.append(folder)
        return folder

    yield mount
    for folder in folders:
        subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_is_one_line(here, mounted, tmp_path):
    """The lists fit into 3 MB, a checkpoint does not."""
    config.project_root = mounted(tmp_path / "small disk", "-t", "tmpfs", "-o", "size=3m", "none")
    here.run("split_data.py")
    before = files_below(config.project_root / "splits")
    line = here.refused("train_rgb.py")
    assert "No space left on device" in line and "free some space" in line
    assert files_below(config.project_root / "splits") == before and not list(config.project_root.rglob("*.partial"))


def test_on_a_read_only_project_root_what_only_reads_works(place, mounted):
    mounted(place.root, "--bind", "-o", "ro", str(place.root))
    for command in ("split_data.py --overwrite", "train_rgb.py"):
        assert "Read-only file system" in place.refused(command)
    place.run("verify_splits.py")
    assert place.run("reproduce.py").count("\nREPRODUCED to the last bit") == 2
