"""Files with bands: an image, or a product or folder with one file for each band. What they claim is checked first.

The names in the files say which band is which; without names, their colours do. What is ambiguous is refused.
"""

import contextlib
import re
import xml.etree.ElementTree as ElementTree
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from base.errors import UserError
from base.files import reading
from base.project import MS_BANDS, RGB

import numpy as np
import rasterio
import simplejpeg
from rasterio.enums import ColorInterp

DRIVERS = ["GTiff", "JPEG", "PNG", "JP2OpenJPEG"]
REMEDY = "give a JPEG, PNG, GeoTIFF, JPEG 2000 or VRT, or a product or folder of single-band files, or bring it again"
DECODED_WHOLE = 200_000_000  # pixels, at most, of what is decoded at once
METADATA = re.compile(r"MTD_MSIL\w+\.xml", re.IGNORECASE)
# The order of products and tables, with B8A beside B08.
SPECTRAL_ORDER = (*MS_BANDS[:8], "B8A", *MS_BANDS[8:12])
# What programs and catalogues call the bands, without separators; besides codes such as B02, b2 and "Band 2".
NAMES = {
    "B01": "coastal coastalaerosol aerosol aerosols ultrablue",
    **{"B02": "blue", "B03": "green", "B04": "red"},
    "B05": "rededge1 rededge071 rededge705 vegetationrededge1",
    "B06": "rededge2 rededge075 rededge740 vegetationrededge2",
    "B07": "rededge3 rededge078 rededge783 vegetationrededge3",
    "B08": "nir nearinfrared nir1 broadnir nirbroad",
    "B8A": "nir08 narrownir nirnarrow nir2 rededge4 vegetationrededge4",
    **{"B09": "nir09 watervapour watervapor", "B10": "cirrus swircirrus"},
    **{"B11": "swir16 swir1 shortwaveinfrared1", "B12": "swir22 swir2 shortwaveinfrared2"},
}
BY_NAME = {name: band for band, names in NAMES.items() for name in names.split()}
BY_CODE = {band.lower().replace("b0", "b"): band for band in MS_BANDS}
BY_COLOUR = {ColorInterp.red: "B04", ColorInterp.green: "B03", ColorInterp.blue: "B02"}
# Words that may stand beside a name, and words of what only mentions a band: masks, indices, products of other satellites.
NEUTRAL = {"band", "reflectance", "surface", "toa", "boa", "sr", "s2", "l1c", "l2a", "raw", "10m", "20m", "30m", "60m"}
FOREIGN = {"msk", "mask", "qa", "st", "sur", "std", "stddev", "index", "ndvi", "ndwi"}
LANDSAT = re.compile(r"HLS\.L30|(?<![A-Za-z])L[COTEM]0[4-9]_|landsat", re.IGNORECASE)
LANDSAT_REFLECTANCE = re.compile(r"(?<![A-Za-z])SR_B(\w+)", re.IGNORECASE)

Source = tuple[rasterio.DatasetReader, dict[str, int]]  # an open file, and where bands lie in it, {band: index from 1}


class Files(NamedTuple):
    """The open files of one scene."""

    path: Path
    sources: list[Source]
    notes: list[str]
    unnamed: bool  # the bands are taken in EuroSAT's order because they have no names
    units: dict[str, tuple[float, float]]  # what is stated, {band: (scale, offset)}; empty if nothing is
    classification: rasterio.DatasetReader | None  # level 2A's scene classification (SCL)


