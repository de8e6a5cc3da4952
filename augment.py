"""From pixels to network input, a whole batch at a time, on its device: scale, augment, standardise.

A patch seen from above has no top and no left side, so flips and quarter turns are as real as the original. The
photometric change acts on reflectances, where it has a physical meaning: a common gain (sun and haze) and a small offset
per band (atmosphere).
"""

import math

import numpy as np
import torch
import torch.nn.functional as F

RANDOM_NUMBERS = 21  # per image: 8 for the geometry and the gain, then one offset for each of at most 13 bands

SCALE = 1.15  # zoom in or out by at most this factor (log-uniform)
SHIFT = 0.08  # of the image's side, at most, in each direction
GAIN = 0.1  # reflectances times 1 ± this
OFFSET = 0.05  # standard deviations of each band, plus or minus, at most


def random_numbers(seed: int, epoch: int, images: int) -> np.ndarray:
    """Draw the random numbers of an epoch: (images, RANDOM_NUMBERS) float32 in [0, 1).

    Row i belongs to image i of the list, whatever the order of the batches and the number of workers or processes.
    """
    return np.random.default_rng((seed, epoch, 0)).random((images, RANDOM_NUMBERS), np.float32)


def band_statistics(pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of each band over all images and pixels, with values scaled to [0, 1].

    Args:
        pixels: (images, 64, 64, bands) uint8 or uint16, of the training list only.

    Returns:
        Two float32 arrays of shape (bands,).
    """
    bands, scale = pixels.shape[-1], np.iinfo(pixels.dtype).max
    total, squares = np.zeros(bands), np.zeros(bands)
    for start in range(0, len(pixels), 256):
        values = pixels[start : start + 256].reshape(-1, bands).astype(np.float64)
        total += values.sum(axis=0)
        squares += (values**2).sum(axis=0)
    count = pixels.size / bands
    mean = total / count
    std = np.sqrt(np.maximum(squares / count - mean**2, 0))
    # A constant band has no information: it becomes zero instead of not-a-number.
    return (mean / scale).astype(np.float32), np.where(std > 0, std / scale, 1).astype(np.float32)


def preprocess(
    pixels: torch.Tensor, mean: torch.Tensor, std: torch.Tensor, augmentation: str, random: torch.Tensor
) -> torch.Tensor:
    """Turn pixels as a file holds them into network input.

    Args:
        pixels: (batch, height, width, bands) uint8 or uint16.
        mean, std: (bands,) float32, of values scaled to [0, 1].
        augmentation: a name in AUGMENTATIONS.
        random: (batch, RANDOM_NUMBERS) in [0, 1).

    Returns:
        (batch, bands, height, width) float32.
    """
    scaled = pixels.permute(0, 3, 1, 2).to(torch.float32) / torch.iinfo(pixels.dtype).max
    augmented = AUGMENTATIONS[augmentation](scaled, random, std[:, None, None])
    return (augmented - mean[:, None, None]) / std[:, None, None]


def none(images: torch.Tensor, random: torch.Tensor, std: torch.Tensor) -> torch.Tensor:
    """Evaluation: the image as it is."""
    return images


def mild(images: torch.Tensor, random: torch.Tensor, std: torch.Tensor) -> torch.Tensor:
    """Mirror left-right and top-bottom, each with probability 1/2."""
    flip_x, flip_y = (random[:, column, None, None, None] < 0.5 for column in (0, 1))
    images = torch.where(flip_x, images.flip(3), images)
    return torch.where(flip_y, images.flip(2), images)


def strong(images: torch.Tensor, random: torch.Tensor, std: torch.Tensor) -> torch.Tensor:
    """One of the eight flips and quarter turns, a modest zoom and shift, a common gain and an offset per band.

    Zooming blurs an image a little. Test images are not blurred, so half of the training images are not zoomed or shifted.
    """
    sign_x, sign_y = (torch.where(random[:, column] < 0.5, -1.0, 1.0) for column in (0, 1))
    transpose, moved = random[:, 2] < 0.5, random[:, 3] < 0.5
    zoom = torch.where(moved, torch.exp((2 * random[:, 4] - 1) * math.log(SCALE)), 1.0)
    # Each row maps an output position (x, y, 1) in [-1, 1] to the input position that is sampled there.
    matrix = torch.zeros(len(images), 2, 3, device=images.device)
    matrix[:, 0, 0] = torch.where(transpose, 0.0, sign_x * zoom)
    matrix[:, 0, 1] = torch.where(transpose, sign_x * zoom, 0.0)
    matrix[:, 1, 0] = torch.where(transpose, sign_y * zoom, 0.0)
    matrix[:, 1, 1] = torch.where(transpose, 0.0, sign_y * zoom)
    shift = (2 * random[:, 5:7] - 1) * 2 * SHIFT  # the side has length 2 here
    matrix[:, :, 2] = torch.where(moved[:, None], shift, 0.0)
    grid = F.affine_grid(matrix, list(images.shape), align_corners=False)
    images = F.grid_sample(images, grid, mode="bicubic", padding_mode="reflection", align_corners=False)
    gain = 1 + (2 * random[:, 7, None, None, None] - 1) * GAIN
    offset = (2 * random[:, 8 : 8 + images.shape[1], None, None] - 1) * OFFSET * std
    return images * gain + offset


AUGMENTATIONS = {"none": none, "mild": mild, "strong": strong}
