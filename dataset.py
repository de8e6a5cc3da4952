"""EuroSAT: where its images lie, how one is read, and the data set class (uint16 to float: `preprocess`, augment.py).

from torch.utils.data import DataLoader
from engine.splits import read_split
train = read_split(Path("splits/course/rgb"), "rgb", "train")
data = EuroSATDataset("/data/EuroSAT", "rgb", train, augmentation="mild", cache=Path("cache"))
for images, labels in DataLoader(data, batch_size=32, shuffle=True): ...
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
import torch
from torch.utils.data import Dataset
from tqdm import tqdm

from augment import band_statistics, preprocess, random_numbers
from project import CLASSES, UserError, atomic_write, sha256

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


RGB_FOLDERS = (".", "EuroSAT_RGB", "2750", "eurosat/2750", "EuroSAT")
MS_FOLDERS = (".", "EuroSAT_MS", "ds/images/remote_sensing/otherDatasets/sentinel_2/tif", "EuroSATallBands")
IMAGE_SETS = {
    "rgb": ImageSet("RGB", ("B04", "B03", "B02"), np.uint8, (".jpg", ".jpeg"), RGB_FOLDERS),
    "ms": ImageSet("multispectral", MS_BANDS, np.uint16, (".tif", ".tiff"), MS_FOLDERS),
}


# Finding images --------------------------------------------------------------------------------------------------

REMEDY = "set DATASET_ROOT in config.py (or EUROSAT_DATASET_ROOT) to the folder that holds the unpacked archives"


def find_images(root: Path, task: str) -> dict[str, str] | None:
    """Find all images of a set, in any of the layouts in circulation; litter beside them is passed over.

    Returns:
        {patch: file from the root on}, sorted by patch; None where the root holds no image of this set.

    Raises:
        UserError: the data set root cannot be read, a class has no image, or two files are of the same patch.
    """
    root, image_set = Path(root), IMAGE_SETS[task]
    classes: dict[str, dict[str, str]] = {}
    try:
        if not root.is_dir():
            raise UserError(f"the data set root {root} is {'not a folder' if root.exists() else 'not there'}; {REMEDY}")
        for candidate in image_set.folders:  # the one with most images: a stray folder does not hide the data set
            in_candidate = {name: _images_in(root, candidate, name, image_set.suffixes) for name in CLASSES}
            if sum(map(len, in_candidate.values())) > sum(map(len, classes.values())):
                folder, classes = candidate, in_candidate
    except OSError as error:
        raise UserError(
            f"cannot read {error.filename}: {error.strerror}; check its permissions, or {REMEDY}"
        ) from error
    if not classes:
        return None
    if missing := [name for name, images in classes.items() if not images]:
        raise UserError(f"{root / folder} has no {image_set.name} images of {', '.join(missing)}; unpack it again")
    return dict(sorted(item for images in classes.values() for item in images.items()))


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


def image_paths(root: Path, task: str, files: Sequence[str]) -> list[str]:
    """Where the files of a list lie, in whichever layout.

    Raises:
        UserError: as `find_images`, or a file is not there.
    """
    image_set = IMAGE_SETS[task]
    for folder in image_set.folders:  # where all have their usual names, nothing need be searched
        paths = [f"{root}/{folder}/{patch_of(file)}{image_set.suffixes[0]}" for file in files]
        if all(map(os.path.isfile, paths)):
            return paths
    found = find_images(root, task) or {}
    missing = [file for file in files if patch_of(file) not in found]
    if missing:
        raise UserError(
            f"{len(missing):,} of {len(files):,} listed images are not below {root} in any layout of the archives, for "
            f"example {missing[0]}; unpack them again, or {REMEDY}"
        )
    return [f"{root}/{found[patch_of(file)]}" for file in files]


@dataclass(frozen=True)
class Split:
    """One list: files as lists name them, sorted, and their labels, (images,) int64: the index in CLASSES."""

    files: list[str]
    labels: np.ndarray

    @property
    def patches(self) -> list[str]:
        return [patch_of(file) for file in self.files]


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
        raise UserError(f"cannot read {path}: {error.strerror}; run: python verify_splits.py") from error
    return decode_image(content, task, path)


def decode_image(content: bytes, task: str, path: str) -> np.ndarray:
    """`read_image` of a file's content."""
    try:
        return _decode_jpeg(content) if task == "rgb" else _decode_tiff(content)
    except UserError as error:
        raise UserError(f"{path} {error}; unpack this image again") from None
    except Exception as error:  # whatever the decoder makes of damaged bytes
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(
            f"{path} is damaged or no {IMAGE_SETS[task].name} image ({reason}); unpack this image again"
        ) from error


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


