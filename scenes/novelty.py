"""Images unlike the training set: far from every training image.

A network names one of its ten classes for every image. So an image is marked if its nearest training image is further away
than that of 99 % of the val images (Sun et al., Out-of-distribution detection with deep nearest neighbors, 2022).

The distance does not use the network's features. They hold little but what tells the ten classes apart: 84 % of 200 strange
images lay as near as val images do. It uses the mean of each band, and how the bands vary together at five scales: 33 numbers
for three bands, 111 for six (`python -m studies.novelty_check` has the figures).
"""

import math
from dataclasses import dataclass
from pathlib import Path

from base.errors import UserError
from base.files import load_tensors, reading, save_tensors
from base.project import Task, display_path

import torch
import torch.nn.functional as F

from dataset import SIDE, EuroSATDataset
from engine.final_model import FinalModel, check_lists
from engine.splits import read_splits

SCALES = 5
ROUNDING = 1e-4  # variance, of standardised bands, that rounding to 8 bits brings: less says nothing
VAL_MARKED = 0.01  # share of val that is further away than the threshold
WHITENING = 0.01  # of the mean variance is added to each direction's, lest one of next to none decides


def statistics(images: torch.Tensor) -> torch.Tensor:
    """(batch, bands, 64, 64), standardised, to (batch, statistics).

    The means, then at each scale the logarithm of the covariance matrix of what distinguishes that scale from the next
    coarser one (a Laplacian pyramid; Burt and Adelson, 1983), so that it is ratios of variances that count.
    """
    means = images.mean((2, 3), keepdim=True)
    levels = [images - means]
    for _ in range(SCALES - 1):
        levels.append(F.avg_pool2d(levels[-1], 2))
    moments = [level.flatten(2) @ level.flatten(2).mT / level[0, 0].numel() for level in levels]
    # A level's details have mean zero in each square of four pixels: so their covariance is what its moments have more.
    finer, coarser = torch.stack(moments), torch.stack([*moments[1:], torch.zeros_like(moments[0])])
    bands = images.shape[1]
    values, vectors = torch.linalg.eigh(finer - coarser + ROUNDING * torch.eye(bands, device=images.device))
    # (scales, batch, bands, bands)
    logarithms = vectors @ torch.diag_embed(values.clamp(min=ROUNDING).log()) @ vectors.mT
    rows, columns = torch.triu_indices(bands, bands)
    entries = logarithms[..., rows, columns] * torch.where(rows == columns, 1, 2**0.5).to(images)
    return torch.cat([means.flatten(1), entries.transpose(0, 1).flatten(1)], dim=1)


@dataclass(frozen=True)
class TrainingFeatures:
    """What images are compared with: features, which are (statistics - mean) @ whitening."""

    mean: torch.Tensor  # (statistics,)
    whitening: torch.Tensor  # (statistics, statistics)
    features: torch.Tensor  # (training images, statistics)
    threshold: float  # the distance beyond which an image is unlike the training set

    def distances(self, images: torch.Tensor) -> torch.Tensor:
        """From standardised images (batch, bands, 64, 64) to the nearest training image: (batch,)."""
        mean, whitening, features = (values.to(images) for values in (self.mean, self.whitening, self.features))
        return torch.cdist((statistics(images) - mean) @ whitening, features).amin(1)


def reference_features(train: torch.Tensor, val: torch.Tensor) -> TrainingFeatures:
    """From the statistics, (images, statistics), of both lists; the threshold is chosen on val alone."""
    mean = train.mean(0)
    variances, directions = torch.linalg.eigh(torch.cov((train - mean).T))
    whitening = directions / (variances.clamp(min=0) + WHITENING * variances.mean()).sqrt()
    features = ((train - mean) @ whitening).half()  # whose rounding is far below any distance here
    distances = torch.cdist((val - mean) @ whitening, features.float()).amin(1)
    return TrainingFeatures(mean, whitening, features, float(distances.quantile(1 - VAL_MARKED)))


def training_features(root: Path, task: Task, final: FinalModel) -> TrainingFeatures | None:
    """Read features.pt beside the model, or make it from the data set below `root`; None, and a note, if it cannot be made.

    Raises:
        UserError: the file is damaged.
    """
    path = task.outputs / "features.pt"
    if path.exists():
        remedy = "delete it: it is made again from the data set"
        content = load_tensors(path, remedy)
        with reading(path, remedy):
            if content.pop("model_sha256", None) == final.sha256:
                reference = TrainingFeatures(**content)
                tried = reference.distances(torch.zeros(1, len(final.bands), SIDE, SIDE))
                if not (tried.isfinite().all() and 0 < reference.threshold < math.inf):
                    raise ValueError("it holds numbers that cannot be computed with")
                return reference
    try:
        lists = read_splits(task.splits, task)
        check_lists(final, task, lists)
        data = (
            EuroSATDataset(root, task, lists[part], final.bands, (final.mean, final.std)) for part in ("train", "val")
        )
        train, val = (
            torch.cat([statistics(each[some][0]) for some in torch.arange(len(each)).split(100)]) for each in data
        )
    except UserError as error:
        print(f"note: images unlike the training set are not marked: {display_path(path)} cannot be made ({error})")
        return None
    made = reference_features(train, val)
    save_tensors(path, {"model_sha256": final.sha256, **vars(made)})
    print(f"wrote {display_path(path)}, from {len(train):,} training and {len(val):,} val images")
    return made
