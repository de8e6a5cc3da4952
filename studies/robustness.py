"""How robust is the network? Accuracy on images that are attacked, or degraded by noise, blur, clouds or a missing band.

Run from the project root: python -m studies.robustness; with `rgb` or `ms` for one task. Ten minutes for RGB on 2 CPU cores. It
uses 1,000 test images drawn with the seed (all, if there are fewer), and the first 200 of them for attacks, with one view; the
first table has all views beside it. If predict_test.py was never run on the model, the images are those of val, and the test list
stays closed. Strengths are in pixel values (0 to 255) for RGB and in reflectance for the multispectral set.

reads   the final model, the images of test, or of val
writes  outputs/<profile>/<task>/robustness/: study.json, robustness.csv, robustness.png, attacked.png
"""

from collections.abc import Iterator

from base.command_line import run
from base.files import write_csv
from base.project import CLASSES, RGB, TASKS, Task, config

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F

from dataset import stretch_to_uint8
from engine.plots import COLOURS, contact_sheet, save
from studies import corruptions
from studies.subject import Subject, interval_text, percent, predict_pixels, subjects

IMAGES = 1000
ATTACKED = 200
BATCH = 50
UNIT_NAME = {"rgb": "of 255 pixel values", "ms": "of reflectance"}
ATTACKS = {"rgb": (0.5, 1, 4), "ms": (0.0005, 0.001, 0.004)}  # largest change of any pixel
PGD_STEPS = 10
NOISE = {"rgb": (2, 5, 10, 20), "ms": (0.002, 0.005, 0.01, 0.02)}  # standard deviation of normal noise
BLUR = (0.5, 1, 1.5, 2)  # pixels, standard deviation of a Gaussian
GAIN = (0.5, 0.75, 1.25, 1.5)
QUALITY = (90, 50, 20, 10)


def main(tasks: list[Task]) -> None:
    for subject in subjects(tasks, "robustness", tested=False):
        sample = Sample(subject)
        corrupted = corrupted_accuracies(sample)
        accuracies = {("none", 0.0): corrupted["none"][0], **dict(measurements(sample))}
        rows = [[kind, f"{strength:g}", f"{accuracy:.4f}"] for (kind, strength), accuracy in accuracies.items()]
        write_csv(subject.folder / "robustness.csv", ["change", "strength", "accuracy"], rows)
        draw_robustness(sample, accuracies)
        figures = ["robustness.png", *draw_attacked(sample)]
        write_robustness_study(sample, corrupted, accuracies, figures)


class Sample:
    """The chosen images.

    Attributes:
        pixels: (images, 64, 64, bands), as files hold them.
        floats: the first ATTACKED of them with the same numbers, (images, bands, 64, 64) float32.
    """

    def __init__(self, subject: Subject) -> None:
        data = subject.images(subject.part)
        chosen = np.random.default_rng(config.seed).permutation(len(data))[:IMAGES]
        self.subject, self.final, self.device = subject, subject.final, subject.device
        self.pixels, self.labels = data.pixels[chosen], torch.from_numpy(data.split.labels[chosen])
        self.floats = torch.from_numpy(self.pixels[:ATTACKED].astype(np.float32)).permute(0, 3, 1, 2).contiguous()
        self.highest, self.unit = float(np.iinfo(self.pixels.dtype).max), corruptions.unit(self.pixels)
        self.mean, self.std = (v[:, None, None].to(self.device) for v in (subject.final.mean, subject.final.std))
        self.model = subject.final.model.eval()

    def accuracy(self, pixels: np.ndarray, views: int = 1) -> float:
        predictions = predict_pixels(self.model, pixels, self.final.mean, self.final.std, views).argmax(1)
        return (predictions == self.labels).double().mean().item()

    def logits(self, floats: torch.Tensor) -> torch.Tensor:
        """Logits of pixels (batch, bands, 64, 64) float32 on the device, differentiable."""
        return self.model((floats / self.highest - self.mean) / self.std)

    def correct(self, floats: torch.Tensor) -> torch.Tensor:
        """(images,) bool."""
        with torch.inference_mode():
            predictions = [self.logits(batch.to(self.device)).argmax(1).cpu() for batch in floats.split(BATCH)]
        return torch.cat(predictions) == self.labels[: len(floats)]

    def attacked(self, strength: float, steps: int) -> torch.Tensor:
        """`floats`, each number changed by at most `strength` to increase the loss.

        One step is FGSM (Goodfellow et al., ICLR 2015). Several steps are PGD (Madry et al., ICLR 2018), which starts at
        the image and takes steps of 2.5 · strength / steps.
        """
        limit = strength * self.unit
        size = limit if steps == 1 else 2.5 * limit / steps
        changed = []
        for batch, labels in zip(self.floats.split(BATCH), self.labels[: len(self.floats)].split(BATCH), strict=True):
            start = batch.to(self.device)
            now = start.clone()
            for _ in range(steps):
                now.requires_grad_()
                loss = F.cross_entropy(self.logits(now), labels.to(self.device), reduction="sum")
                (gradient,) = torch.autograd.grad(loss, now)
                now = now.detach() + size * gradient.sign()
                now = torch.min(torch.max(now, start - limit), start + limit).clamp(0, self.highest)
            changed.append(now.cpu())
        return torch.cat(changed)


