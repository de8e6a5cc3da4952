"""How sure are the test figures? Intervals for accuracy, TPR, mean TPR and mAP; final models compared on the same patches.

Run from the project root: python -m studies.uncertainty, with `rgb` or `ms` for one task. Half a minute for each.

reads   the final models' test results in outputs/; outputs/<profile>/<task>/search/table.csv where it is there
writes  outputs/<profile>/<task>/uncertainty/study.json
"""

import csv
import io
from collections import defaultdict
from pathlib import Path

import numpy as np

from dataset import CLASSES
from engine.evaluation import Results
from engine.metrics import accuracy_interval, average_precisions, mcnemar, mean_interval, true_positive_rates
from project import TASKS, config, run
from studies.subject import percent, results_of_profiles, span, subjects


def main(tasks: tuple[str, ...]) -> None:
    rivals = results_of_profiles(TASKS)
    for subject in subjects(tasks, "uncertainty"):
        results = subject.results
        logits, labels = results.logits, results.split.labels
        precisions = average_precisions(logits, labels)
        means = {
            "mean TPR": (results.metrics["mean_tpr"], mean_interval(true_positive_rates, logits, labels, config.seed)),
            "mAP": (np.nanmean(precisions), mean_interval(average_precisions, logits, labels, config.seed)),
        }
        accuracy = results.metrics["accuracy"]
        low, high = accuracy_interval(accuracy, len(labels))
        rows = [["accuracy", "Wilson", str(len(labels)), percent(accuracy), span(accuracy, len(labels))]]
        for name, (value, (lower, upper)) in means.items():
            rows.append([name, "bootstrap", str(len(labels)), percent(value), f"{percent(lower)} to {percent(upper)}"])
        widest = 0.0
        for index, name in enumerate(CLASSES):
            if images := int((labels == index).sum()):
                tpr = results.metrics["tpr"][name]
                lower, upper = accuracy_interval(tpr, images)
                widest = max(widest, upper - lower)
                rows.append([f"TPR {name}", "Wilson", str(images), percent(tpr), span(tpr, images)])
        pairs = compared(subject.task, rivals)
        spread = spread_over_seeds(subject.folder.with_name("search") / "table.csv")
        finding = (
            f"Accuracy {percent(accuracy)} % with a 95 % interval from {percent(low)} to {percent(high)}; the TPR of a single "
            f"class is known to ± {50 * widest:.1f} points at worst. {spread}"
        )
        tables = [
            {
                "caption": "95 % intervals (%)",
                "header": ["figure", "method", "images", "value", "interval"],
                "rows": rows,
            },
            {
                "caption": "Two models on the same test patches: McNemar's exact test",
                "header": ["first", "second", "patches", "first alone right", "second alone right", "p"],
                "rows": pairs,
            },
        ]
        subject.write(finding, [table for table in tables if table["rows"]], [], accuracy=[accuracy, low, high])


def compared(task: str, rivals: dict[tuple[str, str], Results]) -> list[list[str]]:
    """A row for each pair of final models, one of them the subject, whose test lists share patches."""
    rows, own = [], (config.profile, task)
    for other in (key for key in rivals if key != own):
        right = [dict(zip(r.split.patches, r.right, strict=True)) for r in (rivals[own], rivals[other])]
        if shared := sorted(set(right[0]) & set(right[1])):
            test = mcnemar(*(np.array([of[patch] for patch in shared]) for of in right))
            counts = map(str, (len(shared), test["first_alone"], test["second_alone"]))
            rows.append([" ".join(own), " ".join(other), *counts, f"{test['p_value']:.3g}"])
    return rows


def spread_over_seeds(path: Path) -> str:
    """What studies.search measured of a setting with several seeds."""
    runs = defaultdict(list)
    if path.exists():
        for row in csv.DictReader(io.StringIO(path.read_text(encoding="utf-8"))):
            runs[row["run"]].append(float(row["spare"] or row["val_accuracy"]))
    several = {name: values for name, values in runs.items() if len(values) > 1}
    if not several:
        return "Another seed's training would differ, too: not measured."
    name, values = max(several.items(), key=lambda item: len(item[1]))
    return f"{len(values)} seeds of {name} lie between {percent(min(values))} and {percent(max(values))} % on spare images."


if __name__ == "__main__":
    run(main, __doc__, choices=TASKS)
