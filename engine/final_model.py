"""The final model of a task: chosen by val, written, read, loaded. Its file holds all that later scripts need to know."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from base.errors import UserError
from base.files import content_hash, load_tensors, reading, save_tensors, sha256, write_csv
from base.project import CLASSES, Task, display_path
from base.setting import Setting

import torch
from pydantic import BaseModel

from dataset import Split
from engine.checkpoint import best_epoch, read_checkpoint, run_hash
from engine.splits import read_splits, splits_hash
from engine.weights import RGB_MODEL, initial_weights_record, load_initial_weights
from models import Network, build_model, torchvision_name

SELECTION_HEADER = [
    *("setting", "selected", "best_epoch", "val_accuracy", "val_mean_tpr", "augmentation", "fusion", "bands", "run"),
]


class Metadata(BaseModel):
    """The plain values in final_model.pt that scripts rely on."""

    task: str
    run: str
    runs: dict[str, str]
    selection: list[dict[str, str | int | float]] = []  # not in models of earlier versions
    setting: dict[str, Any]
    initial_weights: dict[str, str] | None
    classes: list[str]
    bands: list[str]
    epoch: int
    val: dict[str, float | None]
    seed: int
    splits_sha256: str
    images: dict[str, int]
    versions: dict[str, str]


@dataclass(frozen=True)
class FinalModel:
    """A model and its metadata."""

    model: Network
    mean: torch.Tensor  # (bands,), as std
    std: torch.Tensor
    setting: Setting
    metadata: dict  # the rest of the file: task, seed, epoch and val metrics that chose it, splits_sha256, versions, …
    file: str  # as messages name it
    sha256: str  # of the file

    @property
    def bands(self) -> tuple[str, ...]:
        return self.setting.bands


def model_path(task: Task) -> Path:
    return task.outputs / "final_model.pt"


def model_hash(task: Task) -> str:
    return sha256(model_path(task).read_bytes())


def tasks_with_model(tasks: list[Task]) -> list[Task]:
    """The tasks that have a final model; a UserError says that none has one."""
    found = [task for task in tasks if model_path(task).exists()]
    if not found:
        paths = " or ".join(display_path(model_path(task)) for task in tasks)
        raise UserError(f"there is no model {paths}; run: {' or '.join(f'python train_{t.name}.py' for t in tasks)}")
    return found


def read_model(task: Task) -> tuple[dict, Network]:
    """The content of final_model.pt and the network in it; a UserError says that it is missing, damaged, or of the other task."""
    tasks_with_model([task])
    path, remedy = model_path(task), f"bring it back, or run: python train_{task.name}.py"
    content = load_tensors(path, remedy)
    with reading(path, remedy):
        if "sha256" in content and content.pop("sha256") != content_hash(content):  # not in models of earlier versions
            raise ValueError("it was edited")
        return content, checked_network(content, task)


def checked_network(content: dict, task: Task) -> Network:
    """The network of a final model; an error unless it is one of the task, whose numbers can be used."""
    Metadata.model_validate(content, strict=True)
    if any(set(row) != set(SELECTION_HEADER) for row in content.get("selection", ())):
        raise ValueError("its table of settings is damaged")
    if content["task"] != task.name:
        raise ValueError(f"it is a model of the task {content['task']}")
    if content["classes"] != list(CLASSES):
        raise ValueError(f"it knows other classes: {content['classes']}")
    setting = Setting.from_values(content["setting"])
    mean, std, bands = content["mean"], content["std"], len(setting.bands)
    if content["bands"] != list(setting.bands) or not mean.shape == std.shape == (bands,) or not (std > 0).all():
        raise ValueError("its bands and its normalisation disagree")
    if mean.dtype != torch.float32 or std.dtype != torch.float32 or not mean.isfinite().all():
        raise ValueError("its normalisation is not of finite float32 numbers")
    return load_weights(setting, content["model"])


def load_model(task: Task, device: torch.device) -> FinalModel:
    """Load final_model.pt. Nothing about the model is taken from config.py."""
    content, model = read_model(task)
    del content["model"]
    setting, mean, std = Setting.from_values(content.pop("setting")), content.pop("mean"), content.pop("std")
    model = model.to(device, memory_format=torch.channels_last)
    return FinalModel(model, mean, std, setting, content, display_path(model_path(task)), model_hash(task))


def load_weights(setting: Setting, weights: dict[str, torch.Tensor]) -> Network:
    """The network of a setting with these weights; an error if they are of another network or not usable."""
    model = build_model(setting, weights=None)
    for name, expected in model.state_dict().items():
        tensor = weights[name]
        if tensor.dtype != expected.dtype or tensor.shape != expected.shape or not tensor.isfinite().all():
            raise ValueError(f"{name} is not finite {expected.dtype} of shape {tuple(expected.shape)}")
        if name.endswith("running_var") and (tensor < 0).any():
            raise ValueError(f"{name} is negative")
    model.load_state_dict(weights)
    return model


def check_lists(final: FinalModel, task: Task, lists: dict[str, Split]) -> None:
    """Raise a UserError unless a final model was trained with these lists."""
    if final.metadata["splits_sha256"] != splits_hash(lists):
        told = f"{display_path(model_path(task))} was trained with other lists and may have seen these test images"
        raise UserError(f"{told}; bring the lists back, or run: python train_{task.name}.py")


def initial_weights(setting: Setting, pretrained: Path, rgb: Task, lists: dict[str, Split]):
    """`load_initial_weights`, or the backbone of the final model of `rgb` for a network trained with these lists."""
    if setting.weights == RGB_MODEL:
        return rgb_backbone(rgb, read_splits(rgb.splits, rgb), lists)
    return load_initial_weights(setting, pretrained)


def rgb_backbone(rgb: Task, rgb_lists: dict[str, Split], ms_lists: dict[str, Split]) -> dict[str, torch.Tensor]:
    """The backbone of the final RGB model, under torchvision's names: initial weights for six bands.

    A UserError says that the model has other lists, or was trained or chosen with a patch of the test list of six bands.
    """
    content, _ = read_model(rgb)
    if content["splits_sha256"] != splits_hash(rgb_lists):
        raise UserError(f"{display_path(model_path(rgb))} was trained with other lists; run: python train_rgb.py")
    seen = {patch for part in ("train", "val") for patch in rgb_lists[part].patches}
    if leaked := sorted(seen & set(ms_lists["test"].patches)):
        told = f"the final RGB model has seen {len(leaked)} test patches of the multispectral lists ({leaked[0]}, …)"
        raise UserError(f"{told}, so a network cannot start from it; set other weights in config.py")
    return backbone_weights(content["model"])


def backbone_weights(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The backbone in the weights of a network with one group of bands, under torchvision's names."""
    backbone = ((name.removeprefix("backbone."), tensor) for name, tensor in weights.items())
    return {torchvision_name(name): tensor for name, tensor in backbone if not name.startswith("linear.")}


