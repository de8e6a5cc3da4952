"""A scene's land-use map: windows as large as a patch, their probabilities averaged where they overlap.

In the average a window counts most at its middle (a Hann window). With equal weights the cells in the middle of a patch, among
patches of other classes, agreed with its label in 79 % instead of 92 % (8 x 8 test patches in random order).
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import rasterio
import torch
from affine import Affine
from numpy.lib.stride_tricks import sliding_window_view
from rasterio.windows import Window
from tqdm import tqdm

from augment import preprocess
from dataset import SIDE
from engine.evaluation import FinalModel
from engine.scenes import Image
from engine.unlike import TrainingFeatures
from project import CLASSES, UserError, atomic_write

NO_CLASS = 255  # no data, in all rasters that are written
BATCH_SIZE = 32  # windows per prediction step
STRIP = 16  # rows of windows that are read at once
# A window with more than this share of no-data does not vote, and a cell with more than the other has no class.
WINDOW_NO_DATA, CELL_NO_DATA = 0.01, 0.5


@dataclass(frozen=True)
class LandUse:
    """What a scene shows, in cells of `stride` pixels from its upper left corner on.

    Attributes:
        probabilities: (10, rows, columns) float32: the average of the windows that see the cell; not-a-number without data.
        unlike: (rows, columns) bool: most of these windows, by their weights, are unlike the training set.
    """

    probabilities: np.ndarray
    unlike: np.ndarray
    stride: int

    @property
    def classes(self) -> np.ndarray:
        """(rows, columns) uint8: index in CLASSES, or NO_CLASS."""
        known = ~np.isnan(self.probabilities[0])
        return np.where(known, self.probabilities.argmax(axis=0), NO_CLASS).astype(np.uint8)


@torch.inference_mode()
def predict_images(
    final: FinalModel, images: torch.Tensor, known: TrainingFeatures | None, views: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Probabilities (batch, 10) of standardised images, and their distances (batch,) from the training set, 0 if unknown."""
    probabilities = final.model.eval()(images, views).softmax(1)
    return probabilities, known.distances(images) if known else torch.zeros(len(images))


def standardise(final: FinalModel, pixels: np.ndarray) -> torch.Tensor:
    """(batch, 64, 64, bands) to (batch, bands, 64, 64) as the model takes it, on its device."""
    device = next(final.model.parameters()).device
    pixels = torch.from_numpy(np.ascontiguousarray(pixels)).to(device)
    return preprocess(pixels, final.mean.to(device), final.std.to(device), "none", None)


