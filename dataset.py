"""EuroSAT on disk: where its images lie, how an image is read, and the data set class.

    from torch.utils.data import DataLoader
    from engine.splits import read_split
    split = read_split("rgb", "train")
    train = EuroSATDataset("rgb", split.files, split.labels)  # "ms": bands=("B04", "B03", "B02", "B08", "B11", "B12")
    for images, labels in DataLoader(train, batch_size=32, shuffle=True): ...

`EuroSATDataset` decodes one image at a time and is the way that reads best. Training takes `load_images` instead: the
same pixels, decoded once into one array that is kept in cache/ and memory-mapped from then on.
"""

import contextlib
import hashlib
import io
import json
import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import imagecodecs
import numpy as np
import simplejpeg
import tifffile
from tqdm import tqdm

from project import CLASSES, UserError, atomic_write, config, sha256

# The order of the bands in a EuroSAT GeoTIFF. B8A is last, although tables list it after B08.
MS_BANDS = ("B01", "B02", "B03", "B04", "B05", "B06", "B07", "B08", "B09", "B10", "B11", "B12", "B8A")
SIDE = 64  # pixels, 10 m each


@dataclass(frozen=True)
class ImageSet:
    """One of the two image sets.

    Attributes:
        bands: bands of a file, in the file's order. A JPEG's red, green and blue are B04, B03 and B02.
        suffixes: of its files, in lower case.
        folders: where the archives in circulation put the class folders, below the data set root.
    """

    name: str
    bands: tuple[str, ...]
    dtype: type
    suffixes: tuple[str, ...]
    folders: tuple[str, ...]


IMAGE_SETS = {
    "rgb": ImageSet(
        name="RGB",
        bands=("B04", "B03", "B02"),
        dtype=np.uint8,
        suffixes=(".jpg", ".jpeg"),
        folders=(".", "EuroSAT_RGB", "2750", "eurosat/2750", "EuroSAT"),
    ),
    "ms": ImageSet(
        name="multispectral",
        bands=MS_BANDS,
        dtype=np.uint16,
        suffixes=(".tif", ".tiff"),
        folders=(".", "EuroSAT_MS", "ds/images/remote_sensing/otherDatasets/sentinel_2/tif", "EuroSATallBands"),
    ),
}


# Finding images --------------------------------------------------------------------------------------------------

ROOT_REMEDY = "set DATASET_ROOT in config.py (or EUROSAT_DATASET_ROOT) to the folder that holds the unpacked archives"


def find_images(task: str, root: Path | None = None) -> dict[str, str] | None:
    """Find all images of a set, in any of the layouts in circulation; litter beside them is passed over.

    Args:
        root: where to look; the data set root without.

    Returns:
        {patch: file}: "Forest/Forest_1" to the file relative to the data set root, sorted by patch; None where the
        data set root holds no image of this set.

    Raises:
        UserError: the data set root cannot be read, a class has no image, or two files are of the same patch.
    """
    root, image_set = root or config.dataset_root, IMAGE_SETS[task]
    classes: dict[str, dict[str, str]] = {}
    try:
        if not root.is_dir():
            raise UserError(
                f"the data set root {root} is {'not a folder' if root.exists() else 'not there'}; {ROOT_REMEDY}"
            )
        for candidate in image_set.folders:  # the one with most images: a stray folder does not hide the data set
            in_candidate = {name: _images_in(root, candidate, name, image_set.suffixes) for name in CLASSES}
            if sum(map(len, in_candidate.values())) > sum(map(len, classes.values())):
                folder, classes = candidate, in_candidate
    except OSError as error:
        raise UserError(
            f"cannot read {error.filename}: {error.strerror}; check its permissions, or {ROOT_REMEDY}"
        ) from error
    if not classes:
        return None
    if missing := [name for name, images in classes.items() if not images]:
        raise UserError(
            f"{root / folder} has no {image_set.name} images of {', '.join(missing)}; unpack the archive again"
        )
    found = {patch: file for images in classes.values() for patch, file in images.items()}
    return {patch: found[patch] for patch in sorted(found)}


