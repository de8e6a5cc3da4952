"""How precise are the test figures? Intervals for accuracy, TPR, mean TPR and mAP; two models on the same patches.

Run from the project root: python -m studies.uncertainty; with `rgb` or `ms` for one task. Half a minute each.

reads   the final models' test results in outputs/; outputs/<profile>/<task>/search/table.csv if it exists
writes  outputs/<profile>/<task>/uncertainty/study.json
"""

from pathlib import Path

from base.command_line import run
from base.files import read_csv, reading
from base.project import CLASSES, TASKS, Task, config

import numpy as np

from engine.metrics import accuracy_interval, average_precisions, true_positive_rates
from engine.results import Results
from studies.statistics import mcnemar, mean_interval
from studies.subject import interval_text, percent, results_of_profiles, subjects


def main(tasks: list[Task]) -> None:
    models = results_of_profiles(list(TASKS.values()))
    for subject in subjects(tasks, "uncertainty"):
        rows, widest = intervals(subject.results)
        accuracy = subject.results.metrics["accuracy"]
        low, high = accuracy_interval(accuracy, len(subject.results.split.labels))
        spread = spread_over_seeds(subject.folder.with_name("search") / "table.csv", subject.final.setting.name)
        finding = (
            f"Accuracy is {percent(accuracy)} %, with a 95 % interval from {percent(low)} to {percent(high)}. The TPR of a "
            f"single class is uncertain by up to ± {50 * widest:.1f} points. {spread}"
        )
        header = ["figure", "method", "images", "value", "interval"]
        tables = [{"caption": "95 % intervals (%)", "header": header, "rows": rows}]
        if pairs := compare_models((config.profile, subject.task.name), models):
            caption = "Two models on the same test patches: McNemar's exact test"
            header = ["first", "second", "patches", "only first correct", "only second correct", "p"]
            tables.append({"caption": caption, "header": header, "rows": pairs})
        subject.write(finding, tables, [], accuracy=[accuracy, low, high])


def intervals(results: Results) -> tuple[list[list[str]], float]:
    """Rows of a table with the interval of each test figure, and the width of the widest interval of a class."""
    logits, labels, metrics = results.logits, results.split.labels, results.metrics
    images, accuracy, widest = len(labels), metrics["accuracy"], 0.0
    rows = [["accuracy", "Wilson", str(images), percent(accuracy), interval_text(accuracy, images)]]
    for name, statistic in (("mean TPR", true_positive_rates), ("mAP", average_precisions)):
        low, high = mean_interval(statistic, logits, labels, config.seed)
        value = percent(np.nanmean(statistic(logits, labels)))
        rows.append([name, "bootstrap", str(images), value, f"{percent(low)} to {percent(high)}"])
    for name, images in zip(CLASSES, np.bincount(labels, minlength=len(CLASSES)).tolist(), strict=True):
        if images:
            tpr = metrics["tpr"][name]
            low, high = accuracy_interval(tpr, images)
            widest = max(widest, high - low)
            rows.append([f"TPR {name}", "Wilson", str(images), percent(tpr), interval_text(tpr, images)])
    return rows, widest


def compare_models(first: tuple[str, str], models: dict[tuple[str, str], Results]) -> list[list[str]]:
    """A row for each other model whose test list shares patches with the first one's. Keys are (profile, task)."""
    rows = []
    correct = {key: dict(zip(r.split.patches, r.correct, strict=True)) for key, r in models.items()}
    for second in (key for key in models if key != first):
        if shared := sorted(set(correct[first]) & set(correct[second])):
            test = mcnemar(*(np.array([correct[key][patch] for patch in shared]) for key in (first, second)))
            counts = map(str, (len(shared), test["first_alone"], test["second_alone"]))
            rows.append([" ".join(first), " ".join(second), *counts, f"{test['p_value']:.3g}"])
    return rows


def spread_over_seeds(path: Path, name: str) -> str:
    """What studies.search measured for the setting of this name with several seeds."""
    values = []
    if path.exists():
        with reading(path, "run: python -m studies.search"):
            values = [float(row["spare"]) for row in read_csv(path) if row["run"] == name and row["spare"]]
    if len(values) < 2:
        return "The spread over seeds of the training was not measured."
    return (
        f"With {len(values)} seeds, {name} reaches {percent(min(values))} to {percent(max(values))} % on spare images."
    )


if __name__ == "__main__":
    run(main, __doc__, choices=TASKS)
