"""What do resolution and training time bring? Settings compared on val and on spare images. The test pool stays closed.

Run from the project root: python -m studies.search. Trains the settings in QUEUE below one after another (none for six bands).
It can be stopped at any time; when started again it resumes, and skips the runs that are finished. Spare images are those of
the train pool that are in no list. If the train list takes the whole pool (six bands), there are none.

reads   splits/<profile>/<task>/, the images, the initial weights; outputs/benchmark.json if it exists
writes  outputs/<profile>/<task>/search/: table.csv with a row for each run, frontier.png with accuracy against training time,
        study.json, a folder for each run
"""

import itertools
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
from engine.metrics import accuracy_interval, compute_metrics
from engine.plots import COLOURS, save
from engine.runtime import training_session
from engine.splits import complete_patches, make_pools, make_split, read_splits
from studies.subject import RECIPE, percent, predict_with, setting_summaries, train_run, write_study

SPARE = 2000  # images at most; at an accuracy of 98 % chance alone is ± 0.6 points
# "last_averaged" and "last_not_averaged" belong to averaged weights, which earlier runs tried (docs/results.md).
HEADER = [
    *("run", "seed", "seconds", "best_epoch", "val_accuracy", "spare_images", "spare_one_view", "spare"),
    *("last_averaged", "last_not_averaged", "views", "key"),
]

_QUICK = Setting("at_64_short", "strong", epochs=5, batch_size=64, views=8)
_COURSE = RGB.of_profile("course").settings
# What is trained, with which seed: 0 is the seed in config.py, 1 the next number, …
QUEUE: dict[str, list[tuple[Setting, int]]] = {
    "rgb": [
        (_QUICK, 0),
        (replace(_QUICK, name="at_64", epochs=10), 0),
        (replace(_QUICK, name="at_96", epochs=12, image_size=96, batch_size=32), 0),
        *((setting, 0) for setting in _COURSE),
        *((_COURSE[-1], seed) for seed in (1, 2)),  # the spread over seeds
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
    pool = make_pools(complete_patches(), config.split_seed)["train"]
    left = [patch for patch in pool if patch in present and patch not in listed]
    order = np.random.default_rng(config.split_seed).permutation(len(left))
    return make_split(task, [left[index] for index in order[:SPARE]])


def add_row(path: Path, setting: Setting, checkpoint: dict, task: Task, spare: Split, device: torch.device) -> None:
    """Measure the best epoch of a finished run on spare images and add its row to table.csv, if it is not there."""
    rows, key = read_table(path), run_hash(checkpoint["identity"])
    if key in (row["key"] for row in rows):
        return
    best, measured = best_epoch(checkpoint["history"]), {}
    if spare.files:
        statistics = checkpoint["mean"], checkpoint["std"]
        data = EuroSATDataset(config.dataset_root, task, spare, setting.bands, statistics, device=device)
        for column, views in (("spare_one_view", 1), ("spare", setting.views)):
            logits = predict_with(setting, checkpoint["best"], data, views)
            measured[column] = compute_metrics(logits, spare.labels)["accuracy"]
        print(f"{setting.name}: val {best['val_accuracy']:.2%}, spare {measured['spare']:.2%}")
    row = {
        "run": setting.name,
        "seed": checkpoint["identity"]["seed"],
        "seconds": round(sum(epoch["seconds"] for epoch in checkpoint["history"])),
        "best_epoch": best["epoch"],
        "val_accuracy": best["val_accuracy"],
        "spare_images": len(spare.files),
        **measured,
        "views": setting.views,
        "key": key,
    }
    write_csv(path, HEADER, [[each.get(column, "") for column in HEADER] for each in (*rows, row)])


def read_table(path: Path) -> list[dict[str, str]]:
    """The rows of table.csv; none if it does not exist."""
    if not path.exists():
        return []
    with reading(path, "delete it; its runs are then measured again"):
        return read_csv(path)


def write_search_study(task: Task, folder: Path) -> None:
    """study.json and frontier.png of the runs in table.csv that were measured on spare images."""
    rows = [row for row in read_table(folder / "table.csv") if row["spare"]]
    if not rows:
        return
    images = int(rows[0]["spare_images"])
    fastest, best = min(rows, key=lambda row: float(row["seconds"])), max(rows, key=lambda row: float(row["spare"]))
    finding = (
        f"On {images:,} images that are in no list, {fastest['run']} reaches {percent(float(fastest['spare']))} % after "
        f"{fastest['seconds']} s of training, and {best['run']} {percent(float(best['spare']))} % after {best['seconds']} s."
    )
    for what, after, before in (
        ("All views instead of one change accuracy by", "spare", "spare_one_view"),
        ("Averaged weights changed it, after the last epoch, by", "last_averaged", "last_not_averaged"),
    ):
        if gains := [float(row[after]) - float(row[before]) for row in rows if row[after]]:
            finding += f" {what} {100 * np.mean(gains):+.2f} points (mean of {len(gains)} runs)."
    draw_frontier(folder / "frontier.png", rows, images, recipe_seconds(task, rows))
    columns = ("val_accuracy", "spare_one_view", "spare", "last_averaged", "last_not_averaged")
    titles = ("val", "one view", "all views", "last, averaged", "last, not averaged")
    table = {
        "caption": f"Accuracy (%) of each run on val and on {images:,} spare images; last: last epoch, one view",
        "header": ["setting", "seed", "seconds", *titles],
        "rows": [
            [row["run"], row["seed"], row["seconds"], *(percent(float(row[column] or "nan")) for column in columns)]
            for row in rows
        ],
    }
    write_study(folder, "", finding, [table], ["frontier.png"], {}, model_sha256=None)


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
        bars = 100 * np.array([accuracy - low, high - accuracy])
        axes.errorbar(seconds, 100 * accuracy, bars, fmt="o", color=colour, markersize=4, linewidth=0.7, label=name)
    if recipe is not None:
        axes.axvline(recipe, color="#777777", linestyle=(0, (3, 2)), linewidth=1)
        text = f"ResNet-18, 224 px,\n10 epochs: {recipe:,.0f} s\n(not trained here)"
        axes.text(recipe * 0.96, 0.04, text, transform=axes.get_xaxis_transform(), ha="right", fontsize=7)
    seconds, accuracy = np.array(sorted(tuple(np.mean(points, axis=0)) for points in runs.values())).T
    axes.plot(seconds, 100 * accuracy, color="#CCCCCC", linewidth=1, zorder=0)
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
