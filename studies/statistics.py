"""Statistics that only studies use: intervals, comparisons of two models, calibration.

Logits are (images, 10) float32 on the CPU, labels are (images,) indices into CLASSES; all fractions are in [0, 1].
"""

from collections.abc import Callable

from base.project import CLASSES

import numpy as np
import torch
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax, softmax
from scipy.stats import binomtest, bootstrap

DRAWS = 1000  # of the bootstrap


def mean_interval(statistic: Callable, logits: torch.Tensor, labels: np.ndarray, seed: int) -> tuple[float, float]:
    """95 % interval of a mean over classes: percentiles of DRAWS bootstrap samples of the images (Efron, 1979).

    Args:
        statistic: `true_positive_rates` or `average_precisions`; nan is left out of the mean.
    """

    def mean(indices: np.ndarray) -> float:
        return float(np.nanmean(statistic(logits[torch.from_numpy(indices)], labels[indices])))

    images, rng = np.arange(len(labels)), np.random.default_rng(seed)
    draws = bootstrap((images,), mean, n_resamples=DRAWS, vectorized=False, method="percentile", rng=rng)
    return float(draws.confidence_interval.low), float(draws.confidence_interval.high)


def mcnemar(first: np.ndarray, second: np.ndarray) -> dict[str, float]:
    """McNemar's exact test: do two models make equally many errors on the same images? (Psychometrika, 1947)

    Args:
        first, second: (images,) bool, whether each model is correct.

    Returns:
        first_alone and second_alone, the images on which only one model is correct; p_value, two-sided, from the binomial
        distribution of these images.
    """
    alone = int((first & ~second).sum()), int((second & ~first).sum())
    p_value = binomtest(alone[0], sum(alone)).pvalue if sum(alone) else 1.0
    return {"first_alone": alone[0], "second_alone": alone[1], "p_value": float(p_value)}


def reliability(logits: torch.Tensor, labels: np.ndarray, bins: int = 15) -> dict[str, np.ndarray]:
    """Sort the images by their confidence, the largest probability, into equal bins of (0, 1].

    Returns:
        images; mean confidence and accuracy (nan in an empty bin). Each has shape (bins,).
    """
    probabilities = softmax(logits.numpy().astype(np.float64), axis=1)
    confidence, correct = probabilities.max(1), probabilities.argmax(1) == labels
    bin_of = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
    images = np.bincount(bin_of, minlength=bins)
    with np.errstate(invalid="ignore"):
        sums = {"confidence": np.bincount(bin_of, confidence, bins), "accuracy": np.bincount(bin_of, correct, bins)}
        return {"images": images, **{name: total / images for name, total in sums.items()}}


def calibration_error(logits: torch.Tensor, labels: np.ndarray, bins: int = 15) -> float:
    """Expected calibration error: the bins' |accuracy - confidence|, weighted by images (Guo et al., ICML 2017)."""
    rows = reliability(logits, labels, bins)
    return float(np.nansum(rows["images"] * np.abs(rows["accuracy"] - rows["confidence"])) / len(labels))


def temperature(logits: torch.Tensor, labels: np.ndarray) -> float:
    """The divisor of the logits that minimises the cross-entropy on these images (Guo et al., ICML 2017)."""
    values, rows = logits.numpy().astype(np.float64), np.arange(len(labels))

    def loss(log_temperature: float) -> float:
        return -log_softmax(values / np.exp(log_temperature), axis=1)[rows, labels].mean()

    return float(np.exp(minimize_scalar(loss, bounds=(np.log(0.05), np.log(20)), method="bounded").x))


def tail_accuracy(
    logits: torch.Tensor, labels: np.ndarray, thresholds: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For each predicted class: accuracy of the predictions whose probability is above a threshold.

    Args:
        thresholds: (thresholds,).

    Returns:
        accuracy (thresholds, 10), nan for a class without such predictions; the number of these predictions,
        (thresholds, 10); mean accuracy over the classes that have some, (thresholds,), nan if none has.
    """
    probabilities = softmax(logits.numpy().astype(np.float64), axis=1)
    confidence, predicted = probabilities.max(1), probabilities.argmax(1)
    above = confidence[None] > thresholds[:, None]  # (thresholds, images)
    of_class = predicted[:, None] == np.arange(len(CLASSES))  # (images, 10)
    remain = above.astype(int) @ of_class.astype(int)
    correct = above.astype(int) @ (of_class & (predicted == labels)[:, None]).astype(int)
    accuracy = np.divide(correct, remain, out=np.full(correct.shape, np.nan), where=remain > 0)
    classes = (remain > 0).sum(1)
    mean = np.divide(np.nansum(accuracy, 1), classes, out=np.full(len(thresholds), np.nan), where=classes > 0)
    return accuracy, remain, mean
