"""What do resolution, training time and `robust` bring? Settings compared on val and on spare images. The test pool stays closed.

Run from the project root: python -m studies.search. Trains the settings in QUEUE below one after another (none for six bands).
It can be stopped at any time; when started again it resumes, and skips the runs that are finished. Spare images are those of
the train pool that are in no list, nor in a test list of `published` or `spatial`. If the train list takes the whole pool (six
bands), there are none. The corruptions are those of studies/corruptions.py.

reads   splits/<profile>/<task>/, the images, the initial weights; outputs/benchmark.json if it exists
writes  outputs/<profile>/<task>/search/: table.csv with a row for each run, frontier.png with accuracy against training time,
        study.json, a folder for each run
"""

import itertools
import math
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

from base.command_line import run
from base.files import read_csv, read_json, reading, write_csv
from base.project import RGB, TASKS, Task, config
from base.setting import Setting

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

from dataset import EuroSATDataset, Split, find_images
from engine.checkpoint import best_epoch, run_hash
from engine.final_model import load_weights
from engine.metrics import accuracy_interval
from engine.plots import COLOURS, save
from engine.runtime import environment, training_session
from engine.splits import complete_patches, make_pools, make_split, read_splits
from studies.corruptions import UNSEEN, corruptions
from studies.subject import RECIPE, percent, predict_pixels, setting_summaries, train_run, write_study

SPARE = 4000  # images at most; at an accuracy of 97.5 % chance alone is ± 0.5 points
CORRUPTED = 1000  # of them
SHOWN = ("val", "one view", "all views", "corrupted", "worst", *UNSEEN)  # of `summary`, in percent
HEADER = [
    *("run", "seed", "device", "seconds", "best_epoch", "val_accuracy", "spare_images", "spare_one_view", "spare"),
    *("corrupted", "wrong", "key"),  # "noise of 5/255: 0.945, …", all views; the spare images that all views get wrong
]

_BASELINE = Setting(
    "strong_128_16", "strong", epochs=16, image_size=128, views=8
)  # config.py had it until November 2026
_COMPARED = [_BASELINE, *RGB.of_profile("course").settings]
# What is trained, with which seed: 0 is the seed in config.py, 1 the next number, …
QUEUE: dict[str, list[tuple[Setting, int]]] = {
    "rgb": [
        *((setting, seed) for seed in range(3) for setting in _COMPARED),
        (replace(_BASELINE, name="strong_64_10", epochs=10, image_size=64, batch_size=64), 0),
    ],
    "ms": [],
}


def main(tasks: list[Task]) -> None:
    for task in (task for task in tasks if QUEUE[task.name]):
        folder = task.outputs / "search"
        with training_session(folder) as device:
            lists = read_splits(task.splits, task)
            spare = spare_images(task, lists)
            for setting, number in QUEUE[task.name]:
                run_folder = folder / f"{setting.name}-{number}"
                checkpoint = train_run(setting, task, lists, config.seed + number, run_folder, device)
                add_row(folder / "table.csv", setting, checkpoint, task, spare, device)
            write_search_study(task, folder)


def spare_images(task: Task, lists: dict[str, Split]) -> Split:
    """At most SPARE patches of the train pool that exist and are in no list, drawn with the split's seed."""
    listed = {patch for split in lists.values() for patch in split.patches}
    present = find_images(config.dataset_root, task) or {}
    rows = complete_patches()
    left = [
        patch
        for patch in make_pools(rows, config.split_seed)["train"]
        if patch in present and patch not in listed and "test" not in (rows[patch]["published"], rows[patch]["spatial"])
    ]
    order = np.random.default_rng(config.split_seed).permutation(len(left))
    return make_split(task, [left[index] for index in order[:SPARE]])


