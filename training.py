"""The loop behind train_rgb.py and train_ms.py: fine-tune every setting, keep the best by val.

One process or many: under `torchrun` every process takes its share of each batch, and only the first one writes.

A run that ends early, however it ends, continues when the same command is given again and reaches the same model as an
uninterrupted run, bit for bit on the same machine. Three things make that so: random numbers are functions of (seed,
epoch, batch or image), so there is no random state to restore; the learning rate is a function of the step; and last.pt
holds everything else. A setting's folder belongs to one identity (setting, seed, lists, pixels, initial weights): when
that changes, the folder is put aside and the setting trained afresh.
"""

import contextlib
import fcntl
import json
import math
import os
import shlex
import signal
import socket
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import plots
from augment import AUGMENTATIONS, network_input, random_numbers
from dataset import CLASSES, IMAGE_SETS, band_indices, band_statistics, load_images
from engine.splits import list_text, read_splits, splits_hash
from evaluation import batch_reader, environment, measure, model_path, predict, prepare, save_tensors, setting_values
from models import FUSIONS, build_network, fetch_weights, known_backbones, load_tensors, weights_file
from project import Setting, UserError, config, outputs_dir, sha256, shown, write_json, write_text

CHECKPOINT_SECONDS = 120  # within an epoch, about this much work is lost at most
AGREE_EVERY = 16  # batches on GPUs after which several processes ask each other whether to save or to stop
HISTORY_HEADER = [
    *("epoch", "train_loss", "train_accuracy", "val_loss", "val_accuracy", "val_mean_tpr"),
    *(f"val_tpr_{name}" for name in CLASSES),
    *("learning_rate", "seconds"),
]


def train(task: str) -> None:
    """Train all settings of a task that are not finished, then write final_model.pt and selection.csv.

    Raises:
        UserError: a wrong setting, missing lists or weights, another training at work here, or a loss that is not a
            number.
    """
    settings = config.settings.get(config.profile, {}).get(task)
    if not settings:
        raise UserError(f"config.py has no SETTINGS[{config.profile!r}][{task!r}]: nothing to train for this profile")
    check_settings(task, settings)
    with processes() as group, place_taken(outputs_dir(task), group), stop_signals() as stop:
        for setting in settings:
            train_setting(task, setting, group, stop)
        if group.rank == 0:
            keep_best(task, settings)


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
        if setting.weights is not None:
            weights_file(setting.backbone, setting.weights)


# Processes, the place, signals -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Group:
    """The processes that train together, and this one's rank among them and device."""

    rank: int
    size: int
    device: torch.device


@contextlib.contextmanager
def processes():
    """The process group that torchrun started, or this process alone."""
    size = int(os.environ.get("WORLD_SIZE", 1))
    if size == 1:
        yield Group(0, 1, prepare())
        return
    device = prepare(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield Group(dist.get_rank(), size, device)
    finally:
        dist.destroy_process_group()


@contextlib.contextmanager
def place_taken(folder: Path, group: Group):
    """Hold a lock on the folder; the system releases it however this process ends.

    Raises:
        UserError: another training holds it: says which.
    """
    if group.rank > 0:
        yield
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / "train.lock", "a+")
    except OSError as error:
        raise UserError(
            f"cannot write below {shown(folder)}: {error.strerror}; check PROJECT_ROOT in config.py"
        ) from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            raise UserError(
                f"{shown(folder)} is being trained by {lock.read().strip()}; wait for it or stop it"
            ) from None
        except OSError as error:  # not every file system of a cluster has locks
            print(
                f"note: {shown(folder)} cannot be locked ({error.strerror}): do not start this training twice at once"
            )
        lock.truncate(0)
        lock.write(f"process {os.getpid()} on {socket.gethostname()} since {time.strftime('%Y-%m-%d %H:%M:%S')}\n")
        lock.flush()
        # Nobody else writes these now: what is there half-written is a killed run's.
        for pattern in ("*/*.partial", "final_model.pt.*.partial", "selection.csv.*.partial"):
            for partial in folder.glob(pattern):
                partial.unlink()
        yield


class Stop:
    """Which signal asked for an end, if any (0: none)."""

    signal = 0


