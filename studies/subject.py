"""What studies share: the final model under study, training for comparison, and study.json, which make_report.py reads."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from base.files import content_hash, load_tensors, save_tensors, sha256, write_json
from base.project import PROFILES, RGB, Task, config, display_path, pretrained_dir
from base.setting import Setting

import numpy as np
import torch

from augment import preprocess
from dataset import EuroSATDataset, Split, displayed_image, image_paths, read_image
from engine.checkpoint import read_checkpoint
from engine.final_model import (
    FinalModel,
    check_lists,
    initial_weights,
    load_model,
    load_weights,
    model_path,
    tasks_with_model,
)
from engine.metrics import accuracy_interval
from engine.results import BATCH_SIZE, Results, predict, read_results_of_model
from engine.runtime import choose_device, seed_everything
from engine.splits import read_splits, splits_hash
from engine.training import make_optimizer, train_one_epoch, train_setting
from models import Network, build_model

# studies.benchmark compares the default run with this; studies.search draws it beside its runs.
RECIPE = "recipe of the public solutions / default RGB run"


@dataclass(frozen=True)
class Subject:
    """A final model, its lists and its test results.

    Attributes:
        folder: of the study, outputs/<profile>/<task>/<study>/.
        final: the model is on the device.
        results: None if the test list of this model stays closed: predict_test.py was never run on it.
    """

    task: Task
    folder: Path
    final: FinalModel
    lists: dict[str, Split]
    results: Results | None
    device: torch.device

    @property
    def part(self) -> str:
        """The list to measure on: "test", or "val" while the test list stays closed."""
        return "test" if self.results else "val"

    def images(self, part: str) -> EuroSATDataset:
        """The images of a list as the model sees them."""
        statistics = self.final.mean, self.final.std
        split = self.lists[part]
        return EuroSATDataset(config.dataset_root, self.task, split, self.final.bands, statistics, device=self.device)

    def predict(self, part: str, embed: bool = False) -> torch.Tensor:
        """Logits (images, 10), or the input of the linear layer, (images, channels), over the model's views."""
        return predict(self.final.model, self.images(part), self.final.setting.views, embed)

    def pictures(self, files: list[str]) -> list[np.ndarray]:
        """Images as a person sees them, each (64, 64, 3) uint8."""
        paths = image_paths(config.dataset_root, self.task, files)
        return [displayed_image(read_image(path, self.task), self.task) for path in paths]

    def write(self, finding: str, tables: list[dict], figures: list[str], **values: object) -> None:
        """`write_study` of this model."""
        write_study(self.folder, f"{self.task.title}: ", finding, tables, figures, values, self.final.sha256)


def subjects(tasks: list[Task], study: str, tested: bool = True) -> Iterator[Subject]:
    """The final models of the tasks; those without test results, too, unless they must be `tested`.

    Raises:
        UserError: there is none, it has no test results, or the lists have changed.
    """
    device = choose_device()
    for task in tasks_with_model(tasks):
        final, lists = load_model(task, device), read_splits(task.splits, task)
        check_lists(final, task, lists)
        results = read_results_of_model(task) if tested or has_results(task) else None
        yield Subject(task, task.outputs / study, final, lists, results, device)


def has_results(task: Task) -> bool:
    """Whether predict_test.py was ever run; not that it was run on the present model."""
    return (task.outputs / "test_metrics.json").exists()


def results_of_profiles(tasks: list[Task]) -> dict[tuple[str, str], Results]:
    """The test results of the final models that have some, {(profile, task): results}; the present profile's come first.

    The profile "demo" is compared with no other one.
    """
    others = [name for name in PROFILES if name not in (config.profile, "demo")]
    profiles = ["demo"] if config.profile == "demo" else [config.profile, *others]
    every = [task.of_profile(profile) for profile in profiles for task in tasks]
    tested = (task for task in every if model_path(task).exists() and has_results(task))
    return {(task.profile, task.name): read_results_of_model(task) for task in tested}


def write_study(
    folder: Path,
    title: str,
    finding: str,
    tables: list[dict],
    figures: list[str],
    values: dict[str, object],
    model_sha256: str | None,
) -> None:
    """Print the finding and write study.json, from which make_report.py makes the appendix.

    Args:
        title: printed before the finding.
        finding: one paragraph; the result comes first.
        tables: each with "caption", "header" and "rows" of text.
        figures: names of PNGs in the folder.
        values: the figures as numbers.
        model_sha256: of the final model under study; None if there is none.
    """
    content = {"finding": finding, "tables": tables, "figures": figures, "values": values}
    write_json(folder / "study.json", content | {"model_sha256": model_sha256})
    print(f"{title}{finding}\nwrote {display_path(folder)}/study.json{''.join(f', {name}' for name in figures)}")


