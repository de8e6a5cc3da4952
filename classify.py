"""Your own images: a patch gets a class, a scene becomes a land-use map.

    python classify.py FILE…      a patch takes a second on a CPU; a scene some 20 windows a second

A FILE is a JPEG, PNG or tif of 64 × 64 pixels (10 m each) or more with 3 bands (red, green, blue) or 13, or a folder of
single-band files as Copernicus delivers them (…_B02.jp2, in .SAFE or not). Three bands are for the final RGB model, more
for the one of six bands. 64 × 64 pixels are a patch; anything larger is a scene, seen through windows of 64 pixels every
16, whose probabilities are averaged: a cell of the map is 160 m.

The models know ten classes and name one of them for whatever they see. An image further from all training images than
99 % of the val images are is marked as unlike them.

reads   outputs/<profile>/<task>/final_model.pt, and features.pt beside it, which is made where it is missing and the data
        set is there
writes  outputs/classify/patches.csv, and for each scene a folder there: classes.tif, probabilities.tif (percent), unlike.tif,
        map.png, shares.csv
"""

import functools
from pathlib import Path

import numpy as np

from dataset import CLASSES, IMAGE_SETS, SIDE, stretched
from engine import plots
from engine.evaluation import FinalModel, load_model
from engine.maps import NO_CLASS, map_scene, predict_images, standardise, write_rasters
from engine.runtime import choose_device
from engine.scenes import Image, Window, open_image
from engine.splits import list_text
from engine.unlike import TrainingFeatures, training_features
from project import UserError, config, outputs_dir, run, shown, splits_dir, write_text

STRIDE = 16  # pixels from one window of a scene to the next: the map's cells
PICTURE = 1500  # pixels of the map's picture at most, in each direction
HEADER = ["file", "class_name", "probability", "runner_up", "its_probability", "distance", "unlike_training_set"]


def main(files: list[Path]) -> None:
    check(files)
    rows = []
    for file in files:
        with open_image(file) as image:
            final, known = model_of(image.task)
            if image.is_patch:
                rows.append(classify_patch(image, final, known))
            else:
                classify_scene(image, final, known)
    if rows:
        write_text(folder() / "patches.csv", list_text(HEADER, rows))
        print(f"wrote {shown(folder())}/patches.csv")


def check(files: list[Path]) -> None:
    """Open all and load what they need, so that a mistake in the last is told before the first takes its hours."""
    notes, scenes = {}, {}
    for file in files:
        with open_image(file) as image:
            final, _ = model_of(image.task)
            if missing := [band for band in final.bands if band not in image.bands]:
                raise UserError(
                    f"{file} has no {', '.join(missing)} (it has {', '.join(image.bands)}), which the "
                    f"{IMAGE_SETS[image.task].name} model needs"
                )
            notes |= dict.fromkeys(image.notes)
            if not image.is_patch and scenes.setdefault(name_of(image), file) != file:
                raise UserError(f"{scenes[name_of(image)]} and {file} would be written to the same folder; rename one")
    for note in notes:
        print(f"note: {note}")


@functools.cache
def model_of(task: str) -> tuple[FinalModel, TrainingFeatures | None]:
    final = load_model(outputs_dir(task), task, choose_device())
    return final, training_features(config.dataset_root, outputs_dir(task), splits_dir(task), task, final)


def folder() -> Path:
    return config.project_root / "outputs" / "classify"


def name_of(image: Image) -> str:
    """What a scene's folder is called."""
    return image.path.resolve().stem


def classify_patch(image: Image, final: FinalModel, known: TrainingFeatures | None) -> list:
    """Print the line of a patch, and return its row."""
    pixels = image.read(final.bands, Window(0, 0, SIDE, SIDE))
    if not pixels.any():
        raise UserError(f"{image.path} holds no-data only")
    probabilities, distances = predict_images(final, standardise(final, pixels[None]), known, final.setting.views)
    (first, second), (best, next_best) = (values.tolist() for values in probabilities[0].topk(2)[::-1])
    distance, unlike = float(distances[0]), bool(known and distances[0] > known.threshold)
    mark = f"; UNLIKE the training set: distance {distance:.1f}, threshold {known.threshold:.1f}" if unlike else ""
    print(f"{image.path}: {CLASSES[first]} {best:.1%}, then {CLASSES[second]} {next_best:.1%}{mark}", flush=True)
    marked = [f"{distance:.4g}", "yes" if unlike else "no"] if known else ["", ""]
    return [str(image.path), CLASSES[first], f"{best:.6g}", CLASSES[second], f"{next_best:.6g}", *marked]


def classify_scene(image: Image, final: FinalModel, known: TrainingFeatures | None) -> None:
    """Write a scene's map, and print its largest classes."""
    land_use = map_scene(image, final, known, STRIDE)
    classes, place = land_use.classes, folder() / name_of(image)
    cells = np.bincount(classes[classes != NO_CLASS], minlength=len(CLASSES))
    hectares = cells * (STRIDE * image.metres / 100) ** 2
    shares = cells / cells.sum()
    unlike = land_use.unlike.sum() / cells.sum()
    write_rasters(place, image, land_use, plots.MAP_COLOURS)
    rows = [[name, f"{share:.6g}", f"{area:.6g}"] for name, share, area in zip(CLASSES, shares, hectares)]
    write_text(place / "shares.csv", list_text(["class_name", "share", "hectares"], rows))
    plots.land_use_map(
        place / "map.png", picture_of(image, classes.shape), classes, land_use.unlike, STRIDE * image.metres
    )
    order = [index for index in np.argsort(-shares, kind="stable")[:3] if shares[index] > 0]
    largest = ", ".join(f"{CLASSES[index]} {shares[index]:.0%}" for index in order)
    told = f"; {unlike:.0%} UNLIKE the training set (threshold {known.threshold:.1f})" if known else ""
    print(f"{image.path}: {classes.shape[1]} x {len(classes)} cells of {STRIDE * image.metres:.0f} m: {largest}{told}")
    print(f"wrote {shown(place)}/classes.tif, probabilities.tif, unlike.tif, map.png, shares.csv")


def picture_of(image: Image, cells: tuple[int, int]) -> np.ndarray:
    """The part of the scene that the map covers, in colours, at most PICTURE pixels wide and high: uint8."""
    height, width = (STRIDE * count for count in cells)
    smaller = max(1, height / PICTURE, width / PICTURE)
    shape = (round(height / smaller), round(width / smaller))
    pixels = image.read(IMAGE_SETS["rgb"].bands, Window(0, 0, width, height), shape)
    if pixels.dtype == np.uint8:
        return pixels
    return np.where(pixels.any(axis=-1, keepdims=True), stretched(pixels), 0)


if __name__ == "__main__":
    run(main, __doc__, files="an image, or a folder of single-band images; several are taken one after the other")
