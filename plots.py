"""Every figure. Plots know arrays, names and paths, no networks."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from PIL import Image

from dataset import CLASSES, IMAGE_SETS
from project import atomic_write

# Paul Tol's "muted" scheme, told apart by colour-blind readers and in print; its pale grey darkened for lines.
COLOURS = ("#CC6677", "#332288", "#BBA544", "#117733", "#66B2DD", "#882255", "#44AA99", "#999933", "#AA4499", "#777777")
DPI = 250

plt.rcParams.update(
    {"font.size": 8, "axes.spines.top": False, "axes.spines.right": False, "axes.titlelocation": "left"}
)


def save(figure: plt.Figure, path: Path, source: str) -> None:
    """Write a figure; `source`, the hash of what it shows, goes into the PNG's text."""
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


def val_curves(path: Path, setting: str, history: list[dict], task: str, source: str) -> None:
    """Val accuracy and TPR of each class over the epochs of one setting.

    Args:
        history: one row per epoch, with "val_accuracy", "val_mean_tpr" and "val_tpr_<class>" in [0, 1].
    """
    epochs = np.arange(1, len(history) + 1)
    percent = {name: 100 * _column(history, f"val_tpr_{name}") for name in CLASSES}
    accuracy = 100 * _column(history, "val_accuracy")
    best = max(range(len(history)), key=lambda i: (history[i]["val_accuracy"], history[i]["val_mean_tpr"]))
    figure, axes = plt.subplots(figsize=(5.6, 3.8), layout="constrained")
    for colour, name in zip(COLOURS, CLASSES, strict=True):
        axes.plot(epochs, percent[name], color=colour, linewidth=1, marker=".", markersize=3)
    axes.plot(epochs, accuracy, color="black", linewidth=2.2, marker=".", markersize=6)
    axes.axvline(best + 1, color="black", linewidth=0.6, linestyle=":")
    # The first epochs may lie below the frame: what matters is told apart near the top.
    settled = np.concatenate([values[len(history) // 4 :] for values in (*percent.values(), accuracy)])
    low = max(0, 5 * np.floor(np.nanmin(settled) / 5))
    axes.set(ylim=(low, 100 + (100 - low) * 0.02), xlim=(1 - 0.02 * len(history), len(history) + 0.01))
    axes.set(xlabel="epoch", ylabel="val accuracy and TPR (%)")
    axes.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(integer=True, min_n_ticks=1))
    axes.grid(axis="y", linewidth=0.3)
    worst = min(CLASSES, key=lambda name: np.nan_to_num(percent[name][best], nan=101))
    lowest = percent[worst][best]
    axes.set_title(
        f"{IMAGE_SETS[task].name}, {setting}: best val accuracy {accuracy[best]:.1f} % in epoch {best + 1};\n"
        + ("every class is found whole" if lowest == 100 else f"the lowest TPR is {lowest:.1f} %, {worst}"),
        fontsize=8.5,
    )
    labels = [(accuracy[-1], f"accuracy {accuracy[-1]:.1f}", "black")]
    labels += [
        (percent[name][-1], f"{name} {percent[name][-1]:.1f}", c) for c, name in zip(COLOURS, CLASSES, strict=True)
    ]
    _label_ends(axes, [label for label in labels if np.isfinite(label[0])], low)
    save(figure, path, source)


def _column(history: list[dict], key: str) -> np.ndarray:
    return np.array([np.nan if row[key] is None else row[key] for row in history], dtype=float)


def _label_ends(axes: plt.Axes, labels: list[tuple[float, str, str]], low: float) -> None:
    """Write (value, text, colour) right of the frame at each line's end, spread so that none covers another."""
    high = axes.get_ylim()[1]
    labels = sorted(labels, reverse=True)
    heights = [np.clip(value, low, high) for value, _, _ in labels]
    gap = (high - low) / 14
    for i in range(1, len(heights)):  # push down what is too near to the label above
        heights[i] = min(heights[i], heights[i - 1] - gap)
    for i in reversed(range(len(heights))):  # and back up what that pushed out of the frame
        floor = low if i == len(heights) - 1 else heights[i + 1] + gap
        heights[i] = max(heights[i], floor)
    for (value, text, colour), height in zip(labels, heights, strict=True):
        axes.annotate(
            text,
            xy=(1, np.clip(value, low, high)),
            xytext=(1.035, height),
            xycoords=("axes fraction", "data"),
            textcoords=("axes fraction", "data"),
            color=colour,
            fontsize=7,
            va="center",
            fontweight="bold" if colour == "black" else "normal",
            arrowprops={
                "arrowstyle": "-",
                "color": colour,
                "linewidth": 0.4,
                "shrinkA": 1,
                "shrinkB": 0,
                "relpos": (0, 0.5),
            },
        )


def confusion_matrix(path: Path, confusion: list[list[int]], task: str, source: str) -> None:
    """Counts of test images, rows true classes, columns predicted ones."""
    counts = np.array(confusion)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    off_diagonal = counts - np.diag(np.diag(counts))
    true, predicted = np.unravel_index(off_diagonal.argmax(), counts.shape)
    figure, axes = plt.subplots(figsize=(5.6, 4.6), layout="constrained")
    axes.imshow(np.sqrt(shares), cmap="Blues", vmin=0, vmax=1)  # the root shows the few mistakes beside the many hits
    for row, column in np.ndindex(counts.shape):
        if counts[row, column]:
            colour = "white" if shares[row, column] > 0.4 else "black"
            axes.text(column, row, counts[row, column], ha="center", va="center", color=colour)
    axes.set_xticks(range(len(CLASSES)), CLASSES, rotation=40, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(len(CLASSES)), CLASSES)
    axes.set(xlabel="predicted", ylabel="true")
    axes.spines[:].set_visible(False)
    accuracy = np.trace(counts) / counts.sum()
    mistakes = off_diagonal.sum()
    most = f";\nmost often {CLASSES[true]} taken for {CLASSES[predicted]} ({off_diagonal.max()})" if mistakes else ""
    axes.set_title(
        f"{IMAGE_SETS[task].name} test: {accuracy:.1%} of {counts.sum():,} images right, {mistakes} wrong{most}",
        fontsize=8.5,
    )
    save(figure, path, source)


def ranking(path: Path, rows: list[tuple[str, list[tuple[np.ndarray, str, bool]]]], title: str, source: str) -> None:
    """Rows of images, each with a caption.

    Args:
        rows: (label of the row, [(image (64, 64, 3) uint8, caption, whether the caption tells of a mistake)]).
    """
    columns = max(len(images) for _, images in rows)
    # Half a page wide, so that two of them stand side by side in print.
    figure, grid = plt.subplots(len(rows), columns, figsize=(3.5, 1.04 * len(rows) + 0.4), squeeze=False)
    figure.subplots_adjust(
        left=0.06, right=0.995, bottom=0.003, top=1 - 0.62 / figure.get_figheight(), hspace=0.5, wspace=0.06
    )
    for axes in grid.flat:
        axes.set_axis_off()
    for axes_row, (label, images) in zip(grid, rows, strict=True):
        for axes, (image, caption, mistake) in zip(axes_row, images):
            axes.imshow(image, interpolation="nearest")
            axes.set_title(caption, fontsize=5.5, loc="center", pad=1.5, color="#AA2222" if mistake else "black")
        position = {"transform": axes_row[0].transAxes, "ha": "right", "va": "center", "rotation": 90}
        axes_row[0].text(-0.06, 0.5, label, fontsize=5.5, fontweight="bold", **position)
    figure.suptitle(title, fontsize=6.5, x=0.01, y=0.998, ha="left")
    save(figure, path, source)
