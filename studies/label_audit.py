"""Which test labels may be wrong? Those that out-of-fold predictions contradict most, by confident learning.

Run from the project root: python -m studies.label_audit, with `rgb` or `ms` for one task. A few minutes: the test list is
predicted once more, for its features. A linear model on the final model's features is fitted on four fifths of the test list
and predicts the last fifth, five times; neither it nor the network has been trained on a label that it judges. Nothing is
changed: labels and figures stay as published.

reads   the final model and its test results, the test images
writes  outputs/<profile>/<task>/label_audit/: study.json, suspects.csv, suspects.png; cache/
"""

import warnings

import numpy as np
from cleanlab.filter import find_label_issues
from cleanlab.rank import get_label_quality_scores
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from dataset import CLASSES, class_of, patch_of
from engine.plots import contact_sheet
from engine.splits import list_text
from project import TASKS, UserError, config, run, write_text
from studies.subject import percent, subjects

FOLDS = 5
SHOWN = 24
COLUMNS = 8


def main(tasks: tuple[str, ...]) -> None:
    for subject in subjects(tasks, "label_audit"):
        files, labels = subject.results.split.files, subject.results.split.labels
        if np.bincount(labels, minlength=len(CLASSES)).min() < FOLDS:
            raise UserError(f"a class has fewer than {FOLDS} test images: too few for {FOLDS} folds")
        probabilities = out_of_fold(subject.predict("test", embed=True).numpy(), labels)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of classes without a suspect
            suspects = find_label_issues(labels, probabilities, return_indices_ranked_by="self_confidence", n_jobs=1)
        quality = get_label_quality_scores(labels, probabilities)
        proposed, answer, wrong = probabilities.argmax(1), subject.results.answers, ~subject.results.right
        rows = [
            [files[i], CLASSES[labels[i]], CLASSES[proposed[i]], f"{quality[i]:.4f}", CLASSES[answer[i]]]
            for i in suspects
        ]
        header = ["file", "label", "proposed", "probability_of_label", "final_model"]
        write_text(subject.folder / "suspects.csv", list_text(header, rows))
        figures = draw(subject, suspects[:SHOWN], labels, proposed, quality) if len(suspects) else []
        both = int(wrong[suspects].sum())
        finding = (
            f"Contradicted test labels: {len(suspects)} of {len(files):,} ({percent(len(suspects) / len(files))} %). Among them "
            f"are {both} of the final model's {wrong.sum()} errors"
            + (f" ({percent(both / wrong.sum())} %). " if wrong.any() else ". ")
            + "A suspect is no proof: a person has to judge the pictures."
        )
        own = [
            [name, str((labels[suspects] == k).sum()), str((wrong & (labels == k)).sum())]
            for k, name in enumerate(CLASSES)
        ]
        table = {"caption": "By label", "header": ["label", "suspects", "errors of the final model"], "rows": own}
        subject.write(
            finding, [table], figures, suspects=len(suspects), errors=int(wrong.sum()), errors_among_suspects=both
        )


def out_of_fold(features: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Probabilities (images, 10), each image's from a linear model that was not fitted on it."""
    model = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=2000))
    folds = StratifiedKFold(FOLDS, shuffle=True, random_state=config.seed)
    return cross_val_predict(model, features, labels, cv=folds, method="predict_proba")


def draw(subject, suspects: np.ndarray, labels: np.ndarray, proposed: np.ndarray, quality: np.ndarray) -> list[str]:
    """suspects.png: the most contradicted first."""
    files = [subject.results.split.files[i] for i in suspects]
    captions = [
        f"{class_of(patch_of(file))}\n{quality[i]:.3f}, or\n{CLASSES[proposed[i]]}?"
        for i, file in zip(suspects, files, strict=True)
    ]
    images = [(image, text, False) for image, text in zip(subject.pictures(files), captions, strict=True)]
    rows = [("", images[start : start + COLUMNS]) for start in range(0, len(images), COLUMNS)]
    title = (
        f"{subject.title}: the {len(images)} most contradicted of {len(labels):,} test labels.\n"
        "Above each the label with its out-of-fold probability, then the class proposed"
    )
    contact_sheet(subject.folder / "suspects.png", rows, title, subject.final.sha256, width=6.6)
    return ["suspects.png"]


if __name__ == "__main__":
    run(main, __doc__, choices=TASKS)
