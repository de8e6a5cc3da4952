"""Do three infrared bands help? Six bands against red, green and blue on the same patches, each patch predicted once.

Run from the project root: python -m studies.six_bands. Cross-validation with five folds over all multispectral patches that
exist; patches that show the same ground are in the same fold. Both networks start from ImageNet weights. Settings and epochs
were fixed beforehand, and the last epoch counts. It takes half an hour to one and a half on 2 CPU cores and resumes after the
last finished fold. It chooses nothing: the patches of the test list are among those predicted.

reads   the multispectral images, pretrained/
writes  outputs/<profile>/ms/six_bands/: study.json, predictions.csv, the logits of each fold
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from base.command_line import run
from base.errors import UserError
from base.files import load_tensors, save_tensors, sha256, write_csv
from base.project import CLASSES, MS, config
from base.setting import Setting

import numpy as np
import torch
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from sklearn.model_selection import StratifiedGroupKFold

from dataset import REMEDY, EuroSATDataset, Split, find_images
from engine.metrics import accuracy_interval
from engine.results import predict
from engine.runtime import training_session
from engine.splits import make_split, overlapping_pairs
from engine.training import make_optimizer, train_one_epoch
from studies.statistics import mcnemar
from studies.subject import interval_text, percent, start_training, write_study

FOLDS = 5
THREE = Setting("three", "strong", epochs=12, image_size=96, views=8)
SIX = replace(THREE, name="six", band_groups=(*THREE.band_groups, ("B08", "B11", "B12")), fusion="concat")


def main() -> None:
    folder = MS.outputs / "six_bands"
    with training_session(folder) as device:
        if not (patches := find_images(config.dataset_root, MS)):
            raise UserError(f"there are no multispectral images below {config.dataset_root}; {REMEDY}")
        every = make_split(MS, patches)
        fold_of = np.empty(len(every.files), int)
        for fold, (_, test) in enumerate(folds(every)):
            fold_of[test] = fold
        predictions = {}
        for setting in (THREE, SIX):
            logits = torch.empty(len(every.files), len(CLASSES))
            for fold in range(FOLDS):
                lists = {"train": subset(every, fold_of != fold), "test": subset(every, fold_of == fold)}
                logits[fold_of == fold] = fold_logits(setting, lists, folder / f"{setting.name}-{fold}.pt", device)
            predictions[setting.name] = logits.argmax(1).numpy()
    columns = every.files, every.labels, fold_of, predictions["three"], predictions["six"]
    rows = [[file, CLASSES[a], fold, CLASSES[b], CLASSES[c]] for file, a, fold, b, c in zip(*columns, strict=True)]
    write_csv(folder / "predictions.csv", ["file", "class_name", "fold", "three_bands", "six_bands"], rows)
    write_six_bands_study(folder, fold_of, {name: values == every.labels for name, values in predictions.items()})


def folds(every: Split) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Indices of train and test. Each fold has its share of each class; patches of the same ground are in one fold."""
    index_of = {patch: index for index, patch in enumerate(every.patches)}
    pairs = [(index_of[a], index_of[b]) for a, b in overlapping_pairs() if a in index_of and b in index_of]
    first, second = np.array(pairs, int).reshape(-1, 2).T
    graph = coo_array((np.ones(len(pairs)), (first, second)), shape=(len(index_of), len(index_of)))
    _, ground = connected_components(graph, directed=False)
    splitter = StratifiedGroupKFold(FOLDS, shuffle=True, random_state=config.split_seed)
    return splitter.split(every.files, every.labels, ground)


def subset(split: Split, chosen: np.ndarray) -> Split:
    """The images for which `chosen`, (images,) bool, is true."""
    return Split([split.files[index] for index in np.flatnonzero(chosen)], split.labels[chosen])


def fold_logits(setting: Setting, lists: dict[str, Split], path: Path, device: torch.device) -> torch.Tensor:
    """Train on all folds but one and predict that one, (images, 10); or read the file if it holds the same."""
    key = sha256(repr((setting.values(), config.seed, lists["train"].files, lists["test"].files)).encode())
    if path.exists() and (former := load_tensors(path, "delete it and start again")).get("key") == key:
        return former["logits"]
    model, train = start_training(setting, MS, lists, config.seed, device)
    model = model.to(device, memory_format=torch.channels_last)
    optimizer = make_optimizer(model, setting)
    for epoch in range(setting.epochs):
        train_one_epoch(model, train, optimizer, setting, epoch)
    test = EuroSATDataset(config.dataset_root, MS, lists["test"], setting.bands, train.statistics, device=device)
    logits = predict(model, test, setting.views)
    save_tensors(path, {"key": key, "logits": logits})
    accuracy = (logits.argmax(1).numpy() == lists["test"].labels).mean()
    print(f"{path.stem}: {accuracy:.2%} of {len(logits)}", flush=True)
    return logits


def write_six_bands_study(folder: Path, fold_of: np.ndarray, correct: dict[str, np.ndarray]) -> None:
    """Compare both networks; `correct` is {"three" and "six": (patches,) bool}."""
    patches, values, texts = len(fold_of), {}, {}
    for name, hits in correct.items():
        accuracy = float(hits.mean())
        low, high = accuracy_interval(accuracy, patches)
        values[name] = {"accuracy": accuracy, "low": low, "high": high}
        texts[name] = f"{percent(accuracy)} ({interval_text(accuracy, patches)}) %"
    values |= mcnemar(correct["three"], correct["six"])
    finding = (
        f"Each of {patches:,} patches was predicted by a network that had seen neither it nor its ground. With red, green and "
        f"blue {texts['three']} are correct, with three infrared bands beside them {texts['six']}. Only three bands are "
        f"correct on {values['first_alone']} patches, only six bands on {values['second_alone']}: p = "
        f"{values['p_value']:.2g} (McNemar, exact)."
    )
    groups = {str(fold): fold_of == fold for fold in range(FOLDS)} | {"all": fold_of >= 0}
    rows = [
        [name, str(group.sum()), *(percent(hits[group].mean()) for hits in correct.values())]
        for name, group in groups.items()
    ]
    caption = f"Accuracy (%), {THREE.epochs} epochs at {THREE.image_size} px"
    table = {"caption": caption, "header": ["fold", "patches", "three bands", "six bands"], "rows": rows}
    write_study(folder, "", finding, [table], [], values, model_sha256=None)


if __name__ == "__main__":
    run(main, __doc__)
