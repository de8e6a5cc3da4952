"""Logits, the final model's file, and the test results: the same whether training or grading.

Logits are always computed in float32 without TF32, in the order of the list and in batches of one size, so that they
can be compared to the last bit on the same machine.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader

from dataset import CLASSES, EuroSATDataset, Split, patch_of
from engine import plots
from engine.checkpoint import best_epoch, read_checkpoint, run_hash
from engine.metrics import average_precisions, by_class, compute_metrics
from engine.runtime import Processes, choose_device, environment
from engine.splits import list_text, parse_split, read_splits, split_text, splits_hash
from engine.weights import RGB_MODEL, initial_weights_record, load_initial_weights, load_tensors, save_tensors
from models import Network, build_model, torchvision_name
from project import UserError, sha256, shown, write_json, write_text
from setting import Setting

BATCH_SIZE = 100  # images per prediction step; part of what makes logits comparable bit by bit


def in_order(dataset: EuroSATDataset, processes: Processes | None = None) -> DataLoader:
    """Whole batches in the order of the list; of several processes each takes its share."""
    rank, size = (processes.rank, processes.size) if processes else (0, 1)
    return DataLoader(dataset, sampler=torch.arange(rank, len(dataset), size).split(BATCH_SIZE), batch_size=None)


def predict(
    model: nn.Module, loader: DataLoader, views: int = 1, embed: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits (images, 10) float32 and labels (images,) of what a loader gives, on the CPU; in evaluation mode.

    Args:
        embed: what the linear layer sees, (images, channels), instead of the logits.
    """
    model.eval()
    outputs, labels = [], []
    with torch.inference_mode():
        for images, own in loader:  # (batch, bands, 64, 64), (batch,)
            outputs.append(model.embed(images, views) if embed else model(images, views))
            labels.append(own)
    return torch.cat(outputs).cpu(), torch.cat(labels).cpu()  # to the CPU at the end: that waits for a GPU


def evaluate(model: nn.Module, loader: DataLoader, processes: Processes) -> dict:
    """`compute_metrics` over all that the loaders of the processes give, average_precision ({class: …}) and its mean, map."""
    logits, labels = predict(model, loader)
    total = len(loader.dataset)
    logits, labels = processes.gather(logits, total), processes.gather(labels, total).numpy()
    precisions = average_precisions(logits, labels)
    own = {"map": float(np.nanmean(precisions)), "average_precision": by_class(precisions)}
    return compute_metrics(logits, labels) | own


def logits_hash(logits: torch.Tensor) -> str:
    return sha256(logits.numpy().tobytes())


# The final model -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FinalModel:
    """A model and all that is to be known of it.

    Attributes:
        mean, std: (bands,).
        about: the rest of the file: task, seed, epoch and val metrics that chose it, splits_sha256, versions.
        sha256: of the file.
    """

    model: Network
    mean: torch.Tensor
    std: torch.Tensor
    bands: tuple[str, ...]
    setting: Setting
    about: dict
    sha256: str


def model_path(folder: Path) -> Path:
    return folder / "final_model.pt"


def model_hash(folder: Path) -> str:
    return sha256(model_path(folder).read_bytes())


def with_model(folders: dict[str, Path]) -> dict[str, Path]:
    """Those of {task: its folder in outputs/} that have a final model.

    Raises:
        UserError: none has.
    """
    there = {task: folder for task, folder in folders.items() if model_path(folder).exists()}
    if not there:
        paths = " or ".join(shown(model_path(folder)) for folder in folders.values())
        raise UserError(
            f"there is no model {paths}; run: " + " or ".join(f"python train_{task}.py" for task in folders)
        )
    return there


def read_model(folder: Path, task: str) -> dict:
    """The content of final_model.pt.

    Raises:
        UserError: the file is missing, damaged, or of the other task.
    """
    path, remedy = model_path(with_model({task: folder})[task]), f"run: python train_{task}.py"
    content = load_tensors(path)
    if content.get("task") != task:
        raise UserError(f"{shown(path)} is a model of the task {content.get('task')!r}; {remedy}")
    missing = [key for key in MODEL_KEYS if not isinstance(content.get(key), MODEL_KEYS[key])]
    if missing:
        raise UserError(f"{shown(path)} is no final model of this program ({', '.join(missing)}); {remedy}")
    if tuple(content["classes"]) != CLASSES:
        raise UserError(f"{shown(path)} knows other classes: {', '.join(map(str, content['classes']))}; {remedy}")
    return content


