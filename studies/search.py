"""Settings compared on val and on spare images: those of the train pool that no list holds. The test pool stays closed.

Run from the project root: python -m studies.search, with `rgb` or `ms` for one task. QUEUE below is trained from top to
bottom by the program's own loop; it stops anywhere and continues when started again, and a run that is there is not
repeated. Where the train list takes the whole pool (six bands) there are no spare images.

reads   splits/<profile>/<task>/, the images, the initial weights
writes  outputs/<profile>/<task>/search/: table.csv, a row for each run, and a folder for each run; cache/
"""

import csv
import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from dataset import EuroSATDataset, Split, find_images, patch_of
from engine.checkpoint import best_epoch, read_checkpoint, run_hash
from engine.evaluation import in_order, predict
from engine.metrics import compute_metrics
from engine.runtime import seed_everything, training_session
from engine.splits import as_split, complete_patches, list_text, make_pools, read_splits, splits_hash
from engine.training import check_settings, train_setting
from engine.weights import load_initial_weights, load_tensors
from models import build_model
from project import TASKS, cache_dir, config, outputs_dir, pretrained_dir, run, shown, splits_dir, write_text
from setting import Setting

SPARE = 5000  # images at most: ± 0.4 points by chance at 98 %
HEADER = [
    "run",
    "seed",
    "seconds",
    "best_epoch",
    "val_accuracy",
    "spare_images",
    "spare_one_view",
    "spare",
    "views",
    "key",
]

_QUICK = Setting("at_64_short", "strong", epochs=5, batch_size=64, views=8)
_AT_128 = Setting("at_128", "strong", epochs=12, image_size=128, views=8)
# What is tried, and with which seeds: 0 is config.py's, 1 the next one, …
QUEUE: dict[str, list[tuple[Setting, int]]] = {
    "rgb": [
        (_QUICK, 0),
        (replace(_QUICK, name="at_64", epochs=10), 0),
        (replace(_QUICK, name="at_96", epochs=12, image_size=96, batch_size=32), 0),
        (_AT_128, 0),
        (replace(_AT_128, name="at_128_averaged", weight_averaging=0.99), 0),
        *((config.settings["course"]["rgb"][-1], seed) for seed in range(3)),  # what is handed in, and its spread
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
        print(f"wrote {shown(folder)}/table.csv")


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
    """Add a finished run's row to table.csv, if it is not there."""
    path, run = folder.parent / "table.csv", read_checkpoint(folder / "last.pt")
    rows = list(csv.reader(io.StringIO(path.read_text(encoding="utf-8"))))[1:] if path.exists() else []
    key = run_hash(run["identity"])
    if key in (row[-1] for row in rows):
        return
    best, one_view, views = best_epoch(run["history"]), "", ""
    if spare.files:
        model = build_model(setting, weights=None)
        model.load_state_dict(load_tensors(folder / "best.pt")["model"])
        model = model.to(train.device, memory_format=torch.channels_last)
        data = EuroSATDataset(
            config.dataset_root, task, spare, setting.bands, train.statistics, cache=cache_dir(), device=train.device
        )
        one_view, views = (
            compute_metrics(predict(model, in_order(data), count)[0], spare.labels)["accuracy"]
            for count in (1, setting.views)
        )
    seconds = round(sum(row["seconds"] for row in run["history"]))
    row = [setting.name, run["identity"]["seed"], seconds, best["epoch"], best["val_accuracy"], len(spare.files)]
    write_text(path, list_text(HEADER, [*rows, [*row, one_view, views, setting.views, key]]))
    print(f"{setting.name}: val {best['val_accuracy']:.2%}, spare {views if views == '' else f'{views:.2%}'}")


if __name__ == "__main__":
    run(main, __doc__, choices=TASKS)
