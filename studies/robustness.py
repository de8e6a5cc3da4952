"""What does it take to make the network err? Accuracy on test images that are attacked, or worse than they should be.

Run from the project root: python -m studies.robustness, with `rgb` or `ms` for one task. Ten minutes for RGB on 2 CPU cores: of
200 test images drawn by the seed (all, where there are fewer), with one view. Strengths are in pixel values (0 to 255) for
RGB and in reflectance for the multispectral set.

reads   the final model, the test images
writes  outputs/<profile>/<task>/robustness/: study.json, robustness.csv, robustness.png, attacked.png; cache/
"""

import matplotlib.pyplot as plt
import numpy as np
import simplejpeg
import torch
import torch.nn.functional as F
from scipy.ndimage import gaussian_filter

from dataset import CLASSES, IMAGE_SETS, stretched
from engine.plots import COLOURS, contact_sheet, save
from engine.splits import list_text
from project import TASKS, config, run, write_text
from studies.subject import Subject, percent, subjects

IMAGES = 200
BATCH = 50
# One unit of strength in the files' numbers: a pixel value, or a reflectance of 1.
UNIT = {"rgb": 1, "ms": 10_000}
ATTACKS = {"rgb": (0.5, 1, 4), "ms": (0.0005, 0.001, 0.004)}  # largest change of any pixel
PGD_STEPS = 10
NOISE = {"rgb": (2, 5, 10, 20), "ms": (0.002, 0.005, 0.01, 0.02)}  # standard deviation of normal noise
BLUR = (0.5, 1, 1.5, 2)  # pixels, standard deviation of a Gaussian
GAIN = (0.5, 0.75, 1.25, 1.5)
QUALITY = (90, 50, 20, 10)
CLOUD = {"rgb": 235, "ms": 0.3}  # a bright cloud's pixel value or reflectance


def main(tasks: tuple[str, ...]) -> None:
    for subject in subjects(tasks, "robustness"):
        sample = Sample(subject)
        answers = dict(measurements(sample))
        rows = [[kind, f"{strength:g}", f"{accuracy:.4f}"] for (kind, strength), accuracy in answers.items()]
        write_text(subject.folder / "robustness.csv", list_text(["change", "strength", "accuracy"], rows))
        draw(subject, answers, len(sample.labels))
        leave(subject, answers, len(sample.labels), ["robustness.png", *draw_attacked(sample)])


def leave(subject: Subject, answers: dict[tuple[str, float], float], images: int, figures: list[str]) -> None:
    plain, table = answers["none", 0.0], []
    for kind in dict.fromkeys(kind for kind, _ in answers if kind != "none"):
        own = {strength: percent(value) for (k, strength), value in answers.items() if k == kind}
        said = [f"{strength:g}: {value}" for strength, value in own.items()] if len(own) > 1 else own.values()
        table.append([kind, ", ".join(said)])
    weakest = ATTACKS[subject.task][1]
    lost = (
        min((answers[how.format(band), 1], band) for band in subject.final.bands)
        for how in ("without {}", "{} of another image")
    )
    by_mean, by_another = (f"{band} ({percent(value)} %)" for value, band in lost)
    finding = (
        f"{percent(plain)} % of {images} test images are right as they are. An attack of at most {weakest:g} "
        f"{unit_name(subject.task)} leaves {percent(answers['FGSM', weakest])} % in one step and "
        f"{percent(answers['PGD', weakest])} % in {PGD_STEPS}; half a patch of cloud leaves "
        f"{percent(answers['cloud over half', 0.5])} %. Missed most: {by_mean} where a band is replaced by its mean, "
        f"{by_another} where it is another image's."
    )
    tables = [{"caption": "Accuracy (%) by strength", "header": ["change", "strength: accuracy"], "rows": table}]
    subject.write(finding, tables, figures, plain=plain)


