"""How fast is the program? Each figure is measured beside what it is compared with, in turn; medians with their range.

Run from the project root: python -m studies.benchmark. It takes some ten minutes on 2 CPU cores and needs lists and images of
both sets. It trains nothing to the end and does not read the test list.

reads   splits/<profile>/{rgb,ms}/train.csv, the images; test_metrics.json for the accuracy beside the time
writes  outputs/benchmark.json: rows with name, value, target, met, and details
"""

import contextlib
import functools
import itertools
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from statistics import median

from base.command_line import run
from base.files import read_json, reading, write_json
from base.project import CLASSES, MS, RGB, Task, config, display_path
from base.setting import Setting

import numpy as np
import skimage.io
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.optim import AdamW
from torch.utils.data import DataLoader, Dataset

from dataset import SIDE, EuroSATDataset, Split, image_paths, load_images
from engine.results import BATCH_SIZE, predict
from engine.runtime import choose_device, choose_precision
from engine.splits import complete_patches, read_split
from engine.training import epoch_batches, make_optimizer, train_one_epoch
from models import build_model, torchvision_models
from studies.subject import RECIPE, setting_summaries

# isort: split
from torchvision import transforms  # after models.py, which makes torchvision importable

CLASSIC_EPOCHS, CLASSIC_SIZE, CLASSIC_BATCH = 10, 224, 64  # public solutions of this assignment, with ResNet-18


def main() -> None:
    path = config.project_root / "outputs" / "benchmark.json"
    rows = []
    for row in itertools.chain(training_loop(), default_run(), prediction_loop(), decoding()):
        rows.append(row)
        write_json(path, rows)
    print(f"wrote {display_path(path)}\nnext: compare it with the table in docs/speed.md")


def measure_in_turn(*actions: Callable[[], object], rounds: int) -> list[list[float]]:
    """Seconds of each action, in the order A B A B …, after one round that does not count."""
    seconds: list[list[float]] = [[] for _ in actions]
    for round_ in range(rounds + 1):
        for action, times in zip(actions, seconds, strict=True):
            start = time.perf_counter()
            action()
            if round_:
                times.append(time.perf_counter() - start)
    return seconds


def median_ratio(slow: list[float], fast: list[float]) -> float:
    """The median of the ratios of the rounds, which a slow drift of the machine does not affect."""
    return median(a / b for a, b in zip(slow, fast, strict=True))


def median_and_range(values: list[float]) -> str:
    return f"{median(values):.4g} ({min(values):.4g} to {max(values):.4g})"


def benchmark_row(name: str, value: float, target: float, **details: object) -> dict:
    """Print a row and return it. It is met if the value is at least the target."""
    met = value >= target
    verdict = f"{'met   ' if met else 'MISSED'} {name}: {value:.3g} (>= {target:g})"
    print(verdict, *(f"{key} {item}" for key, item in details.items()), sep="; ", flush=True)
    return {"name": name, "value": round(value, 4), "target": target, "met": met, **details}


def training_images(task: Task, images: int | None = None) -> Split:
    """The first images of the training list, from its start again if it has fewer; None: the whole list."""
    split = read_split(task.splits, task, "train")
    rows = np.arange(images or len(split.files)) % len(split.files)
    return Split([split.files[row] for row in rows], split.labels[rows])


