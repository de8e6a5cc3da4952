"""Every figure about predictions: from logits and labels, or from who was right. Knows neither files nor networks.

Logits are (images, 10) float32 on the CPU, labels (images,) indices into CLASSES; all fractions are in [0, 1].
"""

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax, softmax
from scipy.stats import binomtest, bootstrap
from sklearn.metrics import accuracy_score, average_precision_score, confusion_matrix, recall_score

from project import CLASSES

EVERY_CLASS = np.arange(len(CLASSES))
DRAWS = 1000  # of the bootstrap


def compute_metrics(logits: torch.Tensor, labels: np.ndarray) -> dict:
    """What is said of every prediction.

    Returns:
        loss (mean cross-entropy), accuracy, tpr ({class: true-positive rate, i.e. recall}; None for a class without
        an image), mean_tpr (over the classes that have one), confusion (rows true, columns predicted).
    """
    predicted = logits.argmax(1).numpy()
    tpr = true_positive_rates(logits, labels)
    return {
        "loss": F.cross_entropy(logits, torch.from_numpy(labels)).item(),
        "accuracy": float(accuracy_score(labels, predicted)),
        "mean_tpr": float(np.nanmean(tpr)),
        "tpr": by_class(tpr),
        "confusion": confusion_matrix(labels, predicted, labels=EVERY_CLASS).tolist(),
    }


def true_positive_rates(logits: torch.Tensor, labels: np.ndarray) -> np.ndarray:
    """(10,) float64; nan for a class without an image."""
    return recall_score(labels, logits.argmax(1).numpy(), labels=EVERY_CLASS, average=None, zero_division=np.nan)


def by_class(values: np.ndarray) -> dict[str, float | None]:
    """{class: value}, None for nan."""
    return {name: None if np.isnan(value) else float(value) for name, value in zip(CLASSES, values, strict=True)}


def average_precisions(logits: torch.Tensor, labels: np.ndarray) -> np.ndarray:
    """Average precision of each class, all images ranked by its probability: (10,), nan for a class without an image.

    The precisions at each recall that is reached, weighted by the step in recall, without interpolation (scikit-learn's
    `average_precision_score`). In log space and float64: many probabilities round to 1 in float32 and would tie.
    """
    # A training that has come to grief has logits that are no numbers; it is stopped for its loss, not here.
    scores = np.nan_to_num(log_softmax(logits.numpy().astype(np.float64), axis=1))
    values = [
        average_precision_score(labels == index, scores[:, index]) if (labels == index).any() else np.nan
        for index in EVERY_CLASS
    ]
    return np.array(values)


# How sure is a figure? -------------------------------------------------------------------------------------------


def accuracy_interval(accuracy: float, images: int) -> tuple[float, float]:
    """95 % interval of an accuracy on so many images (Wilson, Journal of the American Statistical Association, 1927)."""
    interval = binomtest(round(accuracy * images), images).proportion_ci(method="wilson")
    return float(interval.low), float(interval.high)


def mean_interval(statistic: Callable, logits: torch.Tensor, labels: np.ndarray, seed: int) -> tuple[float, float]:
    """95 % interval of a mean over classes: the percentiles of DRAWS bootstrap draws of the images (Efron, 1979).

    Args:
        statistic: `true_positive_rates` or `average_precisions`; nan is left out.
    """

    def mean(indices: np.ndarray) -> float:
        return float(np.nanmean(statistic(logits[torch.from_numpy(indices)], labels[indices])))

    draws = bootstrap(
        (np.arange(len(labels)),),
        mean,
        n_resamples=DRAWS,
        vectorized=False,
        method="percentile",
        rng=np.random.default_rng(seed),
    )
    return float(draws.confidence_interval.low), float(draws.confidence_interval.high)


def mcnemar(first: np.ndarray, second: np.ndarray) -> dict[str, float]:
    """McNemar's test, exact: are two models' errors on the same images as many? (McNemar, Psychometrika, 1947.)

    Args:
        first, second: (images,) bool, whether each model is right.

    Returns:
        how many images each alone has right, and the two-sided p-value under the binomial distribution of these.
    """
    alone = int((first & ~second).sum()), int((second & ~first).sum())
    p_value = binomtest(alone[0], sum(alone)).pvalue if sum(alone) else 1.0
    return {"first_alone": alone[0], "second_alone": alone[1], "p_value": float(p_value)}


# How much are probabilities worth? -------------------------------------------------------------------------------


def reliability(logits: torch.Tensor, labels: np.ndarray, bins: int = 15) -> dict[str, np.ndarray]:
    """Images by their confidence, the largest probability, in equal bins of (0, 1].

    Returns:
        images, and mean confidence and accuracy (nan in an empty bin), each (bins,).
    """
    probabilities = softmax(logits.numpy().astype(np.float64), axis=1)
    confidence, right = probabilities.max(1), probabilities.argmax(1) == labels
    own = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
    images = np.bincount(own, minlength=bins)
    with np.errstate(invalid="ignore"):
        sums = {"confidence": np.bincount(own, confidence, bins), "accuracy": np.bincount(own, right, bins)}
        return {"images": images, **{name: total / images for name, total in sums.items()}}


def calibration_error(logits: torch.Tensor, labels: np.ndarray, bins: int = 15) -> float:
    """Expected calibration error: |accuracy - confidence| of the bins, weighted by their images (Guo et al., ICML 2017)."""
    rows = reliability(logits, labels, bins)
    return float(np.nansum(rows["images"] * np.abs(rows["accuracy"] - rows["confidence"])) / len(labels))


def temperature(logits: torch.Tensor, labels: np.ndarray) -> float:
    """What logits are to be divided by for the smallest cross-entropy on these images (Guo et al., ICML 2017)."""
    values, rows = logits.numpy().astype(np.float64), np.arange(len(labels))

    def loss(log_temperature: float) -> float:
        return -log_softmax(values / np.exp(log_temperature), axis=1)[rows, labels].mean()

    return float(np.exp(minimize_scalar(loss, bounds=(np.log(0.05), np.log(20)), method="bounded").x))


def tail_accuracy(
    logits: torch.Tensor, labels: np.ndarray, thresholds: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Accuracy of the predictions of each class whose probability exceeds a threshold.

    Args:
        thresholds: (thresholds,), of the largest probability.

    Returns:
        accuracy (thresholds, 10), nan where no prediction of the class is above (such a class is to be left out of a
        mean, not counted as 0); how many predictions are above, (thresholds, 10); the mean over the classes that have
        one, (thresholds,), nan where none has.
    """
    probabilities = softmax(logits.numpy().astype(np.float64), axis=1)
    confidence, predicted = probabilities.max(1), probabilities.argmax(1)
    above = confidence[None] > thresholds[:, None]  # (thresholds, images)
    of_class = predicted[:, None] == EVERY_CLASS  # (images, 10)
    remain = above.astype(int) @ of_class.astype(int)
    right = above.astype(int) @ (of_class & (predicted == labels)[:, None]).astype(int)
    accuracy = np.divide(right, remain, out=np.full(right.shape, np.nan), where=remain > 0)
    classes = (remain > 0).sum(1)
    mean = np.divide(np.nansum(accuracy, 1), classes, out=np.full(len(thresholds), np.nan), where=classes > 0)
    return accuracy, remain, mean
