"""Your own images: a patch gets a class, a scene becomes a land-use map.

    python classify.py FILE…      a patch takes a second on a CPU; a scene some 20 windows a second

A FILE is an image with red, green and blue or with the bands of the six-band model: a JPEG, PNG, GeoTIFF, JPEG 2000 or VRT; or
a Sentinel-2 product (.SAFE, .SAFE.zip); or a folder with one file for each band. What has all bands of the six-band model goes
to that model, anything else to the RGB model. 64 × 64 pixels are a patch. Anything larger is a scene: windows of 64 pixels every
16 pixels are classified and their probabilities averaged, so a cell of the map is 160 m.

The models know ten classes and name one of them for whatever they see. An image is marked UNLIKE if it is further from all
training images than 99 % of the val images are.

reads   outputs/<profile>/<task>/final_model.pt, and features.pt beside it, which is made if it is missing and the data set is
        there
writes  outputs/classify/patches.csv, and for each scene a folder there: classes.tif, probabilities.tif (percent), unlike.tif,
        map.png, shares.csv
"""

import functools
import re
import unicodedata
from pathlib import Path

from base.command_line import run
from base.errors import UserError
from base.files import sha256, write_csv
from base.project import CLASSES, MS, RGB, Task, config, display_path

import numpy as np

from dataset import stretch_to_uint8
from engine.final_model import FinalModel, load_model, model_path
from engine.runtime import choose_device
from scenes.map_figure import MAP_COLOURS, land_use_map
from scenes.maps import NO_CLASS, LandUse, map_scene, predict_images, standardise, write_rasters
from scenes.novelty import TrainingFeatures, training_features
from scenes.opening import Image, open_image

STRIDE = 16  # pixels from one window of a scene to the next: the map's cells
PICTURE = 1500  # pixels of the map's picture at most, in each direction
HEADER = ["file", "class_name", "probability", "runner_up", "its_probability", "distance", "unlike_training_set"]
LONGEST_NAME = 100  # bytes of a folder's name
PATCHES = "patches.csv"


def main(files: list[Path]) -> None:
    check(files)
    rows = []
    for file in files:
        with open_image(file) as image:
            task, final, reference = model_for(image)
            if image.is_patch:
                rows.append(classify_patch(image, task, final, reference))
            else:
                classify_scene(image, final, reference)
    if rows:
        write_csv(folder() / PATCHES, HEADER, rows)
        print(f"wrote {display_path(folder() / PATCHES)}")


def check(files: list[Path]) -> None:
    """Open all files and load their models, so that a mistake in the last is reported before the first takes its hours.

    Raises:
        UserError: a file cannot be classified, or two scenes would be written to one folder.
    """
    notes, scenes = {}, {}
    for file in files:
        with open_image(file) as image:
            task, final, _ = model_for(image)
            notes |= dict.fromkeys(image.notes)
            if unused := [band for band in image.bands if band not in final.bands and task is RGB]:
                missing = ", ".join(band for band in six_bands() if band not in image.bands)
                why = (
                    f"the six-band model also needs {missing}"
                    if missing
                    else "there is no six-band model, or 8 bits are too few"
                )
                notes[f"{file}: the RGB model takes it and leaves out {', '.join(unused)}; {why}"] = None
            if not image.is_patch and scenes.setdefault(folder_name(image.path).lower(), file) != file:
                other = scenes[folder_name(image.path).lower()]
                raise UserError(f"{other} and {file} would be written to the same folder; rename one")
    for note in notes:
        print(f"note: {note}")


def model_for(image: Image) -> tuple[Task, FinalModel, TrainingFeatures | None]:
    """The task and model that an image is for, and what it is compared with, if it is.

    Raises:
        UserError: it has the bands of no model, or there is no such model.
    """
    if six_bands() and set(six_bands()) <= set(image.bands) and not image.eight_bits:
        task = MS
    elif set(RGB.bands) <= set(image.bands):
        task = RGB
    else:
        missing = ", ".join(band for band in RGB.bands if band not in image.bands)
        raise UserError(f"{image.path} has no {missing} (it has {', '.join(image.bands)}), which the RGB model needs")
    final, reference = model_of(task)
    return task, final, None if image.loss else reference


@functools.cache
def model_of(task: Task) -> tuple[FinalModel, TrainingFeatures | None]:
    final = load_model(task, choose_device())
    return final, training_features(config.dataset_root, task, final)


def six_bands() -> tuple[str, ...]:
    """The bands of the final six-band model, none if there is no such model."""
    return model_of(MS)[0].bands if model_path(MS).exists() else ()


