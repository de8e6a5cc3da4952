"""How many labels do I need? Test accuracy against the number of labelled images, for four ways to learn from them.

Run from the project root: python -m studies.label_curve (RGB). About 20 minutes on 2 CPU cores with AVX-512; it resumes after the
last finished training. Images are drawn from the train list with the seed, equally many of each class; the smaller sets with three
seeds. The networks have the final model's setting, but one view of each image. Val, which has labels too, chooses nothing: the
last epoch counts.

reads   the final RGB model, the images, the initial weights
writes  outputs/<profile>/rgb/label_curve/: study.json, label_curve.png, the logits of each training
"""

import itertools
import math
from collections.abc import Iterator
from dataclasses import replace

from base.command_line import run
from base.project import CLASSES, RGB, config, pretrained_dir

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import NullFormatter, StrMethodFormatter
from sklearn.ensemble import RandomForestClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from engine.final_model import initial_weights
from engine.plots import COLOURS, save
from engine.runtime import training_session
from studies.baselines import frozen_features
from studies.subject import Subject, band_features, last_epoch_logits, percent, subjects, subset

SIZES = 10, 30, 100, 300, 1000  # and the whole list
SEEDS = 3  # of the sizes below the largest
STEPS = 300  # of a training, at least: few images are seen the more often
FOREST, LINEAR, TUNED, SCRATCH = METHODS = (
    "random forest on means and deviations",
    "linear layer on the frozen backbone",
    "fine-tuned",
    "from scratch",
)


def main() -> None:
    (subject,) = subjects([RGB], "label_curve")
    with training_session(subject.folder):
        accuracies = dict(measurements(subject))
    draw_label_curve(subject, accuracies)
    write_label_curve_study(subject, accuracies)


def measurements(subject: Subject) -> Iterator[tuple[tuple[str, int], list[float]]]:
    """Yield ((method, labelled images), test accuracy of each seed)."""
    labels, test = subject.lists["train"].labels, subject.lists["test"].labels
    plan = replace(subject.final.setting, views=1)
    features = {
        FOREST: {part: band_features(subject.images(part).pixels) for part in ("train", "test")},
        LINEAR: frozen_features(subject, plan.views),
    }
    settings = {TUNED: replace(plan, name="tuned"), SCRATCH: replace(plan, name="scratch", weights=None)}
    weights = {method: initial_weights(each, pretrained_dir(), RGB, subject.lists) for method, each in settings.items()}
    sizes = [size for size in SIZES if size < len(labels)]
    for size in (*sizes, len(labels)):
        found = {method: [] for method in METHODS}
        for number in range(SEEDS if size in sizes[:-1] else 1):
            seed = config.seed + number
            chosen = drawn(labels, size, seed)
            forest = RandomForestClassifier(500, random_state=seed)  # on one core: on several the last bits vary
            linear = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=2000))
            for method, classifier in ((FOREST, forest), (LINEAR, linear)):
                classifier.fit(features[method]["train"][chosen], labels[chosen])
                found[method].append(float(classifier.score(features[method]["test"], test)))
            lists = {"train": subset(subject.lists["train"], chosen), "test": subject.lists["test"]}
            epochs = max(plan.epochs, math.ceil(STEPS / math.ceil(chosen.sum() / plan.batch_size)))
            for method, setting in settings.items():
                setting = replace(setting, epochs=epochs)
                path = subject.folder / f"{setting.name}-{size}-{number}.pt"
                logits = last_epoch_logits(setting, weights[method], RGB, lists, seed, path, subject.device)
                found[method].append(float((logits.argmax(1).numpy() == test).mean()))
        yield from (((method, size), values) for method, values in found.items())


def drawn(labels: np.ndarray, size: int, seed: int) -> np.ndarray:
    """(images,) bool: as many images of each class as come to `size`, at least one, or all if that is the whole list."""
    if size == len(labels):
        return np.ones(size, bool)
    chosen, random = np.zeros(len(labels), bool), np.random.default_rng(seed)
    for label in range(len(CLASSES)):
        chosen[random.permutation(np.flatnonzero(labels == label))[: max(1, size // len(CLASSES))]] = True
    return chosen


def draw_label_curve(subject: Subject, accuracies: dict[tuple[str, int], list[float]]) -> None:
    """Accuracy against labelled images: a dot for each seed, lines through the means."""
    figure, axes = plt.subplots(figsize=(6.6, 3.0), layout="constrained")
    sizes = sorted({size for _, size in accuracies})
    for method, colour in zip(METHODS, itertools.cycle(COLOURS)):
        values = [accuracies[method, size] for size in sizes]
        axes.plot(sizes, [100 * np.mean(seeds) for seeds in values], color=colour, linewidth=1, label=method)
        dots = [(size, 100 * value) for size, seeds in zip(sizes, values, strict=True) for value in seeds]
        axes.plot(*zip(*dots, strict=True), "o", color=colour, markersize=3)
    axes.set_xscale("log")
    axes.set_xticks(sizes)
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set(xlabel="labelled images", ylabel="test accuracy (%)", ylim=(0, 101))
    axes.legend(frameon=False, fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))
    axes.set_title("Accuracy against labels; a dot for each seed, lines through their means", fontsize=8)
    save(figure, subject.folder / "label_curve.png", subject.final.sha256)


def write_label_curve_study(subject: Subject, accuracies: dict[tuple[str, int], list[float]]) -> None:
    sizes = sorted({size for _, size in accuracies})
    means = {key: float(np.mean(values)) for key, values in accuracies.items()}
    whole, goal = sizes[-1], means[TUNED, sizes[-1]] - 0.05
    enough = min(size for size in sizes if means[TUNED, size] >= goal)
    finding = (
        f"With {whole:,} labelled images the fine-tuned network reaches {percent(means[TUNED, whole])} %; {enough:,} are enough "
        f"for less than five points below that ({percent(means[TUNED, enough])} %). With {sizes[0]} images, one of each class, it "
        f"reaches {percent(means[TUNED, sizes[0]])} %, a linear layer on the frozen backbone {percent(means[LINEAR, sizes[0]])} %, "
        f"a random forest {percent(means[FOREST, sizes[0]])} %. From random weights {whole:,} images give "
        f"{percent(means[SCRATCH, whole])} %."
    )
    cells = {
        (method, size): percent(np.mean(values)) + (f" ± {100 * np.std(values, ddof=1):.1f}" if len(values) > 1 else "")
        for (method, size), values in accuracies.items()
    }
    table = {
        "caption": "Test accuracy (%) by labelled images, mean ± standard deviation over seeds",
        "header": ["method", *(f"{size:,}" for size in sizes)],
        "rows": [[method, *(cells[method, size] for size in sizes)] for method in METHODS],
    }
    values = {method: {str(size): accuracies[method, size] for size in sizes} for method in METHODS}
    subject.write(finding, [table], ["label_curve.png"], accuracies=values)


if __name__ == "__main__":
    run(main, __doc__)
