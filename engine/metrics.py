"""Every figure of a prediction, from logits and labels. Knows neither files nor networks.

Logits are (images, 10) float32 on the CPU, labels are (images,) indices into CLASSES; all fractions are in [0, 1]. The few
lines of numpy here take the place of scikit-learn, whose import takes longer than a test list; tests compare the two.
"""

import math

from base.project import CLASSES

import numpy as np
import torch
import torch.nn.functional as F


def compute_metrics(logits: torch.Tensor, labels: np.ndarray) -> dict:
    """The metrics of a prediction.

    Returns:
        loss (mean cross-entropy), accuracy, tpr ({class: true positive rate, also called recall}; None for a class without
        images), mean_tpr (over the classes that have images), confusion (rows true, columns predicted).
    """
    confusion = np.zeros((len(CLASSES), len(CLASSES)), int)
    np.add.at(confusion, (labels, logits.argmax(1).numpy()), 1)
    tpr = true_positive_rates(logits, labels)
    return {
        "loss": F.cross_entropy(logits, torch.from_numpy(labels)).item(),
        "accuracy": float(np.trace(confusion) / len(labels)),
        "mean_tpr": float(np.nanmean(tpr)),
        "tpr": by_class(tpr),
        "confusion": confusion.tolist(),
    }


def true_positive_rates(logits: torch.Tensor, labels: np.ndarray) -> np.ndarray:
    """(10,) float64; nan for a class without images."""
    images = np.bincount(labels, minlength=len(CLASSES))
    found = np.bincount(labels[logits.argmax(1).numpy() == labels], minlength=len(CLASSES))
    return np.divide(found, images, out=np.full(len(CLASSES), np.nan), where=images > 0)


def by_class(values: np.ndarray) -> dict[str, float | None]:
    """{class: value}, None for nan."""
    return {name: None if np.isnan(value) else float(value) for name, value in zip(CLASSES, values, strict=True)}


def average_precisions(logits: torch.Tensor, labels: np.ndarray) -> np.ndarray:
    """Average precision (AP) of each class over all images, ranked by its probability: (10,), nan without images.

    The sum over the distinct thresholds of precision times the increase in recall, without interpolation. Probabilities
    are compared as logarithms in float64, because in float32 many round to 1 and would tie.
    """
    # A diverged run produces NaN logits. It is stopped because of its loss, not here.
    scores = np.nan_to_num(F.log_softmax(logits.double(), dim=1).numpy())
    values = np.full(len(CLASSES), np.nan)
    for index in np.unique(labels):
        order = np.argsort(-scores[:, index], kind="stable")
        ranked, hits = scores[order, index], np.cumsum(labels[order] == index)
        ends = np.append(np.flatnonzero(np.diff(ranked)), len(ranked) - 1)  # the last image of each threshold
        increase = np.diff(hits[ends] / hits[-1], prepend=0)
        values[index] = np.sum(hits[ends] / (ends + 1) * increase)
    return values


def accuracy_interval(accuracy: float, images: int) -> tuple[float, float]:
    """95 % interval of an accuracy measured on this many images (Wilson, J. Am. Statistical Association, 1927)."""
    z = 1.959963984540054  # the 97.5th percentile of the normal distribution
    centre = (accuracy + z**2 / (2 * images)) / (1 + z**2 / images)
    half = z / (1 + z**2 / images) * math.sqrt(accuracy * (1 - accuracy) / images + z**2 / (4 * images**2))
    return max(0.0, centre - half), min(1.0, centre + half)
