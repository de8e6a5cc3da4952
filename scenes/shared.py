"""Overlapping windows share the backbone's first layers: computed once for a tile, up to stride 8, then cut into windows.

Each window has the layers after that for itself, and it keeps its edges: convolutions pad with zeros, which the network learned
to see. So what the zeros reach is computed along the edges of rows and columns of windows, and put into the windows. Only in its
corners a window sees a little of its neighbours. Batch norm is folded into the convolutions, which changes rounding alone.
docs/speed.md has the speed, and the agreement with separate windows.
"""

import copy
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch.fx import GraphModule
from torch.fx.experimental.optimization import fuse
from torch.fx.passes.shape_prop import ShapeProp
from torch.fx.passes.split_module import split_module

from augment import preprocess
from dataset import SIDE
from engine.final_model import FinalModel
from models import Backbone, LateFusion, SingleNetwork
from scenes.novelty import TrainingFeatures

CUT = 8  # resized pixels from one position of the shared feature map to the next
TILE = 64  # columns of windows whose shared layers are computed at once
BATCH_SIZE = 64  # windows in a step
AT_ONCE = 4  # windows, whose shared layers fit into a processor's cache

# Rows and columns of windows, their probabilities (batch, 10), and their distances (batch,) from the training set, or 0.
Predicted = tuple[tuple[np.ndarray, np.ndarray], torch.Tensor, torch.Tensor]


def standardised(final: FinalModel, pixels: np.ndarray) -> torch.Tensor:
    """(batch, height, width, bands) to (batch, bands, height, width) on the model's device."""
    device = final.model.linear.weight.device
    return preprocess(*(values.to(device) for values in (torch.tensor(pixels), final.mean, final.std)), "none", None)


