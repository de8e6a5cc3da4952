"""The loop: one epoch, one setting. The choice among all settings is `select_final_model` in evaluation.py.

One process or many: under `torchrun` every process takes its share of each batch, and only the first one writes. After
each epoch a checkpoint is written; a run that was killed, whenever, continues from the last whole epoch and ends, bit for
bit on the same machine, as an uninterrupted one.
"""

import math
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader, Sampler
from tqdm import tqdm

from augment import AUGMENTATIONS
from dataset import CLASSES, EuroSATDataset, band_indices
from engine import plots
from engine.checkpoint import (
    HISTORY_HEADER,
    archive_stale_run,
    best_epoch,
    identify,
    load_checkpoint,
    run_hash,
    save_checkpoint,
)
from engine.evaluation import evaluate, in_order
from engine.runtime import Processes, choose_precision, environment, seed_everything
from engine.splits import list_text
from engine.weights import RGB_MODEL, weights_file
from models import FUSIONS, average_of, known_backbones
from project import UserError, shown, write_json, write_text
from setting import Setting


def check_settings(task: str, settings: list[Setting]) -> None:
    """Hold the names in settings to what there is; their types and ranges were checked when config.py was read.

    Raises:
        UserError: names the setting, what is wrong and what is known.
    """
    for setting in settings:
        band_indices(task, setting.bands)
        groups = 1 if setting.fusion == "none" else 2
        rules = (
            (setting.augmentation in AUGMENTATIONS, f"unknown augmentation; known: {', '.join(AUGMENTATIONS)}"),
            (setting.fusion in FUSIONS, f"unknown fusion; known: {', '.join(FUSIONS)}"),
            ([len(group) for group in setting.band_groups] == [3] * groups, f"takes {groups} group(s) of three bands"),
            (setting.backbone in known_backbones(), f"unknown backbone; known: {', '.join(known_backbones())}"),
        )
        for kept, rule in rules:
            if not kept:
                raise UserError(f"the setting {setting.name!r} in config.py: {rule}")
        if setting.weights is not None and (task, setting.weights) != ("ms", RGB_MODEL):
            weights_file(setting.backbone, setting.weights)


# One epoch -------------------------------------------------------------------------------------------------------


class EpochBatches(Sampler):
    """Every image once per epoch, in an order that (seed, epoch) gives, in nearly equal batches: no tiny last one.

    Yields indices, (share of the batch,): of several processes each has its share. `sizes` are those of whole batches.
    """

    def __init__(self, images: int, batch_size: int, seed: int, processes: Processes) -> None:
        self.images, self.seed, self.processes, self.epoch = images, seed, processes, 0
        self.sizes = [len(batch) for batch in np.array_split(range(images), math.ceil(images / batch_size))]

    def __len__(self) -> int:
        return len(self.sizes)

    def __iter__(self) -> Iterator[torch.Tensor]:
        order = np.random.default_rng((self.seed, self.epoch, 1)).permutation(self.images)
        # All at once, before the GPU has anything to do: each copy to it waits until it has done all it has.
        batches = torch.from_numpy(order).to(self.processes.device).split(self.sizes)
        return (batch[self.processes.rank :: self.processes.size] for batch in batches)


def make_loader(train: EuroSATDataset, setting: Setting, processes: Processes) -> DataLoader:
    """Whole batches of the training images, by `EpochBatches`.

    Raises:
        UserError: too few images.
    """
    batches = EpochBatches(len(train), setting.batch_size, train.seed, processes)
    if min(batches.sizes) < 2 * processes.size:  # batch norm needs two images in each process
        raise UserError(
            f"the setting {setting.name!r}: {len(train)} training images in batches of at most {setting.batch_size} leave "
            f"{processes.size} process(es) fewer than two at a step; use a longer list, a larger batch_size or fewer processes"
        )
    return DataLoader(train, sampler=batches, batch_size=None)


def make_optimizer(model: nn.Module, setting: Setting) -> torch.optim.Optimizer:
    """AdamW (Loshchilov and Hutter, 2019); `train_one_epoch` sets the learning rate at each step."""
    return torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=setting.weight_decay, fused=True)


def learning_rate(setting: Setting, progress: float) -> float:
    """Linear warm-up, then a half cosine to zero (Loshchilov and Hutter, SGDR, 2017), at a progress from 0 to 1."""
    if progress < setting.warmup:
        return setting.learning_rate * progress / setting.warmup
    return setting.learning_rate * 0.5 * (1 + math.cos(math.pi * (progress - setting.warmup) / (1 - setting.warmup)))


def train_one_epoch(
    model: nn.Module,
    averaged: AveragedModel,
    loader: DataLoader,
    optimizer: torch.optim.Optimizer,
    setting: Setting,
    epoch: int,
    processes: Processes,
) -> dict[str, float]:
    """Every image once.

    Args:
        averaged: of the model; follows it at each step.
        loader: whole batches, images (batch, bands, 64, 64) and labels (batch,), by `EpochBatches`.
        epoch: from 0.

    Returns:
        train_loss and train_accuracy over the images as they were augmented, and the last learning_rate.
    """
    device, precision = processes.device, choose_precision(processes.device)
    loss_sum = torch.zeros((), dtype=torch.float64, device=device)  # on the device: reading it would wait for it
    correct = torch.zeros((), dtype=torch.float64, device=device)
    title = f"{setting.name} {epoch + 1}/{setting.epochs}"
    bar = tqdm(loader, desc=title, unit="batch", leave=False, disable=True if processes.rank else None)
    loader.dataset.set_epoch(epoch)
    loader.sampler.epoch = epoch
    model.train()
    for step, (images, labels) in enumerate(bar):
        progress = (epoch + (step + 0.5) / len(loader)) / setting.epochs
        for parameters in optimizer.param_groups:
            parameters["lr"] = learning_rate(setting, progress)
        with torch.autocast(device.type, precision, enabled=precision != torch.float32):
            logits = model(images)
            loss = F.cross_entropy(logits, labels, label_smoothing=setting.label_smoothing, reduction="sum")
        # DistributedDataParallel averages over processes; this makes it the mean over the whole batch.
        (loss * processes.size / loader.sampler.sizes[step]).backward()
        optimizer.step()
        averaged.update_parameters(model)
        optimizer.zero_grad()
        loss_sum += loss.detach()
        correct += (logits.argmax(1) == labels).sum()
    processes.add_up((loss_sum, correct))
    row = {"train_loss": loss_sum.item(), "train_accuracy": correct.item()}
    row = {key: total / len(loader.dataset) for key, total in row.items()}
    return row | {"learning_rate": optimizer.param_groups[0]["lr"]}


