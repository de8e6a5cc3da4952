"""The final model as ONNX, for use without this project, and a card that says what it is.

Run from the project root: python -m studies.export, with `rgb` or `ms` for one task. Minutes: onnxruntime predicts the test
list, and the largest difference from torch's own probabilities is stated. Pixels in, as the files have them, float32 (batch,
64, 64, bands); probabilities out, (batch, 10). Standardisation, resizing and views are inside; the batch size is free.

reads   the final model and its test results, the test images
writes  outputs/<profile>/<task>/export/: model.onnx, MODEL_CARD.md; cache/
"""

import warnings

import numpy as np
import onnxruntime
import torch
from torch import nn

from dataset import CLASSES, IMAGE_SETS
from engine.evaluation import BATCH_SIZE, FinalModel
from models import orientation
from project import TASKS, atomic_write, run, shown, write_text
from studies.subject import Subject, percent, span, subjects

INPUT, OUTPUT = "pixels", "probabilities"


def main(tasks: tuple[str, ...]) -> None:
    for subject in subjects(tasks, "export"):
        path = subject.folder / "model.onnx"
        whole = FromPixels(subject.final, float(np.iinfo(IMAGE_SETS[subject.task].dtype).max)).cpu().eval()
        with atomic_write(path) as partial:
            write_onnx(whole, len(subject.final.bands), str(partial))
        difference, disagreeing = compare(subject, onnxruntime.InferenceSession(str(path)))
        write_text(subject.folder / "MODEL_CARD.md", card(subject, difference))
        print(
            f"{subject.title}: largest difference of a probability {difference:.1e}, {disagreeing} of "
            f"{len(subject.results.split.files):,} answers differ\nwrote {shown(path)}: {path.stat().st_size / 1e6:.1f} MB, "
            "MODEL_CARD.md"
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
        # All views in one batch: a graph of one network, not of eight.
        views = torch.cat([orientation(images, number) for number in range(self.views)])
        return self.model.linear(self.model.embed(views).unflatten(0, (self.views, -1)).mean(0)).softmax(1)


def write_onnx(whole: FromPixels, bands: int, path: str) -> None:
    pixels = torch.zeros(2, 64, 64, bands)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what torch will do otherwise in future
        torch.onnx.export(
            whole,
            (pixels,),
            path,
            input_names=[INPUT],
            output_names=[OUTPUT],
            dynamic_shapes={"pixels": {0: torch.export.Dim("batch")}},
            external_data=False,
            dynamo=True,
            verbose=False,
        )


def compare(subject: Subject, session: onnxruntime.InferenceSession) -> tuple[float, int]:
    """The largest difference of a probability from the saved logits' on the test list, and how many answers differ."""
    data = subject.images("test")
    answers = [
        session.run([OUTPUT], {INPUT: data.pixels[start : start + BATCH_SIZE].astype(np.float32)})[0]
        for start in range(0, len(data), BATCH_SIZE)
    ]
    theirs, ours = np.concatenate(answers), subject.results.logits.softmax(1).numpy()
    return float(np.abs(theirs - ours).max()), int((theirs.argmax(1) != ours.argmax(1)).sum())


def card(subject: Subject, difference: float) -> str:
    final, metrics = subject.final, subject.results.metrics
    about, setting = final.about, final.setting
    images = len(subject.results.split.files)
    weights = about.get("initial_weights") or {"origin": "none (random)"}
    unit = "pixel values, 0 to 255" if subject.task == "rgb" else "reflectance times 10,000, level 1C, without offset"
    rows = "\n".join(f"| {name} | {percent(metrics['tpr'][name])} |" for name in CLASSES)
    return f"""# EuroSAT {subject.title}, {setting.backbone}

`model.onnx`: which of ten kinds of land a 640 m x 640 m Sentinel-2 patch shows.

- **In** `{INPUT}`: float32 (batch, 64, 64, {len(final.bands)}), bands {", ".join(final.bands)}, as the files have them ({unit}).
- **Out** `{OUTPUT}`: float32 (batch, 10): {", ".join(CLASSES)}.
- Standardisation, resizing to {setting.image_size} pixels and {setting.views} view(s) are inside. Largest difference of a
  probability from torch's on the test list: {difference:.1e}.

## Data and training

{" / ".join(f"{count:,}" for count in about["images"].values())} images of EuroSAT (train / val / test), hash of the lists
{about["splits_sha256"][:16]}. Initial weights: {weights["origin"]}. Setting `{setting.name}`, epoch {about["epoch"]} of
{setting.epochs}, chosen by val; seed {about["seed"]}. SHA-256 of final_model.pt: {final.sha256}.

## Figures

Test accuracy {percent(metrics["accuracy"])} % (95 % interval {span(metrics["accuracy"], images)}, Wilson, {images:,} images), mean
TPR {percent(metrics["mean_tpr"])} %.

| class | TPR (%) |
|---|---|
{rows}

## Limits

One seed. It knows these ten classes and answers with one of them whatever it is shown. EuroSAT is of Europe, mostly without
clouds, and was published in 2017; about 1 % of its labels are thought to be wrong. Patches of a random split lie close together:
elsewhere expect less. Products since processing baseline 04.00 carry an offset of -1000 that must be taken off first.

## Licence

MIT. EuroSAT: P. Helber, B. Bischke, A. Dengel, D. Borth, IEEE JSTARS 2019, MIT licence; contains modified Copernicus Sentinel
data.
"""


if __name__ == "__main__":
    run(main, __doc__, choices=TASKS)
