"""Images become what a network sees: the right bands, one path for every reader, augmentation by image."""

import hashlib
import multiprocessing
import os
import shutil
import tracemalloc

import numpy as np
import pytest
import torch
from conftest import jpeg, tif
from PIL import Image
from tifffile import imwrite
from torch.utils.data import DataLoader

import dataset
from augment import AUGMENTATIONS, RANDOM_NUMBERS, band_statistics, preprocess, random_numbers
from dataset import CLASSES, MS_BANDS, EuroSATDataset, displayed, load_images, read_image
from engine.evaluation import in_order
from engine.runtime import Processes
from engine.splits import read_split
from engine.training import EpochBatches
from project import UserError, cache_dir, config, splits_dir
from studies import benchmark

RED_GREEN_BLUE = ("B04", "B03", "B02")


@pytest.fixture
def lists(here):
    here.run("split_data.py")


def dataset_of(task, part, bands=None, augmentation="none") -> EuroSATDataset:
    train, split = (read_split(splits_dir(task), task, name) for name in ("train", part))
    statistics = EuroSATDataset(config.dataset_root, task, train, bands).statistics
    return EuroSATDataset(config.dataset_root, task, split, bands, statistics, augmentation, cache=cache_dir())


def load(files, bands=RED_GREEN_BLUE):
    """The RGB files' pixels and their hash, by way of the cache."""
    return load_images(config.dataset_root, "rgb", files, bands, cache_dir())


def test_bands_are_addressed_by_name(project, own_sample, monkeypatch):
    """A tif whose bands hold their index: B8A is the last, B10 the tenth of the file."""
    monkeypatch.setattr(config, "dataset_root", own_sample)
    pixels = np.broadcast_to(np.arange(13, dtype=np.uint16), (64, 64, 13))
    imwrite(own_sample / tif("Forest"), pixels, photometric="minisblack", planarconfig="contig")
    bands = ("B8A", "B04", "B08", "B10", "B11", "B01")
    pixels, _ = load_images(own_sample, "ms", [tif("Forest")], bands)
    assert pixels[0, 5, 7].tolist() == [12, 3, 7, 9, 10, 0]
    with pytest.raises(UserError, match=r"unknown band 'B8' of the multispectral set; known: B01, .*, B8A"):
        load_images(own_sample, "ms", [tif("Forest")], ["B8"])


def test_bands_are_physically_right(project, sample):
    """As in the originals: B10 (cirrus) near 10; B8A over forest near B08, far above red."""
    forest = read_image(f"{sample}/{tif('Forest')}", "ms").astype(float).mean((0, 1))
    band = dict(zip(MS_BANDS, forest, strict=True))
    assert band["B10"] < 50 and abs(band["B8A"] / band["B08"] - 1) < 0.2 and band["B8A"] > 3 * band["B04"]


@pytest.mark.parametrize("options", [{"compression": "deflate"}, {"planarconfig": "separate"}, {"rowsperstrip": 4}])
def test_any_encoding_of_a_tif_gives_the_same_pixels(tmp_path, options):
    pixels = np.random.default_rng(0).integers(0, 65536, (64, 64, 13), dtype=np.uint16)
    stored = pixels.transpose(2, 0, 1) if options.get("planarconfig") == "separate" else pixels
    options = {"planarconfig": "contig", **options}
    imwrite(tmp_path / "x.tif", stored, photometric="minisblack", **options)
    assert (read_image(str(tmp_path / "x.tif"), "ms") == pixels).all()


def test_jpeg_pixels_are_those_of_pillow(project, sample):
    for path in sorted((sample / "EuroSAT_RGB").rglob("*.jpg"))[::7]:
        assert (read_image(str(path), "rgb") == np.asarray(Image.open(path))).all()


@pytest.mark.parametrize("task", ["rgb", "ms"])
def test_every_way_of_asking_gives_the_same_tensors(lists, task):
    """One by one, any DataLoader with workers, whole batches as in training, as in evaluation: bit for bit."""
    bands = ("B04", "B03", "B02") if task == "rgb" else ("B04", "B03", "B02", "B8A", "B11", "B12")
    data = dataset_of(task, "val", bands)
    one_by_one = torch.stack([data[i][0] for i in range(len(data))])
    labels = [data[i][1] for i in range(len(data))]
    assert labels == data.split.labels.tolist() and all(type(label) is int for label in labels)
    loader = DataLoader(data, batch_size=7, num_workers=2, multiprocessing_context="fork")
    assert torch.equal(data[np.int64(3)][0], one_by_one[3]) and len(list(zip(data, range(99)))) == len(data)
    for batches in (list(loader), list(in_order(data))):
        assert torch.equal(one_by_one, torch.cat([images for images, _ in batches]))
        assert torch.cat([own for _, own in batches]).tolist() == labels
    sampler = EpochBatches(len(data), 7, 0, Processes(0, 1, torch.device("cpu")))
    for (images, own), indices in zip(DataLoader(data, sampler=sampler, batch_size=None), sampler, strict=True):
        assert torch.equal(images, one_by_one[indices]) and own.tolist() == [labels[i] for i in indices]
        assert images.is_contiguous(memory_format=torch.channels_last) and images.dtype == torch.float32
    pixels, _ = load_images(config.dataset_root, task, data.split.files, bands)
    whole = preprocess(torch.from_numpy(pixels), data.mean, data.std, "none", torch.empty(len(data), RANDOM_NUMBERS))
    assert torch.equal(one_by_one, whole) and whole.shape == (20, len(bands), 64, 64)