# One setting -----------------------------------------------------------------------------------------------------


def train_setting(
    setting: Setting,
    model: nn.Module,
    train: EuroSATDataset,
    val: EuroSATDataset,
    lists_sha256: str,
    folder: Path,
    processes: Processes,
) -> None:
    """Train one setting to its last epoch, from wherever it stands.

    Args:
        model: with its initial weights.
        lists_sha256: of the lists that `train` and `val` are of.
        folder: of the setting, below outputs/.

    Raises:
        UserError: too few images, a damaged checkpoint, or a loss that is not a number.
    """
    loader, val_loader = make_loader(train, setting, processes), in_order(val, processes)
    identity = identify(setting, lists_sha256, train, val, model)
    archive_stale_run(folder, identity, processes)
    model = model.to(processes.device, memory_format=torch.channels_last)
    averaged = average_of(model, setting)
    optimizer = make_optimizer(model, setting)
    history = load_checkpoint(last, model, averaged, optimizer) if (last := folder / "last.pt").exists() else []
    if len(history) >= setting.epochs:
        processes.announce(f"{setting.name}: finished before, best epoch {best_epoch(history)['epoch']}")
        if processes.rank == 0 and not (folder / "val_curves.png").exists():
            draw_curves(history, identity, folder)
        return
    versions = environment(processes.device)
    if processes.rank == 0:
        write_json(folder / "setting.json", {"identity": identity, "processes": processes.size, **versions})
    processes.announce(f"{setting.name}: from epoch {len(history) + 1} of {setting.epochs} on {processes.device}")
    on_gpus = processes.size > 1 and processes.device.type == "cuda"
    trained = nn.SyncBatchNorm.convert_sync_batchnorm(model) if on_gpus else model
    trained = DistributedDataParallel(trained) if processes.size > 1 else trained
    about = {"identity": identity, **dict(zip(("mean", "std"), train.statistics, strict=True))}
    about["versions"] = {key: value for key, value in versions.items() if key.startswith("torch")}
    for epoch in range(len(history), setting.epochs):
        start = time.monotonic()
        dropout = np.random.SeedSequence((train.seed, epoch, processes.rank))
        seed_everything(int(dropout.generate_state(1)[0]))
        row = train_one_epoch(trained, averaged, loader, optimizer, setting, epoch, processes)
        processes.broadcast((*model.buffers(), *averaged.buffers()))  # running statistics, where not synchronised
        metrics = evaluate(averaged.module, val_loader, processes)
        row |= {f"val_{key}": metrics[key] for key in ("loss", "accuracy", "mean_tpr", "map")}
        row |= {f"val_tpr_{name}": metrics["tpr"][name] for name in CLASSES}
        row |= {f"val_ap_{name}": metrics["average_precision"][name] for name in CLASSES}
        row |= {"epoch": epoch + 1, "seconds": round(time.monotonic() - start, 2)}
        record_epoch(row, history, setting, folder, processes)
        if processes.rank == 0:
            if len(history) == setting.epochs:  # not before: drawing takes as long as 80 images
                draw_curves(history, identity, folder)
            # Last: whoever is killed before repeats the epoch.
            save_checkpoint(folder, model, averaged, optimizer, history, about)


def record_epoch(row: dict, history: list[dict], setting: Setting, folder: Path, processes: Processes) -> None:
    """Append an epoch to the history, say it, and write history.csv.

    Raises:
        UserError: a loss is not a number.
    """
    if not math.isfinite(row["train_loss"] + row["val_loss"]):
        kept = f"the best epoch so far, {best_epoch(history)['epoch']}, is kept" if history else "no epoch is kept"
        raise UserError(
            f"the loss of {setting.name} is not a number in epoch {row['epoch']}; {kept} in {shown(folder)}; "
            "lower its learning_rate in config.py"
        )
    history.append({key: row[key] for key in HISTORY_HEADER})
    best = " (best so far)" if best_epoch(history) is history[-1] else ""
    processes.announce(
        f"{setting.name} epoch {row['epoch']}/{setting.epochs}: train loss {row['train_loss']:.3f}, val accuracy "
        f"{row['val_accuracy']:.2%}, mean TPR {row['val_mean_tpr']:.2%}, {row['seconds']:.1f} s{best}"
    )
    if processes.rank == 0:
        write_text(folder / "history.csv", list_text(HISTORY_HEADER, [list(row.values()) for row in history]))


def draw_curves(history: list[dict], identity: dict, folder: Path) -> None:
    """The graph of a setting: val_curves.png."""
    best, source = best_epoch(history)["epoch"], run_hash(identity)
    plots.val_curves(folder / "val_curves.png", folder.name, history, best, identity["task"], source)
