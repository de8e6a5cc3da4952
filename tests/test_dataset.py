"""Images become what a network sees: the right bands, one path for every reader, augmentation by image."""

import math
import tracemalloc

from base.errors import UserError
from base.project import CLASSES, MS, MS_BANDS, RGB, config

import numpy as np
import pytest
import torch
from conftest import jpeg, tif
from PIL import Image
from tifffile import TiffFile, imwrite
from torch.utils.data import DataLoader

import dataset
from augment import AUGMENTATIONS, CHANGES, RANDOM_NUMBERS, band_statistics, random_numbers
from dataset import EuroSATDataset, displayed_image, load_images, read_image
from engine import runtime
from engine.splits import read_split
from engine.training import epoch_batches

PIXELS = np.random.default_rng(0).integers(0, 65536, (64, 64, 13), dtype=np.uint16)


@pytest.fixture
def lists(here):
    here.run("split_data.py")


def dataset_of(task, part, bands=None, augmentation="none") -> EuroSATDataset:
    train, split = (read_split(task.splits, task, name) for name in ("train", part))
    statistics = EuroSATDataset(config.dataset_root, task, train, bands).statistics
    return EuroSATDataset(config.dataset_root, task, split, bands, statistics, augmentation)


def test_bands_are_addressed_by_name(own_sample):
    """In a tif whose bands hold their index: B8A is the last, B10 the tenth of the file."""
    pixels = np.broadcast_to(np.arange(13, dtype=np.uint16), (64, 64, 13))
    imwrite(own_sample / tif("Forest"), pixels, photometric="minisblack", planarconfig="contig")
    pixels = load_images(own_sample, MS, [tif("Forest")], ("B8A", "B04", "B08", "B10", "B11", "B01"))
    assert pixels[0, 5, 7].tolist() == [12, 3, 7, 9, 10, 0]
    with pytest.raises(UserError, match=r"unknown band 'B8' .*known: B01, .*, B8A"):
        load_images(own_sample, MS, [tif("Forest")], ["B8"])


def test_bands_are_physically_right(sample):
    """B10 (cirrus) is near 10; over forest B8A is near B08 and far above red."""
    forest = read_image(f"{sample}/{tif('Forest')}", MS).astype(float).mean((0, 1))
    band = dict(zip(MS_BANDS, forest, strict=True))
    assert band["B10"] < 50 and abs(band["B8A"] / band["B08"] - 1) < 0.2 and band["B8A"] > 3 * band["B04"]


@pytest.mark.parametrize(
    "options",
    [
        *({"compression": method} for method in ("deflate", "lzw", "zstd")),
        {"tile": (32, 32)},
        {"rowsperstrip": 4},
        {"planarconfig": "separate"},
        {"planarconfig": "separate", "tile": (32, 32), "compression": "deflate", "predictor": True},
        {"byteorder": ">"},
    ],
)
def test_any_encoding_of_a_tif_gives_the_same_pixels(tmp_path, options):
    separate = options.get("planarconfig") == "separate"
    stored = PIXELS.transpose(2, 0, 1) if separate else PIXELS
    imwrite(tmp_path / "x.tif", stored, photometric="minisblack", **{"planarconfig": "contig", **options})
    assert (read_image(str(tmp_path / "x.tif"), MS) == PIXELS).all()


@pytest.mark.parametrize(
    "pixels, options",
    [
        (PIXELS[..., :3], {}),
        (np.concatenate([PIXELS, PIXELS[..., :1]], axis=2), {}),
        (PIXELS.astype(np.int16), {}),
        (PIXELS.astype(np.float32), {}),
        ((PIXELS / 65535).astype(np.float16), {}),
        (np.full_like(PIXELS, np.nan, dtype=np.float32), {}),
        (np.stack([PIXELS, PIXELS]), {}),
        (PIXELS.transpose(0, 2, 1).reshape(64, -1), {}),  # planes as rows
        (PIXELS.transpose(2, 0, 1), {"planarconfig": None}),  # a page for each band
        (PIXELS.transpose(2, 0, 1), {"planarconfig": None, "volumetric": True, "tile": (1, 64, 64)}),  # depth
    ],
    ids=["3 bands", "14 bands", "int16", "float32", "float16", "nan", "2 images", "rows", "13 pages", "depth"],
)
def test_a_tif_of_another_kind_is_refused(tmp_path, pixels, options):
    imwrite(tmp_path / "x.tif", pixels, **{"photometric": "minisblack", "planarconfig": "contig", **options})
    with pytest.raises(UserError, match=r"x\.tif is damaged.*uint16"):
        read_image(str(tmp_path / "x.tif"), MS)


