"""Does near to the training patches mean right? Errors on the map, by distance, and on ground that is shown twice.

Run from the project root: python -m studies.geography (RGB; EUROSAT_PROFILE=published or spatial for theirs). Seconds. Compares
the profiles whose final models are there: a random split asks another question than one from west to east.

reads   the final RGB models' test results, splits/, positions and overlaps of the patches (engine/), the images
writes  outputs/<profile>/rgb/geography/: study.json, map.png, distance.png, two_labels.png
"""

import matplotlib.pyplot as plt
import numpy as np
from pyproj import Transformer
from sklearn.neighbors import BallTree

from dataset import CLASSES, canonical_file, class_of
from engine.evaluation import Results
from engine.metrics import accuracy_interval
from engine.plots import COLOURS, contact_sheet, save
from engine.splits import complete_patches, overlapping_pairs
from project import PARTS, config, run
from studies.subject import Subject, percent, results_of_profiles, span, subjects

EARTH_RADIUS = 6371.0  # km, mean
DISTANCES = (0, 1, 2, 5, 10, 20, 50, 100, 200, 500, 10_000)  # km, edges of the bins
FEWEST = 20  # images in a bin that is drawn
PAIRS_SHOWN = 16
MAP = "EPSG:3035"  # Europe, equal area; metres


def main() -> None:
    for subject in subjects(("rgb",), "geography"):
        test, train = subject.results.split, subject.lists["train"]
        right = subject.results.right
        distance = distances_to(positions(train.patches), positions(test.patches))
        bins = by_distance(distance, right)
        draw_map(subject, right)
        draw_distance(subject, bins)
        on_shared = overlapping_train(test.patches, set(train.patches))
        pairs = two_labels(subject)
        figures = ["map.png", "distance.png", *draw_pairs(subject, pairs)]
        rivals = {profile: results for (profile, _), results in results_of_profiles(("rgb",)).items()}
        first, last = bins[0], bins[-1]
        finding = (
            f"The median test patch lies {np.median(distance):.1f} km from the nearest training patch. Within {first[1]:g} km "
            f"{percent(first[3])} % of {first[2]} are right, beyond {last[0]:g} km {percent(last[3])} % of {last[2]}. "
            + shared_ground(on_shared, right)
            + f" {sum(told == 'own' for *_, told in pairs)} of {len(pairs)} test patches whose ground carries two labels are "
            f"answered with their own, {sum(told == 'the other' for *_, told in pairs)} with the other."
        )
        tables = [
            profile_table(rivals),
            {
                "caption": f"Accuracy by distance to the nearest training patch ({config.profile})",
                "header": ["km", "test images", "accuracy (%)", "95 % interval"],
                "rows": [
                    [f"{low:g} to {high:g}", str(count), percent(value), span(value, count)]
                    for low, high, count, value, _ in bins
                ],
            },
        ]
        subject.write(
            finding, tables, figures, median_km=float(np.median(distance)), on_shared_ground=int(on_shared.sum())
        )


def positions(patches: list[str]) -> np.ndarray:
    """Latitude and longitude of the centres, degrees: (patches, 2)."""
    rows = complete_patches()
    return np.array([[float(rows[patch]["latitude"]), float(rows[patch]["longitude"])] for patch in patches])


def distances_to(train: np.ndarray, test: np.ndarray) -> np.ndarray:
    """Kilometres from each test position to the nearest training position, on the sphere (haversine)."""
    return BallTree(np.radians(train), metric="haversine").query(np.radians(test))[0][:, 0] * EARTH_RADIUS


def by_distance(distance: np.ndarray, right: np.ndarray) -> list[tuple]:
    """(from km, to km, images, accuracy, its interval) of each bin; a bin with few images is joined to the next one."""
    rows, low = [], DISTANCES[0]
    for high in DISTANCES[1:]:
        own, rest = right[(distance >= low) & (distance < high)], (distance >= high).sum()
        if len(own) and (not rest or min(len(own), rest) >= FEWEST):
            rows.append((low, high, len(own), float(own.mean()), accuracy_interval(own.mean(), len(own))))
            low = high
    return rows


def overlapping_train(patches: list[str], train: set[str]) -> np.ndarray:
    """Which test patches show ground that a training patch shows, too: (patches,) bool."""
    shared = {b for a, b in both_ways() if a in train}
    return np.array([patch in shared for patch in patches])


def both_ways() -> list[tuple[str, str]]:
    return [pair for a, b in overlapping_pairs() for pair in ((a, b), (b, a))]


def shared_ground(on_shared: np.ndarray, right: np.ndarray) -> str:
    if not on_shared.any():
        return "No test patch shows ground of a training patch."
    return (
        f"{on_shared.sum()} test patches show ground of a training patch: {percent(right[on_shared].mean())} % of them are right, "
        f"and without them accuracy is {percent(right[~on_shared].mean())} % instead of {percent(right.mean())} %."
    )