def displayed(image: np.ndarray, task: str) -> np.ndarray:
    """The image as a person sees it, (64, 64, 3) uint8."""
    return image if task == "rgb" else stretched(image[:, :, band_indices("ms", IMAGE_SETS["rgb"].bands)])


def stretched(reflectances: np.ndarray) -> np.ndarray:
    """Reflectances x 10,000 as in EuroSAT's JPEGs: 0 to 2750 become 1 to 255, rounded (checked on 154 pairs); uint8."""
    return np.rint(np.clip(1 + reflectances / 2750 * 254, 1, 255)).astype(np.uint8)


# The whole list as one array -------------------------------------------------------------------------------------

ABANDONED_SECONDS = 600  # a decoding at work writes many times a second


def load_images(
    root: Path, task: str, files: Sequence[str], bands: Sequence[str], cache: Path | None = None
) -> tuple[np.ndarray, str]:
    """Decode a list once; later calls memory-map the array that the first one left in the folder `cache`.

    The array's name is a hash of the files' places, sizes and times (of content and of inode, which the owner cannot set)
    and of the bands, so it is valid for exactly those; the second half of the name is the SHA-256 of its pixels, and is
    checked at every opening (a second for 1.5 GB): what is trained on is what is recorded. The folder can be deleted at
    any time. Two runs that start at once both decode and write the same. Without a folder nothing is written.

    Returns:
        (images, 64, 64, bands) uint8 or uint16, and the SHA-256 of these pixels.

    Raises:
        UserError: an image is missing or damaged (named), a band is unknown, or the cache cannot be written.
    """
    paths, shape = image_paths(root, task, files), (len(files), SIDE, SIDE, len(bands))
    chunks = _decoded(task, paths, band_indices(task, bands))
    if cache is None:
        pixels = np.concatenate(list(chunks))
        return pixels, sha256(pixels.data)
    states = [(state.st_size, state.st_mtime_ns, state.st_ctime_ns) for state in map(os.stat, paths)]
    key = sha256(json.dumps([task, paths, states, list(bands)]).encode())[:32]
    for path in cache.glob(f"{key}-*.npy"):
        with contextlib.suppress(OSError, ValueError, EOFError):  # damaged: decoded and written again
            pixels = np.load(path, mmap_mode="r")
            if pixels.shape == shape and sha256(pixels.data) == path.stem.partition("-")[2]:
                return pixels, path.stem.partition("-")[2]
    _remove_abandoned(cache)
    unnamed = cache / f"{key}.{os.getpid()}.npy"  # nobody else's, should two decode at once
    with atomic_write(unnamed) as partial:
        pixels, digest, start = (
            np.lib.format.open_memmap(partial, "w+", IMAGE_SETS[task].dtype, shape),
            hashlib.sha256(),
            0,
        )
        for chunk in chunks:  # hashed and written while others are decoded
            digest.update(chunk.data)
            pixels[start : start + len(chunk)] = chunk
            start += len(chunk)
        del pixels  # closes the file
    os.replace(unnamed, named := cache / f"{key}-{digest.hexdigest()}.npy")
    return np.load(named, mmap_mode="r"), digest.hexdigest()


def _decoded(task: str, paths: Sequence[str], columns: list[int]) -> Iterator[np.ndarray]:
    """The images, (64 at a time, 64, 64, bands); all cores decode, as the decoders leave Python's lock."""

    def decode(start: int) -> np.ndarray:
        chunk = paths[start : start + 64]
        pixels = np.empty((len(chunk), SIDE, SIDE, len(columns)), IMAGE_SETS[task].dtype)
        for row, path in zip(pixels, chunk, strict=True):
            np.take(read_image(path, task), columns, axis=2, out=row, mode="clip")  # "clip": straight into the row
        return pixels

    starts = range(0, len(paths), 64)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        yield from tqdm(pool.map(decode, starts), "decode", len(starts), unit="x 64 images", disable=None, leave=False)


