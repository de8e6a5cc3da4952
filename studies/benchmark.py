"""How fast everything is: each figure measured side by side with what it is compared with, in turn; medians with spread.

Run from the project root: python -m studies.benchmark. Takes about ten minutes on 2 CPU cores; needs the lists and the
images of both sets. Nothing is trained to an end, the test list is not looked at.

reads   splits/<profile>/{rgb,ms}/train.csv, the images, test_metrics.json (for the accuracy beside the time)
writes  outputs/benchmark.json: rows of name, value, target, met, and how they came about; cache/, emptied again
"""

import contextlib
import dataclasses
import functools
import itertools
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import skimage.io
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.optim import AdamW
from torch.utils.data import DataLoader, Dataset

from dataset import SIDE, EuroSATDataset, Split, image_paths, load_images
from engine.evaluation import BATCH_SIZE, in_order, predict
from engine.runtime import Processes, choose_device, choose_precision
from engine.splits import read_split
from engine.training import make_loader, make_optimizer, train_one_epoch
from models import average_of, build_model, torchvision_models
from project import CLASSES, cache_dir, config, outputs_dir, run, settings_of, shown, splits_dir, write_json
from setting import Setting
from studies.subject import RECIPE, summary

# isort: split
from torchvision import transforms  # after models.py, which sees to it that torchvision can be imported

CLASSIC_EPOCHS, CLASSIC_SIZE, CLASSIC_BATCH = 10, 224, 64  # what public solutions of this assignment do, on ResNet-18
LISTS = (1, 4, 16)  # how many times the list's images are streamed from


def main() -> None:
    path = config.project_root / "outputs" / "benchmark.json"
    rows = []
    for measure in (training, default_run, prediction, decoding, streaming):
        for row in measure():
            rows.append(row)
            write_json(path, rows)
    print(f"wrote {shown(path)}\nnext: compare with the table in docs/speed.md")


# Measuring -------------------------------------------------------------------------------------------------------


def in_turn(*actions: Callable[[], object], rounds: int) -> list[list[float]]:
    """Seconds of each action, `rounds` times A B A B …, after one round that is not counted."""
    seconds: list[list[float]] = [[] for _ in actions]
    for round_ in range(rounds + 1):
        for action, own in zip(actions, seconds, strict=True):
            start = time.perf_counter()
            action()
            if round_:
                own.append(time.perf_counter() - start)
    return seconds


def median_ratio(slow: list[float], fast: list[float]) -> float:
    """The median of the rounds' ratios: what drifts between rounds drops out."""
    return statistics.median(a / b for a, b in zip(slow, fast, strict=True))


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):.4g} ({min(values):.4g} to {max(values):.4g})"


def report(name: str, value: float, target: float, at_most: bool = False, **how: object) -> dict:
    """Print a row and return it: at least the target is wanted, or at most."""
    met = value <= target if at_most else value >= target
    verdict = f"{'met   ' if met else 'MISSED'} {name}: {value:.3g} ({'<=' if at_most else '>='} {target:g})"
    print(verdict, *(f"{key} {item}" for key, item in how.items()), sep="; ", flush=True)
    return {"name": name, "value": round(value, 4), "target": target, "met": met, **how}


@contextlib.contextmanager
def empty_cache() -> Iterator[Path]:
    """A cache folder that holds nothing yet, deleted at the end."""
    cache_dir().mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="benchmark-", dir=cache_dir()) as folder:
        yield Path(folder)


def training_images(task: str, images: int | None = None) -> Split:
    """The first images of the training list, and again from its start where it has fewer; the list without a number."""
    split = read_split(splits_dir(task), task, "train")
    rows = np.arange(len(split.files) if images is None else images) % len(split.files)
    return Split([split.files[row] for row in rows], split.labels[rows])


def wait(device: torch.device) -> None:
    """A GPU is given work and does it later: wait until it has."""
    if device.type == "cuda":
        torch.cuda.synchronize()


# Training --------------------------------------------------------------------------------------------------------


