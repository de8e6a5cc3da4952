"""The networks: torchvision backbones with loaded weights, global pooling, then exactly one linear layer.

Six bands are two groups of three bands, so that each group fits weights made for three channels:

    none       one group, one backbone
    concat     late fusion: the pooled features of both groups are concatenated
    add        late fusion: they are added
    early      each group has its own first K convolutions, whose outputs are averaged; then one backbone
    attention  concat, after each group's feature map has attended to the other's, phased in from zero

A network takes standardised images (batch, bands, 64, 64), resizes them to its setting's size and returns logits
(batch, 10). Only this file imports torchvision; others import it from here.
"""

import copy
import warnings

from base.errors import UserError
from base.project import CLASSES
from base.setting import Setting

import torch
import torch.nn.functional as F
from torch import nn

try:
    import torchvision.models as torchvision_models
except RuntimeError:
    # A CUDA build of torchvision beside a CPU build of torch: its compiled operators cannot load, and the import fails
    # because these two are not declared. No network here calls them. Declaring them first would end the process wherever
    # the operators do load.
    _operators = torch.library.Library("torchvision", "DEF")
    _operators.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _operators.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    import torchvision.models as torchvision_models
from torchvision.datasets import utils as torchvision_downloads  # noqa: F401  (for download.py)
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names


def all_backbones() -> list[str]:
    return torchvision_models.list_models(module=torchvision_models)


POOLINGS = ("avgpool", "adaptive_avg_pool2d", "mean")  # torchvision's names of the global pooling


def torchvision_name(name: str) -> str:
    """Torchvision's name of a tensor of a backbone: "features.features.0.…" is its "features.0.…", "norm.0.…" its
    "classifier.0.…"."""
    kind, _, rest = name.partition(".")
    return rest if kind == "features" else f"classifier.{rest}"


class Backbone(nn.Module):
    """A torchvision network up to its globally pooled features.

    Attributes:
        features: (batch, 3, height, width) to {"map": (batch, channels, rows, columns)}, under torchvision's names.
        norm: the normalisation of the pooled features before the classifier's linear layer (ConvNeXt), or the identity.
        channels: number of pooled features.

    A UserError says that the network is unknown, or has no global pooling (a vision transformer).
    """

    def __init__(self, name: str) -> None:
        super().__init__()
        if name not in all_backbones():
            raise UserError(f"unknown backbone {name!r}; known: {', '.join(all_backbones())}")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of slow random initialisation; of nodes that differ in training
            network = torchvision_models.get_model(name, weights=None)
            _, nodes = get_graph_node_names(network)
            poolings = [index for index, node in enumerate(nodes) if node in POOLINGS]
            if not poolings:
                raise UserError(f"{name} has no global pooling; take another backbone, e.g. resnet18")
            self.features = create_feature_extractor(network, {nodes[poolings[-1] - 1]: "map"})
        self.norm = nn.Sequential()
        for part, module in getattr(network, "classifier", nn.Sequential()).named_children():
            if not isinstance(module, nn.LayerNorm):  # includes torchvision's LayerNorm2d
                break
            self.norm.add_module(part, module)
        with torch.no_grad():
            self.channels = copy.deepcopy(self).eval()(torch.zeros(1, 3, 96, 96)).shape[1]

    def load(self, weights: dict[str, torch.Tensor]) -> None:
        """Load weights under torchvision's names, without those of the classifier; ValueError if they do not fit."""
        state = {}
        for name, tensor in self.state_dict().items():
            source = torchvision_name(name)
            if source not in weights or weights[source].shape != tensor.shape:
                raise ValueError(f"{source} is missing or has another shape")
            state[name] = weights[source]
        self.load_state_dict(state)

    def feature_map(self, images: torch.Tensor) -> torch.Tensor:
        """(batch, 3, height, width) to (batch, channels, rows, columns)."""
        return self.features(images)["map"]

    def pooled(self, feature_map: torch.Tensor) -> torch.Tensor:
        """(batch, channels, rows, columns) to (batch, channels): the mean over positions, as torchvision pools."""
        return self.norm(feature_map.mean((2, 3), keepdim=True)).flatten(1)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.pooled(self.feature_map(images))