def _images_in(root: Path, folder: str, class_name: str, suffixes: tuple[str, ...]) -> dict[str, str]:
    """{patch: file} of one class folder; none where the folder does not exist."""
    prefix = class_name if folder == "." else f"{folder}/{class_name}"
    try:
        entries = os.scandir(root / prefix)
    except (FileNotFoundError, NotADirectoryError):
        return {}
    found: dict[str, str] = {}
    with entries:
        for entry in entries:
            name = entry.name
            if name.lower().endswith(suffixes) and not name.startswith(".") and entry.is_file():
                patch, file = f"{class_name}/{name.rpartition('.')[0]}", f"{prefix}/{name}"
                if not file.isprintable():  # a line break in a name would break the lists
                    raise UserError(f"the name {file!r} below {root} has characters that no list can hold; rename it")
                if patch in found:
                    raise UserError(
                        f"{found[patch]} and {file} below {root} are of the same patch; move one of them away"
                    )
                found[patch] = file
    return found


def patch_of(file: str) -> str:
    """The piece of land of a file: "EuroSAT_MS/Forest/Forest_1.tif" and "2750/Forest/Forest_1.jpg": "Forest/Forest_1"."""
    return "/".join(file.rpartition(".")[0].split("/")[-2:])


def class_of(patch: str) -> str:
    """ "Forest" of "Forest/Forest_1"."""
    return patch.partition("/")[0]


def canonical_file(task: str, patch: str) -> str:
    """What a list calls the patch's file, however the archives were unpacked: "EuroSAT_RGB/Forest/Forest_1.jpg"."""
    image_set = IMAGE_SETS[task]
    return f"{image_set.folders[1]}/{patch}{image_set.suffixes[0]}"


def image_paths(task: str, files: Sequence[str]) -> list[str]:
    """Where the files of a list lie, in whichever layout.

    Raises:
        UserError: as `find_images`, or a file is not there.
    """
    found = find_images(task) or {}
    missing = [file for file in files if patch_of(file) not in found]
    if missing:
        raise UserError(
            f"{len(missing):,} of {len(files):,} listed images are not below {config.dataset_root}, nor in another layout of "
            f"the archives, for example {missing[0]}; unpack the archive again, or {ROOT_REMEDY}"
        )
    return [f"{config.dataset_root}/{found[patch_of(file)]}" for file in files]


# Reading images --------------------------------------------------------------------------------------------------


def read_image(path: str, task: str) -> np.ndarray:
    """Decode one image.

    Returns:
        (64, 64, 3) uint8, or (64, 64, 13) uint16: top-of-atmosphere reflectance times 10,000, bands as in MS_BANDS.

    Raises:
        UserError: the file is missing, damaged or not a EuroSAT image of this set.
    """
    try:
        with open(path, "rb") as file:
            content = file.read()
    except OSError as error:
        raise UserError(
            f"cannot read {path}: {error.strerror}; check DATASET_ROOT, or run: python verify_splits.py"
        ) from error
    return decode_image(content, task, path)


def decode_image(content: bytes, task: str, path: str) -> np.ndarray:
    """`read_image` of a file's content."""
    try:
        image = _decode_jpeg(content) if task == "rgb" else _decode_tiff(content)
    except UserError as error:
        raise UserError(f"{path} {error}; unpack this image again") from None
    except Exception as error:  # whatever the decoder makes of damaged bytes
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(
            f"{path} is damaged or no {IMAGE_SETS[task].name} image ({reason}); unpack this image again"
        ) from error
    return image


def _decode_jpeg(content: bytes) -> np.ndarray:
    height, width, colorspace, _ = simplejpeg.decode_jpeg_header(content)  # before decoding: it may be a giant
    if (height, width) != (SIDE, SIDE):
        raise UserError(f"has {height} x {width} pixels instead of {SIDE} x {SIDE}")
    if colorspace not in ("YCbCr", "RGB"):
        raise UserError(f"is {colorspace}, not a colour image")
    return simplejpeg.decode_jpeg(content)


