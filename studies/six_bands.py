"""Do three infrared bands help? Six bands against red, green and blue on the same patches, each patch predicted once per seed.

Run from the project root: python -m studies.six_bands. Cross-validation with five folds over all multispectral patches that
exist, with three seeds; patches that show the same ground are in the same fold. Settings and epochs were fixed beforehand, and
the last epoch counts. It takes about 40 minutes on 2 CPU cores with AVX-512 and resumes after the last finished fold. It
chooses nothing: the patches of the test list are among those predicted.

Both networks start from one RGB network, which is trained first. This is no leak: its train and val lists are the profile's RGB
lists without the patches of the multispectral set and without those that show the ground of one. So it was neither trained nor
chosen with what is predicted here. The final RGB model was, and is not used. If all RGB patches are in the multispectral set,
both start from ImageNet weights.

reads   the multispectral images, splits/<profile>/rgb/ and its images, pretrained/
writes  outputs/<profile>/ms/six_bands/: study.json, predictions.csv, the folder of the RGB network, the logits of each fold
"""

import itertools
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

from base.command_line import run
from base.errors import UserError
from base.files import write_csv
from base.project import CLASSES, MS, RGB, config, pretrained_dir
from base.setting import Setting

import numpy as np
import torch
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from sklearn.model_selection import StratifiedGroupKFold

from dataset import REMEDY, Split, find_images
from engine.final_model import backbone_weights
from engine.runtime import training_session
from engine.splits import make_split, overlapping_pairs, read_splits
from engine.weights import RGB_MODEL, load_initial_weights
from studies.statistics import mcnemar
from studies.subject import last_epoch_logits, percent, subset, train_run, write_study

FOLDS, SEEDS = 5, 3
DRAWS = 10_000  # of the bootstrap
START = Setting("rgb", "strong", epochs=11, image_size=96, views=8)
# The "rgb-model" is here the network that START trains.
THREE = Setting("three", "strong", epochs=12, image_size=96, views=8, weights=RGB_MODEL)
SIX = replace(THREE, name="six", band_groups=(*THREE.band_groups, ("B08", "B11", "B12")), fusion="concat")


def main() -> None:
    folder = MS.outputs / "six_bands"
    with training_session(folder) as device:
        if not (patches := find_images(config.dataset_root, MS)):
            raise UserError(f"there are no multispectral images below {config.dataset_root}; {REMEDY}")
        every = make_split(MS, patches)
        ground = grounds(every)
        fold_of = folds(every, ground)
        weights = train_start(patches, folder / START.name, device)
        predictions = {setting.name: np.empty((SEEDS, len(every.files)), int) for setting in (THREE, SIX)}
        for number, setting, fold in itertools.product(range(SEEDS), (THREE, SIX), range(FOLDS)):
            lists = {"train": subset(every, fold_of != fold), "test": subset(every, fold_of == fold)}
            path = folder / f"{setting.name}-{number}-{fold}.pt"
            logits = last_epoch_logits(setting, weights, MS, lists, config.seed + number, path, device)
            predictions[setting.name][number, fold_of == fold] = logits.argmax(1).numpy()
    columns = {f"{name}_bands_{number}": predictions[name][number] for number in range(SEEDS) for name in predictions}
    rows = [
        [file, CLASSES[label], fold, *(CLASSES[prediction] for prediction in predicted)]
        for file, label, fold, *predicted in zip(every.files, every.labels, fold_of, *columns.values(), strict=True)
    ]
    write_csv(folder / "predictions.csv", ["file", "class_name", "fold", *columns], rows)
    write_six_bands_study(folder, ground, *(predicted == every.labels for predicted in predictions.values()))


def grounds(every: Split) -> np.ndarray:
    """The number of each patch's ground, (patches,): the same for patches that overlap, directly or through others."""
    index_of = {patch: index for index, patch in enumerate(every.patches)}
    pairs = [(index_of[a], index_of[b]) for a, b in overlapping_pairs() if a in index_of and b in index_of]
    first, second = np.array(pairs, int).reshape(-1, 2).T
    graph = coo_array((np.ones(len(pairs)), (first, second)), shape=(len(index_of), len(index_of)))
    return connected_components(graph, directed=False)[1]