def open_files(path: Path, stack: contextlib.ExitStack) -> Files:
    """Open an image, or a folder or zip archive of single-band files.

    Raises:
        UserError: a file is missing, damaged, too large or no image; the bands are ambiguous or of several scenes.
    """
    if METADATA.fullmatch(path.name) and path.is_file():
        path = path.absolute().parent
    if path.is_dir() or (path.is_file() and path.suffix.lower() == ".zip"):
        files = _open_product(path, stack)
    else:
        dataset = open_raster(path, stack)
        with reading(path, REMEDY):
            names = dataset.descriptions
            if dataset.driver == "VRT" and not any(names) and len(dataset.files) == dataset.count + 1:
                names = [Path(source).stem for source in dataset.files[1:]]  # one file for each band
            indices, unnamed, notes = bands_of_file(path, names, dataset.colorinterp)
        files = Files(path, [(dataset, indices)], notes, unnamed, {}, None)
    with reading(path, "save it again, without tags of scale and offset"):
        bands = [(band, dataset, index - 1) for dataset, indices in files.sources for band, index in indices.items()]
        tags = {band: (dataset.scales[index], dataset.offsets[index]) for band, dataset, index in bands}
        if not np.isfinite([*tags.values()]).all() or not all(scale for scale, _ in tags.values()):
            raise ValueError("a scale or offset in its tags is no number to compute with")
    if set(tags.values()) == {(1, 0)}:
        return files
    applied = ", ".join(sorted({f"x {scale:g} {offset:+g}" for scale, offset in tags.values()}))
    files.notes.append(f"scale and offset in the file's tags are applied: {applied}")
    return files._replace(units=tags)


def open_raster(path: Path, stack: contextlib.ExitStack) -> rasterio.DatasetReader:
    """Open one file, or a member of a zip archive (/vsizip/…).

    Raises:
        UserError: it is missing, damaged, too large to be decoded, no image, or made of files that are not local.
    """
    if not path.is_file() and path.parts[1:2] != ("vsizip",):
        raise UserError(f"{path} {'is no regular file' if path.exists() else 'does not exist'}; {REMEDY}")
    with reading(path, REMEDY):
        is_vrt = path.is_file() and b"<VRTDataset" in path.open("rb").read(4096)
        for element in ElementTree.parse(path).iter() if is_vrt else ():
            if element.tag in ("SourceFilename", "SourceDataset"):
                source = path.parent / element.text if element.get("relativeToVRT") == "1" else Path(element.text)
                if not source.is_file():
                    raise UserError(f"{path} is made of {source}, which is no local file; download it")
                with contextlib.ExitStack() as closing:
                    open_raster(source, closing)
        dataset = stack.enter_context(rasterio.DatasetReader(path, driver=["VRT"] if is_vrt else DRIVERS))
        whole = dataset.driver in ("JPEG", "PNG")
        block = max(rows * columns for rows, columns in [dataset.shape] * whole or dataset.block_shapes)
        if block > DECODED_WHOLE and (whole or dataset.compression):
            size = f"{dataset.width:,} x {dataset.height:,} pixels"
            raise UserError(f"{path} claims {size}, to be decoded at once; cut it, or save it as a tiled GeoTIFF")
        if dataset.driver != "JPEG" or dataset.count != 3:
            return dataset
        # GDAL's decoder gives other pixels, by up to 4, than the one whose pixels the models were trained on.
        profile = {**dataset.profile, "driver": "GTiff", "compress": None, "photometric": "RGB", "tiled": False}
        memory = stack.enter_context(rasterio.MemoryFile())
        with memory.open(**profile) as copy:
            copy.write(simplejpeg.decode_jpeg(path.read_bytes()).transpose(2, 0, 1))
        return stack.enter_context(memory.open())


