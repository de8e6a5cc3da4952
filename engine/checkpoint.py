"""What makes a run continue: last.pt, written after every epoch, and the identity that says which run a folder holds.

No random generator needs saving: random numbers follow from (seed, epoch, image or process), and the learning rate from the
step. So last.pt holds everything, the best epoch's weights too, from which the final model is chosen. A setting's folder
belongs to one run: what another run left there is moved aside.
"""

import json
import time
from pathlib import Path

from base.files import content_hash, load_tensors, read_json, reading, save_tensors, sha256
from base.project import CLASSES, display_path
from base.setting import Setting

import torch
from torch import nn

from dataset import EuroSATDataset
from engine.runtime import announce, is_main_process, wait_for_all

HISTORY_HEADER = [
    *("epoch", "train_loss", "train_accuracy", "val_loss", "val_accuracy", "val_mean_tpr"),
    *(f"val_tpr_{name}" for name in CLASSES),  # None for a class without images, as below
    *("val_map", *(f"val_ap_{name}" for name in CLASSES)),
    *("learning_rate", "seconds"),
]


def run_identity(
    setting: Setting, lists_sha256: str, train: EuroSATDataset, val: EuroSATDataset, model: nn.Module
) -> dict[str, object]:
    """What decides the outcome of a training: setting, seed, lists, pixels, initial weights; not the machine or the code."""
    return {
        "task": train.task.name,
        "seed": train.seed,
        **setting.values(),
        "splits_sha256": lists_sha256,
        "train_images_sha256": train.sha256,
        "val_images_sha256": val.sha256,
        "initial_model_sha256": sha256(*(tensor.cpu().numpy().tobytes() for tensor in model.state_dict().values())),
    }


def run_hash(identity: dict) -> str:
    """Identifies a run in its curves, in selection.csv and in the final model."""
    return sha256(json.dumps(identity, sort_keys=True).encode())[:16]


def archive_other_run(folder: Path, identity: dict) -> None:
    """Move the folder aside if it holds another run, with or without its checkpoint."""
    former, record = identity, folder / "setting.json"
    if (folder / "last.pt").exists():
        former = read_checkpoint(folder)["identity"]
    elif record.exists():
        with reading(record, "move its folder away"):
            former = dict(read_json(record)["identity"])
    wait_for_all()  # every process has read it before the first one moves it
    if former == identity:
        return
    aside = folder.with_name(f"{folder.name}-before-{run_hash(former)[:8]}-{int(time.time())}")
    changed = ", ".join(key for key in {**former, **identity} if former.get(key) != identity.get(key))
    announce(f"{folder.name}: {changed} changed; what was trained before is now in {display_path(aside)}")
    if is_main_process():
        folder.rename(aside)
    wait_for_all()


def best_epoch(history: list[dict]) -> dict:
    """The row with the highest val accuracy, then the highest mean TPR; the first of equal rows."""
    return max(history, key=lambda row: (row["val_accuracy"], row["val_mean_tpr"]))


def save_checkpoint(folder: Path, content: dict) -> None:
    """Write last.pt; the keys are those of `read_checkpoint`."""
    save_tensors(folder / "last.pt", {**content, "sha256": content_hash(content)})


def read_checkpoint(folder: Path) -> dict:
    """The content of last.pt.

    Returns:
        identity; environments, one for each kind of machine that trained; mean and std, (bands,); history, a row per epoch;
        best, the weights of the best epoch; model and optimizer, their states. A UserError says that it is damaged.
    """
    path, remedy = folder / "last.pt", f"bring it back, or delete it to train {folder.name} again"
    content = load_tensors(path, remedy)
    with reading(path, remedy):
        for epoch, row in enumerate(content["history"], start=1):
            shares = row["val_accuracy"], row["val_mean_tpr"], row["train_accuracy"]
            if list(row) != HISTORY_HEADER or row["epoch"] != epoch or not all(0 <= share <= 1 for share in shares):
                raise ValueError(f"epoch {epoch} of its history is damaged")
        if not all(isinstance(each, dict) for each in (content["identity"], *content["environments"])):
            raise ValueError("it does not say what was trained, or where")
        if content.pop("sha256") != content_hash(content):
            raise ValueError("it was edited, or its parts are of different runs")
    return content


def load_checkpoint(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[list[dict], dict, list]:
    """Restore model and optimizer from last.pt, if it exists.

    Returns the history, whose length is the number of epochs done; the best epoch's weights; the environments so far.
    """
    if not (folder / "last.pt").exists():
        return [], {}, []
    content = read_checkpoint(folder)
    with reading(folder / "last.pt", f"bring it back, or delete it to train {folder.name} again"):
        model.load_state_dict(content["best"])
        model.load_state_dict(content["model"])
        optimizer.load_state_dict(content["optimizer"])
    return content["history"], content["best"], content["environments"]
