"""Composites of patches, the network of their pixels, and the study on the sample."""

import json
import shutil

from base.project import CLASSES, RGB

import numpy as np
import pytest
import torch
from conftest import CODE, files_below
from scipy.ndimage import distance_transform_edt

from dataset import SIDE
from engine import plots
from engine.plots import source_of
from studies import segment, statistics
from studies.autoencoder import in_pixels
from studies.subject import subjects


@pytest.fixture
def subject(place, monkeypatch):
    """Of a trained project root, where composites are few."""
    monkeypatch.setattr(plots, "DPI", 40)
    monkeypatch.setattr(statistics, "DRAWS", 50)
    monkeypatch.setattr(segment, "EPOCHS", 1)
    monkeypatch.setattr(segment, "COMPOSITES", {"val": 4, "test": 8})
    (subject,) = subjects([RGB], "segment")
    return subject


def test_a_pixel_has_the_label_of_the_patch_that_it_is_from_and_looks_like_it(subject):
    data = segment.Composites(subject, "test")
    images, labels = data[torch.arange(len(data))]
    assert (labels.numpy() == data.split.labels).all()
    pixels = in_pixels(images, data).permute(0, 2, 3, 1).numpy()
    for index, of_pixels in enumerate(labels.view(-1, SIDE, SIDE).numpy()):
        patches, origin, _ = data.draw(index)
        for number, patch in enumerate(patches):
            inside = distance_transform_edt(origin == number) > 12
            assert (of_pixels[origin == number] == data.patch_labels[patch]).all()
            differences = np.abs(pixels[index][inside] - data.pixels[patch][inside])
            assert not inside.any() or differences.mean() < 3, "more than JPEG changes"


def test_borders_differ_by_list_and_epoch_are_nowhere_straight_and_soft_or_sharp(subject):
    train, test = (segment.Composites(subject, part) for part in ("train", "test"))
    first = [train.draw(index)[1] for index in range(20)]
    train.epoch = 1
    later = [train.draw(index) for index in range(20)]
    assert all((one != other).any() for one, (_, other, _) in zip(first, later, strict=True))
    assert (test.draw(0)[1] != first[0]).any() and (test.draw(0)[1] == test.draw(0)[1]).all()
    assert all(set(np.unique(origin)) == set(range(len(patches))) for patches, origin, _ in later)
    softness = [soft for *_, soft in later]
    assert segment.SOFTNESS[0] <= min(softness) < 0.6 and 1.5 < max(softness) <= segment.SOFTNESS[1]
    for _, origin, _ in later:  # a straight border would be at one place in many rows
        steps = np.abs(np.diff(origin, axis=1)) > 0
        assert steps.sum(0).max() < SIDE * 0.8


def test_accuracy_and_iou_by_hand():
    """Of ten pixels of class 0 seven are found, one has no class; three of class 1 are taken for class 0, one is found."""
    labels = np.array([0] * 10 + [1] * 4)
    classes = np.array([0] * 7 + [1, 1, 255, 0, 0, 0, 1])
    accuracy, iou = segment.accuracy_and_iou(segment.confusion(labels, classes))
    assert accuracy == pytest.approx(8 / 14)
    assert iou[:2] == pytest.approx([7 / 13, 1 / 6]) and np.isnan(iou[2:]).all()


def test_the_study_runs_trains_nothing_twice_and_ends_the_same(subject, capsys):
    scene = subject.folder.parents[2] / "classify/virginia.tif"
    segment.main()
    assert "scene.png" not in files_below(subject.folder) and "virginia.tif is missing" in capsys.readouterr().out
    scene.parent.mkdir(exist_ok=True)
    shutil.copy(CODE / "sample/scene/virginia.tif", scene)
    shutil.rmtree(subject.folder / "scratch")
    before = files_below(subject.folder)
    segment.main()
    said, after = capsys.readouterr().out, files_below(subject.folder)
    assert "loaded: finished before" in said and "scratch epoch 1/1" in said
    assert {name for name, content in before.items() if after[name] != content} <= {"study.json"}
    assert "scratch/history.csv" not in before
    assert source_of(subject.folder / "scene.png") == subject.final.sha256
    (table, by_class) = json.loads((subject.folder / "study.json").read_text())["tables"]
    assert [row[0] for row in table["rows"]] == ["pixel network", "from scratch", "map, 160 m", "nearest centre"]
    assert [row[0] for row in by_class["rows"]] == list(CLASSES)