class Training:
    """An RGB setting ready to be trained on so many images, as `train_setting` makes it, but with random weights."""

    def __init__(self, setting: Setting, images: int, cache: Path) -> None:
        self.setting, self.processes = setting, Processes(0, 1, choose_device())
        self.device = self.processes.device
        how = {"augmentation": setting.augmentation, "seed": config.seed, "cache": cache, "device": self.device}
        self.data = EuroSATDataset(config.dataset_root, "rgb", training_images("rgb", images), setting.bands, **how)
        self.loader = make_loader(self.data, setting, self.processes)
        self.batches = self.loader.sampler
        self.model = build_model(setting, weights=None).to(self.device, memory_format=torch.channels_last)
        self.averaged = average_of(self.model, setting)
        self.optimizer = make_optimizer(self.model, setting)
        self.epochs = itertools.cycle(range(setting.epochs))
        resident = torch.randn(max(self.batches.sizes), len(setting.bands), SIDE, SIDE, device=self.device)
        self.resident = resident.contiguous(memory_format=torch.channels_last)

    def train_epoch(self) -> None:
        """The next epoch of the program's own loop; it ends with reading its loss, which waits for a GPU."""
        epoch = next(self.epochs)
        train_one_epoch(self.model, self.averaged, self.loader, self.optimizer, self.setting, epoch, self.processes)

    def compute_alone(self) -> None:
        """Forward, backward and optimizer step as often and with batches as large, on the same images over and over."""
        precision, smoothing = choose_precision(self.device), self.setting.label_smoothing
        self.model.train()
        for size in self.batches.sizes:
            with torch.autocast(self.device.type, precision, enabled=precision != torch.float32):
                logits = self.model(self.resident[:size])
                loss = F.cross_entropy(logits, self.data.labels[:size], label_smoothing=smoothing)
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
        wait(self.device)

    def forward_alone(self) -> None:
        self.model.eval()
        with torch.inference_mode():
            for size in self.batches.sizes:
                self.model(self.resident[:size])
        wait(self.device)


def training() -> Iterator[dict]:
    """The loop against its compute limit, for each RGB setting, and for the last one against the classic loop."""
    settings = settings_of("rgb")
    last = settings[-1]
    images = 10 * last.batch_size
    with empty_cache() as cache, classic_loop(last.backbone, last.image_size, last.batch_size, images) as classic:
        own = [Training(setting, images, cache) for setting in settings]
        # Each loop beside its own limit: what disturbs the machine for a few seconds disturbs both.
        pairs = [action for each in own for action in (each.train_epoch, each.compute_alone)]
        *seconds, slow = in_turn(*pairs, classic, rounds=11)
    device = own[-1].device
    for setting, loop, limit in zip(settings, seconds[::2], seconds[1::2], strict=True):
        about = f"{setting.backbone} at {setting.image_size} px, {device}, {setting.augmentation} augmentation"
        how = {"loop": f"{images / statistics.median(loop):.0f} images/s", "seconds": spread(loop)}
        yield report(f"training loop / compute limit ({about})", median_ratio(limit, loop), 0.95, **how)
    target = 8 if device.type == "cuda" else 1.5  # a GPU does nothing for a loop that waits for PIL
    name = f"training loop / classic loop ({about} against flips)"
    yield report(name, median_ratio(slow, loop), target, **how, classic=spread(slow))


def default_run() -> Iterator[dict]:
    """Training with all RGB settings against ten epochs of ResNet-18 at 224 pixels, from seconds per image."""
    settings, images = settings_of("rgb"), len(training_images("rgb").files)
    part, own_part = 2 * CLASSIC_BATCH, 8 * CLASSIC_BATCH  # ours: more, as an epoch has some milliseconds of its own
    with empty_cache() as cache, classic_loop("resnet18", CLASSIC_SIZE, CLASSIC_BATCH, part) as classic:
        own = [Training(setting, own_part, cache) for setting in settings]
        slow, *fast = in_turn(classic, *(each.train_epoch for each in own), rounds=3)
    recipe = [seconds * images / part * CLASSIC_EPOCHS for seconds in slow]
    runs = {
        setting.name: [seconds * images / own_part * setting.epochs for seconds in rounds]
        for setting, rounds in zip(settings, fast, strict=True)
    }
    metrics = outputs_dir("rgb") / "test_metrics.json"
    how = {
        "settings": summary(settings),
        "recipe_seconds": round(statistics.median(recipe)),
        "own_seconds": ", ".join(f"{name} {statistics.median(seconds):.0f}" for name, seconds in runs.items()),
        "own_test_accuracy": json.loads(metrics.read_text())["accuracy"] if metrics.exists() else None,
        "recipe_test_accuracy": "not trained here",
    }
    yield report(
        f"{RECIPE}, {images:,} training images",
        median_ratio(recipe, [sum(round_) for round_ in zip(*runs.values())]),
        30,
        **how,
    )


def prediction() -> Iterator[dict]:
    """Prediction as for val and test against forward passes of batches of the same size alone."""
    setting = dataclasses.replace(settings_of("rgb")[-1], augmentation="none", batch_size=BATCH_SIZE)
    with empty_cache() as cache:
        own = Training(setting, 5 * BATCH_SIZE, cache)
        loop, limit = in_turn(lambda: predict(own.model, in_order(own.data)), own.forward_alone, rounds=11)
    speed = f"{len(own.data) / statistics.median(loop):.0f} images/s"
    yield report(f"prediction loop / forward only ({own.device})", median_ratio(limit, loop), 0.95, loop=speed)


