"""What do loaded weights and fine-tuning bring? The final model and four simpler ones, on the same lists.

Run from the project root: python -m studies.baselines; with `rgb` or `ms` for one task. Minutes, and one training of the final
model's setting with random initial weights. An interrupted training resumes when the study is started again.

reads   the final model and its test results, the images, the initial weights
writes  outputs/<profile>/<task>/baselines/: study.json, the folder of the training from scratch
"""

from dataclasses import replace

from base.command_line import run
from base.project import PARTS, RGB, TASKS, Task, config, pretrained_dir

import numpy as np
import torch
from sklearn.dummy import DummyClassifier
from sklearn.ensemble import RandomForestClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from engine.checkpoint import best_epoch
from engine.final_model import initial_weights
from engine.metrics import compute_metrics
from engine.results import predict
from engine.runtime import seed_everything, training_session
from models import build_model
from studies.subject import Subject, band_features, interval_text, percent, predict_with, subjects, train_run

C = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)  # inverse strengths of regularisation; val chooses


def main(tasks: list[Task]) -> None:
    for subject in subjects(tasks, "baselines"):
        labels = {part: subject.lists[part].labels for part in PARTS}
        statistics = {part: band_features(subject.images(part).pixels) for part in PARTS}
        classifier = RandomForestClassifier(500, random_state=config.seed)  # on one core: on several the last bits vary
        predictions = {
            "most frequent class": fit_and_predict(DummyClassifier(), statistics, labels),
            "random forest on the bands' means and deviations": fit_and_predict(classifier, statistics, labels),
            "linear layer on the frozen backbone": best_linear_model(
                frozen_features(subject, subject.final.setting.views), labels
            ),
            "the same network from scratch": train_from_scratch(subject),
            "the final model": (subject.final.metadata["val"]["val_accuracy"], subject.results.logits),
        }
        rows, accuracies = [], {}
        for name, (val, logits) in predictions.items():
            metrics = compute_metrics(logits, labels["test"])
            test = f"{percent(metrics['accuracy'])} ({interval_text(metrics['accuracy'], len(logits))})"
            rows.append([name, percent(val), test, percent(metrics["mean_tpr"])])
            accuracies[name] = metrics["accuracy"]
        forest, linear, scratch, final = map(percent, list(accuracies.values())[1:])
        finding = (
            f"The fine-tuned network reaches {final} % on test, and a linear layer on the frozen backbone {linear} %. The same "
            f"network and setting reach {scratch} % from random weights. A random forest that sees only the means and "
            f"deviations of the bands reaches {forest} %."
        )
        header = ["model", "val accuracy (%)", "test accuracy (%), 95 % interval", "mean TPR (%)"]
        subject.write(finding, [{"caption": "The same lists", "header": header, "rows": rows}], [], accuracy=accuracies)


def fit_and_predict(
    model, features: dict[str, np.ndarray], labels: dict[str, np.ndarray]
) -> tuple[float, torch.Tensor]:
    """Fit a scikit-learn classifier on train. Returns val accuracy, and test logits (images, 10)."""
    model.fit(features["train"], labels["train"])
    probabilities = torch.from_numpy(model.predict_proba(features["test"]))
    return float(model.score(features["val"], labels["val"])), probabilities.clamp(min=1e-12).log().float()


def best_linear_model(features: dict[str, np.ndarray], labels: dict[str, np.ndarray]) -> tuple[float, torch.Tensor]:
    """`fit_and_predict` of the linear model whose strength in C is best on val."""
    models = [make_pipeline(StandardScaler(), LogisticRegression(C=c, max_iter=2000)) for c in C]
    return max((fit_and_predict(model, features, labels) for model in models), key=lambda prediction: prediction[0])


def frozen_features(subject: Subject, views: int) -> dict[str, np.ndarray]:
    """The input of the linear layer before any fine-tuning: {part: (images, channels)}."""
    setting = subject.final.setting
    seed_everything(config.seed)  # if the setting has no weights, these are random
    model = build_model(setting, initial_weights(setting, pretrained_dir(), RGB, subject.lists))
    model = model.to(subject.device, memory_format=torch.channels_last)
    return {part: predict(model, subject.images(part), views, embed=True).numpy() for part in PARTS}


def train_from_scratch(subject: Subject) -> tuple[float, torch.Tensor]:
    """Train the final model's setting from random weights. Returns val accuracy and test logits of the best epoch."""
    setting = replace(subject.final.setting, name="from_scratch", weights=None)
    folder = subject.folder / setting.name
    with training_session(folder) as device:
        checkpoint = train_run(setting, subject.task, subject.lists, config.seed, folder, device)
        logits = predict_with(setting, checkpoint["best"], subject.images("test"), setting.views)
    return best_epoch(checkpoint["history"])["val_accuracy"], logits


if __name__ == "__main__":
    run(main, __doc__, choices=TASKS)
