"""The networks: torchvision backbones with loaded weights, cut after the pooling, then exactly one linear layer.

Six bands are two groups of three, so that each group fits weights made for three channels:

    none       one group, one backbone
    concat     late fusion: the groups' pooled features side by side
    add        late fusion: their sum
    early      the first K convolutions once per group, their outputs averaged; then one backbone
    attention  concat, after each group's feature map has looked at the other's, phased in from zero

A network takes standardised images (batch, bands, 64, 64), resizes them to its setting's size and returns logits
(batch, 10). This is the only file that imports torchvision: others take it from here.
"""

import copy
import warnings

import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from project import CLASSES, UserError
from setting import Setting

try:
    import torchvision.models as torchvision_models
except RuntimeError:
    # A CUDA build of torchvision beside a CPU build of torch: its compiled operators cannot load, and importing it fails
    # because these two are not declared; no network here calls them. Declared first, where they do load, they would end
    # the process.
    _operators = torch.library.Library("torchvision", "DEF")
    _operators.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _operators.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    import torchvision.models as torchvision_models
from torchvision.datasets import utils as torchvision_downloads  # noqa: F401  (for download.py)
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

FUSIONS = ("none", "concat", "add", "early", "attention")


def known_backbones() -> list[str]:
    return torchvision_models.list_models(module=torchvision_models)


# One backbone ----------------------------------------------------------------------------------------------------


def _keeps_size(convolution: nn.Conv2d) -> bool:
    same = all(2 * pad + 1 == kernel for pad, kernel in zip(convolution.padding, convolution.kernel_size, strict=True))
    return same and convolution.stride == convolution.dilation == (1, 1)


class DepthwiseConvolution(nn.Conv2d):
    """A depthwise convolution that pads maps smaller than its kernel in training; the result is the same.

    On processors with AVX2 oneDNN takes a slow way to the weights' gradient there, three times a step in a MobileNetV2 at
    64 pixels: a step takes 6 to 17 % longer without this. With AVX-512 it does not, and the padding costs 6 to 9 %.
    """

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        (height, width), (rows, columns) = images.shape[2:], self.kernel_size
        if not self.training or (height >= rows and width >= columns):
            return super().forward(images)
        padded = F.pad(images, (0, max(0, columns - width), 0, max(0, rows - height)))
        return super().forward(padded)[..., :height, :width]


POOLINGS = ("avgpool", "adaptive_avg_pool2d", "mean")  # what torchvision's networks call their global pooling


def torchvision_name(name: str) -> str:
    """Torchvision's name of a tensor of a backbone: "features.features.0.…" is its "features.0.…", "norm.0.…" its
    "classifier.0.…"."""
    kind, _, rest = name.partition(".")
    return rest if kind == "features" else f"classifier.{rest}"


class Backbone(nn.Module):
    """A torchvision network up to its globally pooled features.

    Attributes:
        features: (batch, 3, height, width) to {"map": (batch, channels, rows, columns)}, under torchvision's names.
        norm: what the network's classifier does to the pooled features ahead of its first linear layer, if it
            normalises them (ConvNeXt); else the identity.
        channels: length of the pooled features.

    Raises:
        UserError: an unknown network, or one without a global pooling (a vision transformer).
    """

    def __init__(self, name: str) -> None:
        super().__init__()
        if name not in known_backbones():
            raise UserError(f"unknown backbone {name!r}; known: {', '.join(known_backbones())}")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of slow random initialisation; of nodes that differ in training
            network = torchvision_models.get_model(name, weights=None)
            _, nodes = get_graph_node_names(network)
            poolings = [index for index, node in enumerate(nodes) if node in POOLINGS]
            if not poolings:
                raise UserError(
                    f"{name} cannot be cut after a global pooling; take another backbone, e.g. mobilenet_v2, resnet18, "
                    "efficientnet_b0 or convnext_tiny"
                )
            self.features = create_feature_extractor(network, {nodes[poolings[-1] - 1]: "map"})
        for module in self.features.modules():
            if isinstance(module, nn.Conv2d) and module.groups == module.in_channels > 1 and _keeps_size(module):
                module.__class__ = DepthwiseConvolution  # the same parameters under the same names
        self.norm = nn.Sequential()
        for part, module in getattr(network, "classifier", nn.Sequential()).named_children():
            if not isinstance(module, nn.LayerNorm):  # includes torchvision's LayerNorm2d
                break
            self.norm.add_module(part, module)
        with torch.no_grad():
            self.channels = copy.deepcopy(self).eval()(torch.zeros(1, 3, 96, 96)).shape[1]

    def load(self, weights: dict[str, torch.Tensor]) -> None:
        """Load weights under torchvision's names; those of the classifier are left out.

        Raises:
            ValueError: a tensor is missing or has another shape.
        """
        own = {}
        for name, tensor in self.state_dict().items():
            theirs = torchvision_name(name)
            if theirs not in weights or weights[theirs].shape != tensor.shape:
                raise ValueError(f"{theirs} is missing or has another shape")
            own[name] = weights[theirs]
        self.load_state_dict(own)

    def feature_map(self, images: torch.Tensor) -> torch.Tensor:
        """(batch, 3, height, width) to (batch, channels, rows, columns)."""
        return self.features(images)["map"]

    def pooled(self, feature_map: torch.Tensor) -> torch.Tensor:
        """(batch, channels, rows, columns) to (batch, channels): the mean over positions, as torchvision pools."""
        return self.norm(feature_map.mean((2, 3), keepdim=True)).flatten(1)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.pooled(self.feature_map(images))