class ClassicDataset(Dataset):
    """One image at a time through PIL and torchvision's transforms, as the public solutions do."""

    def __init__(self, size: int, images: int) -> None:
        self.split = training_images("rgb", images)
        self.paths = image_paths(config.dataset_root, "rgb", self.split.files)
        flips = transforms.RandomHorizontalFlip(), transforms.RandomVerticalFlip()
        normalize = transforms.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
        self.transform = transforms.Compose([transforms.Resize((size, size)), *flips, transforms.ToTensor(), normalize])

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        with Image.open(self.paths[index]) as image:
            return self.transform(image.convert("RGB")), int(self.split.labels[index])


@contextlib.contextmanager
def classic_loop(*arguments: object) -> Iterator[Callable[[], None]]:
    """A function that trains an epoch as the public solutions do; arguments as `classic_training` takes them.

    In a process of its own: none of this program's settings of PyTorch and the C library apply to it.
    """
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
        yield lambda: process.submit(train_classic_epoch, *arguments).result()


@functools.cache  # made once in its process, so that epochs alone are measured
def classic_training(backbone: str, size: int, batch_size: int, images: int) -> tuple[nn.Module, AdamW, DataLoader]:
    """What the public solutions train: float32, NCHW, images from worker processes."""
    model = torchvision_models.get_model(backbone, weights=None, num_classes=len(CLASSES))
    model.to("cuda" if torch.cuda.is_available() else "cpu").train()
    workers = {"num_workers": min(4, os.cpu_count() or 1), "multiprocessing_context": "fork"}
    loader = DataLoader(ClassicDataset(size, images), batch_size, shuffle=True, persistent_workers=True, **workers)
    return model, AdamW(model.parameters(), lr=1e-4), loader


def train_classic_epoch(*arguments: object) -> None:
    model, optimizer, loader = classic_training(*arguments)
    device = next(model.parameters()).device
    for images, labels in loader:
        loss = F.cross_entropy(model(images.to(device)), labels.to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    wait(device)


# Data ------------------------------------------------------------------------------------------------------------


def decoding() -> Iterator[dict]:
    """The first decode of a list against a plain loop over its files, and a warm cache against the first decode."""
    readers = ("rgb", lambda path: np.asarray(Image.open(path)), 1.8), ("ms", skimage.io.imread, 2.5)
    for task, reader, target in readers:
        root, files, bands = config.dataset_root, training_images(task).files, settings_of(task)[0].bands
        with empty_cache() as cache:

            def first_decode() -> None:
                for path in cache.glob("*.npy"):
                    path.unlink()
                load_images(root, task, files, bands, cache)

            first, warm, plain = in_turn(
                first_decode,
                lambda: load_images(root, task, files, bands, cache),
                lambda: np.stack([reader(path) for path in image_paths(root, task, files)]),
                rounds=11,
            )
        how = {"images": len(files), "seconds": spread(first)}
        yield report(f"plain loop / first decode ({task})", median_ratio(plain, first), target, **how)
        yield report(f"first decode / warm cache ({task})", median_ratio(first, warm), 20, seconds=spread(warm))


def stream(times: int, cache: Path | None = None) -> Callable[[], None]:
    """A function that reads and augments as many images as the list has, from `times` times the list.

    They come in random order, the next ones with each call: each once in `times` calls.
    """
    images = len(training_images("rgb").files)
    split = training_images("rgb", times * images)
    data = EuroSATDataset(config.dataset_root, "rgb", split, augmentation="strong", cache=cache)
    parts = itertools.cycle(torch.randperm(len(data), generator=torch.Generator().manual_seed(0)).split(images))

    def next_part() -> None:
        for _ in DataLoader(data, sampler=next(parts).split(32), batch_size=None):
            pass

    return next_part


def own_memory(times: int, cache: Path) -> float:
    """MB of this process after streaming `times` lists, without the file's pages, which the system can drop."""
    next_part = stream(times, cache)
    for _ in range(times):
        next_part()
    return int(Path("/proc/self/status").read_text().split("RssAnon:")[1].split()[0]) / 1024


def streaming() -> Iterator[dict]:
    """Time of as many images, and memory of a process, at 4 and 16 times the list against the list itself."""
    with empty_cache() as cache:
        seconds = in_turn(*(stream(times, cache) for times in LISTS), rounds=21)
        memory: list[list[float]] = [[] for _ in LISTS]
        for times, own in [*zip(LISTS, memory, strict=True)] * (3 if sys.platform.startswith("linux") else 0):
            with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
                own.append(process.submit(own_memory, times, cache).result())
    for what, unit, values in (("seconds", "seconds", seconds), ("own memory", "MB", memory)):
        if values[0]:
            growth = max(median_ratio(own, values[0]) for own in values[1:])
            medians = " / ".join(f"{statistics.median(own):.3g}" for own in values)
            name = f"streaming as many images of {' / '.join(map(str, LISTS))} times the list: {what}, growth"
            yield report(name, growth, 1.1, at_most=True, **{unit: medians})


if __name__ == "__main__":
    run(main, __doc__)
