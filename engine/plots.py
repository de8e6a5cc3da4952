"""Every figure. Plots know arrays, names and paths, no networks."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from PIL import Image

from dataset import CLASSES, IMAGE_SETS
from project import atomic_write, sha256

# Paul Tol's "muted" scheme, told apart by colour-blind readers and in print; its pale grey darkened for lines.
COLOURS = ("#CC6677", "#332288", "#BBA544", "#117733", "#66B2DD", "#882255", "#44AA99", "#999933", "#AA4499", "#777777")
MEAN_COLOUR = "#D55E00"
DPI = 250

plt.rcParams.update(
    {"font.size": 8, "axes.spines.top": False, "axes.spines.right": False, "axes.titlelocation": "left"}
)


def save(figure: plt.Figure, path: Path, source: str | None) -> None:
    """Write a figure; `source`, the hash of what it shows, goes into the PNG's text (None: of no one final model)."""
    with atomic_write(path) as partial:
        # Without the software's version in it, the same figure gives the same bytes.
        figure.savefig(partial, format="png", dpi=DPI, metadata={"Software": None, "Source": source})
    plt.close(figure)


def source_of(path: Path) -> str | None:
    """What `save` was told that the figure shows; None where the file is no such figure."""
    try:
        with Image.open(path) as image:
            return image.info.get("Source")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):  # Pillow's, for what is no image
        return None


