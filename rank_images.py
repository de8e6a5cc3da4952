"""Tasks 2 and 3: the five best and the five worst ranked test images of three classes.

All test images are ranked by the model's probability of the class. The worst ranked of all look like anything but the
class; so the worst ranked among the class's own images are shown too: these are the ones that teach.

reads   outputs/<profile>/<task>/test_logits.pt, test_files.csv, test_metrics.json; the images; config.RANKED_CLASSES
writes  ranking.csv and ranking.png beside them
"""

import re

import config
from predict_test import tasks_with_model
from project import UserError, outputs_dir, run, shown, write_text

COUNT = 5
HEADER = ["class_name", "row", "rank", "file", "true_class", "probability"]
ROWS = ("top 5", "bottom 5", "own bottom 5")


def main(tasks: tuple[str, ...]) -> None:
    for task in tasks_with_model(tasks):
        rank(task)
    print("next: python make_report.py")


def rank(task: str) -> None:
    import numpy as np
    import torch.nn.functional as F

    from dataset import CLASSES, IMAGE_SETS, list_text, patch_of
    from evaluation import model_hash
    from plots import ranking
    from reproduce import load_reference

    unknown = [name for name in config.RANKED_CLASSES if name not in CLASSES]
    if unknown:
        raise UserError(f"unknown class {unknown[0]!r} in RANKED_CLASSES of config.py; known: {', '.join(CLASSES)}")
    logits, files_text, record = load_reference(task)
    if record["model_sha256"] != model_hash(task):
        raise UserError(
            f"{shown(outputs_dir(task))}/test_logits.pt is of another model; run: python predict_test.py {task}"
        )
    files = [line.split(",")[0] for line in files_text.splitlines()[1:]]
    true_classes = np.array([patch_of(file).partition("/")[0] for file in files])
    # In log space and float64: many probabilities round to 1 in float32 and would tie.
    log_probabilities = F.log_softmax(logits.double(), dim=1).numpy()
    table, figure_rows = [], []
    for name in config.RANKED_CLASSES:
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
                images.append((displayed(files[index], task), caption, mistake))
            figure_rows.append((f"{name}:\n{row}", images))
    folder = outputs_dir(task)
    write_text(folder / "ranking.csv", list_text(HEADER, table))
    title = (
        f"{IMAGE_SETS[task].name}: {len(files):,} test images ranked by the probability p of a class.\n"
        "Above each its true class, in red where the model names another"
    )
    ranking(folder / "ranking.png", figure_rows, title)
    print(f"{IMAGE_SETS[task].name}: ranked {len(files):,} test images for {', '.join(config.RANKED_CLASSES)}")
    print(f"wrote {shown(folder)}/ranking.csv, ranking.png")


def _two_lines(class_name: str) -> str:
    """ "PermanentCrop" with a line break between its words."""
    return re.sub("(?<=[a-z])(?=[A-Z])", "\n", class_name)


def _short(probability: float) -> str:
    return f"{probability:.3f}" if probability >= 0.0005 else f"{probability:.0e}"


def displayed(file: str, task: str):
    """The image as a person sees it: (64, 64, 3) uint8. Reflectances 0 to 0.275 are stretched as in the JPEGs."""
    import numpy as np

    from dataset import band_indices, read_image

    image = read_image(file, task)
    if task == "rgb":
        return image
    colours = image[:, :, band_indices("ms", config.RED_GREEN_BLUE)].astype(float)
    return np.clip(1 + colours / 2750 * 254, 1, 255).astype(np.uint8)


if __name__ == "__main__":
    run(main, __doc__, tasks=True)
