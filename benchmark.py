"""How fast everything is: each row measured side by side with what it is compared with, in turn, medians with spread.

Takes about ten minutes on 2 CPU cores; needs the lists and the images (both sets). Nothing is trained to an end, the
test list is not looked at.

reads   splits/<profile>/, the images, initial weights, test_metrics.json (for the accuracy beside the time)
writes  outputs/benchmark.json: rows with name, value, target, met, and how they came about
"""

import itertools
import json
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from dataset import IMAGE_SETS
from project import Setting, config, outputs_dir, run, shown, write_json

RGB = config.settings["course"]["rgb"]
LISTS = (1, 4, 16)  # times the course's list
CLASSIC_EPOCHS, CLASSIC_SIZE, CLASSIC_BATCH = 10, 224, 64  # what public solutions of this assignment do, on ResNet-18


def main() -> None:
    rows: list[dict] = []
    for measure in (training, against_the_recipe, prediction, decoding, growth):
        measure(rows)
        write_json(config.project_root / "outputs" / "benchmark.json", rows)
    print(f"wrote {shown(config.project_root / 'outputs' / 'benchmark.json')}")
    print("next: compare with the table in README.md")


def in_turn(*actions: Callable[[], object], rounds: int = 5) -> list[list[float]]:
    """Seconds of each action, `rounds` times A B A B …, after one round that is not counted."""
    seconds: list[list[float]] = [[] for _ in actions]
    for round_ in range(rounds + 1):
        for action, own in zip(actions, seconds, strict=True):
            start = time.perf_counter()
            action()
            if round_:
                own.append(time.perf_counter() - start)
    return seconds


def add(rows: list[dict], name: str, value: float, target: float, at_most: bool = False, **how: object) -> None:
    met = value <= target if at_most else value >= target
    rows.append({"name": name, "value": round(value, 4), "target": target, "met": met, **how})
    sign = "<=" if at_most else ">="
    details = ", ".join(f"{key} {item}" for key, item in how.items())
    print(f"{'met   ' if met else 'MISSED'} {name}: {value:.3g} ({sign} {target:g}); {details}", flush=True)


def scratch_folder() -> tempfile.TemporaryDirectory:
    cache = config.project_root / "cache"
    cache.mkdir(exist_ok=True)
    return tempfile.TemporaryDirectory(dir=cache)


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):.4g} ({min(values):.4g} to {max(values):.4g})"


def ratios(slow: list[float], fast: list[float]) -> float:
    """The median of the rounds' ratios: what drifts between rounds drops out."""
    return statistics.median(a / b for a, b in zip(slow, fast, strict=True))


# Training --------------------------------------------------------------------------------------------------------


def make_run(setting: Setting, images: int, folder: Path):
    """A training of the first images of the list, ready to do epochs; and its device."""
    import dataclasses

    import torch

    import training as loop
    from evaluation import prepare
    from models import build_network

    device = prepare()
    group = loop.Group(0, 1, device)
    data = loop.load_data("rgb", setting, group)
    data = dataclasses.replace(data, train_pixels=data.train_pixels[:images], train_labels=data.train_labels[:images])
    network = build_network(setting, setting.weights).to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(network.parameters(), lr=0.0, weight_decay=setting.weight_decay, fused=True)
    precision = loop.choose_precision(device)
    return loop.Run(folder, setting, data, group, network, optimizer, loop.Progress(), precision, {}, loop.Stop())


def epoch_of(run_) -> Callable[[], None]:
    def epoch() -> None:
        run_.progress.batch = 0
        run_.train_epoch()
        wait(run_.group.device)

    return epoch


def wait(device) -> None:
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize()


