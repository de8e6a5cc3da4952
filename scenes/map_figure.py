"""The picture of a map: the scene beside its classes, and each class's share."""

from pathlib import Path

from base.files import sha256
from base.project import CLASSES

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import to_rgb
from matplotlib.patches import Patch

from engine.plots import save
from scenes.maps import LandUse

# As a map shows them: fields yellow to brown, green what grows, blue water, and what is built in between; white: no data.
MAP_COLOURS = (
    *("#F2D16B", "#1E6B3A", "#A9C46C", "#3B3B3B", "#9A6FB0"),
    *("#5FB56B", "#B5702F", "#DC5E5E", "#63B8EA", "#1F4E9C"),
)
PALETTE = np.array([to_rgb(colour) for colour in (*MAP_COLOURS, "white")])


def land_use_map(path: Path, picture: np.ndarray, land_use: LandUse, size: tuple[int, int], metres: float) -> None:
    """Write a scene beside its map, with each class's share of the pixels that have one.

    Args:
        picture: (height, width, 3) uint8, of the whole scene, which has `size` rows and columns of pixels of `metres`.
    """
    classes, stride = land_use.classes, land_use.stride
    rows, columns = classes.shape
    shares = land_use.areas / land_use.areas.sum()
    height, width = (2.75 * count / max(rows, columns) for count in (rows, columns))  # inches of each picture
    figure, (scene, axes) = plt.subplots(1, 2, figsize=(2 * width + 2, max(height, 2.3) + 0.6), layout="constrained")
    scene.imshow(picture, extent=(0, size[1] / stride, size[0] / stride, 0))
    axes.imshow(PALETTE[np.minimum(classes, len(CLASSES))], extent=(0, columns, rows, 0), interpolation="nearest")
    lines = [
        Patch(facecolor=MAP_COLOURS[index], label=f"{100 * shares[index]:.1f} % {CLASSES[index]}")
        for index in np.argsort(-shares, kind="stable")
    ]
    if land_use.unlike is not None:
        marked = land_use.unlike & (classes < len(CLASSES))
        said = f"{100 * marked.sum() / (classes < len(CLASSES)).sum():.1f} % unlike training"
        lines.append(Patch(facecolor="none", hatch="///////", label=said))
        if marked.any():
            with plt.rc_context({"hatch.linewidth": 0.4}):
                doubled = np.kron(marked, np.ones((2, 2)))  # so that a single cell has an area
                places = [(np.arange(2 * count) + 0.5) / 2 for count in (columns, rows)]
                axes.contourf(*places, doubled, levels=[0.5, 1.5], colors="none", hatches=["//////"])
    for each in (scene, axes):
        each.set(xticks=[], yticks=[], xlim=(0, columns), ylim=(rows, 0))
        each.spines[:].set_visible(False)
    # The scale: a round length of at most a third of the width.
    third = size[1] * metres / 3
    power = 10 ** np.floor(np.log10(third))
    length = power * max(factor for factor in (1, 2, 5) if factor * power <= third)
    scene.plot([0, length / metres / stride], [1.01 * rows] * 2, color="black", linewidth=1.5, clip_on=False)
    scene.set_xlabel(f"{length / 1000:g} km" if length >= 1000 else f"{length:g} m", fontsize=6.5, loc="left")
    for line in lines:
        line.set(edgecolor="black", linewidth=0.3)
    figure.legend(handles=lines, loc="outside right center", fontsize=6.5, frameon=False)
    title = f"{CLASSES[shares.argmax()]} covers {shares.max():.0%} of {land_use.areas.sum() * metres**2 / 1e6:,.3g} km²"
    figure.suptitle(f"{title}; a cell is {metres * stride:.0f} m", fontsize=8, x=0.01, ha="left")
    save(figure, path, source=sha256(classes.tobytes()))
