"""Tasks 2 and 3: the five best and the five worst ranked test images of three classes.

All test images are ranked by the model's probability of the class. The worst ranked of all look like anything but the
class; so the worst ranked among the class's own images are shown too: these are the ones that teach.

reads   outputs/<profile>/<task>/test_logits.pt, test_files.csv, test_metrics.json; the images; RANKED_CLASSES in config.py
writes  ranking.csv and ranking.png beside them
"""

import re
from pathlib import Path

import numpy as np
import torch.nn.functional as F

from dataset import CLASSES, IMAGE_SETS, class_of, displayed, image_paths, read_image
from engine.evaluation import read_results_of_model, with_model
from engine.plots import contact_sheet
from engine.splits import list_text
from project import TASKS, config, outputs_dir, run, shown, write_text

COUNT = 5
HEADER = ["class_name", "row", "rank", "file", "true_class", "probability"]
ROWS = ("top 5", "bottom 5", "own bottom 5")


def main(tasks: tuple[str, ...]) -> None:
    for task, folder in with_model({task: outputs_dir(task) for task in tasks}).items():
        rank(task, folder)
    print("next: python make_report.py")


def rank(task: str, folder: Path) -> None:
    results = read_results_of_model(folder, task)
    files, logits = results.split.files, results.logits
    paths = image_paths(config.dataset_root, task, files)
    true_classes = np.array([class_of(patch) for patch in results.split.patches])
    # In log space and float64: many probabilities round to 1 in float32 and would tie.
    log_probabilities = F.log_softmax(logits.double(), dim=1).numpy()
    table, figure_rows = [], []
    for name in config.ranked_classes:
        scores = log_probabilities[:, CLASSES.index(name)]
        order = np.argsort(-scores, kind="stable")
        own = order[true_classes[order] == name]
        for row, chosen in zip(ROWS, (order[:COUNT], order[: -COUNT - 1 : -1], own[: -COUNT - 1 : -1]), strict=True):
            ranks = {index: position + 1 for position, index in enumerate(order)}
            images = []
            for index in chosen:
                probability = float(np.exp(scores[index]))
                table.append([name, row, ranks[index], files[index], true_classes[index], f"{probability:.6g}"])
                mistake = CLASSES[log_probabilities[index].argmax()] != true_classes[index]
                caption = f"{_two_lines(true_classes[index])}\np {_short(probability)}"
                images.append((displayed(read_image(paths[index], task), task), caption, mistake))
            figure_rows.append((f"{name}:\n{row}", images))
    write_text(folder / "ranking.csv", list_text(HEADER, table))
    title = (
        f"{IMAGE_SETS[task].name}: {len(files):,} test images ranked by the probability p of a class.\n"
        "Above each its true class, in red where the model names another"
    )
    contact_sheet(folder / "ranking.png", figure_rows, title, source=results.record["logits_sha256"])
    print(f"{IMAGE_SETS[task].name}: ranked {len(files):,} test images for {', '.join(config.ranked_classes)}")
    print(f"wrote {shown(folder)}/ranking.csv, ranking.png")


def _two_lines(class_name: str) -> str:
    """ "PermanentCrop" with a line break between its words."""
    return re.sub("(?<=[a-z])(?=[A-Z])", "\n", class_name)


def _short(probability: float) -> str:
    return f"{probability:.3f}" if probability >= 0.0005 else f"{probability:.0e}"


if __name__ == "__main__":
    run(main, __doc__, choices=TASKS)