def training(rows: list[dict]) -> None:
    """The loop against its compute limit and against the classic loop."""
    import dataclasses

    import torch
    import torch.nn.functional as F

    setting = RGB[-1]
    images = 10 * setting.batch_size
    with scratch_folder() as folder:
        runs = {
            augmentation: make_run(dataclasses.replace(setting, augmentation=augmentation), images, Path(folder))
            for augmentation in ("mild", "strong")
        }
        run_ = runs["strong"]
        device, batches = run_.group.device, len(run_.batches())
        resident = torch.randn(setting.batch_size, 3, 64, 64, device=device).contiguous(
            memory_format=torch.channels_last
        )
        labels = run_.labels[: setting.batch_size]

        def limit() -> None:
            for _ in range(batches):
                with torch.autocast(device.type, torch.bfloat16, enabled=run_.precision == "bfloat16"):
                    loss = F.cross_entropy(run_.network(resident), labels, label_smoothing=setting.label_smoothing)
                loss.backward()
                run_.optimizer.step()
                run_.optimizer.zero_grad()
            wait(device)

        classic = classic_epoch(setting.backbone, setting.image_size, setting.batch_size, images)
        *own, bound, slow = in_turn(*map(epoch_of, runs.values()), limit, classic, rounds=11)
        name = f"{setting.backbone} at {setting.image_size} px, {device}"
        for augmentation, seconds in zip(runs, own, strict=True):
            how = {"loop": f"{images / statistics.median(seconds):.0f} images/s", "seconds": spread(seconds)}
            title = f"training loop / compute limit ({name}, {augmentation} augmentation)"
            add(rows, title, ratios(bound, seconds), 0.95, **how)
        target = 8 if device.type == "cuda" else 1.5
        title = f"training loop / classic loop ({name}, strong augmentation against flips)"
        add(rows, title, ratios(slow, own[-1]), target, **how, classic=spread(slow))


def classic_epoch(backbone: str, image_size: int, batch_size: int, images: int) -> Callable[[], None]:
    """The loop of the public solutions: PIL per image, transforms per sample, DataLoader workers, float32, NCHW.

    In a process of its own, as it would run: none of this program's settings of PyTorch and the C library apply to it.
    """
    process = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))
    process.submit(prepare_classic, backbone, image_size, batch_size, images).result()
    return lambda: process.submit(run_classic).result()


