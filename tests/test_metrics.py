"""The metrics equal those of scikit-learn and scipy."""

import math

from base.project import CLASSES

import numpy as np
import pytest
import scipy.stats
import sklearn.metrics
import torch
import torch.nn.functional as F

from engine import metrics

ABSENT = 4  # a class without images


@pytest.fixture(params=[0, 1, 2], ids=["distinct", "ties", "all equal"])
def predicted(request):
    """Logits and labels of 400 images. With `ties` many images share a score, of which some are right."""
    random = np.random.default_rng(request.param)
    labels = random.integers(0, 10, 400)
    labels[labels == ABSENT] = 5
    logits = random.normal(size=(400, 10)) * 2
    logits[np.arange(400), labels] += 3
    logits = {0: logits, 1: logits.round() // 3, 2: logits * 0}[request.param]
    return torch.from_numpy(logits).float(), labels


def test_metrics_are_scikit_learns(predicted):
    logits, labels = predicted
    result, chosen = metrics.compute_metrics(logits, labels), logits.argmax(1).numpy()
    recall = sklearn.metrics.recall_score(labels, chosen, labels=range(10), average=None, zero_division=np.nan)
    assert list(result["tpr"]) == list(CLASSES) and result["tpr"][CLASSES[ABSENT]] is None
    assert np.array_equal(np.array(list(result["tpr"].values()), float), recall, equal_nan=True)
    assert result["mean_tpr"] == pytest.approx(
        np.nanmean(recall)
    )  # a class without images is left out, not counted as 0
    assert result["accuracy"] == sklearn.metrics.accuracy_score(labels, chosen)
    assert result["confusion"] == sklearn.metrics.confusion_matrix(labels, chosen, labels=range(10)).tolist()
    probabilities = logits.double().softmax(1).numpy()
    assert result["loss"] == pytest.approx(sklearn.metrics.log_loss(labels, probabilities, labels=range(10)), rel=1e-5)


def test_average_precision_is_scikit_learns_also_with_ties(predicted):
    logits, labels = predicted
    values, scores = metrics.average_precisions(logits, labels), F.log_softmax(logits.double(), 1).numpy()
    for index in range(10):
        if index == ABSENT:
            assert math.isnan(values[index])
        else:
            expected = sklearn.metrics.average_precision_score(labels == index, scores[:, index])
            assert values[index] == pytest.approx(expected, abs=1e-12)


def test_average_precision_of_confident_logits_does_not_tie():
    """In float32 both probabilities are 1, and their order would be lost."""
    logits = torch.zeros(2, 10)
    logits[0, 0], logits[1, 0] = 40.0, 30.0
    assert metrics.average_precisions(logits, np.array([0, 1]))[0] == 1


@pytest.mark.parametrize("correct, images", [(0, 5), (5, 5), (5, 10), (1987, 2000)])
def test_the_interval_of_an_accuracy_is_scipys_wilson_interval(correct, images):
    expected = scipy.stats.binomtest(correct, images).proportion_ci(method="wilson")
    assert metrics.accuracy_interval(correct / images, images) == pytest.approx(tuple(expected), abs=1e-12)
