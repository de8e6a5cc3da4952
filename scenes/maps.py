"""A scene's land-use map: windows as large as a patch are classified, and their probabilities averaged where they overlap.

In the average a window counts most at its middle (a Hann window). With equal weights the cells in the middle of a patch, among
patches of other classes, agreed with its label in 79 % instead of 92 % (8 x 8 test patches in random order).
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from base.errors import UserError
from base.files import atomic_write, write_text
from base.project import CLASSES

import numpy as np
import rasterio
import torch
from numpy.lib.stride_tricks import sliding_window_view
from rasterio.crs import CRS
from rasterio.features import shapes
from rasterio.warp import transform_geom
from rasterio.windows import Window
from tqdm import tqdm

from dataset import SIDE
from engine.final_model import FinalModel
from scenes.novelty import TrainingFeatures
from scenes.opening import Image
from scenes.shared import BATCH_SIZE, Predicted, shared_layers, standardised

NO_CLASS = 255  # no data, in all rasters that are written
STRIP = 32  # rows of windows that are read at once
# A window with more than this share of no-data does not vote, and a cell with more than the other has no class.
WINDOW_NO_DATA, CELL_NO_DATA = 0.01, 0.5


@dataclass(frozen=True)
class LandUse:
    """What a scene shows, in cells of `stride` pixels from its upper left corner. The last cells hang over its edges."""

    probabilities: np.ndarray  # (10, rows, columns) float32: the mean of the windows that see the cell; nan: no data
    unlike: np.ndarray | None  # (rows, columns) bool: most of them are unlike the training set; None: not compared
    pixels: np.ndarray  # (rows, columns) int: how many of the cell have data
    stride: int

    @property
    def classes(self) -> np.ndarray:
        """(rows, columns) uint8: index in CLASSES, or NO_CLASS."""
        has_class = ~np.isnan(self.probabilities[0])
        return np.where(has_class, self.probabilities.argmax(axis=0), NO_CLASS).astype(np.uint8)

    @property
    def areas(self) -> np.ndarray:
        """(10,): pixels of each class."""
        return np.bincount(self.classes.ravel(), self.pixels.ravel(), minlength=NO_CLASS)[: len(CLASSES)]


@torch.inference_mode()
def predict_images(
    final: FinalModel, pixels: np.ndarray, reference: TrainingFeatures | None, views: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Probabilities (batch, 10) of images (batch, 64, 64, bands), and their distances (batch,) from the training set, or 0."""
    images = standardised(final, pixels)
    probabilities = final.model.eval()(images, views).softmax(1)
    return probabilities.cpu(), reference.distances(images).cpu() if reference else torch.zeros(len(images))