@dataclass(frozen=True)
class SharedLayers:
    """A final model with its backbone in two parts, for windows every `stride` pixels."""

    final: FinalModel
    stride: int
    backbone: Backbone
    first: GraphModule  # (batch, 3, height, width) to (batch, channels, height / 8, width / 8)
    rest: GraphModule  # from there to the backbone's feature map
    before: int  # positions of the first part's output that see beyond the upper or left edge
    after: int  # the same for the lower or right edge

    @torch.inference_mode()
    def predict(
        self, pixels: np.ndarray, voting: np.ndarray, reference: TrainingFeatures | None
    ) -> Iterator[Predicted]:
        """As `separately` in maps.py."""
        stride, linear = self.stride, self.final.model.linear
        # Cells beside a tile that the corners of its windows see.
        margin = -(-max(self.before, self.after) * CUT * SIDE // (self.final.setting.image_size * stride))
        for start in range(0, voting.shape[1], TILE):
            left, end = max(start - margin, 0), start + TILE + margin
            chosen = np.argwhere(voting[:, start : start + TILE])
            if not len(chosen):
                continue
            images, plain, sides = self.of_tile(pixels[:, left * stride : end * stride + SIDE - stride])
            for some in np.split(chosen, range(BATCH_SIZE, len(chosen), BATCH_SIZE)):
                rows, columns = some[:, 0], some[:, 1] + start
                places = rows, columns - left
                maps = plain[places]  # (batch, groups, height, width, channels), a copy
                maps[:, :, :, : self.before], maps[:, :, :, -self.after :] = (side[places] for side in sides[3])
                maps[:, :, : self.before], maps[:, :, -self.after :] = (side[places] for side in sides[2])
                pooled = self.backbone.pooled(self.rest(maps.flatten(0, 1).movedim(-1, 1)))
                probabilities = linear(pooled.unflatten(0, (len(some), -1)).flatten(1)).softmax(1).cpu()
                distances = reference.distances(images[places]).cpu() if reference else torch.zeros(len(some))
                yield (rows, columns), probabilities, distances

    def of_tile(self, pixels: np.ndarray) -> tuple[torch.Tensor, torch.Tensor, dict[int, list[torch.Tensor]]]:
        """All windows in a tile, (height, width, bands) of whole cells, as views without copies.

        Returns standardised images, (rows, columns, bands, 64, 64); what the first part makes of the tile, (rows, columns,
        groups, height, width, channels); and in this form the edges to put into it: upper and lower (2), left and right (3).
        """
        size, stride = self.final.setting.image_size, self.stride
        side, step = size // CUT, stride * size // (CUT * SIDE)
        # A strip holds what its kept positions see, in whole pixels.
        ends = next(n for n in range(self.before + self.after, side + 1) if n * CUT * SIDE % size == 0)
        width = ends * CUT * SIDE // size  # pixels
        image = standardised(self.final, pixels[None])[0]
        groups = image.unflatten(0, (-1, 3))

        def first(parts: torch.Tensor) -> torch.Tensor:
            """(parts, groups, 3, height, width), resized and through the first part of the backbone."""
            batch = F.interpolate(parts.flatten(0, 1), scale_factor=size / SIDE, mode="bilinear", align_corners=False)
            some = max(1, AT_ONCE * size**2 // batch[0, 0].numel())
            outputs = [self.first(few.contiguous(memory_format=torch.channels_last)) for few in batch.split(some)]
            return torch.cat(outputs).unflatten(0, parts.shape[:2])

        def edges(dim: int, start: int, kept: slice) -> torch.Tensor:
            """Strips that begin `start` pixels into all rows (dim 2) or columns (3) of windows."""
            strips = groups.narrow(dim, start, groups.shape[dim] - start).unfold(dim, width, stride)
            output = first(strips.movedim((dim, -1), (0, dim + 1)))
            if dim == 2:
                return output[..., kept, :].unfold(4, side, step).permute(0, 4, 1, 3, 5, 2)
            return output[..., kept].unfold(3, side, step).permute(3, 0, 1, 5, 4, 2)

        plain = first(groups[None])[0].unfold(2, side, step).unfold(3, side, step).permute(2, 3, 0, 4, 5, 1)
        begin, end = slice(self.before), slice(ends - self.after, None)
        sides = {dim: [edges(dim, 0, begin), edges(dim, SIDE - width, end)] for dim in (2, 3)}
        return image.unfold(1, SIDE, stride).unfold(2, SIDE, stride).permute(1, 2, 0, 3, 4), plain, sides


def shared_layers(final: FinalModel, stride: int) -> SharedLayers | None:
    """Cut the backbone at stride 8, as early as its output is narrowest. None if windows every `stride` pixels stay separate.

    They do if they do not overlap or do not begin at positions of the feature map, if the network has two backbones or fuses
    otherwise than by concatenation, if connections lead past every cut, or if the first part sees too much at once.
    """
    model, size = final.model.eval(), final.setting.image_size
    backbones = getattr(model, "backbones", None) or [getattr(model, "backbone", None)]
    concatenates = type(model) is SingleNetwork or (type(model) is LateFusion and model.combine == "concat")
    if not concatenates or len(backbones) > 1 or stride == SIDE or stride * size % (CUT * SIDE):
        return None
    whole, device, side = backbones[0].features, model.linear.weight.device, size // CUT
    features = fuse(GraphModule(whole, copy.deepcopy(whole.graph)).eval()).to(memory_format=torch.channels_last)
    with torch.inference_mode():
        ShapeProp(features).propagate(torch.zeros(1, 3, size, size, device=device))
        outputs = [(getattr(node.meta.get("tensor_meta"), "shape", ()), node) for node in features.graph.nodes]
        candidates = [(shape[1], index) for index, (shape, _) in enumerate(outputs) if shape[2:] == (side, side)]
        # How far the first part sees: what sees a patch that is "not a number" becomes so, too.
        image = torch.zeros(1, 3, 4 * SIDE, SIDE, device=device)
        image[:, :, 2 * SIDE : 3 * SIDE] = torch.nan
        image = F.interpolate(image, scale_factor=size / SIDE, mode="bilinear", align_corners=False)
        for _, index in sorted(candidates):
            if parts := _split(features, index):
                seen = parts[0](image).isnan().any(1).nonzero()[:, 1]
                before, after = int(seen.max()) - 3 * side + 1, 2 * side - int(seen.min())
                if before and after and before + after <= side:
                    return SharedLayers(final, stride, backbones[0], *parts, before, after)
    return None


def _split(features: GraphModule, last: int) -> tuple[GraphModule, GraphModule] | None:
    """The network up to a node, and the rest, which takes that node's output; None if it takes more than that."""
    later = set(list(features.graph.nodes)[last + 1 :])
    parts = split_module(features, features, lambda node: int(node in later))
    _, first, *rest = parts.graph.nodes
    return (parts.submod_0, parts.submod_1) if len(rest) == 2 and rest[0].args == (first,) else None