def folds(every: Split, ground: np.ndarray) -> np.ndarray:
    """The fold of each patch, (patches,). Each fold has its share of each class; patches of one ground are in one fold."""
    splitter = StratifiedGroupKFold(FOLDS, shuffle=True, random_state=config.split_seed)
    fold_of = np.empty(len(every.files), int)
    for fold, (_, test) in enumerate(splitter.split(every.files, every.labels, ground)):
        fold_of[test] = fold
    return fold_of


def start_lists(patches: Collection[str]) -> dict[str, Split]:
    """The profile's RGB lists without these patches and without those that show the ground of one of them."""
    shown = set(patches).union(*(pair for pair in overlapping_pairs() if not set(pair).isdisjoint(patches)))
    full = read_splits(RGB.splits, RGB)
    return {part: subset(split, ~np.isin(split.patches, list(shown))) for part, split in full.items()}


def train_start(patches: Collection[str], folder: Path, device: torch.device) -> dict[str, torch.Tensor]:
    """Train the RGB network. Returns the best epoch's backbone under torchvision's names: initial weights for both settings."""
    lists = start_lists(patches)
    if not (lists["train"].files and lists["val"].files):
        return load_initial_weights(START, pretrained_dir())
    return backbone_weights(train_run(START, RGB, lists, config.seed, folder, device)["best"])


def interval_over_grounds(values: np.ndarray, ground: np.ndarray) -> tuple[float, float]:
    """95 % interval of the mean of `values`, (patches,): percentiles of bootstrap samples of grounds, not of patches."""
    sums, sizes = np.bincount(ground, values), np.bincount(ground)
    rng = np.random.default_rng(config.seed)
    samples = (rng.integers(len(sizes), size=len(sizes)) for _ in range(DRAWS))
    low, high = np.percentile([sums[drawn].sum() / sizes[drawn].sum() for drawn in samples], (2.5, 97.5))
    return float(low), float(high)


def write_six_bands_study(folder: Path, ground: np.ndarray, three: np.ndarray, six: np.ndarray) -> None:
    """Compare both networks, given which of their predictions are correct: (seeds, patches) bool."""
    gains = six.sum(0) - three.sum(0)  # (patches,), over all seeds: whole numbers, so that no rounding moves a zero
    difference, (low, high) = gains.mean() / SEEDS, (limit / SEEDS for limit in interval_over_grounds(gains, ground))
    texts = [f"{percent(hits.mean())} % ({', '.join(map(percent, hits.mean(1)))})" for hits in (three, six)]
    finding = (
        f"The infrared bands {'help' if low > 0 else 'are not shown to help'}. Of {len(ground):,} patches, {texts[1]} are "
        f"correct with them and {texts[0]} with red, green and blue alone (mean of {SEEDS} seeds, then each seed). The "
        f"difference is {100 * difference:+.2f} points (95 % interval {100 * low:+.2f} to {100 * high:+.2f}, bootstrap over "
        "grounds). Each patch was predicted by networks that had seen neither it nor its ground."
    )
    rows = []
    for number, (first, second) in enumerate(zip(three, six, strict=True)):
        test = mcnemar(first, second)
        counts = str(test["first_alone"]), str(test["second_alone"]), f"{test['p_value']:.2g}"
        rows.append([str(config.seed + number), percent(first.mean()), percent(second.mean()), *counts])
    caption = f"Accuracy (%), {THREE.epochs} epochs at {THREE.image_size} px; patches only one has right; McNemar's p"
    header = ["seed", "three bands", "six bands", "only three", "only six", "p"]
    values = {"three": three.mean(1).tolist(), "six": six.mean(1).tolist()}
    values |= {"difference": difference, "low": low, "high": high}
    write_study(folder, "", finding, [{"caption": caption, "header": header, "rows": rows}], [], values, None)


if __name__ == "__main__":
    run(main, __doc__)