def test_what_lies_on_a_gpu_is_read_as_from_the_disk(lists):
    """CUDA cannot index uint16, so the bits travel as int16."""
    data = dataset_of("ms", "val")
    before = data[[3, 1, 4]][0]
    data._on_gpu = torch.from_numpy(np.array(data.pixels.view(np.int16)))
    assert torch.equal(data[[3, 1, 4]][0], before)


def test_without_a_cache_nothing_is_written(lists, project):
    split = read_split(splits_dir("rgb"), "rgb", "val")
    before = sorted(project.rglob("*"))
    EuroSATDataset(config.dataset_root, "rgb", split)
    assert sorted(project.rglob("*")) == before


def test_a_new_epoch_reaches_workers_that_live_on(lists):
    """They repeated the first epoch's augmentation once."""
    data = dataset_of("rgb", "val", augmentation="strong")
    loader = DataLoader(data, batch_size=7, num_workers=2, persistent_workers=True, multiprocessing_context="fork")
    for epoch in (0, 1, 2):
        data.set_epoch(epoch)
        assert torch.equal(torch.cat([images for images, _ in loader]), data[list(range(len(data)))][0])


def test_scaling_to_0_1_and_standardising(lists):
    files = read_split(splits_dir("ms"), "ms", "train").files
    train, _ = load_images(config.dataset_root, "ms", files, ("B04", "B10"))
    mean, std = band_statistics(train)
    values = train.reshape(-1, 2) / 65535
    assert np.allclose(mean, values.mean(0), rtol=1e-5) and np.allclose(std, values.std(0), rtol=1e-4)
    images = torch.stack([image for image, _ in dataset_of("ms", "train", ("B04", "B10"))])
    assert images.mean((0, 2, 3)).abs().max() < 1e-3 and (images.std((0, 2, 3)) - 1).abs().max() < 1e-3


def test_a_constant_band_stays_finite():
    mean, std = band_statistics(np.full((2, 64, 64, 1), 7, np.uint16))
    assert std == 1 and mean == np.float32(7 / 65535)


@pytest.mark.parametrize("augmentation", ["mild", "strong"])
def test_augmentation_depends_on_seed_epoch_and_image_alone(lists, augmentation):
    data = dataset_of("rgb", "train", augmentation=augmentation)
    data.set_epoch(3)
    whole = torch.stack([data[i][0] for i in range(len(data))])
    shuffled = [5, 0, 59, 17]
    assert torch.equal(torch.stack([data[i][0] for i in shuffled]), whole[shuffled])
    workers = torch.cat([images for images, _ in DataLoader(data, batch_size=9, num_workers=2)])
    assert torch.equal(workers, whole)
    data.set_epoch(4)
    assert not torch.equal(data[0][0], whole[0]) or not torch.equal(data[1][0], whole[1])
    assert not np.array_equal(random_numbers(1, 3, 5), random_numbers(2, 3, 5))


def test_mild_mirrors_and_strong_does_more():
    image = torch.arange(16.0).reshape(1, 1, 4, 4)
    seen = {tuple(AUGMENTATIONS["mild"](image, torch.rand(1, RANDOM_NUMBERS), 1).flatten().tolist()) for _ in range(99)}
    flips = (image, image.flip(2), image.flip(3), image.flip(2).flip(3))
    assert seen == {tuple(flip.flatten().tolist()) for flip in flips}
    random = torch.full((1, RANDOM_NUMBERS), 0.5)  # no flip, no turn, no zoom, no shift, no gain, no offset
    still = AUGMENTATIONS["strong"](image, random, torch.ones(1, 1, 1))
    assert torch.allclose(still, image, atol=1e-5)
    turned = random.clone()
    turned[:, 2] = 0
    assert torch.allclose(AUGMENTATIONS["strong"](image, turned, torch.ones(1, 1, 1)), image.transpose(2, 3), atol=1e-5)
    bright = random.clone()
    bright[:, 7] = 1
    assert torch.allclose(AUGMENTATIONS["strong"](image, bright, torch.ones(1, 1, 1)), image * 1.1, atol=1e-4)


def test_evaluation_has_no_augmentation(lists):
    data = dataset_of("rgb", "test")
    first = data[3][0]
    data.set_epoch(9)
    assert torch.equal(data[3][0], first)