def test_a_tif_whose_header_contradicts_its_strips_is_refused(tmp_path):
    """It says plane by plane, and lies pixel by pixel: its pixels would be scrambled."""
    imwrite(tmp_path / "x.tif", np.zeros((64, 64, 13), np.uint16), photometric="minisblack", planarconfig="contig")
    with TiffFile(tmp_path / "x.tif", mode="r+b") as file:
        file.pages.first.tags["PlanarConfiguration"].overwrite(2)
    with pytest.raises(UserError, match="contradict"):
        read_image(str(tmp_path / "x.tif"), MS)


def test_a_giant_tif_is_refused_before_it_is_decoded(tmp_path):
    giant = np.zeros((3000, 3000, 13), np.uint16)  # 234 MB
    imwrite(tmp_path / "x.tif", giant, photometric="minisblack", planarconfig="contig", compression="zstd")
    tracemalloc.start()
    with pytest.raises(UserError, match="3000, 3000, 13"):
        read_image(str(tmp_path / "x.tif"), MS)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 10e6


@pytest.mark.parametrize("share", [0, 0.02, 0.1, 0.5, 0.9, 0.999])
def test_a_truncated_image_is_refused(sample, tmp_path, share):
    for task, file in ((RGB, jpeg("River")), (MS, tif("River"))):
        whole = (sample / file).read_bytes()
        (tmp_path / "x").write_bytes(whole[: int(len(whole) * share)])
        with pytest.raises(UserError, match="damaged"):
            read_image(str(tmp_path / "x"), task)


def test_a_multispectral_patch_is_displayed_as_its_jpeg(sample):
    """Cut off instead of rounded, the pictures would be half a level too dark. JPEGs are read as Pillow reads them."""
    differences = []
    for name in CLASSES:
        displayed = displayed_image(read_image(str(sample / tif(name)), MS), MS)
        pixels = read_image(str(sample / jpeg(name)), RGB)
        assert (pixels == np.asarray(Image.open(sample / jpeg(name)))).all()
        differences.append((displayed.astype(float) - pixels).mean())
    assert abs(np.mean(differences)) < 0.1


def test_worker_processes_decode_the_same_and_name_a_damaged_image(own_sample, monkeypatch):
    """Long lists of tifs are decoded by them. They draw no random numbers of torch."""
    files, before = [tif(name) for name in CLASSES], torch.random.get_rng_state()
    expected = load_images(own_sample, MS, files, ("B8A", "B04"))
    monkeypatch.setattr(dataset, "LONG_LIST", 5)
    monkeypatch.setattr(dataset, "CHUNK", 3)
    assert (load_images(own_sample, MS, files, ("B8A", "B04")) == expected).all()
    assert torch.equal(torch.random.get_rng_state(), before)
    (own_sample / files[7]).write_bytes(b"nothing")
    with pytest.raises(UserError, match=files[7]):
        load_images(own_sample, MS, files, ("B04",))


@pytest.mark.parametrize("task, bands", [(RGB, RGB.bands), (MS, ("B04", "B03", "B02", "B8A", "B11", "B12"))])
def test_every_way_to_read_gives_the_same_tensors(lists, task, bands):
    """Image by image, any DataLoader with workers, and whole batches as in training: bit for bit."""
    data = dataset_of(task, "val", bands)
    one_by_one = torch.stack([data[i][0] for i in range(len(data))])
    labels = [data[i][1] for i in range(len(data))]
    assert labels == data.split.labels.tolist() and all(type(label) is int for label in labels)
    assert one_by_one.shape == (20, len(bands), 64, 64) and one_by_one.dtype == torch.float32
    assert torch.equal(data[np.int64(3)][0], one_by_one[3])
    for batches in (DataLoader(data, batch_size=7, num_workers=2), [data[list(range(20))]]):
        assert torch.equal(one_by_one, torch.cat([images for images, _ in batches]))
        assert torch.cat([batch_labels for _, batch_labels in batches]).tolist() == labels
    for indices in epoch_batches(20, 7, seed=0, epoch=0):
        images, batch_labels = data[indices]
        assert torch.equal(images, one_by_one[indices]) and batch_labels.tolist() == [labels[i] for i in indices]


def test_images_on_a_gpu_have_the_same_bits(lists):
    """CUDA cannot index uint16, so the pixels lie there as int16."""
    data = dataset_of(MS, "val")
    before = data[[3, 1, 4]][0]
    data._on_gpu = torch.from_numpy(np.array(data.pixels.view(np.int16)))
    assert torch.equal(data[[3, 1, 4]][0], before)


