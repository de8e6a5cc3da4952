"""Logits and metrics, and the final model's file: everything that is the same whether training or grading.

Logits are always computed in float32 without TF32, in the order of the list and in batches of one size, so that they
can be compared to the last bit on the same machine.
"""

import contextlib
import ctypes
import importlib.metadata
import io
import json
import math
import platform
import random
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.metrics import accuracy_score, confusion_matrix, recall_score
from torch import nn

import plots
from augment import RANDOM_NUMBERS, network_input
from dataset import CLASSES, load_images
from engine.splits import Split, parse_split, read_splits, splits_hash
from models import Network, build_network, load_tensors
from project import Setting, UserError, atomic_write, config, outputs_dir, sha256, shown, write_json, write_text

BATCH_SIZE = 100  # images per prediction step; part of what makes logits comparable bit by bit


# The machine -----------------------------------------------------------------------------------------------------


def prepare(local_rank: int = 0) -> torch.device:
    """Choose the device, seed python, numpy and torch, and make arithmetic repeatable. The first thing a script does.

    Raises:
        UserError: there are more processes than GPUs.
    """
    random.seed(config.seed)
    np.random.seed(config.seed)
    torch.manual_seed(config.seed)
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False
    _keep_freed_memory()
    if not torch.cuda.is_available():
        return torch.device("cpu")
    if local_rank >= torch.cuda.device_count():
        raise UserError(
            f"process {local_rank + 1} of this machine has no GPU; start {torch.cuda.device_count()} at most"
        )
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def _keep_freed_memory() -> None:
    """Have the C library keep large freed blocks for the next batch; does nothing where it is not glibc.

    By default each tensor of more than 32 MB, and whatever lies free at the end of the heap, goes back to the system and
    is asked for again a moment later, page by page: a sixth of a training step on the CPU. Memory grows no further than
    its peak. The numbers are M_MMAP_THRESHOLD and M_TRIM_THRESHOLD of malloc.h.
    """
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-3, 2**30)
        mallopt(-1, 2**31 - 1)


def environment(device: torch.device) -> dict[str, str | int]:
    """What logits may depend on in their last bits."""
    cuda = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if cuda else f"cpu {torch.backends.cpu.get_cpu_capability()}",
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
        "torch": torch.__version__,
        "torchvision": importlib.metadata.version("torchvision"),
    }


# Logits ----------------------------------------------------------------------------------------------------------


def batch_reader(pixels: np.ndarray, device: torch.device) -> Callable[[torch.Tensor], torch.Tensor]:
    """A function from image indices, on the device, to their pixels (batch, 64, 64, bands) there.

    Where the whole array fits on a GPU it moves there once; else batches stream from the memory map.
    """
    if device.type == "cuda" and pixels.nbytes < torch.cuda.mem_get_info(device)[0] // 4:
        dtype = torch.from_numpy(pixels[:1].copy()).dtype
        signed = pixels.view({1: np.uint8, 2: np.int16}[pixels.itemsize])  # CUDA cannot index uint16
        resident = torch.from_numpy(np.array(signed)).to(device)
        return lambda indices: resident[indices].view(dtype)
    return lambda indices: torch.from_numpy(pixels[indices.cpu().numpy()]).to(device)


def predict(
    network: nn.Module, pixels: np.ndarray, mean: torch.Tensor, std: torch.Tensor, indices: np.ndarray | None = None
) -> torch.Tensor:
    """Logits of images in evaluation mode.

    Args:
        pixels: (images, 64, 64, bands) uint8 or uint16.
        mean, std: (bands,), on the network's device.
        indices: which images, in this order; all of them without.

    Returns:
        (images, 10) float32 on the CPU.
    """
    network.eval()
    read = batch_reader(pixels, mean.device)
    indices = torch.from_numpy(np.arange(len(pixels)) if indices is None else indices).to(mean.device)
    logits = torch.empty(len(indices), len(CLASSES), device=mean.device)  # to the CPU at the end: that waits for a GPU
    with torch.inference_mode():
        for start in range(0, len(indices), BATCH_SIZE):
            batch = read(indices[start : start + BATCH_SIZE])
            unused = torch.empty(len(batch), RANDOM_NUMBERS)
            logits[start : start + BATCH_SIZE] = network(network_input(batch, mean, std, "none", unused))
    return logits.cpu()


