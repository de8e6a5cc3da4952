"""Does classify.py mark what is no land-use patch as unlike the training set, and leave real patches unmarked?

Run from the project root: python -m studies.novelty_check; with `rgb` or `ms` for one task. A minute.

It makes 200 strange images of five kinds, 40 of each: clouds (white to grey fractal noise that nearly covers a dark ground),
noise (uniform, normal and constant), photographs and textures (crops of the pictures in scikit-image and scikit-learn),
microscopy and astronomy (same packages), and radar (grey, gamma-distributed speckle). For RGB they are 8-bit images without
loss; for six bands they are taken as reflectances, with the grey image in the infrared.

For RGB it also saves real patches, which are not in the lists of train and val, in other ways and opens them as classify.py
does: as 16-bit and float tif from the multispectral files, as PNG, and as JPEG of several qualities. classify.py leaves the
marks of a JPEG out if its quality alone would bring them; the line says so.

The threshold comes from val alone. The features in scenes/novelty.py were chosen with such images of another seed: the
network's features marked 16 % of them, mean colours and covariances all of them (three bands).

If predict_test.py was never run on a model, val stands for test, and real patches in other encodings are left out.

reads   the final models, features.pt beside them (made if it is missing), the lists, the images
writes  nothing but a temporary folder; prints one line for each kind and for the test list
"""

import math
import tempfile
from collections.abc import Callable
from pathlib import Path

from base.command_line import run
from base.project import MS, RGB, TASKS, Task, config

import numpy as np
import skimage.data
import tifffile
import torch
from PIL import Image as Picture
from skimage.color import gray2rgb
from skimage.transform import resize
from sklearn.datasets import load_sample_images

from augment import preprocess
from dataset import SIDE, band_indices, find_images, read_image, stretch_to_uint8
from engine.final_model import FinalModel
from engine.results import BATCH_SIZE
from scenes.novelty import TrainingFeatures, training_features
from scenes.opening import jpeg_pixels, open_image
from studies.subject import Subject, subjects

EACH = 40
PHOTOGRAPHS = ("astronaut", "chelsea", "coffee", "rocket", "brick", "grass", "gravel", "camera", "coins")
SCIENCE = ("immunohistochemistry", "hubble_deep_field", "retina", "moon", "cell", "microaneurysms")


def main(tasks: list[Task]) -> None:
    strange = strange_images(np.random.default_rng(1))
    for subject in subjects(tasks, "novelty_check", tested=False):
        task, final = subject.task, subject.final
        reference = training_features(config.dataset_root, task, final)
        if reference is None:
            continue
        print(f"{task.title}: threshold {reference.threshold:.2f}")
        data = subject.images(subject.part)
        distances = [reference.distances(data[indices][0]) for indices in torch.arange(len(data)).split(BATCH_SIZE)]
        print_share(f"{subject.part} patches", reference, torch.cat(distances))
        distances = {kind: reference.distances(as_input(final, task, images)) for kind, images in strange.items()}
        for kind, values in (*distances.items(), ("all strange images", torch.cat(list(distances.values())))):
            print_share(kind, reference, values)
        if task is RGB and subject.results:
            check_encodings(subject, reference)


def check_encodings(subject: Subject, reference: TrainingFeatures) -> None:
    """Real patches saved in other ways; those that have a multispectral file and are not in the lists of train and val."""
    used = set(subject.lists["train"].patches + subject.lists["val"].patches)
    found = {patch: file for patch, file in (find_images(config.dataset_root, MS) or {}).items() if patch not in used}
    bands = band_indices(MS, RGB.bands)
    tifs = [read_image(f"{config.dataset_root}/{file}", MS)[:, :, bands] for file in found.values()]
    jpegs = find_images(config.dataset_root, RGB) or {}
    patches = [read_image(f"{config.dataset_root}/{jpegs[patch]}", RGB) for patch in found if patch in jpegs]
    for kind, images, suffix, write in encodings(tifs, patches):
        pixels, comparable = [], True
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / f"patch.{suffix}"
            for image in images:
                write(path, image)
                with open_image(path) as opened:
                    pixels.append(opened.training_pixels(RGB.name, RGB.bands))
                    comparable &= opened.comparable
        if pixels:
            inputs = to_input(subject.final, np.stack(pixels))
            print_share(
                f"real patches, {kind}{'' if comparable else ' (marks left out)'}",
                reference,
                reference.distances(inputs),
            )


def encodings(tifs: list[np.ndarray], patches: list[np.ndarray]) -> list[tuple[str, list[np.ndarray], str, Callable]]:
    """Name, images, ending of the file and how to write it."""
    shape = {"photometric": "minisblack", "planarconfig": "contig"}
    forms = [
        ("16-bit tif", tifs, "tif", lambda path, image: tifffile.imwrite(path, image, **shape)),
        (
            "float tif",
            tifs,
            "tif",
            lambda path, image: tifffile.imwrite(path, (image / 1e4).astype(np.float32), **shape),
        ),
        ("PNG of the stretched tif", [stretch_to_uint8(image) for image in tifs], "png", save_picture()),
        ("PNG of the JPEG", patches, "png", save_picture()),
    ]
    for name, sampling, qualities in (("full", 0, (100, 95, 90)), ("halved", 2, (100, 99, 98, 95, 90, 75))):
        for quality in qualities:
            write = save_picture(quality=quality, subsampling=sampling)
            forms.append((f"JPEG of quality {quality}, {name} colours", patches, "jpg", write))
    return forms


def save_picture(**options) -> Callable:
    return lambda path, image: Picture.fromarray(image).save(path, **options)


def print_share(kind: str, reference: TrainingFeatures, distances: torch.Tensor) -> None:
    marked = int((distances > reference.threshold).sum())
    share = f"{marked} of {len(distances)} marked, {marked / len(distances):.1%}"
    print(f"  {kind}: {share}; median distance {distances.median():.1f}")


def as_input(final: FinalModel, task: Task, images: np.ndarray) -> torch.Tensor:
    """Red, green, blue in [0, 1], (images, 64, 64, 3), to the model's input, (images, bands, 64, 64)."""
    if task is RGB:
        pixels = np.stack([jpeg_pixels(image) for image in np.rint(images * 255).astype(np.uint8)])
    else:
        grey = images.mean(axis=-1)
        planes = [images[..., RGB.bands.index(band)] if band in RGB.bands else grey for band in final.bands]
        pixels = np.rint(np.stack(planes, axis=-1) * 2750).astype(np.uint16)
    return to_input(final, pixels)


def to_input(final: FinalModel, pixels: np.ndarray) -> torch.Tensor:
    """(images, 64, 64, bands) to (images, bands, 64, 64), on the CPU."""
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
    """A random square of 64 to 200 pixels of a picture, resized to 64 pixels."""
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
