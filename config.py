"""Everything there is to set. Two paths, then the team; the rest has sensible values.

A path is text: "/data/EuroSAT", "~/EuroSAT", or relative to this file. The environment wins over the file:

    EUROSAT_DATASET_ROOT=/data/EuroSAT EUROSAT_PROFILE=full python split_data.py
"""

from dataclasses import replace

from setting import Setting  # its docstring explains the fields

# The two paths ---------------------------------------------------------------------------------------------------

# The folder with the unpacked archives; only ever read. None: data/ below the project root.
DATASET_ROOT = None
# Everything that is written lies below this folder.
PROJECT_ROOT = "."

# The team --------------------------------------------------------------------------------------------------------

# Up to three of ("Given Family", matriculation number), for example [("Ada Lovelace", 3141592), ("Emmy Noether", 2718281)].
TEAM = []
# Seeds training and all its random numbers: the first member's number, or this one while the team is empty.
SEED = 20190702
# Seeds the split, and nothing else. It does not follow the team: everyone has the same lists.
SPLIT_SEED = 20190702

# How much data ---------------------------------------------------------------------------------------------------

# "course": the sizes below. "full": all images. "published" and "spatial": the two splits that papers compare on (RGB).
# "demo": the few images in sample/.
PROFILE = "course"
# Images in train, val and test of the profile "course".
COURSE_SIZES = (2500, 1000, 2000)
# Take all images of an image set that is too small for these sizes, instead of stopping.
ALLOW_SMALLER_SPLITS = False

# What is trained -------------------------------------------------------------------------------------------------

RED_GREEN_BLUE = ("B04", "B03", "B02")
NEAR_AND_SHORT_WAVE_INFRARED = ("B08", "B11", "B12")
RED_EDGE = ("B05", "B06", "B07")
_INFRARED = (RED_GREEN_BLUE, NEAR_AND_SHORT_WAVE_INFRARED)

# Chosen for accuracy per second. For a quarter of a point more in twice the time: image_size=96 and batch_size=32 (97.1
# instead of 96.8 % for "strong", on 5,471 images that no list held then).
_RGB = [
    Setting("mild", augmentation="mild", epochs=5, batch_size=64),
    Setting("strong", augmentation="strong", epochs=10, batch_size=64),
]
_MS = [
    Setting("infrared_mild", "mild", epochs=20, band_groups=_INFRARED, fusion="concat"),
    Setting("infrared_strong", "strong", epochs=20, band_groups=_INFRARED, fusion="concat"),
    Setting("red_edge_strong", "strong", epochs=20, band_groups=(RED_GREEN_BLUE, RED_EDGE), fusion="concat"),
    Setting("infrared_early", "strong", epochs=20, band_groups=_INFRARED, fusion="early"),
    Setting("infrared_attention", "strong", epochs=20, band_groups=_INFRARED, fusion="attention"),
]

# For each profile and task the settings that are tried; the best by val is kept.
SETTINGS = {
    "course": {"rgb": _RGB, "ms": _MS},
    "full": {"rgb": _RGB, "ms": _MS},
    "published": {"rgb": _RGB},
    "spatial": {"rgb": _RGB},
    # The sample is small, and the demo shall be quick.
    "demo": {
        "rgb": [replace(setting, batch_size=32) for setting in _RGB],
        "ms": [replace(setting, epochs=15, batch_size=12) for setting in _MS[1:2]],
    },
}

# What is shown ---------------------------------------------------------------------------------------------------

# Classes whose best and worst ranked test images are shown.
RANKED_CLASSES = ("AnnualCrop", "Forest", "Highway")
