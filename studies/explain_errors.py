"""Why does the network err? Each misclassified test image beside the training images it resembles, and a proposed cause.

Run from the project root: python -m studies.explain_errors; with `rgb` or `ms` for one task. Minutes: the features of all three
lists are computed. The local example is the nearest training image of the true class, the local counterexample the nearest
one of the other classes. The distance is 1 - cosine of the inputs of the linear layer. The column `verdict` of errors.csv is
for a person. A new run keeps the verdicts, reads verdicts.csv, which the explorer saves, from the same folder, and counts how often
the verdict is the proposed cause.

The first rule that holds names the cause (d1, d2: distances of example and counterexample):
  noise                 brightness or contrast is outside the range of 99.8 % of the training images
  mislabelling          of the 10 nearest training images 9 or more are of the predicted class, and its probability is >= 0.9
  under-representation  d1 and d2 are larger than the distance to the nearest training image is for 95 % of val
  underfitting          the model also misclassifies the example
  overfitting           d1 < d2: the features are nearer to the true class, but the linear layer decides otherwise
  overlapping labels    everything else: both classes are near

reads   the final model and its test results, the images of all lists
writes  outputs/<profile>/<task>/explain_errors/: errors.csv, neighbours.csv (all test images), study.json, errors-1.png, …
"""

from collections import Counter
from pathlib import Path

from base.command_line import run
from base.files import read_csv, reading, write_csv
from base.project import CLASSES, PARTS, TASKS, Task

import numpy as np
import torch
from captum.attr import IntegratedGradients
from sklearn.neighbors import NearestNeighbors

from engine.plots import contact_sheet
from studies.subject import Subject, band_features, interval_text, percent, subjects

CAUSES = ("noise", "mislabelling", "under-representation", "underfitting", "overfitting", "overlapping labels")
NEIGHBOURS = 10
ERRORS_ON_A_SHEET = 12
NEIGHBOURS_HEADER = [
    *("file", "example", "example_distance", "counterexample", "counterexample_distance"),
    *(f"nearest_{rank}" for rank in range(1, NEIGHBOURS + 1)),
]
HEADER = [
    *("file", "true_class", "predicted", "p_true", "p_predicted", "example", "example_distance"),
    *("counterexample", "counterexample_distance", "counterexample_class", "cause", "verdict"),
]


def main(tasks: list[Task]) -> None:
    for subject in subjects(tasks, "explain_errors"):
        features = {part: subject.predict(part, embed=True).numpy() for part in PARTS}
        near = neighbours(subject, features)
        write_neighbours(subject, near)
        verdicts = former_verdicts(subject.folder)
        errors = explained_errors(subject, features, near, linear_predictions(subject, features["train"]))
        errors = [row | {"verdict": verdicts.get(row["file"], "")} for row in errors]
        write_csv(subject.folder / "errors.csv", HEADER, [list(row.values()) for row in errors])
        write_errors_study(subject, errors, draw_errors(subject, errors))


