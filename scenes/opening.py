"""Open an image from outside EuroSAT, a patch or a scene, and read it in EuroSAT's units.

EuroSAT is level 1C: top-of-atmosphere reflectance times 10,000 without an offset, 10 m per pixel. Its RGB images are these
reflectances, stretched to 8 bits and saved as JPEG. Units that a file states are applied; `notes` say what is assumed.
"""

import contextlib
import io
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from base.errors import UserError
from base.files import reading
from base.project import MS_BANDS, RGB

import numpy as np
import PIL.Image
import rasterio
import simplejpeg
from rasterio.enums import Compression
from rasterio.windows import Window

from dataset import SIDE, stretch_to_uint8
from scenes.files import SPECTRAL_ORDER, Files, Source, open_files
from scenes.grids import crs_of, grid_of, laid_over

# GDAL would decode what is left of a damaged JPEG, and keep 5 % of the memory.
GDAL_OPTIONS = {"GDAL_ERROR_ON_LIBJPEG_WARNING": True, "GDAL_CACHEMAX": 256 * 2**20}
LARGEST = 60_000  # pixels in a row; a JPEG cannot have many more
# A JPEG with full or halved colours is compared with the training set from these qualities on: of real patches saved so, some
# 2 % are marked (studies/novelty_check.py).
FULL_COLOURS, HALVED_COLOURS = 95, 99
LUMINANCE_MEAN = 57.6  # of the table in the JPEG standard (annex K), which is quality 50 by the IJG's scale
SAMPLE = 256  # rows and columns, at most, that are looked at to tell units and order
FRACTIONS = 3  # which reflectances from 0 to 1 do not exceed, and
DARK = 50  # which reflectances times 10,000 do exceed: 99 of 100 values, and one of them
SATURATED = 2750  # reflectance times 10,000 from which on EuroSAT's RGB is white
# In all visible bands that is 0.4 % of EuroSAT's pixels, and at most 30 % of a patch's.
BRIGHT, TOO_BRIGHT = 0.5, 0.9
OFFSET = 1000  # of processing baseline 04.00 and later (since January 2022)
# Of level 2A's scene classification: no data, saturated, cloud shadows, clouds (two probabilities), thin cirrus.
MASKED = (0, 1, 3, 8, 9, 10)
ADVICE = "save it as reflectances, from 0 to 1 in float32 or times 10,000 in uint16"


@dataclass(frozen=True)
class Image:
    """An open image."""

    path: Path  # of the file, or of the folder or archive of single-band files
    grid: dict  # of the pixels that are read: "crs" (None: no position), "transform", "width", "height"
    metres: float  # the side of a pixel
    sources: list[Source]  # on that grid
    units: dict[str, tuple[float, float]]  # {band: (scale, offset)} to reflectance times 10,000
    notes: list[str]  # what was done and assumed
    eight_bits: bool  # RGB stretched to 8 bits, not reflectances
    training_jpeg: bool = False  # its pixels are those of a JPEG like the training set's
    comparable: bool = True  # with the training set; no loss by compression sets it apart
    classification: rasterio.DatasetReader | None = None  # level 2A's scene classification, on the grid

    @property
    def bands(self) -> tuple[str, ...]:
        return tuple(band for _, indices in self.sources for band in indices)

    @property
    def size(self) -> tuple[int, int]:
        """Rows and columns."""
        return self.grid["height"], self.grid["width"]

    def values(self, bands: Sequence[str], window: Window | None = None, shape: tuple | None = None) -> tuple:
        """Reflectances times 10,000, (rows, columns, bands) float32, and which pixels have data, (rows, columns) bool.

        A pixel has no data if all bands are 0, negative, the largest number of their type, or tagged as missing. It has none
        either if one band is tagged and not 0; a correction for the atmosphere sets water to 0 in some bands. With `shape`,
        (rows, columns), the pixels are thinned out to it.

        Raises:
            UserError: the file is damaged there.
        """
        planes, empty, broken = {}, True, False
        with reading(self.path, "bring it again"), np.errstate(over="ignore"):
            for dataset, indices in self.sources:
                if chosen := [band for band in indices if band in bands]:
                    options = {"window": window, "out_shape": (len(chosen), *shape) if shape else None}
                    options["indexes"] = [indices[band] for band in chosen]
                    raw, missing = dataset.read(**options), dataset.read_masks(**options) == 0
                    largest = (np.finfo if raw.dtype.kind == "f" else np.iinfo)(raw.dtype).max
                    full = (raw == largest) & (largest > 255)  # in 8 bits it is white
                    empty &= (missing | (raw <= 0) | full).all(axis=0)
                    broken |= (missing & (raw != 0) | ~np.isfinite(raw)).any(axis=0)
                    planes |= zip(chosen, raw.astype(np.float32))
            if self.classification:
                broken |= np.isin(self.classification.read(1, window=window, out_shape=shape), MASKED)
            values = np.stack([planes[band] * self.units[band][0] + self.units[band][1] for band in bands], axis=-1)
        return values, ~(empty | broken)

    def read(self, bands: Sequence[str], window: Window | None = None, shape: tuple | None = None) -> np.ndarray:
        """As `values`, in uint8 or uint16. A pixel is 0 in all bands if it has no data, and only then."""
        values, valid = self.values(bands, window, shape)
        values[~valid] = 0
        dtype = np.uint8 if self.eight_bits else np.uint16
        pixels = np.rint(values.clip(0, np.iinfo(dtype).max)).astype(dtype)
        pixels[valid & ~pixels.any(axis=-1)] = 1
        return pixels

    def training_pixels(self, task: str, bands: Sequence[str], window: Window | None = None) -> np.ndarray:
        """As `read`, in the form of the images that the task trains with: reflectances, or what EuroSAT's JPEGs hold."""
        pixels = self.read(bands, window)
        if task == "ms" or self.training_jpeg:
            return pixels
        decoded = jpeg_pixels(pixels if self.eight_bits else stretch_to_uint8(pixels))
        return np.where(pixels.any(axis=-1, keepdims=True), decoded.clip(1), 0)