def start_training(
    setting: Setting,
    weights: dict[str, torch.Tensor] | None,
    task: Task,
    lists: dict[str, Split],
    seed: int,
    device: torch.device,
) -> tuple[Network, EuroSATDataset]:
    """A setting's network with these initial weights, as `build_model` takes them, and its training images."""
    how = {"augmentation": setting.augmentation, "seed": seed, "device": device}
    train = EuroSATDataset(config.dataset_root, task, lists["train"], setting.bands, **how)
    seed_everything(seed)
    return build_model(setting, weights), train


def train_run(
    setting: Setting, task: Task, lists: dict[str, Split], seed: int, folder: Path, device: torch.device
) -> dict:
    """Train a setting in the folder, or continue there. Returns the checkpoint, as `read_checkpoint` describes it."""
    weights = initial_weights(setting, pretrained_dir(), RGB, lists)
    model, train = start_training(setting, weights, task, lists, seed, device)
    val = EuroSATDataset(config.dataset_root, task, lists["val"], setting.bands, train.statistics, device=device)
    train_setting(setting, model, train, val, splits_hash(lists), folder)
    return read_checkpoint(folder)


def subset(split: Split, chosen: np.ndarray) -> Split:
    """The images for which `chosen`, (images,) bool, is true."""
    return Split([split.files[index] for index in np.flatnonzero(chosen)], split.labels[chosen])


def last_epoch_logits(
    setting: Setting,
    weights: dict[str, torch.Tensor] | None,
    task: Task,
    lists: dict[str, Split],
    seed: int,
    path: Path,
    device: torch.device,
) -> torch.Tensor:
    """Train on "train" of the lists to the last epoch and predict "test", (images, 10); or read `path` if it holds the same."""
    origin = setting.values(), seed, content_hash(weights or {}), lists["train"].files, lists["test"].files
    key = sha256(repr(origin).encode())
    if path.exists() and (former := load_tensors(path, "delete it and start again")).get("key") == key:
        return former["logits"]
    model, train = start_training(setting, weights, task, lists, seed, device)
    model = model.to(device, memory_format=torch.channels_last)
    optimizer = make_optimizer(model, setting)
    for epoch in range(setting.epochs):
        train_one_epoch(model, train, optimizer, setting, epoch)
    test = EuroSATDataset(config.dataset_root, task, lists["test"], setting.bands, train.statistics, device=device)
    logits = predict(model, test, setting.views)
    save_tensors(path, {"key": key, "logits": logits})
    accuracy = (logits.argmax(1).numpy() == lists["test"].labels).mean()
    print(f"{path.stem}: {accuracy:.2%} of {len(logits):,}", flush=True)
    return logits


def predict_with(setting: Setting, weights: dict[str, torch.Tensor], data: EuroSATDataset, views: int) -> torch.Tensor:
    """Logits (images, 10) of a setting's network with these weights."""
    return predict(load_weights(setting, weights).to(data.device, memory_format=torch.channels_last), data, views)


def predict_pixels(
    model: Network, pixels: np.ndarray, mean: torch.Tensor, std: torch.Tensor, views: int
) -> torch.Tensor:
    """Logits (images, 10) of pixels that lie in no file: (images, 64, 64, bands), as a file would hold them."""
    device = next(model.parameters()).device
    mean, std = mean.to(device), std.to(device)
    model.eval()
    with torch.inference_mode():
        batches = (batch.to(device) for batch in torch.from_numpy(pixels).split(BATCH_SIZE))
        return torch.cat([model(preprocess(batch, mean, std, "none", None), views).cpu() for batch in batches])


def band_features(pixels: np.ndarray) -> np.ndarray:
    """Means, then standard deviations, of the bands of each image: (images, 64, 64, bands) to (images, 2 · bands)."""
    flat = pixels.reshape(len(pixels), -1, pixels.shape[-1]).astype(np.float32)
    return np.concatenate([flat.mean(1), flat.std(1)], axis=1)


def setting_summaries(settings: list[Setting]) -> list[str]:
    """For each setting, what decides how long it trains."""
    return [
        f"{setting.name}: {setting.epochs} epochs, {setting.backbone} at {setting.image_size} px"
        for setting in settings
    ]


def interval_text(accuracy: float, images: int) -> str:
    """The 95 % interval of an accuracy in percent, Wilson's: "97.1 to 98.4"."""
    return " to ".join(map(percent, accuracy_interval(accuracy, images)))


def percent(value: float | None) -> str:
    return "–" if value is None or np.isnan(value) else f"{100 * value:.1f}"