def neighbours(subject: Subject, features: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The nearest training images of each test image, given {part: features (images, channels)}.

    Returns:
        example and counterexample, (images,) indices into train, of the same and of another class; their distances;
        nearest, (images, NEIGHBOURS), of any class.
    """
    train, test = features["train"], features["test"]
    train_labels, test_labels = (subject.lists[part].labels for part in ("train", "test"))
    found = {name: np.zeros(len(test), int) for name in ("example", "counterexample")}
    distances = {f"{name}_distance": np.full(len(test), np.nan) for name in found}
    for label in np.unique(test_labels):
        rows = np.flatnonzero(test_labels == label)
        for name, group in (("example", train_labels == label), ("counterexample", train_labels != label)):
            pool = np.flatnonzero(group)
            distance, index = NearestNeighbors(n_neighbors=1, metric="cosine").fit(train[pool]).kneighbors(test[rows])
            found[name][rows], distances[f"{name}_distance"][rows] = pool[index[:, 0]], distance[:, 0]
    every = NearestNeighbors(n_neighbors=min(NEIGHBOURS, len(train)), metric="cosine").fit(train)
    return {**found, **distances, "nearest": every.kneighbors(test, return_distance=False)}


def write_neighbours(subject: Subject, near: dict[str, np.ndarray]) -> None:
    """neighbours.csv in the study's folder, from which studies.explorer makes its page."""
    files, rows = subject.lists["train"].files, []
    for index, file in enumerate(subject.lists["test"].files):
        row = [file]
        for kind in ("example", "counterexample"):
            row += [files[near[kind][index]], f"{near[f'{kind}_distance'][index]:.4f}"]
        nearest = [files[other] for other in near["nearest"][index]]
        rows.append(row + nearest + [""] * (NEIGHBOURS - len(nearest)))
    write_csv(subject.folder / "neighbours.csv", NEIGHBOURS_HEADER, rows)


def linear_predictions(subject: Subject, features: np.ndarray) -> np.ndarray:
    """What the final model predicts, (images,), given the input of its linear layer."""
    with torch.inference_mode():
        return subject.final.model.linear(torch.from_numpy(features).to(subject.device)).argmax(1).cpu().numpy()


def explained_errors(
    subject: Subject, features: dict[str, np.ndarray], near: dict[str, np.ndarray], train_predictions: np.ndarray
) -> list[dict[str, str]]:
    """A row of HEADER without a verdict for each misclassified test image, by its neighbours in a space of features.

    Args:
        features: {part: (images, channels)}.
        near: `neighbours` by these features.
        train_predictions: of the final model, (images,), whatever the features are.
    """
    train, test, predictions = subject.lists["train"], subject.lists["test"], subject.results.predictions
    probabilities = subject.results.logits.double().softmax(1).numpy()
    to_train = NearestNeighbors(n_neighbors=1, metric="cosine").fit(features["train"])
    far = np.quantile(to_train.kneighbors(features["val"])[0], 0.95)
    looks = {part: brightness_and_contrast(subject.images(part).pixels) for part in ("train", "test")}
    low, high = (np.quantile(looks["train"], share, axis=0) for share in (0.001, 0.999))
    rows = []
    for index in np.flatnonzero(~subject.results.correct):
        label, predicted, p = test.labels[index], predictions[index], probabilities[index]
        agreeing = (train.labels[near["nearest"][index]] == predicted).mean()
        example, other = near["example"][index], near["counterexample"][index]
        d1, d2 = near["example_distance"][index], near["counterexample_distance"][index]
        rules = (
            ((looks["test"][index] < low) | (looks["test"][index] > high)).any(),
            agreeing >= 0.9 and p[predicted] >= 0.9,
            min(d1, d2) > far,
            train_predictions[example] != train.labels[example],
            d1 < d2,
            True,
        )
        row = [test.files[index], CLASSES[label], CLASSES[predicted], f"{p[label]:.4f}", f"{p[predicted]:.4f}"]
        row += [train.files[example], f"{d1:.4f}", train.files[other], f"{d2:.4f}", CLASSES[train.labels[other]]]
        rows.append(dict(zip(HEADER, [*row, CAUSES[rules.index(True)]])))
    return rows


def brightness_and_contrast(pixels: np.ndarray) -> np.ndarray:
    """Mean over all pixels and bands, and mean of the bands' standard deviations: (images, 2)."""
    means, deviations = np.split(band_features(pixels), 2, axis=1)
    return np.stack([means.mean(1), deviations.mean(1)], axis=1)


def former_verdicts(folder: Path) -> dict[str, str]:
    """{file: a person's verdict}. verdicts.csv, which the explorer saves, wins over errors.csv."""
    verdicts = {}
    for path in (folder / "errors.csv", folder / "verdicts.csv"):
        if path.exists():
            with reading(path, "repair it, or delete it together with its verdicts"):
                verdicts |= {row["file"]: row["verdict"] for row in read_csv(path) if row["verdict"]}
    return verdicts


def attributions(subject: Subject, indices: np.ndarray) -> list[np.ndarray]:
    """Which pixels speak for the predicted class: (64, 64, 3) uint8 images, brighter for more.

    Integrated gradients from the mean training image (Sundararajan et al., ICML 2017). Positive parts are summed over the
    bands and averaged over 5 x 5 pixels; one view.
    """
    data, images_out = subject.images("test"), []
    model = subject.final.model.eval()
    method = IntegratedGradients(model)
    for start in range(0, len(indices), 10):
        images, _ = data[torch.from_numpy(indices[start : start + 10])]
        with torch.no_grad():
            targets = model(images).argmax(1)
        shares = method.attribute(images, target=targets, n_steps=24, internal_batch_size=60).detach().clamp(min=0)
        smooth = torch.nn.functional.avg_pool2d(shares.float().sum(1, keepdim=True), 5, stride=1, padding=2)[:, 0]
        smooth = (smooth / smooth.amax((1, 2), keepdim=True).clamp(min=1e-12)).sqrt().cpu().numpy()
        images_out += [np.repeat((255 * image).astype(np.uint8)[:, :, None], 3, axis=2) for image in smooth]
    return images_out


def draw_errors(subject: Subject, errors: list[dict[str, str]]) -> list[str]:
    """Contact sheets, two errors in a row. Each error: the image, its attribution, example and counterexample."""
    groups, wrong = [], np.flatnonzero(~subject.results.correct)
    for row, attribution in zip(errors, attributions(subject, wrong), strict=True):
        image, example, other = subject.pictures([row["file"], row["example"], row["counterexample"]])
        predicted = f"{row['true_class']}\npredicted {float(row['p_predicted']):.2f}:\n{row['predicted']}"
        near = f"example, {float(row['example_distance']):.2f}\n{row['true_class']}"
        near_other = f"other, {float(row['counterexample_distance']):.2f}\n{row['counterexample_class']}"
        where = f"where it looked\ncause by rule:\n{row['cause']}"
        captioned = (
            (image, predicted, True),
            (attribution, where, False),
            (example, near, False),
            (other, near_other, False),
        )
        groups.append(captioned)
    names = []
    for first in range(0, len(groups), ERRORS_ON_A_SHEET):
        sheet = groups[first : first + ERRORS_ON_A_SHEET]
        rows = [("", [image for group in sheet[i : i + 2] for image in group]) for i in range(0, len(sheet), 2)]
        title = (
            f"{subject.task.title}: errors {first + 1} to {first + len(sheet)} of {len(groups)} on test, two in a row. Each: the "
            "image with its true and its predicted class,\nwhere the network looked, the nearest training image of the true "
            "class and of the other classes, with distances"
        )
        names.append(f"errors-{first // ERRORS_ON_A_SHEET + 1}.png")
        contact_sheet(subject.folder / names[-1], rows, title, subject.final.sha256, width=6.9)
    for path in subject.folder.glob("errors-*.png"):  # of an earlier model with more errors
        if path.name not in names:
            path.unlink()
    return names


def write_errors_study(subject: Subject, errors: list[dict[str, str]], figures: list[str]) -> None:
    causes = Counter(row["cause"] for row in errors)
    verdicts = Counter(row["verdict"] for row in errors if row["verdict"])
    agreed = Counter(row["cause"] for row in errors if row["verdict"].strip().lower() == row["cause"])
    judged, agreeing = verdicts.total(), agreed.total()
    rows = [
        [cause, str(causes[cause]), *(str(counts[cause]) if judged else "–" for counts in (verdicts, agreed))]
        for cause in CAUSES
    ]
    rows += [[verdict, "–", str(count), "–"] for verdict, count in sorted(verdicts.items()) if verdict not in CAUSES]
    confused = Counter((row["true_class"], row["predicted"]) for row in errors).most_common(5)
    finding = f"{len(errors)} errors on {len(subject.results.split.files):,} test images."
    if errors:
        most, count = causes.most_common(1)[0]
        nearer = sum(float(row["example_distance"]) < float(row["counterexample_distance"]) for row in errors)
        (label, predicted), times = confused[0]
        finding += (
            f" The most frequent proposed cause is {most} ({count}). Of the errors, {nearer} ({percent(nearer / len(errors))} %) are "
            "nearer to a training image of their true class than to one of another class. "
        )
        most_often = f"The most frequent confusion: {label} is taken for {predicted} ({times})."
        finding += most_often if times > 1 else "No confusion occurs twice."
    if judged:
        share = agreeing / judged
        finding += (
            f" A person judged {judged} of the errors, and the rules propose the same cause for {agreeing} of them "
            f"({percent(share)} %, 95 % interval {interval_text(share, judged)})."
        )
    confusions = [[*pair, str(count)] for pair, count in confused]
    tables = [
        {
            "caption": "Causes, by rule and by a person",
            "header": ["cause", "proposed", "verdict", "both"],
            "rows": rows,
        },
        {"caption": "Most frequent confusions", "header": ["true class", "predicted", "images"], "rows": confusions},
    ]
    subject.write(finding, tables, figures, causes=dict(causes), judged=judged, agreeing=agreeing)


if __name__ == "__main__":
    run(main, __doc__, choices=TASKS)
