"""Which test labels may be wrong? Confident learning: those that out-of-fold predictions contradict most.

Run from the project root: python -m studies.label_audit; with `rgb` or `ms` for one task. A few minutes: the features of the test
list are computed. A linear model on the final model's features is fitted on four fifths of the test list and predicts the last
fifth, five times. Neither this model nor the network was trained on a label that is judged. Labels and test figures stay as
published.

reads   the final model and its test results, the test images
writes  outputs/<profile>/<task>/label_audit/: study.json, suspects.csv, suspects.png
"""

import warnings

from base.command_line import run
from base.errors import UserError
from base.files import write_csv
from base.project import CLASSES, TASKS, Task, config

import numpy as np
from cleanlab.filter import find_label_issues
from cleanlab.rank import get_label_quality_scores
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from engine.plots import contact_sheet
from studies.subject import Subject, percent, subjects

FOLDS = 5
IN_FIGURE, COLUMNS = 24, 8


def main(tasks: list[Task]) -> None:
    for subject in subjects(tasks, "label_audit"):
        files, labels = subject.results.split.files, subject.results.split.labels
        if np.bincount(labels, minlength=len(CLASSES)).min() < FOLDS:
            raise UserError(f"a class has fewer than {FOLDS} test images: too few for {FOLDS} folds")
        probabilities = out_of_fold(subject.predict("test", embed=True).numpy(), labels)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about classes without suspects
            suspects = find_label_issues(labels, probabilities, return_indices_ranked_by="self_confidence", n_jobs=1)
        quality = get_label_quality_scores(labels, probabilities)
        proposed, predictions, wrong = probabilities.argmax(1), subject.results.predictions, ~subject.results.correct
        rows = [
            [files[i], CLASSES[labels[i]], CLASSES[proposed[i]], f"{quality[i]:.4f}", CLASSES[predictions[i]]]
            for i in suspects
        ]
        header = ["file", "label", "proposed", "probability_of_label", "final_model"]
        write_csv(subject.folder / "suspects.csv", header, rows)
        figures = draw_suspects(subject, suspects[:IN_FIGURE], proposed, quality) if len(suspects) else []
        both, errors = int(wrong[suspects].sum()), int(wrong.sum())
        share = f" ({percent(both / errors)} %)" if errors else ""
        finding = (
            f"Out-of-fold predictions contradict {len(suspects)} of {len(files):,} test labels "
            f"({percent(len(suspects) / len(files))} %). They include {both} of the final model's {errors} errors{share}. A "
            "suspect is no proof: a person has to judge the images."
        )
        counts = [
            [name, str((labels[suspects] == k).sum()), str((wrong & (labels == k)).sum())]
            for k, name in enumerate(CLASSES)
        ]
        table = {"caption": "By label", "header": ["label", "suspects", "errors of the final model"], "rows": counts}
        subject.write(finding, [table], figures, suspects=len(suspects), errors=errors, errors_among_suspects=both)


def out_of_fold(features: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Probabilities (images, 10), each image's from a linear model that was not fitted on it."""
    model = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=2000))
    folds = StratifiedKFold(FOLDS, shuffle=True, random_state=config.seed)
    return cross_val_predict(model, features, labels, cv=folds, method="predict_proba")


def draw_suspects(subject: Subject, suspects: np.ndarray, proposed: np.ndarray, quality: np.ndarray) -> list[str]:
    """suspects.png: the most contradicted labels first."""
    split = subject.results.split
    captions = [f"{CLASSES[split.labels[i]]}\n{quality[i]:.3f}, or\n{CLASSES[proposed[i]]}?" for i in suspects]
    pictures = subject.pictures([split.files[i] for i in suspects])
    images = [(picture, caption, False) for picture, caption in zip(pictures, captions, strict=True)]
    rows = [("", images[start : start + COLUMNS]) for start in range(0, len(images), COLUMNS)]
    title = (
        f"{subject.task.title}: the {len(images)} most contradicted of {len(split.labels):,} test labels.\n"
        "Above each the label with its out-of-fold probability, then the proposed class"
    )
    contact_sheet(subject.folder / "suspects.png", rows, title, subject.final.sha256, width=6.6)
    return ["suspects.png"]


if __name__ == "__main__":
    run(main, __doc__, choices=TASKS)
