"""Images unlike the training set: far from every training image.

A network names one of its ten classes for whatever it is shown, so an image is marked where the nearest training image is
further away than it is for all but 1 % of val (Sun et al., Out-of-distribution detection with deep nearest neighbors, 2022).

The distance is not that of the network's features: ahead of the linear layer they keep little but what tells the ten classes
apart, and 84 % of 200 strange images lay as near as val images do. Kept instead: each band's mean and how the bands vary
together at five scales, 33 numbers of three bands, 111 of six (`python -m studies.unlike_check` has the figures).
"""

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

from dataset import EuroSATDataset, Split
from engine.evaluation import FinalModel, check_lists, in_order
from engine.splits import read_splits
from engine.weights import load_tensors, save_tensors
from project import UserError, shown

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
    logarithms = (
        vectors @ torch.diag_embed(values.clamp(min=ROUNDING).log()) @ vectors.mT
    )  # (scales, batch, bands, bands)
    rows, columns = torch.triu_indices(bands, bands)
    entries = logarithms[..., rows, columns] * torch.where(rows == columns, 1, 2**0.5).to(images)
    return torch.cat([means.flatten(1), entries.transpose(0, 1).flatten(1)], dim=1)


@dataclass(frozen=True)
class TrainingFeatures:
    """What images are compared with.

    Attributes:
        mean, whitening: (statistics,) and (statistics, statistics): features are (statistics - mean) @ whitening.
        features: (training images, statistics).
        threshold: the distance beyond which an image is unlike the training set.
    """

    mean: torch.Tensor
    whitening: torch.Tensor
    features: torch.Tensor
    threshold: float

    def distances(self, images: torch.Tensor) -> torch.Tensor:
        """From standardised images (batch, bands, 64, 64) to the nearest training image: (batch,)."""
        mean, whitening, features = (values.to(images) for values in (self.mean, self.whitening, self.features))
        return _nearest((statistics(images) - mean) @ whitening, features)


def _nearest(features: torch.Tensor, known: torch.Tensor) -> torch.Tensor:
    return torch.cdist(features, known).amin(1)


def compare(train: torch.Tensor, val: torch.Tensor) -> TrainingFeatures:
    """From the statistics, (images, statistics), of both lists; the threshold is chosen on val alone."""
    mean = train.mean(0)
    variances, directions = torch.linalg.eigh(torch.cov((train - mean).T))
    whitening = directions / (variances.clamp(min=0) + WHITENING * variances.mean()).sqrt()
    features = ((train - mean) @ whitening).half()  # whose rounding is far below any distance here
    distances = _nearest((val - mean) @ whitening, features.float())
    return TrainingFeatures(mean, whitening, features, float(distances.quantile(1 - VAL_MARKED)))


def training_features(root: Path, folder: Path, splits: Path, task: str, final: FinalModel) -> TrainingFeatures | None:
    """Read features.pt beside the model, or make it, which takes the data set and some seconds.

    Args:
        root: of the data set.
        folder, splits: of the task in outputs/ and in splits/.

    Returns:
        None, after a line that says so, where it is not there and cannot be made.

    Raises:
        UserError: the file is damaged.
    """
    path = folder / "features.pt"
    if path.exists():
        content = load_tensors(path)
        if content.pop("model_sha256", None) == final.sha256:
            return TrainingFeatures(**content)
    try:
        lists = read_splits(splits, task)
        check_lists(final, folder, task, lists)
        train, val = (_statistics_of_list(root, task, lists[part], final) for part in ("train", "val"))
    except UserError as error:
        print(f"note: images unlike the training set are not marked: {shown(path)} cannot be made ({error})")
        return None
    made = compare(train, val)
    save_tensors(path, {"model_sha256": final.sha256, **vars(made)})
    print(
        f"wrote {shown(path)}: {path.stat().st_size / 1e6:.1f} MB, from {len(train):,} training and {len(val):,} val images"
    )
    return made


def _statistics_of_list(root: Path, task: str, split: Split, final: FinalModel) -> torch.Tensor:
    data = EuroSATDataset(root, task, split, final.bands, (final.mean, final.std))
    return torch.cat([statistics(images) for images, _ in in_order(data)])
