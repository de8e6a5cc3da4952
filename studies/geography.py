"""Is the network better near its training patches? Errors on the map, by distance, and on ground with two labels.

Run from the project root: python -m studies.geography (RGB; EUROSAT_PROFILE=published or spatial for these profiles). Seconds.
It also compares all profiles that have a final model: a random split is easier than one from west to east.

reads   the final RGB models' test results, splits/, positions and overlaps of the patches (engine/), the images
writes  outputs/<profile>/rgb/geography/: study.json, map.png, distance.png, two_labels.png
"""

from base.command_line import run
from base.project import CLASSES, PARTS, RGB, config

import matplotlib.pyplot as plt
import numpy as np
from pyproj import Transformer
from sklearn.neighbors import BallTree

from dataset import canonical_file, class_of
from engine.metrics import accuracy_interval
from engine.plots import COLOURS, contact_sheet, save
from engine.results import Results
from engine.splits import complete_patches, overlapping_pairs
from studies.subject import Subject, interval_text, percent, results_of_profiles, subjects

EARTH_RADIUS = 6371.0  # km, mean
DISTANCES = (0, 1, 2, 5, 10, 20, 50, 100, 200, 500, 10_000)  # km, edges of the bins
FEWEST = 20  # images in a bin
PAIRS_IN_FIGURE, PAIRS_PER_ROW = 16, 8
MAP = "EPSG:3035"  # Europe, equal area; metres


def main() -> None:
    for subject in subjects([RGB], "geography"):
        test, train, correct = subject.results.split, subject.lists["train"], subject.results.correct
        distance = distances_to(positions(train.patches), positions(test.patches))
        bins, median = by_distance(distance, correct), float(np.median(distance))
        draw_errors_on_map(subject, correct)
        draw_distance(subject, bins)
        on_shared = overlapping_train(test.patches, set(train.patches))
        pairs = two_labels(subject.results)
        figures = ["map.png", "distance.png", *draw_pairs(subject, pairs)]
        models = {profile: results for (profile, _), results in results_of_profiles([RGB]).items()}
        first, last, outcomes = bins[0], bins[-1], [outcome for *_, outcome in pairs]
        finding = (
            f"The median distance from a test patch to the nearest training patch is {median:.1f} km. Within {first[1]:g} km "
            f"{percent(first[3])} % of {first[2]} patches are correct, beyond {last[0]:g} km {percent(last[3])} % of {last[2]}. "
            f"{shared_ground(on_shared, correct)} {len(pairs)} test patches show ground that has two labels. "
            f"{outcomes.count('label')} of them are predicted as their label, {outcomes.count('other label')} as the other one."
        )
        by_km = [
            [f"{low:g} to {high:g}", str(count), percent(value), interval_text(value, count)]
            for low, high, count, value, _ in bins
        ]
        caption = f"Accuracy by distance to the nearest training patch ({config.profile})"
        header = ["km", "test images", "accuracy (%)", "95 % interval"]
        tables = [profile_table(models), {"caption": caption, "header": header, "rows": by_km}]
        subject.write(finding, tables, figures, median_km=median, on_shared_ground=int(on_shared.sum()))


def positions(patches: list[str]) -> np.ndarray:
    """Latitude and longitude of the centres, degrees: (patches, 2)."""
    rows = complete_patches()
    return np.array([[float(rows[patch]["latitude"]), float(rows[patch]["longitude"])] for patch in patches])


def distances_to(train: np.ndarray, test: np.ndarray) -> np.ndarray:
    """Kilometres from each test position to the nearest training position, on the sphere (haversine)."""
    return BallTree(np.radians(train), metric="haversine").query(np.radians(test))[0][:, 0] * EARTH_RADIUS


def by_distance(distance: np.ndarray, correct: np.ndarray) -> list[tuple]:
    """(from km, to km, images, accuracy, its interval) of each bin. A bin with few images is joined to the next one."""
    rows, low = [], DISTANCES[0]
    for high in DISTANCES[1:]:
        hits, rest = correct[(distance >= low) & (distance < high)], (distance >= high).sum()
        if len(hits) and (not rest or min(len(hits), rest) >= FEWEST):
            rows.append((low, high, len(hits), float(hits.mean()), accuracy_interval(hits.mean(), len(hits))))
            low = high
    return rows


def pairs_both_ways() -> list[tuple[str, str]]:
    """The pairs of patches that show the same ground, each in both orders."""
    return [pair for a, b in overlapping_pairs() for pair in ((a, b), (b, a))]


def overlapping_train(patches: list[str], train: set[str]) -> np.ndarray:
    """Which test patches show ground that a training patch also shows: (patches,) bool."""
    shared = {b for a, b in pairs_both_ways() if a in train}
    return np.array([patch in shared for patch in patches])


def shared_ground(on_shared: np.ndarray, correct: np.ndarray) -> str:
    if not on_shared.any():
        return "No test patch shows ground of a training patch."
    return (
        f"{on_shared.sum()} test patches show ground of a training patch: {percent(correct[on_shared].mean())} % of them are "
        f"correct. Without them accuracy is {percent(correct[~on_shared].mean())} % instead of {percent(correct.mean())} %."
    )