def measure(logits: torch.Tensor, labels: np.ndarray) -> dict:
    """Metrics of logits (images, 10) against labels (images,), all fractions in [0, 1].

    Returns:
        loss (mean cross-entropy), accuracy, tpr ({class: true-positive rate, i.e. recall}; None for a class without
        an image), mean_tpr (over the classes that have one), confusion (rows true, columns predicted).
    """
    predicted = logits.argmax(1).numpy()
    every = np.arange(len(CLASSES))
    tpr = recall_score(labels, predicted, labels=every, average=None, zero_division=np.nan)
    return {
        "loss": F.cross_entropy(logits, torch.from_numpy(labels)).item(),
        "accuracy": float(accuracy_score(labels, predicted)),
        "mean_tpr": float(np.nanmean(tpr)),
        "tpr": {name: None if np.isnan(value) else float(value) for name, value in zip(CLASSES, tpr, strict=True)},
        "confusion": confusion_matrix(labels, predicted, labels=every).tolist(),
    }


def logits_hash(logits: torch.Tensor) -> str:
    return sha256(logits.numpy().tobytes())


# The final model -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FinalModel:
    """A network and all that is to be known of it.

    Attributes:
        mean, std: (bands,), on the network's device.
        about: the rest of the file: task, setting, seed, epoch and val metrics that chose it, splits_sha256, versions.
        sha256: of the file.
    """

    network: Network
    mean: torch.Tensor
    std: torch.Tensor
    bands: tuple[str, ...]
    about: dict
    sha256: str


def save_tensors(path: Path, content: object, keep_former: bool = False) -> None:
    """`torch.save`, whole or not at all; the same content gives the same bytes."""
    buffer = io.BytesIO()  # torch.save into a named file would store that name in it
    torch.save(content, buffer)
    with atomic_write(path, keep_former) as partial:
        partial.write_bytes(buffer.getbuffer())


def model_path(task: str) -> Path:
    return outputs_dir(task) / "final_model.pt"


def model_hash(task: str) -> str:
    return sha256(model_path(task).read_bytes())


def tasks_with_model(tasks: tuple[str, ...]) -> list[str]:
    """Those of the tasks that have a final model.

    Raises:
        UserError: none has.
    """
    there = [task for task in tasks if model_path(task).exists()]
    if not there:
        paths = " or ".join(shown(model_path(task)) for task in tasks)
        raise UserError(f"there is no model {paths}; run: " + " or ".join(f"python train_{task}.py" for task in tasks))
    return there


def read_model(task: str) -> dict:
    """The content of final_model.pt.

    Raises:
        UserError: the file is missing, damaged, or of the other task.
    """
    (task,) = tasks_with_model((task,))
    path, remedy = model_path(task), f"run: python train_{task}.py"
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
    **dict.fromkeys(("setting", "network", "val", "images", "runs", "versions"), dict),
    **dict.fromkeys(("classes", "bands"), list),
    **dict.fromkeys(("mean", "std"), torch.Tensor),
    **dict.fromkeys(("run", "splits_sha256"), str),
    **dict.fromkeys(("epoch", "seed"), int),
}


