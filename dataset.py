"""EuroSAT on disk, and the data set class that train, val and test share (uint16 to float: `preprocess` in augment.py).

from base.project import RGB
from engine.splits import read_split
train = EuroSATDataset("/data/EuroSAT", RGB, read_split(RGB.splits, RGB, "train"), augmentation="mild")
for images, labels in DataLoader(train, batch_size=32, shuffle=True): ...   # image by image, simple
for indices in torch.randperm(len(train)).split(32): images, labels = train[indices]   # whole batches, much faster
"""

import functools
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from base.errors import UserError
from base.files import reading, sha256
from base.project import CLASSES, MS_BANDS, RGB, Task

import numpy as np
import simplejpeg
import tifffile
import torch
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from augment import band_statistics, preprocess, random_numbers

SIDE = 64  # pixels, 10 m each
CHUNK = 64  # images that are decoded at a time
LARGEST_CHUNK = 2**24  # numbers in a strip or tile of a GeoTIFF: of 64 x 64 x 13 a tile may hold more
LONG_LIST = 4000  # GeoTIFFs, from which on worker processes are worth the second that they take to start
REMEDY = "set DATASET_ROOT in config.py (or EUROSAT_DATASET_ROOT) to the folder that holds the unpacked archives"


def find_images(root: Path, task: Task) -> dict[str, str] | None:
    """Find all images of a set, in whichever known layout holds most of them. Litter beside them is ignored.

    Returns {patch: file from the root on}, sorted by patch; None if the root holds no image of this set. A UserError says that
    the root cannot be read, that a class has no image, or that two files are of the same patch.
    """
    if not root.is_dir():
        raise UserError(f"the data set root {root} is {'not a folder' if root.exists() else 'not there'}; {REMEDY}")
    with reading(root, f"check its permissions, or {REMEDY}"):
        layouts = {layout: [_class_images(root, layout, name, task) for name in CLASSES] for layout in task.layouts}
    layout, classes = max(layouts.items(), key=lambda item: sum(map(len, item[1])))
    if not any(classes):
        return None
    if others := [name for name, found in layouts.items() if any(found) and name != layout]:
        _say_once(f"note: {task.title} images are read from {root / layout}; those in {', '.join(others)} are not used")
    if missing := [name for name, images in zip(CLASSES, classes, strict=True) if not images]:
        raise UserError(f"{root / layout} has no {task.title} images of {', '.join(missing)}; unpack it again")
    return dict(sorted(item for images in classes for item in images.items()))


@functools.cache
def _say_once(text: str) -> None:
    print(text)


def _class_images(root: Path, layout: str, class_name: str, task: Task) -> dict[str, str]:
    """{patch: file} of one class folder; empty if it does not exist."""
    folder = class_name if layout == "." else f"{layout}/{class_name}"
    found: dict[str, str] = {}
    try:
        entries = sorted(os.scandir(root / folder), key=lambda entry: entry.name)
    except (FileNotFoundError, NotADirectoryError):
        return found
    for entry in entries:
        name = entry.name
        if not name.lower().endswith(task.suffixes) or name.startswith(".") or not entry.is_file():
            continue
        patch, file = f"{class_name}/{name.rpartition('.')[0]}", f"{folder}/{name}"
        if not file.isprintable():  # a line break in a name would break the lists
            raise UserError(f"the name {file!r} below {root} has characters that no list can hold; rename it")
        if patch in found:
            raise UserError(f"{found[patch]} and {file} below {root} are of the same patch; move one of them away")
        found[patch] = file
    return found


def patch_of(file: str) -> str:
    """The piece of land: "Forest/Forest_1" of "EuroSAT_MS/Forest/Forest_1.tif" and of "2750/Forest/Forest_1.jpg"."""
    return "/".join(file.rpartition(".")[0].split("/")[-2:])


def class_of(patch: str) -> str:
    """ "Forest" of "Forest/Forest_1"."""
    return patch.partition("/")[0]


def canonical_file(task: Task, patch: str) -> str:
    """What a list calls the patch's file, however it was unpacked: "EuroSAT_RGB/Forest/Forest_1.jpg"."""
    return f"{task.layouts[1]}/{patch}{task.suffixes[0]}"