class Sample:
    """The test images drawn, as the files have them: pixels (images, bands, 64, 64) float32, labels (images,)."""

    def __init__(self, subject: Subject) -> None:
        data = subject.images("test")
        order = np.random.default_rng(config.seed).permutation(len(data))[:IMAGES]
        self.subject, self.chosen, self.device = subject, np.sort(order), subject.device
        self.pixels = torch.from_numpy(data.pixels[self.chosen].astype(np.float32)).permute(0, 3, 1, 2).contiguous()
        self.labels = torch.from_numpy(subject.lists["test"].labels[self.chosen])
        self.highest = float(np.iinfo(data.pixels.dtype).max)
        self.bands, self.unit = subject.final.bands, UNIT[subject.task]
        self.mean, self.std = (v[:, None, None].to(self.device) for v in (subject.final.mean, subject.final.std))
        self.model = subject.final.model.eval()

    def logits(self, pixels: torch.Tensor) -> torch.Tensor:
        """Of (batch, bands, 64, 64) on the device; a gradient can be taken."""
        return self.model((pixels / self.highest - self.mean) / self.std)

    def right(self, pixels: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode():
            answers = [self.logits(batch.to(self.device)).argmax(1).cpu() for batch in pixels.split(BATCH)]
        return torch.cat(answers) == self.labels

    def accuracy(self, pixels: torch.Tensor) -> float:
        return self.right(pixels).double().mean().item()

    def attacked(self, strength: float, steps: int, count: int | None = None) -> torch.Tensor:
        """Pixels changed by at most `strength` so as to raise the loss.

        One step is FGSM (Goodfellow et al., ICLR 2015); several are PGD (Madry et al., ICLR 2018) from the image itself,
        each of 2.5 · strength / steps.
        """
        limit = strength * self.unit
        size = limit if steps == 1 else 2.5 * limit / steps
        changed = []
        pixels, labels = self.pixels[:count], self.labels[:count]
        for batch, own in zip(pixels.split(BATCH), labels.split(BATCH), strict=True):
            start = batch.to(self.device)
            now = start.clone()
            for _ in range(steps):
                now.requires_grad_()
                loss = F.cross_entropy(self.logits(now), own.to(self.device), reduction="sum")
                (gradient,) = torch.autograd.grad(loss, now)
                now = now.detach() + size * gradient.sign()
                now = torch.min(torch.max(now, start - limit), start + limit).clamp(0, self.highest)
            changed.append(now.cpu())
        return torch.cat(changed)


def measurements(sample: Sample):
    """Yield ((what was changed, its strength), accuracy)."""
    task, pixels = sample.subject.task, sample.pixels
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
    """A cloud over one half, left, right, top or bottom by chance: bright and white, its edge 8 pixels soft, lightly textured."""
    ramp = torch.linspace(-31.5, 31.5, 64).div(2).sigmoid()
    texture = torch.from_numpy(gaussian_filter(random.standard_normal((len(sample.pixels), 64, 64)), (0, 3, 3))).float()
    cloud = CLOUD[sample.subject.task] * sample.unit * (1 + 0.5 * texture)[:, None]
    masks = torch.stack([(ramp if k < 2 else ramp.flip(0)).expand(64, 64) for k in range(4)])
    masks[1::2] = masks[1::2].transpose(1, 2).clone()
    mask = masks[random.integers(4, size=len(sample.pixels))][:, None]
    return (sample.pixels * (1 - mask) + cloud * mask).clamp(0, sample.highest)


def compressed(pixels: torch.Tensor, quality: int) -> torch.Tensor:
    """As JPEGs of this quality (without chroma subsampling) give them back."""
    images = pixels.permute(0, 2, 3, 1).to(torch.uint8).numpy()
    again = [
        simplejpeg.decode_jpeg(simplejpeg.encode_jpeg(np.ascontiguousarray(image), quality, colorsubsampling="444"))
        for image in images
    ]
    return torch.from_numpy(np.stack(again)).permute(0, 3, 1, 2).float()


def unit_name(task: str) -> str:
    return "of 255 pixel values" if task == "rgb" else "of reflectance"


def draw(subject: Subject, answers: dict, images: int) -> None:
    """Accuracy against strength, a panel for each kind of change; bands and cloud as bars."""
    panels: list[tuple[str, list[str]]] = [
        (f"attack, at most ({unit_name(subject.task)})", ["FGSM", "PGD"]),
        (f"noise ({unit_name(subject.task)})", ["noise"]),
        ("blur (pixels)", ["blur"]),
        ("gain", ["gain"]),
    ]
    if subject.task == "rgb":
        panels.append(("JPEG quality", ["JPEG quality"]))
    figure, grid = plt.subplots(2, 3, figsize=(6.9, 4.2), layout="constrained")
    plain = 100 * answers["none", 0.0]
    for axes, (label, kinds) in zip(grid.flat, panels):
        for kind, colour, style in zip(kinds, COLOURS[1::2], ("-", "--")):
            points = sorted((strength, 100 * value) for (k, strength), value in answers.items() if k == kind)
            axes.plot(*zip(*points, strict=True), color=colour, linestyle=style, marker="o", markersize=3, label=kind)
        axes.axhline(plain, color="#777777", linewidth=0.6)
        axes.set(xlabel=label, ylim=(0, 102))
        if len(kinds) > 1:
            axes.legend(frameon=False)
    bars = {k: 100 * v for (k, _), v in answers.items() if k.startswith(("without", "cloud")) or k.endswith("image")}
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
    title = f"{subject.title}: accuracy on {images} test images, changed in strength; grey line: as they are ({plain:.1f} %)"
    figure.suptitle(title, fontsize=8, x=0.01, ha="left")
    save(figure, subject.folder / "robustness.png", subject.final.sha256)


def draw_attacked(sample: Sample) -> list[str]:
    """attacked.png: each class's first image that one step turns, below it what the attack made of it, and the change."""
    subject = sample.subject
    strength = ATTACKS[subject.task][2]
    attacked = sample.attacked(strength, 1)
    turned = sample.right(sample.pixels) & ~sample.right(attacked)
    firsts = [
        int(own[0]) for label in range(10) if len(own := torch.nonzero(turned & (sample.labels == label)).flatten())
    ]
    columns = [sample.bands.index(band) for band in IMAGE_SETS["rgb"].bands]
    rows: list[tuple[str, list[tuple[np.ndarray, str, bool]]]] = [("", []) for _ in range(3)]
    with torch.inference_mode():
        answers = sample.logits(attacked[firsts].to(sample.device)).argmax(1).tolist() if firsts else []
    for index, answer in zip(firsts, answers, strict=True):
        pair = [picture(pixels[index, columns], subject.task) for pixels in (sample.pixels, attacked)]
        change = (attacked[index, columns] - sample.pixels[index, columns]) / (strength * sample.unit)
        grey = (127.5 * (1 + change)).clamp(0, 255).permute(1, 2, 0).to(torch.uint8).numpy()
        captions = (CLASSES[sample.labels[index]], CLASSES[answer], "the change")
        for (_, images), image, text in zip(rows, (*pair, grey), captions, strict=True):
            images.append((image, text, text == captions[1]))
    if not firsts:
        return []
    title = (
        f"{subject.title}: the first image of each class that one step of at most {strength:g} {unit_name(subject.task)} "
        "turns. Original, attacked (in red the answer), change"
    )
    contact_sheet(subject.folder / "attacked.png", rows, title, subject.final.sha256, width=6.9)
    return ["attacked.png"]


def picture(pixels: torch.Tensor, task: str) -> np.ndarray:
    """(3, 64, 64), red first, as a person sees it."""
    image = pixels.permute(1, 2, 0).double().numpy()
    return image.round().astype(np.uint8) if task == "rgb" else stretched(image)


if __name__ == "__main__":
    run(main, __doc__, choices=TASKS)
