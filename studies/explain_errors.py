"""Why does the network err? Each misclassified test image beside what it learnt from, and a proposed cause by stated rules.

Run from the project root: python -m studies.explain_errors, with `rgb` or `ms` for one task. Minutes: all three lists are
predicted for their features. The local example is the nearest training image of the true class, the local counterexample the
nearest of the other classes, by 1 - cosine of what the linear layer sees. The column `verdict` of errors.csv is a person's: a
new run keeps it, and takes over what verdicts.csv, saved by the explorer into the same folder, says.

The rules, the first that holds names the cause (d1, d2: distances of example and counterexample):
  noise                 brightness or contrast beyond those of 99.8 % of the training images
  mislabelling          of the 10 nearest training images at least 9 are of the predicted class, which has p >= 0.9
  under-representation  d1 and d2 are larger than the smaller of the two is for 95 % of val: nothing like it was trained on
  underfitting          the model answers the example itself wrongly
  overfitting           d1 < d2: the features are nearest to the true class, and the linear layer answers otherwise
  overlapping labels    the rest: both classes are near

reads   the final model and its test results, the images of all lists
writes  outputs/<profile>/<task>/explain_errors/: errors.csv, neighbours.csv (all test images), study.json, errors-1.png, …; cache/
"""

import csv
import io
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from captum.attr import IntegratedGradients
from sklearn.neighbors import NearestNeighbors

from dataset import CLASSES, class_of, patch_of
from engine.plots import contact_sheet
from engine.splits import list_text
from project import PARTS, TASKS, run, write_text
from studies.subject import Subject, band_features, percent, subjects

CAUSES = ("noise", "mislabelling", "under-representation", "underfitting", "overfitting", "overlapping labels")
NEIGHBOURS = 10
ERRORS_ON_A_SHEET = 12
NEIGHBOURS_HEADER = ["file", "example", "example_distance", "counterexample", "counterexample_distance"]
HEADER = [
    *("file", "true_class", "predicted", "p_true", "p_predicted", "example", "example_distance"),
    *("counterexample", "counterexample_distance", "counterexample_class", "cause", "verdict"),
]


def main(tasks: tuple[str, ...]) -> None:
    for subject in subjects(tasks, "explain_errors"):
        test, train = subject.lists["test"], subject.lists["train"]
        features = {part: subject.predict(part, embed=True).numpy() for part in PARTS}
        near = neighbours(features["train"], train.labels, features["test"], test.labels)
        table = [
            [file, train.files[a], f"{d1:.4f}", train.files[b], f"{d2:.4f}"]
            for file, a, d1, b, d2 in zip(test.files, *(near[column] for column in NEIGHBOURS_HEADER[1:]), strict=True)
        ]
        write_text(subject.folder / "neighbours.csv", list_text(NEIGHBOURS_HEADER, table))
        probabilities = subject.results.logits.double().softmax(1).numpy()
        predicted, wrong = subject.results.answers, np.flatnonzero(~subject.results.right)
        causes = proposed_causes(subject, features, near, probabilities, wrong)
        verdicts = former_verdicts(subject.folder)
        errors = []
        for index, cause in zip(wrong, causes, strict=True):
            file, example, d1, counterexample, d2 = table[index]
            label, answer, own = test.labels[index], predicted[index], probabilities[index]
            row = [file, CLASSES[label], CLASSES[answer], f"{own[label]:.4f}", f"{own[answer]:.4f}"]
            row += [example, d1, counterexample, d2, class_of(patch_of(counterexample)), cause, verdicts.get(file, "")]
            errors.append(dict(zip(HEADER, row, strict=True)))
        write_text(subject.folder / "errors.csv", list_text(HEADER, [list(row.values()) for row in errors]))
        figures = draw(subject, wrong, errors)
        leave(subject, errors, len(test.files), figures)


def neighbours(
    train: np.ndarray, train_labels: np.ndarray, test: np.ndarray, test_labels: np.ndarray
) -> dict[str, np.ndarray]:
    """For each test image the nearest training image of its class and of the others, and the ten nearest of all.

    Returns:
        example, counterexample (indices into train), their distances, each (images,); nearest (images, 10).
    """
    found = {name: np.zeros(len(test), int) for name in ("example", "counterexample")}
    distances = {f"{name}_distance": np.full(len(test), np.nan) for name in found}
    for label in np.unique(test_labels):
        own = np.flatnonzero(test_labels == label)
        for name, group in (("example", train_labels == label), ("counterexample", train_labels != label)):
            pool = np.flatnonzero(group)
            distance, index = NearestNeighbors(n_neighbors=1, metric="cosine").fit(train[pool]).kneighbors(test[own])
            found[name][own], distances[f"{name}_distance"][own] = pool[index[:, 0]], distance[:, 0]
    every = NearestNeighbors(n_neighbors=min(NEIGHBOURS, len(train)), metric="cosine").fit(train)
    return {**found, **distances, "nearest": every.kneighbors(test, return_distance=False)}