def add_row(path: Path, setting: Setting, checkpoint: dict, task: Task, spare: Split, device: torch.device) -> None:
    """Measure the best epoch of a finished run on spare images and add its row to table.csv, if it is not there."""
    rows, key = read_table(path), run_hash(checkpoint["identity"])
    if key in (row["key"] for row in rows):
        return
    best, measured = best_epoch(checkpoint["history"]), {}
    if spare.files:
        measured = measure(setting, checkpoint, task, spare, device)
        print(f"{setting.name}: val {best['val_accuracy']:.2%}, spare {measured['spare']:.2%}, {measured['corrupted']}")
    row = {
        "run": setting.name,
        "seed": checkpoint["identity"]["seed"],
        "device": environment(device)["device"],
        "seconds": math.ceil(sum(epoch["seconds"] for epoch in checkpoint["history"])),
        "best_epoch": best["epoch"],
        "val_accuracy": best["val_accuracy"],
        "spare_images": len(spare.files),
        **measured,
        "key": key,
    }
    write_csv(path, HEADER, [[each.get(column, "") for column in HEADER] for each in (*rows, row)])


def measure(setting: Setting, checkpoint: dict, task: Task, spare: Split, device: torch.device) -> dict[str, object]:
    """The columns of table.csv that spare images give."""
    statistics = checkpoint["mean"], checkpoint["std"]
    pixels = EuroSATDataset(config.dataset_root, task, spare, setting.bands, statistics).pixels
    model = load_weights(setting, checkpoint["best"]).to(device, memory_format=torch.channels_last)

    def correct(images: np.ndarray, views: int = setting.views) -> np.ndarray:
        logits = predict_pixels(model, images, *statistics, views)
        return logits.argmax(1).numpy() == spare.labels[: len(images)]

    all_views = correct(pixels)
    changed = corruptions(pixels[:CORRUPTED], config.split_seed)
    return {
        "spare_one_view": float(correct(pixels, views=1).mean()),
        "spare": float(all_views.mean()),
        "corrupted": ", ".join(f"{name}: {correct(images).mean():.3f}" for name, images in changed.items()),
        "wrong": " ".join(map(str, np.flatnonzero(~all_views))),
    }


def read_table(path: Path) -> list[dict[str, str]]:
    """The rows of table.csv; none if it does not exist."""
    if not path.exists():
        return []
    with reading(path, "delete it; its runs are then measured again"):
        rows = read_csv(path)
        if rows and list(rows[0]) != HEADER:
            raise ValueError("it has other columns")
        return rows


def write_search_study(task: Task, folder: Path) -> None:
    """study.json and frontier.png of the runs in table.csv that were measured on spare images."""
    rows = [row for row in read_table(folder / "table.csv") if row["spare"]]
    if not rows:
        return
    runs, images, first = defaultdict(list), int(rows[0]["spare_images"]), rows[0]["run"]
    for row in rows:
        runs[row["run"]].append(row)
    values = {name: summary(of_run, runs[first], images) for name, of_run in runs.items()}
    hardest = max(values, key=lambda name: values[name]["corrupted"])
    lines, differences = [], []
    for name, row in values.items():
        difference, low, high = (f"{100 * row[key]:+.2f}" for key in ("difference", "low", "high"))
        differences.append(f"{difference} ({low} to {high})")
        accuracies = [percent(row[key]) for key in SHOWN]
        lines.append([name, str(len(runs[name])), f"{row['seconds']:.0f}", *accuracies, differences[-1]])
    beside = ", ".join(f"{name} {text}" for name, text in list(zip(values, differences, strict=True))[1:])
    finding = (
        f"On {images:,} images that are in no list, with all views, {first} is correct on "
        f"{percent(values[first]['all views'])} % after {values[first]['seconds']:.0f} s of training. In points beside it: "
        f"{beside or 'nothing'}. With noise, blur, JPEG, less light or resampling {first} keeps "
        f"{percent(values[first]['corrupted'])} % on the mean, and {hardest} {percent(values[hardest]['corrupted'])} %."
    )
    draw_frontier(folder / "frontier.png", rows, images, recipe_seconds(task, rows))
    table = {
        "caption": f"Accuracy (%), mean over seeds: on val, on {images:,} spare images, and with all views on "
        f"{min(CORRUPTED, images):,} of them corrupted; points more than {first}, with a 95 % interval",
        "header": ["setting", "seeds", "seconds", *SHOWN, f"beside {first}"],
        "rows": lines,
    }
    write_study(folder, "", finding, [table], ["frontier.png"], values, model_sha256=None)