def two_labels(subject: Subject) -> list[tuple[str, str, str, str]]:
    """(test patch, the other patch of the same ground, answer, "own", "the other" or "a third") of pairs with two labels."""
    results = subject.results
    answers = dict(zip(results.split.patches, (CLASSES[k] for k in results.answers), strict=True))
    rows = []
    for patch, other in both_ways():
        if patch in answers and class_of(patch) != class_of(other):
            answer = answers[patch]
            told = {class_of(patch): "own", class_of(other): "the other"}.get(answer, "a third")
            rows.append((patch, other, answer, told))
    return sorted(rows)


def profile_table(rivals: dict[str, Results]) -> dict:
    every = rivals.values()
    rows = [
        ["test images", *(f"{len(r.split.files):,}" for r in every)],
        ["accuracy", *(percent(r.metrics["accuracy"]) for r in every)],
        ["95 % interval", *(span(r.metrics["accuracy"], len(r.split.files)) for r in every)],
        *([f"TPR {name}", *(percent(r.metrics["tpr"][name]) for r in every)] for name in CLASSES),
    ]
    caption = "Accuracy and TPR (%) on random splits (course, published) and on one from west to east (spatial)"
    return {"caption": caption, "header": ["", *rivals], "rows": rows}


def draw_map(subject: Subject, right: np.ndarray) -> None:
    """The parts, and the errors on test."""
    to_map = Transformer.from_crs("EPSG:4326", MAP)  # latitude first, gives northing and easting
    figure, axes = plt.subplots(figsize=(6.6, 5.2), layout="constrained")
    for part, colour in zip(PARTS, ("#BBBBBB", COLOURS[6], COLOURS[1]), strict=True):
        north, east = to_map.transform(*positions(subject.lists[part].patches).T)
        axes.scatter(east / 1000, north / 1000, s=0.6, color=colour, label=part, rasterized=True)
    wrong = [patch for patch, ok in zip(subject.results.split.patches, right, strict=True) if not ok]
    if wrong:
        north, east = to_map.transform(*positions(wrong).T)
        axes.scatter(
            east / 1000,
            north / 1000,
            s=14,
            facecolor="none",
            edgecolor=COLOURS[0],
            linewidth=0.8,
            label="error on test",
        )
    axes.set(aspect="equal", xlabel="km east", ylabel="km north")
    axes.legend(frameon=False, markerscale=2, loc="upper left")
    title = f"{config.profile}: {len(wrong)} errors on {len(right):,} test patches, among the patches of the lists (ETRS89-LAEA)"
    figure.suptitle(title, fontsize=8, x=0.01, ha="left")
    save(figure, subject.folder / "map.png", subject.final.sha256)


def draw_distance(subject: Subject, bins: list[tuple]) -> None:
    figure, axes = plt.subplots(figsize=(6.6, 2.6), layout="constrained")
    for x, (_, _, count, value, (low, high)) in enumerate(bins):
        axes.errorbar(
            x, 100 * value, [[100 * (value - low)], [100 * (high - value)]], color=COLOURS[1], marker="o", capsize=2
        )
        axes.annotate(f"{count:,}", (x, 100 * value), xytext=(5, -3), textcoords="offset points", fontsize=6)
    labels = [f"over {low:g}" if high == DISTANCES[-1] else f"{low:g} to {high:g}" for low, high, *_ in bins]
    axes.set(
        xlabel="km to the nearest training patch", ylabel="accuracy (%)", xticks=range(len(bins)), xticklabels=labels
    )
    title = f"{config.profile}: accuracy on test by distance to the nearest training patch, 95 % intervals, number of images"
    figure.suptitle(title, fontsize=8, x=0.01, ha="left")
    save(figure, subject.folder / "distance.png", subject.final.sha256)


def draw_pairs(subject: Subject, pairs: list[tuple[str, str, str, str]]) -> list[str]:
    """two_labels.png: the test patch above, the other patch of the same ground below; in red an answer that is not its label."""
    path = subject.folder / "two_labels.png"
    shown = sorted(pairs, key=lambda pair: pair[3] == "own")[:PAIRS_SHOWN]
    rows = []
    for start in range(0, len(shown), 8):
        own = shown[start : start + 8]
        upper = subject.pictures([canonical_file("rgb", patch) for patch, *_ in own])
        lower = subject.pictures([canonical_file("rgb", other) for _, other, *_ in own])
        rows.append(
            (
                "",
                [
                    (i, f"{class_of(p)}\nanswer:\n{a}", told != "own")
                    for i, (p, _, a, told) in zip(upper, own, strict=True)
                ],
            )
        )
        rows.append(("", [(i, f"the other:\n{class_of(o)}", False) for i, (_, o, *_) in zip(lower, own, strict=True)]))
    if not rows:
        path.unlink(missing_ok=True)  # of a former model
        return []
    title = (
        f"{config.profile}: {len(shown)} of {len(pairs)} test patches whose ground carries two labels, those answered otherwise "
        "first.\nAbove the test patch, below the other patch of the same ground"
    )
    contact_sheet(path, rows, title, subject.final.sha256, width=6.9)
    return [path.name]


if __name__ == "__main__":
    run(main, __doc__)