# Networks --------------------------------------------------------------------------------------------------------


def orientation(images: torch.Tensor, number: int) -> torch.Tensor:
    """One of the eight flips and quarter turns of square images (batch, bands, size, size); 0: as they are."""
    images = images.transpose(2, 3) if number & 4 else images
    return images.flip([axis for axis, bit in ((2, 2), (3, 1)) if number & bit])


class Network(nn.Module):
    """Resize, features by subclass, one linear layer.

    `features` turns (batch, bands, size, size) into (batch, channels).
    """

    def __init__(self, image_size: int, channels: int) -> None:
        super().__init__()
        self.image_size = image_size
        self.linear = nn.Linear(channels, len(CLASSES))

    def embed(self, images: torch.Tensor, views: int = 1) -> torch.Tensor:
        """What the linear layer sees, (batch, channels): the mean of the pooled features over so many orientations.

        Of eight, it is the same however the image is turned, and so are the logits.
        """
        if images.shape[-1] != self.image_size:
            size = (self.image_size, self.image_size)
            images = F.interpolate(images, size, mode="bilinear", align_corners=False, antialias=False)
        features = self.features(images)
        for number in range(1, views):
            features = features + self.features(orientation(images, number))
        return features / views

    def forward(self, images: torch.Tensor, views: int = 1) -> torch.Tensor:
        return self.linear(self.embed(images, views))


class SingleNetwork(Network):
    """One group of bands, one backbone."""

    def __init__(self, backbone: Backbone, image_size: int) -> None:
        super().__init__(image_size, backbone.channels)
        self.backbone = backbone

    def features(self, images: torch.Tensor) -> torch.Tensor:
        return self.backbone(images)


