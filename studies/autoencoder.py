"""How few numbers describe a patch, and does a network without labels explain errors? A convolutional autoencoder.

Run from the project root: python -m studies.autoencoder (RGB). Some ten minutes on 2 CPU cores. Latent spaces of 4 x 4 x 32 numbers
down to 4 x 4 x 4 are trained on train for ten epochs each. The elbow of their errors on val chooses one of them: the size farthest
below the straight line from the smallest to the largest size, with both axes scaled to [0, 1] (Satopaa et al., Finding a "kneedle"
in a haystack, 2011). It is trained again on train and val for 30 epochs, and its error on test is measured once.

Its latent space is then compared with the final model's features: the nearest training images, and the rules of
studies.explain_errors, applied to both. The rules explain an error if one holds before the last, "everything else".

reads   the final RGB model and its test results, the images of all lists
writes  outputs/<profile>/rgb/autoencoder/: study.json, neighbours.csv (all test images), errors.csv (each error in both spaces),
        sizes.png, reconstructions.png, neighbours.png
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace

from base.command_line import run
from base.files import write_csv
from base.project import CLASSES, PARTS, RGB, config
from base.setting import Setting

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from dataset import EuroSATDataset, Split
from engine.plots import COLOURS, MEAN_COLOUR, contact_sheet, save
from engine.results import BATCH_SIZE
from engine.runtime import seed_everything
from engine.training import epoch_batches, learning_rate, make_optimizer
from studies.explain_errors import (
    CAUSES,
    HEADER,
    explained_errors,
    linear_predictions,
    neighbours,
    write_neighbours,
)
from studies.explore import two_lines
from studies.statistics import mcnemar
from studies.subject import Subject, percent, subjects

CHANNELS = tuple(range(32, 0, -4))  # of the latent spaces
WIDTHS = (16, 32, 64, 128)  # channels at 32, 16, 8 and 4 pixels
# Of the setting only these values are used.
TRAINING = Setting("autoencoder", "mild", epochs=10, batch_size=16, learning_rate=3e-3, weight_decay=0.0)
CHOSEN_EPOCHS = 30
TEST_IMAGES, WITH_NEIGHBOURS = 8, 3  # drawn by the split's seed


class Autoencoder(nn.Module):
    """Standardised images (batch, 3, 64, 64) to (batch, channels, 4, 4) and back. Four strided convolutions each way."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Sequential(), nn.Sequential(nn.Conv2d(channels, WIDTHS[-1], 1))
        for inner, outer in zip(WIDTHS, (3, *WIDTHS), strict=False):
            self.encoder.extend([nn.Conv2d(outer, inner, 4, 2, 1), nn.BatchNorm2d(inner), nn.ReLU()])
        for inner, outer in zip(WIDTHS[::-1], (*WIDTHS[-2::-1], 3), strict=True):
            self.decoder.extend([nn.BatchNorm2d(inner), nn.ReLU(), nn.ConvTranspose2d(inner, outer, 4, 2, 1)])
        self.encoder.append(nn.Conv2d(WIDTHS[-1], channels, 1))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.decoder(self.encoder(images))


