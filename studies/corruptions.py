"""What happens to images on their way to a network: noise, blur, less light, JPEG, resampling, a cloud, lost lines.

For measuring; training has its own code (`robust` in augment.py). Pixels are as files hold them, (images, 64, 64, bands) uint8
or uint16, before and after. Strengths of noise and clouds are in pixel values (0 to 255), or in reflectance for uint16.
"""

import numpy as np
import simplejpeg
import torch
import torch.nn.functional as F
from scipy.ndimage import gaussian_filter

CLOUD = {"uint8": 235, "uint16": 0.3}  # a bright cloud
LOST_LINES = 3  # of 64
UNSEEN = ("cloud over a tenth", "lost lines")  # kinds that `robust` has not trained on


def corruptions(pixels: np.ndarray, seed: int) -> dict[str, np.ndarray]:
    """The same images in seven ways, or six if they are no pictures; `robust` has trained on the kinds of all but two."""
    random, is_picture = np.random.default_rng(seed), pixels.dtype == np.uint8
    name, strength = ("noise of 5/255", 5) if is_picture else ("noise of 0.005", 0.005)
    changed = {name: noisy(pixels, strength, random), "blur of 1 pixel": blurred(pixels, 1)}
    if is_picture:
        changed["JPEG quality 50"] = compressed(pixels, 50)
    return changed | {
        "half the light": brightened(pixels, 0.5),
        "resampled by 0.8": resampled(pixels, 0.8),
        "cloud over a tenth": clouded(pixels, 0.1, random),
        "lost lines": without_lines(pixels, random),
    }


def unit(pixels: np.ndarray) -> int:
    """A strength of 1 in the numbers of a file: a pixel value, or a reflectance."""
    return 1 if pixels.dtype == np.uint8 else 10_000


def as_file(values: np.ndarray, like: np.ndarray) -> np.ndarray:
    return np.rint(values).clip(0, np.iinfo(like.dtype).max).astype(like.dtype)


def noisy(pixels: np.ndarray, strength: float, random: np.random.Generator) -> np.ndarray:
    """Normal noise with this standard deviation."""
    return as_file(pixels + strength * unit(pixels) * random.standard_normal(pixels.shape, np.float32), pixels)


def blurred(pixels: np.ndarray, sigma: float) -> np.ndarray:
    """By a Gaussian with this standard deviation in pixels."""
    return as_file(gaussian_filter(pixels.astype(np.float32), (0, sigma, sigma, 0), mode="reflect"), pixels)


def brightened(pixels: np.ndarray, gain: float) -> np.ndarray:
    return as_file(gain * pixels.astype(np.float32), pixels)


def compressed(pixels: np.ndarray, quality: int) -> np.ndarray:
    """A JPEG of this quality with chroma at half resolution. For pictures only."""
    jpegs = (simplejpeg.encode_jpeg(np.ascontiguousarray(image), quality, colorsubsampling="420") for image in pixels)
    return np.stack([simplejpeg.decode_jpeg(jpeg) for jpeg in jpegs])


def resampled(pixels: np.ndarray, factor: float) -> np.ndarray:
    """To this factor of the pixels (bilinear, antialiased) and back (bicubic)."""
    side = pixels.shape[1]
    images = torch.from_numpy(pixels.astype(np.float32)).permute(0, 3, 1, 2)
    small = F.interpolate(images, size=[round(factor * side)] * 2, mode="bilinear", align_corners=False, antialias=True)
    back = F.interpolate(small, size=[side, side], mode="bicubic", align_corners=False)
    return as_file(back.permute(0, 2, 3, 1).numpy(), pixels)


def clouded(pixels: np.ndarray, share: float, random: np.random.Generator) -> np.ndarray:
    """A round, bright, textured cloud around a random pixel, over this share of the image, with an edge of 6 pixels."""
    images, side = pixels.shape[:2]
    centres = random.integers(side, size=(images, 2, 1, 1))
    distances = np.hypot(*np.moveaxis(np.mgrid[:side, :side] - centres, 1, 0))  # (images, 64, 64)
    radii = np.quantile(distances.reshape(images, -1), share, axis=1)[:, None, None]
    cover = ((radii + 3 - distances) / 6).clip(0, 1)[..., None]
    texture = gaussian_filter(random.standard_normal((images, side, side)), (0, 3, 3))[..., None]
    cloud = CLOUD[pixels.dtype.name] * unit(pixels) * (1 + 0.5 * texture)
    return as_file(pixels * (1 - cover) + cloud * cover, pixels)


def without_lines(pixels: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Random lines of the image are zero, as where a transmission failed."""
    images, side = pixels.shape[:2]
    lost = random.permuted(np.tile(np.arange(side), (images, 1)), axis=1)[:, :LOST_LINES]
    changed = pixels.copy()
    np.put_along_axis(changed, lost[:, :, None, None], 0, axis=1)
    return changed