def val_curves(path: Path, setting: str, history: list[dict], best_epoch: int, task: str, source: str) -> None:
    """Val accuracy, mean TPR, mAP and each class's TPR and average precision (AP) over the epochs of one setting.

    Args:
        path: of the PNG.
        setting: its name.
        history: one row per epoch, with "val_accuracy", "val_mean_tpr", "val_map", "val_tpr_<class>" and "val_ap_<class>" in
            [0, 1]; None for a class without images.
        best_epoch: the one chosen, from 1; it is marked.
        task: "rgb" or "ms".
        source: see `save`.
    """
    accuracy, mean_tpr = _percent(history, "val_accuracy"), _percent(history, "val_mean_tpr")
    tpr, precision = ({name: _percent(history, f"val_{kind}_{name}") for name in CLASSES} for kind in ("tpr", "ap"))
    best = best_epoch - 1
    # Half a page wide and a quarter of one high: two of them stand side by side in print, in four rows.
    figure = plt.figure(figsize=(3.45, 2.3))
    axes = figure.add_axes((0.062, 0.66, 0.43, 0.195))  # the place that `_class_panels` leaves free
    _curve(axes, accuracy, best, "black", 1.5)
    _curve(axes, mean_tpr, best, MEAN_COLOUR, 0.8, linestyle=(0, (3, 1.2)))
    _precision(axes, _percent(history, "val_map"))
    _frame_curves(axes, [accuracy, mean_tpr], best, settled=len(history) // 4)
    axes.set_xlabel(f"epoch (line: {best + 1}, the best)", fontsize=5, labelpad=-5)  # between the ticks' labels
    axes.text(0.98, 0.06, "dotted: average precision", fontsize=4, transform=axes.transAxes, ha="right")
    axes.set_title(f"val accuracy {accuracy[best]:.1f} %", fontsize=5, fontweight="bold", pad=2)
    axes.set_title(f"mean TPR {mean_tpr[best]:.1f} %", fontsize=5, color=MEAN_COLOUR, loc="right", pad=2)
    _class_panels(figure, tpr, precision, best)
    worst = min(CLASSES, key=lambda name: np.nan_to_num(tpr[name][best], nan=101))
    lowest = tpr[worst][best]
    figure.suptitle(
        f"{IMAGE_SETS[task].name}, {setting}: best val accuracy {accuracy[best]:.1f} %\nin epoch {best + 1}; "
        + ("every class is found whole" if lowest == 100 else f"the lowest TPR is {lowest:.1f} %, {worst}"),
        fontsize=6.5,
        x=0.01,
        y=0.997,
        ha="left",
    )
    save(figure, path, source)


def _percent(history: list[dict], key: str) -> np.ndarray:
    return 100 * np.array([np.nan if row[key] is None else row[key] for row in history], dtype=float)


def _class_panels(figure: plt.Figure, tpr: dict[str, np.ndarray], precision: dict[str, np.ndarray], best: int) -> None:
    """One panel per class, before the other classes in grey; the first two of the grid's cells stay free."""
    grid = figure.add_gridspec(3, 4, left=0.062, right=0.985, bottom=0.06, top=0.81, hspace=0.54, wspace=0.22)
    for cell, (name, colour) in enumerate(zip(CLASSES, COLOURS, strict=True), start=2):
        axes = figure.add_subplot(grid[cell // 4, cell % 4])
        for values in tpr.values():
            axes.plot(np.arange(1, len(values) + 1), values, color="#CCCCCC", linewidth=0.35, zorder=1)
        _curve(axes, tpr[name], best, colour, 1)
        _precision(axes, precision[name])
        _frame_curves(axes, list(tpr.values()), best, settled=len(tpr[name]) // 2)
        axes.tick_params(labelleft=cell in (2, 4, 8), labelbottom=cell >= 8)
        axes.set_xlabel("epoch" if cell >= 8 else "", fontsize=5, labelpad=-5)
        # Two texts, as the lines of one would not stand equally high in all panels.
        axes.set_title(name, fontsize=5, pad=8)
        value = "no image" if np.isnan(tpr[name][best]) else f"{tpr[name][best]:.1f} %"
        axes.text(0, 1.08, value, fontsize=5, transform=axes.transAxes)


def _curve(axes: plt.Axes, values: np.ndarray, best: int, colour: str, width: float, linestyle="-") -> None:
    """One line over the epochs, with a dot at the best one (which is all there is to see of a single epoch)."""
    axes.plot(np.arange(1, len(values) + 1), values, color=colour, linewidth=width, linestyle=linestyle)
    axes.plot(best + 1, values[best], color=colour, marker="o", markersize=width + 1.8, clip_on=False, zorder=3)


def _precision(axes: plt.Axes, values: np.ndarray) -> None:
    """Average precision over the epochs: thin and dotted, for it mostly lies close to 100 %."""
    axes.plot(np.arange(1, len(values) + 1), values, color="black", linewidth=0.6, linestyle=(0, (1, 1)))


def _frame_curves(axes: plt.Axes, curves: list[np.ndarray], best: int, settled: int) -> None:
    """Limits, ticks and the best epoch's line, the same for all axes that show the same curves."""
    # What came before the curves settled may lie below the frame: what matters is told apart near the top.
    shown = np.concatenate([[values[best], *values[settled:]] for values in curves])
    low = np.clip(5 * np.floor(np.nanmin(shown) / 5), 0, 95)
    axes.set_ylim(low, 100 + (100 - low) * 0.04)
    axes.yaxis.set_major_locator(matplotlib.ticker.MaxNLocator(nbins=3, steps=[1, 2, 5, 10]))
    epochs = len(curves[0])
    span = max(epochs - 1, 1)  # a single epoch stands left, too, and leaves the axis its label
    axes.set(xlim=(1 - 0.05 * span, 1 + 1.05 * span), xticks=sorted({1, epochs}))
    axes.axvline(best + 1, color="black", linewidth=0.3, zorder=1.5)
    axes.tick_params(labelsize=5, width=0.4, length=1.5, pad=1.2)
    axes.spines[:].set_linewidth(0.4)


def confusion_matrix(path: Path, confusion: list[list[int]], task: str, source: str) -> None:
    """Counts of test images, rows true classes, columns predicted ones."""
    counts = np.array(confusion)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    off_diagonal = counts - np.diag(np.diag(counts))
    true, predicted = np.unravel_index(off_diagonal.argmax(), counts.shape)
    # Half a page wide; of the shape of a setting's graph, beside which it may stand.
    figure, axes = plt.subplots(figsize=(3.45, 2.45), layout="constrained")
    # The root shows the few mistakes beside the many hits.
    axes.imshow(np.sqrt(shares), cmap="Blues", vmin=0, vmax=1, aspect="auto")
    for row, column in np.ndindex(counts.shape):
        if counts[row, column]:
            colour = "white" if shares[row, column] > 0.4 else "black"
            axes.text(column, row, counts[row, column], ha="center", va="center", color=colour, fontsize=5.5)
    axes.set_xticks(range(len(CLASSES)), CLASSES, rotation=40, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(len(CLASSES)), CLASSES)
    axes.tick_params(labelsize=5.5, length=1.5, width=0.4, pad=1.2)
    axes.set_xlabel("predicted", fontsize=5.5, labelpad=1)
    axes.set_ylabel("true", fontsize=5.5, labelpad=1)
    axes.spines[:].set_visible(False)
    accuracy = np.trace(counts) / counts.sum()
    mistakes = off_diagonal.sum()
    times = off_diagonal.max()
    most = f";\nmost often {CLASSES[true]} taken for {CLASSES[predicted]} ({times})" if times > 1 else ""
    most = ";\neach of them once" if times == 1 else most
    axes.set_title(
        f"{IMAGE_SETS[task].name} test: {accuracy:.1%} of {counts.sum():,} images right, {mistakes} wrong{most}",
        fontsize=6,
    )
    save(figure, path, source)


def contact_sheet(
    path: Path,
    rows: list[tuple[str, list[tuple[np.ndarray, str, bool]]]],
    title: str,
    source: str,
    width: float = 3.5,
) -> None:
    """Rows of images, each with a caption.

    Args:
        rows: (label of the row, [(image (64, 64, 3) uint8, caption, whether it tells of a mistake)]).
        width: inches; 3.5 is half a page, so that two of them stand side by side in print.
    """
    columns = max(round(width / 0.85), *(len(images) for _, images in rows))  # so that a lone image is no giant
    lines = max(caption.count("\n") + 1 for _, images in rows for _, caption, _ in images)
    font_size = 5.5 if width < 5 else 4.8  # of class names as wide as an image
    height = (width / columns + 0.04 + 0.1 * lines) * len(rows) + 0.4
    figure, grid = plt.subplots(len(rows), columns, figsize=(width, height), squeeze=False)
    figure.subplots_adjust(
        left=0.06 if any(label for label, _ in rows) else 0.005,
        right=0.995,
        bottom=0.003,
        top=1 - (0.32 + 0.1 * lines) / height,
        hspace=(0.05 + 0.1 * lines) * columns / width,  # in heights of an image
        wspace=0.06,
    )
    for axes in grid.flat:
        axes.set_axis_off()
    for axes_row, (label, images) in zip(grid, rows, strict=True):
        for axes, (image, caption, mistake) in zip(axes_row, images):
            axes.imshow(image, interpolation="nearest")
            axes.set_title(caption, fontsize=font_size, loc="center", pad=1.5, color="#AA2222" if mistake else "black")
        position = {"transform": axes_row[0].transAxes, "ha": "right", "va": "center", "rotation": 90}
        axes_row[0].text(-0.06, 0.5, label, fontsize=5.5, fontweight="bold", **position)
    figure.suptitle(title, fontsize=6.5, x=0.01, y=0.998, ha="left")
    save(figure, path, source)


# As a map shows them: fields yellow to brown, green what grows, blue water, and what is built in between.
MAP_COLOURS = (
    "#F2D16B",
    "#1E6B3A",
    "#A9C46C",
    "#3B3B3B",
    "#9A6FB0",
    "#5FB56B",
    "#B5702F",
    "#DC5E5E",
    "#63B8EA",
    "#1F4E9C",
)
NO_DATA_COLOUR = "#FFFFFF"


def land_use_map(path: Path, picture: np.ndarray, classes: np.ndarray, unlike: np.ndarray, metres: float) -> None:
    """A scene beside its map, with each class's share of the cells that have one.

    Args:
        picture: (height, width, 3) uint8, of the ground that the cells cover.
        classes: (rows, columns): index in CLASSES; anything larger where there is no data.
        unlike: (rows, columns) bool: cells unlike the training set, hatched.
        metres: a cell's side.
    """
    rows, columns = classes.shape
    known = classes < len(CLASSES)
    shares = np.bincount(classes[known], minlength=len(CLASSES)) / known.sum()
    side = 2.75  # inches that the longer side of each picture takes
    height, width = (side * count / max(rows, columns) for count in (rows, columns))
    figure = plt.figure(figsize=(2 * width + 1.95, max(height, 2.3) + 0.52))
    whole_width, whole_height = figure.get_size_inches()
    for left, shown_image in ((0.08, picture), (width + 0.2, _coloured(classes))):
        box = (left / whole_width, 0.28 / whole_height, width / whole_width, height / whole_height)
        axes = figure.add_axes(box)
        axes.imshow(shown_image, extent=(0, columns, rows, 0), interpolation="nearest" if left > 1 else None)
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_visible(False)
    marked = unlike & known
    if marked.any():
        with plt.rc_context({"hatch.linewidth": 0.4}):
            doubled = np.kron(marked, np.ones((2, 2)))  # so that a single cell has an area
            grid = [(np.arange(2 * count) + 0.5) / 2 for count in (columns, rows)]
            axes.contourf(*grid, doubled, levels=[0.5, 1.5], colors="none", hatches=["//////"])
            axes.set(xlim=(0, columns), ylim=(rows, 0))
    _scale_bar(figure.axes[0], columns, metres)
    legend = figure.add_axes(
        ((2 * width + 0.3) / whole_width, 0.28 / whole_height, 1.6 / whole_width, 2.3 / whole_height)
    )
    legend.set(xlim=(0, 1), ylim=(11.5, -0.5))
    legend.set_axis_off()
    lines = [(MAP_COLOURS[index], "", CLASSES[index], shares[index]) for index in np.argsort(-shares, kind="stable")]
    for line, (colour, hatch, name, share) in enumerate(
        [*lines, ("none", "///////", "unlike training", marked.sum() / known.sum())]
    ):
        legend.add_patch(
            plt.Rectangle((0, line - 0.35), 0.11, 0.7, facecolor=colour, hatch=hatch, edgecolor="black", linewidth=0.3)
        )
        legend.text(0.16, line, name, va="center", fontsize=6.5)
        legend.text(1, line, f"{100 * share:.1f} %", va="center", ha="right", fontsize=6.5)
    largest = int(shares.argmax())
    figure.suptitle(
        f"{CLASSES[largest]} covers {shares[largest]:.0%} of {known.sum() * metres**2 / 1e6:,.3g} km²; a cell is {metres:.0f} m",
        fontsize=8, x=0.08 / whole_width, y=1 - 0.08 / whole_height, ha="left",
    )  # fmt: skip
    save(figure, path, source=sha256(classes.tobytes()))


def _coloured(classes: np.ndarray) -> np.ndarray:
    """(rows, columns, 3) in [0, 1]."""
    palette = np.array([matplotlib.colors.to_rgb(colour) for colour in (*MAP_COLOURS, NO_DATA_COLOUR)])
    return palette[np.minimum(classes, len(CLASSES))]


def _scale_bar(axes: plt.Axes, columns: int, metres: float) -> None:
    """Below a picture that is `columns` cells wide: a round length of at most a third of it."""
    third = columns * metres / 3
    power = 10 ** np.floor(np.log10(third))
    length = power * max(factor for factor in (1, 2, 5) if factor * power <= third)
    transform = matplotlib.transforms.blended_transform_factory(axes.transData, axes.transAxes)
    axes.plot([0, length / metres], [-0.03, -0.03], color="black", linewidth=1.5, transform=transform, clip_on=False)
    text = f" {length / 1000:g} km" if length >= 1000 else f" {length:g} m"
    axes.text(length / metres, -0.03, text, transform=transform, va="center", fontsize=6.5)
