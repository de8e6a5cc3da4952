"""How robust is the network? Accuracy on test images that are attacked, or degraded by noise, blur, clouds or a missing band.

Run from the project root: python -m studies.robustness; with `rgb` or `ms` for one task. Ten minutes for RGB on 2 CPU cores. It
uses 200 test images drawn with the seed (all, if there are fewer) and one view. Strengths are in pixel values (0 to 255) for
RGB and in reflectance for the multispectral set.

reads   the final model, the test images
writes  outputs/<profile>/<task>/robustness/: study.json, robustness.csv, robustness.png, attacked.png
"""

from collections.abc import Iterator

from base.command_line import run
from base.files import write_csv
from base.project import CLASSES, RGB, TASKS, Task, config

import matplotlib.pyplot as plt
import numpy as np
import simplejpeg
import torch
import torch.nn.functional as F
from scipy.ndimage import gaussian_filter

from dataset import stretch_to_uint8
from engine.plots import COLOURS, contact_sheet, save
from studies.subject import Subject, percent, subjects

IMAGES = 200
BATCH = 50
UNIT = {"rgb": 1, "ms": 10_000}  # a strength of 1 in the numbers of a file: a pixel value, or a reflectance
UNIT_NAME = {"rgb": "of 255 pixel values", "ms": "of reflectance"}
ATTACKS = {"rgb": (0.5, 1, 4), "ms": (0.0005, 0.001, 0.004)}  # largest change of any pixel
PGD_STEPS = 10
NOISE = {"rgb": (2, 5, 10, 20), "ms": (0.002, 0.005, 0.01, 0.02)}  # standard deviation of normal noise
BLUR = (0.5, 1, 1.5, 2)  # pixels, standard deviation of a Gaussian
GAIN = (0.5, 0.75, 1.25, 1.5)
QUALITY = (90, 50, 20, 10)
CLOUD = {"rgb": 235, "ms": 0.3}  # pixel value or reflectance of a bright cloud


def main(tasks: list[Task]) -> None:
    for subject in subjects(tasks, "robustness"):
        sample = Sample(subject)
        accuracies = dict(measurements(sample))
        rows = [[kind, f"{strength:g}", f"{accuracy:.4f}"] for (kind, strength), accuracy in accuracies.items()]
        write_csv(subject.folder / "robustness.csv", ["change", "strength", "accuracy"], rows)
        draw_robustness(subject, accuracies, len(sample.labels))
        write_robustness_study(subject, accuracies, len(sample.labels), ["robustness.png", *draw_attacked(sample)])


class Sample:
    """The chosen test images. `pixels` are (images, bands, 64, 64) float32 with the numbers of the files."""

    def __init__(self, subject: Subject) -> None:
        data = subject.images("test")
        order = np.random.default_rng(config.seed).permutation(len(data))[:IMAGES]
        self.subject, self.chosen, self.device = subject, np.sort(order), subject.device
        self.pixels = torch.from_numpy(data.pixels[self.chosen].astype(np.float32)).permute(0, 3, 1, 2).contiguous()
        self.labels = torch.from_numpy(subject.lists["test"].labels[self.chosen])
        self.highest = float(np.iinfo(data.pixels.dtype).max)
        self.bands, self.unit = subject.final.bands, UNIT[subject.task.name]
        self.mean, self.std = (v[:, None, None].to(self.device) for v in (subject.final.mean, subject.final.std))
        self.model = subject.final.model.eval()

    def logits(self, pixels: torch.Tensor) -> torch.Tensor:
        """Logits of pixels (batch, bands, 64, 64) on the device, differentiable."""
        return self.model((pixels / self.highest - self.mean) / self.std)

    def correct(self, pixels: torch.Tensor) -> torch.Tensor:
        """(images,) bool."""
        with torch.inference_mode():
            predictions = [self.logits(batch.to(self.device)).argmax(1).cpu() for batch in pixels.split(BATCH)]
        return torch.cat(predictions) == self.labels

    def accuracy(self, pixels: torch.Tensor) -> float:
        return self.correct(pixels).double().mean().item()

    def attacked(self, strength: float, steps: int) -> torch.Tensor:
        """The pixels, each changed by at most `strength` to increase the loss.

        One step is FGSM (Goodfellow et al., ICLR 2015). Several steps are PGD (Madry et al., ICLR 2018), which starts at
        the image and takes steps of 2.5 · strength / steps.
        """
        limit = strength * self.unit
        size = limit if steps == 1 else 2.5 * limit / steps
        changed = []
        for batch, labels in zip(self.pixels.split(BATCH), self.labels.split(BATCH), strict=True):
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


