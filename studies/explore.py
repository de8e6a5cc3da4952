"""What do the data look like, and what will be hard? Numbers, samples, brightness, spectra and places of the training images.

Run from the project root: python -m studies.explore; with `rgb` or `ms` for one task. Seconds, before any training: it needs no
model. Of val and test it counts the lines of the lists and opens no image. Which classes overlap is measured with a linear
discriminant (Fisher, 1936) on the mean and the standard deviation of each band, in cross-validation with patches of one ground in
one fold.

reads   splits/<profile>/<task>/, the training images, positions of the patches (engine/)
writes  outputs/<profile>/<task>/explore/: study.json, classes.png, map.png; samples.png (RGB), spectra.png (multispectral)
"""

import re
from dataclasses import dataclass
from pathlib import Path

from base.command_line import run
from base.errors import UserError
from base.project import CLASSES, MS_BANDS, PARTS, RGB, TASKS, Task, config

import matplotlib.pyplot as plt
import numpy as np
from pyproj import Transformer
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.model_selection import PredefinedSplit, cross_val_predict

from dataset import Split, load_images
from engine.plots import COLOURS, save
from engine.splits import complete_patches, read_splits
from studies.explain_errors import brightness_and_contrast
from studies.geography import MAP, positions
from studies.six_bands import folds, grounds
from studies.subject import band_features, interval_text, percent, write_study

SAMPLES = 3  # of each class, as many as leave room for all figures on one page of the appendix
FEWEST = 5  # training images of a class, one for each fold
# Central wavelengths in nm (ESA, Sentinel-2 User Handbook, 2015).
WAVELENGTHS = dict(zip(MS_BANDS, (443, 490, 560, 665, 705, 740, 783, 842, 945, 1375, 1610, 2190, 865), strict=True))
HALVES = (("south", "north"), ("west", "east"))  # of a class's places, by latitude and by longitude


@dataclass(frozen=True)
class Data:
    """The three lists of a task, and its training images in numbers. Pixel values are in the file's unit."""

    title: str  # of the task
    lists: dict[str, Split]
    pixels: np.ndarray  # (images, 64, 64, bands)
    spectra: np.ndarray  # (images, bands), the mean of each band
    looks: np.ndarray  # (images, 2), brightness and contrast
    places: np.ndarray  # (images, 2), latitude and longitude in degrees
    confusion: np.ndarray  # (10, 10), of the discriminant; rows are true classes

    def of_class(self, values: np.ndarray) -> list[np.ndarray]:
        """The rows of each class, (images of the class, …)."""
        return [values[self.lists["train"].labels == label] for label in range(len(CLASSES))]


def main(tasks: list[Task]) -> None:
    for task in tasks:
        data, folder = describe_training_images(task), task.outputs / "explore"
        first = draw_samples(data, folder) if task == RGB else draw_spectra(data, folder)
        figures = [first, draw_classes(data, folder), draw_map(data, folder)]
        images, found = data.confusion.sum(), np.diag(data.confusion)
        sizes = ", ".join(f"{len(split.files):,} {part}" for part, split in data.lists.items())
        finding = (
            f"The lists name {sizes} images. A linear discriminant that sees only the means and standard deviations of the "
            f"{len(task.bands)} bands recognises {percent(found.sum() / images)} % of the training images (95 % interval "
            f"{interval_text(found.sum() / images, images)}). {' '.join(what_will_be_hard(data))}"
        )
        tpr = dict(zip(CLASSES, (found / data.confusion.sum(1)).tolist(), strict=True))
        values = {"discriminant": float(found.sum() / images), "discriminant_tpr": tpr}
        write_study(folder, f"{task.title}: ", finding, [], figures, values, model_sha256=None)


def describe_training_images(task: Task) -> Data:
    lists = read_splits(task.splits, task)
    train = lists["train"]
    if np.bincount(train.labels, minlength=len(CLASSES)).min() < FEWEST:
        raise UserError(f"a class has fewer than {FEWEST} training images: too few to compare classes")
    pixels = load_images(config.dataset_root, task, train.files, task.bands)
    features, looks = band_features(pixels), brightness_and_contrast(pixels)
    confusion = discriminant_confusion(features, train)
    return Data(task.title, lists, pixels, features[:, : len(task.bands)], looks, positions(train.patches), confusion)


def discriminant_confusion(features: np.ndarray, train: Split) -> np.ndarray:
    """(10, 10) training images by true and predicted class, each predicted from the other folds."""
    parts = PredefinedSplit(folds(train, grounds(train)))
    predicted = cross_val_predict(LinearDiscriminantAnalysis(), features, train.labels, cv=parts)
    confusion = np.zeros((len(CLASSES), len(CLASSES)), int)
    np.add.at(confusion, (train.labels, predicted), 1)
    return confusion


