"""Images of one's own, a patch or a scene: opened, read window by window, with their units said.

EuroSAT is level 1C: top-of-atmosphere reflectance x 10,000 without an offset, 10 m per pixel; its RGB images are that,
stretched to 8 bits. What is known of an image's units comes from its metadata, and everything assumed is said in `notes`.
"""

import contextlib
import re
import warnings
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import rasterio
import simplejpeg
from rasterio.enums import ColorInterp, Resampling
from rasterio.errors import NotGeoreferencedWarning, RasterioError
from rasterio.vrt import WarpedVRT
from rasterio.windows import Window

from dataset import IMAGE_SETS, MS_BANDS, SIDE, stretched
from project import UserError

RGB_BANDS = IMAGE_SETS["rgb"].bands
# As products and tables have them, with B8A beside B08.
SPECTRAL_ORDER = (*MS_BANDS[:8], "B8A", *MS_BANDS[8:12])
DRIVERS = ("GTiff", "JPEG", "PNG", "JP2OpenJPEG")
# "T32TQM_20180718T101031_B02.jp2", of level 2A "…_B02_10m.jp2"; the quality masks (MSK_…) are no bands.
BAND_FILE = re.compile(r"(?!MSK_).*_(B0[1-9]|B1[0-2]|B8A)(?:_(\d\d)m)?\.(?:jp2|tiff?)", re.IGNORECASE)
# GDAL reads what is left of a damaged JPEG otherwise; and may keep so many bytes, instead of 5 % of the memory.
GDAL_OPTIONS = {"GDAL_ERROR_ON_LIBJPEG_WARNING": True, "GDAL_CACHEMAX": 256 * 2**20}
METRES = 10  # a pixel's side in EuroSAT


# Units -----------------------------------------------------------------------------------------------------------


def offsets_in(metadata: Path) -> dict[str, int]:
    """What the metadata of a product (MTD_MSIL1C.xml, MTD_MSIL2A.xml) says is to be added to each band's values.

    Raises:
        UserError: the file is damaged.
    """
    try:
        elements = list(ElementTree.parse(metadata).iter())
        stated = [element for element in elements if element.tag in ("RADIO_ADD_OFFSET", "BOA_ADD_OFFSET")]
        return {SPECTRAL_ORDER[int(element.attrib["band_id"])]: int(element.text) for element in stated}
    except (ElementTree.ParseError, OSError, KeyError, ValueError, TypeError, IndexError) as error:
        raise UserError(f"{metadata} is damaged ({error}); bring it back, or move it away") from error


# Opening ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Image:
    """An open image.

    Attributes:
        path: as the user names it: a file, or a folder of single-band files.
        sources: opened files of one size, and the names of the bands in each.
        offsets: to be added to a band's values, where there is one.
        notes: what is assumed of its units and bands, a line each.
    """

    path: Path
    sources: list[tuple[rasterio.DatasetReader, tuple[str, ...]]]
    offsets: dict[str, int]
    notes: list[str]

    @property
    def grid(self) -> rasterio.DatasetReader:
        """What has its width, height, crs and transform."""
        return self.sources[0][0]

    @property
    def bands(self) -> tuple[str, ...]:
        return tuple(band for _, bands in self.sources for band in bands)

    @property
    def task(self) -> str:
        """Whose model it is for: three bands are red, green and blue."""
        return "rgb" if len(self.bands) == 3 else "ms"

    @property
    def is_patch(self) -> bool:
        return (self.grid.height, self.grid.width) == (SIDE, SIDE)

    @property
    def metres(self) -> float:
        """A pixel's side; EuroSAT's where the image does not say."""
        crs, pixel = self.grid.crs, float(np.hypot(self.grid.transform.a, self.grid.transform.d))
        if crs is None:
            return METRES
        return pixel * (111_320 if crs.is_geographic else crs.linear_units_factor[1])

    def read(self, bands: Sequence[str], window: Window, shape: tuple[int, int] | None = None) -> np.ndarray:
        """Pixels as the networks were trained on, (rows, columns, bands) uint8 or uint16; 0 in all bands is no-data.

        Args:
            shape: rows and columns, where fewer pixels are wanted than the window has.

        Raises:
            UserError: the file is damaged there.
        """
        planes, valid = {}, False
        try:
            for dataset, names in self.sources:
                if chosen := [band for band in names if band in bands]:
                    what = {"indexes": [names.index(band) + 1 for band in chosen], "window": window}
                    what["out_shape"] = (len(chosen), *shape) if shape else None
                    planes |= zip(chosen, dataset.read(**what))
                    valid = valid | dataset.read_masks(**what).any(axis=0)
        except RasterioError as error:
            raise UserError(f"{self.path} is damaged ({_reason(error)}); bring it again") from error
        valid = valid & np.any(list(planes.values()), axis=0)
        for band, offset in self.offsets.items():
            if band in planes:
                planes[band] = planes[band].astype(np.int32) + offset
        pixels = np.stack([planes[band] for band in bands], axis=-1)
        if pixels.dtype != np.uint8:
            pixels = stretched(pixels) if self.task == "rgb" else np.clip(pixels, 0, 65535).astype(np.uint16)
        pixels[~valid] = 0
        return pixels


