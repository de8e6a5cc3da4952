"""Your images: a patch gets a class, a scene becomes a land-use map.

    python classify.py FILE…      a second for a patch on a CPU; 100 windows a second or more for a scene

A FILE is a JPEG, PNG, GeoTIFF, JPEG 2000 or VRT, a Sentinel-2 product (.SAFE, .SAFE.zip), or a folder with one file for each
band. What has all bands of the six-band model is for that model, what has red, green and blue for the RGB model. 64 × 64
pixels are a patch. Anything larger is a scene: windows of 64 pixels every 16 pixels are classified and their probabilities
averaged, so a cell of the map is 160 m.

The RGB model is that of `full`, if there is one, before that of `course`.
A model names one of its ten classes for every image. An image is marked UNLIKE if it is further from all training images than
99 % of the val images are.

reads   outputs/<profile>/<task>/final_model.pt, and features.pt beside it, which is made if it is missing and the data set is
        there
writes  outputs/classify/patches.csv, and for each scene a folder there: classes.tif with the names in classes.tif.aux.xml;
        in percent probabilities.tif and uncertainty.tif (one minus the largest probability); unlike.tif; map.png; shares.csv;
        polygons.geojson (WGS 84) if the scene has a position
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

from dataset import SIDE, stretch_to_uint8
from engine.final_model import FinalModel, load_model, model_path
from engine.runtime import choose_device
from scenes.map_figure import MAP_COLOURS, land_use_map
from scenes.maps import NO_CLASS, map_scene, predict_images, write_map
from scenes.novelty import TrainingFeatures, training_features
from scenes.opening import Image, open_image

STRIDE = 16  # pixels from one window of a scene to the next: the map's cells
PICTURE = 1500  # pixels of the map's picture at most, in each direction
HEADER = [
    *("file", "class_name", "probability", "runner_up", "its_probability", "distance", "unlike_training_set"),
    *("model", "model_sha256"),
]
OUTPUTS = config.project_root / "outputs" / "classify"
PATCHES = "patches.csv"
LONGEST_NAME = 100  # bytes of a folder's name
PATCH = SIDE, SIDE  # rows and columns


def main(files: list[Path]) -> None:
    check_files(files)
    rows = []
    for file in files:
        with open_image(file) as image:
            if image.size == PATCH:
                rows.append(classify_patch(image))
            else:
                classify_scene(image)
    if rows:
        write_csv(OUTPUTS / PATCHES, HEADER, rows)
        print(f"wrote {display_path(OUTPUTS / PATCHES)}")


def check_files(files: list[Path]) -> None:
    """Open all files and load their models, so that a mistake in the last is reported before the first takes its hours."""
    notes, scenes = {}, {}
    for file in files:
        with open_image(file) as image:
            model_for(image)
            for note in image.notes:
                notes.setdefault(note, []).append(file)
            name = folder_name(image.path).lower()
            if image.size != PATCH and scenes.setdefault(name, file) != file:
                raise UserError(f"{scenes[name]} and {file} would be written to the same folder; rename one")
    for note, (file, *others) in notes.items():
        print(f"note: {file}{f' and {len(others)} more' * bool(others)}: {note}")


def model_for(image: Image) -> tuple[FinalModel, TrainingFeatures | None]:
    """The model that has an image's bands, and what the image is compared with; None if it cannot be."""
    may_be_six = len(image.bands) > 3 and not image.eight_bits and model_path(MS).exists()
    six = loaded(MS)[0].bands if may_be_six else ()
    task = MS if six and set(six) <= set(image.bands) else RGB
    why = f"the six-band model needs {' '.join(six)}" if six else "there is no six-band model, or there are only 8 bits"
    if task is RGB and not set(RGB.bands) <= set(image.bands):
        raise UserError(
            f"{image.path} has {' '.join(image.bands)}; the RGB model needs {' '.join(RGB.bands)}, and {why}"
        )
    if task is RGB and len(image.bands) > 3:
        image.notes.append(f"only red, green and blue are used: {why}")
    final, reference = loaded(task)
    return final, reference if image.comparable else None


