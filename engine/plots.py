"""The figures of the tasks. Plots know arrays, names and paths, no networks."""

from pathlib import Path

from base.files import atomic_write
from base.project import CLASSES

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
from PIL import Image

# Paul Tol's "muted" scheme, for colour-blind readers and print, with its pale grey darkened for lines.
COLOURS = ("#CC6677", "#332288", "#BBA544", "#117733", "#66B2DD", "#882255", "#44AA99", "#999933", "#AA4499", "#777777")
MEAN_COLOUR = "#D55E00"
DPI = 250

plt.rcParams |= {"font.size": 8, "axes.spines.top": False, "axes.spines.right": False, "axes.titlelocation": "left"}


def save(figure: plt.Figure, path: Path, source: str | None) -> None:
    """Write a figure. `source`, the hash of what it shows, goes into the PNG's text (None: of no single model)."""
    with atomic_write(path) as partial:
        # Without the software's version the same figure gives the same bytes.
        figure.savefig(partial, format="png", dpi=DPI, metadata={"Software": None, "Source": source})
    plt.close(figure)


def source_of(path: Path) -> str | None:
    """The hash that `save` wrote into a figure; None if the file is no such figure."""
    try:
        with Image.open(path if path.is_file() else "") as image:  # a pipe would never end
            return image.info.get("Source")
    except Exception:  # Pillow raises several types for what is no image
        return None


def val_curves(path: Path, setting: str, history: list[dict], best_epoch: int, title: str, source: str) -> None:
    """Val accuracy, mean TPR, mAP, and TPR and average precision (AP) per class, over the epochs of one setting.

    Args:
        history: one row per epoch, with "val_accuracy", "val_mean_tpr", "val_map", "val_tpr_<class>" and "val_ap_<class>"
            in [0, 1]; None for a class without images.
        best_epoch: the chosen one, from 1; it is marked.
        source: see `save`.
    """
    accuracy, mean_tpr = _percent(history, "val_accuracy"), _percent(history, "val_mean_tpr")
    tpr, precision = ({name: _percent(history, f"val_{kind}_{name}") for name in CLASSES} for kind in ("tpr", "ap"))
    best = best_epoch - 1
    # Half a page wide and a quarter of a page high, to stand side by side in print.
    figure = plt.figure(figsize=(3.45, 2.3))
    axes = figure.add_axes((0.062, 0.66, 0.43, 0.195))  # the cells that `_class_panels` leaves free
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
    told = "every class has a TPR of 100 %" if lowest == 100 else f"the lowest TPR is {lowest:.1f} %, {worst}"
    text = f"{title}, {setting}: best val accuracy {accuracy[best]:.1f} %\nin epoch {best + 1}; {told}"
    figure.suptitle(text, fontsize=6.5, x=0.01, y=0.997, ha="left")
    save(figure, path, source)


def _percent(history: list[dict], key: str) -> np.ndarray:
    return 100 * np.array([np.nan if row[key] is None else row[key] for row in history], dtype=float)


def _class_panels(figure: plt.Figure, tpr: dict[str, np.ndarray], precision: dict[str, np.ndarray], best: int) -> None:
    """One panel per class, with the other classes in grey; the grid's first two cells stay free."""
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
        # Two texts, because the lines of one would not be equally high in all panels.
        axes.set_title(name, fontsize=5, pad=8)
        value = "no image" if np.isnan(tpr[name][best]) else f"{tpr[name][best]:.1f} %"
        axes.text(0, 1.08, value, fontsize=5, transform=axes.transAxes)


def _curve(axes: plt.Axes, values: np.ndarray, best: int, colour: str, width: float, linestyle="-") -> None:
    """One line over the epochs, with a dot at the best one (all that a single epoch shows)."""
    axes.plot(np.arange(1, len(values) + 1), values, color=colour, linewidth=width, linestyle=linestyle)
    axes.plot(best + 1, values[best], color=colour, marker="o", markersize=width + 1.8, clip_on=False, zorder=3)


def _precision(axes: plt.Axes, values: np.ndarray) -> None:
    """Average precision over the epochs: thin and dotted, because it is mostly close to 100 %."""
    axes.plot(np.arange(1, len(values) + 1), values, color="black", linewidth=0.6, linestyle=(0, (1, 1)))


def _frame_curves(axes: plt.Axes, curves: list[np.ndarray], best: int, settled: int) -> None:
    """Limits, ticks and the best epoch's line, the same for all axes that show the same curves."""
    # Epochs before the curves settle may lie below the frame: the differences that matter are near the top.
    visible = np.concatenate([[values[best], *values[settled:]] for values in curves])
    low = np.clip(5 * np.floor(np.nanmin(visible) / 5), 0, 95)
    axes.set_ylim(low, 100 + (100 - low) * 0.04)
    axes.yaxis.set_major_locator(matplotlib.ticker.MaxNLocator(nbins=3, steps=[1, 2, 5, 10]))
    epochs = len(curves[0])
    span = max(epochs - 1, 1)  # a single epoch is at the left, too, beside the axis's label
    axes.set(xlim=(1 - 0.05 * span, 1 + 1.05 * span), xticks=sorted({1, epochs}))
    axes.axvline(best + 1, color="black", linewidth=0.3, zorder=1.5)
    axes.tick_params(labelsize=5, width=0.4, length=1.5, pad=1.2)
    axes.spines[:].set_linewidth(0.4)


def confusion_matrix(path: Path, confusion: list[list[int]], title: str, source: str) -> None:
    """Counts of test images, rows true classes, columns predicted ones."""
    counts = np.array(confusion)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    off_diagonal = counts - np.diag(np.diag(counts))
    true, predicted = np.unravel_index(off_diagonal.argmax(), counts.shape)
    # As large as a setting's graph, beside which it may stand.
    figure, axes = plt.subplots(figsize=(3.45, 2.45), layout="constrained")
    # The square root makes the few mistakes visible beside the many hits.
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
    mistakes, times = off_diagonal.sum(), off_diagonal.max()
    most = f";\nmost often {CLASSES[true]} taken for {CLASSES[predicted]} ({times})" if times > 1 else ""
    most = ";\neach of them once" if times == 1 else most
    axes.set_title(
        f"{title} test: {accuracy:.1%} of {counts.sum():,} images correct, {mistakes} wrong{most}", fontsize=6
    )
    save(figure, path, source)


def contact_sheet(
    path: Path, rows: list[tuple[str, list[tuple[np.ndarray, str, bool]]]], title: str, source: str, width: float = 3.5
) -> None:
    """Rows of images, each with a caption.

    Args:
        rows: (label of the row, [(image (64, 64, 3) uint8, caption, whether it shows a mistake)]).
        width: inches; 3.5 is half a page.
    """
    columns = max(round(width / 0.85), *(len(images) for _, images in rows))  # so that a single image is not enlarged
    lines = max(caption.count("\n") + 1 for _, images in rows for _, caption, _ in images)
    font_size = 5.5 if width < 5 else 4.8  # so that class names fit above an image
    height = (width / columns + 0.04 + 0.1 * lines) * len(rows) + 0.4
    figure, grid = plt.subplots(len(rows), columns, figsize=(width, height), squeeze=False)
    left, top = 0.06 if any(label for label, _ in rows) else 0.005, 1 - (0.32 + 0.1 * lines) / height
    gap = (0.05 + 0.1 * lines) * columns / width  # in heights of an image
    figure.subplots_adjust(left=left, right=0.995, bottom=0.003, top=top, hspace=gap, wspace=0.06)
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