def most_confused(confusion: np.ndarray) -> tuple[int, int, float]:
    """The two classes of which, together, the largest share is taken for the other one; the share."""
    images = confusion.sum(1)
    shares = np.triu((confusion + confusion.T) / (images[:, None] + images), 1)
    a, b = np.unravel_index(shares.argmax(), shares.shape)
    return int(a), int(b), float(shares[a, b])


def what_will_be_hard(data: Data) -> list[str]:
    """Three sentences: the classes that overlap most, the class found least, the class that depends most on its place."""
    a, b, share = most_confused(data.confusion)
    tpr = np.diag(data.confusion) / data.confusion.sum(1)
    worst, best = tpr.argmin(), tpr.argmax()
    label, axis, difference = strongest_place(data)
    darker, brighter = HALVES[axis] if difference > 0 else HALVES[axis][::-1]
    return [
        f"{CLASSES[a]} and {CLASSES[b]} overlap most: {percent(share)} % of both together are taken for the other class, so "
        "colour and contrast alone will not separate them.",
        f"{CLASSES[worst]} is found least ({percent(tpr[worst])} %, {CLASSES[best]} {percent(tpr[best])} %): a network has to "
        "learn its shapes.",
        f"{CLASSES[label]} depends most on its place: in the {brighter} it is brighter than in the {darker} by "
        f"{abs(difference):.1f} standard deviations, so a network may fail where it saw no {CLASSES[label]}.",
    ]


def strongest_place(data: Data) -> tuple[int, int, float]:
    """Where brightness differs most between the two halves of a class's places.

    Returns:
        The class; 0 for latitude or 1 for longitude; mean brightness of the northern less the southern half, or of the
        eastern less the western one, in standard deviations within the halves (Cohen's d).
    """
    found = []
    for label, (looks, places) in enumerate(zip(data.of_class(data.looks), data.of_class(data.places), strict=True)):
        for axis, upper in enumerate((places > np.median(places, axis=0)).T):
            high, low = looks[upper, 0], looks[~upper, 0]
            found.append((label, axis, float((high.mean() - low.mean()) / np.sqrt((high.var() + low.var()) / 2))))
    return max(found, key=lambda row: abs(row[2]))


def two_lines(class_name: str) -> str:
    """ "Permanent\nCrop": above a small image there is no room for more."""
    return re.sub("(?<=[a-z])(?=[A-Z])", "\n", class_name)


def draw_samples(data: Data, folder: Path) -> str:
    """samples.png: a column for each class, drawn by the split's seed."""
    rng = np.random.default_rng(config.split_seed)
    framed = np.pad(data.pixels, ((0, 0), (2, 2), (2, 2), (0, 0)), constant_values=255)
    columns = [np.concatenate(rng.permutation(images)[:SAMPLES]) for images in data.of_class(framed)]
    figure, axes = plt.subplots(figsize=(6.9, 2.55), layout="constrained")
    axes.imshow(np.concatenate(columns, axis=1), interpolation="nearest")
    side = framed.shape[1]
    axes.set_xticks(np.arange(len(CLASSES)) * side + side / 2, map(two_lines, CLASSES))
    axes.set_yticks([])
    axes.tick_params(top=True, labeltop=True, bottom=False, labelbottom=False, length=0, labelsize=6)
    axes.spines[:].set_visible(False)
    title = f"{data.title}: {SAMPLES} random training images of each class, each 640 m wide"
    figure.suptitle(title, fontsize=8, x=0.01, ha="left")
    save(figure, folder / "samples.png", None)
    return "samples.png"


def draw_spectra(data: Data, folder: Path) -> str:
    """spectra.png: each class's mean and quartiles over its images, before the means of the others."""
    bands = sorted(range(len(MS_BANDS)), key=lambda band: WAVELENGTHS[MS_BANDS[band]])
    nanometres = [WAVELENGTHS[MS_BANDS[band]] for band in bands]
    spectra = data.of_class(data.spectra[:, bands] / 100)  # percent
    means = np.array([of_class.mean(0) for of_class in spectra])
    figure, grid = plt.subplots(2, 5, figsize=(6.9, 3.1), layout="constrained", sharex=True, sharey=True)
    for axes, of_class, mean, name, colour in zip(grid.flat, spectra, means, CLASSES, COLOURS, strict=True):
        axes.plot(nanometres, means.T, color="#CCCCCC", linewidth=0.5)
        axes.fill_between(
            nanometres, *np.quantile(of_class, (0.25, 0.75), axis=0), color=colour, alpha=0.3, linewidth=0
        )
        axes.plot(nanometres, mean, color=colour, linewidth=1.2, marker="o", markersize=1.8)
        axes.set_title(name, fontsize=6.5, color=colour, fontweight="bold")
        axes.tick_params(labelsize=6)
        axes.set_xscale("log")  # ten of the bands lie below 1,000 nm
        axes.set_xticks((500, 1000, 2000), ("500", "1,000", "2,000"))
        axes.minorticks_off()
    figure.supxlabel("wavelength (nm)", fontsize=7)
    figure.supylabel("reflectance (%)", fontsize=7)
    distances = np.abs(means[:, None] - means).mean(2) + np.diag(np.full(len(CLASSES), np.inf))
    a, b = np.unravel_index(distances.argmin(), distances.shape)
    title = (
        f"The closest mean spectra: {CLASSES[a]} and {CLASSES[b]}, on average {distances[a, b]:.1f} points apart.\n"
        "Shaded: quartiles of the training images. Grey: the other classes"
    )
    figure.suptitle(title, fontsize=8, x=0.01, ha="left")
    save(figure, folder / "spectra.png", None)
    return "spectra.png"