def image_paths(root: Path, task: Task, files: Sequence[str]) -> list[str]:
    """Where the files of a list lie, in whichever layout; a UserError names one that is missing."""
    found = find_images(root, task) or {}
    missing = [file for file in files if patch_of(file) not in found]
    if missing:
        told = f"{len(missing):,} of {len(files):,} listed images are not below {root}, for example {missing[0]}"
        raise UserError(f"{told}; unpack them again, or {REMEDY}")
    return [f"{root}/{found[patch_of(file)]}" for file in files]


@dataclass(frozen=True)
class Split:
    """One list: files as lists name them, and labels, (images,) int64, indices into CLASSES."""

    files: list[str]
    labels: np.ndarray

    @property
    def patches(self) -> list[str]:
        return [patch_of(file) for file in self.files]


def read_image(path: str, task: Task) -> np.ndarray:
    """Decode one image; a UserError says that it is missing, damaged or no EuroSAT image of this set.

    Returns (64, 64, 3) uint8, or (64, 64, 13) uint16: top-of-atmosphere reflectance times 10,000, bands as in MS_BANDS.
    """
    with reading(Path(path), f"it should be a {task.title} image of EuroSAT: unpack it again"):
        return _read_jpeg(path) if task.name == "rgb" else _read_tif(path)


def _read_jpeg(path: str) -> np.ndarray:
    content = Path(path).read_bytes()
    height, width, colorspace, _ = simplejpeg.decode_jpeg_header(content)  # first, because it may be a giant
    if (height, width) != (SIDE, SIDE) or colorspace not in ("YCbCr", "RGB"):
        raise ValueError(f"it has {height} x {width} pixels, {colorspace}, instead of {SIDE} x {SIDE} in colour")
    return simplejpeg.decode_jpeg(content)


def _read_tif(path: str) -> np.ndarray:
    """With tifffile, as scikit-image does: it decodes the very page whose header was checked, which may be of a giant."""
    bands = len(MS_BANDS)
    with tifffile.TiffFile(path) as file:
        page = file.pages.first
        shapes = (SIDE, SIDE, bands), (bands, SIDE, SIDE)  # interleaved, or plane by plane
        layout = len(file.pages), page.imagedepth, page.samplesperpixel
        if page.dtype != np.uint16 or page.shape not in shapes or layout != (1, 1, bands):
            raise ValueError(f"it is {page.dtype} of shape {page.shape}, not uint16 of shape {shapes[0]} on one page")
        if math.prod(page.chunked) != len(page.dataoffsets) or math.prod(page.chunks) > LARGEST_CHUNK:
            raise ValueError("its strips or tiles contradict its size")
        image = page.asarray()
    return image if image.shape == shapes[0] else image.transpose(1, 2, 0)


def displayed_image(image: np.ndarray, task: Task) -> np.ndarray:
    """The image as a person sees it, (64, 64, 3) uint8."""
    return image if task.name == "rgb" else stretch_to_uint8(image[:, :, band_indices(task, RGB.bands)])


def stretch_to_uint8(reflectances: np.ndarray) -> np.ndarray:
    """Reflectances times 10,000 as in EuroSAT's JPEGs: 0 to 2750 become 1 to 255, rounded (checked on 154 pairs)."""
    return np.rint(np.clip(1 + reflectances / 2750 * 254, 1, 255)).astype(np.uint8)


class _Chunks(Dataset):
    """Files, CHUNK at a time, decoded. An error is returned, because a worker process would wrap what it raises."""

    def __init__(self, paths: list[str], task: Task, columns: list[int]) -> None:
        self.chunks = [paths[start : start + CHUNK] for start in range(0, len(paths), CHUNK)]
        self.task, self.columns = task, columns

    def __len__(self) -> int:
        return len(self.chunks)

    def __getitem__(self, index: int) -> np.ndarray | UserError:
        try:
            return np.stack([read_image(path, self.task)[:, :, self.columns] for path in self.chunks[index]])
        except UserError as error:
            return error


def _unchanged(chunk):
    return chunk