def test_cache_is_valid_for_exactly_these_files(project, own_sample, monkeypatch):
    monkeypatch.setattr(config, "dataset_root", own_sample)
    files = [jpeg("Forest", n) for n in (1, 2, 3)]
    first = load(files)
    assert isinstance(first[0], np.memmap)
    decoded = []
    real = dataset.read_image
    monkeypatch.setattr(dataset, "read_image", lambda path, task: decoded.append(path) or real(path, task))
    again = load(files)
    assert not decoded and again[1] == first[1] and (again[0] == first[0]).all()
    load(files[:2])
    assert len(decoded) == 2
    reversed_bands = load(files, ("B02", "B03", "B04"))
    assert len(decoded) == 5 and (reversed_bands[0][..., ::-1] == first[0]).all()
    (own_sample / files[0]).write_bytes((own_sample / jpeg("River")).read_bytes())
    changed = load(files)
    assert changed[1] != first[1] and (changed[0][0] != first[0][0]).any()
    for size in (1000, 0):
        for path in (project / "cache").iterdir():
            path.write_bytes(path.read_bytes()[:size])  # as after a full disk: decoded again
        assert load(files)[1] == changed[1]


def test_a_cache_damaged_in_its_middle_is_not_used(project):
    files = [jpeg("Forest", n) for n in (1, 2, 3)]
    first = load(files)
    (path,) = (project / "cache").glob("*.npy")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    again = load(files)
    assert again[1] == first[1] == hashlib.sha256(again[0].tobytes()).hexdigest()


def test_an_image_replaced_by_another_of_its_size_and_time_is_noticed(project, own_sample):
    config.dataset_root = own_sample
    first, other = own_sample / jpeg("Forest"), own_sample / jpeg("River")
    times = first.stat().st_mtime_ns
    size = max(first.stat().st_size, other.stat().st_size)
    for path in (first, other):  # bytes behind the end of a JPEG are ignored
        path.write_bytes(path.read_bytes().ljust(size, b"\0"))
        os.utime(path, ns=(times, times))
    before = load([jpeg("Forest")])
    shutil.copy2(other, first)
    assert first.stat().st_mtime_ns == times and first.stat().st_size == size
    assert load([jpeg("Forest")])[1] != before[1]


def test_what_a_killed_decoding_left_is_removed_and_what_one_at_work_writes_is_not(project):
    cache = project / "cache"
    cache.mkdir()
    old = [cache / "0123.77.npy.77.partial", cache / "0123.78.npy"]
    young = cache / "4567.79.npy.79.partial"
    for path in (*old, young):
        path.write_bytes(b"half")
    for path in old:
        os.utime(path, (0, 0))
    load([jpeg("Forest")])
    assert not any(path.exists() for path in old) and young.exists() and len(list(cache.iterdir())) == 2


@pytest.mark.parametrize("moment", [1, 2])
def test_two_that_decode_at_once_both_get_the_pixels(project, monkeypatch, moment):
    """Another process decodes the same just before this one renames what it wrote, for the first or second time."""
    files = [jpeg("Forest", n) for n in (1, 2, 3)]
    real, renamings, found = os.replace, [], []

    def replace(source, target):
        renamings.append(target)
        if len(renamings) == moment:
            with multiprocessing.get_context("fork").Pool(1) as other:
                found.append(other.apply(load, (files,)))
        real(source, target)

    monkeypatch.setattr(os, "replace", replace)
    own = load(files)
    assert found[0][1] == own[1] and (found[0][0] == own[0]).all()
    assert len(list((project / "cache").iterdir())) == 1


def test_a_giant_tif_is_refused_before_it_is_unpacked(tmp_path):
    giant = np.zeros((3000, 3000, 13), np.uint16)  # 234 MB
    imwrite(tmp_path / "x.tif", giant, photometric="minisblack", planarconfig="contig", compression="zstd")
    tracemalloc.start()
    with pytest.raises(UserError, match="is uint16 of shape .3000, 3000, 13. instead of uint16 .64, 64, 13."):
        read_image(str(tmp_path / "x.tif"), "ms")
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 10e6


def test_the_benchmark_streams_every_image_once(lists, monkeypatch):
    seen = []
    real = EuroSATDataset.__getitem__
    monkeypatch.setattr(
        EuroSATDataset, "__getitem__", lambda data, index: seen.extend(index.tolist()) or real(data, index)
    )
    part = benchmark.stream(3)
    for _ in range(3):
        part()
    assert sorted(seen) == list(range(3 * len(read_split(splits_dir("rgb"), "rgb", "train").files)))


def test_labels_are_the_alphabetical_order(lists):
    split = read_split(splits_dir("rgb"), "rgb", "train")
    assert list(CLASSES) == sorted(CLASSES) and set(split.labels) == set(range(10))
    assert all(f"/{CLASSES[label]}/" in file for file, label in zip(split.files, split.labels, strict=True))


def test_a_multispectral_patch_is_shown_as_its_jpeg(sample):
    """Cut off instead of rounded, the pictures were half a level too dark."""
    differences = []
    for name in CLASSES:
        for index in range(10):
            shown = displayed(read_image(str(sample / tif(name, index)), "ms"), "ms")
            differences.append((shown.astype(float) - read_image(str(sample / jpeg(name, index)), "rgb")).mean())
    assert abs(np.mean(differences)) < 0.1
