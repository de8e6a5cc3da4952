"""EuroSAT on disk: where its images lie, how a split list and an image are read, and the data set class.

    from torch.utils.data import DataLoader
    train = EuroSATDataset("rgb", "train")  # or "ms", bands=("B04", "B03", "B02", "B08", "B11", "B12")
    for images, labels in DataLoader(train, batch_size=32, shuffle=True): ...

`EuroSATDataset` decodes one image at a time and is the way that reads best. Training takes `load_images` instead: the
same pixels, decoded once into one array that is kept in cache/ and memory-mapped from then on.
"""

import contextlib
import csv
import io
import json
import os
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import config
from project import PARTS, UserError, sha256, shown, splits_dir, written_whole

# A label is the index in this order.
CLASSES = (
    "AnnualCrop",
    "Forest",
    "HerbaceousVegetation",
    "Highway",
    "Industrial",
    "Pasture",
    "PermanentCrop",
    "Residential",
    "River",
    "SeaLake",
)
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


def find_images(task: str) -> dict[str, str] | None:
    """Find all images of a set, in any of the layouts in circulation; litter beside them is passed over.

    Returns:
        {patch: file}: "Forest/Forest_1" to the file relative to the data set root, sorted by patch; None where the
        data set root holds no image of this set.

    Raises:
        UserError: the data set root cannot be read, a class has no image, or two files are of the same patch.
    """
    root = config.DATASET_ROOT
    remedy = "set DATASET_ROOT in config.py (or EUROSAT_DATASET_ROOT) to the folder that holds the unpacked archives"
    if not root.is_dir():
        raise UserError(f"the data set root {root} is {'not a folder' if root.exists() else 'not there'}; {remedy}")
    image_set = IMAGE_SETS[task]
    try:
        classes: dict[str, dict[str, str]] = {}
        for candidate in image_set.folders:  # the one with most classes: a stray folder does not hide the data set
            in_candidate = {name: _images_in(root, candidate, name, image_set.suffixes) for name in CLASSES}
            if sum(map(bool, in_candidate.values())) > sum(map(bool, classes.values())):
                folder, classes = candidate, in_candidate
        if not classes:
            return None
        strangers = sorted(
            entry.name
            for entry in os.scandir(root / folder)
            if entry.name not in CLASSES
            and entry.is_dir()
            and _images_in(root, folder, entry.name, image_set.suffixes)
            and entry.name not in image_set.folders
        )
    except OSError as error:
        raise UserError(
            f"cannot read {error.filename}: {error.strerror}; check its permissions, or {remedy}"
        ) from error
    missing = [name for name, images in classes.items() if not images]
    if missing:
        raise UserError(
            f"{root / folder} has no {image_set.name} images of {', '.join(missing)}; unpack the archive again"
        )
    if strangers:
        print(
            f"note: {root / folder} also holds {', '.join(strangers)}, none of the ten classes: not used",
            file=sys.stderr,
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


# Split lists -----------------------------------------------------------------------------------------------------

LIST_HEADER = ["file", "label", "class_name"]


@dataclass(frozen=True)
class Split:
    """One list: files relative to the data set root, sorted, and their labels (int64, the index in CLASSES)."""

    files: list[str]
    labels: np.ndarray

    def text(self) -> str:
        """The list as it stands on disk."""
        return list_text(LIST_HEADER, [[f, label, CLASSES[label]] for f, label in zip(self.files, self.labels)])


def list_text(header: list[str], rows: list[list]) -> str:
    """Rows as CSV text with LF line ends."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([header, *rows])
    return text.getvalue()


def split_path(task: str, part: str, profile: str | None = None) -> Path:
    return splits_dir(profile) / task / f"{part}.csv"


def read_split(task: str, part: str, profile: str | None = None) -> Split:
    """Read and check one list.

    Raises:
        UserError: the list is missing or is not what `split_data.py` writes, with the line.
    """
    path = split_path(task, part, profile)
    try:
        rows = list(csv.reader(io.StringIO(path.read_bytes().decode("utf-8")), strict=True))
    except FileNotFoundError:
        raise UserError(f"the list {shown(path)} is missing; run: python split_data.py") from None
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(
            f"cannot read the list {shown(path)}: {error}; run: python split_data.py --overwrite"
        ) from error

    def wrong(line: int, what: str) -> UserError:
        return UserError(f"{shown(path)}, line {line}: {what}; run: python split_data.py --overwrite")

    if not rows or rows[0] != LIST_HEADER:
        raise wrong(1, f"the header is not {','.join(LIST_HEADER)}")
    if len(rows) == 1:
        raise wrong(1, "the list is empty")
    files, seen = [], set()
    labels = np.empty(len(rows) - 1, np.int64)
    for line, row in enumerate(rows[1:], start=2):
        if len(row) != 3:
            raise wrong(line, f"{len(row)} columns instead of 3")
        file, label, class_name = row
        folders = file.split("/")
        if not file.isprintable() or "\\" in file or ".." in folders or "" in folders:
            raise wrong(line, f"{file!r} is not a path from the data set root on, with / between folders")
        if class_name not in CLASSES:
            raise wrong(line, f"unknown class {class_name!r}; known: {', '.join(CLASSES)}")
        if label != str(CLASSES.index(class_name)) or len(folders) < 2 or folders[-2] != class_name:
            raise wrong(line, f"the label {label!r}, the class {class_name} and the folder of {file} disagree")
        if not file.lower().endswith(IMAGE_SETS[task].suffixes):
            raise wrong(line, f"{file} is no {IMAGE_SETS[task].name} image ({', '.join(IMAGE_SETS[task].suffixes)})")
        if file in seen:
            raise wrong(line, f"{file} is listed twice")
        seen.add(file)
        files.append(file)
        labels[line - 2] = int(label)
    return Split(files, labels)


def read_splits(task: str) -> dict[str, Split]:
    """Read all three lists of a task, {part: split}, and hold them to be disjoint.

    Raises:
        UserError: as `read_split`, or a patch is in two lists.
    """
    splits = {part: read_split(task, part) for part in PARTS}
    part_of: dict[str, str] = {}
    for part, split in splits.items():
        for file in split.files:
            other = part_of.setdefault(patch_of(file), part)
            if other != part:
                raise UserError(
                    f"{file} is in {part}.csv and, as the same patch, in {other}.csv of {shown(splits_dir() / task)}; "
                    "run: python split_data.py --overwrite"
                )
    return splits


def splits_hash(splits: dict[str, Split]) -> str:
    """SHA-256 of the three lists of a task, whatever their line ends: says which split a model rests on."""
    return sha256(*(splits[part].text().encode() for part in PARTS))


# Reading images --------------------------------------------------------------------------------------------------


def read_image(file: str, task: str) -> np.ndarray:
    """Decode one image.

    Args:
        file: relative to the data set root.

    Returns:
        (64, 64, 3) uint8, or (64, 64, 13) uint16: top-of-atmosphere reflectance times 10,000, bands as in MS_BANDS.

    Raises:
        UserError: the file is missing, damaged or not a EuroSAT image of this set.
    """
    path = f"{config.DATASET_ROOT}/{file}"  # a string: making Path objects would cost a tenth of the decoding
    try:
        with open(path, "rb") as opened:
            content = opened.read()
    except OSError as error:
        raise UserError(
            f"cannot read {path}: {error.strerror}; check DATASET_ROOT, or run: python verify_splits.py"
        ) from error
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
    import simplejpeg

    height, width, colorspace, _ = simplejpeg.decode_jpeg_header(content)  # before decoding: it may be a giant
    if (height, width) != (SIDE, SIDE):
        raise UserError(f"has {height} x {width} pixels instead of {SIDE} x {SIDE}")
    if colorspace not in ("YCbCr", "RGB"):
        raise UserError(f"is {colorspace}, not a colour image")
    return simplejpeg.decode_jpeg(content)


def _decode_tiff(content: bytes) -> np.ndarray:
    import imagecodecs

    bands = len(MS_BANDS)
    for shape in ((SIDE, SIDE, bands), (bands, SIDE, SIDE)):  # bands last, or plane by plane
        # Into an array of its own: what does not fit there is refused before it is unpacked, as it may be a giant.
        with contextlib.suppress(ValueError):
            image = imagecodecs.tiff_decode(content, out=np.empty(shape, np.uint16))
            return image if shape[-1] == bands else image.transpose(1, 2, 0)
    import tifffile

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

    The array's name is a hash of the files' names, sizes and times and of the bands, so it is valid for exactly those;
    the second half of the name is the SHA-256 of its pixels. cache/ can be deleted at any time. Two runs that start at
    once both decode and write the same. With keep=False nothing is left there: for who looks at a list once, or must
    not write.

    Raises:
        UserError: an image is missing or damaged (named), a band is unknown, or cache/ cannot be written.
    """
    columns = band_indices(task, bands)
    root = config.DATASET_ROOT
    try:
        states = [(state.st_size, state.st_mtime_ns) for state in (os.stat(f"{root}/{file}") for file in files)]
    except OSError as error:
        raise UserError(
            f"cannot read {error.filename}: {error.strerror}; check DATASET_ROOT, or run: python verify_splits.py"
        ) from error
    key = sha256(json.dumps([task, str(root), list(files), states, list(bands)]).encode())[:32]
    cache = config.PROJECT_ROOT / "cache"
    shape = (len(files), SIDE, SIDE, len(bands))
    for path in cache.glob(f"{key}-*.npy"):
        try:
            pixels = np.load(path, mmap_mode="r")
        except (OSError, ValueError, EOFError):
            continue  # damaged: decoded and written again
        if pixels.shape == shape and pixels.dtype == IMAGE_SETS[task].dtype:
            return Images(pixels, path.stem.partition("-")[2])
    chunks = _decoded(task, files, columns)
    if keep:
        return _kept(chunks, shape, np.dtype(IMAGE_SETS[task].dtype), cache / key)
    pixels = np.concatenate(list(chunks))
    return Images(pixels, sha256(pixels.data))


def _decoded(task: str, files: Sequence[str], columns: list[int]) -> Iterator[np.ndarray]:
    """The list's pixels, some images at a time: all cores decode, as the decoders leave Python's lock."""
    from tqdm import tqdm

    def decode(chunk: Sequence[str]) -> np.ndarray:
        pixels = np.empty((len(chunk), SIDE, SIDE, len(columns)), IMAGE_SETS[task].dtype)
        for row, file in zip(pixels, chunk, strict=True):
            np.take(read_image(file, task), columns, axis=2, out=row, mode="clip")  # "clip": straight into the row
        return pixels

    chunks = [files[start : start + 64] for start in range(0, len(files), 64)]
    window = 4 * (os.cpu_count() or 1)  # chunks decoded ahead, so that memory stays bounded
    with (
        ThreadPoolExecutor(os.cpu_count()) as pool,
        tqdm(total=len(files), desc="decode", unit="image", disable=None, leave=False) as progress,
    ):
        for start in range(0, len(chunks), window):
            for pixels in pool.map(decode, chunks[start : start + window]):
                progress.update(len(pixels))
                yield pixels


def _kept(chunks: Iterator[np.ndarray], shape: tuple, dtype: np.dtype, stem: Path) -> Images:
    """Write the pixels to cache/ under their own hash, which is known only at the end; map them into memory."""
    import hashlib

    digest = hashlib.sha256()
    unnamed = stem.with_name(f"{stem.name}.{os.getpid()}.npy")  # nobody else's, should two decode at once
    with written_whole(unnamed) as partial, open(partial, "wb") as file:
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

    Item i is (image, label): image a float32 tensor (bands, 64, 64), scaled to [0, 1] and standardised per band with
    the training list's statistics, label an int. Evaluation has no augmentation; training draws its random numbers
    from (seed, epoch, image), so they do not depend on workers or order: call `set_epoch` before each epoch.

    Args:
        task: "rgb" or "ms".
        part: "train", "val" or "test".
        bands: names, in the order wanted; all of the image set's without.
        statistics: mean and standard deviation per band, each (bands,); taken from the training list without.
        augmentation: a name in `augment.AUGMENTATIONS`.

    Raises:
        UserError: the list is missing or wrong, or a band is unknown; on access, that an image is damaged.
    """

    def __init__(
        self,
        task: str,
        part: str,
        bands: Sequence[str] | None = None,
        statistics: tuple[np.ndarray, np.ndarray] | None = None,
        augmentation: str = "none",
    ) -> None:
        split = read_split(task, part)
        self.files, self.labels = split.files, split.labels
        self.task, self.augmentation = task, augmentation
        self.bands = tuple(bands or IMAGE_SETS[task].bands)
        self.columns = band_indices(task, self.bands)
        if statistics is None:
            statistics = band_statistics(load_images(task, read_split(task, "train").files, self.bands).pixels)
        self.mean, self.std = statistics
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Draw the random numbers of this epoch's augmentation."""
        from augment import random_numbers

        self.random = random_numbers(config.SEED, epoch, len(self.files))

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int):
        import torch

        from augment import network_input

        pixels = torch.from_numpy(read_image(self.files[index], self.task)[None, :, :, self.columns])
        mean, std = torch.from_numpy(self.mean), torch.from_numpy(self.std)
        random = torch.from_numpy(self.random[index : index + 1])
        return network_input(pixels, mean, std, self.augmentation, random)[0], int(self.labels[index])