@contextlib.contextmanager
def stop_signals():
    """Turn SIGTERM and Ctrl-C into a wish that the loop grants after the batch at hand."""
    stop = Stop()

    def wish(number: int, frame: object) -> None:
        stop.signal = number

    former = {number: signal.signal(number, wish) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stop
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


# One setting -----------------------------------------------------------------------------------------------------


@dataclass
class Progress:
    """Where a training stands, besides network and optimizer: what last.pt holds of it.

    Attributes:
        epoch, batch: the next ones to do.
        loss, correct: sums over the images of the epoch so far.
        seconds: spent in this epoch so far.
        history: one row per finished epoch, keys as in HISTORY_HEADER.
        best: epoch, val_accuracy and val_mean_tpr of best.pt.
    """

    epoch: int = 0
    batch: int = 0
    loss: float = 0.0
    correct: int = 0
    seconds: float = 0.0
    history: list[dict] = field(default_factory=list)
    best: dict | None = None


def train_setting(task: str, setting: Setting, group: Group, stop: Stop) -> None:
    """Train one setting to its last epoch, from wherever it stands."""
    folder = outputs_dir(task) / setting.name
    data = load_data(task, setting, group)
    check_batches(setting, len(data.train_labels), group)
    torch.manual_seed(config.seed)
    network = build_network(setting, setting.weights)
    identity = identify(task, setting, data, network)
    last = claim_folder(folder, identity, group)
    network = network.to(group.device, memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(network.parameters(), lr=0.0, weight_decay=setting.weight_decay, fused=True)
    progress, precision = Progress(), choose_precision(group.device)
    if last:
        progress, precision = restore(folder / "last.pt", last, network, optimizer)
    if progress.epoch == setting.epochs:
        announce(group, f"{setting.name}: finished before, best epoch {progress.best['epoch']}")
        return
    if group.rank == 0:
        about = {"identity": identity, "precision": precision, "processes": group.size, **environment(group.device)}
        write_json(folder / "setting.json", about)
    run = Run(folder, setting, data, group, network, optimizer, progress, precision, identity, stop)
    announce(
        group, f"{setting.name}: from epoch {progress.epoch + 1} of {setting.epochs} on {group.device}, {precision}"
    )
    while progress.epoch < setting.epochs:
        run.train_epoch()
        run.finish_epoch()


def check_batches(setting: Setting, images: int, group: Group) -> None:
    """Batch norm needs two images in each process at each step.

    Raises:
        UserError: there are too few.
    """
    smallest = images // math.ceil(images / setting.batch_size)
    if smallest < 2 * group.size:
        raise UserError(
            f"the setting {setting.name!r}: {images} training images in batches of at most {setting.batch_size} leave "
            f"{group.size} process(es) fewer than two at a step; use a longer list, a larger batch_size or fewer processes"
        )


@dataclass(frozen=True)
class Data:
    """Pixels (images, 64, 64, bands) and labels of train and val, their hashes, the training list's statistics."""

    train_pixels: np.ndarray
    train_labels: np.ndarray
    val_pixels: np.ndarray
    val_labels: np.ndarray
    mean: torch.Tensor
    std: torch.Tensor
    hashes: dict[str, str]


def load_data(task: str, setting: Setting, group: Group) -> Data:
    """Decode, or find in the cache, what the setting trains on. The first process decodes, the others wait for it."""
    splits = read_splits(task)
    if group.rank > 0:
        dist.barrier()
    images = {part: load_images(task, splits[part].files, setting.bands) for part in ("train", "val")}
    if group.size > 1 and group.rank == 0:
        dist.barrier()
    mean, std = (torch.from_numpy(values).to(group.device) for values in band_statistics(images["train"].pixels))
    return Data(
        images["train"].pixels,
        splits["train"].labels,
        images["val"].pixels,
        splits["val"].labels,
        mean,
        std,
        {
            "splits_sha256": splits_hash(splits),
            "train_images_sha256": images["train"].sha256,
            "val_images_sha256": images["val"].sha256,
        },
    )


def identify(task: str, setting: Setting, data: Data, network: nn.Module) -> dict:
    """All that decides what a training leads to, but for the machine."""
    initial = sha256(*(tensor.numpy().tobytes() for tensor in network.state_dict().values()))
    return {
        "task": task,
        "seed": config.seed,
        **setting_values(setting),
        **data.hashes,
        "initial_network_sha256": initial,
    }


def run_hash(identity: dict) -> str:
    """Tells runs apart in what is left of them: the curves, selection.csv, the final model."""
    return sha256(json.dumps(identity, sort_keys=True).encode())[:16]


def claim_folder(folder: Path, identity: dict, group: Group) -> dict | None:
    """The checkpoint to continue from, or None; what another identity left in the folder is put aside."""
    last = None
    if (folder / "last.pt").exists():
        last = load_tensors(folder / "last.pt")
        former = last.get("identity")
    elif (folder / "setting.json").exists():
        try:
            former = json.loads((folder / "setting.json").read_text())["identity"]
        except (ValueError, KeyError, TypeError):
            former = None
        if former == identity:
            announce(group, f"{folder.name}: no checkpoint is left here: trained from the start")
    else:
        former = identity
    if group.size > 1:
        dist.barrier()  # everyone has read before the first one moves anything
    if former == identity:
        return last
    former = former if isinstance(former, dict) else {}
    changed = [key for key in identity if former.get(key) != identity[key]]
    aside = folder.with_name(f"{folder.name}-before-{sha256(json.dumps(former).encode())[:8]}")
    announce(group, f"{folder.name}: {', '.join(changed)} changed; what was trained before is now in {shown(aside)}")
    if group.rank == 0:
        while aside.exists():
            aside = aside.with_name(aside.name + "-again")
        folder.rename(aside)
    return None


def restore(path: Path, last: dict, network: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[Progress, str]:
    """Put network and optimizer where the checkpoint left them; return its progress and precision.

    Raises:
        UserError: it holds something else than a checkpoint of this network.
    """
    try:
        network.load_state_dict(last["network"])
        optimizer.load_state_dict(last["optimizer"])
        progress, precision = Progress(**last["progress"]), last["precision"]
        history, best = progress.history, progress.best
        counts = (progress.epoch, progress.batch, progress.correct)
        numbers = [progress.loss, progress.seconds]
        numbers += [value for row in history for key, value in row.items() if value is not None or "tpr_" not in key]
        if (
            not all(type(count) is int and count >= 0 for count in counts)
            or not all(type(number) in (int, float) for number in numbers)
            or not all(list(row) == HISTORY_HEADER for row in history)
            or [row["epoch"] for row in history] != list(range(1, progress.epoch + 1))
            or best not in ([best_of(row) for row in history] or [None])
            or precision not in ("float32", "bfloat16")
            or not isinstance(last["versions"], dict)
        ):
            raise ValueError("its parts disagree")
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{shown(path)} is no checkpoint of this network ({reason}); bring it back, or delete it to train "
            f"{path.parent.name} afresh"
        ) from error
    return progress, precision


def choose_precision(device: torch.device) -> str:
    """bf16 autocast on GPUs, float32 on a CPU."""
    return "bfloat16" if device.type == "cuda" else "float32"


def announce(group: Group, text: str) -> None:
    if group.rank == 0:
        print(text, flush=True)


def learning_rate(setting: Setting, progress: float) -> float:
    """Linear warm-up, then a half cosine to zero (Loshchilov and Hutter, SGDR, 2017), at a progress from 0 to 1."""
    if progress < setting.warmup:
        return setting.learning_rate * progress / setting.warmup
    return setting.learning_rate * 0.5 * (1 + math.cos(math.pi * (progress - setting.warmup) / (1 - setting.warmup)))


@dataclass
class Run:
    """One setting in training. `train_epoch` moves the network, `finish_epoch` measures, records and keeps."""

    folder: Path
    setting: Setting
    data: Data
    group: Group
    network: nn.Module
    optimizer: torch.optim.Optimizer
    progress: Progress
    precision: str
    identity: dict
    stop: Stop

    def __post_init__(self) -> None:
        self.trained = self.network
        if self.group.size > 1:
            if self.group.device.type == "cuda":
                self.trained = nn.SyncBatchNorm.convert_sync_batchnorm(self.network)
            self.trained = DistributedDataParallel(self.trained)
        self.read = batch_reader(self.data.train_pixels, self.group.device)
        self.labels = torch.from_numpy(self.data.train_labels).to(self.group.device)
        self.saved_at = time.monotonic()

    def batches(self) -> list[np.ndarray]:
        """This epoch's order, cut into nearly equal batches: no last one with a single image."""
        order = np.random.default_rng((config.seed, self.progress.epoch, 1)).permutation(len(self.labels))
        return np.array_split(order, math.ceil(len(order) / self.setting.batch_size))

    def train_epoch(self) -> None:
        """Every image once, from the batch at hand to the last."""
        progress, setting, device = self.progress, self.setting, self.group.device
        batches = self.batches()
        random = torch.from_numpy(random_numbers(config.seed, progress.epoch, len(self.labels))).to(device)
        loss_sum = torch.zeros((), dtype=torch.float64, device=device)  # on the device: reading it would wait for it
        correct = torch.zeros((), dtype=torch.int64, device=device)
        self.network.train()
        self.started = time.monotonic()
        bar = tqdm(
            batches,
            initial=progress.batch,
            desc=f"{setting.name} {progress.epoch + 1}/{setting.epochs}",
            unit="batch",
            leave=False,
            disable=True if self.group.rank else None,
        )
        # All at once, before the GPU has anything to do: each copy to it waits until it has done all it has.
        rest = batches[progress.batch :]
        shares = [torch.from_numpy(batch[self.group.rank :: self.group.size]).to(device) for batch in rest]
        for batch, share in zip(rest, shares, strict=True):
            step = progress.epoch * len(batches) + progress.batch
            for parameters in self.optimizer.param_groups:
                parameters["lr"] = learning_rate(setting, (step + 0.5) / (setting.epochs * len(batches)))
            # Reseeded for each batch (dropout, stochastic depth): nothing to restore after an interruption.
            torch.manual_seed(_batch_seed(progress.epoch, progress.batch, self.group.rank))
            images = network_input(self.read(share), self.data.mean, self.data.std, setting.augmentation, random[share])
            labels = self.labels[share]
            with torch.autocast(device.type, torch.bfloat16, enabled=self.precision == "bfloat16"):
                logits = self.trained(images)
                loss = F.cross_entropy(logits, labels, label_smoothing=setting.label_smoothing, reduction="sum")
            # DistributedDataParallel averages over processes; this makes it the mean over the whole batch.
            (loss * self.group.size / len(batch)).backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            loss_sum += loss.detach()
            correct += (logits.argmax(1) == labels).sum()
            progress.batch += 1
            bar.update()
            if progress.batch < len(batches):
                stopping, save_due = self._agreed_wishes()
                if stopping or save_due:
                    self._take_sums(loss_sum, correct)
                    self.save()
                if stopping:
                    self._leave(stopping)
        bar.close()
        self._take_sums(loss_sum, correct)

    def finish_epoch(self) -> None:
        """Validate, then write the history, best.pt where it is better, its graph at the end, and last, last.pt."""
        progress, setting, folder = self.progress, self.setting, self.folder
        val = measure(self.val_logits(), self.data.val_labels)
        images = len(self.labels)
        self._take_time()
        progress.epoch += 1
        row = {
            "epoch": progress.epoch,
            "train_loss": progress.loss / images,
            "train_accuracy": progress.correct / images,
            "val_loss": val["loss"],
            "val_accuracy": val["accuracy"],
            "val_mean_tpr": val["mean_tpr"],
            **{f"val_tpr_{name}": val["tpr"][name] for name in CLASSES},
            "learning_rate": self.optimizer.param_groups[0]["lr"],
            "seconds": round(progress.seconds, 2),
        }
        if not math.isfinite(row["train_loss"] + row["val_loss"]):
            kept = f"the best epoch so far, {progress.best['epoch']}, is kept" if progress.best else "no epoch is kept"
            raise UserError(
                f"the loss of {setting.name} is not a number in epoch {progress.epoch}; {kept} in {shown(folder)}; "
                "lower its learning_rate in config.py"
            )
        progress.history.append(row)
        progress.batch, progress.loss, progress.correct, progress.seconds = 0, 0.0, 0, 0.0
        better = not progress.best or _rank(row) > _rank(progress.best)
        if better:
            progress.best = best_of(row)
        announce(
            self.group,
            f"{setting.name} epoch {row['epoch']}/{setting.epochs}: train loss {row['train_loss']:.3f}, "
            f"val accuracy {row['val_accuracy']:.2%}, mean TPR {row['val_mean_tpr']:.2%}, {row['seconds']:.1f} s"
            + (" (best so far)" if better else ""),
        )
        if self.group.rank == 0:
            if better:
                # Before last.pt: whoever is killed between the two repeats this epoch and writes the same again.
                save_tensors(folder / "best.pt", {"epoch": row["epoch"], "network": self.network.state_dict()})
            write_history(folder / "history.csv", progress.history)
            if progress.epoch == setting.epochs:  # not before: drawing takes as long as 80 images
                path, task = folder / "val_curves.png", self.identity["task"]
                plots.val_curves(path, setting.name, progress.history, task, source=run_hash(self.identity))
        self.save()
        stopping, _ = self._agreed_wishes()
        if stopping:
            self._leave(stopping)

    def val_logits(self) -> torch.Tensor:
        """Val logits (images, 10); every process predicts its share."""
        group, data = self.group, self.data
        if group.size == 1:
            return predict(self.network, data.val_pixels, data.mean, data.std)
        for buffer in self.network.buffers():  # running statistics, where batch norm is not synchronised
            dist.broadcast(buffer, 0)
        shares = [np.arange(rank, len(data.val_labels), group.size) for rank in range(group.size)]
        gathered: list = [None] * group.size
        dist.all_gather_object(
            gathered, predict(self.network, data.val_pixels, data.mean, data.std, shares[group.rank])
        )
        logits = torch.empty(len(data.val_labels), len(CLASSES))
        for share, part in zip(shares, gathered, strict=True):
            logits[share] = part
        return logits

    def save(self) -> None:
        """Write last.pt; the first process does."""
        self.saved_at = time.monotonic()
        if self.group.rank > 0:
            return
        content = {
            "identity": self.identity,
            "precision": self.precision,
            "versions": versions(),
            "progress": vars(self.progress),
            "network": self.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }
        save_tensors(self.folder / "last.pt", content)

    def _take_sums(self, loss_sum: torch.Tensor, correct: torch.Tensor) -> None:
        """Move this epoch's sums, over all processes, into the progress.

        Sums of float32 losses in float64 are exact, so it does not matter how an interruption groups them.
        """
        if self.group.size > 1:
            dist.all_reduce(loss_sum)
            dist.all_reduce(correct)
        self.progress.loss += loss_sum.item()
        self.progress.correct += correct.item()
        loss_sum.zero_()
        correct.zero_()
        self._take_time()

    def _take_time(self) -> None:
        now = time.monotonic()
        self.progress.seconds += now - self.started
        self.started = now

    def _agreed_wishes(self) -> tuple[int, int]:
        """The signal that asks for an end, and whether a checkpoint is due: the same answer in all processes.

        One that decided alone would leave the others waiting for it. On GPUs, where to ask means to wait for the GPU, they
        do so every AGREE_EVERY batches.
        """
        save_due = int(time.monotonic() - self.saved_at > CHECKPOINT_SECONDS)
        if self.group.size == 1:
            return self.stop.signal, save_due
        if self.group.device.type == "cuda" and self.progress.batch % AGREE_EVERY:
            return 0, 0
        wishes = torch.tensor([self.stop.signal, save_due], device=self.group.device)
        dist.all_reduce(wishes, dist.ReduceOp.MAX)
        return wishes[0].item(), wishes[1].item()

    def _leave(self, number: int) -> None:
        launcher = f"torchrun --nproc-per-node {os.environ['LOCAL_WORLD_SIZE']}" if self.group.size > 1 else "python"
        environment = [f"{key}={shlex.quote(value)}" for key, value in os.environ.items() if key.startswith("EUROSAT_")]
        command = " ".join([*sorted(environment), launcher, Path(sys.argv[0]).name])
        announce(self.group, f"stopped by {signal.Signals(number).name}; saved. To continue: {command}")
        raise SystemExit(128 + number)


def _batch_seed(*parts: int) -> int:
    return int(np.random.SeedSequence((config.seed, *parts)).generate_state(1)[0])


def best_of(row: dict) -> dict:
    """What is kept in mind of the best row of a history."""
    return {key: row[key] for key in ("epoch", "val_accuracy", "val_mean_tpr")}


def versions() -> dict[str, str]:
    return {key: str(value) for key, value in environment(torch.device("cpu")).items() if key.startswith("torch")}


def _rank(row: dict) -> tuple[float, float]:
    """What the best epoch is the highest in."""
    return row["val_accuracy"], row["val_mean_tpr"]


def write_history(path: Path, history: list[dict]) -> None:
    write_text(path, list_text(HISTORY_HEADER, [[row[key] for key in HISTORY_HEADER] for row in history]))


# The best of all settings ----------------------------------------------------------------------------------------


def initial_weights_of(setting: Setting) -> dict[str, str] | None:
    """Where the initial weights came from, and the SHA-256 of their file; None for random ones."""
    if setting.weights is None:
        return None
    file = weights_file(setting.backbone, setting.weights)
    return {"origin": file.origin, "sha256": sha256(fetch_weights(file).read_bytes())}


def keep_best(task: str, settings: list[Setting]) -> None:
    """Write the best epoch of the best setting, by val, as final_model.pt, and how all did as selection.csv."""
    runs = [(setting, load_tensors(outputs_dir(task) / setting.name / "last.pt")) for setting in settings]
    setting, last = max(runs, key=lambda run: _rank(run[1]["progress"]["best"]))  # the first of equals
    progress = last["progress"]
    folder = outputs_dir(task) / setting.name
    best = load_tensors(folder / "best.pt")
    if best.get("epoch") != progress["best"]["epoch"] or "network" not in best:
        raise UserError(
            f"{shown(folder)}: best.pt and last.pt are of different runs; delete the folder and train again"
        )
    row = progress["history"][best["epoch"] - 1]
    splits = read_splits(task)
    pixels = load_images(task, splits["train"].files, setting.bands).pixels
    mean, std = (torch.from_numpy(values) for values in band_statistics(pixels))
    content = {
        "task": task,
        "run": run_hash(last["identity"]),
        "runs": {other.name: run_hash(checkpoint["identity"]) for other, checkpoint in runs},
        "setting": setting_values(setting),
        "initial_weights": initial_weights_of(setting),
        "classes": list(CLASSES),
        "bands": list(setting.bands),
        "mean": mean,
        "std": std,
        "network": best["network"],
        "epoch": best["epoch"],
        "val": {key: value for key, value in row.items() if key.startswith("val_")},
        "seed": last["identity"]["seed"],
        "splits_sha256": last["identity"]["splits_sha256"],
        "images": {part: len(split.files) for part, split in splits.items()},
        "versions": last["versions"],
    }
    save_tensors(model_path(task), content, keep_former=True)
    header = [
        "setting",
        "selected",
        "best_epoch",
        "val_accuracy",
        "val_mean_tpr",
        "augmentation",
        "fusion",
        "bands",
        "seconds",
        "run",
    ]
    rows = []
    for other, checkpoint in runs:
        state = checkpoint["progress"]
        rows.append(
            [
                *(other.name, "yes" if other is setting else "no"),
                *(state["best"][key] for key in ("epoch", "val_accuracy", "val_mean_tpr")),
                *(other.augmentation, other.fusion, " ".join(other.bands)),
                round(sum(epoch["seconds"] for epoch in state["history"]), 1),
                run_hash(checkpoint["identity"]),
            ]
        )
    write_text(outputs_dir(task) / "selection.csv", list_text(header, rows), keep_former=True)
    print(
        f"best by val: {setting.name}, epoch {best['epoch']}, accuracy {row['val_accuracy']:.2%}, "
        f"mean TPR {row['val_mean_tpr']:.2%} ({IMAGE_SETS[task].name})"
    )
    print(f"wrote {shown(model_path(task))}, selection.csv beside it, and a folder for each setting")
    print(f"next: python predict_test.py {task}")
