"""Can a network that was only ever told one class per patch name the land use of every pixel?

Run from the project root: python -m studies.segment (RGB). About 20 minutes on 2 CPU cores with AVX-512; it resumes after the last
epoch. A fully convolutional network is trained on composites: two to four training patches joined along random smooth borders,
each pixel labelled by its patch. Its encoder is the final model's backbone up to stride 16, its decoder adds the maps at strides
16, 8 and 4 (as Lin et al., Feature pyramid networks, 2017). Val composites choose the epoch; composites of test patches measure.

No border may be a clue. Borders are nowhere straight, each is as soft as chance wants (one fixed softness is learned as a clue), the
patches of a composite are augmented alike, and each composite is compressed as EuroSAT's JPEGs are.

reads   the final RGB model, the images; outputs/classify/virginia.tif if there (python -m studies.real_scene), for scene.png
writes  outputs/<profile>/rgb/segment/: study.json, composites.png, scene.png, the runs loaded/ and scratch/
"""

import copy
import itertools
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from base.command_line import run
from base.project import CLASSES, PARTS, RGB, config

import matplotlib.pyplot as plt
import numpy as np
import PIL.Image
import torch
import torch.nn.functional as F
from matplotlib.patches import Patch
from numpy.lib.stride_tricks import sliding_window_view
from scipy.ndimage import distance_transform_edt, gaussian_filter
from torch import nn
from torch.fx import GraphModule
from torch.fx.passes.shape_prop import ShapeProp

from augment import preprocess
from dataset import SIDE, EuroSATDataset, Split, stretch_to_uint8
from engine.checkpoint import read_checkpoint
from engine.plots import save
from engine.results import predict
from engine.runtime import seed_everything, training_session
from engine.splits import splits_hash
from engine.training import train_setting
from models import Backbone
from scenes.map_figure import MAP_COLOURS, PALETTE
from scenes.maps import LandUse, map_scene
from scenes.opening import jpeg_pixels, open_image
from scenes.shared import standardised
from studies import statistics
from studies.autoencoder import as_pictures, in_batches
from studies.real_scene import scene_path
from studies.subject import Subject, percent, subjects

EPOCHS, COMPOSITES = 20, {"val": 250, "test": 360}  # of train: as many as there are patches
PATCHES = 2, 4  # in a composite, at least and at most
GRID = 3  # random numbers in a row, between which a field of borders is interpolated
SOFTNESS = 0.3, 3.0  # standard deviation, in pixels, of the Gaussian that blurs a border: least and most
STRIDES, WIDTH = (4, 8, 16), 64  # of the encoder's maps; channels of the decoder
CELL = 16  # pixels of a cell of the map
DISTANCES = (0, 2, 4, 8, SIDE)  # pixels from the border, between which accuracy is measured
EXAMPLES = 6
LOADED, SCRATCH, MAP, NEAREST = "pixel network", "from scratch", "map, 160 m", "nearest centre"


