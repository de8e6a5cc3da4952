"""Why does the network err? Each misclassified test image beside the training images it resembles, and a proposed cause.

Run from the project root: python -m studies.explain_errors; with `rgb` or `ms` for one task. Minutes: the features of all three
lists are computed. The local example is the nearest training image of the true class, the local counterexample the nearest
one of the other classes. The distance is 1 - cosine of the inputs of the linear layer. The column `verdict` of errors.csv is
for a person. A new run keeps the verdicts, and reads verdicts.csv, which the explorer saves, from the same folder.

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

from dataset import class_of, patch_of
from engine.plots import contact_sheet
from studies.subject import Subject, band_features, percent, subjects

CAUSES = ("noise", "mislabelling", "under-representation", "underfitting", "overfitting", "overlapping labels")
NEIGHBOURS = 10
ERRORS_ON_A_SHEET = 12
NEIGHBOURS_HEADER = ["file", "example", "example_distance", "counterexample", "counterexample_distance"]
HEADER = [
    *("file", "true_class", "predicted", "p_true", "p_predicted", "example", "example_distance"),
    *("counterexample", "counterexample_distance", "counterexample_class", "cause", "verdict"),
]


def main(tasks: list[Task]) -> None:
    for subject in subjects(tasks, "explain_errors"):
        test, train = subject.lists["test"], subject.lists["train"]
        features = {part: subject.predict(part, embed=True).numpy() for part in PARTS}
        near = neighbours(features["train"], train.labels, features["test"], test.labels)
        table = [
            [file, train.files[a], f"{d1:.4f}", train.files[b], f"{d2:.4f}"]
            for file, a, d1, b, d2 in zip(test.files, *(near[column] for column in NEIGHBOURS_HEADER[1:]), strict=True)
        ]
        write_csv(subject.folder / "neighbours.csv", NEIGHBOURS_HEADER, table)
        probabilities = subject.results.logits.double().softmax(1).numpy()
        predictions, wrong = subject.results.predictions, np.flatnonzero(~subject.results.correct)
        causes = propose_causes(subject, features, near, probabilities, wrong)
        verdicts = former_verdicts(subject.folder)
        errors = []
        for index, cause in zip(wrong, causes, strict=True):
            file, example, d1, counterexample, d2 = table[index]
            label, predicted, p = test.labels[index], predictions[index], probabilities[index]
            row = [file, CLASSES[label], CLASSES[predicted], f"{p[label]:.4f}", f"{p[predicted]:.4f}"]
            row += [example, d1, counterexample, d2, class_of(patch_of(counterexample)), cause, verdicts.get(file, "")]
            errors.append(dict(zip(HEADER, row, strict=True)))
        write_csv(subject.folder / "errors.csv", HEADER, [list(row.values()) for row in errors])
        write_errors_study(subject, errors, draw_errors(subject, wrong, errors))


def neighbours(
    train: np.ndarray, train_labels: np.ndarray, test: np.ndarray, test_labels: np.ndarray
) -> dict[str, np.ndarray]:
    """The nearest training images of each test image. Arguments: features (images, channels) and labels (images,).

    Returns:
        example and counterexample, (images,) indices into train, of the same and of another class; their distances;
        nearest, (images, NEIGHBOURS), of any class.
    """
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


def propose_causes(
    subject: Subject,
    features: dict[str, np.ndarray],
    near: dict[str, np.ndarray],
    probabilities: np.ndarray,
    wrong: np.ndarray,
) -> list[str]:
    """One of CAUSES for each misclassified image, by the rules above."""
    labels, predictions = subject.lists["train"].labels, subject.results.predictions
    val_distances = (
        NearestNeighbors(n_neighbors=1, metric="cosine").fit(features["train"]).kneighbors(features["val"])[0]
    )
    far = np.quantile(val_distances, 0.95)
    looks = {part: brightness_and_contrast(subject.images(part).pixels) for part in ("train", "test")}
    low, high = (np.quantile(looks["train"], share, axis=0) for share in (0.001, 0.999))
    with torch.inference_mode():
        logits = subject.final.model.linear(torch.from_numpy(features["train"]).to(subject.device))
        train_predictions = logits.argmax(1).cpu().numpy()
    causes = []
    for index in wrong:
        agreeing = (labels[near["nearest"][index]] == predictions[index]).mean()
        d1, d2 = near["example_distance"][index], near["counterexample_distance"][index]
        example = near["example"][index]
        rules = (
            ((looks["test"][index] < low) | (looks["test"][index] > high)).any(),
            agreeing >= 0.9 and probabilities[index, predictions[index]] >= 0.9,
            min(d1, d2) > far,
            train_predictions[example] != labels[example],
            d1 < d2,
            True,
        )
        causes.append(CAUSES[rules.index(True)])
    return causes


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


def draw_errors(subject: Subject, wrong: np.ndarray, errors: list[dict[str, str]]) -> list[str]:
    """Contact sheets, two errors in a row. Each error: the image, its attribution, example and counterexample."""
    groups = []
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
    rows = [[cause, str(causes[cause]), str(verdicts[cause]) if verdicts else "–"] for cause in CAUSES]
    rows += [[verdict, "–", str(count)] for verdict, count in sorted(verdicts.items()) if verdict not in CAUSES]
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
    confusions = [[*pair, str(count)] for pair, count in confused]
    tables = [
        {"caption": "Causes, by rule and by a person", "header": ["cause", "proposed", "verdict"], "rows": rows},
        {"caption": "Most frequent confusions", "header": ["true class", "predicted", "images"], "rows": confusions},
    ]
    subject.write(finding, tables, figures, causes=dict(causes))


if __name__ == "__main__":
    run(main, __doc__, choices=TASKS)