def corrupted_accuracies(sample: Sample) -> dict[str, tuple[float, float]]:
    """{corruption: accuracy with one view, with the model's views}; the first is "none"."""
    changed = {"none": sample.pixels} | corruptions.corruptions(sample.pixels, config.seed)
    views = sample.final.setting.views
    return {name: (sample.accuracy(pixels), sample.accuracy(pixels, views)) for name, pixels in changed.items()}


def measurements(sample: Sample) -> Iterator[tuple[tuple[str, float], float]]:
    """Yield ((what was changed, its strength), accuracy with one view)."""
    task, pixels = sample.subject.task.name, sample.pixels
    for strength in ATTACKS[task]:
        yield ("FGSM", strength), sample.correct(sample.attacked(strength, 1)).double().mean().item()
        yield ("PGD", strength), sample.correct(sample.attacked(strength, PGD_STEPS)).double().mean().item()
    random = np.random.default_rng(config.seed)
    for strength in NOISE[task]:
        yield ("noise", strength), sample.accuracy(corruptions.noisy(pixels, strength, random))
    for sigma in BLUR:
        yield ("blur", sigma), sample.accuracy(corruptions.blurred(pixels, sigma))
    for gain in GAIN:
        yield ("gain", gain), sample.accuracy(corruptions.brightened(pixels, gain))
    yield ("cloud over half", 0.5), sample.accuracy(corruptions.clouded(pixels, 0.5, random))
    if task == "rgb":
        for quality in QUALITY:
            yield ("JPEG quality", quality), sample.accuracy(corruptions.compressed(pixels, quality))
    for index, band in enumerate(sample.final.bands):
        without = pixels.copy()
        without[..., index] = round(float(sample.final.mean[index]) * sample.highest)
        yield (f"without {band}", 1), sample.accuracy(without)
        shuffled = pixels.copy()
        shuffled[..., index] = pixels[random.permutation(len(pixels)), :, :, index]
        yield (f"{band} of another image", 1), sample.accuracy(shuffled)  # permutation importance (Breiman, 2001)


def write_robustness_study(
    sample: Sample,
    corrupted: dict[str, tuple[float, float]],
    accuracies: dict[tuple[str, float], float],
    figures: list[str],
) -> None:
    subject, task, images, rows = sample.subject, sample.subject.task.name, len(sample.labels), []
    for kind in dict.fromkeys(kind for kind, _ in accuracies if kind != "none"):
        values = {strength: percent(value) for (k, strength), value in accuracies.items() if k == kind}
        cells = [f"{strength:g}: {value}" for strength, value in values.items()] if len(values) > 1 else values.values()
        rows.append([kind, ", ".join(cells)])
    worst = (
        min((accuracies[kind.format(band), 1], band) for band in subject.final.bands)
        for kind in ("without {}", "{} of another image")
    )
    by_mean, by_another = (f"{band} ({percent(value)} %)" for value, band in worst)
    strength, views = ATTACKS[task][1], subject.final.setting.views
    plain, (low, lowest) = corrupted["none"][1], min((pair[1], name) for name, pair in corrupted.items())
    mean = np.mean([pair[1] for name, pair in corrupted.items() if name not in ("none", *corruptions.UNSEEN)])
    finding = (
        f"With {views} view(s) the network is correct on {percent(plain)} % of {images:,} unchanged {subject.part} images, and on "
        f"{percent(mean)} %, on average, with noise, blur, other light and the like; worst is {lowest} with {percent(low)} %. "
        f"After an attack of at most {strength:g} {UNIT_NAME[task]} it is correct, with one view and on {len(sample.floats)} images, on "
        f"{percent(accuracies['FGSM', strength])} % (one step) or {percent(accuracies['PGD', strength])} % ({PGD_STEPS} steps). "
        f"The most important band is {by_mean} if a band is replaced by its mean, and {by_another} if it is replaced by another image's."
    )
    everyday = [
        [name, percent(one), f"{percent(all_views)} ({interval_text(all_views, images)})"]
        for name, (one, all_views) in corrupted.items()
    ]
    tables = [
        {
            "caption": f"Accuracy (%) on {images:,} {subject.part} images",
            "header": ["change", "one view", f"{views} view(s)"],
            "rows": everyday,
        },
        {
            "caption": f"Accuracy (%) by strength, one view; FGSM and PGD: {len(sample.floats)} images",
            "header": ["change", "strength: accuracy"],
            "rows": rows,
        },
    ]
    subject.write(finding, tables, figures, plain=plain, corrupted={name: pair[1] for name, pair in corrupted.items()})