class Composites(EuroSATDataset):
    """Composites of a list's patches. `dataset[indices]` is (batch, 3, 64, 64), and the classes of all pixels, (batch · 64 · 64,).

    Those of train depend on the epoch; those of val and test stay, and `split.labels` holds the classes of all their pixels.
    """

    def __init__(self, subject: Subject, part: str, augmentation: str = "none") -> None:
        values = subject.lists[part], subject.final.bands, (subject.final.mean, subject.final.std)
        super().__init__(config.dataset_root, RGB, *values, augmentation, config.seed, subject.device)
        self.patch_labels = self.split.labels
        self.part, self.count = PARTS.index(part), COMPOSITES.get(part, len(self.labels))
        if part != "train":
            drawn = map(self.draw, range(self.count))
            self.split = Split(
                [], np.concatenate([self.patch_labels[patches][origin].ravel() for patches, origin, _ in drawn])
            )

    def __len__(self) -> int:
        return self.count

    def draw(self, index: int) -> tuple[np.ndarray, np.ndarray, float]:
        """The patches of a composite, (patches,); which of them each pixel is from, (64, 64); how soft its borders are."""
        random = np.random.default_rng((self.seed, self.part, self.epoch, index))
        patches = random.choice(len(self.labels), random.integers(*PATCHES, endpoint=True), replace=False)
        numbers = torch.from_numpy(random.standard_normal((1, len(patches), GRID, GRID)))
        fields = F.interpolate(numbers, (SIDE, SIDE), mode="bicubic", align_corners=True)[0]
        fields = (fields - fields.mean((1, 2), keepdim=True)) / fields.std((1, 2), keepdim=True)
        return patches, fields.argmax(0).numpy(), float(np.exp(random.uniform(*np.log(SOFTNESS))))

    def __getitem__(self, indices: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        drawn = [self.draw(index) for index in indices.tolist()]
        sizes = [len(patches) for patches, *_ in drawn]
        chosen = torch.from_numpy(np.concatenate([patches for patches, *_ in drawn])).to(self.device)
        random = self._random()[indices].repeat_interleave(torch.tensor(sizes, device=self.device), 0)
        shares = [
            gaussian_filter((origin == np.arange(len(patches))[:, None, None]).astype(np.float32), (0, soft, soft))
            for patches, origin, soft in drawn
        ]
        images = preprocess(self._read(chosen), self.mean, self.std, self.augmentation, random)
        images = images * torch.from_numpy(np.concatenate(shares)).to(self.device)[:, None]
        mixed = torch.stack([parts.sum(0) for parts in images.split(sizes)])
        pixels = as_pictures(mixed, self).cpu().numpy()
        compressed = torch.from_numpy(np.stack([jpeg_pixels(image) for image in pixels])).to(self.device)
        labels = np.concatenate([self.patch_labels[patches][origin].ravel() for patches, origin, _ in drawn])
        return preprocess(compressed, self.mean, self.std, "none", None), torch.from_numpy(labels).to(self.device)


class PixelNetwork(nn.Module):
    """Standardised images (batch, 3, height, width) to the logits of every pixel, (batch · height · width, 10)."""

    def __init__(self, backbone: Backbone, image_size: int) -> None:
        super().__init__()
        self.scale = image_size / SIDE
        features = backbone.eval().features
        self.features = GraphModule(features, copy.deepcopy(features.graph))
        ShapeProp(self.features).propagate(torch.zeros(1, 3, image_size, image_size))
        *nodes, output = self.features.graph.nodes
        shapes = {node: getattr(node.meta.get("tensor_meta"), "shape", ()) for node in nodes}
        last = {shape[2:]: node for node, shape in shapes.items()}  # of this size, the last: it knows most
        kept = [last[image_size // stride, image_size // stride] for stride in STRIDES]
        output.args = (kept,)
        self.features.graph.eliminate_dead_code()
        self.features.recompile()
        self.lateral = nn.ModuleList(nn.Conv2d(shapes[node][1], WIDTH, 1) for node in kept)
        self.head = nn.Sequential(nn.BatchNorm2d(WIDTH), nn.ReLU(), nn.Conv2d(WIDTH, WIDTH, 3, padding=1, bias=False))
        self.head.extend([nn.BatchNorm2d(WIDTH), nn.ReLU(), nn.Conv2d(WIDTH, len(CLASSES), 1)])

    def forward(self, images: torch.Tensor, views: int = 1) -> torch.Tensor:
        def resized(values: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
            return F.interpolate(values, tuple(size), mode="bilinear", align_corners=False)

        maps = self.features(resized(images, [round(self.scale * side) for side in images.shape[2:]]))
        total = self.lateral[-1](maps[-1])
        for lateral, finer in zip(self.lateral[-2::-1], maps[-2::-1], strict=True):
            total = lateral(finer) + resized(total, finer.shape[2:])
        return resized(self.head(total), images.shape[2:]).movedim(1, -1).flatten(0, 2)


def main() -> None:
    for subject in subjects([RGB], "segment"):
        with training_session(subject.folder):
            train, val = Composites(subject, "train", "strong"), Composites(subject, "val")
            loaded, scratch = (trained(subject, train, val, from_final) for from_final in (True, False))
        test = Composites(subject, "test")
        pixels = in_batches(lambda x: as_pictures(x, test), test)
        classes = {
            LOADED: predicted(loaded, test),
            SCRATCH: predicted(scratch, test),
            MAP: mapped(subject, pixels),
            NEAREST: np.stack([of_nearest_centre(test, index) for index in range(len(test))]),
        }
        columns = {"composite": pixels, "labels": test.split.labels.reshape(-1, SIDE, SIDE), **classes}
        columns = {heading: pictures[:EXAMPLES] for heading, pictures in columns.items()}
        draw_panels(subject, "composites.png", columns, f"The first {EXAMPLES} composites of test patches", 0.95)
        write_segment_study(subject, measure(test, classes), draw_scene(subject, loaded))


def trained(subject: Subject, train: Composites, val: Composites, loaded: bool) -> PixelNetwork:
    """The network of the best epoch by val composites, trained or continued in its folder."""
    setting = replace(subject.final.setting, name="loaded", epochs=EPOCHS, augmentation=train.augmentation, views=1)
    if not loaded:
        setting = replace(setting, name="scratch", weights=None)
    seed_everything(config.seed)
    backbone = copy.deepcopy(subject.final.model.backbone).cpu() if loaded else Backbone(setting.backbone)
    model = PixelNetwork(backbone, setting.image_size)
    folder = subject.folder / setting.name
    train_setting(setting, model, train, val, splits_hash(subject.lists), folder)
    model.load_state_dict(read_checkpoint(folder)["best"])
    return model.to(subject.device, memory_format=torch.channels_last).eval()


def predicted(model: PixelNetwork, data: Composites) -> np.ndarray:
    """(composites, 64, 64) class indices."""
    return predict(model, data).argmax(1).view(-1, SIDE, SIDE).numpy()


def mapped(subject: Subject, pixels: np.ndarray) -> np.ndarray:
    """(composites, 64, 64): the map that classify.py makes of each, (64, 64, 3), continued by its mirror image."""
    beyond = SIDE - CELL
    around = np.pad(pixels.clip(1), ((0, 0), (beyond, beyond), (beyond, beyond), (0, 0)), "symmetric")  # 0: no data
    with tempfile.TemporaryDirectory(dir=subject.folder) as folder:
        path, column = Path(folder) / "composites.png", around.reshape(-1, SIDE + 2 * beyond, 3)
        PIL.Image.fromarray(column).save(path)
        with open_image(path) as image:
            classes = in_pixels_of_cells(map_scene(image, subject.final, None, CELL))
    return classes.reshape(around.shape[:3])[:, beyond:-beyond, beyond:-beyond]


def in_pixels_of_cells(land_use: LandUse) -> np.ndarray:
    return land_use.classes.repeat(CELL, 0).repeat(CELL, 1)


def of_nearest_centre(data: Composites, index: int) -> np.ndarray:
    """(64, 64): what someone would paint who knows of each patch its class, and the middle of what is seen of it."""
    patches, origin, _ = data.draw(index)
    centres = np.array([np.argwhere(origin == number).mean(0) for number in range(len(patches))])
    distances = np.linalg.norm(np.indices((SIDE, SIDE)) - centres[:, :, None, None], axis=1)
    return data.patch_labels[patches][distances.argmin(0)]


def measure(data: Composites, classes: dict[str, np.ndarray]) -> dict[str, dict]:
    """For each method: accuracy and mean IoU with intervals, accuracy by distance from the border, IoU of the classes."""
    labels = data.split.labels.reshape(-1, SIDE, SIDE)
    origins = [data.draw(index)[1] for index in range(len(data))]
    distances = np.stack([sum(distance_transform_edt(o == number) for number in range(o.max() + 1)) for o in origins])
    random, share = np.random.default_rng(config.seed), np.full(len(data), 1 / len(data))
    times = random.multinomial(len(data), share, statistics.DRAWS)  # that each composite is drawn, by draw
    results = {}
    for method, of_pixels in classes.items():
        counts = np.stack([confusion(*pair) for pair in zip(labels, of_pixels, strict=True)])
        (accuracy, iou), (accuracies, ious) = map(accuracy_and_iou, (counts.sum(0), np.tensordot(times, counts, 1)))
        results[method] = {
            "accuracy": [float(accuracy), *np.percentile(accuracies, (2.5, 97.5))],
            "mean_iou": [float(np.nanmean(iou)), *np.percentile(np.nanmean(ious, -1), (2.5, 97.5))],
            "by_distance": [
                float((of_pixels == labels)[(distances > low) & (distances <= high)].mean())
                for low, high in itertools.pairwise(DISTANCES)
            ],
            "iou": dict(zip(CLASSES, iou.tolist(), strict=True)),
        }
    return results


def confusion(labels: np.ndarray, classes: np.ndarray) -> np.ndarray:
    """Pixels by class and predicted class, (10, 11); the last column is no class."""
    rows, columns = len(CLASSES), len(CLASSES) + 1
    cells = labels.ravel() * columns + np.minimum(classes.ravel(), rows)
    return np.bincount(cells, minlength=rows * columns).reshape(rows, columns)


def accuracy_and_iou(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """From (…, 10, 11): accuracy, (…), and intersection over union of each class, (…, 10), nan for one without pixels."""
    correct = np.diagonal(counts, axis1=-2, axis2=-1)
    union = counts.sum(-1) + counts[..., :-1].sum(-2) - correct
    with np.errstate(invalid="ignore"):
        return correct.sum(-1) / counts.sum((-2, -1)), correct / union


def draw_panels(subject: Subject, name: str, columns: dict[str, Sequence[np.ndarray]], title: str, side: float) -> None:
    """Columns of pictures, each (height, width, 3) uint8 or (height, width) class indices and `side` inches, and a legend."""
    rows = len(next(iter(columns.values())))
    shape = {"figsize": (side * len(columns) + 1.5, side * rows + 0.6), "layout": "constrained", "squeeze": False}
    figure, grid = plt.subplots(rows, len(columns), **shape)
    for axes, (heading, pictures) in zip(grid.T, columns.items(), strict=True):
        axes[0].set_title(heading, fontsize=7)
        for each, picture in zip(axes, pictures, strict=True):
            coloured = picture if picture.ndim == 3 else PALETTE[np.minimum(picture, len(CLASSES))]
            each.imshow(coloured, interpolation="nearest")
            each.set_axis_off()
    legend = [Patch(facecolor=colour, label=label) for colour, label in zip(MAP_COLOURS, CLASSES, strict=True)]
    figure.legend(handles=legend, loc="outside right center", fontsize=6.5, frameon=False)
    figure.suptitle(title, fontsize=8, x=0.01, ha="left")
    save(figure, subject.folder / name, subject.final.sha256)


def draw_scene(subject: Subject, model: PixelNetwork) -> float | None:
    """scene.png; the share of pixels that network and map name alike. None if the scene is not there."""
    path = scene_path()
    if not path.exists():
        print("note: no scene.png: outputs/classify/virginia.tif is missing; run: python -m studies.real_scene")
        return None
    with open_image(path) as image:
        pixels, picture = image.training_pixels("rgb", RGB.bands), stretch_to_uint8(image.read(RGB.bands))
        cells = in_pixels_of_cells(map_scene(image, subject.final, None, CELL))
    of_pixels = classes_of_scene(subject, model, pixels)
    same = float((of_pixels == cells).mean())
    columns = {"Virginia's coast, true colour": [picture], "pixel network, 10 m": [of_pixels], MAP: [cells]}
    title = f"{percent(same)} % of the pixels are named alike; there is no ground truth at this scale"
    draw_panels(subject, "scene.png", columns, title, 2.6)
    return same


def classes_of_scene(subject: Subject, model: PixelNetwork, pixels: np.ndarray) -> np.ndarray:
    """(height, width, 3) uint8, in whole halves of a patch, to (height, width): the middle of windows that overlap by half."""
    half, quarter = SIDE // 2, SIDE // 4
    around = np.pad(pixels, ((quarter, quarter), (quarter, quarter), (0, 0)), "symmetric")
    windows = sliding_window_view(around, (SIDE, SIDE), (0, 1))[::half, ::half].transpose(0, 1, 3, 4, 2)
    classes = []
    with torch.inference_mode():
        for row in windows:
            of_row = model(standardised(subject.final, row)).argmax(1).view(-1, SIDE, SIDE).cpu().numpy()
            classes.append(np.concatenate(list(of_row[:, quarter:-quarter, quarter:-quarter]), axis=1))
    return np.concatenate(classes)


def write_segment_study(subject: Subject, measured: dict[str, dict], same: float | None) -> None:
    def with_interval(values: list[float]) -> str:
        return "{} ({} to {})".format(*map(percent, values))

    pixel, far = measured[LOADED], {method: percent(values["by_distance"][-1]) for method, values in measured.items()}
    accuracy = {method: percent(values["accuracy"][0]) for method, values in measured.items()}
    worst = sorted(CLASSES, key=lambda name: np.nan_to_num(pixel["iou"][name], nan=1))[:2]
    finding = (
        f"The pixel network names {with_interval(pixel['accuracy'])} % of the pixels of {COMPOSITES['test']} composites as their "
        f"patches are labelled, with a mean IoU of {with_interval(pixel['mean_iou'])} %; from scratch it names {accuracy[SCRATCH]} %, "
        f"the map {accuracy[MAP]} %, the nearest centre {accuracy[NEAREST]} %. Further than {10 * DISTANCES[-2]} m from a border, "
        f"where no border helps, it names {far[LOADED]} %, from scratch {far[SCRATCH]} %, the map {far[MAP]} %, the nearest centre "
        f"{far[NEAREST]} %. {worst[0]} and {worst[1]} have the lowest IoU. A part of a patch is often not what its label says."
    )
    if same is not None:
        finding += f" On a real scene network and map agree in {percent(same)} % of the pixels; there is no ground truth at this scale."
    bins = [f"{10 * low} to {10 * high} m" for low, high in itertools.pairwise(DISTANCES[:-1])]
    by_method = {
        "caption": "Pixels of composites of test patches (%): 95 % intervals over composites; accuracy by distance from the border",
        "header": ["method", "accuracy", "mean IoU", *bins, f"above {10 * DISTANCES[-2]} m"],
        "rows": [
            [
                method,
                *(with_interval(values[key]) for key in ("accuracy", "mean_iou")),
                *map(percent, values["by_distance"]),
            ]
            for method, values in measured.items()
        ],
    }
    by_class = {
        "caption": "Intersection over union (IoU) of each class (%)",
        "header": ["class", *measured],
        "rows": [[name, *(percent(values["iou"][name]) for values in measured.values())] for name in CLASSES],
    }
    figures = ["composites.png", *["scene.png"] * (same is not None)]
    subject.write(finding, [by_method, by_class], figures, methods=measured, same_as_map=same)


if __name__ == "__main__":
    run(main, __doc__)
