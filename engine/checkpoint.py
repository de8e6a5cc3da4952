"""What makes a run continue: last.pt after every epoch, and the identity that says whose folder it is.

Random numbers are functions of (seed, epoch, image) and the learning rate of the step, so last.pt is all there is to know.
A setting's folder belongs to one identity (setting, seed, lists, pixels, initial weights): what another one left there is
put aside, not mixed in.
"""

import json
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.optim.swa_utils import AveragedModel

from dataset import CLASSES, EuroSATDataset
from engine.runtime import Processes
from engine.weights import load_tensors, save_tensors
from project import UserError, sha256, shown
from setting import Setting

TPR, AVERAGE_PRECISION = ([f"val_{kind}_{name}" for name in CLASSES] for kind in ("tpr", "ap"))
HISTORY_HEADER = [
    *("epoch", "train_loss", "train_accuracy", "val_loss", "val_accuracy", "val_mean_tpr"),
    *TPR,
    *("val_map", *AVERAGE_PRECISION),  # what it ranks, whatever it answers
    *("learning_rate", "seconds"),
]


# Identity --------------------------------------------------------------------------------------------------------


def identify(
    setting: Setting, lists_sha256: str, train: EuroSATDataset, val: EuroSATDataset, model: nn.Module
) -> dict[str, object]:
    """What decides where a training leads: setting, seed, lists, pixels, initial weights; not the machine, nor the code."""
    return {
        "task": train.task,
        "seed": train.seed,
        **setting.values(),
        "splits_sha256": lists_sha256,
        "train_images_sha256": train.sha256,
        "val_images_sha256": val.sha256,
        "initial_model_sha256": sha256(*(tensor.cpu().numpy().tobytes() for tensor in model.state_dict().values())),
    }


def run_hash(identity: dict) -> str:
    """Tells runs apart in what is left of them: the curves, selection.csv, the final model."""
    return sha256(json.dumps(identity, sort_keys=True).encode())[:16]


def archive_stale_run(folder: Path, identity: dict, processes: Processes) -> None:
    """Put the folder aside, under another name, if what lies in it is of another identity."""
    former = _identity_of(folder)
    aside = folder.with_name(f"{folder.name}-before-{run_hash(former or {})[:8]}")
    while aside.exists():
        aside = aside.with_name(aside.name + "-again")
    if processes.size > 1:
        dist.barrier()  # everyone has read before the first one moves anything
    if former is None or former == identity:
        return
    changed = [key for key in identity if former.get(key) != identity[key]]
    processes.announce(f"{folder.name}: {', '.join(changed)} changed; what was trained before is now in {shown(aside)}")
    if processes.rank == 0:
        folder.rename(aside)
    if processes.size > 1:
        dist.barrier()


def _identity_of(folder: Path) -> dict | None:
    """Whose folder it is; None where nothing was trained."""
    if (folder / "last.pt").exists():
        former = load_tensors(folder / "last.pt").get("identity")
    elif (folder / "setting.json").exists():
        try:
            former = json.loads((folder / "setting.json").read_text())["identity"]
        except (ValueError, KeyError, TypeError):
            former = {}
    else:
        return None
    return former if isinstance(former, dict) else {}


# Checkpoints -----------------------------------------------------------------------------------------------------


def best_epoch(history: list[dict]) -> dict:
    """The row with the highest val accuracy, then the highest mean TPR; the first of equals."""
    return max(history, key=lambda row: (row["val_accuracy"], row["val_mean_tpr"]))


def save_checkpoint(
    folder: Path,
    model: nn.Module,
    averaged: AveragedModel,
    optimizer: torch.optim.Optimizer,
    history: list[dict],
    about: dict,
) -> None:
    """Write last.pt, and best.pt where the last epoch is the best.

    Args:
        averaged: of the model; what was evaluated.
        history: a row for each epoch that is done, keys as in HISTORY_HEADER.
        about: identity, versions, mean and std.
    """
    if best_epoch(history) is history[-1]:
        # Before last.pt: whoever is killed between the two repeats this epoch and writes the same again.
        save_tensors(folder / "best.pt", {"epoch": len(history), "model": averaged.module.state_dict()})
    states = {"model": model, "averaged": averaged, "optimizer": optimizer}
    content = {**about, "history": history, **{name: state.state_dict() for name, state in states.items()}}
    save_tensors(folder / "last.pt", content)


def load_checkpoint(
    path: Path, model: nn.Module, averaged: AveragedModel, optimizer: torch.optim.Optimizer
) -> list[dict]:
    """Put model, average and optimizer where last.pt left them; return the history: its length is the number of epochs done.

    Raises:
        UserError: it holds something else than a checkpoint of this model.
    """
    content = read_checkpoint(path)
    try:
        model.load_state_dict(content["model"])
        averaged.load_state_dict(content["averaged"])
        optimizer.load_state_dict(content["optimizer"])
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:  # whatever torch makes of it
        raise _no_checkpoint(path, error) from error
    return content["history"]


def read_checkpoint(path: Path) -> dict:
    """The content of last.pt, its history checked.

    Raises:
        UserError: the file is missing or damaged, or no checkpoint.
    """
    content = load_tensors(path)
    try:
        history = content["history"]
        may_be_none = {*TPR, *AVERAGE_PRECISION}  # of a class without an image
        numbers = [v for row in history for key, v in row.items() if v is not None or key not in may_be_none]
        if (
            not all(list(row) == HISTORY_HEADER for row in history)
            or not all(type(number) in (int, float) for number in numbers)
            or not history
            or [row["epoch"] for row in history] != list(range(1, len(history) + 1))
            or not all(isinstance(content[key], dict) for key in ("identity", "versions"))
            or not all(isinstance(content[key], torch.Tensor) for key in ("mean", "std"))
        ):
            raise ValueError("its parts disagree")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise _no_checkpoint(path, error) from error
    return content


def _no_checkpoint(path: Path, error: Exception) -> UserError:
    reason = " ".join(str(error).split())[:200]
    return UserError(
        f"{shown(path)} is no checkpoint of this model ({reason}); bring it back, or delete it to train "
        f"{path.parent.name} afresh"
    )
