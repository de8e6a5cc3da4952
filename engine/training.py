"""The loop: one epoch, one setting. `select_final_model` in final_model.py chooses among all settings.

One process or several: with `torchrun` each process takes its share of every batch, and only the main process writes. A
checkpoint is written after every epoch. A run killed at any time resumes after its last complete epoch and ends, on the
same machine, bit-identical to an uninterrupted run.
"""

import math
import time
from pathlib import Path

from base.errors import UserError
from base.files import write_csv, write_json
from base.project import CLASSES, Task
from base.setting import Setting

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from augment import AUGMENTATIONS
from dataset import EuroSATDataset, band_indices
from engine import checkpoint, plots, runtime
from engine.results import evaluate
from engine.weights import RGB_MODEL, weights_file
from models import build_model


def check_settings(task: Task) -> list[Setting]:
    """The task's settings. A UserError names what does not exist or work; config.py was checked for types and ranges."""
    for setting in task.settings:
        try:
            band_indices(task, setting.bands)
            if setting.augmentation not in AUGMENTATIONS:
                raise UserError(f"unknown augmentation {setting.augmentation!r}; known: {', '.join(AUGMENTATIONS)}")
            build_model(setting, weights=None)
            if setting.weights is not None and (task.name, setting.weights) != ("ms", RGB_MODEL):
                weights_file(setting.backbone, setting.weights)
        except UserError as error:
            raise UserError(f"config.py: the setting {setting.name!r}: {error}") from error
    return task.settings


def epoch_batches(images: int, batch_size: int, seed: int, epoch: int) -> list[torch.Tensor]:
    """Indices of every image once, in an order given by (seed, epoch), in batches of nearly equal size."""
    order = torch.from_numpy(np.random.default_rng((seed, epoch, 1)).permutation(images))
    return list(order.split([len(batch) for batch in np.array_split(range(images), math.ceil(images / batch_size))]))


def make_optimizer(model: nn.Module, setting: Setting) -> torch.optim.Optimizer:
    """AdamW (Loshchilov and Hutter, 2019). `train_one_epoch` sets the learning rate at each step."""
    return torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=setting.weight_decay, fused=True)


def learning_rate(setting: Setting, progress: float) -> float:
    """Linear warm-up, then half a cosine down to zero (Loshchilov and Hutter, SGDR, 2017); progress from 0 to 1."""
    if progress < setting.warmup:
        return setting.learning_rate * progress / setting.warmup
    return setting.learning_rate * 0.5 * (1 + math.cos(math.pi * (progress - setting.warmup) / (1 - setting.warmup)))


def train_one_epoch(
    model: nn.Module, train: EuroSATDataset, optimizer: torch.optim.Optimizer, setting: Setting, epoch: int
) -> dict[str, float]:
    """Train on every image once. Each process takes its share of each batch.

    Args:
        epoch: from 0.

    Returns:
        train_loss and train_accuracy over the augmented images, and the last learning_rate.
    """
    device, precision, processes = train.device, runtime.choose_precision(train.device), runtime.process_count()
    totals = torch.zeros(
        2, dtype=torch.float64, device=device
    )  # loss and correct images; reading them at each step would wait for the GPU
    batches = epoch_batches(len(train), setting.batch_size, train.seed, epoch)
    shares = [batch[runtime.process_rank() :: processes] for batch in batches]
    on_device = torch.cat(shares).to(device).split([len(share) for share in shares])  # one copy, before the GPU is busy
    title = f"{setting.name} {epoch + 1}/{setting.epochs}"
    bar = tqdm(on_device, title, unit="batch", leave=False, disable=None if runtime.is_main_process() else True)
    train.epoch = epoch
    model.train()
    for step, indices in enumerate(bar):
        progress = (epoch + (step + 0.5) / len(batches)) / setting.epochs
        for parameters in optimizer.param_groups:
            parameters["lr"] = learning_rate(setting, progress)
        images, labels = train[indices]  # (batch, bands, 64, 64), (batch,)
        with torch.autocast(device.type, precision, enabled=precision != torch.float32):
            logits = model(images)
            loss = F.cross_entropy(logits, labels, label_smoothing=setting.label_smoothing, reduction="sum")
        per_image = len(labels) // len(indices)  # labels: 1, or one for each pixel (studies/segment.py)
        # DistributedDataParallel averages gradients over processes; this makes them those of the mean over the batch.
        (loss * processes / (len(batches[step]) * per_image)).backward()
        optimizer.step()
        optimizer.zero_grad()
        totals += torch.stack([loss.detach().double(), (logits.argmax(1) == labels).sum().double()])
    loss_sum, correct = runtime.sum_over_processes(totals).tolist()
    rate = optimizer.param_groups[0]["lr"]
    count = len(train) * per_image
    return {"train_loss": loss_sum / count, "train_accuracy": correct / count, "learning_rate": rate}