def proposed_causes(
    subject: Subject,
    features: dict[str, np.ndarray],
    near: dict[str, np.ndarray],
    probabilities: np.ndarray,
    wrong: np.ndarray,
) -> list[str]:
    """One of CAUSES for each wrong image, by the rules above."""
    labels, predicted = subject.lists["train"].labels, subject.results.answers
    of_val = NearestNeighbors(n_neighbors=1, metric="cosine").fit(features["train"]).kneighbors(features["val"])[0]
    far = np.quantile(of_val, 0.95)
    looks = {part: brightness_and_contrast(subject.images(part).pixels) for part in ("train", "test")}
    low, high = (np.quantile(looks["train"], share, axis=0) for share in (0.001, 0.999))
    with torch.inference_mode():
        outputs = subject.final.model.linear(torch.from_numpy(features["train"]).to(subject.device))
        answers = outputs.argmax(1).cpu().numpy()
    causes = []
    for index in wrong:
        agreeing = (labels[near["nearest"][index]] == predicted[index]).mean()
        d1, d2 = near["example_distance"][index], near["counterexample_distance"][index]
        rules = (
            ((looks["test"][index] < low) | (looks["test"][index] > high)).any(),
            agreeing >= 0.9 and probabilities[index, predicted[index]] >= 0.9,
            min(d1, d2) > far,
            answers[near["example"][index]] != labels[near["example"][index]],
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
    """{file: a person's verdict}; verdicts.csv, saved by the explorer, wins over errors.csv."""
    verdicts = {}
    for name in ("errors.csv", "verdicts.csv"):
        if (folder / name).exists():
            rows = csv.DictReader(io.StringIO((folder / name).read_text(encoding="utf-8-sig")))
            verdicts |= {row["file"]: row["verdict"] for row in rows if row.get("file") and row.get("verdict")}
    return verdicts


def attention(subject: Subject, indices: np.ndarray) -> list[np.ndarray]:
    """Where each answer comes from: (64, 64, 3) uint8 pictures, brighter where the pixel speaks for the predicted class.

    Integrated gradients from the mean training image (Sundararajan et al., ICML 2017), positive parts summed over bands,
    averaged over 5 x 5 pixels; one view.
    """
    data, pictures = subject.images("test"), []
    model = subject.final.model.eval()
    method = IntegratedGradients(model)
    for start in range(0, len(indices), 10):
        images, _ = data[torch.from_numpy(indices[start : start + 10])]
        with torch.no_grad():
            targets = model(images).argmax(1)
        shares = method.attribute(images, target=targets, n_steps=24, internal_batch_size=60).detach().clamp(min=0)
        smooth = torch.nn.functional.avg_pool2d(shares.float().sum(1, keepdim=True), 5, stride=1, padding=2)[:, 0]
        smooth = (smooth / smooth.amax((1, 2), keepdim=True).clamp(min=1e-12)).sqrt().cpu().numpy()
        pictures += [np.repeat((255 * own).astype(np.uint8)[:, :, None], 3, axis=2) for own in smooth]
    return pictures


def draw(subject: Subject, wrong: np.ndarray, errors: list[dict[str, str]]) -> list[str]:
    """Contact sheets: an error with where the network looked, example and counterexample; two errors in a row."""
    if not errors:
        return []
    looked = attention(subject, wrong)
    groups = []
    for values, attributed in zip(errors, looked, strict=True):
        image, example, other = subject.pictures([values["file"], values["example"], values["counterexample"]])
        groups.append(
            [
                (
                    image,
                    f"{values['true_class']}\nanswer {float(values['p_predicted']):.2f}:\n{values['predicted']}",
                    True,
                ),
                (attributed, f"where it looked\ncause by rule:\n{values['cause']}", False),
                (example, f"example, {float(values['example_distance']):.2f}\n{values['true_class']}", False),
                (
                    other,
                    f"other, {float(values['counterexample_distance']):.2f}\n{values['counterexample_class']}",
                    False,
                ),
            ]
        )
    names = []
    for first in range(0, len(groups), ERRORS_ON_A_SHEET):
        own = groups[first : first + ERRORS_ON_A_SHEET]
        rows = [
            ("", [picture for group in own[start : start + 2] for picture in group]) for start in range(0, len(own), 2)
        ]
        title = (
            f"{subject.title}: errors {first + 1} to {first + len(own)} of {len(groups)} on test, two in a row. Each: the image "
            "with label and answer, where the network looked,\nthe nearest training image of the true class and of the others, "
            "with their distances"
        )
        names.append(f"errors-{first // ERRORS_ON_A_SHEET + 1}.png")
        contact_sheet(subject.folder / names[-1], rows, title, subject.final.sha256, width=6.9)
    for path in subject.folder.glob("errors-*.png"):  # of a former model with more errors
        if path.name not in names:
            path.unlink()
    return names


def leave(subject: Subject, errors: list[dict[str, str]], images: int, figures: list[str]) -> None:
    causes = Counter(row["cause"] for row in errors)
    judged = Counter(verdict for row in errors if (verdict := row["verdict"]))
    rows = [[cause, str(causes[cause]), str(judged[cause] if judged else "–")] for cause in CAUSES]
    rows += [[verdict, "–", str(count)] for verdict, count in sorted(judged.items()) if verdict not in CAUSES]
    confused = Counter((row["true_class"], row["predicted"]) for row in errors).most_common(5)
    finding = f"{len(errors)} errors on {images:,} test images."
    if errors:
        most, count = causes.most_common(1)[0]
        nearer = sum(float(row["example_distance"]) < float(row["counterexample_distance"]) for row in errors)
        finding += (
            f" The commonest proposed cause is {most} ({count}); {nearer} lie nearer to a training image of their own class "
            f"than to one of another ({percent(nearer / len(errors))} %). "
        )
        (label, answer), times = confused[0]
        finding += (
            f"The commonest confusion: {label} taken for {answer} ({times})."
            if times > 1
            else "No confusion occurs twice."
        )
    tables = [
        {"caption": "Causes, by rule and by a person", "header": ["cause", "proposed", "verdict"], "rows": rows},
        {
            "caption": "Commonest confusions",
            "header": ["label", "answer", "images"],
            "rows": [[*pair, str(count)] for pair, count in confused],
        },
    ]
    subject.write(finding, tables, figures, causes=dict(causes))


if __name__ == "__main__":
    run(main, __doc__, choices=TASKS)