def jpeg_pixels(pixels: np.ndarray) -> np.ndarray:
    """(rows, columns, 3) uint8 as EuroSAT's JPEGs have it; a patch's stretched reflectances become its pixels bit for bit."""
    return simplejpeg.decode_jpeg(simplejpeg.encode_jpeg(np.ascontiguousarray(pixels), 100, colorsubsampling="420"))


@contextlib.contextmanager
def open_image(path: Path) -> Iterator[Image]:
    """Open an image, or a product or folder of single-band files.

    Raises:
        UserError: it is no image, too small, or its units or bands are ambiguous or not Sentinel-2's.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings(action="ignore", category=UserWarning))  # no position
        stack.enter_context(rasterio.Env(**GDAL_OPTIONS))
        files = open_files(path, stack)
        image = _on_grid(files, stack)
        yield _of_eight_bits(image, files) if image.eight_bits else _in_units(image, files)


def _on_grid(files: Files, stack: contextlib.ExitStack) -> Image:
    """The image on one grid, in the units that it states."""
    path, datasets, codes = files.path, [dataset for dataset, _ in files.sources], files.classification
    finest = max(datasets, key=lambda dataset: dataset.width)
    for dataset in filter(None, (*datasets, codes)):
        apart = np.abs(np.subtract(dataset.bounds, finest.bounds)).max()
        if crs_of(dataset) != crs_of(finest) or apart > (max(dataset.res) if crs_of(finest) else 0):
            raise UserError(f"{dataset.name} and {finest.name} do not show the same ground; give one scene")
    grid, metres = grid_of(path, finest, files.notes)
    if min(grid["width"], grid["height"]) < SIDE or max(grid["width"], grid["height"]) > LARGEST:
        size = f"{grid['width']:,} x {grid['height']:,} pixels of {metres:.3g} m"
        raise UserError(f"{path} has {size}; {SIDE} x {SIDE} are the least, and {LARGEST:,} the most in a row")
    sources = [(laid_over(grid, path, dataset, stack), indices) for dataset, indices in files.sources]
    codes = codes and laid_over(grid, path, codes, stack, codes=True)
    units = dict.fromkeys((band for _, indices in sources for band in indices), (1, 0)) | files.units
    types = {dataset.dtypes[index - 1] for dataset, indices in sources for index in indices.values()}
    eight_bits = types == {"uint8"} and not files.units
    return Image(path, grid, metres, sources, units, files.notes, eight_bits, classification=codes)


def _of_eight_bits(image: Image, files: Files) -> Image:
    image.notes.append("8-bit RGB is taken as EuroSAT's stretch: 1 to 255 are reflectances of 0 to 0.275")
    native, path, quality, colours = files.sources[0][0], image.path, 100, None
    if native.compression == Compression.jpeg:  # in a tif
        quality = int(native.tags(ns="IMAGE_STRUCTURE").get("JPEG_QUALITY", 75))
    elif path.is_file() and path.open("rb").read(3) == b"\xff\xd8\xff":
        with reading(path, "save it again"):
            content = path.read_bytes()
            relative = float(np.mean(PIL.Image.open(io.BytesIO(content)).quantization[0])) / LUMINANCE_MEAN
            quality = round(100 - 50 * relative if relative < 1 else 50 / relative)
            colours = simplejpeg.decode_jpeg_header(content)[3]
    comparable = quality >= (FULL_COLOURS if colours == "444" else HALVED_COLOURS)
    if not comparable:
        image.notes.append(f"nothing is marked UNLIKE, as JPEG of quality {quality} alone makes an image so")
    return replace(image, comparable=comparable, training_jpeg=colours == "420" and image.sources[0][0] is native)


def _in_units(image: Image, files: Files) -> Image:
    """The image with its units settled, by a sample of its pixels; what no reflectance can be is refused."""
    path, notes, shape = image.path, image.notes, tuple(min(SAMPLE, side) for side in image.size)
    sample, valid = image.values(image.bands, shape=shape)
    if image.classification:
        codes = image.classification.read(1, out_shape=shape)
        share = np.isin(codes, MASKED[1:]).sum() / max(1, (codes != MASKED[0]).sum())
        notes.append(f"the scene classification masks {share:.1%} of it: clouds, their shadows, saturated pixels")
    if not valid.any():
        raise UserError(f"{path} holds no-data only, or what its scene classification masks; give another part of it")
    sample = sample[valid]  # (pixels, bands)
    fractional = files.units or any("float" in name for dataset, _ in image.sources for name in dataset.dtypes)
    if fractional and np.percentile(sample, 99) <= FRACTIONS:
        sample *= 10_000
        image = replace(image, units={band: (10_000 * a, 10_000 * b) for band, (a, b) in image.units.items()})
        notes.append("reflectances from 0 to 1 are multiplied by 10,000")
    if np.percentile(sample, 99) <= DARK:
        raise UserError(f"{path} has hardly a value above {DARK} (percent? a mask? 8 bits stored as 16?); {ADVICE}")
    visible = [image.bands.index(band) for band in RGB.bands if band in image.bands]
    white = (sample[:, visible] > SATURATED).all(axis=1).mean() if len(visible) == 3 else 0
    said = f"{white:.0%} of its pixels have red, green and blue above {SATURATED}"
    if white > TOO_BRIGHT:
        causes = "times 65,535 instead of 10,000, as EO Browser has them? stretched for the eye? snow or cloud alone?"
        raise UserError(f"{path}: {said} ({causes}); {ADVICE}")
    if white > BRIGHT:
        notes.append(f"{said}: snow, cloud, or another scale")
    without_offset = "B10" in image.bands and _cirrus_is_dark(image, sample.mean(axis=0), files.unnamed)
    if "B10" not in image.bands and len(image.bands) > 3:
        notes.append("there is no B10, as in level 2A (corrected for the atmosphere), but the models learned level 1C")
    if not (files.units or without_offset):
        notes.append(
            "values are taken as reflectance x 10,000 without offset, as no metadata says otherwise; in a product of baseline "
            f"04.00 or later (since January 2022) each is {OFFSET} too high unless its offset was taken off"
        )
    return image


def _cirrus_is_dark(image: Image, means: np.ndarray, unnamed: bool) -> bool:
    """Whether the mean of B10 shows that the values have no offset. A UserError says that they have one, or another order.

    Cirrus reflects next to nothing at the ground's level: over the 1,231 patches at hand the tenth mean is 4 to 45 and at
    most 1.06 times the lowest other one; in the order of the spectrum all of them fail.
    """
    index = image.bands.index("B10")
    cirrus, other = means[index], np.delete(means, index).min()
    dark, raised = (-50 < cirrus - o < 100 and cirrus - o < 1.5 * max(other - o, 1) for o in (0, OFFSET))
    if raised or (unnamed and not dark):
        high = f"{OFFSET:,} too high, as since baseline 04.00: subtract {OFFSET:,}, or keep MTD_MSIL1C.xml beside the bands"
        order = f"not in EuroSAT's order, {' '.join(MS_BANDS)}: name them; or if it is {' '.join(SPECTRAL_ORDER)}, reorder them"
        raise UserError(
            f"{image.path}: its B10 has the mean {cirrus:.0f} (the lowest of the others {other:.0f}) and should be near 0, so its "
            f"{f'values are {high}' if raised else f'bands without names are {order}'}"
        )
    return dark