class LateFusion(Network):
    """Two groups of three bands, fused after the pooling.

    A shared backbone sees both groups in one batch. Called once per group, it would standardise each by its own batch
    statistics in training and by running statistics that mix both, and so fit neither, in evaluation.

    Args:
        backbones: one, to be shared, or one for each group.
        combine: "concat" or "add".
    """

    def __init__(self, backbones: list[Backbone], image_size: int, combine: str) -> None:
        channels = backbones[0].channels
        super().__init__(image_size, 2 * channels if combine == "concat" else channels)
        self.backbones = nn.ModuleList(backbones)
        self.combine = combine

    def feature_maps(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Feature maps of both groups, each (batch, channels, rows, columns)."""
        groups = images[:, :3], images[:, 3:]
        if len(self.backbones) == 1:
            # Not chunk(2): exported to ONNX, that would fix the batch size.
            return self.backbones[0].feature_map(torch.cat(groups)).unflatten(0, (2, -1)).unbind()
        return tuple(backbone.feature_map(group) for backbone, group in zip(self.backbones, groups, strict=True))

    def features(self, images: torch.Tensor) -> torch.Tensor:
        first, second = self.feature_maps(images)
        first, second = self.backbones[0].pooled(first), self.backbones[-1].pooled(second)
        return torch.cat([first, second], dim=1) if self.combine == "concat" else first + second


class AttentionFusion(LateFusion):
    """Late fusion by concatenation, after each group's feature map has attended to the other's.

    The result of the attention is scaled by a learned gate that starts at zero: training starts as plain late fusion.
    Scaled dot-product attention as in Vaswani et al., Attention Is All You Need, 2017, with one head.
    """

    WIDTH = 128  # of queries, keys and values: an eighth of the features or less, so the loaded weights keep the say

    def __init__(self, backbones: list[Backbone], image_size: int) -> None:
        super().__init__(backbones, image_size, "concat")
        channels = backbones[0].channels
        self.norm = nn.LayerNorm(channels)
        self.query, self.key, self.value = (nn.Linear(channels, self.WIDTH) for _ in range(3))
        self.out = nn.Linear(self.WIDTH, channels)
        self.gate = nn.Parameter(torch.zeros(1))

    def feature_maps(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        first, second = super().feature_maps(images)
        return first + self.gate * self.attend(first, second), second + self.gate * self.attend(second, first)

    def attend(self, to_update: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        """What each position of one map finds in the other: (batch, channels, rows, columns)."""
        own, theirs = (
            self.norm(map_.flatten(2).transpose(1, 2)) for map_ in (to_update, other)
        )  # (batch, positions, channels)
        found = F.scaled_dot_product_attention(self.query(own), self.key(theirs), self.value(theirs))
        return self.out(found).transpose(1, 2).reshape(to_update.shape)


class TwinConvolution(nn.Module):
    """A convolution for each of two groups that come one after the other along the batch.

    The last twin in a network ends the separation: it returns the groups' outputs added with weight 0.5.
    """

    def __init__(self, convolution: nn.Conv2d, last: bool) -> None:
        super().__init__()
        self.first, self.second = convolution, copy.deepcopy(convolution)
        self.last = last

    def forward(self, groups: torch.Tensor) -> torch.Tensor:
        first, second = groups.unflatten(0, (2, -1)).unbind()
        first, second = self.first(first), self.second(second)
        return 0.5 * first + 0.5 * second if self.last else torch.cat([first, second])


class EarlyFusion(SingleNetwork):
    """Two groups of three bands, fused before the non-linearity of the K-th convolution.

    The first K convolutions are there twice, both with the loaded weights. Given the same three bands twice, the
    network equals its three-band original.

    Raises:
        UserError: the K-th convolution lies on a branch, so the groups cannot meet there.
    """

    def __init__(self, backbone: Backbone, image_size: int, convolutions: int) -> None:
        super().__init__(backbone, image_size)
        names = [name for name, module in backbone.features.named_modules() if isinstance(module, nn.Conv2d)]
        for name in names[:convolutions]:
            twin = TwinConvolution(backbone.features.get_submodule(name), last=name == names[convolutions - 1])
            backbone.features.set_submodule(name, twin)
        try:
            with torch.no_grad():
                images = torch.zeros(2, 6, image_size, image_size)
                whole = len(copy.deepcopy(self).eval().features(images)) == len(images)
        except RuntimeError:
            whole = False
        if not whole:
            raise UserError(
                f"early fusion after convolution {convolutions} would cut a residual branch of the backbone; "
                "set a smaller early_convolutions in config.py (1 always works)"
            )

    def features(self, images: torch.Tensor) -> torch.Tensor:
        return self.backbone(torch.cat([images[:, :3], images[:, 3:]]))


def average_of(model: nn.Module, setting: Setting) -> AveragedModel:
    """The exponential average of a model's weights and batch-norm statistics, to be updated at each step."""
    return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(setting.weight_averaging), use_buffers=True)


def build_model(setting: Setting, weights: dict[str, torch.Tensor] | None) -> Network:
    """The network of a setting.

    Args:
        weights: the backbones' initial weights under torchvision's names; None: random ones, or to be loaded over.

    Raises:
        UserError: an unknown backbone, one that cannot be cut or fused so, or weights of another one.
    """
    backbone = Backbone(setting.backbone)
    if weights is not None:
        try:
            backbone.load(weights)
        except (ValueError, AttributeError) as error:
            raise UserError(f"the initial weights are not those of {setting.backbone}: {error}") from error
    if setting.fusion == "none":
        return SingleNetwork(backbone, setting.image_size)
    if setting.fusion == "early":
        return EarlyFusion(backbone, setting.image_size, setting.early_convolutions)
    if setting.fusion == "attention":
        return AttentionFusion([backbone], setting.image_size)
    backbones = [backbone, copy.deepcopy(backbone)] if setting.separate_backbones else [backbone]
    return LateFusion(backbones, setting.image_size, setting.fusion)