@functools.cache
def loaded(task: Task) -> tuple[FinalModel, TrainingFeatures | None]:
    full = task.of_profile("full")
    used = full if (config.profile, task) == ("course", RGB) and model_path(full).exists() else task
    final = load_model(used, choose_device())
    print(f"{task.title} model: {final.file}, setting {final.setting.name}")
    return final, training_features(config.dataset_root, used, final)


def folder_name(path: Path) -> str:
    """The file's name without its ending. If it cannot name a folder, characters are replaced and a hash is added."""
    stem = unicodedata.normalize("NFC", path.resolve().stem)
    name = re.sub(r"[^\w .()+,=@-]", "_", stem).encode("utf-8", "replace")[:LONGEST_NAME]
    name = name.decode("utf-8", "ignore").strip(". ")
    if name == stem and name.lower() not in ("", PATCHES):
        return name
    return f"{name or 'scene'}-{sha256(stem.encode('utf-8', 'surrogateescape'))[:8]}"


def classify_patch(image: Image) -> list:
    """Print the line of a patch, and return its row."""
    final, reference = model_for(image)
    pixels = image.training_pixels(final.metadata["task"], final.bands)
    if not pixels.any():
        raise UserError(f"{image.path} holds no-data only; give another image")
    probabilities, distances = predict_images(final, pixels[None], reference, final.setting.views)
    (first, second), (best, next_best) = (values.tolist() for values in probabilities[0].topk(2)[::-1])
    distance, unlike = float(distances[0]), bool(reference and distances[0] > reference.threshold)
    mark = f"; UNLIKE the training set: distance {distance:.1f}, threshold {reference.threshold:.1f}" if unlike else ""
    print(f"{image.path}: {CLASSES[first]} {best:.1%}, then {CLASSES[second]} {next_best:.1%}{mark}", flush=True)
    marked = [f"{distance:.4g}", "yes" if unlike else "no"] if reference else ["", ""]
    name = str(image.path).encode("utf-8", "replace").decode()
    answer = [CLASSES[first], f"{best:.6g}", CLASSES[second], f"{next_best:.6g}"]
    return [name, *answer, *marked, final.file, final.sha256]


def classify_scene(image: Image) -> None:
    """Write a scene's map, and print its largest classes."""
    final, reference = model_for(image)
    place, metres = OUTPUTS / folder_name(image.path), image.metres
    land_use = map_scene(image, final, reference, STRIDE)
    shares, hectares = land_use.areas / land_use.areas.sum(), land_use.areas * metres**2 / 10_000
    write_map(place, image, land_use, MAP_COLOURS)
    rows = [
        [name, f"{share:.6g}", f"{area:.6g}", final.file, final.sha256]
        for name, share, area in zip(CLASSES, shares, hectares, strict=True)
    ]
    write_csv(place / "shares.csv", ["class_name", "share", "hectares", "model", "model_sha256"], rows)
    bands = RGB.bands if set(RGB.bands) <= set(image.bands) else final.bands[:3]
    smaller = max(1, *(side / PICTURE for side in image.size))
    picture = image.read(bands, shape=tuple(round(side / smaller) for side in image.size))
    if not image.eight_bits:
        picture = np.where(picture.any(axis=-1, keepdims=True), stretch_to_uint8(picture), 0)
    land_use_map(place / "map.png", picture, land_use, image.size, metres)
    order = [index for index in np.argsort(-shares, kind="stable")[:3] if shares[index] > 0]
    said = ", ".join(f"{CLASSES[index]} {shares[index]:.0%}" for index in order)
    if reference:
        unlike = land_use.unlike[land_use.classes != NO_CLASS].mean()
        said += f"; {unlike:.0%} UNLIKE the training set (threshold {reference.threshold:.1f})"
    rows, columns = land_use.classes.shape
    print(f"{image.path}: {columns} x {rows} cells of {STRIDE * metres:.0f} m: {said}")
    print(f"wrote {display_path(place)}/classes.tif, …, map.png, shares.csv")


if __name__ == "__main__":
    run(main, __doc__, files="an image, a product, or a folder of single-band files; or several of these")
