"""Do three infrared bands help? Six bands against red, green and blue of the same patches, each patch predicted once.

Run from the project root: python -m studies.six_bands. Five folds over all multispectral patches at hand, those on the same
ground in one fold; both networks from ImageNet weights, settings and epochs fixed beforehand, the last epoch counts. Half an
hour to one and a half on 2 CPU cores; continues at the fold where it was stopped. Chooses nothing: the patches of the test list are
among those predicted.

reads   the multispectral images, pretrained/
writes  outputs/<profile>/ms/six_bands/: study.json, predictions.csv, the logits of each fold; cache/
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from sklearn.model_selection import StratifiedGroupKFold

from dataset import CLASSES, EuroSATDataset, Split, find_images, patch_of
from engine.evaluation import in_order, predict
from engine.metrics import accuracy_interval, mcnemar
from engine.runtime import Processes, seed_everything, training_session
from engine.splits import as_split, list_text, overlapping_pairs
from engine.training import make_loader, make_optimizer, train_one_epoch
from engine.weights import load_initial_weights, load_tensors, save_tensors
from models import average_of, build_model
from project import cache_dir, config, outputs_dir, pretrained_dir, run, sha256, write_text
from setting import Setting
from studies.subject import percent, span, write_study

FOLDS = 5
THREE = Setting("three", "strong", epochs=12, image_size=96, weight_averaging=0.95, views=8)
SIX = replace(THREE, name="six", band_groups=(*THREE.band_groups, ("B08", "B11", "B12")), fusion="concat")


def main() -> None:
    folder = outputs_dir("ms") / "six_bands"
    with training_session(folder) as processes:
        patches = list(find_images(config.dataset_root, "ms") or ())
        every = as_split("ms", patches)
        fold_of = np.empty(len(every.files), int)
        for fold, (_, test) in enumerate(folds(every)):
            fold_of[test] = fold
        answers = {}
        for setting in (THREE, SIX):
            logits = torch.empty(len(every.files), len(CLASSES))
            for fold in range(FOLDS):
                train, test = part(every, fold_of != fold), part(every, fold_of == fold)
                logits[fold_of == fold] = fold_logits(
                    setting, train, test, folder / f"{setting.name}-{fold}.pt", processes
                )
            answers[setting.name] = logits.argmax(1).numpy()
    rows = zip(every.files, every.labels, fold_of, answers["three"], answers["six"], strict=True)
    named = [[file, CLASSES[label], fold, CLASSES[three], CLASSES[six]] for file, label, fold, three, six in rows]
    write_text(folder / "predictions.csv", list_text(["file", "class_name", "fold", "three_bands", "six_bands"], named))
    right = {name: answer == every.labels for name, answer in answers.items()}
    result = {name: accuracy_of(own) for name, own in right.items()} | mcnemar(right["three"], right["six"])
    said = {name: f"{percent(own.mean())} ({span(own.mean(), len(own))})" for name, own in right.items()}
    finding = (
        f"Of {len(every.files):,} patches, each predicted by a network that had not seen it nor its ground, {said['three']} % are "
        f"right with red, green and blue, {said['six']} % with three infrared bands beside them. Right with three bands alone "
        f"are {result['first_alone']}, with six alone {result['second_alone']}: p = {result['p_value']:.2g} (McNemar, exact)."
    )
    rows = [
        [
            str(fold),
            str(int((fold_of == fold).sum())),
            *(percent(own[fold_of == fold].mean()) for own in right.values()),
        ]
        for fold in range(FOLDS)
    ]
    rows.append(["all", str(len(every.files)), *(percent(own.mean()) for own in right.values())])
    header = ["fold", "patches", "three bands", "six bands"]
    tables = [
        {"caption": f"Accuracy (%), {THREE.epochs} epochs at {THREE.image_size} px", "header": header, "rows": rows}
    ]
    write_study(folder, "", finding, tables, [], result, model_sha256=None)


def folds(every: Split) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Indices of train and test: classes spread evenly, patches that show the same ground in one fold."""
    number = {patch_of(file): index for index, file in enumerate(every.files)}
    pairs = [(number[a], number[b]) for a, b in overlapping_pairs() if a in number and b in number]
    first, second = np.array(pairs, int).reshape(-1, 2).T
    graph = coo_array((np.ones(len(pairs)), (first, second)), shape=(len(number), len(number)))
    _, ground = connected_components(graph, directed=False)
    splitter = StratifiedGroupKFold(FOLDS, shuffle=True, random_state=config.split_seed)
    return splitter.split(every.files, every.labels, ground)


def part(every: Split, chosen: np.ndarray) -> Split:
    return Split([file for file, own in zip(every.files, chosen, strict=True) if own], every.labels[chosen])


def fold_logits(setting: Setting, train: Split, test: Split, path: Path, processes: Processes) -> torch.Tensor:
    """Train on all but one fold and predict it, (images, 10); or what lies in the file, if it is of the same."""
    key = sha256(repr((setting.values(), config.seed, train.files, test.files)).encode())
    if path.exists() and (former := load_tensors(path)).get("key") == key:
        return former["logits"]
    common = {"cache": cache_dir(), "device": processes.device}
    how = {"augmentation": setting.augmentation, "seed": config.seed}
    data = EuroSATDataset(config.dataset_root, "ms", train, setting.bands, **how, **common)
    seed_everything(config.seed)
    model = build_model(setting, load_initial_weights(setting, pretrained_dir()))
    model = model.to(processes.device, memory_format=torch.channels_last)
    averaged = average_of(model, setting)
    loader, optimizer = make_loader(data, setting, processes), make_optimizer(model, setting)
    for epoch in range(setting.epochs):
        train_one_epoch(model, averaged, loader, optimizer, setting, epoch, processes)
    held_out = EuroSATDataset(config.dataset_root, "ms", test, setting.bands, data.statistics, **common)
    logits, labels = predict(averaged.module, in_order(held_out), setting.views)
    save_tensors(path, {"key": key, "logits": logits})
    print(f"{path.stem}: {(logits.argmax(1) == labels).float().mean():.2%} of {len(labels)}", flush=True)
    return logits


def accuracy_of(right: np.ndarray) -> dict[str, float]:
    accuracy = float(right.mean())
    low, high = accuracy_interval(accuracy, len(right))
    return {"accuracy": accuracy, "low": low, "high": high}


if __name__ == "__main__":
    run(main, __doc__)