def wait_for_gpu(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


class Training:
    """An RGB setting ready to train on this many images, as in `train_setting`, but with random weights."""

    def __init__(self, setting: Setting, images: int) -> None:
        self.setting, self.device = setting, choose_device()
        how = {"augmentation": setting.augmentation, "seed": config.seed, "device": self.device}
        self.data = EuroSATDataset(config.dataset_root, RGB, training_images(RGB, images), setting.bands, **how)
        self.sizes = [len(batch) for batch in epoch_batches(images, setting.batch_size, config.seed, 0)]
        self.model = build_model(setting, weights=None).to(self.device, memory_format=torch.channels_last)
        self.optimizer = make_optimizer(self.model, setting)
        self.epochs = itertools.cycle(range(setting.epochs))
        batch = torch.randn(max(self.sizes), len(setting.bands), SIDE, SIDE, device=self.device)
        self.batch = batch.contiguous(memory_format=torch.channels_last)

    def train_epoch(self) -> None:
        """The next epoch of the program's loop. It reads its loss at the end, which waits for a GPU."""
        train_one_epoch(self.model, self.data, self.optimizer, self.setting, next(self.epochs))

    def compute_alone(self) -> None:
        """As many steps with batches of the same sizes, always with the same images: forward, backward, optimizer."""
        precision, smoothing = choose_precision(self.device), self.setting.label_smoothing
        self.model.train()
        for size in self.sizes:
            with torch.autocast(self.device.type, precision, enabled=precision != torch.float32):
                logits = self.model(self.batch[:size])
                loss = F.cross_entropy(logits, self.data.labels[:size], label_smoothing=smoothing)
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
        wait_for_gpu(self.device)

    def forward_alone(self) -> None:
        self.model.eval()
        with torch.inference_mode():
            for size in self.sizes:
                self.model(self.batch[:size])
        wait_for_gpu(self.device)


def training_loop() -> Iterator[dict]:
    """The loop against its compute limit, for each RGB setting; the last setting also against the classic loop."""
    settings = RGB.settings
    last = settings[-1]
    images = 10 * last.batch_size
    with classic_loop(last.backbone, last.image_size, last.batch_size, images) as classic:
        trainings = [Training(setting, images) for setting in settings]
        # Each loop is followed by its limit, so that a disturbance of a few seconds affects both.
        pairs = [action for each in trainings for action in (each.train_epoch, each.compute_alone)]
        *seconds, slow = measure_in_turn(*pairs, classic, rounds=11)
    device = trainings[-1].device
    for setting, loop, limit in zip(settings, seconds[::2], seconds[1::2], strict=True):
        what = f"{setting.backbone} at {setting.image_size} px, {device}, {setting.augmentation} augmentation"
        details = {"loop": f"{images / median(loop):.0f} images/s", "seconds": median_and_range(loop)}
        yield benchmark_row(f"training loop / compute limit ({what})", median_ratio(limit, loop), 0.95, **details)
    target = 8 if device.type == "cuda" else 1.5  # a loop that waits for PIL leaves a GPU idle
    name = f"training loop / classic loop ({what} against flips)"
    yield benchmark_row(name, median_ratio(slow, loop), target, **details, classic=median_and_range(slow))


def default_run() -> Iterator[dict]:
    """Training with all RGB settings against ten epochs of ResNet-18 at 224 pixels, from seconds per image."""
    settings, images = RGB.settings, len(training_images(RGB).files)
    # More images for our loop, because each epoch costs it some milliseconds.
    classic_part, part = 2 * CLASSIC_BATCH, 8 * CLASSIC_BATCH
    with classic_loop("resnet18", CLASSIC_SIZE, CLASSIC_BATCH, classic_part) as classic:
        trainings = [Training(setting, part) for setting in settings]
        slow, *fast = measure_in_turn(classic, *(each.train_epoch for each in trainings), rounds=3)
    recipe = [seconds * images / classic_part * CLASSIC_EPOCHS for seconds in slow]
    runs = {
        setting.name: [seconds * images / part * setting.epochs for seconds in rounds]
        for setting, rounds in zip(settings, fast, strict=True)
    }
    accuracy, path = None, RGB.outputs / "test_metrics.json"
    if path.exists():
        with reading(path, "run: python predict_test.py rgb"):
            accuracy = read_json(path)["accuracy"]
    details = {
        "settings": setting_summaries(settings),
        "recipe_seconds": round(median(recipe)),
        "own_seconds": ", ".join(f"{name} {median(seconds):.0f}" for name, seconds in runs.items()),
        "own_test_accuracy": accuracy,
        "recipe_test_accuracy": "not trained here",
    }
    ratio = median_ratio(recipe, [sum(seconds) for seconds in zip(*runs.values(), strict=True)])
    yield benchmark_row(f"{RECIPE}, {images:,} training images", ratio, 30, **details)


def prediction_loop() -> Iterator[dict]:
    """Prediction as on val and test, against the forward passes alone, with batches of the same size."""
    setting = replace(RGB.settings[-1], augmentation="none", batch_size=BATCH_SIZE)
    ready = Training(setting, 5 * BATCH_SIZE)
    loop, limit = measure_in_turn(lambda: predict(ready.model, ready.data), ready.forward_alone, rounds=11)
    speed = f"{len(ready.data) / median(loop):.0f} images/s"
    yield benchmark_row(f"prediction loop / forward only ({ready.device})", median_ratio(limit, loop), 0.95, loop=speed)


class ClassicDataset(Dataset):
    """One image at a time through PIL and torchvision's transforms, as in the public solutions."""

    def __init__(self, size: int, images: int) -> None:
        self.split = training_images(RGB, images)
        self.paths = image_paths(config.dataset_root, RGB, self.split.files)
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
    """A function that trains one epoch as in the public solutions; arguments as for `classic_training`.

    It runs in another process, to which this program's settings of PyTorch and the C library do not apply.
    """
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
        yield lambda: process.submit(train_classic_epoch, *arguments).result()


@functools.cache  # made once in its process, so that only epochs are measured
def classic_training(backbone: str, size: int, batch_size: int, images: int) -> tuple[nn.Module, AdamW, DataLoader]:
    """Network, optimizer and loader of the public solutions: float32, NCHW, images from worker processes."""
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
    wait_for_gpu(device)


def decoding() -> Iterator[dict]:
    """Decoding a list against a plain loop over its files, without any checks."""
    readers = (RGB, lambda path: np.asarray(Image.open(path)), 1.8), (MS, skimage.io.imread, 0.8)
    for task, reader, target in readers:
        root, files, bands = config.dataset_root, training_images(task).files, task.settings[0].bands
        seconds, plain = measure_in_turn(
            lambda: load_images(root, task, files, bands),
            lambda: np.stack([reader(path) for path in image_paths(root, task, files)]),
            rounds=11,
        )
        whole = round(median(seconds) / len(files) * len(complete_patches()), 1)
        details = {"images": len(files), "seconds": median_and_range(seconds), "seconds_for_all_images": whole}
        yield benchmark_row(f"plain loop / decoding ({task.name})", median_ratio(plain, seconds), target, **details)


if __name__ == "__main__":
    run(main, __doc__)