def _decode_tiff(content: bytes) -> np.ndarray:
    bands = len(MS_BANDS)
    for shape in ((SIDE, SIDE, bands), (bands, SIDE, SIDE)):  # bands last, or plane by plane
        # Into an array of its own: what does not fit there is refused before it is unpacked, as it may be a giant.
        with contextlib.suppress(ValueError):
            image = imagecodecs.tiff_decode(content, out=np.empty(shape, np.uint16))
            return image if shape[-1] == bands else image.transpose(1, 2, 0)
    with tifffile.TiffFile(io.BytesIO(content)) as file:
        found = file.pages.first
        raise UserError(f"is {found.dtype} of shape {found.shape} instead of uint16 (64, 64, 13)")


# The whole list as one array -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Images:
    """A list's images, decoded: `pixels` (images, 64, 64, bands) uint8 or uint16, and their SHA-256."""

    pixels: np.ndarray
    sha256: str


def load_images(task: str, files: Sequence[str], bands: Sequence[str], keep: bool = True) -> Images:
    """Decode a list once; later calls memory-map the array that the first one left in cache/.

    The array's name is a hash of the files' places, sizes and times (of content and of inode, which the owner cannot set)
    and of the bands, so it is valid for exactly those; the second half of the name is the SHA-256 of its pixels, and is
    checked at every opening (a second for 1.5 GB): what is trained on is what is recorded. cache/ can be deleted at any
    time. Two runs that start at once both decode and write the same. With keep=False nothing is left there: for who
    looks at a list once, or must not write.

    Raises:
        UserError: an image is missing or damaged (named), a band is unknown, or cache/ cannot be written.
    """
    columns = band_indices(task, bands)
    paths = image_paths(task, files)
    shape, dtype = (len(files), SIDE, SIDE, len(bands)), np.dtype(IMAGE_SETS[task].dtype)
    chunks = _decoded(task, paths, columns)
    if not keep:
        pixels = np.concatenate(list(chunks))
        return Images(pixels, sha256(pixels.data))
    try:
        states = [(state.st_size, state.st_mtime_ns, state.st_ctime_ns) for state in map(os.stat, paths)]
    except OSError as error:
        raise UserError(f"cannot read {error.filename}: {error.strerror}; run: python verify_splits.py") from error
    cache = config.project_root / "cache"
    key = sha256(json.dumps([task, paths, states, list(bands)]).encode())[:32]
    for path in cache.glob(f"{key}-*.npy"):
        try:
            pixels = np.load(path, mmap_mode="r")
        except (OSError, ValueError, EOFError):
            continue  # damaged: decoded and written again
        if pixels.shape == shape and pixels.dtype == dtype and sha256(pixels.data) == path.stem.partition("-")[2]:
            return Images(pixels, path.stem.partition("-")[2])
    _remove_abandoned(cache)
    return _kept(chunks, shape, dtype, cache / key)


ABANDONED_SECONDS = 600  # a decoding at work writes many times a second


def _remove_abandoned(cache: Path) -> None:
    """Delete what a killed decoding left half-written, on whichever machine it ran."""
    for path in (*cache.glob("*.partial"), *cache.glob("*.npy")):
        if path.suffix == ".partial" or "-" not in path.name:
            with contextlib.suppress(FileNotFoundError):  # another one does the same
                if time.time() - path.stat().st_mtime > ABANDONED_SECONDS:
                    path.unlink()


def _decoded(task: str, paths: Sequence[str], columns: list[int]) -> Iterator[np.ndarray]:
    """The images' pixels, some at a time: all cores decode, as the decoders leave Python's lock."""

    def decode(chunk: Sequence[str]) -> np.ndarray:
        pixels = np.empty((len(chunk), SIDE, SIDE, len(columns)), IMAGE_SETS[task].dtype)
        for row, path in zip(pixels, chunk, strict=True):
            np.take(read_image(path, task), columns, axis=2, out=row, mode="clip")  # "clip": straight into the row
        return pixels

    chunks = [paths[start : start + 64] for start in range(0, len(paths), 64)]
    window = 4 * (os.cpu_count() or 1)  # chunks decoded ahead, so that memory stays bounded
    with (
        ThreadPoolExecutor(os.cpu_count()) as pool,
        tqdm(total=len(paths), desc="decode", unit="image", disable=None, leave=False) as progress,
    ):
        for start in range(0, len(chunks), window):
            for pixels in pool.map(decode, chunks[start : start + window]):
                progress.update(len(pixels))
                yield pixels


