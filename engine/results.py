"""Predictions, and the test results: computed, saved, read. The same code serves training and grading.

Logits are always float32 without TF32, in the order of the list and in batches of one size, so that they can be compared to
the last bit on the same machine.
"""

import math
from dataclasses import dataclass
from pathlib import Path

from base.errors import UserError
from base.files import load_tensors, read_json, reading, save_tensors, sha256, write_json, write_text
from base.project import CLASSES, Task, display_path

import numpy as np
import torch
from torch import nn

from dataset import EuroSATDataset, Split
from engine import plots
from engine.final_model import check_lists, load_model, model_hash
from engine.metrics import average_precisions, by_class, compute_metrics
from engine.runtime import choose_device, environment
from engine.splits import parse_split, split_csv

BATCH_SIZE = 100  # images per prediction step, one of the things that the last bits of logits depend on


def predict(model: nn.Module, data: EuroSATDataset, views: int = 1, embed: bool = False) -> torch.Tensor:
    """Logits (images, 10) float32 of a list, on the CPU, in evaluation mode.

    Args:
        embed: the input of the linear layer, (images, channels), instead of logits.
    """
    model.eval()
    outputs = []
    with torch.inference_mode():
        for indices in torch.arange(len(data), device=data.device).split(BATCH_SIZE):
            images, _ = data[indices]  # (batch, bands, 64, 64)
            outputs.append(model.embed(images, views) if embed else model(images, views))
        return torch.cat(outputs).cpu()


def evaluate(model: nn.Module, data: EuroSATDataset) -> dict:
    """`compute_metrics` of a list, average_precision ({class: …}) and its mean, map."""
    logits, labels = predict(model, data), data.split.labels
    precisions = average_precisions(logits, labels)
    ranking = {"map": float(np.nanmean(precisions)), "average_precision": by_class(precisions)}
    return compute_metrics(logits, labels) | ranking


def logits_hash(logits: torch.Tensor) -> str:
    return sha256(logits.numpy().tobytes())


@dataclass(frozen=True)
class Prediction:
    """What a final model says of the test list."""

    split: Split
    logits: torch.Tensor  # (images, 10) float32, row i for line i of the list
    one_view: torch.Tensor  # the same with one view of each image
    model_sha256: str
    images_sha256: str
    environment: dict


def predict_test(root: Path, task: Task, lists: dict[str, Split]) -> Prediction:
    """Predict the test list with the final model. A UserError says that it was trained with other lists."""
    device = choose_device()
    final = load_model(task, device)
    check_lists(final, task, lists)
    data = EuroSATDataset(root, task, lists["test"], final.bands, (final.mean, final.std), device=device)
    one_view = predict(final.model, data)
    logits = predict(final.model, data, final.setting.views) if final.setting.views > 1 else one_view
    if not logits.isfinite().all():
        raise UserError(f"the final model gives logits that are not finite; run: python train_{task.name}.py")
    return Prediction(data.split, logits, one_view, final.sha256, data.sha256, environment(device))


def save_results(task: Task, prediction: Prediction) -> dict:
    """Write logits, files, metrics and the confusion matrix; return the metrics. Old results are kept as *.backup."""
    folder, split = task.outputs, prediction.split
    metrics, files = compute_metrics(prediction.logits, split.labels), split_csv(split)
    save_tensors(folder / "test_logits.pt", prediction.logits, backup=True)
    write_text(folder / "test_files.csv", files, backup=True)
    hashes = {
        "model_sha256": prediction.model_sha256,
        "files_sha256": sha256(files.encode()),
        "images_sha256": prediction.images_sha256,
        "logits_sha256": logits_hash(prediction.logits),
    }
    plots.confusion_matrix(folder / "confusion_matrix.png", metrics["confusion"], task.title, hashes["logits_sha256"])
    one_view = compute_metrics(prediction.one_view, split.labels)["accuracy"]
    record = {"images": len(split.files), **metrics, "one_view": one_view, **hashes}
    # Last, because its hashes vouch for the other files.
    write_json(folder / "test_metrics.json", {**record, "environment": prediction.environment}, backup=True)
    return metrics


@dataclass(frozen=True)
class Results:
    """What `save_results` wrote."""

    split: Split  # files and labels, one for each row of the logits
    logits: torch.Tensor  # (images, 10) float32
    metrics: dict  # `compute_metrics` of these logits
    record: dict  # hashes, environment and the accuracy with one view ("one_view") that were saved with them
    changes: list[str]  # what was changed afterwards, in words

    @property
    def predictions(self) -> np.ndarray:
        """(images,) indices into CLASSES."""
        return self.logits.argmax(1).numpy()

    @property
    def correct(self) -> np.ndarray:
        """(images,) bool."""
        return self.predictions == self.split.labels


def read_results(task: Task) -> Results:
    """Read logits, files and metrics, and compare them with each other; a UserError names a damaged one."""
    folder, remedy = task.outputs, f"run: python predict_test.py {task.name}"
    logits = load_tensors(folder / "test_logits.pt", remedy, torch.Tensor)
    split = parse_split(folder / "test_files.csv", task, remedy)
    with reading(folder / "test_logits.pt", remedy):
        logits = logits.detach().resolve_neg().contiguous()
        if (
            logits.dtype != torch.float32
            or logits.shape != (len(split.files), len(CLASSES))
            or not logits.isfinite().all()
        ):
            raise ValueError(f"the logits are {tuple(logits.shape)} {logits.dtype}, for {len(split.files)} files")
    with reading(folder / "test_metrics.json", remedy):
        saved = read_json(folder / "test_metrics.json")
        if not isinstance(saved["environment"], dict):
            raise TypeError("it does not say where the logits were computed")
        record = {key: str(saved[key]) for key in ("model_sha256", "files_sha256", "images_sha256", "logits_sha256")}
        record |= {"environment": saved["environment"], "one_view": float(saved["one_view"])}
    metrics, changes = compute_metrics(logits, split.labels), []
    if record["logits_sha256"] != logits_hash(logits) or record["files_sha256"] != sha256(split_csv(split).encode()):
        changes.append("the saved logits or file list were changed after saving")
    expected = {"images": len(split.files), **metrics}
    wrong = [name for name, value in expected.items() if name != "loss" and saved.get(name) != value]
    loss = saved.get("loss")  # the only figure that another machine may round differently
    if type(loss) is not float or not math.isclose(loss, metrics["loss"], rel_tol=1e-5):
        wrong.append("loss")
    if wrong:
        changes.append(f"test_metrics.json has another {', '.join(wrong)} than the saved logits give")
    return Results(split, logits, metrics, record, changes)


def read_results_of_model(task: Task) -> Results:
    """`read_results`; a UserError says that they are of another final model, or were changed."""
    results = read_results(task)
    changes = list(results.changes)
    if results.record["model_sha256"] != model_hash(task):
        changes.append("they are of another model")
    if changes:
        folder = display_path(task.outputs)
        raise UserError(f"the test results in {folder}: {'; '.join(changes)}; run: python predict_test.py {task.name}")
    return results
