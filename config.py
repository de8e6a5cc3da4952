"""Everything there is to set. Two paths, then the team; the rest has sensible values.

Paths and the profile can also come from the environment, which wins over this file:

    EUROSAT_DATASET_ROOT=/data EUROSAT_PROFILE=full python split_data.py
"""

import os
from dataclasses import dataclass, replace
from pathlib import Path

# The two paths ---------------------------------------------------------------------------------------------------

# Everything that is written lies below this folder.
PROJECT_ROOT = Path(os.environ.get("EUROSAT_PROJECT_ROOT") or Path(__file__).parent).expanduser().absolute()
# The folder that holds EuroSAT_RGB/ and EuroSAT_MS/ (or what other archives unpack to). Only ever read.
DATASET_ROOT = Path(os.environ.get("EUROSAT_DATASET_ROOT") or PROJECT_ROOT / "data").expanduser().absolute()

# The team --------------------------------------------------------------------------------------------------------

# Up to three of ("Given Family", matriculation number); for example ("Ada Lovelace", 3141592).
TEAM: list[tuple[str, int]] = []
# Seeds the split, the training and every random number; 20190702 while the team is empty.
SEED = TEAM[0][1] if TEAM else 20190702

# How much data ---------------------------------------------------------------------------------------------------

# "course": the sizes below; "full": all images; "demo": all of the small generated sample.
PROFILE = os.environ.get("EUROSAT_PROFILE", "course")
# Images in train, val and test of each profile; None takes the 60 / 20 / 20 % pools whole.
SPLIT_SIZES = {"course": (2500, 1000, 2000), "full": None, "demo": None}
# Take the pools whole where an image set is too small for the sizes, instead of stopping.
ALLOW_SMALLER_SPLITS = os.environ.get("EUROSAT_ALLOW_SMALLER_SPLITS", "") not in ("", "0")

# What is trained -------------------------------------------------------------------------------------------------

RED_GREEN_BLUE = ("B04", "B03", "B02")
NEAR_AND_SHORT_WAVE_INFRARED = ("B08", "B11", "B12")
RED_EDGE = ("B05", "B06", "B07")


@dataclass(frozen=True)
class Setting:
    """One way to train: `train_rgb.py` and `train_ms.py` try all of theirs and keep the best by val."""

    name: str  # also the name of its folder in outputs/
    augmentation: str  # "none", "mild" or "strong": augment.py
    epochs: int
    band_groups: tuple[tuple[str, ...], ...] = (RED_GREEN_BLUE,)  # one group, or two to be fused; three bands each
    fusion: str = "none"  # "none" (one group), "concat", "add", "early" or "attention": models.py
    separate_backbones: bool = False  # concat and add: one backbone for each group instead of a shared one
    early_convolutions: int = 1  # early: how many convolutions each group has to itself
    backbone: str = "mobilenet_v2"  # any torchvision classification network with a feature map
    weights: str | None = "DEFAULT"  # torchvision's name of the initial weights; None: random ones
    image_size: int = 64  # pixels; the 64 x 64 patches are resized where this differs
    batch_size: int = 32  # images per step, over all processes
    learning_rate: float = 2e-3  # the maximum, reached after the warm-up
    weight_decay: float = 0.05
    label_smoothing: float = 0.1
    warmup: float = 0.2  # fraction of all steps in which the learning rate rises

    @property
    def bands(self) -> tuple[str, ...]:
        """All bands in the order in which the network sees them."""
        return tuple(band for group in self.band_groups for band in group)


# Chosen for accuracy per second. For a quarter of a point more in twice the time: image_size=96 and batch_size=32 (97.1
# instead of 96.8 % for "strong", on the 5,471 images of the train pool that no list holds).
RGB_SETTINGS = [
    Setting("mild", augmentation="mild", epochs=5, batch_size=64),
    Setting("strong", augmentation="strong", epochs=10, batch_size=64),
]

_INFRARED = (RED_GREEN_BLUE, NEAR_AND_SHORT_WAVE_INFRARED)
MS_SETTINGS = [
    Setting("infrared_mild", "mild", epochs=20, band_groups=_INFRARED, fusion="concat"),
    Setting("infrared_strong", "strong", epochs=20, band_groups=_INFRARED, fusion="concat"),
    Setting("red_edge_strong", "strong", epochs=20, band_groups=(RED_GREEN_BLUE, RED_EDGE), fusion="concat"),
    Setting("infrared_early", "strong", epochs=20, band_groups=_INFRARED, fusion="early"),
    Setting("infrared_attention", "strong", epochs=20, band_groups=_INFRARED, fusion="attention"),
]

if PROFILE == "demo":  # the generated sample is small and simple, and the demo shall be quick
    RGB_SETTINGS = [replace(setting, epochs=5, batch_size=32) for setting in RGB_SETTINGS]
    MS_SETTINGS = [replace(setting, epochs=5) for setting in MS_SETTINGS]

# Classes whose best and worst ranked test images are shown.
RANKED_CLASSES = ("AnnualCrop", "Forest", "Highway")