@contextlib.contextmanager
def open_image(path: Path) -> Iterator[Image]:
    """Open a JPEG, PNG or tif, or a folder of single-band files.

    Raises:
        UserError: it is none, too small, or has other bands than a model takes.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore", NotGeoreferencedWarning)
        stack.enter_context(rasterio.Env(**GDAL_OPTIONS))
        image = _open_folder(path, stack) if path.is_dir() else _open_file(path, stack)
        for dataset, _ in image.sources:
            if {*dataset.dtypes} - {"uint8", "uint16", "int16"} or ("uint8" in dataset.dtypes and image.task == "ms"):
                raise UserError(
                    f"{dataset.name} holds {dataset.dtypes[0]}; reflectances x 10,000 in 16 bits are needed, or 8-bit RGB"
                )
        if min(image.grid.width, image.grid.height) < SIDE:
            size = f"{image.grid.width} x {image.grid.height}"
            raise UserError(f"{path} has {size} pixels; {SIDE} x {SIDE} are the least")
        if not 0.8 < image.metres / METRES < 1.25:
            image.notes.append(
                f"{path} has pixels of {image.metres:.3g} m, the models know {METRES} m: resample it for answers to trust"
            )
        yield image


def _open_raster(path: Path, stack: contextlib.ExitStack) -> rasterio.DatasetReader:
    if not path.exists():
        raise UserError(f"{path} does not exist")
    try:
        dataset = stack.enter_context(rasterio.open(path))
        if dataset.driver not in DRIVERS:
            raise ValueError(f"it is {dataset.driver}")
        if dataset.driver != "JPEG" or dataset.count != 3:
            return dataset
        # GDAL's decoder gives other pixels, by up to 4, than the one whose pixels the models were trained on.
        profile = {**dataset.profile, "driver": "GTiff", "compress": None, "photometric": None, "tiled": False}
        pixels = simplejpeg.decode_jpeg(path.read_bytes())
        memory = stack.enter_context(rasterio.MemoryFile())
        with memory.open(**profile) as copy:
            copy.write(pixels.transpose(2, 0, 1))
        return stack.enter_context(memory.open())
    except (RasterioError, OSError, ValueError) as error:
        raise UserError(f"{path} is damaged or no JPEG, PNG or GeoTIFF ({_reason(error)})") from error


def _reason(error: Exception) -> str:
    return " ".join(str(error.__cause__ or error).split())[:150]


def _open_file(path: Path, stack: contextlib.ExitStack) -> Image:
    dataset = _open_raster(path, stack)
    colours = [kind for kind in dataset.colorinterp if kind != ColorInterp.alpha]  # alpha is in the masks
    bands = tuple(_band_name(text) for text in dataset.descriptions[: len(colours)])
    reflectances = dataset.dtypes[0] != "uint8"
    notes = []
    if all(bands) and len(set(bands)) == len(bands) > 2:
        notes.append(f"{path}: bands by the names in the file, {' '.join(bands)}")
    elif len(colours) == 3:
        bands = RGB_BANDS
        if reflectances:
            notes.append("three unnamed bands of 16 bits are taken as red, green, blue (B04, B03, B02)")
    elif len(colours) == len(MS_BANDS):
        bands = MS_BANDS
    else:
        raise UserError(
            f"{path} has {len(colours)} band{'s' * (len(colours) != 1)}; 3 (red, green, blue) or 13 are needed, or more than "
            "3 whose names the file holds (B02, B8A, …)"
        )
    if reflectances:
        notes.append(
            "values are taken as reflectance x 10,000 without offset, as no metadata says otherwise; in a product of "
            "baseline 04.00 or later (since January 2022) each is 1000 too high unless its offset was taken off"
        )
    else:
        notes.append("8-bit RGB is taken as EuroSAT's stretch: 1 to 255 are reflectances of 0 to 0.275")
    image = Image(path, [(dataset, bands)], {}, notes)
    if len(bands) == 13 and not any(dataset.descriptions):
        _check_unnamed(image)
    if len(bands) > 3 and "B10" not in bands:
        notes.append(LEVEL_2A)
    return image


LEVEL_2A = "there is no B10, as in level 2A (corrected for the atmosphere): the models know level 1C, trust them less"


def _band_name(text: str | None) -> str | None:
    """ "B02" of "B2", "b02" or "B02, blue"; None of what names no band."""
    found = re.match(r"B(\d{1,2}A?)\b", text or "", re.IGNORECASE)
    name = "B" + found[1].upper().zfill(2) if found else None
    return name if name in MS_BANDS else None


def _check_unnamed(image: Image) -> None:
    """Thirteen bands without names are in EuroSAT's order only if the tenth looks like B10.

    Cirrus reflects next to nothing at the ground's level: over the 1,231 patches at hand the tenth mean is 4 to 45 and at
    most 1.06 times the lowest other one; in the order of the spectrum all of them fail.
    """
    whole = Window(0, 0, image.grid.width, image.grid.height)
    sample = image.read(MS_BANDS, whole, shape=(min(128, image.grid.height), min(128, image.grid.width)))
    known = sample[sample.any(axis=-1)]
    if len(known) == 0:
        return  # of no-data only: said later
    means = known.mean(axis=0)
    others = np.delete(means, 9)
    if not (means[9] < 100 and means[9] < 1.5 * others.min()):
        raise UserError(
            f"{image.path} has 13 bands without names, and the tenth (mean {means[9]:.0f}, the lowest other {others.min():.0f}) "
            f"does not look like B10: EuroSAT's order is {' '.join(MS_BANDS)}; if yours is {' '.join(SPECTRAL_ORDER)}, "
            "reorder the bands, or name them in the file"
        )


def _open_folder(path: Path, stack: contextlib.ExitStack) -> Image:
    """A folder as Copernicus delivers it, `.SAFE` or what lies in one."""
    files: dict[str, tuple[int, Path]] = {}
    for file in sorted(path.rglob("*")):
        if found := BAND_FILE.fullmatch(file.name):
            band, metres = found[1].upper(), int(found[2] or 0)
            if band in files and files[band][0] == metres:
                raise UserError(
                    f"{path} has two files of {band}: {files[band][1].name} and {file.name}; give one scene"
                )
            if band not in files or metres < files[band][0]:  # of level 2A the finest
                files[band] = (metres, file)
    if not files:
        raise UserError(f"{path} has no single-band files (…_B02.jp2, …_B8A.jp2); other images are given as files")
    datasets = {band: _open_raster(file, stack) for band, (_, file) in sorted(files.items())}
    for dataset in datasets.values():
        if dataset.count != 1:
            raise UserError(f"{dataset.name} has {dataset.count} bands instead of one")
    grid = max(datasets.values(), key=lambda dataset: dataset.width)
    for band, dataset in datasets.items():
        if dataset.shape != grid.shape:
            if not (dataset.crs and grid.crs):
                raise UserError(
                    f"{dataset.name} has other pixels than {grid.name}, and no position to lay it over that"
                )
            # As EuroSAT's bands of 20 and 60 m were resampled.
            place = {"crs": grid.crs, "transform": grid.transform, "width": grid.width, "height": grid.height}
            datasets[band] = stack.enter_context(WarpedVRT(dataset, resampling=Resampling.cubic_spline, **place))
    first = {band: dataset for band, dataset in datasets.items() if dataset is grid}
    image = Image(path, [(dataset, (band,)) for band, dataset in (first | datasets).items()], {}, [])
    image.offsets.update(_offsets_of_product(path, image.notes))
    if len(files) > 3 and "B10" not in files:
        image.notes.append(LEVEL_2A)
    return image


def _offsets_of_product(folder: Path, notes: list[str]) -> dict[str, int]:
    """The offsets of a folder's product; a note says what is done."""
    product = next(
        (place for place in (folder.resolve(), *folder.resolve().parents) if place.suffix == ".SAFE"), folder
    )
    metadata = sorted(product.rglob("MTD_MSIL*.xml"))
    if not metadata:
        notes.append(
            f"{folder} has no metadata (MTD_MSIL1C.xml), so nothing is taken off its values; in a product of baseline 04.00 "
            "or later (since January 2022) each is then 1000 too high"
        )
        return {}
    offsets = offsets_in(metadata[0])
    values = ", ".join(str(value) for value in sorted(set(offsets.values())))
    says = f"an offset of {values}, which is added to all values" if any(offsets.values()) else "no offset"
    notes.append(f"{metadata[0].name} states {says}")
    return offsets
