"""Settings compared on val and on spare images: those of the train pool that no list holds. The test pool stays closed.

Run from the project root: python -m studies.search. QUEUE below (of six bands it is empty) is trained from top to
bottom by the program's own loop; it stops anywhere and continues when started again, and a run that is there is not
repeated. Where the train list takes the whole pool (six bands) there are no spare images.

reads   splits/<profile>/<task>/, the images, the initial weights; outputs/benchmark.json, if it is there
writes  outputs/<profile>/<task>/search/: table.csv, a row for each run, frontier.png, what the seconds of training buy,
        study.json, and a folder for each run; cache/
"""

import csv
import io
import itertools
import json
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

from dataset import EuroSATDataset, Split, find_images, patch_of
from engine.checkpoint import best_epoch, read_checkpoint, run_hash
from engine.evaluation import in_order, predict
from engine.metrics import accuracy_interval, compute_metrics
from engine.plots import COLOURS, save
from engine.runtime import seed_everything, training_session
from engine.splits import as_split, complete_patches, list_text, make_pools, read_splits, splits_hash
from engine.training import check_settings, train_setting
from engine.weights import load_initial_weights, load_tensors
from models import average_of, build_model
from project import TASKS, cache_dir, config, outputs_dir, pretrained_dir, run, splits_dir, write_text
from setting import Setting
from studies.subject import RECIPE, percent, summary, write_study

SPARE = 2000  # images at most: ± 0.6 points by chance at 98 %
HEADER = [
    "run",
    "seed",
    "seconds",
    "best_epoch",
    "val_accuracy",
    "spare_images",
    "spare_one_view",
    "spare",
    "last_averaged",
    "last_not_averaged",
    "views",
    "key",
]

_QUICK = Setting("at_64_short", "strong", epochs=5, batch_size=64, views=8)
# What is tried, and with which seeds: 0 is config.py's, 1 the next one, …
QUEUE: dict[str, list[tuple[Setting, int]]] = {
    "rgb": [
        (_QUICK, 0),
        (replace(_QUICK, name="at_64", epochs=10), 0),
        (replace(_QUICK, name="at_96", epochs=12, image_size=96, batch_size=32), 0),
        *((setting, 0) for setting in config.settings["course"]["rgb"]),
        *((config.settings["course"]["rgb"][-1], seed) for seed in (1, 2)),  # what is handed in, and its spread
    ],
    "ms": [],
}


def main(tasks: tuple[str, ...]) -> None:
    for task in tasks:
        check_settings(task, [setting for setting, _ in QUEUE[task]])
        folder = outputs_dir(task) / "search"
        with training_session(folder) as processes:
            lists = read_splits(splits_dir(task), task)
            spare = spare_images(task, lists)
            for setting, number in QUEUE[task]:
                run_folder, seed = folder / f"{setting.name}-{number}", config.seed + number
                common = {"seed": seed, "cache": cache_dir(), "device": processes.device}
                data = {"augmentation": setting.augmentation, **common}
                train = EuroSATDataset(config.dataset_root, task, lists["train"], setting.bands, **data)
                val = EuroSATDataset(config.dataset_root, task, lists["val"], setting.bands, train.statistics, **common)
                seed_everything(seed)
                model = build_model(setting, load_initial_weights(setting, pretrained_dir()))
                train_setting(setting, model, train, val, splits_hash(lists), run_folder, processes)
                if processes.rank == 0:
                    measure(setting, task, run_folder, spare, train)
            if processes.rank == 0 and QUEUE[task]:
                conclude(task, folder)


def spare_images(task: str, lists: dict[str, Split]) -> Split:
    """SPARE patches of the train pool, drawn with the split's seed from those at hand that are in none of the lists."""
    held, present = (
        {patch_of(file) for split in lists.values() for file in split.files},
        find_images(config.dataset_root, task),
    )
    pool = make_pools(complete_patches(), config.split_seed)["train"]
    left = [patch for patch in pool if patch in present and patch not in held]
    order = np.random.default_rng(config.split_seed).permutation(len(left))
    return as_split(task, [left[index] for index in order[:SPARE]])


