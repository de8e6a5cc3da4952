"""How good are the probabilities? Calibration before and after temperature scaling, and confident predictions alone.

Run from the project root: python -m studies.calibration; with `rgb` or `ms` for one task. A minute or two: val is predicted.
The temperature is fitted on val. The saved logits do not change.

reads   the final model and its test results, the val images
writes  outputs/<profile>/<task>/calibration/: study.json, reliability.png, tail_accuracy.png
"""

from base.command_line import run
from base.project import CLASSES, TASKS, Task

import matplotlib.pyplot as plt
import numpy as np

from engine.metrics import average_precisions, compute_metrics
from engine.plots import COLOURS, save
from studies.statistics import calibration_error, reliability, tail_accuracy, temperature
from studies.subject import Subject, percent, subjects

THRESHOLDS = 21  # from 0.5, or half of the highest confidence if that is lower, up to the highest confidence


def main(tasks: list[Task]) -> None:
    for subject in subjects(tasks, "calibration"):
        logits, labels = subject.results.logits, subject.results.split.labels
        divisor = temperature(subject.predict("val"), subject.lists["val"].labels)
        scaled, names = logits / divisor, ("as saved", f"divided by {divisor:.2f}")
        errors = [calibration_error(values, labels) for values in (logits, scaled)]
        losses = [compute_metrics(values, labels)["loss"] for values in (logits, scaled)]
        bins = [reliability(values, labels) for values in (logits, scaled)]
        highest = float(scaled.double().softmax(1).max())
        thresholds = np.linspace(min(0.5, highest / 2), highest, THRESHOLDS, endpoint=False)
        accuracy, remain, mean = tail_accuracy(scaled, labels, thresholds)
        draw_reliability(subject, bins, errors, names)
        draw_tail(subject, thresholds, accuracy, remain, mean)
        precisions = average_precisions(logits, labels)
        mean_precision = float(np.nanmean(precisions))
        confident = min(int(np.searchsorted(thresholds, 0.9)), THRESHOLDS - 1)
        finding = (
            f"The expected calibration error is {percent(errors[0])} %. After dividing the logits by {divisor:.2f}, the "
            f"temperature fitted on val, it is {percent(errors[1])} %. The scaled probability is above "
            f"{thresholds[confident]:.2f} for {remain[confident].sum():,} test images, of which {percent(mean[confident])} % are "
            f"correct (mean over the classes). mAP is {percent(mean_precision)} %."
        )
        steps = sorted({0, THRESHOLDS // 2, confident, THRESHOLDS - 1})
        tail_rows = [
            [name, percent(precisions[k]), *(f"{percent(accuracy[s, k])} ({remain[s, k]})" for s in steps)]
            for k, name in enumerate(CLASSES)
        ]
        means = [f"{percent(mean[s])} ({remain[s].sum()})" for s in steps]
        tables = [
            {
                "caption": "Calibration on test",
                "header": ["logits", "expected calibration error (%)", "cross-entropy"],
                "rows": [
                    [name, percent(e), f"{loss:.4f}"] for name, e, loss in zip(names, errors, losses, strict=True)
                ],
            },
            {
                "caption": "Average precision (%) of each class; accuracy (%) of the predictions of a class whose scaled "
                "probability is above a threshold, and their number",
                "header": ["class", "AP", *(f"> {thresholds[step]:.3f}" for step in steps)],
                "rows": [*tail_rows, ["mean", percent(mean_precision), *means]],
            },
        ]
        values = {"temperature": divisor, "calibration_error": errors, "loss": losses, "map": mean_precision}
        subject.write(finding, tables, ["reliability.png", "tail_accuracy.png"], **values)


def draw_reliability(
    subject: Subject, bins: list[dict[str, np.ndarray]], errors: list[float], names: tuple[str, str]
) -> None:
    figure, grid = plt.subplots(1, 2, figsize=(6.6, 2.9), sharey=True, layout="constrained")
    for axes, rows, error, name in zip(grid, bins, errors, names, strict=True):
        axes.plot([0, 1], [0, 1], color="#999999", linewidth=0.6, linestyle="--")
        axes.plot(rows["confidence"], rows["accuracy"], color=COLOURS[1], marker="o", markersize=3, linewidth=1)
        for x, y, images in zip(rows["confidence"], rows["accuracy"], rows["images"], strict=True):
            if images:
                axes.annotate(str(images), (x, y), xytext=(3, -7), textcoords="offset points", fontsize=5)
        axes.set(xlim=(0.2, 1.02), ylim=(0, 1.04), xlabel="mean confidence of the bin")
        axes.set_title(f"logits {name}: calibration error {percent(error)} %", fontsize=7)
    grid[0].set_ylabel("accuracy of the bin")
    title = f"{subject.task.title}: on the dashed line confidence equals accuracy. Numbers: test images in the bin"
    figure.suptitle(title, fontsize=8, x=0.01, ha="left")
    save(figure, subject.folder / "reliability.png", subject.final.sha256)


def draw_tail(
    subject: Subject, thresholds: np.ndarray, accuracy: np.ndarray, remain: np.ndarray, mean: np.ndarray
) -> None:
    shape = {"figsize": (6.6, 4.2), "height_ratios": (2, 1), "layout": "constrained"}
    figure, (upper, lower) = plt.subplots(2, 1, sharex=True, **shape)
    for index, name in enumerate(CLASSES):
        upper.plot(thresholds, 100 * accuracy[:, index], color=COLOURS[index], linewidth=0.9, label=name)
    upper.plot(thresholds, 100 * mean, color="black", linewidth=1.8, label="mean of the classes")
    upper.set_ylabel("accuracy above (%)")
    place = {"loc": "upper left", "bbox_to_anchor": (1, 1), "frameon": False}
    upper.legend(title="predicted class", title_fontsize=6, fontsize=5.5, **place)
    lower.plot(thresholds, remain.sum(1), color="black")
    lower.set(ylabel="images above", xlabel="threshold of the scaled probability", ylim=(0, None))
    first, last = (percent(mean[step]) for step in (0, np.flatnonzero(~np.isnan(mean))[-1]))
    title = f"{subject.task.title}: accuracy is {first} % above the lowest threshold, {last} % above the highest one"
    figure.suptitle(title, fontsize=8, x=0.01, ha="left")
    save(figure, subject.folder / "tail_accuracy.png", subject.final.sha256)


if __name__ == "__main__":
    run(main, __doc__, choices=TASKS)