def main() -> None:
    for subject in subjects([RGB], "autoencoder"):
        lists, data = subject.lists, {part: subject.images(part) for part in PARTS}
        train_images = augmented_images(subject, lists["train"])
        models = {channels: train_autoencoder(channels, train_images, TRAINING) for channels in CHANNELS}
        val_errors = {channels: squared_errors(model, data["val"]) for channels, model in models.items()}
        errors = {channels: float(of_images.mean()) for channels, of_images in val_errors.items()}
        chosen = elbow(errors)
        draw_sizes(subject, models, val_errors, chosen, data["val"])
        files = lists["train"].files + lists["val"].files
        both = Split(files, np.concatenate([lists["train"].labels, lists["val"].labels]))
        model = train_autoencoder(chosen, augmented_images(subject, both), replace(TRAINING, epochs=CHOSEN_EPOCHS))
        test_errors = squared_errors(model, data["test"])
        drawn = np.random.default_rng(config.split_seed).permutation(len(test_errors))[:TEST_IMAGES]
        draw_reconstructions(subject, model, data["test"], drawn, test_errors)
        features = {
            "classifier": {part: subject.predict(part, embed=True).numpy() for part in PARTS},
            "autoencoder": {part: in_batches(lambda x: model.encoder(x).flatten(1), data[part]) for part in PARTS},
        }
        near = {space: neighbours(subject, of_space) for space, of_space in features.items()}
        write_neighbours(subject, near["autoencoder"])
        draw_neighbours(subject, near, drawn[:WITH_NEIGHBOURS])
        predictions = linear_predictions(subject, features["classifier"]["train"])
        explained = {space: explained_errors(subject, features[space], near[space], predictions) for space in features}
        rows = [[space, *row.values()] for space, of_space in explained.items() for row in of_space]
        write_csv(subject.folder / "errors.csv", ["space", *HEADER[:-1]], rows)
        write_autoencoder_study(subject, errors, chosen, test_errors, near, explained)


def augmented_images(subject: Subject, split: Split) -> EuroSATDataset:
    """Standardised as the final model sees them, and augmented."""
    how = {"augmentation": TRAINING.augmentation, "seed": config.seed, "device": subject.device}
    statistics = subject.final.mean, subject.final.std
    return EuroSATDataset(config.dataset_root, RGB, split, subject.final.bands, statistics, **how)


def train_autoencoder(channels: int, data: EuroSATDataset, setting: Setting) -> Autoencoder:
    """An autoencoder of this size, trained on mean squared error.

    The order of the images, the schedule and the optimiser are those of engine/training.py. Its loop compares logits with labels,
    so it cannot compare images with images.
    """
    seed_everything(config.seed)
    model = Autoencoder(channels).to(data.device, memory_format=torch.channels_last).train()
    optimizer = make_optimizer(model, setting)
    for epoch in tqdm(range(setting.epochs), f"4 x 4 x {channels}", unit="epoch", leave=False, disable=None):
        data.epoch = epoch
        batches = epoch_batches(len(data), setting.batch_size, config.seed, epoch)
        for step, indices in enumerate(batches):
            progress = (epoch + (step + 0.5) / len(batches)) / setting.epochs
            optimizer.param_groups[0]["lr"] = learning_rate(setting, progress)
            images, _ = data[indices]
            F.mse_loss(model(images), images).backward()
            optimizer.step()
            optimizer.zero_grad()
    return model.eval()


def in_batches(function: Callable[[torch.Tensor], torch.Tensor], data: EuroSATDataset) -> np.ndarray:
    """The function's values for all images: (images, …)."""
    with torch.inference_mode():
        batches = torch.arange(len(data), device=data.device).split(BATCH_SIZE)
        return torch.cat([function(data[indices][0]) for indices in batches]).cpu().numpy()


def in_pixels(images: torch.Tensor, data: EuroSATDataset) -> torch.Tensor:
    """Standardised images (batch, 3, 64, 64) as pixel values from 0 to 255, not rounded."""
    return (255 * (images * data.std[:, None, None] + data.mean[:, None, None])).clamp(0, 255)


def as_pictures(images: torch.Tensor, data: EuroSATDataset) -> torch.Tensor:
    """`in_pixels` as a file would hold them: (batch, 64, 64, 3) uint8."""
    return in_pixels(images, data).round().to(torch.uint8).permute(0, 2, 3, 1)


def squared_errors(model: Autoencoder, data: EuroSATDataset) -> np.ndarray:
    """Mean squared error of each image in squared pixel values: (images,)."""
    return in_batches(lambda x: (in_pixels(model(x), data) - in_pixels(x, data)).square().mean((1, 2, 3)), data)