def measurements(sample: Sample) -> Iterator[tuple[tuple[str, float], float]]:
    """Yield ((what was changed, its strength), accuracy)."""
    task, pixels = sample.subject.task.name, sample.pixels
    yield ("none", 0.0), sample.accuracy(pixels)
    for strength in ATTACKS[task]:
        yield ("FGSM", strength), sample.accuracy(sample.attacked(strength, 1))
        yield ("PGD", strength), sample.accuracy(sample.attacked(strength, PGD_STEPS))
    random = np.random.default_rng(config.seed)
    noise = torch.from_numpy(random.standard_normal(pixels.shape, np.float32))
    for strength in NOISE[task]:
        yield ("noise", strength), sample.accuracy((pixels + strength * sample.unit * noise).clamp(0, sample.highest))
    for sigma in BLUR:
        blurred = gaussian_filter(pixels.numpy(), (0, 0, sigma, sigma), mode="reflect")
        yield ("blur", sigma), sample.accuracy(torch.from_numpy(blurred))
    for gain in GAIN:
        yield ("gain", gain), sample.accuracy((pixels * gain).clamp(0, sample.highest))
    yield ("cloud over half", 0.5), sample.accuracy(clouded(sample, random))
    if task == "rgb":
        for quality in QUALITY:
            yield ("JPEG quality", quality), sample.accuracy(compressed(pixels, quality))
    for index, band in enumerate(sample.bands):
        without = pixels.clone()
        without[:, index] = (sample.mean[index] * sample.highest).cpu()
        yield (f"without {band}", 1), sample.accuracy(without)
        shuffled = pixels.clone()
        shuffled[:, index] = pixels[random.permutation(len(pixels)), index]
        yield (f"{band} of another image", 1), sample.accuracy(shuffled)  # permutation importance (Breiman, 2001)


def clouded(sample: Sample, random: np.random.Generator) -> torch.Tensor:
    """The pixels with a cloud over a random half (left, right, top, bottom): bright, textured, with an edge of 8 pixels."""
    ramp = torch.linspace(-31.5, 31.5, 64).div(2).sigmoid()
    texture = torch.from_numpy(gaussian_filter(random.standard_normal((len(sample.pixels), 64, 64)), (0, 3, 3))).float()
    cloud = CLOUD[sample.subject.task.name] * sample.unit * (1 + 0.5 * texture)[:, None]
    masks = torch.stack([(ramp if k < 2 else ramp.flip(0)).expand(64, 64) for k in range(4)])
    masks[1::2] = masks[1::2].transpose(1, 2).clone()
    mask = masks[random.integers(4, size=len(sample.pixels))][:, None]
    return (sample.pixels * (1 - mask) + cloud * mask).clamp(0, sample.highest)


def compressed(pixels: torch.Tensor, quality: int) -> torch.Tensor:
    """The pixels after JPEG compression of this quality, without chroma subsampling."""
    images = map(np.ascontiguousarray, pixels.permute(0, 2, 3, 1).to(torch.uint8).numpy())
    jpegs = (simplejpeg.encode_jpeg(image, quality, colorsubsampling="444") for image in images)
    return torch.from_numpy(np.stack([simplejpeg.decode_jpeg(jpeg) for jpeg in jpegs])).permute(0, 3, 1, 2).float()


def write_robustness_study(
    subject: Subject, accuracies: dict[tuple[str, float], float], images: int, figures: list[str]
) -> None:
    task, plain, rows = subject.task.name, accuracies["none", 0.0], []
    for kind in dict.fromkeys(kind for kind, _ in accuracies if kind != "none"):
        values = {strength: percent(value) for (k, strength), value in accuracies.items() if k == kind}
        cells = [f"{strength:g}: {value}" for strength, value in values.items()] if len(values) > 1 else values.values()
        rows.append([kind, ", ".join(cells)])
    strength = ATTACKS[task][1]
    worst = (
        min((accuracies[kind.format(band), 1], band) for band in subject.final.bands)
        for kind in ("without {}", "{} of another image")
    )
    by_mean, by_another = (f"{band} ({percent(value)} %)" for value, band in worst)
    finding = (
        f"The network is correct on {percent(plain)} % of {images} unchanged test images. After an attack of at most "
        f"{strength:g} {UNIT_NAME[task]} it is correct on {percent(accuracies['FGSM', strength])} % (one step) or "
        f"{percent(accuracies['PGD', strength])} % ({PGD_STEPS} steps), with a cloud over half of the patch on "
        f"{percent(accuracies['cloud over half', 0.5])} %. The most important band is {by_mean} if a band is replaced by its "
        f"mean, and {by_another} if it is replaced by another image's."
    )
    tables = [{"caption": "Accuracy (%) by strength", "header": ["change", "strength: accuracy"], "rows": rows}]
    subject.write(finding, tables, figures, plain=plain)


def draw_robustness(subject: Subject, accuracies: dict[tuple[str, float], float], images: int) -> None:
    """Accuracy against strength, one panel for each kind of change; bands and cloud as bars."""
    unit = UNIT_NAME[subject.task.name]
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
    title = f"{subject.task.title}: accuracy on {images} changed test images; grey line: unchanged ({plain:.1f} %)"
    figure.suptitle(title, fontsize=8, x=0.01, ha="left")
    save(figure, subject.folder / "robustness.png", subject.final.sha256)


def draw_attacked(sample: Sample) -> list[str]:
    """attacked.png: of each class the first image whose prediction one step makes wrong; original, attacked, change."""
    subject = sample.subject
    strength = ATTACKS[subject.task.name][2]
    attacked = sample.attacked(strength, 1)
    flipped = sample.correct(sample.pixels) & ~sample.correct(attacked)
    firsts = [int(hits[0]) for label in range(10) if len(hits := (flipped & (sample.labels == label)).nonzero())]
    if not firsts:
        return []
    columns = [sample.bands.index(band) for band in RGB.bands]
    with torch.inference_mode():
        predictions = sample.logits(attacked[firsts].to(sample.device)).argmax(1).tolist()
    originals, results, changes = [], [], []
    for index, predicted in zip(firsts, predictions, strict=True):
        before, after = sample.pixels[index, columns], attacked[index, columns]
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