def train_setting(
    setting: Setting, model: nn.Module, train: EuroSATDataset, val: EuroSATDataset, lists_sha256: str, folder: Path
) -> None:
    """Train one setting to its last epoch, from wherever its folder stands.

    Args:
        model: with its initial weights.
        lists_sha256: hash of the split lists.
        folder: of the setting, below outputs/.
    """
    processes, device = runtime.process_count(), train.device
    if min(map(len, epoch_batches(len(train), setting.batch_size, train.seed, 0))) < 2 * processes:
        told = f"{len(train)} training images in batches of at most {setting.batch_size}"
        raise UserError(
            f"setting {setting.name!r}: {told} give {processes} process(es) fewer than two at a time: too few"
        )
    identity = checkpoint.run_identity(setting, lists_sha256, train, val, model)
    checkpoint.archive_other_run(folder, identity)
    model = model.to(device, memory_format=torch.channels_last)
    optimizer = make_optimizer(model, setting)
    history, best, environments = checkpoint.load_checkpoint(folder, model, optimizer)
    if len(history) >= setting.epochs:
        runtime.announce(f"{setting.name}: finished before, best epoch {checkpoint.best_epoch(history)['epoch']}")
        if runtime.is_main_process() and not (folder / "val_curves.png").exists():
            draw_curves(folder, history, identity, train.task.title)
        return
    now = {**runtime.environment(device), "processes": processes}
    if environments and (changes := runtime.environment_changes(environments[-1], now)):
        runtime.announce(f"note: {setting.name} continues elsewhere ({changes}) and will differ by rounding")
    environments += [now] if environments[-1:] != [now] else []
    if runtime.is_main_process():
        record = {"identity": identity, **now, "environments": environments}
        write_json(folder / "setting.json", record)
    runtime.announce(f"{setting.name}: from epoch {len(history) + 1} of {setting.epochs} on {device}")
    trained = model
    if processes > 1:
        trained = nn.SyncBatchNorm.convert_sync_batchnorm(model) if device.type == "cuda" else model
        trained = DistributedDataParallel(trained)
    for epoch in range(len(history), setting.epochs):
        start = time.monotonic()
        seeds = np.random.SeedSequence((train.seed, epoch, runtime.process_rank()))
        runtime.seed_everything(int(seeds.generate_state(1)[0]))  # dropout, if the network has any
        row = {"epoch": epoch + 1, **train_one_epoch(trained, train, optimizer, setting, epoch)}
        for buffer in model.buffers() if processes > 1 else ():
            dist.broadcast(buffer, 0)  # batch norm on CPUs: all take the running statistics of the first process
        metrics = evaluate(model, val)
        row |= {f"val_{key}": metrics[key] for key in ("loss", "accuracy", "mean_tpr", "map")}
        row |= {f"val_tpr_{name}": metrics["tpr"][name] for name in CLASSES}
        row |= {f"val_ap_{name}": metrics["average_precision"][name] for name in CLASSES}
        row["seconds"] = round(time.monotonic() - start, 2)
        if not math.isfinite(row["train_loss"] + row["val_loss"]):
            told = f"the loss of {setting.name} is not a number in epoch {epoch + 1}; earlier epochs are kept"
            raise UserError(f"{told}; lower its learning_rate or weight_decay in config.py")
        history.append({key: row[key] for key in checkpoint.HISTORY_HEADER})
        is_best = checkpoint.best_epoch(history) is history[-1]
        if is_best:
            best = {key: tensor.clone() for key, tensor in model.state_dict().items()}
        if runtime.is_main_process():
            if epoch + 1 == setting.epochs:
                draw_curves(folder, history, identity, train.task.title)
            write_csv(folder / "history.csv", checkpoint.HISTORY_HEADER, [list(row.values()) for row in history])
            content = {"identity": identity, "environments": environments, "history": history, "best": best}
            content |= {"mean": train.statistics[0], "std": train.statistics[1]}
            content |= {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            checkpoint.save_checkpoint(folder, content)  # last: a run killed before repeats the epoch
        runtime.announce(
            f"{setting.name} epoch {epoch + 1}/{setting.epochs}: train loss {row['train_loss']:.3f}, val accuracy "
            f"{row['val_accuracy']:.2%}, mean TPR {row['val_mean_tpr']:.2%}, {row['seconds']:.1f} s"
            f"{' (best so far)' if is_best else ''}"
        )


def draw_curves(folder: Path, history: list[dict], identity: dict, title: str) -> None:
    """The graph of a setting: val_curves.png."""
    best, source = checkpoint.best_epoch(history)["epoch"], checkpoint.run_hash(identity)
    plots.val_curves(folder / "val_curves.png", folder.name, history, best, title, source)