def reconstruction(model: Autoencoder, data: EuroSATDataset, index: int) -> np.ndarray:
    """(64, 64, 3) uint8."""
    with torch.inference_mode():
        return as_pictures(model(data[torch.tensor([index])][0]), data)[0].cpu().numpy()


def psnr(error: float) -> float:
    """Peak signal-to-noise ratio in dB of a mean squared error in squared pixel values."""
    return 10 * np.log10(255**2 / error)


def elbow(errors: dict[int, float]) -> int:
    """The size farthest below the straight line from the smallest to the largest size, both axes scaled to [0, 1]."""
    sizes = sorted(errors)
    first, last = errors[sizes[0]], errors[sizes[-1]]
    below = [1 - (size - sizes[0]) / (sizes[-1] - sizes[0]) - (errors[size] - last) / (first - last) for size in sizes]
    return sizes[int(np.argmax(below))]


def draw_sizes(
    subject: Subject, models: dict[int, Autoencoder], errors: dict[int, np.ndarray], chosen: int, val: EuroSATDataset
) -> None:
    """sizes.png: mean error on val against size; below it the val image of median error, as each size reconstructs it."""
    sizes = sorted(errors)
    means = [errors[size].mean() for size in sizes]
    index = int(errors[sizes[0]].argsort(kind="stable")[len(val) // 2])
    figure, grid = plt.subplots(2, len(sizes) + 1, figsize=(6.9, 3.1), layout="constrained", height_ratios=(2, 1))
    curve = figure.add_subplot(grid[0, 0].get_gridspec()[0, 1:])  # above the reconstructions
    for axes in grid.flat:
        axes.set_axis_off()
    curve.plot([sizes[0], sizes[-1]], [means[0], means[-1]], color="#BBBBBB", linewidth=0.8)
    curve.plot(sizes, means, color=COLOURS[1], marker="o", markersize=3)
    curve.plot(chosen, errors[chosen].mean(), "o", color=MEAN_COLOUR, markersize=6)
    curve.text(
        0.98, 0.9, "dot: the elbow, farthest below the grey line", transform=curve.transAxes, ha="right", fontsize=7
    )
    curve.set(xlim=(sizes[0] - 2, sizes[-1] + 2), ylabel="mean squared error\n(pixel values²)")
    curve.set_xticks(sizes, [f"4 × 4 × {size}" for size in sizes], fontsize=7)
    scale = curve.secondary_yaxis("right", functions=(psnr, lambda decibel: 255**2 / 10 ** (decibel / 10)))
    scale.set_ylabel("PSNR (dB)")
    scale.spines[:].set_visible(True)
    (original,) = subject.pictures([subject.lists["val"].files[index]])
    pictures = [original, *(reconstruction(models[size], val, index) for size in sizes)]
    names = ["original", *(f"{psnr(errors[size][index]):.1f} dB" for size in sizes)]
    for axes, picture, name in zip(grid[1], pictures, names, strict=True):
        axes.imshow(picture, interpolation="nearest")
        axes.set_title(name, fontsize=6.5, loc="center", pad=2)
    title = f"Error on val against the size of the latent space, and a val image at every size: {chosen} channels are chosen"
    figure.suptitle(title, fontsize=8, x=0.01, ha="left")
    save(figure, subject.folder / "sizes.png", subject.final.sha256)


def draw_reconstructions(
    subject: Subject, model: Autoencoder, test: EuroSATDataset, drawn: np.ndarray, errors: np.ndarray
) -> None:
    """reconstructions.png: the drawn test images above, their reconstructions below."""
    pictures = subject.pictures([test.split.files[index] for index in drawn])
    upper = [
        (picture, CLASSES[test.split.labels[index]], False) for picture, index in zip(pictures, drawn, strict=True)
    ]
    lower = [(reconstruction(model, test, index), f"{psnr(errors[index]):.1f} dB", False) for index in drawn]
    title = f"{len(drawn)} random test images and their reconstructions"
    path = subject.folder / "reconstructions.png"
    contact_sheet(path, [("test", upper), ("reconstructed", lower)], title, subject.final.sha256, width=6.9)


def draw_neighbours(subject: Subject, near: dict[str, dict[str, np.ndarray]], drawn: np.ndarray) -> None:
    """neighbours.png: the nearest training images of the drawn test images in both spaces; other classes in red."""
    train, test, rows = subject.lists["train"], subject.lists["test"], []
    for index in drawn:
        for space, of_space in near.items():
            nearest = of_space["nearest"][index]
            pictures = subject.pictures([test.files[index], *(train.files[other] for other in nearest)])
            labels = [test.labels[index], *train.labels[nearest]]
            images = [
                (picture, two_lines(CLASSES[label]), label != labels[0])
                for picture, label in zip(pictures, labels, strict=True)
            ]
            rows.append((space, images))
    title = (
        "Three random test images (left) and their ten nearest training images, in the features of the classifier and in the\n"
        "latent space of the autoencoder; another class in red"
    )
    contact_sheet(subject.folder / "neighbours.png", rows, title, subject.final.sha256, width=6.9)


def write_autoencoder_study(
    subject: Subject,
    errors: dict[int, float],
    chosen: int,
    test_errors: np.ndarray,
    near: dict[str, dict[str, np.ndarray]],
    explained: dict[str, list[dict[str, str]]],
) -> None:
    train, test = subject.lists["train"], subject.lists["test"]
    mean, half = test_errors.mean(), 1.96 * test_errors.std(ddof=1) / np.sqrt(len(test_errors))
    same = {
        space: (train.labels[of_space["nearest"]] == test.labels[:, None]).mean() for space, of_space in near.items()
    }
    by_rule = {space: np.array([row["cause"] != CAUSES[-1] for row in rows], bool) for space, rows in explained.items()}
    counts, rows = {space: int(hits.sum()) for space, hits in by_rule.items()}, []
    for space, of_space in explained.items():
        causes = Counter(row["cause"] for row in of_space)
        of_predicted = sum(row["counterexample_class"] == row["predicted"] for row in of_space)
        rows.append([space, *(str(causes[cause]) for cause in CAUSES), str(counts[space]), str(of_predicted)])
    more = max(counts, key=counts.get)
    answer = "Both explain equally many" if len(set(counts.values())) == 1 else f"The {more} explains more"
    p_value = mcnemar(*by_rule.values())["p_value"]
    finding = (
        f"4 × 4 × {chosen} = {16 * chosen} numbers are the elbow, {percent(16 * chosen / (3 * 64**2))} % of the {3 * 64**2:,} "
        f"numbers of a patch. The autoencoder of this size has a mean squared error of {mean:.0f} ± {half:.0f} on test (95 % "
        f"interval), a PSNR of {psnr(mean):.1f} dB. Of the ten nearest training images, {percent(same['autoencoder'])} % are of "
        f"the test image's class in its latent space, and {percent(same['classifier'])} % in the features of the classifier. "
        f"{answer} of the {len(by_rule[more])} errors by a rule: {counts['autoencoder']} with the autoencoder, "
        f"{counts['classifier']} with the classifier (McNemar's p {p_value:.2g})."
    )
    table = {
        "caption": "Errors by rule in each space; by any rule but the last; with a counterexample of the predicted class",
        "header": ["space", *CAUSES, "explained", "predicted class"],
        "rows": rows,
    }
    values = {"chosen": chosen, "test_mse": float(mean), "test_psnr": float(psnr(mean)), "half_interval": float(half)}
    values |= {"same_class": {space: float(share) for space, share in same.items()}, "explained": counts}
    values |= {"val_mse": {str(size): error for size, error in errors.items()}}
    subject.write(finding, [table], ["sizes.png", "reconstructions.png", "neighbours.png"], **values)


if __name__ == "__main__":
    run(main, __doc__)
