"""From pixels to network input, a whole batch at a time, on its device: scale, augment, standardise.

A patch seen from above has no top and no left side, so flips and quarter turns are as real as the original. The
photometric change acts on reflectances, where it has a physical meaning: a common gain (sun and haze) and a small offset
per band (atmosphere).
"""

import functools
import math

import numpy as np
import simplejpeg
import torch
import torch.nn.functional as F

STRONG_NUMBERS = 21  # per image: 8 for the geometry and the gain, then one offset for each of at most 13 bands
ROBUST_NUMBERS = 9  # one for whether, one for each change, three for the noise
RANDOM_NUMBERS = STRONG_NUMBERS + ROBUST_NUMBERS

SCALE = 1.15  # zoom in or out by at most this factor (log-uniform)
SHIFT = 0.08  # of the image's side, at most, in each direction
GAIN = 0.1  # reflectances times 1 ± this
OFFSET = 0.05  # standard deviations of each band, plus or minus, at most


def random_numbers(seed: int, epoch: int, images: int) -> np.ndarray:
    """Draw the random numbers of an epoch: (images, RANDOM_NUMBERS) float32 in [0, 1).

    Row i belongs to image i of the list, whatever the order of the batches and the number of workers or processes.
    """
    strong, robust = (
        np.random.default_rng((seed, epoch, stream)).random((images, numbers), np.float32)
        for stream, numbers in ((0, STRONG_NUMBERS), (2, ROBUST_NUMBERS))  # 1 is the order of the images
    )
    return np.concatenate([strong, robust], axis=1)


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
    highest = torch.iinfo(pixels.dtype).max
    scaled = pixels.permute(0, 3, 1, 2).to(torch.float32) / highest
    augmented = AUGMENTATIONS[augmentation](scaled, random, std[:, None, None], highest)
    return (augmented - mean[:, None, None]) / std[:, None, None]


def none(images: torch.Tensor, random: torch.Tensor, std: torch.Tensor, highest: int) -> torch.Tensor:
    """Evaluation: the image as it is."""
    return images


def mild(images: torch.Tensor, random: torch.Tensor, std: torch.Tensor, highest: int) -> torch.Tensor:
    """Mirror left-right and top-bottom, each with probability 1/2."""
    flip_x, flip_y = (random[:, column, None, None, None] < 0.5 for column in (0, 1))
    images = torch.where(flip_x, images.flip(3), images)
    return torch.where(flip_y, images.flip(2), images)


def strong(images: torch.Tensor, random: torch.Tensor, std: torch.Tensor, highest: int) -> torch.Tensor:
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


def robust(images: torch.Tensor, random: torch.Tensor, std: torch.Tensor, highest: int) -> torch.Tensor:
    """`strong`; then half of the images are changed in each of the ways in CHANGES, each with its probability.

    The other half stays sharp, as most images are that the network will see. Only 8-bit images in colour become JPEGs.
    """
    images, random = strong(images, random, std, highest), random[:, STRONG_NUMBERS:]
    is_picture = highest == 255 and images.shape[1] == 3
    for column, (change, probability) in enumerate(CHANGES if is_picture else CHANGES[:-1], start=1):
        chosen = torch.nonzero((random[:, 0] < 0.5) & (random[:, column] < probability))[:, 0]
        if len(chosen):
            strength = (random[chosen, column] / probability)[:, None, None, None]  # uniform in [0, 1), too
            images[chosen] = change(images[chosen], strength, random[chosen, -3:], std)
    return images


def _light(images: torch.Tensor, strength: torch.Tensor, random: torch.Tensor, std: torch.Tensor) -> torch.Tensor:
    """0.4 to 1.5 times the light."""
    return images * torch.exp(-0.9 + 1.3 * strength)


def _blur(images: torch.Tensor, strength: torch.Tensor, random: torch.Tensor, std: torch.Tensor) -> torch.Tensor:
    """Towards the binomial of five pixels, whose standard deviation is one pixel; half of the images all the way."""
    row = images.new_tensor([1, 4, 6, 4, 1]) / 16
    kernel = (row[:, None] * row).expand(images.shape[1], 1, 5, 5)
    blurred = F.conv2d(F.pad(images, (2, 2, 2, 2), mode="reflect"), kernel, groups=images.shape[1])
    return torch.lerp(images, blurred, (2 * strength).clamp(max=1))


def _resample(images: torch.Tensor, strength: torch.Tensor, random: torch.Tensor, std: torch.Tensor) -> torch.Tensor:
    """Towards half the resolution and back."""
    back = F.interpolate(F.avg_pool2d(images, 2), scale_factor=2, mode="bilinear", align_corners=False)
    return torch.lerp(images, back, strength)


@functools.cache
def _noise_fields(device: torch.device) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(0).standard_normal((256, 64, 64), np.float32)).to(device)


def _noise(images: torch.Tensor, strength: torch.Tensor, random: torch.Tensor, std: torch.Tensor) -> torch.Tensor:
    """Normal noise of at most a fifth of each band's standard deviation: fields drawn once, picked and shifted at random."""
    bands, height, width = images.shape[1:]
    fields = _noise_fields(images.device)
    first, down, right = (random * random.new_tensor([len(fields), height, width])).long().T  # three times (batch,)
    picked = first[:, None] + torch.arange(bands, device=images.device)
    rows = down[:, None] + torch.arange(height, device=images.device)
    columns = right[:, None] + torch.arange(width, device=images.device)
    picked, rows, columns = picked[:, :, None, None], rows[:, None, :, None], columns[:, None, None, :]
    return images + 0.2 * strength * std * fields[picked % len(fields), rows % 64, columns % 64]


def _jpeg(images: torch.Tensor, strength: torch.Tensor, random: torch.Tensor, std: torch.Tensor) -> torch.Tensor:
    """Compressed with a quality of 30 to 95 and chroma at half resolution, as most programs do."""
    pixels = (255 * images.permute(0, 2, 3, 1)).round().clamp(0, 255).to(torch.uint8).cpu().numpy()
    qualities = (30 + 65 * strength).long().flatten().tolist()
    jpegs = (
        simplejpeg.encode_jpeg(np.ascontiguousarray(image), quality, colorsubsampling="420")
        for image, quality in zip(pixels, qualities, strict=True)
    )
    decoded = np.stack([simplejpeg.decode_jpeg(jpeg) for jpeg in jpegs])
    return torch.from_numpy(decoded).to(images.device).permute(0, 3, 1, 2) / 255


# What `robust` changes, in this order, and in what share of the images that it changes.
CHANGES = ((_light, 0.15), (_blur, 0.225), (_resample, 0.15), (_noise, 0.15), (_jpeg, 0.225))

AUGMENTATIONS = {"none": none, "mild": mild, "strong": strong, "robust": robust}