def summary(runs: list[dict[str, str]], baseline: list[dict[str, str]], images: int) -> dict[str, float]:
    """Means over the seeds of a setting. The interval of the difference to the baseline is over images (normal)."""
    kinds: dict[str, list[float]] = defaultdict(list)
    for row in runs:
        for kind, value in (part.rsplit(": ", 1) for part in row["corrupted"].split(", ")):
            kinds[kind].append(float(value))
    corrupted = {kind: float(np.mean(of_kind)) for kind, of_kind in kinds.items()}
    trained_on = [value for kind, value in corrupted.items() if kind not in UNSEEN]
    difference = share_wrong(baseline, images) - share_wrong(runs, images)  # (images,)
    mean, half = float(difference.mean()), float(1.96 * difference.std(ddof=1) / np.sqrt(images))
    columns = {"seconds": "seconds", "val": "val_accuracy", "one view": "spare_one_view", "all views": "spare"}
    return {
        **{key: float(np.mean([float(row[column]) for row in runs])) for key, column in columns.items()},
        **{"corrupted": float(np.mean(trained_on)), "worst": min(trained_on)},
        **{kind: corrupted[kind] for kind in UNSEEN},
        **{"difference": mean, "low": mean - half, "high": mean + half},
    }


def share_wrong(runs: list[dict[str, str]], images: int) -> np.ndarray:
    """(images,) The share of the runs that get an image wrong."""
    share = np.zeros(images)
    for row in runs:
        share[[int(index) for index in row["wrong"].split()]] += 1 / len(runs)
    return share


def recipe_seconds(task: Task, rows: list[dict[str, str]]) -> float | None:
    """How long ten epochs of ResNet-18 at 224 pixels would take on the machine on which the rows were measured.

    studies.benchmark measured the ratio to the profile's settings. None if it did not, or measured other settings.
    """
    path, settings = config.project_root / "outputs" / "benchmark.json", task.settings
    measured = []
    if path.exists():
        with reading(path, "run: python -m studies.benchmark"):
            measured = [row for row in read_json(path) if row["name"].startswith(RECIPE)]
    ratios = [row["value"] for row in measured if row.get("settings") == setting_summaries(settings)]
    seconds = {row["run"]: float(row["seconds"]) for row in rows}
    if ratios and all(setting.name in seconds for setting in settings):
        return ratios[0] * sum(seconds[setting.name] for setting in settings)
    return None


def draw_frontier(path: Path, rows: list[dict[str, str]], images: int, recipe: float | None) -> None:
    """Accuracy on spare images, with 95 % intervals, against seconds of training; one dot for each run."""
    figure, axes = plt.subplots(figsize=(6.6, 2.9), layout="constrained")
    runs = defaultdict(list)
    for row in rows:
        runs[row["run"]].append((float(row["seconds"]), float(row["spare"])))
    for (name, points), colour in zip(runs.items(), itertools.cycle(COLOURS)):
        seconds, accuracy = np.array(points).T
        low, high = np.array([accuracy_interval(value, images) for value in accuracy]).T
        bars = 100 * np.array([accuracy - low, high - accuracy]).clip(min=0)  # rounding
        axes.errorbar(seconds, 100 * accuracy, bars, fmt="o", color=colour, markersize=4, linewidth=0.7, label=name)
    if recipe is not None:
        axes.axvline(recipe, color="#777777", linestyle=(0, (3, 2)), linewidth=1)
        text = f"ResNet-18, 224 px,\n10 epochs: {recipe:,.0f} s\n(not trained here)"
        axes.text(recipe * 0.96, 0.04, text, transform=axes.get_xaxis_transform(), ha="right", fontsize=7)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set(xlabel="seconds of training", ylabel=f"accuracy (%) on {images:,} spare images")
    axes.legend(frameon=False, fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))
    axes.set_title("Accuracy against training time; bars: 95 % intervals", fontsize=8)
    save(figure, path, None)


if __name__ == "__main__":
    run(main, __doc__, choices=TASKS)