def orientation(images: torch.Tensor, number: int) -> torch.Tensor:
    """One of the eight flips and quarter turns of square images (batch, bands, size, size). Number 0 changes nothing."""
    images = images.transpose(2, 3) if number & 4 else images
    return images.flip([axis for axis, bit in ((2, 2), (3, 1)) if number & bit])


class Network(nn.Module):
    """Resize, compute features, apply one linear layer.

    A subclass defines `features`, from (batch, bands, size, size) to (batch, channels).
    """

    def __init__(self, image_size: int, channels: int) -> None:
        super().__init__()
        self.image_size = image_size
        self.linear = nn.Linear(channels, len(CLASSES))

    def embed(self, images: torch.Tensor, views: int = 1) -> torch.Tensor:
        """The input of the linear layer, (batch, channels): the mean of the pooled features over the views.

        With eight views it does not depend on how the image is turned, and neither do the logits.
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

    A shared backbone sees both groups in one batch. Called once per group, batch norm would use the statistics of one
    group in training, and running statistics that mix both groups, and so fit neither, in evaluation.

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

    A learned gate that starts at zero scales the attention's output, so training starts as plain late fusion.
    Scaled dot-product attention with one head (Vaswani et al., Attention Is All You Need, 2017).
    """

    WIDTH = 128  # of queries, keys and values: small beside the features, so that the loaded weights dominate

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
        """The other map as seen from each position of `to_update`: (batch, channels, rows, columns)."""
        # (batch, positions, channels)
        queries, context = (self.norm(map_.flatten(2).transpose(1, 2)) for map_ in (to_update, other))
        attended = F.scaled_dot_product_attention(self.query(queries), self.key(context), self.value(context))
        return self.out(attended).transpose(1, 2).reshape(to_update.shape)


class TwinConvolution(nn.Module):
    """One convolution per group; the two groups are concatenated along the batch.

    The last twin in a network ends the separation: it returns the sum of both outputs, each with weight 0.5.
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
    """Two groups of three bands: each has its first K convolutions, whose last outputs are averaged; then one network.

    Both start with the loaded weights. Given the same three bands twice, the network equals its three-band original.
    `build_model` refuses a K-th convolution on a residual branch.
    """

    def __init__(self, backbone: Backbone, image_size: int, convolutions: int) -> None:
        super().__init__(backbone, image_size)
        names = [name for name, module in backbone.features.named_modules() if isinstance(module, nn.Conv2d)]
        if len(names) < convolutions:
            raise UserError(f"the backbone has {len(names)} convolutions; set a smaller early_convolutions")
        names = names[:convolutions]
        for name in names:
            twin = TwinConvolution(backbone.features.get_submodule(name), last=name == names[-1])
            backbone.features.set_submodule(name, twin)

    def features(self, images: torch.Tensor) -> torch.Tensor:
        return self.backbone(torch.cat([images[:, :3], images[:, 3:]]))


def build_model(setting: Setting, weights: dict[str, torch.Tensor] | None) -> Network:
    """The network of a setting.

    Args:
        weights: the backbones' initial weights under torchvision's names; None: random weights.

    A UserError says that the backbone is unknown, cannot be cut or fused like this, or that its weights are others.
    """
    backbone = Backbone(setting.backbone)
    if weights is not None:
        try:
            backbone.load(weights)
        except (ValueError, AttributeError) as error:
            raise UserError(f"the initial weights are not those of {setting.backbone}: {error}") from error
    size = setting.image_size
    if setting.fusion == "none":
        network = SingleNetwork(backbone, size)
    elif setting.fusion == "early":
        network = EarlyFusion(backbone, size, setting.early_convolutions)
    elif setting.fusion == "attention":
        network = AttentionFusion([backbone], size)
    else:
        backbones = [backbone, copy.deepcopy(backbone)] if setting.separate_backbones else [backbone]
        network = LateFusion(backbones, size, setting.fusion)
    try:
        with torch.no_grad():
            works = network.eval()(torch.zeros(2, len(setting.bands), size, size)).shape == (2, len(CLASSES))
    except RuntimeError:
        works = False
    if not works:
        told = f"{setting.backbone} does not work at {size} pixels with fusion {setting.fusion!r}"
        raise UserError(
            f"{told}; set a larger image_size or a smaller early_convolutions (1 always works) in config.py"
        )
    return network.train()