def _open_product(path: Path, stack: contextlib.ExitStack) -> Files:
    with reading(path, "give a product or folder of single-band files, or unpack the archive"):
        if path.is_dir():
            # If the folder lies inside a product, the metadata lie above it.
            product = next((folder for folder in (path, *path.resolve().parents) if folder.suffix == ".SAFE"), path)
            root, read = path, Path.read_bytes
            inside = [file.relative_to(path) for file in path.rglob("*") if file.is_file()]
            metadata = sorted(product.rglob("MTD_MSIL*.xml"))
        else:
            archive = stack.enter_context(zipfile.ZipFile(path))
            root, read = Path(f"/vsizip/{{{path.absolute()}}}"), lambda file: archive.read(str(file))
            inside = [Path(name.lstrip("/")) for name in archive.namelist() if not name.endswith("/")]
            metadata = [file for file in inside if METADATA.fullmatch(file.name)]
        offsets = _offsets(metadata[0], read(metadata[0])) if metadata else {}
    visible = [file for file in sorted(inside) if not any(part.startswith((".", "__MACOSX")) for part in file.parts)]
    finest = {}
    for band, paths in _files_of_one_scene(path, visible).items():
        opened = sorted((open_raster(root / file, stack) for file in paths), key=lambda dataset: -dataset.width)
        if opened[0].count != 1:
            raise UserError(f"{opened[0].name} has {opened[0].count} bands instead of one; give it as a file")
        if len(opened) > 1 and opened[0].shape == opened[1].shape:
            raise UserError(f"{path} has two files of {band}: {opened[0].name} and {opened[1].name}; give one scene")
        finest[band] = opened[0]
    values = ", ".join(f"{value:g}" for value in sorted(set(offsets.values())) if value)
    says = f"an offset of {values}, which is added to all values" if values else "no offset"
    notes = [f"{file.name} states {says}" for file in metadata[:1]]
    classification = finest.pop("SCL", None)
    units = {band: (1, offsets[band]) for band in finest if metadata}
    return Files(path, [(dataset, {band: 1}) for band, dataset in finest.items()], notes, False, units, classification)


def _files_of_one_scene(path: Path, files: list[Path]) -> dict[str, list[Path]]:
    """{band, or SCL: its files, of several pixel sizes}. All have the same name but for the band and the pixel size."""
    scenes: dict[str, dict[str, list[Path]]] = {}
    for file in files:
        stem = re.sub(r"_\d\dm$|^MSK_.*", "", file.stem)
        last = re.split(r"[_.]", stem)[-1]
        bands = {"SCL"} if last.lower() == "scl" else possible_bands(stem) or possible_bands(last)
        if len(bands) == 1 and file.suffix.lower() in (".jp2", ".tif", ".tiff"):
            (band,) = bands
            name = rf"(?<![A-Za-z0-9])(B0?{band[1:].lstrip('0')}|{re.escape(last)})(?![A-Za-z0-9])"
            scene = re.sub(name, "", stem, flags=re.IGNORECASE)
            scenes.setdefault(scene, {}).setdefault(band, []).append(file)
    for scene, bands in list(scenes.items()):  # Theia has each band twice; SRE is without the correction for slopes
        if not set(bands) & set(MS_BANDS) or ("_SRE" in scene and scene.replace("_SRE", "_FRE") in scenes):
            del scenes[scene]
    found = [[file.name for paths in bands.values() for file in paths] for bands in scenes.values()]
    refuse_landsat(path, [name for names in found for name in names])
    if len(found) != 1:
        several = f"files of several scenes ({' and '.join(names[0] for names in found[:2])}); give a folder of one"
        raise UserError(f"{path} has {several if found else f'no single-band files (…_B02.jp2, B8A.tif, …); {REMEDY}'}")
    return dict(sorted(*(bands.items() for bands in scenes.values())))


def _offsets(path: Path, content: bytes) -> dict[str, float]:
    """What a product's metadata say is to be added to each band's values."""
    offsets, bands = dict.fromkeys(SPECTRAL_ORDER, 0.0), dict(enumerate(SPECTRAL_ORDER))
    with reading(path, "bring it back, or move it away"):
        for element in ElementTree.fromstring(content).iter():
            if element.tag in ("RADIO_ADD_OFFSET", "BOA_ADD_OFFSET"):
                offsets[bands[int(element.attrib["band_id"])]] = float(element.text)
            elif element.tag in ("QUANTIFICATION_VALUE", "BOA_QUANTIFICATION_VALUE") and float(element.text) != 10_000:
                raise ValueError(f"{element.text} instead of 10000 for a reflectance of 1")
        if not np.isfinite([*offsets.values()]).all():
            raise ValueError("an offset is no number")
    return offsets