def load_model(task: str, device: torch.device) -> FinalModel:
    """Load final_model.pt; nothing about the model is taken from config.py.

    Raises:
        UserError: the file is missing, damaged, of the other task, or of another kind of network.
    """
    content = read_model(task)
    path, remedy = model_path(task), f"run: python train_{task}.py"
    try:
        setting = setting_from(content["setting"])
        network = build_network(setting, weights=None)
        network.load_state_dict(content["network"])
        bands = tuple(content["bands"])
        if not bands == setting.bands or not content["mean"].shape == content["std"].shape == (len(bands),):
            raise UserError(f"bands and normalisation in {shown(path)} disagree; {remedy}")
    except (KeyError, TypeError, AttributeError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{shown(path)} is no final model of this program ({reason}); {remedy}") from error
    about = {key: value for key, value in content.items() if key not in ("network", "mean", "std")}
    network = network.to(device, memory_format=torch.channels_last)
    return FinalModel(
        network, content["mean"].to(device), content["std"].to(device), bands, about, sha256(path.read_bytes())
    )


def setting_from(values: dict) -> Setting:
    """The inverse of `dataclasses.asdict`, for values that went through a file."""
    groups = tuple(tuple(group) for group in values["band_groups"])
    return Setting(**{**values, "band_groups": groups})


def setting_values(setting: Setting) -> dict:
    """A setting as plain values that any file format holds."""
    return {**asdict(setting), "band_groups": [list(group) for group in setting.band_groups]}


# The test part ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Prediction:
    """A final model's look at the test list: logits (images, 10), row i of the list's line i."""

    split: Split
    logits: torch.Tensor
    model_sha256: str
    images_sha256: str
    environment: dict


def predict_test(task: str) -> Prediction:
    """Predict the test list with the final model.

    Raises:
        UserError: no model, no list, a damaged image, or a model trained on other lists, whose training images may be
            in this test list.
    """
    device = prepare()
    model = load_model(task, device)
    splits = read_splits(task)
    if model.about["splits_sha256"] != splits_hash(splits):
        raise UserError(
            f"{shown(model_path(task))} was trained with other lists than those in splits/, so it may have seen these "
            f"test images; bring the lists back, or run: python train_{task}.py"
        )
    split = splits["test"]
    images = load_images(task, split.files, model.bands, keep=False)
    logits = predict(model.network, images.pixels, model.mean, model.std)
    return Prediction(split, logits, model.sha256, images.sha256, environment(device))


def save_results(task: str, prediction: Prediction) -> dict:
    """Write logits, files, metrics and the confusion matrix, and return the metrics; a former result is kept as *.backup."""
    metrics = measure(prediction.logits, prediction.split.labels)
    folder, files = outputs_dir(task), prediction.split.text()
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
    # Last, because its hashes vouch for the others.
    record = {"images": len(prediction.split.files), **metrics, **hashes, "environment": prediction.environment}
    write_json(folder / "test_metrics.json", record, keep_former=True)
    return metrics


@dataclass(frozen=True)
class Results:
    """What `save_results` left of a task.

    Attributes:
        split: files and labels, one for each row of the logits.
        logits: (images, 10) float32.
        metrics: as `measure` gives them, computed from these logits.
        record: the hashes and the environment that were saved with them.
        changes: what was changed after saving, in words; empty where nothing was.
    """

    split: Split
    logits: torch.Tensor
    metrics: dict
    record: dict
    changes: list[str]


def read_results(task: str) -> Results:
    """Read logits, files and metrics, and hold them against each other: the one place that reads them.

    Raises:
        UserError: one of them is missing or damaged.
    """
    folder, again = outputs_dir(task), f"python predict_test.py {task}"
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
        record["environment"] = saved["environment"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{', '.join(names)} in {shown(folder)}: damaged ({error}); bring them back, or run: {again}"
        ) from error
    metrics = measure(logits, split.labels)
    changes = []
    if record["logits_sha256"] != logits_hash(logits) or record["files_sha256"] != sha256(split.text().encode()):
        changes.append("the saved logits or file list were changed after saving")
    figures = {"images": len(split.files), **metrics}
    wrong = [name for name in figures if name != "loss" and saved.get(name) != figures[name]]
    loss = saved.get("loss")  # the one figure that another machine may round otherwise
    if type(loss) is not float or not math.isclose(loss, metrics["loss"], rel_tol=1e-5):
        wrong.append("loss")
    if wrong:
        changes.append(f"test_metrics.json has another {', '.join(wrong)} than the saved logits give")
    return Results(split, logits, metrics, record, changes)


def read_results_of_model(task: str) -> Results:
    """`read_results`, held to be of the present final model and as they were saved.

    Raises:
        UserError: they are not.
    """
    results = read_results(task)
    changes = list(results.changes)
    if results.record["model_sha256"] != model_hash(task):
        changes.append("they are of another model")
    if changes:
        raise UserError(
            f"the test results in {shown(outputs_dir(task))}: {'; '.join(changes)}; run: python predict_test.py {task}"
        )
    return results
