"""Metrics against scikit-learn, scipy and cases computed by hand."""

import math

import numpy as np
import torch
from sklearn.metrics import average_precision_score, recall_score

from engine import metrics
from project import CLASSES


def cases(images=400, seed=0):
    random = np.random.default_rng(seed)
    labels = random.integers(0, 10, images)
    logits = random.normal(size=(images, 10)) * 2
    logits[np.arange(images), labels] += 3
    return torch.from_numpy(logits).float(), labels


def chosen(confidences, right):
    """Logits of class 0 with given probabilities, and labels that make them right or wrong."""
    p = np.array(confidences)
    rest = np.log((1 - p) / 9)[:, None].repeat(10, 1)
    rest[:, 0] = np.log(p)
    return torch.from_numpy(rest), np.where(right, 0, 1)


def test_average_precision_is_scikit_learns_of_probabilities_and_none_without_images():
    logits, labels = cases()
    labels[labels == 4] = 5
    own = metrics.average_precisions(logits, labels)
    probabilities = torch.softmax(logits.double(), 1).numpy()
    for index in range(10):
        if index == 4:
            assert math.isnan(own[4])
        else:
            assert math.isclose(own[index], average_precision_score(labels == index, probabilities[:, index]))
    assert metrics.by_class(own)["Industrial"] is None and list(metrics.by_class(own)) == list(CLASSES)


def test_average_precision_of_confident_logits_does_not_tie():
    """Both probabilities are 1 in float32, the order is lost there; 1 image of the class ranked first: 1."""
    logits = torch.zeros(2, 10)
    logits[0, 0], logits[1, 0] = 40.0, 30.0
    assert metrics.average_precisions(logits, np.array([0, 1]))[0] == 1


def test_intervals_hold_the_figure_narrow_with_more_images_and_repeat(monkeypatch):
    monkeypatch.setattr(metrics, "DRAWS", 200)
    widths = []
    for images in (100, 1600):
        logits, labels = cases(images)

        low, high = metrics.mean_interval(metrics.true_positive_rates, logits, labels, seed=1)
        mean = recall_score(labels, logits.argmax(1).numpy(), average="macro")
        assert low < mean < high and (low, high) == metrics.mean_interval(
            metrics.true_positive_rates, logits, labels, seed=1
        )
        widths.append(high - low)
    assert widths[1] < widths[0] / 2
    # Wilson: (p + z²/2n ± z √(p(1-p)/n + z²/4n²)) / (1 + z²/n) with p = 1/2, n = 10, z = 1.96
    half = 1.96 * math.sqrt(0.025 + 1.96**2 / 400) / (1 + 1.96**2 / 10)
    assert np.allclose(metrics.accuracy_interval(0.5, 10), (0.5 - half, 0.5 + half), atol=1e-5)


def test_mcnemar_by_hand():
    """Of nine images that one model alone has right eight are the second's: 2 (C(9,0) + C(9,1)) / 2^9."""
    first = np.array([True] * 5 + [True] + [False] * 8)
    second = np.array([True] * 5 + [False] + [True] * 8)
    result = metrics.mcnemar(first, second)
    assert (result["first_alone"], result["second_alone"]) == (1, 8)
    assert math.isclose(result["p_value"], 2 * (1 + 9) / 2**9)
    assert metrics.mcnemar(first, first)["p_value"] == 1


def test_calibration_error_by_hand():
    """Two bins of ten: 0.65 sure and half right, 0.95 sure and all right."""
    logits, labels = chosen([0.65, 0.65, 0.95, 0.95], [True, False, True, True])
    rows = metrics.reliability(logits, labels, bins=10)
    assert rows["images"].tolist() == [0] * 6 + [2, 0, 0, 2] and math.isnan(rows["accuracy"][0])
    assert math.isclose(metrics.calibration_error(logits, labels, bins=10), (2 * 0.15 + 2 * 0.05) / 4)


def test_temperature_undoes_a_scaling_and_lowers_the_loss():
    random = np.random.default_rng(0)
    logits = torch.from_numpy(random.normal(size=(20000, 10)) * 2)
    uniform = random.gumbel(size=(20000, 10))
    labels = (logits.numpy() + uniform).argmax(1)  # drawn from the probabilities: calibrated, temperature 1
    assert math.isclose(metrics.temperature(logits, labels), 1, abs_tol=0.03)
    assert math.isclose(metrics.temperature(logits * 2.5, labels), 2.5, abs_tol=0.08)
    assert metrics.calibration_error(logits, labels) < 0.012 < metrics.calibration_error(logits * 2.5, labels)


def test_tail_accuracy_leaves_out_a_class_with_none_above():
    """Class 0 has predictions at 0.6 (wrong) and 0.9 (right); class 2 one at 0.7 (right)."""
    logits, labels = chosen([0.6, 0.9, 0.7], [False, True, True])
    logits[2, [0, 2]] = logits[2, [2, 0]]
    labels[2] = 2
    accuracy, remain, mean = metrics.tail_accuracy(logits, labels, np.array([0.5, 0.65, 0.8, 0.95]))
    assert remain[:, 0].tolist() == [2, 1, 1, 0] and remain[:, 2].tolist() == [1, 1, 0, 0]
    assert accuracy[:2, 0].tolist() == [0.5, 1] and math.isnan(accuracy[2, 2])
    assert mean[:3].tolist() == [0.75, 1, 1] and math.isnan(mean[3])  # not 0.5 at 0.8, where class 2 has none
