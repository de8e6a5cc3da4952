"""Where pixels lie on the ground. EuroSAT has 10 m; anything else, and what a projection distorts, is warped as it is read.

A scene whose pixels are 9 to 11 m on the ground, and whose projection says so, keeps its grid. Any other is warped to the UTM
zone of its middle at 10 m, so that areas are true.
"""

import contextlib
import math
from collections.abc import Sequence
from pathlib import Path

from base.errors import UserError
from base.files import reading

import numpy as np
import rasterio
from rasterio.crs import CRS
from rasterio.enums import Resampling
from rasterio.vrt import WarpedVRT
from rasterio.warp import transform as reproject

from dataset import SIDE

METRES = 10  # a pixel's side in EuroSAT
TOLERATED = 1  # metres more or less, for which nothing is resampled
COARSEST = 30  # metres
DISTORTION = 0.02  # by which a projection's metres may differ from metres on the ground
SLIVER = 160  # metres: what is slanted at a warped border, and narrower, is cut off rather than left without data
REMEDY = "give it its true position (gdal_edit -a_srs … -a_ullr …), or none"


def crs_of(dataset: rasterio.DatasetReader) -> CRS | None:
    """None also if no position goes with it."""
    return None if dataset.transform == rasterio.Affine.identity() else dataset.crs


def grid_of(path: Path, dataset: rasterio.DatasetReader, notes: list[str]) -> tuple[dict, float]:
    """The grid to read an image on, {"crs": …, "transform": …, "width": …, "height": …}, and a pixel's side in metres.

    Raises:
        UserError: the position is damaged, or the pixels are above 30 m.
    """
    crs, is_patch = crs_of(dataset), dataset.shape == (SIDE, SIDE)
    native = {"crs": crs, "transform": dataset.transform, "width": dataset.width, "height": dataset.height}
    if crs is None:
        notes.extend([f"it has no position: a pixel is taken as {METRES} m"] * (not is_patch))
        return native, METRES
    t, zero = np.linspace(0, 1, 21), np.zeros(21)
    with reading(path, REMEDY):
        (longitude,), (latitude,) = _positions(dataset, CRS.from_epsg(4326), [[0.5], [0.5]])
        utm = CRS.from_epsg((32600 if latitude >= 0 else 32700) + int((longitude + 180) // 6) % 60 + 1)
        x, y = _positions(dataset, utm, [[0.5, 0.5 + 1 / dataset.width, 0.5], [0.5, 0.5, 0.5 + 1 / dataset.height]])
        pixel = np.hypot(x[1:] - x[0], y[1:] - y[0])  # width and height on the ground
        left, right = _trimmed([_positions(dataset, utm, [side, t])[0] for side in (zero, zero + 1)])
        bottom, top = _trimmed([_positions(dataset, utm, [t, side])[1] for side in (zero, zero + 1)])
    said = f"pixels of {pixel[0]:.3g} x {pixel[1]:.3g} m"
    if pixel.max() > 1.01 * COARSEST:
        raise UserError(f"{path} has {said}; the models learned {METRES} m: give an image of at most {COARSEST} m")
    a, b, _, d, e, _ = dataset.transform[:6]
    stated = np.hypot([a, b], [d, e]) * (0 if crs.is_geographic else crs.linear_units_factor[1])
    if (abs(pixel - METRES) <= TOLERATED).all() and (is_patch or np.allclose(stated, pixel, rtol=DISTORTION)):
        return native, math.sqrt(pixel.prod())
    notes.append(f"{said} in {crs.to_string()[:20]} are resampled to {METRES} m in {utm.to_string()}")
    width, height = (int(length / METRES + 0.01) for length in (right - left, top - bottom))
    transform = rasterio.Affine(METRES, 0, left, 0, -METRES, top)
    return {"crs": utm, "transform": transform, "width": width, "height": height}, METRES


def _positions(dataset: rasterio.DatasetReader, crs: CRS, points: Sequence) -> np.ndarray:
    """Points of an image, as fractions of its width and height, in another coordinate system: x and y, (2, points)."""
    x, y = dataset.transform @ (np.array(points) * [[dataset.width], [dataset.height]])
    there = np.array(reproject(dataset.crs, crs, x, y))
    if not np.isfinite(there).all():
        raise ValueError("its position is nowhere on the Earth")
    return there


def _trimmed(borders: list[np.ndarray]) -> list[float]:
    """The lower and the higher end between two borders, which may come out slanted or curved."""
    low, high = sorted(borders, key=np.mean)
    within, around = (low.max(), high.min()), (low.min(), high.max())
    return [inner if abs(inner - outer) <= SLIVER else outer for inner, outer in zip(within, around, strict=True)]


def laid_over(
    grid: dict, path: Path, dataset: rasterio.DatasetReader, stack: contextlib.ExitStack, codes: bool = False
):
    """The image on the grid: itself if it lies there, else warped as it is read. `codes` cannot be averaged."""
    if grid == {"crs": crs_of(dataset)} | {name: getattr(dataset, name) for name in ("transform", "width", "height")}:
        return dataset
    # As EuroSAT's bands of 20 and 60 m were resampled.
    smooth = Resampling.cubic_spline if dataset.width < 0.7 * grid["width"] else Resampling.cubic
    with reading(path, REMEDY):
        return stack.enter_context(WarpedVRT(dataset, resampling=Resampling.nearest if codes else smooth, **grid))