def map_scene(image: Image, final: FinalModel, reference: TrainingFeatures | None, stride: int) -> LandUse:
    """Classify windows of 64 x 64 pixels every `stride` pixels (a divisor of 64), one view each; average where they overlap.

    Those that overlap share the network's first layers if they can (scenes/shared.py).
    If the size is no multiple of the stride, windows at the right and lower edge see the last pixels mirrored.

    Raises:
        UserError: the file is damaged, or holds no-data only.
    """
    span = SIDE // stride  # cells that a window covers in each direction
    weights = np.sin(np.pi * (np.arange(span) + 0.5) / span) ** 2
    rows, columns = (-(-(side - SIDE) // stride) + 1 for side in image.size)  # of windows
    # Of the classes' probabilities, then of how many windows are unlike.
    sums = np.zeros((len(CLASSES) + 1, rows + span - 1, columns + span - 1), np.float32)
    votes, empty, data = np.zeros((3, *sums.shape[1:]), np.float32)
    layers = shared_layers(final, stride)
    predict = layers.predict if layers else partial(separately, final, stride)
    with tqdm(total=rows * columns, desc=image.path.name, unit=" windows", disable=None, leave=False) as bar:
        for row in range(0, rows, STRIP):
            top, bottom = row * stride, min((min(row + STRIP, rows) - 1) * stride + SIDE, image.size[0])
            window = Window(0, top, image.size[1], bottom - top)
            pixels = image.training_pixels(final.metadata["task"], final.bands, window)
            pixels, *shares = _in_cells(image, pixels, stride, columns + span - 1)
            strip = slice(row, row + len(shares[0]))
            empty[strip], data[strip] = shares
            voting = sliding_window_view(empty[strip], (span, span)).mean(axis=(2, 3)) <= WINDOW_NO_DATA
            found = np.zeros((len(CLASSES) + 1, *voting.shape), np.float32)
            bar.update(voting.size - voting.sum())
            for places, probabilities, distances in predict(pixels, voting, reference):
                found[:-1, *places] = probabilities.T
                found[-1, *places] = distances > reference.threshold if reference else 0
                bar.update(len(distances))
            for down, right in np.ndindex(span, span):
                cells = slice(row + down, row + down + len(voting)), slice(right, right + columns)
                sums[:, *cells] += weights[down] * weights[right] * found
                votes[cells] += weights[down] * weights[right] * voting
    votes[empty > CELL_NO_DATA] = 0
    if not votes.any():
        raise UserError(f"{image.path} holds no window of {SIDE} x {SIDE} pixels with data; give another part of it")
    with np.errstate(divide="ignore", invalid="ignore"):
        means = np.where(votes > 0, sums / votes, np.nan)
    return LandUse(means[:-1], means[-1] > 0.5 if reference else None, np.rint(data * stride**2).astype(int), stride)


def _in_cells(image: Image, pixels: np.ndarray, stride: int, columns: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A strip in whole cells, mirrored beyond the scene's edges; in each cell the share of no-data, and of the scene's data."""
    beyond = (0, -len(pixels) % stride), (0, columns * stride - pixels.shape[1])

    def share(values: np.ndarray, mode: str) -> np.ndarray:
        return np.pad(values, beyond, mode).reshape(-1, stride, columns, stride).mean(axis=(1, 3))

    has_data = pixels.any(axis=-1)
    if image.eight_bits:  # white may be a roof, but not everywhere in a cell
        filled = share((pixels == 255).all(axis=-1), "symmetric") == 1
        has_data &= ~filled.repeat(stride, 0).repeat(stride, 1)[: len(pixels), : pixels.shape[1]]
    return np.pad(pixels, (*beyond, (0, 0)), "symmetric"), 1 - share(has_data, "symmetric"), share(has_data, "constant")


def separately(
    final: FinalModel, stride: int, pixels: np.ndarray, voting: np.ndarray, reference: TrainingFeatures | None
) -> Iterator[Predicted]:
    """Predict windows each alone: those of a strip, (height, width, bands), that vote, (rows, columns)."""
    windows = np.moveaxis(sliding_window_view(pixels, (SIDE, SIDE), axis=(0, 1))[::stride, ::stride], 2, -1)
    chosen = np.argwhere(voting)
    for start in range(0, len(chosen), BATCH_SIZE):
        places = tuple(chosen[start : start + BATCH_SIZE].T)
        yield places, *predict_images(final, windows[places], reference, views=1)


def write_map(folder: Path, image: Image, land_use: LandUse, colours: Sequence[str]) -> None:
    """Write the map on the image's grid, and its polygons if the image has a position.

    classes.tif in these colours ("#rrggbb"), and classes.tif.aux.xml, where GIS programs look for the names; in percent
    probabilities.tif and uncertainty.tif, one minus the largest probability; unlike.tif; polygons.geojson.
    """
    classes, crs = land_use.classes, image.grid["crs"]
    percent = np.rint(100 * np.nan_to_num(land_use.probabilities))
    unlike = NO_CLASS if land_use.unlike is None else land_use.unlike
    rasters = {
        "classes": (classes[None], ["class"]),
        "probabilities": (percent, CLASSES),
        "uncertainty": (100 - percent.max(axis=0, keepdims=True), ["percent: one minus the largest probability"]),
        "unlike": (np.broadcast_to(unlike, (1, *classes.shape)), ["1: unlike the training set"]),
    }
    transform = image.grid["transform"] @ rasterio.Affine.scale(land_use.stride)
    place = {"crs": crs, "transform": transform, "height": len(classes), "width": classes.shape[1]}
    for name, (bands, descriptions) in rasters.items():
        profile = {"driver": "GTiff", "dtype": "uint8", "count": len(bands), "nodata": NO_CLASS, "compress": "deflate"}
        with atomic_write(folder / f"{name}.tif") as partial:
            with rasterio.open(partial, "w", **profile, **place) as raster:
                raster.write(np.where(classes == NO_CLASS, NO_CLASS, bands).astype(np.uint8))
                raster.descriptions = descriptions
                if name == "classes":
                    raster.write_colormap(1, {i: tuple(bytes.fromhex(colour[1:])) for i, colour in enumerate(colours)})
                    raster.update_tags(**{str(index): class_name for index, class_name in enumerate(CLASSES)})
    names = "".join(f"<Category>{name}</Category>" for name in CLASSES)
    band = f'<PAMRasterBand band="1"><CategoryNames>{names}</CategoryNames></PAMRasterBand>'
    write_text(folder / "classes.tif.aux.xml", f"<PAMDataset>{band}</PAMDataset>\n")
    if crs:
        features = _polygons(classes, transform, crs, (land_use.stride * image.metres) ** 2)
        write_text(folder / "polygons.geojson", json.dumps({"type": "FeatureCollection", "features": features}))
    else:
        (folder / "polygons.geojson").unlink(missing_ok=True)  # of another image with this name


def _polygons(classes: np.ndarray, transform: rasterio.Affine, crs: CRS, square_metres: float) -> list[dict]:
    """Neighbouring cells of one class as GeoJSON in WGS 84. Their "hectares" count whole cells, of `square_metres` each."""
    found = list(shapes(classes, classes != NO_CLASS, transform=transform))
    areas = []
    for shape, _ in found:  # by the shoelace formula; holes run the other way round
        rings = [np.transpose(ring) for ring in shape["coordinates"]]
        twice = sum(x[:-1] @ y[1:] - x[1:] @ y[:-1] for x, y in (ring - ring[:, :1] for ring in rings))
        areas.append(round(abs(twice / 2 / transform.determinant)) * square_metres / 10_000)
    on_earth = transform_geom(crs, "EPSG:4326", [shape for shape, _ in found], precision=6)
    return [
        {"type": "Feature", "properties": {"class_name": CLASSES[int(index)], "hectares": area}, "geometry": geometry}
        for (_, index), area, geometry in zip(found, areas, on_earth, strict=True)
    ]