def possible_bands(text: str) -> set[str]:
    """The bands that a name can mean: {"B02"} of "B2", "blue" or "B02 - Blue"; none of "QA60"; two of "B1 blue"."""
    words = re.findall("[a-z0-9]+", re.sub(r"(?<![a-z])b(and)?[\s_-]*0?(?=\d)", "b", text.lower()))
    codes = {BY_CODE[word] for word in words if word in BY_CODE}
    if len(codes) > 1 or FOREIGN & set(words):  # for example "(B08 - B04) / (B08 + B04)"
        return set()
    rest = "".join(word for word in words if word not in BY_CODE and word not in NEUTRAL)
    return codes | ({BY_NAME[rest]} if rest in BY_NAME else set())


def refuse_landsat(path: Path, names: Sequence[str]) -> None:
    """Landsat numbers its bands otherwise. Its surface reflectances are SR_B1 to SR_B7."""
    reflectances = {found[1] for name in names if (found := LANDSAT_REFLECTANCE.search(name))}
    if any(map(LANDSAT.search, names)) or (reflectances and reflectances <= set("1234567")):
        raise UserError(f"{path} has names of Landsat, and the models learned Sentinel-2; give a Sentinel-2 image")


def bands_of_file(path: Path, descriptions: Sequence, colours: Sequence) -> tuple[dict[str, int], bool, list[str]]:
    """{band: index from 1}; whether they are 13 without names, taken in EuroSAT's order; notes.

    Raises:
        UserError: the names are ambiguous or Landsat's, or there are none and neither 3 nor 13 bands.
    """
    refuse_landsat(path, [path.name, *filter(None, descriptions)])
    data = [index for index, colour in enumerate(colours, start=1) if colour != ColorInterp.alpha]
    texts = {index: (descriptions[index - 1] or "").strip() for index in data}
    # "Band 1", "Band 2", … only count. "B1", "B2", … may count or name; 13 of them count. "B01", "B02", … name.
    code = "b0*" if len(data) == len(MS_BANDS) else "b"
    pattern = rf"((band|layer)?[\s_:#-]*0*|{code})"
    counting = all(re.fullmatch(f"{pattern}{index}", text, re.IGNORECASE) for index, text in texts.items())
    possible = {} if counting else {index: possible_bands(text) for index, text in texts.items()}
    found = {band: index for index, bands in possible.items() for band in bands}
    unclear = counting and texts[1].lower() == "b1" and len(data) not in (1, 2, len(MS_BANDS))
    if unclear or len(found) < sum(map(len, possible.values())) or any(len(bands) > 1 for bands in possible.values()):
        given = ", ".join(texts.values())
        raise UserError(f"{path} has ambiguous names of bands ({given}); write B02, …, B8A, each once")
    coloured = {BY_COLOUR[colour]: index for index, colour in enumerate(colours, start=1) if colour in BY_COLOUR}
    notes, unnamed = [], not found and len(data) == len(MS_BANDS)
    if found:
        notes.append(f"bands by the names in the file, {' '.join(found)}")
    elif unnamed:
        found = dict(zip(MS_BANDS, data, strict=True))
    elif len(coloured) == 3:
        found = coloured
    elif len(data) == 3:
        found = dict(zip(RGB.bands, data, strict=True))
        notes.append("three unnamed bands are taken as red, green, blue (B04, B03, B02)")
    else:
        count = f"{len(data)} band{'s' * (len(data) != 1)} without names of Sentinel-2"
        raise UserError(f"{path} has {count}; 3 (red, green, blue) or 13 are needed, or names, or a folder of bands")
    left_out = [texts.get(i, "alpha") or f"band {i}" for i in range(1, len(colours) + 1) if i not in found.values()]
    notes += [f"left out, as no bands of Sentinel-2: {', '.join(left_out)}"] * bool(left_out)
    return found, unnamed, notes