def select_final_model(task: Task, settings: list[Setting], lists: dict[str, Split], pretrained: Path) -> None:
    """Write the best epoch of the best setting, by val, as final_model.pt, and all settings' figures as selection.csv.

    A UserError says that a run is damaged, or was not trained with its setting and these lists.
    """
    runs = {setting: read_checkpoint(task.outputs / setting.name) for setting in settings}
    for setting, run in runs.items():
        if not {**setting.values(), "splits_sha256": splits_hash(lists)}.items() <= run["identity"].items():
            raise UserError(f"{display_path(task.outputs / setting.name)} is of another run; delete it and train again")
    bests = {setting: best_epoch(run["history"]) for setting, run in runs.items()}
    best = best_epoch(list(bests.values()))
    chosen = next(setting for setting in settings if bests[setting] is best)
    rows = []
    for setting, run in runs.items():
        epoch, selected = bests[setting], "yes" if setting is chosen else "no"
        row = [setting.name, selected, epoch["epoch"], epoch["val_accuracy"], epoch["val_mean_tpr"]]
        row += [setting.augmentation, setting.fusion, " ".join(setting.bands), run_hash(run["identity"])]
        rows.append(dict(zip(SELECTION_HEADER, row, strict=True)))
    run = runs[chosen]
    content = {
        "task": task.name,
        "run": run_hash(run["identity"]),
        "runs": {row["setting"]: row["run"] for row in rows},
        "selection": rows,
        "setting": chosen.values(),
        "initial_weights": initial_weights_record(chosen, pretrained, task.outputs.with_name("rgb") / "final_model.pt"),
        "classes": list(CLASSES),
        "bands": list(chosen.bands),
        **{"mean": run["mean"], "std": run["std"], "model": run["best"], "epoch": best["epoch"]},
        "val": {key: value for key, value in best.items() if key.startswith("val_")},
        "seed": run["identity"]["seed"],
        "splits_sha256": run["identity"]["splits_sha256"],
        "images": {part: len(split.files) for part, split in lists.items()},
        "versions": {key: value for key, value in run["environments"][-1].items() if key.startswith("torch")},
        "environments": run["environments"],
    }
    with reading(task.outputs / chosen.name / "last.pt", "delete its folder and train again"):
        checked_network(content, task)  # before the old final model is replaced
    save_tensors(model_path(task), {**content, "sha256": content_hash(content)}, backup=True)
    # Not in the model's file, which the same training shall write again byte for byte.
    seconds = [round(sum(epoch["seconds"] for epoch in run["history"]), 1) for run in runs.values()]
    table = [[*list(row.values())[:-1], time, row["run"]] for row, time in zip(rows, seconds, strict=True)]
    header = [*SELECTION_HEADER[:-1], "seconds", "run"]
    write_csv(task.outputs / "selection.csv", header, table, backup=True)
    print(
        f"best by val: {chosen.name}, epoch {best['epoch']}, accuracy {best['val_accuracy']:.2%}, mean TPR "
        f"{best['val_mean_tpr']:.2%} ({task.name})\nwrote {display_path(model_path(task))}, selection.csv beside it, and a "
        f"folder for each setting\nnext: python predict_test.py {task.name}"
    )
