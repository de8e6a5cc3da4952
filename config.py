"""All that can be set: two paths, then the team. The rest has sensible values.

A path is text: "/data/EuroSAT", "~/EuroSAT", or relative to this file. The environment wins over the file:

    EUROSAT_DATASET_ROOT=/data/EuroSAT EUROSAT_PROFILE=full python split_data.py
"""

from dataclasses import replace

from base.setting import Setting  # explains the fields

# The two paths ---------------------------------------------------------------------------------------------------

# The folder with the unpacked archives; only ever read. None: data/ below the project root.
DATASET_ROOT = None
# Everything that is written lies below this folder.
PROJECT_ROOT = "."

# The team --------------------------------------------------------------------------------------------------------

# Up to three of ("Given Family", matriculation number), for example [("Ada Lovelace", 3141592), ("Emmy Noether", 2718281)].
TEAM = []
# The seed of training: the first member's number, or this one while the team is empty.
SEED = 20190702
# The seed of the split. It does not follow the team, so everyone has the same lists.
SPLIT_SEED = 20190702

# How much data ---------------------------------------------------------------------------------------------------

# "course": the sizes below. "full": all images. "published" and "spatial": the two splits that papers compare on (RGB).
# "demo": the few images in sample/.
PROFILE = "course"
# Images in train, val and test of the profile "course".
COURSE_SIZES = (2500, 1000, 2000)
# If an image set is too small for these sizes: take all its images instead of stopping.
ALLOW_SMALLER_SPLITS = False

# What is trained -------------------------------------------------------------------------------------------------

RED_GREEN_BLUE = ("B04", "B03", "B02")
NEAR_AND_SHORT_WAVE_INFRARED = ("B08", "B11", "B12")
RED_EDGE = ("B05", "B06", "B07")
_INFRARED = (RED_GREEN_BLUE, NEAR_AND_SHORT_WAVE_INFRARED)

# Chosen on val and on spare images: docs/results.md. `robust` costs accuracy on clean images and withstands noise, blur, light,
# JPEG and resampling.
_RGB = [
    Setting("mild", "mild", epochs=3, image_size=96, views=8),
    Setting("strong", "strong", epochs=8, image_size=112, views=8),
    Setting("robust", "robust", epochs=20, image_size=96, views=8),
]
# For 16,200 images.
_LONG = Setting("strong", "strong", epochs=8, image_size=160, batch_size=64, views=8)
# These start from the final RGB model, whose lists are from the same pools: run train_rgb.py first.
_FROM_RGB = Setting(
    "infrared_strong",
    "strong",
    epochs=12,
    band_groups=_INFRARED,
    fusion="concat",
    weights="rgb-model",
    image_size=128,
    views=8,
)
_MS = [
    replace(_FROM_RGB, name="infrared_mild", augmentation="mild"),
    _FROM_RGB,
    replace(_FROM_RGB, name="red_edge_strong", band_groups=(RED_GREEN_BLUE, RED_EDGE)),
    replace(_FROM_RGB, name="infrared_early", fusion="early"),
    replace(_FROM_RGB, name="infrared_attention", fusion="attention"),
]

# The settings that each profile and task tries; the best by val is kept.
SETTINGS = {
    "course": {"rgb": _RGB, "ms": _MS},
    # The model for your own images.
    "full": {"rgb": [replace(_RGB[2], epochs=10)], "ms": _MS},
    # Fixed before the first run on the lists of `published`.
    "published": {"rgb": [_LONG]},
    "spatial": {"rgb": [_LONG]},
    # The sample is small, and the demo should be quick.
    "demo": {
        "rgb": [Setting("mild", "mild", epochs=5), Setting("strong", "strong", epochs=10)],
        "ms": [Setting("infrared_strong", "strong", 15, _INFRARED, fusion="concat", batch_size=12)],
    },
}

# What is shown ---------------------------------------------------------------------------------------------------

# Classes whose best and worst ranked test images are shown.
RANKED_CLASSES = ("AnnualCrop", "Forest", "Highway")