def measure(setting: Setting, task: str, folder: Path, spare: Split, train: EuroSATDataset) -> None:
    """Add a finished run's row to table.csv, if it is not there.

    On spare images: `spare_one_view` and, with all views, `spare` of the best epoch; `last_averaged` and `last_not_averaged`
    of the last one, with one view: training is the same with and without averaging.
    """
    path, run = folder.parent / "table.csv", read_checkpoint(folder / "last.pt")
    rows = [list(row.values()) for row in read_table(path)] if path.exists() else []
    key = run_hash(run["identity"])
    if key in (row[-1] for row in rows):
        return
    best, measured = best_epoch(run["history"]), ["", "", "", ""]
    if spare.files:
        data = EuroSATDataset(
            config.dataset_root, task, spare, setting.bands, train.statistics, cache=cache_dir(), device=train.device
        )
        kept = load_tensors(folder / "best.pt")["model"]
        measured[:2] = (accuracy(setting, kept, data, views) for views in (1, setting.views))
        if setting.weight_averaging:
            averaged = average_of(build_model(setting, weights=None), setting)
            averaged.load_state_dict(run["averaged"])
            measured[2:] = (accuracy(setting, own, data, 1) for own in (averaged.module.state_dict(), run["model"]))
        print(f"{setting.name}: val {best['val_accuracy']:.2%}, spare {measured[1]:.2%}")
    seconds = round(sum(row["seconds"] for row in run["history"]))
    row = [setting.name, run["identity"]["seed"], seconds, best["epoch"], best["val_accuracy"], len(spare.files)]
    write_text(path, list_text(HEADER, [*rows, [*row, *measured, setting.views, key]]))


def accuracy(setting: Setting, weights: dict[str, torch.Tensor], data: EuroSATDataset, views: int) -> float:
    """Of the network with these weights."""
    model = build_model(setting, weights=None)
    model.load_state_dict(weights)
    model = model.to(data.device, memory_format=torch.channels_last)
    return compute_metrics(predict(model, in_order(data), views)[0], data.split.labels)["accuracy"]


def read_table(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(path.read_text(encoding="utf-8"))))


def conclude(task: str, folder: Path) -> None:
    """study.json and frontier.png of the runs in table.csv, as far as they were measured on spare images."""
    rows = [row for row in read_table(folder / "table.csv") if row["spare"]]
    if not rows:
        return
    images = int(rows[0]["spare_images"])
    fastest, best = (min(rows, key=lambda row: float(row["seconds"])), max(rows, key=lambda row: float(row["spare"])))
    finding = (
        f"On {images:,} images that no list holds, {percent(float(fastest['spare']))} % after {fastest['seconds']} s of "
        f"training ({fastest['run']}) and {percent(float(best['spare']))} % after {best['seconds']} s ({best['run']})."
    )
    for what, after, before in (
        ("All views instead of one bring", "spare", "spare_one_view"),
        ("Averaging the weights brings, after the last epoch and with one view,", "last_averaged", "last_not_averaged"),
    ):
        gains = [float(row[after]) - float(row[before]) for row in rows if row[after]]
        if gains:
            finding += f" {what} {100 * np.mean(gains):+.2f} points (mean of {len(gains)} runs)."
    frontier(folder / "frontier.png", rows, images, recipe_seconds(task, rows))
    shares = ("val_accuracy", "spare_one_view", "spare", "last_averaged", "last_not_averaged")
    table = {
        "caption": f"Accuracy (%) of each run on val and on {images:,} spare images; last: epoch, one view",
        "header": [
            "setting",
            "seed",
            "seconds",
            "val",
            "one view",
            "all views",
            "last, averaged",
            "last, not averaged",
        ],
        "rows": [
            [row["run"], row["seed"], row["seconds"], *(percent(float(row[key] or "nan")) for key in shares)]
            for row in rows
        ],
    }
    write_study(folder, "", finding, [table], ["frontier.png"], {}, model_sha256=None)


def recipe_seconds(task: str, rows: list[dict[str, str]]) -> float | None:
    """What ten epochs of ResNet-18 at 224 pixels would take where the rows' seconds were measured.

    By the ratio that studies.benchmark measured of them and the profile's settings; None where it did not, or of others.
    """
    path = config.project_root / "outputs" / "benchmark.json"
    measured = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    settings = config.settings[config.profile][task]
    ratios = [
        row["value"] for row in measured if row["name"].startswith(RECIPE) and row.get("settings") == summary(settings)
    ]
    seconds = {row["run"]: float(row["seconds"]) for row in rows}
    own = [seconds.get(setting.name) for setting in settings]
    return ratios[0] * sum(own) if ratios and None not in own else None


def frontier(path: Path, rows: list[dict[str, str]], images: int, recipe: float | None) -> None:
    """Accuracy on spare images, with 95 % intervals, against seconds of training; one dot for each run."""
    figure, axes = plt.subplots(figsize=(6.6, 2.9), layout="constrained")
    runs = defaultdict(list)
    for row in rows:
        runs[row["run"]].append((float(row["seconds"]), float(row["spare"])))
    for (name, points), colour in zip(runs.items(), itertools.cycle(COLOURS)):
        seconds, accuracy = np.array(points).T
        low, high = np.array([accuracy_interval(own, images) for own in accuracy]).T
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
    axes.set_title("What the seconds of training buy; bars: 95 % intervals", fontsize=8)
    save(figure, path, None)


if __name__ == "__main__":
    run(main, __doc__, choices=TASKS)
