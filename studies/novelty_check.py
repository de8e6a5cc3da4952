"""Is what is no land-use patch marked as unlike the training set, and what is one not?

    python -m studies.unlike_check          both tasks, a minute

200 strange images in five kinds of 40: clouds (white to grey fractal noise over a dark ground, nearly covered), noise
(uniform, normal and constant), photographs and textures (crops of the pictures that come with scikit-image and
scikit-learn), microscopy and astronomy (the same source), and radar (speckle: gamma-distributed, in grey). For six bands
each is taken as reflectances, with the grey picture in the infrared.

The threshold comes from val alone. What is compared (engine/unlike.py) was chosen with such images of another seed in view:
the network's own features marked 16 % of them, mean colour and covariances all of them (three bands).

reads   the final models, features.pt beside them (made where it is not there), the test lists, the images
writes  nothing: one line for each kind and for the test list
"""

import math

import numpy as np
import skimage.data
import torch
from skimage.color import gray2rgb
from skimage.transform import resize
from sklearn.datasets import load_sample_images

from augment import preprocess
from dataset import IMAGE_SETS, SIDE, EuroSATDataset
from engine.evaluation import FinalModel, in_order, load_model
from engine.splits import read_splits
from engine.unlike import TrainingFeatures, training_features
from project import TASKS, config, outputs_dir, run, splits_dir

EACH = 40
PHOTOGRAPHS = ("astronaut", "chelsea", "coffee", "rocket", "brick", "grass", "gravel", "camera", "coins")
SCIENCE = ("immunohistochemistry", "hubble_deep_field", "retina", "moon", "cell", "microaneurysms")


def main(tasks: tuple[str, ...]) -> None:
    strange = strange_images(np.random.default_rng(1))
    for task in tasks:
        folder, splits = outputs_dir(task), splits_dir(task)
        final = load_model(folder, task, torch.device("cpu"))
        known = training_features(config.dataset_root, folder, splits, task, final)
        if known is None:
            continue
        test = read_splits(splits, task)["test"]
        data = EuroSATDataset(config.dataset_root, task, test, final.bands, (final.mean, final.std))
        print(f"{task}: threshold {known.threshold:.2f}")
        report("test patches", known, torch.cat([known.distances(images) for images, _ in in_order(data)]))
        distances = {kind: known.distances(standardised(final, task, images)) for kind, images in strange.items()}
        for kind, own in distances.items():
            report(kind, known, own)
        report("all strange images", known, torch.cat(list(distances.values())))


def report(kind: str, known: TrainingFeatures, distances: torch.Tensor) -> None:
    marked = int((distances > known.threshold).sum())
    share = f"{marked} of {len(distances)} marked, {marked / len(distances):.1%}"
    print(f"  {kind}: {share}; median distance {distances.median():.1f}")


def standardised(final: FinalModel, task: str, images: np.ndarray) -> torch.Tensor:
    """(images, 64, 64, 3) in [0, 1], red, green, blue, as the model takes them: (images, bands, 64, 64)."""
    if task == "rgb":
        pixels = np.rint(images * 255).astype(np.uint8)
    else:
        grey, colours = images.mean(axis=-1), IMAGE_SETS["rgb"].bands
        planes = [images[..., colours.index(band)] if band in colours else grey for band in final.bands]
        pixels = np.rint(np.stack(planes, axis=-1) * 2750).astype(np.uint16)
    return preprocess(torch.from_numpy(pixels), final.mean, final.std, "none", None)


def strange_images(random: np.random.Generator) -> dict[str, np.ndarray]:
    """{kind: (40, 64, 64, 3) in [0, 1]}."""
    photographs = [getattr(skimage.data, name)() for name in PHOTOGRAPHS]
    photographs += [skimage.data.stereo_motorcycle()[0], *load_sample_images().images]
    science = [getattr(skimage.data, name)() for name in SCIENCE]
    return {
        "clouds": np.stack([cloud(random) for _ in range(EACH)]),
        "noise": np.stack([noise(random, index) for index in range(EACH)]),
        "photographs and textures": np.stack([crop(random, photographs[i % len(photographs)]) for i in range(EACH)]),
        "microscopy and astronomy": np.stack([crop(random, science[i % len(science)]) for i in range(EACH)]),
        "radar speckle": np.stack([speckle(random) for _ in range(EACH)]),
    }


def fractal(random: np.random.Generator, exponent: float) -> np.ndarray:
    """(64, 64) in [0, 1] with a spectrum of 1 / frequency ** exponent."""
    frequency = np.hypot(np.fft.fftfreq(SIDE)[:, None], np.fft.fftfreq(SIDE)[None])
    frequency[0, 0] = math.inf
    field = np.fft.ifft2(np.fft.fft2(random.standard_normal((SIDE, SIDE))) / frequency**exponent).real
    return (field - field.min()) / np.ptp(field)


def cloud(random: np.random.Generator) -> np.ndarray:
    thickness = np.clip(fractal(random, random.uniform(1.5, 2.5)) * 1.5 + random.uniform(-0.2, 0.6), 0, 1)[..., None]
    ground = np.array([0.2, 0.25, 0.28]) + 0.05 * fractal(random, 1.5)[..., None]
    return np.clip(thickness * random.uniform(0.8, 1.2) + (1 - thickness) * ground, 0, 1)


def noise(random: np.random.Generator, index: int) -> np.ndarray:
    shape = (SIDE, SIDE, 3)
    if index % 3 == 0:
        return random.random(shape)
    if index % 3 == 1:
        return np.clip(random.normal(0.4, random.uniform(0.1, 0.3), shape), 0, 1)
    return np.broadcast_to(random.random(3), shape)


def crop(random: np.random.Generator, picture: np.ndarray) -> np.ndarray:
    """A square of 64 to 200 pixels out of a picture, at 64 pixels."""
    picture = picture if picture.ndim == 3 else gray2rgb(picture)
    side = int(random.integers(64, min(200, *picture.shape[:2]) + 1))
    top, left = (int(random.integers(size - side + 1)) for size in picture.shape[:2])
    return resize(picture[top : top + side, left : left + side, :3], (SIDE, SIDE), anti_aliasing=True)


def speckle(random: np.random.Generator) -> np.ndarray:
    ground = 0.1 + 0.6 * fractal(random, random.uniform(1, 2))
    looks = random.integers(1, 5)
    return gray2rgb(np.clip(ground * random.gamma(looks, 1 / looks, (SIDE, SIDE)), 0, 1))


if __name__ == "__main__":
    run(main, __doc__, choices=TASKS)