def load_images(root: Path, task: Task, files: Sequence[str], bands: Sequence[str]) -> np.ndarray:
    """Decode a list into one array, (images, 64, 64, bands) uint8 or uint16; a UserError names a damaged image."""
    chunks = _Chunks(image_paths(root, task, files), task, band_indices(task, bands))
    # JPEGs take seconds on one core, and tifffile holds Python's lock: threads help with neither (docs/speed.md).
    workers = os.cpu_count() if task.name == "ms" and len(files) > LONG_LIST else 0
    generator = torch.Generator()  # otherwise the loader would draw from torch's
    loader = DataLoader(chunks, batch_size=None, num_workers=workers, collate_fn=_unchanged, generator=generator)
    pixels = np.empty((len(files), SIDE, SIDE, len(bands)), task.dtype)
    for index, chunk in enumerate(tqdm(loader, "decode", unit=f"x {CHUNK} images", disable=None, leave=False)):
        if isinstance(chunk, UserError):
            raise chunk
        pixels[index * CHUNK : (index + 1) * CHUNK] = chunk
    return pixels


def band_indices(task: Task, bands: Sequence[str]) -> list[int]:
    """Where the bands lie in a file of this set; a UserError names an unknown band."""
    if unknown := [band for band in bands if band not in task.bands]:
        raise UserError(f"unknown band {unknown[0]!r} of the {task.title} set; known: {', '.join(task.bands)}")
    return [task.bands.index(band) for band in bands]


class EuroSATDataset(Dataset):
    """One list of images. `dataset[i]` is an image, float32 (bands, 64, 64), standardised per band, and its label.

    The list is decoded once, into one array in memory, and copied to the GPU if it takes less than a quarter of its memory. `dataset[indices]` reads and
    augments a whole batch at once: (batch, bands, 64, 64) and (batch,), on `device`. Augmentation depends on (seed,
    epoch, image) alone, not on the order or the number of workers; set `epoch` before each epoch.

    Args:
        root: of the data set.
        bands: names, in the order wanted; by default all bands of the image set.
        statistics: mean and standard deviation per band, each (bands,) float32, of the training list. None: those of
            this list, which must then be the training list.
        augmentation: a name in `augment.AUGMENTATIONS`; "none" for evaluation.
        seed: of the augmentation.
        device: where batches are wanted.
    """

    def __init__(
        self,
        root: Path | str,
        task: Task,
        split: Split,
        bands: Sequence[str] | None = None,
        statistics: tuple[torch.Tensor, torch.Tensor] | None = None,
        augmentation: str = "none",
        seed: int = 0,
        device: torch.device | str = "cpu",
    ) -> None:
        self.task, self.split, self.augmentation, self.seed, self.epoch = task, split, augmentation, seed, 0
        self.bands, self.device = tuple(bands or task.bands), torch.device(device)
        self.pixels = load_images(Path(root), task, split.files, self.bands)
        self.sha256 = sha256(self.pixels.data)
        self.statistics = statistics or tuple(map(torch.from_numpy, band_statistics(self.pixels)))
        self.mean, self.std = (values.to(self.device) for values in self.statistics)
        self.labels = torch.as_tensor(split.labels, device=self.device)
        self._drawn: tuple[int, torch.Tensor] | None = None  # the epoch and its random numbers
        self._on_gpu = None
        if self.device.type == "cuda" and self.pixels.nbytes < torch.cuda.mem_get_info(self.device)[0] // 4:
            signed = self.pixels.view({1: np.uint8, 2: np.int16}[self.pixels.itemsize])  # CUDA cannot index uint16
            self._on_gpu = torch.from_numpy(signed).to(self.device)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index):
        indices = torch.as_tensor(index, device=self.device)
        if indices.ndim == 0:
            images, labels = self[indices[None]]
            return images[0], int(labels[0])
        images = preprocess(self._read(indices), self.mean, self.std, self.augmentation, self._random()[indices])
        return images, self.labels[indices]

    def _read(self, indices: torch.Tensor) -> torch.Tensor:
        """(batch, 64, 64, bands), on the device."""
        if self._on_gpu is None:
            return torch.from_numpy(self.pixels[indices.cpu().numpy()]).to(self.device)
        return self._on_gpu[indices].view(torch.from_numpy(self.pixels[:0]).dtype)

    def _random(self) -> torch.Tensor:
        """This epoch's random numbers, (images, RANDOM_NUMBERS), on the device."""
        if self._drawn is None or self._drawn[0] != self.epoch:
            numbers = torch.from_numpy(random_numbers(self.seed, self.epoch, len(self)))
            self._drawn = self.epoch, numbers.to(self.device)
        return self._drawn[1]