def draw_classes(data: Data, folder: Path) -> str:
    """classes.png: a row for each class with its images per list, its brightness and contrast, and what it is taken for."""
    shape = {"figsize": (6.9, 2.5), "sharey": True, "width_ratios": (1.2, 0.9, 0.9, 1.5), "layout": "constrained"}
    figure, panels = plt.subplots(1, 4, **shape)
    rows, start = np.arange(len(CLASSES)), np.zeros(len(CLASSES), int)
    for part, colour in zip(PARTS, ("#BBBBBB", COLOURS[4], COLOURS[1]), strict=True):
        counts = np.bincount(data.lists[part].labels, minlength=len(CLASSES))
        bars = panels[0].barh(rows, counts, left=start, color=colour, label=part)
        panels[0].bar_label(bars, label_type="center", fontsize=4.5, color="white" if part == "test" else "black")
        start += counts
    panels[0].legend(
        frameon=False, ncols=3, fontsize=5, columnspacing=1, loc="lower left", bbox_to_anchor=(-0.05, 0.97)
    )
    for axes, looks in zip(panels[1:3], data.looks.T, strict=True):
        low, middle, high = np.array([np.quantile(values, (0.25, 0.5, 0.75)) for values in data.of_class(looks)]).T
        axes.barh(rows, high - low, left=low, height=0.5, color="#BBBBBB")
        axes.plot(middle, rows, "o", color="black", markersize=2)
        axes.set_xlim(left=0)
    shares = data.confusion / data.confusion.sum(1, keepdims=True)
    panels[3].imshow(np.sqrt(shares), cmap="Blues", vmin=0, vmax=1, aspect="auto")
    for row, column in np.argwhere(shares >= 0.005):
        colour = "white" if shares[row, column] > 0.4 else "black"
        text = f"{100 * shares[row, column]:.0f}"
        panels[3].text(column, row, text, ha="center", va="center", color=colour, fontsize=5)
    panels[3].set_xticks(rows, CLASSES, rotation=50, ha="right", rotation_mode="anchor")
    panels[3].spines[:].set_visible(False)
    panels[0].set_yticks(rows, CLASSES)
    panels[0].set_ylim(len(CLASSES) - 0.5, -0.5)
    unit = "of 255" if data.pixels.dtype == np.uint8 else "reflectance × 10,000"
    for axes, title in zip(panels, ("", "brightness", "contrast", "taken for (%), by the discriminant"), strict=True):
        axes.set_title(title, fontsize=6)
        axes.tick_params(labelsize=5.5)
    for axes, label in zip(panels, ("images", unit, unit), strict=False):
        axes.set_xlabel(label, fontsize=6)
    a, b, _ = most_confused(data.confusion)
    title = (
        f"{data.title}: simple statistics confuse {CLASSES[a]} and {CLASSES[b]} most; dots: medians, bars: quartiles"
    )
    figure.suptitle(title, fontsize=8, x=0.01, ha="left")
    save(figure, folder / "classes.png", None)
    return "classes.png"


def draw_map(data: Data, folder: Path) -> str:
    """map.png: the training patches of each class, before all patches of EuroSAT."""
    to_map = Transformer.from_crs("EPSG:4326", MAP)  # latitude first, gives northing and easting
    every = np.array(to_map.transform(*positions(list(complete_patches())).T)) / 1000  # km, (2, patches)
    figure, grid = plt.subplots(2, 5, figsize=(6.9, 2.7), layout="constrained")
    for axes, places, name, colour in zip(grid.flat, data.of_class(data.places), CLASSES, COLOURS, strict=True):
        of_class = np.array(to_map.transform(*places.T)) / 1000
        axes.scatter(*every[::-1], s=0.3, color="#CCCCCC", linewidth=0)
        axes.scatter(*of_class[::-1], s=1.6, color=colour, linewidth=0)
        axes.set(aspect="equal")
        axes.margins(0.01)
        axes.set_axis_off()
        axes.set_title(name, fontsize=6.5, color=colour, fontweight="bold")
    title = (
        f"{data.title}: where the training patches of each class lie; grey: all 27,000 patches of EuroSAT (ETRS89-LAEA)"
    )
    figure.suptitle(title, fontsize=8, x=0.01, ha="left")
    save(figure, folder / "map.png", None)
    return "map.png"


if __name__ == "__main__":
    run(main, __doc__, choices=TASKS)