def prepare_classic(backbone: str, image_size: int, batch_size: int, images: int) -> None:
    import os

    import torch
    from PIL import Image

    from dataset import image_paths
    from engine.splits import read_split
    from models import torchvision_models

    # isort: split
    from torchvision import transforms

    split = read_split("rgb", "train")
    paths = image_paths("rgb", split.files)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    transform = transforms.Compose(
        [
            *(transforms.Resize((image_size, image_size)), transforms.RandomHorizontalFlip()),
            *(transforms.RandomVerticalFlip(), transforms.ToTensor()),
            transforms.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
        ]
    )

    class Classic(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return images

        def __getitem__(self, index: int):
            with Image.open(paths[index]) as image:
                return transform(image.convert("RGB")), int(split.labels[index])

    workers = min(4, os.cpu_count() or 1)
    loader = torch.utils.data.DataLoader(
        Classic(), batch_size, True, num_workers=workers, persistent_workers=True, multiprocessing_context="fork"
    )
    network = torchvision_models.get_model(backbone, weights=None, num_classes=10).to(device).train()
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4)

    def epoch() -> None:
        for pixels, labels in loader:
            loss = torch.nn.functional.cross_entropy(network(pixels.to(device)), labels.to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        wait(device)

    global run_prepared
    run_prepared = epoch


def run_classic() -> None:
    run_prepared()


def against_the_recipe(rows: list[dict]) -> None:
    """The default RGB run (all its settings) against ResNet-18 at 224 pixels, from seconds per image, same images."""
    from engine.splits import read_split

    images = len(read_split("rgb", "train").files)
    part = 2 * CLASSIC_BATCH
    own_part = 4 * part  # an epoch has a few milliseconds of its own, which two batches would show out of proportion
    classic = classic_epoch("resnet18", CLASSIC_SIZE, CLASSIC_BATCH, part)
    with scratch_folder() as folder:
        runs = [make_run(setting, own_part, Path(folder)) for setting in RGB]
        slow, *own = in_turn(classic, *(epoch_of(run_) for run_ in runs), rounds=3)
    recipe = statistics.median(slow) / part * images * CLASSIC_EPOCHS
    ours = [
        statistics.median(seconds) / own_part * images * setting.epochs
        for seconds, setting in zip(own, RGB, strict=True)
    ]
    try:
        accuracy = json.loads((outputs_dir("rgb") / "test_metrics.json").read_text())["accuracy"]
    except FileNotFoundError:
        accuracy = None
    add(
        rows,
        f"recipe of the public solutions / default RGB run, {images:,} training images",
        recipe / sum(ours),
        30,
        recipe_seconds=round(recipe),
        own_seconds=", ".join(f"{setting.name} {seconds:.0f}" for setting, seconds in zip(RGB, ours)),
        own_test_accuracy=accuracy,
        recipe_test_accuracy="not trained here",
    )


def prediction(rows: list[dict]) -> None:
    """Logits of the val list against forward passes alone."""
    import torch

    from evaluation import BATCH_SIZE, predict

    setting = RGB[-1]
    with scratch_folder() as folder:
        run_ = make_run(setting, 32, Path(folder))
    network, device, pixels = run_.network.eval(), run_.group.device, run_.data.val_pixels[: 5 * BATCH_SIZE]
    resident = torch.randn(BATCH_SIZE, 3, 64, 64, device=device).contiguous(memory_format=torch.channels_last)

    def forward() -> None:
        with torch.inference_mode():
            for _ in range(len(pixels) // BATCH_SIZE):
                network(resident).cpu()

    own, bound = in_turn(lambda: predict(network, pixels, run_.data.mean, run_.data.std), forward, rounds=11)
    speed = f"{len(pixels) / statistics.median(own):.0f} images/s"
    add(rows, f"prediction loop / forward only ({device})", ratios(bound, own), 0.95, loop=speed)


# Data ------------------------------------------------------------------------------------------------------------


def decoding(rows: list[dict]) -> None:
    """First decode against plain loops, and a warm cache against the first decode."""
    import numpy as np
    import skimage.io
    from PIL import Image

    from dataset import image_paths, load_images
    from engine.splits import read_split

    def plain_jpeg(path: str) -> np.ndarray:
        with Image.open(path) as image:
            return np.asarray(image)

    for task, reader, target in (("rgb", plain_jpeg, 1.8), ("ms", skimage.io.imread, 2.5)):
        files = read_split(task, "train").files
        bands = IMAGE_SETS["rgb"].bands if task == "rgb" else config.settings["course"]["ms"][0].bands
        with own_cache():
            cache = config.project_root / "cache"

            def first() -> None:
                for path in cache.glob("*.npy"):
                    path.unlink()
                load_images(task, files, bands)

            own, warm, plain = in_turn(
                first,
                lambda: load_images(task, files, bands),
                lambda: np.stack([reader(path) for path in image_paths(task, files)]),
                rounds=11,
            )
            how = {"images": len(files), "seconds": spread(own)}
            add(rows, f"plain loop / first decode ({task})", ratios(plain, own), target, **how)
            add(rows, f"first decode / warm cache ({task})", ratios(own, warm), 20, seconds=spread(warm))


class own_cache:
    """A project root of its own while it lasts, below the real one."""

    def __enter__(self) -> None:
        self.root = config.project_root
        self.folder = scratch_folder()
        (Path(self.folder.name) / "splits").symlink_to(self.root / "splits")
        config.project_root = Path(self.folder.name)

    def __exit__(self, *_: object) -> None:
        config.project_root = self.root
        self.folder.cleanup()


def stream(times: int) -> Callable[[], None]:
    """A function that reads and augments as many images as the list has: the next ones, in random order, of `times` lists."""
    import numpy as np
    import torch

    from augment import network_input, random_numbers
    from dataset import band_statistics, load_images
    from engine.splits import read_split
    from evaluation import batch_reader

    files = read_split("rgb", "train").files
    images = load_images("rgb", files * times, IMAGE_SETS["rgb"].bands).pixels
    mean, std = map(torch.from_numpy, band_statistics(images))
    read = batch_reader(images, torch.device("cpu"))
    random = torch.from_numpy(random_numbers(0, 0, len(images)))
    order = torch.from_numpy(np.random.default_rng(0).permutation(len(images)))
    parts = itertools.cycle(order.split(len(files)))

    def part() -> None:
        for batch in next(parts).split(32):
            network_input(read(batch), mean, std, "strong", random[batch])

    return part


def own_memory(times: int, root: Path) -> float:
    """MB of this process after streaming `times` lists, without the file's pages, which the system can drop."""
    config.project_root = root
    part = stream(times)
    for _ in range(times):
        part()
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1024


def growth(rows: list[dict]) -> None:
    """Seconds per image and own memory at 1, 4 and 16 times the list."""
    with own_cache():
        seconds = in_turn(*map(stream, LISTS), rounds=21)
        memory: list[list[float]] = [[] for _ in LISTS]
        for _ in range(3 if sys.platform.startswith("linux") else 0):
            for times, own in zip(LISTS, memory, strict=True):
                with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
                    own.append(process.submit(own_memory, times, config.project_root).result())
    for what, values in (("seconds", seconds), ("own memory", memory)):
        if values[0]:
            growing = max(ratios(own, values[0]) for own in values[1:])
            name = f"streaming as many images of {' / '.join(map(str, LISTS))} times the list: {what}, growth"
            how = " / ".join(f"{statistics.median(own):.3g}" for own in values)
            add(rows, name, growing, 1.1, at_most=True, **{"seconds" if values is seconds else "MB": how})


if __name__ == "__main__":
    run(main, __doc__)
