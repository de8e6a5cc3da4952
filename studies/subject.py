"""What a study looks at, and the one form in which it leaves what it found: study.json, which make_report.py reads."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from dataset import IMAGE_SETS, EuroSATDataset, Split, displayed, image_paths, read_image
from engine.evaluation import (
    FinalModel,
    Results,
    check_lists,
    in_order,
    load_model,
    model_path,
    predict,
    read_results_of_model,
    with_model,
)
from engine.metrics import accuracy_interval
from engine.runtime import choose_device
from engine.splits import read_splits
from project import PROFILES, cache_dir, config, outputs_dir, shown, splits_dir, write_json
from setting import Setting

# What studies.benchmark compares the default run with, and studies.search draws beside its runs.
RECIPE = "recipe of the public solutions / default RGB run"


@dataclass(frozen=True)
class Subject:
    """A final model, its lists and its test results.

    Attributes:
        folder: of the study, outputs/<profile>/<task>/<study>/.
        final: the model, on the device, and what its file says of it.
    """

    task: str
    folder: Path
    final: FinalModel
    lists: dict[str, Split]
    results: Results
    device: torch.device

    @property
    def title(self) -> str:
        return IMAGE_SETS[self.task].name

    def images(self, part: str, augmentation: str = "none") -> EuroSATDataset:
        """A list's images as the model sees them."""
        return EuroSATDataset(
            config.dataset_root,
            self.task,
            self.lists[part],
            self.final.bands,
            (self.final.mean, self.final.std),
            augmentation,
            config.seed,
            cache=cache_dir(),
            device=self.device,
        )

    def predict(self, part: str, embed: bool = False) -> torch.Tensor:
        """Logits (images, 10), or what the linear layer sees, (images, channels), with the views of the model."""
        return predict(self.final.model, in_order(self.images(part)), self.final.setting.views, embed)[0]

    def pictures(self, files: list[str]) -> list[np.ndarray]:
        """Images as a person sees them, each (64, 64, 3) uint8."""
        paths = image_paths(config.dataset_root, self.task, files)
        return [displayed(read_image(path, self.task), self.task) for path in paths]

    def write(self, finding: str, tables: list[dict], figures: list[str], **values: object) -> None:
        """`write_study` of this model."""
        write_study(self.folder, f"{self.title}: ", finding, tables, figures, values, self.final.sha256)


def write_study(
    folder: Path,
    title: str,
    finding: str,
    tables: list[dict],
    figures: list[str],
    values: dict[str, object],
    model_sha256: str | None,
) -> None:
    """Leave study.json: what was found, as the appendix shows it, and of which final model (None: of none).

    Args:
        title: ahead of the finding on the screen.
        finding: one paragraph, the answer first.
        tables: each with "caption", "header" and "rows" of text.
        figures: names of PNGs in the folder.
        values: the figures as numbers, for who reads the file.
    """
    content = {"finding": finding, "tables": tables, "figures": figures, "values": values}
    write_json(folder / "study.json", content | {"model_sha256": model_sha256})
    print(f"{title}{finding}\nwrote {shown(folder)}/study.json{''.join(f', {name}' for name in figures)}")


def subjects(tasks: tuple[str, ...], study: str) -> Iterator[Subject]:
    """Of each task that has a final model.

    Raises:
        UserError: there is none, or no test results of it, or the lists are others.
    """
    device = choose_device()
    for task, folder in with_model({task: outputs_dir(task) for task in tasks}).items():
        final, lists = load_model(folder, task, device), read_splits(splits_dir(task), task)
        check_lists(final, folder, task, lists)
        yield Subject(task, folder / study, final, lists, read_results_of_model(folder, task), device)


def results_of_profiles(tasks: tuple[str, ...]) -> dict[tuple[str, str], Results]:
    """{(profile, task): test results} of every final model below outputs/, the present profile's first.

    The sample's have nothing to do with those of the other profiles.
    """
    profiles = [config.profile, *(name for name in PROFILES if name not in (config.profile, "demo"))]
    if config.profile == "demo":
        profiles = ["demo"]
    folders = {(p, task): config.project_root / "outputs" / p / task for p in profiles for task in tasks}
    return {key: read_results_of_model(own, key[1]) for key, own in folders.items() if model_path(own).exists()}


def band_features(pixels: np.ndarray) -> np.ndarray:
    """Means, then standard deviations, of the bands of each image: (images, 2 · bands) of (images, 64, 64, bands)."""
    flat = pixels.reshape(len(pixels), -1, pixels.shape[-1]).astype(np.float32)
    return np.concatenate([flat.mean(1), flat.std(1)], axis=1)


def summary(settings: list[Setting]) -> list[str]:
    """What decides how long they train."""
    return [f"{own.name}: {own.epochs} epochs, {own.backbone} at {own.image_size} px" for own in settings]


def span(accuracy: float, images: int) -> str:
    """Its 95 % interval in percent, Wilson's: "97.1 to 98.4"."""
    return " to ".join(map(percent, accuracy_interval(accuracy, images)))


def percent(value: float | None) -> str:
    return "–" if value is None or np.isnan(value) else f"{100 * value:.1f}"
