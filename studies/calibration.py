"""What are the probabilities worth? Calibration before and after temperature scaling, ranking, and the sure predictions.

Run from the project root: python -m studies.calibration, with `rgb` or `ms` for one task. A minute or two: val is predicted.
The temperature is fitted on val; the logits on disk stay as they are.

reads   the final model and its test results, the val images
writes  outputs/<profile>/<task>/calibration/: study.json, reliability.png, tail_accuracy.png; cache/
"""

import matplotlib.pyplot as plt
import numpy as np

from dataset import CLASSES
from engine.metrics import (
    average_precisions,
    calibration_error,
    compute_metrics,
    reliability,
    tail_accuracy,
    temperature,
)
from engine.plots import COLOURS, save
from project import TASKS, run
from studies.subject import Subject, percent, subjects

THRESHOLDS = 21  # from 0.5 to the highest confidence (from half of that, where nothing is so sure)


def main(tasks: tuple[str, ...]) -> None:
    for subject in subjects(tasks, "calibration"):
        logits, labels = subject.results.logits, subject.results.split.labels
        heat = temperature(subject.predict("val"), subject.lists["val"].labels)
        scaled = logits / heat
        errors = [calibration_error(values, labels) for values in (logits, scaled)]
        losses = [compute_metrics(values, labels)["loss"] for values in (logits, scaled)]
        draw_reliability(subject, [reliability(values, labels) for values in (logits, scaled)], errors, heat)
        highest = float(scaled.double().softmax(1).max())
        thresholds = np.linspace(
            min(0.5, highest / 2), highest, THRESHOLDS, endpoint=False
        )  # none is above the highest itself
        accuracy, remain, mean = tail_accuracy(scaled, labels, thresholds)
        draw_tail(subject, thresholds, accuracy, remain, mean)
        precisions = average_precisions(logits, labels)
        mean_precision = float(np.nanmean(precisions))
        sure = min(int(np.searchsorted(thresholds, 0.9)), THRESHOLDS - 1)
        finding = (
            f"The probabilities are off by {percent(errors[0])} points on average; divided by the temperature {heat:.2f}, "
            f"fitted on val, the logits give {percent(errors[1])}. Of the {remain[sure].sum():,} test images that are then "
            f"answered with more than {thresholds[sure]:.2f}, {percent(mean[sure])} % are right on the mean of the classes; "
            f"mAP is {percent(mean_precision)} %."
        )
        steps = sorted({0, THRESHOLDS // 2, sure, THRESHOLDS - 1})
        tables = [
            {
                "caption": "Calibration on test",
                "header": ["logits", "expected calibration error (%)", "cross-entropy"],
                "rows": [
                    [name, percent(error), f"{loss:.4f}"]
                    for name, error, loss in zip(("as saved", f"divided by {heat:.2f}"), errors, losses, strict=True)
                ],
            },
            {
                "caption": "Average precision (%), and tail accuracy (%, of how many) of scaled predictions above a threshold",
                "header": ["class (label; of tails: answer)", "AP", *(f"> {thresholds[step]:.3f}" for step in steps)],
                "rows": [
                    [name, percent(precisions[k]), *(f"{percent(accuracy[s, k])} ({remain[s, k]})" for s in steps)]
                    for k, name in enumerate(CLASSES)
                ]
                + [
                    [
                        "mean",
                        percent(mean_precision),
                        *(f"{percent(mean[s])} ({remain[s].sum()})" for s in steps),
                    ]
                ],
            },
        ]
        values = {
            "temperature": heat,
            "calibration_error": errors,
            "loss": losses,
            "map": mean_precision,
        }
        subject.write(finding, tables, ["reliability.png", "tail_accuracy.png"], **values)


def draw_reliability(subject: Subject, rows: list[dict], errors: list[float], heat: float) -> None:
    figure, grid = plt.subplots(1, 2, figsize=(6.6, 2.9), sharey=True, layout="constrained")
    for axes, own, error, name in zip(grid, rows, errors, ("as saved", f"divided by {heat:.2f}"), strict=True):
        axes.plot([0, 1], [0, 1], color="#999999", linewidth=0.6, linestyle="--")
        axes.plot(own["confidence"], own["accuracy"], color=COLOURS[1], marker="o", markersize=3, linewidth=1)
        for x, y, images in zip(own["confidence"], own["accuracy"], own["images"], strict=True):
            if images:
                axes.annotate(str(images), (x, y), xytext=(3, -7), textcoords="offset points", fontsize=5)
        axes.set(xlim=(0.2, 1.02), ylim=(0, 1.04), xlabel="mean confidence of the bin")
        axes.set_title(f"logits {name}: off by {percent(error)} points", fontsize=7)
    grid[0].set_ylabel("accuracy of the bin")
    title = f"{subject.title}: on the dashed line a probability is what it says. Numbers: test images in the bin"
    figure.suptitle(title, fontsize=8, x=0.01, ha="left")
    save(figure, subject.folder / "reliability.png", subject.final.sha256)


def draw_tail(
    subject: Subject, thresholds: np.ndarray, accuracy: np.ndarray, remain: np.ndarray, mean: np.ndarray
) -> None:
    figure, (upper, lower) = plt.subplots(
        2, 1, figsize=(6.6, 4.2), sharex=True, height_ratios=(2, 1), layout="constrained"
    )
    for index, name in enumerate(CLASSES):
        upper.plot(thresholds, 100 * accuracy[:, index], color=COLOURS[index], linewidth=0.9, label=name)
    upper.plot(thresholds, 100 * mean, color="black", linewidth=1.8, label="mean of the classes")
    upper.set_ylabel("accuracy above (%)")
    upper.legend(
        title="answered with", title_fontsize=6, fontsize=5.5, frameon=False, loc="upper left", bbox_to_anchor=(1, 1)
    )
    lower.plot(thresholds, remain.sum(1), color="black")
    lower.set(ylabel="images above", xlabel="threshold of the scaled probability", ylim=(0, None))
    first, last = (percent(mean[step]) for step in (0, np.flatnonzero(~np.isnan(mean))[-1]))
    title = f"{subject.title}: who only takes sure answers gets {last} % instead of {first} %, and fewer images"
    figure.suptitle(title, fontsize=8, x=0.01, ha="left")
    save(figure, subject.folder / "tail_accuracy.png", subject.final.sha256)


if __name__ == "__main__":
    run(main, __doc__, choices=TASKS)