def map_scene(image: Image, final: FinalModel, known: TrainingFeatures | None, stride: int) -> LandUse:
    """Classify windows of 64 x 64 pixels every `stride` pixels, one view each, and average where they overlap.

    Less than a cell at the right and lower edge is left out where the scene's size is no multiple of the stride.

    Args:
        stride: divides 64.

    Raises:
        UserError: the file is damaged, or holds no-data only.
    """
    span = SIDE // stride  # cells that a window covers in each direction
    weights = np.sin(np.pi * (np.arange(span) + 0.5) / span) ** 2
    rows, columns = ((size - SIDE) // stride + 1 for size in image.grid.shape)  # of windows
    # Of the classes' probabilities, then of how many windows are unlike.
    sums = np.zeros((len(CLASSES) + 1, rows + span - 1, columns + span - 1), np.float32)
    votes, no_data = np.zeros((2, *sums.shape[1:]), np.float32)
    with tqdm(total=rows * columns, desc=image.path.name, unit=" windows", disable=None, leave=False) as bar:
        for row, pixels in _strips(image, final.bands, stride, rows):
            empty = _means(~pixels.any(axis=-1), stride, stride)  # share of no-data in each cell
            no_data[row : row + len(empty)] = empty
            voting = _means(empty, span, 1) <= WINDOW_NO_DATA  # (window rows, columns)
            windows = sliding_window_view(pixels, (SIDE, SIDE), axis=(0, 1))[::stride, ::stride].transpose(
                0, 1, 3, 4, 2
            )
            found = _look_through(windows, voting, final, known, bar)
            for down, right in np.ndindex(span, span):
                cells = slice(row + down, row + down + len(voting)), slice(right, right + columns)
                sums[:, *cells] += weights[down] * weights[right] * found
                votes[cells] += weights[down] * weights[right] * voting
    if not votes.any():
        raise UserError(f"{image.path} holds no window of {SIDE} x {SIDE} pixels with data")
    votes[no_data > CELL_NO_DATA] = 0
    with np.errstate(divide="ignore", invalid="ignore"):
        averages = np.where(votes > 0, sums / votes, np.nan)
    return LandUse(averages[:-1], averages[-1] > 0.5, stride)


def _look_through(
    windows: np.ndarray, voting: np.ndarray, final: FinalModel, known: TrainingFeatures | None, bar: tqdm
) -> np.ndarray:
    """Probabilities, and 1 behind them for what is unlike the training set, of windows that vote; 0 of the others.

    Args:
        windows, voting: (rows, columns, 64, 64, bands) and (rows, columns).

    Returns:
        (11, rows, columns) float32.
    """
    found = np.zeros((len(CLASSES) + 1, *voting.shape), np.float32)
    chosen = np.argwhere(voting)
    bar.update(voting.size - len(chosen))
    for start in range(0, len(chosen), BATCH_SIZE):
        places = tuple(chosen[start : start + BATCH_SIZE].T)
        probabilities, distances = predict_images(final, standardise(final, windows[places]), known, views=1)
        found[:-1, *places] = probabilities.T.cpu()
        if known:
            found[-1, *places] = (distances > known.threshold).cpu()
        bar.update(len(places[0]))
    return found


def _strips(image: Image, bands: Sequence[str], stride: int, rows: int) -> Iterator[tuple[int, np.ndarray]]:
    """Row of the first window, and the pixels, of STRIP rows of windows after the other; the next is read meanwhile."""

    def read(start: int) -> np.ndarray:
        height = (min(STRIP, rows - start) - 1) * stride + SIDE
        return image.read(bands, Window(0, start * stride, image.grid.width, height))

    with ThreadPoolExecutor(1) as reader:
        ahead = reader.submit(read, 0)
        for start in range(0, rows, STRIP):
            pixels = ahead.result()
            if start + STRIP < rows:
                ahead = reader.submit(read, start + STRIP)
            yield start, pixels


def _means(values: np.ndarray, side: int, step: int) -> np.ndarray:
    """Of squares of `side`, `step` apart, that lie within the array."""
    squares = sliding_window_view(values, (side, side))[::step, ::step]
    return squares.mean(axis=(2, 3), dtype=np.float32)


def write_rasters(folder: Path, image: Image, land_use: LandUse, colours: Sequence[str]) -> None:
    """classes.tif, probabilities.tif (in percent) and unlike.tif, in the scene's projection and position.

    Args:
        colours: of the classes, "#rrggbb".
    """
    classes = land_use.classes
    percent = np.where(classes == NO_CLASS, NO_CLASS, np.rint(100 * np.nan_to_num(land_use.probabilities)))
    unlike = np.where(classes == NO_CLASS, NO_CLASS, land_use.unlike)
    a, b, left, d, e, top = image.grid.transform[:6]
    transform = Affine(a * land_use.stride, b * land_use.stride, left, d * land_use.stride, e * land_use.stride, top)
    place = {"crs": image.grid.crs, "transform": transform, "height": len(classes), "width": classes.shape[1]}
    table = {index: tuple(bytes.fromhex(colour[1:])) for index, colour in enumerate(colours)}
    for name, bands in (("classes", classes[None]), ("probabilities", percent), ("unlike", unlike[None])):
        form = {"driver": "GTiff", "dtype": "uint8", "count": len(bands), "nodata": NO_CLASS, "compress": "deflate"}
        with atomic_write(folder / f"{name}.tif") as partial:
            with rasterio.open(partial, "w", **form, **place) as raster:
                raster.write(bands.astype(np.uint8))
                if name == "classes":
                    raster.write_colormap(1, table)
                    raster.update_tags(**{str(index): class_name for index, class_name in enumerate(CLASSES)})
                elif name == "probabilities":
                    raster.descriptions = CLASSES