def two_labels(results: Results) -> list[tuple[str, str, str, str]]:
    """Test patches whose ground has two labels.

    Returns:
        (test patch, the other patch of the same ground, predicted class, outcome), sorted. The outcome tells what was
        predicted: "label", "other label" or "third class".
    """
    predictions = dict(zip(results.split.patches, (CLASSES[k] for k in results.predictions), strict=True))
    rows = []
    for patch, other in pairs_both_ways():
        if patch in predictions and class_of(patch) != class_of(other):
            outcomes = {class_of(patch): "label", class_of(other): "other label"}
            rows.append((patch, other, predictions[patch], outcomes.get(predictions[patch], "third class")))
    return sorted(rows)


def profile_table(models: dict[str, Results]) -> dict:
    results = models.values()
    rows = [
        ["test images", *(f"{len(r.split.files):,}" for r in results)],
        ["accuracy", *(percent(r.metrics["accuracy"]) for r in results)],
        ["95 % interval", *(interval_text(r.metrics["accuracy"], len(r.split.files)) for r in results)],
        *([f"TPR {name}", *(percent(r.metrics["tpr"][name]) for r in results)] for name in CLASSES),
    ]
    caption = "Accuracy and TPR (%) on random splits (course, published) and on one from west to east (spatial)"
    return {"caption": caption, "header": ["", *models], "rows": rows}


def draw_errors_on_map(subject: Subject, correct: np.ndarray) -> None:
    to_map = Transformer.from_crs("EPSG:4326", MAP)  # latitude first, gives northing and easting
    figure, axes = plt.subplots(figsize=(6.6, 5.2), layout="constrained")
    for part, colour in zip(PARTS, ("#BBBBBB", COLOURS[6], COLOURS[1]), strict=True):
        north, east = to_map.transform(*positions(subject.lists[part].patches).T)
        axes.scatter(east / 1000, north / 1000, s=0.6, color=colour, label=part, rasterized=True)
    wrong = [patch for patch, hit in zip(subject.results.split.patches, correct, strict=True) if not hit]
    if wrong:
        north, east = to_map.transform(*positions(wrong).T)
        rings = {"s": 14, "facecolor": "none", "edgecolor": COLOURS[0], "linewidth": 0.8}
        axes.scatter(east / 1000, north / 1000, label="error on test", **rings)
    axes.set(aspect="equal", xlabel="km east", ylabel="km north")
    axes.legend(frameon=False, markerscale=2, loc="upper left")
    title = f"{config.profile}: {len(wrong)} errors on {len(correct):,} test patches, and all patches of the lists (ETRS89-LAEA)"
    figure.suptitle(title, fontsize=8, x=0.01, ha="left")
    save(figure, subject.folder / "map.png", subject.final.sha256)


def draw_distance(subject: Subject, bins: list[tuple]) -> None:
    figure, axes = plt.subplots(figsize=(6.6, 2.6), layout="constrained")
    for x, (_, _, count, value, (low, high)) in enumerate(bins):
        bars = [[100 * (value - low)], [100 * (high - value)]]
        axes.errorbar(x, 100 * value, bars, color=COLOURS[1], marker="o", capsize=2)
        axes.annotate(f"{count:,}", (x, 100 * value), xytext=(5, -3), textcoords="offset points", fontsize=6)
    labels = [f"over {low:g}" if high == DISTANCES[-1] else f"{low:g} to {high:g}" for low, high, *_ in bins]
    axes.set(xlabel="km to the nearest training patch", ylabel="accuracy (%)")
    axes.set_xticks(range(len(bins)), labels)
    title = (
        f"{config.profile}: test accuracy by distance to the nearest training patch; 95 % intervals, number of images"
    )
    figure.suptitle(title, fontsize=8, x=0.01, ha="left")
    save(figure, subject.folder / "distance.png", subject.final.sha256)


def draw_pairs(subject: Subject, pairs: list[tuple[str, str, str, str]]) -> list[str]:
    """two_labels.png: `two_labels` in pairs, the test patch above, the other patch of the same ground below."""
    path = subject.folder / "two_labels.png"
    drawn = sorted(pairs, key=lambda pair: pair[3] == "label")[:PAIRS_IN_FIGURE]
    if not drawn:
        path.unlink(missing_ok=True)  # of an earlier model
        return []
    images = iter(subject.pictures([canonical_file(RGB, patch) for pair in drawn for patch in pair[:2]]))
    upper, lower = [], []
    for patch, other, predicted, outcome in drawn:
        upper.append((next(images), f"{class_of(patch)}\npredicted:\n{predicted}", outcome != "label"))
        lower.append((next(images), f"the other:\n{class_of(other)}", False))
    starts = range(0, len(drawn), PAIRS_PER_ROW)
    rows = [("", line[start : start + PAIRS_PER_ROW]) for start in starts for line in (upper, lower)]
    title = (
        f"{config.profile}: {len(drawn)} of {len(pairs)} test patches whose ground has two labels, misclassified ones first.\n"
        "Above the test patch, below the other patch of the same ground"
    )
    contact_sheet(path, rows, title, subject.final.sha256, width=6.9)
    return [path.name]


if __name__ == "__main__":
    run(main, __doc__)
