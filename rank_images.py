"""Tasks 2 and 3: the five best and the five worst ranked test images of three classes.

All test images are ranked by the model's probability of the class. The worst of them look like anything but the class, so the
worst among the class's images are shown, too: these show what the model has not learnt.

reads   outputs/<profile>/<task>/test_logits.pt, test_files.csv, test_metrics.json; the images; RANKED_CLASSES in config.py
writes  ranking.csv and ranking.png beside them
"""

import re

from base.command_line import run
from base.files import write_csv
from base.project import CLASSES, TASKS, Task, config, display_path

import numpy as np

from dataset import class_of, displayed_image, image_paths, read_image
from engine.final_model import tasks_with_model
from engine.plots import contact_sheet
from engine.results import read_results_of_model

COUNT = 5
HEADER = ["class_name", "row", "rank", "file", "true_class", "probability"]
ROWS = ("top 5", "bottom 5", "own bottom 5")


def main(tasks: list[Task]) -> None:
    for task in tasks_with_model(tasks):
        rank(task)
    print("next: python make_report.py")


def rank(task: Task) -> None:
    results = read_results_of_model(task)
    files, predictions = results.split.files, results.predictions
    paths = image_paths(config.dataset_root, task, files)
    true_classes = np.array([class_of(patch) for patch in results.split.patches])
    # Logarithms in float64, because in float32 many probabilities round to 1 and would tie.
    log_probabilities = results.logits.double().log_softmax(1).numpy()
    table, figure_rows = [], []
    for name in config.ranked_classes:
        scores = log_probabilities[:, CLASSES.index(name)]
        order = np.argsort(-scores, kind="stable")
        ranks = {index: position + 1 for position, index in enumerate(order)}
        of_class = order[true_classes[order] == name]
        for row, chosen in zip(
            ROWS, (order[:COUNT], order[: -COUNT - 1 : -1], of_class[: -COUNT - 1 : -1]), strict=True
        ):
            images = []
            for index in chosen:
                probability, true_class = float(np.exp(scores[index])), true_classes[index]
                table.append([name, row, ranks[index], files[index], true_class, f"{probability:.6g}"])
                mistake = CLASSES[predictions[index]] != true_class
                two_lines = re.sub("(?<=[a-z])(?=[A-Z])", "\n", true_class)  # "PermanentCrop"
                caption = f"{two_lines}\np {probability:{'.3f' if probability >= 0.0005 else '.0e'}}"
                images.append((displayed_image(read_image(paths[index], task), task), caption, mistake))
            figure_rows.append((f"{name}:\n{row}", images))
    write_csv(task.outputs / "ranking.csv", HEADER, table)
    title = (
        f"{task.title}: {len(files):,} test images ranked by the probability p of a class.\n"
        "Above each image its true class, in red if the prediction is another"
    )
    contact_sheet(task.outputs / "ranking.png", figure_rows, title, source=results.record["logits_sha256"])
    print(f"{task.title}: ranked {len(files):,} test images for {', '.join(config.ranked_classes)}")
    print(f"wrote {display_path(task.outputs)}/ranking.csv, ranking.png")


if __name__ == "__main__":
    run(main, __doc__, choices=TASKS)