def _kept(chunks: Iterator[np.ndarray], shape: tuple, dtype: np.dtype, stem: Path) -> Images:
    """Write the pixels to cache/ under their own hash, which is known only at the end; map them into memory."""
    digest = hashlib.sha256()
    unnamed = stem.with_name(f"{stem.name}.{os.getpid()}.npy")  # nobody else's, should two decode at once
    with atomic_write(unnamed) as partial, open(partial, "wb") as file:
        np.lib.format.write_array_header_1_0(
            file, {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
        )
        for pixels in chunks:
            digest.update(pixels.data)
            file.write(pixels.data)
    named = stem.with_name(f"{stem.name}-{digest.hexdigest()}.npy")
    os.replace(unnamed, named)
    return Images(np.load(named, mmap_mode="r"), digest.hexdigest())


def band_indices(task: str, bands: Sequence[str]) -> list[int]:
    """Where the bands lie in a file of this set.

    Raises:
        UserError: an unknown band.
    """
    known = IMAGE_SETS[task].bands
    for band in bands:
        if band not in known:
            raise UserError(f"unknown band {band!r} of the {IMAGE_SETS[task].name} set; known: {', '.join(known)}")
    return [known.index(band) for band in bands]


def band_statistics(pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of each band over all images and pixels, with values scaled to [0, 1].

    Args:
        pixels: (images, 64, 64, bands) uint8 or uint16, of the training list alone.

    Returns:
        Two float32 arrays of shape (bands,).
    """
    total = np.zeros(pixels.shape[-1])
    squares = np.zeros(pixels.shape[-1])
    for start in range(0, len(pixels), 256):
        values = pixels[start : start + 256].reshape(-1, pixels.shape[-1]).astype(np.float64)
        total += values.sum(axis=0)
        squares += (values**2).sum(axis=0)
    count = pixels.size / pixels.shape[-1]
    mean = total / count
    std = np.sqrt(np.maximum(squares / count - mean**2, 0))
    scale = np.iinfo(pixels.dtype).max
    # A band that never changes says nothing: it stays zero instead of becoming not-a-number.
    return (mean / scale).astype(np.float32), np.where(std > 0, std / scale, 1).astype(np.float32)


# The data set class ----------------------------------------------------------------------------------------------


class EuroSATDataset:
    """A map-style data set of one list, for any `torch.utils.data.DataLoader`.

    Item i is (image, label): image a float32 tensor (bands, 64, 64), scaled to [0, 1] and standardised per band, label an
    int. Training draws its random numbers from (seed, epoch, image), so they do not depend on workers or order: call
    `set_epoch` before each epoch.

    Args:
        task: "rgb" or "ms".
        files: as lists name them: "EuroSAT_RGB/Forest/Forest_1.jpg".
        labels: of the files, (images,).
        bands: names, in the order wanted; all of the image set's without.
        statistics: mean and standard deviation per band, each (bands,): the training list's, for every list. Without,
            those of this list, which must then be the training list.
        augmentation: a name in `augment.AUGMENTATIONS`.

    Raises:
        UserError: a file is missing, or a band is unknown; on access, that an image is damaged.
    """

    def __init__(
        self,
        task: str,
        files: Sequence[str],
        labels: np.ndarray,
        bands: Sequence[str] | None = None,
        statistics: tuple[np.ndarray, np.ndarray] | None = None,
        augmentation: str = "none",
        seed: int = 0,
    ) -> None:
        self.files, self.labels, self.seed = files, labels, seed
        self.paths = image_paths(task, files)
        self.task, self.augmentation = task, augmentation
        self.bands = tuple(bands or IMAGE_SETS[task].bands)
        self.columns = band_indices(task, self.bands)
        self.statistics = statistics or band_statistics(load_images(task, files, self.bands).pixels)
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Draw the random numbers of this epoch's augmentation."""
        from augment import random_numbers

        self.random = random_numbers(self.seed, epoch, len(self.files))

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int):
        import torch

        from augment import network_input

        pixels = torch.from_numpy(read_image(self.paths[index], self.task)[None, :, :, self.columns])
        mean, std = map(torch.from_numpy, self.statistics)
        random = torch.from_numpy(self.random[index : index + 1])
        return network_input(pixels, mean, std, self.augmentation, random)[0], int(self.labels[index])
