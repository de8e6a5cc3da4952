"""What do loaded weights and fine-tuning bring? The final model beside four simpler ones, on the same lists.

Run from the project root: python -m studies.baselines, with `rgb` or `ms` for one task. Minutes, and as long as a training of
the final model's setting for the network from scratch, which continues where it was stopped.

reads   the final model and its test results, the images, the initial weights
writes  outputs/<profile>/<task>/baselines/: study.json, the folder of the training from scratch; cache/
"""

from dataclasses import replace

import numpy as np
import torch
from sklearn.dummy import DummyClassifier
from sklearn.ensemble import RandomForestClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from engine.evaluation import in_order, initial_weights, predict
from engine.metrics import compute_metrics
from engine.runtime import seed_everything, training_session
from engine.splits import splits_hash
from engine.training import train_setting
from engine.weights import load_tensors
from models import build_model
from project import PARTS, TASKS, config, outputs_dir, pretrained_dir, run, splits_dir
from studies.subject import Subject, band_features, percent, span, subjects

C = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)  # inverse strengths of regularisation, chosen by val


def main(tasks: tuple[str, ...]) -> None:
    for subject in subjects(tasks, "baselines"):
        labels = {part: subject.lists[part].labels for part in PARTS}
        statistics = {part: band_features(subject.images(part).pixels) for part in PARTS}
        answers = {
            "most frequent class": fitted(DummyClassifier(), statistics, labels),
            "random forest on the bands' means and deviations": fitted(
                RandomForestClassifier(500, random_state=config.seed, n_jobs=-1), statistics, labels
            ),
            "linear layer on the frozen backbone": linear(frozen_features(subject), labels),
            "the same network from scratch": from_scratch(subject),
            "the final model": (subject.final.about["val"]["val_accuracy"], subject.results.logits),
        }
        rows, accuracies = [], {}
        for name, (val, logits) in answers.items():
            metrics = compute_metrics(logits, labels["test"])
            test = f"{percent(metrics['accuracy'])} ({span(metrics['accuracy'], len(labels['test']))})"
            rows.append([name, percent(val), test, percent(metrics["mean_tpr"])])
            accuracies[name] = metrics["accuracy"]
        forest, head, scratch, final = list(accuracies.values())[1:]
        finding = (
            f"A linear layer on the frozen backbone reaches {percent(head)} %, the fine-tuned network {percent(final)} %; from "
            f"scratch the same network and setting reach {percent(scratch)} %, and a random forest on nothing but the bands' "
            f"means and deviations {percent(forest)} %."
        )
        header = ["model", "val accuracy (%)", "test accuracy (%), 95 % interval", "mean TPR (%)"]
        subject.write(finding, [{"caption": "The same lists", "header": header, "rows": rows}], [], accuracy=accuracies)


def fitted(model, features: dict[str, np.ndarray], labels: dict[str, np.ndarray]) -> tuple[float, torch.Tensor]:
    """Val accuracy, and test logits (images, 10), of a scikit-learn classifier fitted on train."""
    model.fit(features["train"], labels["train"])
    probabilities = torch.from_numpy(model.predict_proba(features["test"]))
    return float(model.score(features["val"], labels["val"])), probabilities.clamp(min=1e-12).log().float()


def linear(features: dict[str, np.ndarray], labels: dict[str, np.ndarray]) -> tuple[float, torch.Tensor]:
    """Of the linear models with the strengths in C the best by val."""
    models = [make_pipeline(StandardScaler(), LogisticRegression(C=c, max_iter=2000)) for c in C]
    return max((fitted(model, features, labels) for model in models), key=lambda answer: answer[0])


def frozen_features(subject: Subject) -> dict[str, np.ndarray]:
    """What the linear layer sees of each list before any fine-tuning, with the views of the final model."""
    setting = subject.final.setting
    weights = initial_weights(setting, pretrained_dir(), outputs_dir("rgb"), splits_dir("rgb"), subject.lists)
    model = build_model(setting, weights).to(subject.device, memory_format=torch.channels_last)
    return {
        part: predict(model, in_order(subject.images(part)), setting.views, embed=True)[0].numpy() for part in PARTS
    }


def from_scratch(subject: Subject) -> tuple[float, torch.Tensor]:
    """The final model's setting trained with random initial weights, best epoch by val: its val accuracy, its test logits."""
    setting = replace(subject.final.setting, name="from_scratch", weights=None)
    folder = subject.folder / setting.name
    with training_session(folder) as processes:
        train, val = subject.images("train", setting.augmentation), subject.images("val")
        seed_everything(config.seed)
        model = build_model(setting, weights=None)
        train_setting(setting, model, train, val, splits_hash(subject.lists), folder, processes)
    best = load_tensors(folder / "best.pt")
    model.load_state_dict(best["model"])
    model = model.to(subject.device, memory_format=torch.channels_last)
    logits, _ = predict(model, in_order(subject.images("test")), setting.views)
    history = load_tensors(folder / "last.pt")["history"]
    return history[best["epoch"] - 1]["val_accuracy"], logits


if __name__ == "__main__":
    run(main, __doc__, choices=TASKS)
