"""The final model as ONNX, for use without this project, and a model card.

Run from the project root: python -m studies.export; with `rgb` or `ms` for one task. Minutes: onnxruntime predicts the test list,
and the card states the largest difference from torch's probabilities. Input: pixels as in the files, float32 (batch, 64, 64,
bands). Output: probabilities, (batch, 10). The file contains standardisation, resizing and views; the batch size is free.

reads   the final model and its test results, the test images
writes  outputs/<profile>/<task>/export/: model.onnx, MODEL_CARD.md
"""

import warnings

from base.command_line import run
from base.files import atomic_write, write_text
from base.project import CLASSES, TASKS, Task, display_path

import numpy as np
import onnxruntime
import torch
from torch import nn

from engine.final_model import FinalModel
from engine.results import BATCH_SIZE
from models import orientation
from studies.subject import Subject, interval_text, percent, subjects

INPUT, OUTPUT = "pixels", "probabilities"


def main(tasks: list[Task]) -> None:
    for subject in subjects(tasks, "export"):
        path = subject.folder / "model.onnx"
        network = FromPixels(subject.final, float(np.iinfo(subject.task.dtype).max)).cpu().eval()
        with atomic_write(path) as partial:
            write_onnx(network, len(subject.final.bands), str(partial))
        difference, disagreeing = compare_with_torch(subject, onnxruntime.InferenceSession(str(path)))
        write_text(subject.folder / "MODEL_CARD.md", model_card(subject, difference))
        print(
            f"{subject.task.title}: largest difference of a probability {difference:.1e}, {disagreeing} of "
            f"{len(subject.results.split.files):,} predictions differ\nwrote {display_path(path)}: "
            f"{path.stat().st_size / 1e6:.1f} MB, MODEL_CARD.md"
        )


class FromPixels(nn.Module):
    """A final model from pixels, (batch, 64, 64, bands), to probabilities, (batch, 10)."""

    def __init__(self, final: FinalModel, highest: float) -> None:
        super().__init__()
        self.model, self.views, self.highest = final.model, final.setting.views, highest
        self.register_buffer("mean", final.mean)
        self.register_buffer("std", final.std)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        images = ((pixels / self.highest - self.mean) / self.std).permute(0, 3, 1, 2)
        # All views in one batch, so that the graph contains one network instead of eight.
        views = torch.cat([orientation(images, number) for number in range(self.views)])
        return self.model.linear(self.model.embed(views).unflatten(0, (self.views, -1)).mean(0)).softmax(1)


def write_onnx(network: FromPixels, bands: int, path: str) -> None:
    shapes = {"pixels": {0: torch.export.Dim("batch")}}
    names = {"input_names": [INPUT], "output_names": [OUTPUT]}
    how = {"dynamic_shapes": shapes, "external_data": False, "dynamo": True, "verbose": False}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about changes in future versions of torch
        torch.onnx.export(network, (torch.zeros(2, 64, 64, bands),), path, **names, **how)


def compare_with_torch(subject: Subject, session: onnxruntime.InferenceSession) -> tuple[float, int]:
    """The largest difference from the saved logits' probabilities on test, and the number of predictions that differ."""
    pixels = subject.images("test").pixels
    batches = (pixels[start : start + BATCH_SIZE].astype(np.float32) for start in range(0, len(pixels), BATCH_SIZE))
    exported = np.concatenate([session.run([OUTPUT], {INPUT: batch})[0] for batch in batches])
    saved = subject.results.logits.softmax(1).numpy()
    return float(np.abs(exported - saved).max()), int((exported.argmax(1) != saved.argmax(1)).sum())


def model_card(subject: Subject, difference: float) -> str:
    final, metrics, metadata, setting = (
        subject.final,
        subject.results.metrics,
        subject.final.metadata,
        subject.final.setting,
    )
    images = len(subject.results.split.files)
    weights = metadata.get("initial_weights") or {"origin": "none (random)"}
    unit = (
        "pixel values, 0 to 255" if subject.task.name == "rgb" else "reflectance times 10,000, level 1C, without offset"
    )
    rows = "\n".join(f"| {name} | {percent(metrics['tpr'][name])} |" for name in CLASSES)
    return f"""# EuroSAT {subject.task.title}, {setting.backbone}

`model.onnx` tells which of ten land-use classes a Sentinel-2 patch of 640 m x 640 m shows.

- **In** `{INPUT}`: float32 (batch, 64, 64, {len(final.bands)}), bands {", ".join(final.bands)}, as in the files ({unit}).
- **Out** `{OUTPUT}`: float32 (batch, 10): {", ".join(CLASSES)}.
- The file contains standardisation, resizing to {setting.image_size} pixels and {setting.views} view(s). Largest difference of a
  probability from torch's on the test list: {difference:.1e}.

## Data and training

{" / ".join(f"{count:,}" for count in metadata["images"].values())} images of EuroSAT (train / val / test), hash of the lists
{metadata["splits_sha256"][:16]}. Initial weights: {weights["origin"]}. Setting `{setting.name}`, epoch {metadata["epoch"]} of
{setting.epochs}, chosen by val; seed {metadata["seed"]}. SHA-256 of final_model.pt: {final.sha256}.

## Figures

Test accuracy {percent(metrics["accuracy"])} % (95 % interval {interval_text(metrics["accuracy"], images)}, Wilson, {images:,} images), mean
TPR {percent(metrics["mean_tpr"])} %.

| class | TPR (%) |
|---|---|
{rows}

## Limits

One seed. The model names one of these ten classes for any input. EuroSAT covers Europe, mostly without clouds, and was
published in 2017; about 1 % of its labels are thought to be wrong. The patches of a random split lie close together: expect a
lower accuracy elsewhere. Products since processing baseline 04.00 carry an offset of -1000 that must be removed first.

## Licence

MIT. EuroSAT: P. Helber, B. Bischke, A. Dengel, D. Borth, IEEE JSTARS 2019, MIT licence; contains modified Copernicus Sentinel
data.
"""


if __name__ == "__main__":
    run(main, __doc__, choices=TASKS)