def draw_robustness(sample: Sample, accuracies: dict[tuple[str, float], float]) -> None:
    """Accuracy against strength, one panel for each kind of change; bands and cloud as bars."""
    subject, unit = sample.subject, UNIT_NAME[sample.subject.task.name]
    panels = {f"attack, at most ({unit})": ["FGSM", "PGD"], f"noise ({unit})": ["noise"], "blur (pixels)": ["blur"]}
    panels["gain"] = ["gain"]
    if subject.task.name == "rgb":
        panels["JPEG quality"] = ["JPEG quality"]
    figure, grid = plt.subplots(2, 3, figsize=(6.9, 4.2), layout="constrained")
    plain = 100 * accuracies["none", 0.0]
    for axes, (label, kinds) in zip(grid.flat, panels.items()):
        for kind, colour, style in zip(kinds, COLOURS[1::2], ("-", "--")):
            points = sorted((strength, 100 * value) for (k, strength), value in accuracies.items() if k == kind)
            axes.plot(*zip(*points, strict=True), color=colour, linestyle=style, marker="o", markersize=3, label=kind)
        axes.axhline(plain, color="#777777", linewidth=0.6)
        axes.set(xlabel=label, ylim=(0, 102))
        if len(kinds) > 1:
            axes.legend(frameon=False)
    is_bar = {kind: kind.startswith(("without", "cloud")) or kind.endswith("image") for kind, _ in accuracies}
    bars = {kind: 100 * value for (kind, _), value in accuracies.items() if is_bar[kind]}
    axes = grid.flat[len(panels)]
    axes.barh(range(len(bars)), bars.values(), color="#CCCCCC")
    axes.set_yticks([])
    for row, (name, value) in enumerate(bars.items()):
        axes.text(1, row, f"{name}: {value:.1f}", fontsize=min(6, 72 / len(bars)), va="center")
    axes.set(xlabel="accuracy (%)", xlim=(0, 102), ylim=(len(bars) - 0.4, -0.6))
    for axes in grid.flat[len(panels) + 1 :]:
        axes.set_axis_off()
    for axes in grid[:, 0]:
        axes.set_ylabel("accuracy (%)")
    title = (
        f"{subject.task.title}: accuracy on {len(sample.labels):,} changed {subject.part} images, of attacks on "
        f"{len(sample.floats)}; grey line: unchanged ({plain:.1f} %)"
    )
    figure.suptitle(title, fontsize=8, x=0.01, ha="left")
    save(figure, subject.folder / "robustness.png", subject.final.sha256)


def draw_attacked(sample: Sample) -> list[str]:
    """attacked.png: of each class the first image whose prediction one step makes wrong; original, attacked, change."""
    subject = sample.subject
    strength = ATTACKS[subject.task.name][2]
    attacked = sample.attacked(strength, 1)
    flipped, labels = sample.correct(sample.floats) & ~sample.correct(attacked), sample.labels[: len(attacked)]
    firsts = [int(hits[0]) for label in range(10) if len(hits := (flipped & (labels == label)).nonzero())]
    if not firsts:
        return []
    columns = [sample.final.bands.index(band) for band in RGB.bands]
    with torch.inference_mode():
        predictions = sample.logits(attacked[firsts].to(sample.device)).argmax(1).tolist()
    originals, results, changes = [], [], []
    for index, predicted in zip(firsts, predictions, strict=True):
        before, after = sample.floats[index, columns], attacked[index, columns]
        grey = (127.5 * (1 + (after - before) / (strength * sample.unit))).clamp(0, 255).permute(1, 2, 0)
        originals.append((as_picture(before, subject.task), CLASSES[sample.labels[index]], False))
        results.append((as_picture(after, subject.task), CLASSES[predicted], True))
        changes.append((grey.to(torch.uint8).numpy(), "the change", False))
    title = (
        f"{subject.task.title}: one step of at most {strength:g} {UNIT_NAME[subject.task.name]} changes these predictions, one of "
        "each class.\nFrom above: the original, the attacked image with its prediction in red, the change"
    )
    rows = [("", originals), ("", results), ("", changes)]
    contact_sheet(subject.folder / "attacked.png", rows, title, subject.final.sha256, width=6.9)
    return ["attacked.png"]


def as_picture(pixels: torch.Tensor, task: Task) -> np.ndarray:
    """(3, 64, 64) red, green, blue with the numbers of a file, to (64, 64, 3) uint8 as a person sees it."""
    image = pixels.permute(1, 2, 0).double().numpy()
    return image.round().astype(np.uint8) if task.name == "rgb" else stretch_to_uint8(image)


if __name__ == "__main__":
    run(main, __doc__, choices=TASKS)