def _remove_abandoned(cache: Path) -> None:
    """Delete what a killed decoding left half-written, on whichever machine it ran."""
    for path in (*cache.glob("*.partial"), *cache.glob("*.*.npy")):
        with contextlib.suppress(FileNotFoundError):  # another one does the same
            if time.time() - path.stat().st_mtime > ABANDONED_SECONDS:
                path.unlink()


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


# The data set class ----------------------------------------------------------------------------------------------


class EuroSATDataset(Dataset):
    """One list of images: `dataset[i]` is an image, float32 (bands, 64, 64), standardised per band, and its label.

    The list is decoded once, into an array that is kept in `cache` and memory-mapped, or moved to a GPU where it fits.
    A batch is fetched and augmented whole: `dataset[[3, 1, 4]]` gives (batch, bands, 64, 64) and (batch,), on `device`.
    Augmentation depends on (seed, epoch, image) alone, not on order, workers or processes; `set_epoch` before each epoch
    reaches workers that live on. Any `DataLoader` will do; ours (engine/training.py) asks for whole batches.

    Args:
        root, task, split: of the data set; "rgb" or "ms"; the list.
        bands: names, in the order wanted; all of the image set's without.
        statistics: mean and standard deviation per band, each (bands,) float32: the training list's, for every list.
            Without, those of this list, which must then be the training list.
        augmentation, seed: a name in `augment.AUGMENTATIONS`, "none" for evaluation; of its random numbers.
        cache, device: folder for decoded lists, without it nothing is written; where batches are wanted.

    Raises:
        UserError: a file is missing or damaged, a band is unknown, or the cache cannot be written.
    """

    def __init__(
        self,
        root: Path,
        task: str,
        split: Split,
        bands: Sequence[str] | None = None,
        statistics: tuple[torch.Tensor, torch.Tensor] | None = None,
        augmentation: str = "none",
        seed: int = 0,
        cache: Path | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self.task, self.split, self.seed, self.augmentation = task, split, seed, augmentation
        self.bands, self.device = tuple(bands or IMAGE_SETS[task].bands), torch.device(device)
        self.pixels, self.sha256 = load_images(root, task, split.files, self.bands, cache)
        self.statistics = statistics or tuple(map(torch.from_numpy, band_statistics(self.pixels)))
        self.mean, self.std = (values.to(self.device) for values in self.statistics)
        self.labels = torch.as_tensor(split.labels, device=self.device)
        self.epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # workers look at the same number
        self._drawn: dict[int, torch.Tensor] = {}  # of the present epoch
        self._on_gpu = None
        if self.device.type == "cuda" and self.pixels.nbytes < torch.cuda.mem_get_info(self.device)[0] // 4:
            signed = self.pixels.view({1: np.uint8, 2: np.int16}[self.pixels.itemsize])  # CUDA cannot index uint16
            self._on_gpu = torch.from_numpy(np.array(signed)).to(self.device)

    def set_epoch(self, epoch: int) -> None:
        """Augment as in this epoch from now on."""
        self.epoch.fill_(epoch)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index):
        indices = torch.as_tensor(index, device=self.device)
        if indices.ndim == 0:
            images, labels = self[indices[None]]
            return images[0], int(labels[0])
        images = preprocess(self._read(indices), self.mean, self.std, self.augmentation, self._random()[indices])
        return images, self.labels[indices]

    def __getitems__(self, indices: list[int]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """PyTorch's hook for a whole batch; its default collation takes a list apart again."""
        return list(zip(*self[indices], strict=True))

    def _read(self, indices: torch.Tensor) -> torch.Tensor:
        """(batch, 64, 64, bands), on the device."""
        if self._on_gpu is None:
            return torch.from_numpy(self.pixels[indices.cpu().numpy()]).to(self.device)
        return self._on_gpu[indices].view(torch.from_numpy(self.pixels[:0].copy()).dtype)

    def _random(self) -> torch.Tensor:
        """This epoch's random numbers, (images, RANDOM_NUMBERS), on the device."""
        epoch = int(self.epoch)
        if epoch not in self._drawn:
            self._drawn = {epoch: torch.from_numpy(random_numbers(self.seed, epoch, len(self))).to(self.device)}
        return self._drawn[epoch]