# Folders ---------------------------------------------------------------------------------------------------------


def folder() -> Path:
    return config.project_root / "outputs" / "classify"


def folder_name(path: Path) -> str:
    """The name of a scene's folder: the file's name without its ending, if that is a plain name.

    Of any other, what cannot be part of a name is replaced, and a few digits of the hash tell it from others.
    """
    stem = path.resolve().stem
    name = re.sub(r"[^\w .()+,=@-]", "_", unicodedata.normalize("NFC", stem)).strip(". ")
    name = name.encode("utf-8", "replace")[:LONGEST_NAME].decode("utf-8", "ignore").strip(". ")
    if name == stem and name.lower() != PATCHES:
        return name
    return f"{name or 'scene'}-{sha256(stem.encode('utf-8', 'surrogateescape'))[:8]}"


# One image -------------------------------------------------------------------------------------------------------


def classify_patch(image: Image, task: Task, final: FinalModel, reference: TrainingFeatures | None) -> list:
    """Print the line of a patch, and return its row.

    Raises:
        UserError: it has no data.
    """
    pixels = image.network_pixels(task, final.bands, image.whole)
    if not pixels.any():
        raise UserError(f"{image.path} holds no-data only; give another image")
    probabilities, distances = predict_images(final, standardise(final, pixels[None]), reference, final.setting.views)
    (first, second), (best, next_best) = (values.tolist() for values in probabilities[0].topk(2)[::-1])
    distance, unlike = float(distances[0]), bool(reference and distances[0] > reference.threshold)
    mark = f"; UNLIKE the training set: distance {distance:.1f}, threshold {reference.threshold:.1f}" if unlike else ""
    print(f"{image.path}: {CLASSES[first]} {best:.1%}, then {CLASSES[second]} {next_best:.1%}{mark}", flush=True)
    marked = [f"{distance:.4g}", "yes" if unlike else "no"] if reference else ["", ""]
    name = str(image.path).encode("utf-8", "replace").decode()
    return [name, CLASSES[first], f"{best:.6g}", CLASSES[second], f"{next_best:.6g}", *marked]


def classify_scene(image: Image, final: FinalModel, reference: TrainingFeatures | None) -> None:
    """Write a scene's map, and print its largest classes."""
    land_use = map_scene(image, final, reference, STRIDE)
    classes, place, metres = land_use.classes, folder() / folder_name(image.path), STRIDE * image.grid.metres
    has_class = classes != NO_CLASS
    pixels = np.bincount(classes[has_class], land_use.pixels[has_class], minlength=len(CLASSES))
    shares, hectares = pixels / pixels.sum(), pixels * image.grid.metres**2 / 10_000
    write_rasters(place, image, land_use, MAP_COLOURS)
    rows = [[name, f"{share:.6g}", f"{area:.6g}"] for name, share, area in zip(CLASSES, shares, hectares)]
    write_csv(place / "shares.csv", ["class_name", "share", "hectares"], rows)
    draw(place / "map.png", image, final, land_use)
    order = [index for index in np.argsort(-shares, kind="stable")[:3] if shares[index] > 0]
    said = ", ".join(f"{CLASSES[index]} {shares[index]:.0%}" for index in order)
    if reference:
        unlike = land_use.unlike[has_class].mean()
        said += f"; {unlike:.0%} UNLIKE the training set (threshold {reference.threshold:.1f})"
    print(f"{image.path}: {classes.shape[1]} x {len(classes)} cells of {metres:.0f} m: {said}")
    print(f"wrote {display_path(place)}/classes.tif, probabilities.tif, unlike.tif, map.png, shares.csv")


def draw(path: Path, image: Image, final: FinalModel, land_use: LandUse) -> None:
    """The scene, at most PICTURE pixels wide and high, in the model's first three colours if it has no others."""
    bands = RGB.bands if set(RGB.bands) <= set(image.bands) else final.bands[:3]
    size = image.grid.height, image.grid.width
    smaller = max(1, *(pixels / PICTURE for pixels in size))
    picture = image.read(bands, image.whole, tuple(round(pixels / smaller) for pixels in size))
    if not image.eight_bits:
        picture = np.where(picture.any(axis=-1, keepdims=True), stretch_to_uint8(picture), 0)
    land_use_map(path, picture, land_use, tuple(pixels / STRIDE for pixels in size), STRIDE * image.grid.metres)


if __name__ == "__main__":
    run(
        main,
        __doc__,
        files="an image, a product, or a folder of single-band files; several are treated one after another",
    )