def test_values_are_scaled_to_0_1_and_standardised_with_the_training_lists_statistics(lists):
    files = read_split(MS.splits, MS, "train").files
    pixels = load_images(config.dataset_root, MS, files, ("B04", "B10"))
    mean, std = band_statistics(pixels)
    values = pixels.reshape(-1, 2) / 65535
    assert np.allclose(mean, values.mean(0), rtol=1e-5) and np.allclose(std, values.std(0), rtol=1e-4)
    image, _ = dataset_of(MS, "test", ("B04", "B10"))[3]
    raw = load_images(config.dataset_root, MS, read_split(MS.splits, MS, "test").files[3:4], ("B04", "B10"))[0]
    assert np.allclose(image.permute(1, 2, 0).numpy(), (raw / 65535 - mean) / std, atol=1e-4)


@pytest.mark.parametrize("augmentation", ["none", "mild", "strong", "robust"])
def test_augmentation_depends_on_seed_epoch_and_image_alone(lists, augmentation):
    data = dataset_of(RGB, "train", augmentation=augmentation)
    data.epoch = 3
    whole = torch.stack([data[i][0] for i in range(len(data))])
    assert torch.equal(data[[5, 0, 59, 17]][0], whole[[5, 0, 59, 17]])
    workers = torch.cat([images for images, _ in DataLoader(data, batch_size=9, num_workers=2)])
    assert torch.equal(workers, whole)
    data.epoch = 4
    assert torch.equal(data[list(range(60))][0], whole) == (augmentation == "none")
    assert not np.array_equal(random_numbers(1, 3, 5), random_numbers(2, 3, 5))


def test_mild_mirrors_and_strong_does_more():
    image = torch.arange(16.0).reshape(1, 1, 4, 4)
    seen = {
        tuple(AUGMENTATIONS["mild"](image, torch.rand(1, RANDOM_NUMBERS), 1, 1).flatten().tolist()) for _ in range(99)
    }
    flips = (image, image.flip(2), image.flip(3), image.flip(2).flip(3))
    assert seen == {tuple(flip.flatten().tolist()) for flip in flips}

    def strong(**changed):
        """With 0.5 nothing is flipped, turned, zoomed, shifted or brightened; `changed` sets other columns."""
        random = torch.full((1, RANDOM_NUMBERS), 0.5)
        for column, value in changed.items():
            random[:, int(column[1:])] = value
        return AUGMENTATIONS["strong"](image, random, torch.ones(1, 1, 1), 1)

    assert torch.allclose(strong(), image, atol=1e-5)
    assert torch.allclose(strong(_2=0), image.transpose(2, 3), atol=1e-5)
    assert torch.allclose(strong(_7=1), image * 1.1, atol=1e-4)
    assert not torch.allclose(strong(_3=0, _4=1), image, atol=0.1)


def test_robust_leaves_more_than_half_of_the_images_as_strong_does_and_changes_the_others_in_five_ways():
    images, std = (
        torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)).expand(500, -1, -1, -1),
        torch.ones(3, 1, 1),
    )
    random = torch.from_numpy(random_numbers(1, 0, 500))
    plain = AUGMENTATIONS["strong"](images, random, std, 255)
    unchanged = (AUGMENTATIONS["robust"](images, random, std, 255) == plain).all(dim=(1, 2, 3)).float().mean()
    assert 0.62 < unchanged < 0.75  # 0.5 + 0.5 times the share that none of the five chooses

    def alone(number: int, strength: float, highest: int = 255) -> torch.Tensor:
        """The first image with only this change; the numbers 0 to 4 are in the order of CHANGES."""
        chosen = torch.full((1, RANDOM_NUMBERS), 0.5)
        chosen[:, -9], chosen[:, -8:-3], chosen[:, -8 + number] = 0, 1, strength * CHANGES[number][1]
        return AUGMENTATIONS["robust"](images[:1], chosen, std, highest)

    still = AUGMENTATIONS["strong"](images[:1], torch.full((1, RANDOM_NUMBERS), 0.5), std, 255)
    assert torch.allclose(alone(0, 0.0), still * math.exp(-0.9)) and (alone(0, 0.99) > still).all()
    for smooth in (1, 2):
        assert torch.allclose(alone(smooth, 0.0), still) and alone(smooth, 0.99).std() < 0.6 * still.std()
    assert 0.15 < (alone(3, 0.99) - still).std() < 0.25
    assert torch.equal((alone(4, 0.99) * 255).round() / 255, alone(4, 0.99)) and not torch.allclose(
        alone(4, 0.99), still
    )
    assert torch.equal(alone(4, 0.99, highest=65535), still)  # reflectances do not become JPEGs


def test_seeding_repeats_python_numpy_and_torch():
    import random

    draws = []
    for seed in (1, 1, 2):
        runtime.seed_everything(seed)
        draws.append((random.random(), np.random.random(), torch.rand(1).item()))
    assert draws[0] == draws[1] and all(a != b for a, b in zip(draws[0], draws[2], strict=True))