MODEL_KEYS = {
    **dict.fromkeys(("setting", "model", "val", "images", "runs", "versions"), dict),
    **dict.fromkeys(("classes", "bands"), list),
    **dict.fromkeys(("mean", "std"), torch.Tensor),
    **dict.fromkeys(("run", "splits_sha256"), str),
    **dict.fromkeys(("epoch", "seed"), int),
}


def load_model(folder: Path, task: str, device: torch.device) -> FinalModel:
    """Load final_model.pt; nothing about the model is taken from config.py.

    Raises:
        UserError: the file is missing, damaged, of the other task, or of another kind of network.
    """
    content = read_model(folder, task)
    path, remedy = model_path(folder), f"run: python train_{task}.py"
    try:
        setting = Setting(**content["setting"])
        model = build_model(setting, weights=None)
        model.load_state_dict(content["model"])
        bands = tuple(content["bands"])
        if not bands == setting.bands or not content["mean"].shape == content["std"].shape == (len(bands),):
            raise UserError(f"bands and normalisation in {shown(path)} disagree; {remedy}")
    except (KeyError, TypeError, AttributeError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{shown(path)} is no final model of this program ({reason}); {remedy}") from error
    about = {key: value for key, value in content.items() if key not in ("model", "mean", "std", "setting")}
    model = model.to(device, memory_format=torch.channels_last)
    return FinalModel(model, content["mean"], content["std"], bands, setting, about, sha256(path.read_bytes()))


def check_lists(final: FinalModel, folder: Path, task: str, lists: dict[str, Split]) -> None:
    """Hold a final model to the lists it was trained with.

    Raises:
        UserError: these are others.
    """
    if final.about["splits_sha256"] != splits_hash(lists):
        raise UserError(
            f"{shown(model_path(folder))} was trained with other lists than those in splits/, so it may have seen these "
            f"test images; bring the lists back, or run: python train_{task}.py"
        )


def initial_weights(
    setting: Setting, pretrained: Path, rgb_folder: Path, rgb_splits: Path, lists: dict[str, Split]
) -> dict[str, torch.Tensor] | None:
    """What a training starts from: `rgb_backbone` where the setting says so, else `load_initial_weights`.

    Args:
        rgb_folder, rgb_splits: of the task "rgb" in outputs/ and splits/.
        lists: of the task that is trained.
    """
    if setting.weights == RGB_MODEL:
        return rgb_backbone(rgb_folder, read_splits(rgb_splits, "rgb"), lists)
    return load_initial_weights(setting, pretrained)


def rgb_backbone(folder: Path, rgb: dict[str, Split], ms: dict[str, Split]) -> dict[str, torch.Tensor]:
    """The backbone of the final RGB model, under torchvision's names: initial weights for six bands.

    Args:
        folder: of the task "rgb" in outputs/.
        rgb, ms: the lists of both image sets.

    Raises:
        UserError: there is no RGB model, it is of other lists, or it was trained or chosen with a patch of the test list.
    """
    content = read_model(folder, "rgb")
    if content["splits_sha256"] != splits_hash(rgb):
        raise UserError(
            f"{shown(model_path(folder))} was trained with other lists than those in splits/; run: python train_rgb.py"
        )
    seen = {patch_of(file) for part in ("train", "val") for file in rgb[part].files}
    if leaked := [file for file in ms["test"].files if patch_of(file) in seen]:
        raise UserError(
            f"the final RGB model has seen {len(leaked)} test patches of the multispectral lists ({leaked[0]}, …), so a network "
            "cannot start from it; set other weights in config.py"
        )
    backbone = ((name.removeprefix("backbone."), tensor) for name, tensor in content["model"].items())
    return {torchvision_name(name): tensor for name, tensor in backbone if not name.startswith("linear.")}


# Its choice, by val ----------------------------------------------------------------------------------------------


def select_final_model(
    task: str, settings: list[Setting], lists: dict[str, Split], folder: Path, pretrained: Path
) -> None:
    """Write the best epoch of the best setting, by val, as final_model.pt, and how all did as selection.csv."""
    runs = {setting.name: read_checkpoint(folder / setting.name / "last.pt") for setting in settings}
    bests = {name: best_epoch(run["history"]) for name, run in runs.items()}
    best = best_epoch(list(bests.values()))
    setting = next(setting for setting in settings if bests[setting.name] is best)
    run, own = runs[setting.name], load_tensors(folder / setting.name / "best.pt")
    if own.get("epoch") != best["epoch"] or "model" not in own:
        raise UserError(
            f"{shown(folder / setting.name)}: best.pt and last.pt are of different runs; delete the folder and train again"
        )
    content = {
        "task": task,
        "run": run_hash(run["identity"]),
        "runs": {name: run_hash(other["identity"]) for name, other in runs.items()},
        "setting": setting.values(),
        "initial_weights": initial_weights_record(setting, pretrained, model_path(folder.with_name("rgb"))),
        "classes": list(CLASSES),
        "bands": list(setting.bands),
        **{"mean": run["mean"], "std": run["std"], "model": own["model"], "epoch": best["epoch"]},
        "val": {key: value for key, value in best.items() if key.startswith("val_")},
        "seed": run["identity"]["seed"],
        "splits_sha256": run["identity"]["splits_sha256"],
        "images": {part: len(split.files) for part, split in lists.items()},
        "versions": run["versions"],
    }
    save_tensors(model_path(folder), content, keep_former=True)
    write_selection(folder, settings, setting, runs, bests)
    print(
        f"best by val: {setting.name}, epoch {best['epoch']}, accuracy {best['val_accuracy']:.2%}, mean TPR "
        f"{best['val_mean_tpr']:.2%} ({task})\nwrote {shown(model_path(folder))}, selection.csv beside it, and a folder for "
        f"each setting\nnext: python predict_test.py {task}"
    )


def write_selection(folder: Path, settings: list[Setting], selected: Setting, runs: dict, bests: dict) -> None:
    """How all settings did: selection.csv."""
    header = ["setting", "selected", "best_epoch", "val_accuracy", "val_mean_tpr", "augmentation", "fusion", "bands"]
    rows = []
    for setting in settings:
        best, run = bests[setting.name], runs[setting.name]
        row = [setting.name, "yes" if setting is selected else "no"]
        row += [best[key] for key in ("epoch", "val_accuracy", "val_mean_tpr")]
        row += [setting.augmentation, setting.fusion, " ".join(setting.bands)]
        rows.append([*row, round(sum(epoch["seconds"] for epoch in run["history"]), 1), run_hash(run["identity"])])
    write_text(folder / "selection.csv", list_text([*header, "seconds", "run"], rows), keep_former=True)


# The test part ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Prediction:
    """A final model's look at the test list: logits (images, 10), row i of the list's line i; those from one view, too."""

    split: Split
    logits: torch.Tensor
    one_view: torch.Tensor
    model_sha256: str
    images_sha256: str
    environment: dict


def predict_test(root: Path, folder: Path, task: str, splits: dict[str, Split]) -> Prediction:
    """Predict the test list with the final model.

    Args:
        root: of the data set.
        folder: of the task in outputs/.

    Raises:
        UserError: no model, a damaged image, or a model trained on other lists, whose training images may be in this
            test list.
    """
    device = choose_device()
    final = load_model(folder, task, device)
    check_lists(final, folder, task, splits)
    test = splits["test"]
    statistics = final.mean, final.std
    data = EuroSATDataset(root, task, test, final.bands, statistics, device=device)
    one_view, _ = predict(final.model, in_order(data))
    logits = one_view
    if final.setting.views > 1:
        logits, _ = predict(final.model, in_order(data), final.setting.views)
    return Prediction(test, logits, one_view, final.sha256, data.sha256, environment(device))


def save_results(folder: Path, task: str, prediction: Prediction) -> dict:
    """Write logits, files, metrics and the confusion matrix, and return the metrics; a former result is kept as *.backup."""
    metrics, files = compute_metrics(prediction.logits, prediction.split.labels), split_text(prediction.split)
    save_tensors(folder / "test_logits.pt", prediction.logits, keep_former=True)
    write_text(folder / "test_files.csv", files, keep_former=True)
    hashes = {
        "model_sha256": prediction.model_sha256,
        "files_sha256": sha256(files.encode()),
        "images_sha256": prediction.images_sha256,
        "logits_sha256": logits_hash(prediction.logits),
    }
    confusion = folder / "confusion_matrix.png"
    plots.confusion_matrix(confusion, metrics["confusion"], task, source=hashes["logits_sha256"])
    one_view = compute_metrics(prediction.one_view, prediction.split.labels)
    record = {"images": len(prediction.split.files), **metrics, "one_view": one_view["accuracy"], **hashes}
    # Last, because its hashes vouch for the others.
    record["environment"] = prediction.environment
    write_json(folder / "test_metrics.json", record, keep_former=True)
    return metrics


@dataclass(frozen=True)
class Results:
    """What `save_results` left of a task.

    Attributes:
        split: files and labels, one for each row of the logits.
        logits: (images, 10) float32.
        metrics: as `compute_metrics` gives them, computed from these logits.
        record: hashes, environment and the accuracy with one view ("one_view") that were saved with them.
        changes: what was changed after saving, in words; empty where nothing was.
    """

    split: Split
    logits: torch.Tensor
    metrics: dict
    record: dict
    changes: list[str]

    @property
    def answers(self) -> np.ndarray:
        """(images,) index in CLASSES."""
        return self.logits.argmax(1).numpy()

    @property
    def right(self) -> np.ndarray:
        """(images,) bool."""
        return self.answers == self.split.labels


def read_results(folder: Path, task: str) -> Results:
    """Read logits, files and metrics, and hold them against each other: the one place that reads them.

    Raises:
        UserError: one of them is missing or damaged.
    """
    again = f"python predict_test.py {task}"
    names = ("test_logits.pt", "test_files.csv", "test_metrics.json")
    for name in names:
        if not (folder / name).exists():
            raise UserError(f"there is no reference {shown(folder / name)}; run: {again}")
    logits = load_tensors(folder / "test_logits.pt", torch.Tensor)
    split = parse_split(folder / "test_files.csv", task, missing=again, damaged=again)
    try:
        if logits.dtype != torch.float32 or logits.shape != (len(split.files), len(CLASSES)):
            raise ValueError(f"logits {tuple(logits.shape)} {logits.dtype}, {len(split.files)} files")
        saved = json.loads((folder / "test_metrics.json").read_text(encoding="utf-8"))
        record = {key: saved[key] for key in ("model_sha256", "files_sha256", "images_sha256", "logits_sha256")}
        if not isinstance(saved["environment"], dict) or not all(isinstance(value, str) for value in record.values()):
            raise ValueError("no environment or hashes")
        record |= {"environment": saved["environment"], "one_view": float(saved["one_view"])}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{', '.join(names)} in {shown(folder)}: damaged ({error}); bring them back, or run: {again}"
        ) from error
    metrics = compute_metrics(logits, split.labels)
    changes = []
    if record["logits_sha256"] != logits_hash(logits) or record["files_sha256"] != sha256(split_text(split).encode()):
        changes.append("the saved logits or file list were changed after saving")
    figures = {"images": len(split.files), **metrics}
    wrong = [name for name in figures if name != "loss" and saved.get(name) != figures[name]]
    loss = saved.get("loss")  # the one figure that another machine may round otherwise
    if type(loss) is not float or not math.isclose(loss, metrics["loss"], rel_tol=1e-5):
        wrong.append("loss")
    if wrong:
        changes.append(f"test_metrics.json has another {', '.join(wrong)} than the saved logits give")
    return Results(split, logits, metrics, record, changes)


def read_results_of_model(folder: Path, task: str) -> Results:
    """`read_results`, held to be of the present final model and as they were saved.

    Raises:
        UserError: they are not.
    """
    results = read_results(folder, task)
    changes = list(results.changes)
    if results.record["model_sha256"] != model_hash(folder):
        changes.append("they are of another model")
    if changes:
        raise UserError(
            f"the test results in {shown(folder)}: {'; '.join(changes)}; run: python predict_test.py {task}"
        )
    return results
